"""Random calls of the public functions: valid ones agree with fp64 autograd, invalid ones name what is wrong.

The number of a case, which its test is named after, seeds all that is drawn for it.
"""

import functools
import inspect
import math
import random
import re
import warnings
from fractions import Fraction

import numpy
import pytest
import torch
from torch import nn

import klnorm
from klnorm import reference
from klnorm.functional import kl_layer_norm, kl_rms_norm

DTYPES = torch.float64, torch.float32, torch.bfloat16, torch.float16
NOISES = "batch", "sample", "token"
SHAPES = (1,), (2,), (6,), (13,), (2, 3), (1, 4)
LEADING = (), (1,), (5,), (0,), (3, 4), (2, 0), (2, 1, 3)
PARAMETERS = "weight", "bias", "weight_rho", "bias_rho"
SEQUENCES = tuple, list, torch.Size, numpy.array

pytestmark = pytest.mark.usefixtures("one_thread")


class Case:
    """Settings of a valid call, and the tensors that fit them."""

    def __init__(self, number):
        torch.manual_seed(number)
        self.draw = draw = random.Random(number)
        self.kind, self.shape, self.leading = draw.choice(["layer", "rms"]), draw.choice(SHAPES), draw.choice(LEADING)
        self.dtype, self.parameter_dtype = draw.choice(DTYPES), draw.choice(DTYPES)
        self.sampled, self.shift = draw.random() < 0.75, draw.random() < 0.7
        self.posterior = "sampled" if self.sampled else "deterministic"
        self.options = {
            "noise": draw.choice(NOISES), "prior_std": draw.choice([0.125, 0.5, 2.0]),
            "eps": draw.choice([0.0, 2.0**-20, 0.5]), "sample_dim": draw.randrange(max(1, len(self.leading))),
        }  # fmt: skip
        self.heads = ()

    def choose_heads(self):
        """Perhaps the last dimension before the normalized ones counts heads."""
        per_head = 0 not in (self.leading or (0,)) and self.draw.random() < 0.3
        if per_head:
            self.heads = self.leading[-1:]
            self.options["sample_dim"] = self.draw.randrange(max(1, len(self.leading) - 1))
        return per_head

    def normal(self, size, dtype, centre=0.0, spread=1.0):
        return (centre + spread * torch.randn(size, dtype=torch.float64)).to(dtype).requires_grad_()

    def x(self):
        size, draw = (*self.leading, *self.shape), self.draw
        x = self.normal(size, self.dtype, draw.uniform(-3, 3), draw.uniform(0.5, 3))
        if draw.random() < 0.7:
            return x
        wide = torch.full((*size[:-1], 2 * size[-1] + 3), math.nan, dtype=x.dtype)
        wide[..., 2 : 2 + size[-1]] = x.detach()
        return wide[..., 2 : 2 + size[-1]].requires_grad_()

    def residual(self):
        dtype = self.dtype if self.dtype == torch.float64 else self.draw.choice(DTYPES[1:])
        return self.normal((*self.leading, *self.shape), dtype) if self.draw.random() < 0.3 else None

    def parameters(self):
        """By name, None for what there is not; with groups of rows or without."""
        groups = self.draw.choice([(), (), (1,), self.leading[:1]]) if 0 not in self.leading else ()
        groups = self.heads or groups
        there = {
            "weight": True,
            "bias": self.shift,
            "weight_rho": self.sampled,
            "bias_rho": self.sampled and self.shift,
        }
        centres = {"weight": 1.0, "bias": 0.0, "weight_rho": self.draw.uniform(-4, 2), "bias_rho": -1.0}
        size = (*groups, *self.shape)
        return {n: self.normal(size, self.parameter_dtype, centres[n]) if there[n] else None for n in PARAMETERS}

    def priors(self):
        names, size = ("weight_prior", "bias_prior"), (*self.heads, *self.shape)
        return {n: self.draw.choice([0.25, -1.0, self.normal(size, self.draw.choice(DTYPES))]) for n in names}

    def in_some_type(self, options):
        kind = self.draw.choice([float, Fraction, numpy.float64])
        options = {name: kind(value) if type(value) is float else value for name, value in options.items()}
        if self.leading and self.draw.random() < 0.5:
            options["sample_dim"] = numpy.int64(options["sample_dim"] - len(self.leading) - len(self.shape))
        return options


