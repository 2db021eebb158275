"""`klnorm.training`: parameter groups, and the weight of the KL in a training loop."""

import copy
import math
import subprocess
import sys
from fractions import Fraction

import numpy
import peft
import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from torch import nn
from torch._subclasses import FakeTensorMode

from klnorm import KLLayerNorm, kl_divergence, replace_layer_norm
from klnorm.training import KLWeight, param_groups

N = 8


class OwnRMSNorm(nn.Module):
    """A norm that only its name gives away, as they are in transformers."""

    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(N))


class PreNorm(nn.Module):
    """Not a norm, in spite of its name: a block that starts with one."""

    def __init__(self):
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(N), nn.Linear(N, N)


class Kinds(nn.Module):
    """One of every kind of parameter."""

    def __init__(self):
        super().__init__()
        self.token = nn.Parameter(torch.zeros(N))
        self.embedding, self.head = nn.Embedding(5, N), nn.Linear(N, 5)
        self.head.weight = self.embedding.weight
        self.kl, self.kl_no_bias = KLLayerNorm(N), KLLayerNorm(N, bias=False)
        self.attention, self.lstm = nn.MultiheadAttention(N, 2), nn.LSTM(N, N)
        self.norms = nn.ModuleList([nn.RMSNorm(N), nn.GroupNorm(2, N), nn.BatchNorm1d(N), OwnRMSNorm()])
        self.block = PreNorm()
        self.frozen, self.frozen_kl = nn.Linear(N, N).requires_grad_(False), KLLayerNorm(N).requires_grad_(False)


GROUPS_OF_KINDS = {
    "decay": {
        "token", "embedding.weight", "attention.in_proj_weight", "attention.out_proj.weight",
        "lstm.weight_ih_l0", "lstm.weight_hh_l0", "block.linear.weight",
    },
    "no_decay": {
        "head.bias", "kl.weight", "kl.bias", "kl_no_bias.weight", "attention.in_proj_bias", "attention.out_proj.bias",
        "lstm.bias_ih_l0", "lstm.bias_hh_l0", "norms.0.weight", "norms.1.weight", "norms.1.bias", "norms.2.weight",
        "norms.2.bias", "norms.3.gain", "block.norm.weight", "block.norm.bias", "block.linear.bias",
    },
    "rho": {"kl.weight_rho", "kl.bias_rho", "kl_no_bias.weight_rho"},
}  # fmt: skip


