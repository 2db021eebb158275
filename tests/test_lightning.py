"""`klnorm.integrations.lightning`: the KL in Lightning's Trainer, against a loop written by hand."""

import csv
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins import MixedPrecision
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from klnorm import KLLayerNorm, kl_divergence, replace_layer_norm, restore_layer_norm
from klnorm.integrations.lightning import KLCallback
from klnorm.training import KLWeight, param_groups

N = 8
BATCH = 8
RATES = {"lr": 0.1, "rho_lr": 1.0}


class Classifier(LightningModule):
    """fp64, and with one draw a forward, the same in each: all micro-batches see the function the whole batch sees."""

    def __init__(self, fused=False):
        super().__init__()
        self.fused, self.generator = fused, torch.Generator()
        layers = nn.Linear(4, N), nn.LayerNorm(N), nn.Linear(N, N), nn.LayerNorm(N), nn.Linear(N, 3)
        self.net = replace_layer_norm(nn.Sequential(*layers), noise="batch", generator=self.generator).double()
        with torch.no_grad():
            for parameter in self.net.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)

    def loss(self, x, target):
        self.generator.manual_seed(5)
        return F.cross_entropy(self.net(x), target)

    def training_step(self, batch, index):
        return self.loss(*batch)

    def configure_optimizers(self):
        return torch.optim.SGD(param_groups(self, **RATES), momentum=0.9, fused=self.fused)