def functional_call(case):
    """(function, arguments by name, options of the reference)."""
    per_head = case.choose_heads()
    options = {**case.options, **case.priors(), "posterior": case.posterior, "sample": case.draw.random() < 0.8}
    options["per_head"] = per_head
    options["seed"] = torch.randint(-(2**63), 2**63 - 1, (1,))
    arguments = {
        "x": case.x(), "residual": case.residual(), "normalized_shape": case.draw.choice(SEQUENCES)(case.shape),
        **case.parameters(), **case.in_some_type(options), "posterior": case.posterior,
    }  # fmt: skip
    if case.kind == "layer":
        return kl_layer_norm, arguments, options
    return kl_rms_norm, arguments, {**options, "rms": True}


def layer_call(case):
    """(layer, x, options of the reference)."""
    cls = {"layer": klnorm.KLLayerNorm, "rms": klnorm.KLRMSNorm}[case.kind]
    options = {**case.in_some_type(case.options), "posterior": case.posterior, "dtype": case.parameter_dtype}
    layer = cls(case.shape, init_std=Fraction(1, 3), bias=case.shift, **options).train(case.draw.random() < 0.7)
    with torch.no_grad():
        for tensor in (*layer.parameters(), *layer.buffers()):
            tensor.add_(torch.randn_like(tensor) * 0.3)
    options = {**case.options, "posterior": case.posterior, "sample": layer.training, "rms": case.kind == "rms"}
    priors = {name: getattr(layer, name) for name in ("weight_prior", "bias_prior")}
    return layer, case.x(), {**options, **{name: prior for name, prior in priors.items() if prior is not None}}


def judge(z, shape, parameters, options, dy, dsum, dkl):
    """y, kl and gradients by name in fp64; z: x, or the sum of x and the residual as it was rounded."""
    leaves = {"z": z, **parameters}
    leaves = {n: None if t is None else t.detach().double().requires_grad_() for n, t in leaves.items()}
    options, rms = {n: option for n, option in options.items() if n != "rms"}, options.get("rms")
    function = reference.kl_rms_norm if rms else reference.kl_layer_norm
    y, kl = function(leaves["z"], shape, **{name: leaves[name] for name in PARAMETERS}, **options)
    present = {n: t for n, t in leaves.items() if t is not None}
    gradients = torch.autograd.grad((y, kl), list(present.values()), (dy.double(), dkl.double()))
    dz, *others = gradients
    dz = dz if dsum is None else dz + dsum.double()
    return {"y": y, "kl": kl, "x": dz, "residual": dz, **dict(zip(list(present)[1:], others, strict=True))}


def amplification(z, shape, options):
    """How much larger than its rounding the error of a normalized row, or of a gradient through it, may be."""
    rows = z.detach().double().reshape(-1, math.prod(shape))
    centred = rows if options.get("rms") else rows - rows.mean(1, keepdim=True)
    variance = centred.square().mean(1) + options["eps"]
    rows, rstd = rows[variance > 1e-20], variance[variance > 1e-20].rsqrt()
    return torch.cat([torch.ones(1), rstd, rstd * rows.abs().amax(1)]).max().item() ** 2


def assert_agree(found, z, shape, parameters, options, cotangents, eps):
    """`found`: y, kl and the gradients of what there is, by name; `eps`: of the arithmetic, rounded once after it."""
    expected = judge(z, shape, parameters, options, *cotangents)
    terms = math.prod(shape) + z.numel() // math.prod(shape)
    for name, value in found.items():
        largest = max([1.0, *expected[name].abs().flatten().tolist()])
        atol = 16 * terms * eps * amplification(z, shape, options) * largest
        rounding = 0.51 * torch.finfo(value.dtype).eps
        torch.testing.assert_close(
            value.double(), expected[name], rtol=rounding, atol=min(atol, 0.01 * largest),
            msg=lambda text, name=name: f"{name}: {text}",
        )  # fmt: skip