def names_in(groups, model):
    """Group name -> names of its parameters in `model`, which must be each in one place."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    found = {group["name"]: [names[p] for p in group["params"]] for group in groups}
    assert sum(map(len, found.values())) == len({p for group in groups for p in group["params"]})
    return {group: set(members) for group, members in found.items()}


def small_model(**options):
    """Two KL layers, one of them used twice; posteriors off their priors, fp64."""
    model = nn.Sequential(nn.Linear(4, N), norm := nn.LayerNorm(N), nn.Linear(N, N), norm, nn.LayerNorm(N, bias=False))
    model = replace_layer_norm(model.append(nn.Linear(N, 3)).double(), **options)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


# Parameter groups


def test_every_kind_of_parameter_is_in_its_group():
    model = Kinds()
    groups = param_groups(model, 1e-4, rho_lr=3e-2, weight_decay=0.2)
    assert names_in(groups, model) == GROUPS_OF_KINDS
    settings = [(group["name"], group["lr"], group["weight_decay"]) for group in groups]
    assert settings == [("decay", 1e-4, 0.2), ("no_decay", 1e-4, 0.0), ("rho", 3e-2, 0.0)]


@pytest.mark.parametrize("wrap", [nn.DataParallel, torch.compile, nn.Sequential], ids=lambda wrap: wrap.__name__)
def test_a_wrapped_model_has_the_same_groups(wrap):
    model = Kinds()
    assert names_in(param_groups(wrap(model), 1e-4), model) == GROUPS_OF_KINDS


def test_peft_leaves_the_adapter_and_the_trainable_copy():
    model = nn.Sequential(nn.Linear(4, N), nn.LayerNorm(N), nn.Linear(N, 2))
    config = peft.LoraConfig(target_modules=["0"], modules_to_save=["1"])
    model = peft.get_peft_model(replace_layer_norm(model), config)
    copied = "base_model.model.1.modules_to_save.default."
    assert names_in(param_groups(model, 1e-4), model) == {
        "decay": {f"base_model.model.0.lora_{ab}.default.weight" for ab in "AB"},
        "no_decay": {copied + "weight", copied + "bias"},
        "rho": {copied + "weight_rho", copied + "bias_rho"},
    }


@pytest.mark.parametrize("order", [("norm", "linear"), ("linear", "norm")])
def test_a_shared_parameter_is_in_the_most_particular_group(order):
    modules = {"norm": KLLayerNorm(N), "linear": nn.Linear(1, N)}
    modules["linear"].bias = modules["norm"].weight_rho
    modules["linear"].weight = modules["norm"].weight
    model = nn.ModuleDict({name: modules[name] for name in order})
    groups = param_groups(model, 1e-4)
    norm = modules["norm"]
    expected = {"no_decay": {norm.weight, norm.bias}, "rho": {norm.weight_rho, norm.bias_rho}}
    assert {group["name"]: set(group["params"]) for group in groups} == expected
    assert sum(len(group["params"]) for group in groups) == 4


def test_an_optimizer_takes_the_groups_and_their_rates():
    model = small_model()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.SGD(param_groups(model, 0.25, rho_lr=4.0, weight_decay=0.5))
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    # One step of SGD: rate * (gradient + decay * value), the gradient being 1.
    for name, p in model.named_parameters():
        old = before[name]
        decay = 0.5 * old if name in ("0.weight", "2.weight", "5.weight") else 0.0
        torch.testing.assert_close(p, old - (4.0 if "rho" in name else 0.25) * (1 + decay), rtol=0, atol=1e-14)
    restored = torch.optim.SGD(param_groups(model, 1.0))
    restored.load_state_dict(optimizer.state_dict())
    assert [(g["name"], g["lr"]) for g in restored.param_groups] == [("decay", 0.25), ("no_decay", 0.25), ("rho", 4.0)]


def test_empty_groups_are_left_out():
    assert [group["name"] for group in param_groups(nn.Linear(3, 2, bias=False), 1.0)] == ["decay"]
    assert [group["name"] for group in param_groups(KLLayerNorm(3), 1.0)] == ["no_decay", "rho"]


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        (([nn.Linear(2, 2)], 1.0), {}, TypeError, r"model is a list, expected an nn\.Module"),
        ((nn.Linear(2, 2), 0.0), {}, ValueError, "lr is 0.0, expected a finite number above 0"),
        ((nn.Linear(2, 2), "1"), {}, TypeError, "lr is a str, expected a float"),
        ((nn.Linear(2, 2), 1.0), {"rho_lr": -1.0}, ValueError, "rho_lr is -1.0, expected a finite number above 0"),
        ((nn.Linear(2, 2), 1.0), {"weight_decay": -0.1}, ValueError, "weight_decay is -0.1, expected .* 0 or more"),
        ((nn.Linear(2, 2), 10**400), {}, ValueError, r"lr is 1000000\d*\.\.\., expected a finite number above 0"),
        ((nn.Linear(2, 2), numpy.ones(2)), {}, TypeError, "lr is a ndarray, expected a float"),
        ((nn.Linear(2, 2), 1.0), {"rho_lr": 1e308}, ValueError, r"rho_lr is 1e\+308, expected a finite number above 0"),
        ((nn.Linear(2, 2), 1.0), {"weight_decay": 10**400}, ValueError, "weight_decay is 100000"),
        ((nn.Linear(2, 2), 1.0), {"weight_decay": None}, TypeError, "weight_decay is a NoneType, expected a float"),
        ((nn.Linear(2, 2).requires_grad_(False), 1.0), {}, ValueError, "model has no trainable parameter.*Remedy"),
    ],
)
def test_param_groups_explains_what_is_wrong(arguments, options, error, message):
    with pytest.raises(error, match=message):
        param_groups(*arguments, **options)


def test_numbers_of_any_type_mean_the_same_to_an_optimizer():
    fractions = param_groups(KLLayerNorm(3), Fraction(1, 4), rho_lr=Fraction(1, 2), weight_decay=numpy.float32(0.5))
    assert [(type(group["lr"]), group["lr"]) for group in fractions] == [(float, 0.25), (float, 0.5)]
    weight = KLWeight(num_examples=numpy.int64(5), warmup_steps=numpy.uint8(2), max_weight=Fraction(1, 2))
    assert values_of(weight, 3) == values_of(KLWeight(num_examples=5, warmup_steps=2, max_weight=0.5), 3)


# The weight of the KL


def values_of(kl_weight, steps):
    """The value before each of `steps` optimizer steps."""
    values = []
    for _ in range(steps):
        values.append(kl_weight.value)
        kl_weight.step()
    return values


def test_per_example_the_weight_ramps_from_0_to_max_weight_over_n():
    assert values_of(KLWeight(num_examples=50, warmup_steps=4), 6) == [0.0, 0.005, 0.01, 0.015, 0.02, 0.02]
    assert values_of(KLWeight(num_examples=50, warmup_steps=2, max_weight=0.5), 4) == [0.0, 0.005, 0.01, 0.01]
    assert values_of(KLWeight(num_examples=50), 3) == [0.02] * 3
    assert values_of(KLWeight(num_examples=50, max_weight=0), 2) == [0.0, 0.0]


def test_per_parameter_the_weight_counts_each_scale_and_shift_once():
    # small_model: a scale and a shift of a layer used twice, and a scale: 3 N of them, each with a mean and a rho.
    assert KLWeight(per_parameter=small_model()).value == 1 / (3 * N)
    assert values_of(KLWeight(per_parameter=KLLayerNorm(5), warmup_steps=2, max_weight=4), 3) == [0.0, 0.2, 0.4]
    tied = nn.ModuleList([KLLayerNorm(5), KLLayerNorm(5)])
    for name, parameter in list(tied[0].named_parameters()):
        tied[1].register_parameter(name, parameter)
    assert KLWeight(per_parameter=tied).value == 1 / 10


def test_the_term_is_the_weighted_kl_with_its_gradient():
    model = small_model()
    kl_weight = KLWeight(num_examples=7, warmup_steps=10)
    for _ in range(3):
        kl_weight.step()
    parameters = [p for name, p in model.named_parameters() if name.startswith(("1", "4"))]
    found = torch.autograd.grad(kl_weight(model), parameters)
    for f, e in zip(found, torch.autograd.grad(kl_divergence(model), parameters), strict=True):
        torch.testing.assert_close(f, e * (3 / 10 / 7), rtol=1e-14, atol=0)
        assert f.any()


def test_the_warm_up_does_not_compile_a_loss_again():
    model, counter = small_model(), torch._dynamo.testing.CompileCounter()
    kl_weight = KLWeight(num_examples=7, warmup_steps=3)
    compiled = torch.compile(lambda: kl_weight(model), backend=counter, fullgraph=True)
    for steps in range(5):
        assert compiled().item() == pytest.approx(min(1, steps / 3) / 7 * kl_divergence(model).item(), rel=1e-14)
        kl_weight.step()
    assert counter.frame_count == 1


def test_the_step_may_come_before_backward():
    kl_weight, norm = KLWeight(num_examples=7, warmup_steps=3), KLLayerNorm(N, dtype=torch.float64)
    kl_weight.step()
    term = kl_weight(norm)
    kl_weight.step()
    (found,) = torch.autograd.grad(term, norm.weight_rho)
    (kl,) = torch.autograd.grad(kl_divergence(norm), norm.weight_rho)
    torch.testing.assert_close(found, kl / 21, rtol=1e-14, atol=0)


def test_a_kl_that_is_not_finite_is_named_or_let_through():
    model = small_model()
    with torch.no_grad():
        model[1].weight[2] = math.nan
    kl_weight = KLWeight(num_examples=7)
    with pytest.raises(ValueError, match="layer '1' is nan"):
        kl_weight(model)
    assert kl_weight(model, check_finite=False).isnan()


@pytest.mark.parametrize("per_parameter", [False, True], ids=["per_example", "per_parameter"])
def test_four_accumulated_micro_batches_are_one_step_of_the_whole(per_parameter):
    generator = torch.Generator()
    # One draw a forward, and the same in each: the micro-batches then see the function that the whole batch sees.
    whole = small_model(noise="batch", generator=generator)
    split = small_model(noise="batch", generator=generator)
    split.load_state_dict(whole.state_dict())
    x, target = torch.randn(2, 32, 4, dtype=torch.float64), torch.randint(3, (2, 32))

    def train(model, micro_batches):
        kl_weight = KLWeight(
            num_examples=None if per_parameter else 64, per_parameter=model if per_parameter else None, warmup_steps=4
        )
        kl_weight.step()  # or the first step would have no KL
        optimizer = torch.optim.SGD(param_groups(model, 0.1, rho_lr=1.0))
        for step in range(2):
            for part, of in zip(x[step].chunk(micro_batches), target[step].chunk(micro_batches), strict=True):
                generator.manual_seed(5)
                loss = F.cross_entropy(model(part), of) + kl_weight(model)
                (loss / micro_batches).backward()
            optimizer.step()
            optimizer.zero_grad()
            kl_weight.step()
        return dict(model.named_parameters())

    before = copy.deepcopy(whole.state_dict())
    split, whole = train(split, 4), train(whole, 1)
    for name, p in whole.items():
        # sums of 32 terms of order 1 in another order
        torch.testing.assert_close(split[name], p, rtol=1e-12, atol=1e-13, msg=name)
        assert not torch.equal(p, before[name]), name


def test_one_step_follows_the_gradient_of_the_bound():
    """Against the formulas written out: where noise is all but 0, rho moves by the KL alone."""
    model = replace_layer_norm(nn.Sequential(nn.LayerNorm(N, dtype=torch.float64)), init_std=1e-14, prior_std=0.1)
    norm = model[0]
    with torch.no_grad():
        norm.weight.add_(0.03)
    kl_weight = KLWeight(num_examples=20, max_weight=2.0)
    x, cotangent = torch.randn(6, N, dtype=torch.float64), torch.randn(6, N, dtype=torch.float64)
    ((model(x) * cotangent).sum() + kl_weight(model)).backward()
    xhat = F.layer_norm(x, (N,))
    torch.testing.assert_close(norm.bias.grad, cotangent.sum(0), rtol=0, atol=1e-12)
    torch.testing.assert_close(norm.weight.grad, (cotangent * xhat).sum(0) + 0.1 * 0.03 / 0.01, rtol=0, atol=1e-12)
    # d log(1 / s) / d rho = -sigmoid(rho) / softplus(rho), -1 in the limit
    torch.testing.assert_close(norm.weight_rho.grad, torch.full_like(norm.weight, -0.1), rtol=1e-10, atol=0)


def test_the_state_resumes_the_ramp():
    kl_weight = KLWeight(num_examples=10, warmup_steps=6)
    values = values_of(kl_weight, 2)
    resumed = KLWeight(num_examples=10, warmup_steps=6)
    resumed.load_state_dict(copy.deepcopy(kl_weight.state_dict()))
    assert resumed.steps == 2
    assert values + values_of(resumed, 6) == values_of(KLWeight(num_examples=10, warmup_steps=6), 8)
    assert repr(resumed) == "KLWeight(value=0.1, steps=8)"


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({}, ValueError, "neither of num_examples and per_parameter given, expected exactly one.*Remedy"),
        ({"num_examples": 5, "per_parameter": KLLayerNorm(2)}, ValueError, "both of num_examples and per_parameter"),
        ({"num_examples": 0}, ValueError, "num_examples is 0, expected 1 or more"),
        ({"num_examples": 2.5}, TypeError, "num_examples is a float, expected an int"),
        ({"num_examples": [1, 2]}, TypeError, "num_examples is a list, expected an int"),
        ({"per_parameter": 5}, TypeError, r"per_parameter is a int, expected an nn\.Module"),
        ({"per_parameter": nn.LayerNorm(2)}, ValueError, "per_parameter is a model without KL layers.*Remedy"),
        ({"num_examples": 10**400}, ValueError, r"num_examples is 1000000\d*\.\.\., expected an int of 64 bits"),
        ({"num_examples": numpy.ones(2)}, TypeError, "num_examples is a ndarray, expected an int"),
        ({"num_examples": 5, "warmup_steps": 10**5000}, ValueError, "warmup_steps is a int of thousands of digits"),
        ({"num_examples": 5, "max_weight": 10**400}, ValueError, "max_weight is 1000000.*, expected a finite number"),
        ({"num_examples": 5, "device": ["cpu"]}, TypeError, "device"),
        ({"num_examples": 5, "warmup_steps": -1}, ValueError, "warmup_steps is -1, expected 0 or more"),
        ({"num_examples": 5, "warmup_steps": 0.1}, TypeError, "warmup_steps is a float, expected an int"),
        ({"num_examples": 5, "max_weight": -1.0}, ValueError, "max_weight is -1.0, expected .* 0 or more"),
        ({"num_examples": 5, "max_weight": math.inf}, ValueError, "max_weight is inf, expected a finite number"),
    ],
)
def test_kl_weight_explains_what_is_wrong(options, error, message):
    with pytest.raises(error, match=message):
        KLWeight(**options)


@pytest.mark.parametrize(
    ("state", "error"), [({}, ValueError), ({"step": 3}, ValueError), (3, ValueError), ({"steps": -1}, ValueError),
                         ({"steps": 10**400}, ValueError), ({"step": 10**5000}, ValueError),
                         ({"steps": 1.5}, TypeError)]
)  # fmt: skip
def test_a_state_of_something_else_is_refused(state, error):
    kl_weight = KLWeight(num_examples=5, warmup_steps=3)
    with pytest.raises(error, match="state_dict"):
        kl_weight.load_state_dict(state)
    assert kl_weight.steps == 0


def test_no_framework_is_imported_with_klnorm():
    code = "import sys, klnorm.training, klnorm.integrations; print(*sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.PIPE, text=True).stdout.split()
    assert "klnorm.integrations" in found
    assert not {"transformers", "peft", "accelerate", "lightning", "matplotlib"} & set(found)


def test_a_captured_or_compiled_loss_sees_the_warm_up(device):
    """What a CUDA graph replays is an operation on the same tensor, whose value `step` changes in place."""
    model = KLLayerNorm(8, device=device, dtype=torch.float64)
    kl_weight = KLWeight(num_examples=10, warmup_steps=2, device=device)
    factor = kl_weight._factor(next(model.parameters()).device)
    kl, values = kl_divergence(model).item(), []
    for _ in range(4):
        values.append(kl_weight(model).item() / kl)
        assert factor.item() == kl_weight.value
        kl_weight.step()
    assert values == pytest.approx([0.0, 0.05, 0.1, 0.1], rel=1e-12)
    assert kl_weight._factor(factor.device) is factor
    kl_weight.load_state_dict({"steps": 1})
    assert factor.item() == 0.05


def test_a_step_before_the_backward_does_not_change_it(device):
    model = KLLayerNorm(8, device=device, dtype=torch.float64)
    kl_weight = KLWeight(num_examples=10, warmup_steps=2)
    kl_weight.step()
    term, kl = kl_weight(model), kl_divergence(model)
    kl_weight.step()
    found, expected = (torch.autograd.grad(t, model.weight_rho)[0] for t in (term, kl))
    torch.testing.assert_close(found, 0.05 * expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("remedy", ["device", "call"])
def test_a_capture_without_a_value_on_the_device_is_refused(monkeypatch, remedy):
    device = torch.device("cuda", 0)

    def capture(on):
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: on)

    with FakeTensorMode():  # in which a tensor may say that it is on a GPU
        kl_weight = KLWeight(num_examples=10)
        capture(True)
        with pytest.raises(
            ValueError, match=r"captured .*Remedy: KLWeight\(\.\.\., device=device\), or call it once before capture"
        ):
            kl_weight._factor(device)  # which a call asks for
        capture(False)
        if remedy == "device":
            kl_weight = KLWeight(num_examples=10, device=device)
        else:
            kl_weight._factor(device)
        capture(True)
        assert kl_weight._factor(device).device == device


def test_a_weight_first_used_in_inference_mode_can_still_step(device):
    model, kl_weight = KLLayerNorm(8, device=device), KLWeight(num_examples=10, warmup_steps=2)
    with torch.inference_mode():
        kl_weight._factors.clear()  # as on a device that it has not met
        kl_weight(model)
    kl_weight.step()
    kl = kl_divergence(model).item()
    assert kl_weight(model).item() == pytest.approx(0.05 * kl, rel=1e-6)
