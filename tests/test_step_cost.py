"""What a training step of a replaced model does on the host, counted on the way that CUDA tensors take."""

import pytest
import torch
from hf_models import TEXT, VOCABULARY, transformers

import klnorm
from bench.operations import Operations, launch_zeros
from klnorm import launch

pytestmark = pytest.mark.usefixtures("like_cuda")

GPT2 = {
    "vocab_size": VOCABULARY, "n_positions": 16, "n_embd": 16, "n_head": 2, "bos_token_id": 1, "eos_token_id": 2,
    "attn_implementation": "eager",
}  # fmt: skip
READING = "aten::_local_scalar_dense", "aten::item", "aten::is_nonzero", "aten::equal"


def bert(layers):
    config = transformers.BertConfig(**{**TEXT, "num_hidden_layers": layers}, num_labels=VOCABULARY)
    return transformers.BertForTokenClassification(config)


def gpt2(layers):
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**GPT2, n_layer=layers))


both = pytest.mark.parametrize("make", [bert, gpt2])


@pytest.fixture(autouse=True)
def _no_kernels(monkeypatch):
    """What is counted does not depend on values, so no kernel runs."""

    monkeypatch.setattr(launch.Call, "launch", launch_zeros)
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)


def loss_of(model, kl=None, dtype=torch.bfloat16):
    ids = torch.randint(3, VOCABULARY, (2, 5))
    with torch.autocast("cpu", dtype, enabled=dtype is not None):
        return model(input_ids=ids, labels=ids).loss


def counted(function):
    with Operations() as operations:
        result = function()
    return operations.counts, result


def cost_of_kl(model, dtype, kl=klnorm.kl_divergence):
    """(operations of the KL divergence itself, what it adds to backward)."""
    backward = []
    for with_kl in False, True:
        model.zero_grad()
        loss = loss_of(model, dtype=dtype)
        own, term = counted(lambda: kl(model)) if with_kl else ({}, 0)
        loss = loss + term
        backward.append(counted(loss.backward)[0])
    return own, backward[1] - backward[0]


@both
@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("stream", [torch.float32, torch.bfloat16], ids=str)
def test_the_kl_costs_the_same_whatever_the_number_of_layers(make, dtype, stream):
    costs = []
    for layers in 1, 12:
        model = klnorm.replace_layer_norm(make(layers)).to(stream).train()
        assert len(klnorm.kl_layers(model)) == 1 + 2 * layers
        own, added = cost_of_kl(model, dtype)
        assert own.total() <= 4, own  # stack, sum, and the copy that is looked at a step later
        assert added.total() <= 1, added
        costs.append((own, added))
    assert costs[0] == costs[1]


@both
def test_the_weighted_kl_costs_the_same_whatever_the_number_of_layers(make):
    kl_weight, costs = klnorm.KLWeight(num_examples=10), []
    for layers in 1, 12:
        model = klnorm.replace_layer_norm(make(layers)).train()
        own, added = cost_of_kl(model, torch.bfloat16, kl_weight)
        assert own.total() <= 6, own
        assert added.total() <= 2, added
        costs.append((own, added))
    assert costs[0] == costs[1]


@both
def test_the_closed_form_costs_the_same_whatever_the_number_of_layers(make):
    costs = []
    for layers in 1, 12:
        model = klnorm.replace_layer_norm(make(layers)).eval()
        own, kl = counted(lambda model=model: klnorm.kl_divergence(model))
        names = [p for layer in klnorm.kl_layers(model).values() for p in layer.posterior_parameters()]
        backward, _ = counted(lambda kl=kl, names=names: torch.autograd.grad(kl, names))
        assert own.total() <= 30
        costs.append((own, backward))
    assert costs[0] == costs[1]


@both
def test_nothing_reads_a_value_from_the_device(make):
    """Else the host would wait in every step until the device has caught up."""
    model, kl_weight = klnorm.replace_layer_norm(make(2)).train(), klnorm.KLWeight(num_examples=10, warmup_steps=5)

    def own_part_of_a_step():
        kl = kl_weight(model)
        kl.backward()
        kl_weight.step()

    for _ in range(3):
        forward, _ = counted(lambda: loss_of(model))
        own, _ = counted(own_part_of_a_step)
        plain, _ = counted(lambda: loss_of(model.eval()))  # what the model itself reads
        model.train()
        read = {name: own[name] + forward[name] - plain[name] for name in READING}
        assert not any(read.values()), read