@pytest.mark.parametrize("number", range(250))
def test_a_valid_call_of_a_functional_form_agrees_with_fp64_autograd(number):
    case = Case(number)
    function, arguments, options = functional_call(case)
    parameters = {name: arguments.get(name) for name in PARAMETERS}
    leaves = {n: arguments[n] for n in ("x", "residual", *PARAMETERS) if arguments.get(n) is not None}
    y, *sums, kl = function(**arguments)
    cotangents = [torch.randn_like(t) for t in (y, *sums, kl)]
    gradients = torch.autograd.grad((y, *sums, kl), list(leaves.values()), cotangents)
    assert (y.dtype, y.shape) == (case.dtype, arguments["x"].shape)
    (z,), (dsum,) = (sums, cotangents[1:2]) if sums else ([arguments["x"]], [None])
    if sums:
        exact = arguments["x"].double() + arguments["residual"].double()
        torch.testing.assert_close(z.double(), exact, rtol=0.51 * torch.finfo(z.dtype).eps, atol=1e-6)
    found = {"y": y, "kl": kl, **dict(zip(leaves, gradients, strict=True))}
    assert_agree(
        found, z, case.shape, parameters, options, (cotangents[0], dsum, cotangents[-1]), torch.finfo(kl.dtype).eps
    )


@pytest.mark.parametrize("number", range(1000, 1100))
def test_a_valid_call_of_a_layer_agrees_with_fp64_autograd(number):
    case = Case(number)
    layer, x, options = layer_call(case)
    torch.manual_seed(number)
    options["seed"] = torch.randint(2**63 - 1, (1,))
    torch.manual_seed(number)
    y, kl = layer(x), klnorm.kl_divergence(layer)
    parameters = {name: getattr(layer, name) for name in PARAMETERS}
    leaves = {"x": x, **{n: t for n, t in parameters.items() if t is not None}}
    dy, dkl = torch.randn_like(y), torch.randn_like(kl)
    gradients = torch.autograd.grad((y, kl), list(leaves.values()), (dy, dkl))
    assert (y.dtype, y.shape) == (case.dtype, x.shape)
    found = {"y": y, "kl": kl, **dict(zip(leaves, gradients, strict=True))}
    # Evaluation is torch's own norm, and autograd adds the gradient of the KL to that of y in their own dtype.
    arithmetic = [kl.dtype] if layer.training else [torch.promote_types(x.dtype, torch.float32), layer.weight.dtype]
    eps = max(torch.finfo(dtype).eps for dtype in arithmetic)
    assert_agree(found, x, case.shape, parameters, options, (dy, None, dkl), eps)


# Invalid calls

ANYTHING = "abc", b"abc", 3 + 1j, [1.0], {}, object(), math, numpy.zeros(2), numpy.array(["batch"]), torch.zeros(2)
NUMBERS = *ANYTHING, None, True, math.nan, math.inf, -math.inf, 10**400, -(10**400), Fraction(10**400), 10**5000
PRIORS = [value for value in NUMBERS if not isinstance(value, torch.Tensor)]
AT_LEAST_0 = *NUMBERS, -1.0, -1
ABOVE_0 = *AT_LEAST_0, 0, 0.0, -0.0, Fraction(-1, 3)
INTS = *ANYTHING, None, True, 0.0, 1.5, Fraction(1, 2), 2**63, 10**400, -(10**400), 10**5000
COUNTS = *INTS, -1
FLAGS = *ANYTHING, None, 0, 1, 1.0, "", "no"
NAMES = *ANYTHING, None, 0, True, "Batch", "", ("batch",)
INPUT_SHAPES = (
    *ANYTHING[:-2],
    None,
    True,
    0,
    -3,
    6.0,
    (),
    (3, 0),
    (3, 2.0),
    (3, None),
    {6},
    torch.tensor(6),
    2**63,
    10**400,
)
GENERATORS = "abc", 7, 1.0, True, numpy.random.default_rng(0), torch.zeros(1), torch.Generator
SEEDS = *ANYTHING[:-1], 7, True, *(torch.zeros(1), torch.zeros(1, dtype=torch.int32), torch.zeros(2, dtype=torch.int64))
TENSORS = *ANYTHING[:-1], True, (1.0, 2.0)
OPTIONS = {
    "noise": NAMES, "posterior": NAMES, "sample_dim": INTS, "prior_std": ABOVE_0, "generator": GENERATORS,
}  # fmt: skip
IN_CALLS = {
    **OPTIONS, "eps": [v for v in AT_LEAST_0 if v is not None], "sample": FLAGS, "seed": SEEDS,
    "per_head": FLAGS, "normalized_shape": INPUT_SHAPES,
}  # fmt: skip
IN_REPLACED = {**OPTIONS, "init_std": ABOVE_0}
IN_LAYERS = {
    **OPTIONS, "init_std": ABOVE_0, "eps": IN_CALLS["eps"], "bias": FLAGS, "elementwise_affine": FLAGS,
    "normalized_shape": INPUT_SHAPES, "rank": (*COUNTS, 0), "dtype": (torch.int64, torch.complex64, torch.bool),
    "condition": [v for v in (*COUNTS, 0) if v is not None],
}  # fmt: skip


