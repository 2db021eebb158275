"""Whole training runs, bit for bit: the same twice, and the same with a save and a fresh start in the middle."""

import copy

import pytest
import torch
from bert_training import assert_equal, bert, loss_of, new_batch

import klnorm

STEPS = 4


def start(device, own_generator):
    """A new model, its optimizer and the random generators that its training draws from, by name."""
    model = bert(device, torch.float32)
    generators = {"cpu": torch.default_generator}
    if device.type == "cuda":
        generators["cuda"] = torch.cuda.default_generators[torch.cuda.current_device()]
    if own_generator:
        generators["own"] = torch.Generator(device).manual_seed(11)
        for layer in klnorm.kl_layers(model).values():
            layer.generator = generators["own"]
    rho = [p for name, p in model.named_parameters() if name.endswith("_rho")]
    rest = [p for name, p in model.named_parameters() if not name.endswith("_rho")]
    optimizer = torch.optim.AdamW([{"params": rest, "lr": 1e-3}, {"params": rho, "lr": 1e-2, "weight_decay": 0.0}])
    return model, optimizer, generators


def train(model, optimizer, batches):
    """The losses of a step per batch."""
    losses = []
    for batch in batches:
        optimizer.zero_grad()
        loss = loss_of(model, batch)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def whole_state(model, losses):
    return {**model.state_dict(), "losses": torch.tensor(losses, dtype=torch.float64)}


@pytest.fixture
def batches(device):
    return [new_batch(device) for _ in range(STEPS)]


def test_the_same_seed_trains_to_the_same_bits_under_deterministic_algorithms(device, batches):
    assert torch.are_deterministic_algorithms_enabled()
    assert not torch.is_deterministic_algorithms_warn_only_enabled()
    model, *_ = start(device, own_generator=False)
    runs = []
    for seed in 5, 5, 6:
        again = copy.deepcopy(model)
        torch.manual_seed(seed)
        losses = train(again, torch.optim.AdamW(again.parameters(), lr=1e-2), batches)
        runs.append(whole_state(again, losses))
    assert_equal(runs[0], runs[1])
    norms = [name for name in runs[0] if name.endswith("_rho")]
    assert len(norms) == 6
    assert not any(torch.equal(runs[0][name], runs[2][name]) for name in norms)


@pytest.mark.parametrize("own_generator", [False, True], ids=["torchs_generator", "own_generator"])
def test_training_resumes_bit_for_bit(device, batches, tmp_path, own_generator):
    model, optimizer, generators = start(device, own_generator)
    losses = train(model, optimizer, batches[: STEPS // 2])
    checkpoint = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "generators": {name: generator.get_state() for name, generator in generators.items()},
    }
    torch.save(checkpoint, tmp_path / "checkpoint.pt")
    losses += train(model, optimizer, batches[STEPS // 2 :])
    expected = whole_state(model, losses)

    torch.manual_seed(1234)
    model, optimizer, generators = start(device, own_generator)
    checkpoint = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    model.load_state_dict(checkpoint["model"])
    optimizer.load_state_dict(checkpoint["optimizer"])
    for name, state in checkpoint["generators"].items():
        generators[name].set_state(state)
    losses = losses[: STEPS // 2] + train(model, optimizer, batches[STEPS // 2 :])
    assert_equal(whole_state(model, losses), expected)