class TwoOptimizers(Classifier):
    """One without posteriors, one with."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, index):
        self.manual_backward(self.loss(*batch))
        for optimizer in self.optimizers():
            optimizer.step()
            optimizer.zero_grad()

    def configure_optimizers(self):
        options = {"momentum": 0.9, "weight_decay": 0.0}
        rho = torch.optim.SGD(param_groups(self, **RATES)[-1:], **options)
        return torch.optim.SGD(param_groups(self.net[4], RATES["lr"]), **options), rho


def data(count):
    return TensorDataset(torch.randn(count, 4, dtype=torch.float64), torch.randint(3, (count,)))


def weight():
    return KLWeight(num_examples=20, warmup_steps=4)


def fit(model, examples, folder, callback, ckpt_path=None, **options):
    options = {"max_epochs": 1, "logger": False, "enable_checkpointing": False, "log_every_n_steps": 1, **options}
    trainer = Trainer(
        accelerator="cpu", callbacks=[callback], default_root_dir=folder, enable_progress_bar=False,
        enable_model_summary=False, **options,
    )  # fmt: skip
    trainer.fit(model, DataLoader(examples, batch_size=BATCH), ckpt_path=ckpt_path)
    return trainer


def fit_by_hand(model, examples, batch_size, optimizers=None, clip=None):
    """Whole batches; returns the KL and its weight of every step."""
    kl_weight, logs = weight(), []
    optimizers = optimizers or [model.configure_optimizers()]
    for x, target in DataLoader(examples, batch_size=batch_size):
        kl = kl_divergence(model)
        logs.append((kl.item(), kl_weight.value))
        model.zero_grad()
        (model.loss(x, target) + kl_weight.value * kl).backward()
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        for optimizer in optimizers:
            optimizer.step()
        kl_weight.step()
    return logs


def assert_same_parameters(found, expected):
    expected = dict(expected.named_parameters())
    for name, parameter in found.named_parameters():
        # fp64, sums of 32 terms in another order, a few steps
        torch.testing.assert_close(parameter, expected[name], rtol=1e-10, atol=1e-12, msg=name)


def twins(cls=Classifier):
    model, by_hand = cls(), cls()
    model.load_state_dict(by_hand.state_dict())
    return model, by_hand


@pytest.mark.parametrize("clip", [None, 0.2], ids=["unclipped", "clipped"])
@pytest.mark.parametrize("accumulation", [1, 4])
def test_training_is_that_of_a_loop_by_hand(tmp_path, accumulation, clip):
    model, by_hand = twins()
    examples = data(3 * BATCH * accumulation)
    callback, logger = KLCallback(weight()), CSVLogger(tmp_path)
    options = {"accumulate_grad_batches": accumulation, "gradient_clip_val": clip, "logger": logger}
    fit(model, examples, tmp_path, callback, **options)
    logs = fit_by_hand(by_hand, examples, BATCH * accumulation, clip=clip)
    assert_same_parameters(model, by_hand)
    assert callback.kl_weight.steps == 3
    with open(Path(logger.log_dir) / "metrics.csv", encoding="utf-8") as file:
        rows = [(float(row["kl"]), float(row["kl_weight"])) for row in csv.DictReader(file)]
    for found, expected in zip(rows, logs, strict=True):
        assert found == pytest.approx(expected, rel=1e-6)  # logged in fp32


def test_a_gradient_scaler_does_not_scale_the_kl(tmp_path):
    model, by_hand = twins()
    examples = data(3 * BATCH)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    fit(model, examples, tmp_path, KLCallback(weight()), plugins=[MixedPrecision("16-mixed", "cpu", scaler)])
    fit_by_hand(by_hand, examples, BATCH)
    assert_same_parameters(model, by_hand)


def test_a_fused_optimizer_under_a_gradient_scaler_is_refused(tmp_path):
    plugins = [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))]
    with pytest.raises(ValueError, match=r"optimizer is fused.*Remedy: fused=False, or precision='bf16-mixed'"):
        fit(Classifier(fused=True), data(BATCH), tmp_path, KLCallback(weight()), plugins=plugins)
    for fused, remedy in (False, {"plugins": plugins}), (True, {"precision": "bf16-mixed"}):
        callback = KLCallback(weight())
        fit(Classifier(fused=fused), data(BATCH), tmp_path, callback, **remedy)
        assert callback.kl_weight.steps == 1


def test_a_fused_optimizer_without_a_scaler_is_fine(tmp_path):
    model, by_hand = Classifier(fused=True), Classifier()
    model.load_state_dict(by_hand.state_dict())
    examples = data(3 * BATCH)
    fit(model, examples, tmp_path, KLCallback(weight()))
    fit_by_hand(by_hand, examples, BATCH)
    assert_same_parameters(model, by_hand)


def test_the_optimizer_that_holds_posteriors_counts(tmp_path):
    model, by_hand = twins(TwoOptimizers)
    examples, callback = data(3 * BATCH), KLCallback(weight())
    fit(model, examples, tmp_path, callback)
    fit_by_hand(by_hand, examples, BATCH, by_hand.configure_optimizers())
    assert_same_parameters(model, by_hand)
    assert callback.kl_weight.steps == 3


def test_frozen_posteriors_and_posteriors_outside_of_the_loss(tmp_path):
    class Extended(Classifier):
        def __init__(self):
            super().__init__()
            self.net[1].requires_grad_(False)
            self.unused = KLLayerNorm(N, dtype=torch.float64)

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)  # the frozen ones included

    model, by_hand = twins(Extended)
    examples = data(3 * BATCH)
    frozen = [p.detach().clone() for p in model.net[1].parameters()]
    fit(model, examples, tmp_path, KLCallback(weight()))
    fit_by_hand(by_hand, examples, BATCH)
    assert_same_parameters(model, by_hand)
    assert all(torch.equal(p, q) for p, q in zip(model.net[1].parameters(), frozen, strict=True))
    assert not torch.equal(model.unused.weight_rho, KLLayerNorm(N, dtype=torch.float64).weight_rho)


def test_resuming_continues_bit_for_bit(tmp_path):
    model, resumed = twins()
    examples, checkpoint = data(3 * BATCH), str(tmp_path / "half")
    fit(model, examples, tmp_path, KLCallback(weight())).save_checkpoint(checkpoint)
    whole, by_resuming = KLCallback(weight()), KLCallback(weight())
    fit(model, examples, tmp_path, whole, checkpoint, max_epochs=2)
    fit(resumed, examples, tmp_path, by_resuming, checkpoint, max_epochs=2)
    assert whole.kl_weight.steps == by_resuming.kl_weight.steps == 6
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), resumed.parameters(), strict=True))


def test_a_model_without_kl_layers_is_refused_in_training(tmp_path):
    model, callback = Classifier(), KLCallback(weight())
    restore_layer_norm(model)
    with pytest.raises(ValueError, match=r"model has no KL layer.*would be 0.*Remedy: klnorm\.replace_layer_norm"):
        fit(model, data(BATCH), tmp_path, callback)
    replace_layer_norm(model)
    fit(model, data(BATCH), tmp_path, callback)
    assert callback.kl_weight.steps > 0


def test_the_callback_explains_what_is_wrong(tmp_path):
    with pytest.raises(TypeError, match=r"kl_weight is a float.*Remedy: klnorm\.KLWeight\(num_examples=len\(train_set"):
        KLCallback(0.1)
    train_set = data(BATCH)
    callback = KLCallback(KLWeight(num_examples=len(train_set)))
    fit(Classifier(), train_set, tmp_path, callback)
    assert callback.kl_weight.value == 1 / BATCH