def unlike(tensor):
    """What cannot stand in the place of `tensor`: another kind, shape, dtype, layout or device."""
    plain = torch.zeros(tensor.shape)
    wrong = [
        plain.long(), plain.bool(), plain.cfloat(), plain.to_sparse(), plain.to("meta"), torch.zeros(7), nested(),
        torch.zeros((*tensor.shape, 7)), plain.to(torch.float8_e5m2),
    ]  # fmt: skip
    return [*TENSORS, *wrong, *([plain.to_mkldnn()] if tensor.numel() else [])]


@functools.cache
def nested():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls them a prototype
        return torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)])


def refuses(name, function, *args, **kwargs):
    """The call raises an error that names the argument."""
    with pytest.raises((TypeError, ValueError)) as raised:
        function(*args, **kwargs)
    assert re.search(rf"\b{name}\b", str(raised.value)), f"{name} is not named: {raised.value}"
    assert type(raised.value) in (TypeError, ValueError)


@pytest.mark.parametrize("number", range(2000, 2300))
def test_an_invalid_argument_of_a_functional_form_is_named(number):
    case = Case(number)
    function, arguments, _ = functional_call(case)
    if case.draw.random() < 0.5:
        function(**arguments)  # so that the valid call is known, which must not hide what is wrong
    tensors = [name for name, value in arguments.items() if isinstance(value, torch.Tensor) and name != "seed"]
    numbers = [name for name in ("weight_prior", "bias_prior") if name in arguments and name not in tensors]
    name = case.draw.choice([*IN_CALLS, *tensors, *numbers])
    values = unlike(arguments[name]) if name in tensors else {**IN_CALLS, **dict.fromkeys(numbers, PRIORS)}[name]
    refuses(name, function, **{**arguments, name: case.draw.choice(values)})


@pytest.mark.parametrize("number", range(3000, 3200))
def test_an_invalid_option_of_a_layer_is_named(number):
    draw = random.Random(number)
    cls = draw.choice([klnorm.KLLayerNorm, klnorm.KLRMSNorm, klnorm.KLConditionalLayerNorm])
    arguments = {"normalized_shape": 6, "noise": draw.choice(NOISES)}
    name = draw.choice([name for name in IN_LAYERS if name in inspect.signature(cls).parameters])
    refuses(name, cls, **{**arguments, name: draw.choice(IN_LAYERS[name])})


def on_a_model(function, **options):
    return lambda **given: function(nn.Sequential(nn.LayerNorm(6), nn.RMSNorm(6)), **options, **given)


IN_TRAINING = [
    ("num_examples", klnorm.KLWeight, [v for v in (*COUNTS, 0) if v is not None]),
    ("warmup_steps", functools.partial(klnorm.KLWeight, num_examples=5), COUNTS),
    ("max_weight", functools.partial(klnorm.KLWeight, num_examples=5), AT_LEAST_0),
    ("lr", on_a_model(klnorm.param_groups), ABOVE_0),
    ("rho_lr", on_a_model(klnorm.param_groups, lr=0.1), ABOVE_0),
    ("weight_decay", on_a_model(klnorm.param_groups, lr=0.1), AT_LEAST_0),
    *[(name, on_a_model(klnorm.replace_layer_norm), values) for name, values in IN_REPLACED.items()],
    *[(name, on_a_model(klnorm.replace_rms_norm), values) for name, values in IN_REPLACED.items()],
]


@pytest.mark.parametrize(("name", "function", "values"), IN_TRAINING, ids=[case[0] for case in IN_TRAINING])
def test_an_invalid_argument_before_training_is_named(name, function, values):
    for value in values:
        refuses(name, function, **{name: value})


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("cls", [klnorm.KLLayerNorm, klnorm.KLRMSNorm, klnorm.KLConditionalLayerNorm])
def test_an_invalid_input_of_a_layer_is_named(cls, training):
    layer, x = cls(6).train(training), torch.zeros(2, 6)
    layer(x)
    for value in unlike(x):
        if training or value is not nested():  # which nn.TransformerEncoder passes in evaluation mode
            refuses("(x|weight)", layer, value)  # the one is on another device than the other
