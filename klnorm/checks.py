"""Checks of arguments. Each message names the argument, what came, what was expected and, where possible, a remedy.

`klnorm.inputs` checks tensors; this module checks everything else.
"""

import math
from collections.abc import Iterable, Mapping, Set
from numbers import Integral, Real
from typing import get_args

import torch

from .reference.kl_norm import Noise as Noise  # by this form strict type checkers see them here, too
from .reference.kl_norm import Posterior as Posterior

FLOATS = torch.float32, torch.bfloat16, torch.float16, torch.float64
FLOAT_NAMES = ", ".join(map(str, FLOATS))
_MAX_INT = (1 << 63) - 1  # of int64
# The largest number of a dtype, and the smallest normal number of the dtype of its arithmetic, fp32 or fp64.
_LARGEST = {dtype: torch.finfo(dtype).max for dtype in FLOATS}
_SMALLEST = {dtype: torch.finfo(torch.promote_types(dtype, torch.float32)).tiny for dtype in FLOATS}


def as_number(name, value, *, above=None, at_least=None, dtype=torch.float32, instead=""):
    """Return `value`, any real number, as a float that is finite in `dtype`.

    Args:
        above, at_least: bounds, None or 0. instead: what else the argument may be, for the message.
    """
    number = value if type(value) is float else _to_float(value)
    if number is None:
        raise TypeError(f"{name} is a {type(value).__name__}, expected a float{instead}.")
    largest = _LARGEST[dtype]
    least = _SMALLEST[dtype] if above is not None else at_least if at_least is not None else -largest
    if not least <= number <= largest:  # true for NaN
        bound = " above 0" if above is not None else " of 0 or more" if at_least is not None else ""
        raise ValueError(
            f"{name} is {shown(value)}, expected a finite number{bound}, {least:.3g} to {largest:.3g} in {dtype}."
        )
    return number


def check_positive(name, value):
    """Raise unless `value` is a finite number above 0."""
    as_number(name, value, above=0)


def check_not_negative(name, value):
    """Raise unless `value` is a finite number of 0 or more."""
    as_number(name, value, at_least=0)


def as_integer(name, value, *, at_least=None):
    """Return `value`, any integer of 64 bits, as an int."""
    if not _is_integer(value):
        raise TypeError(f"{name} is a {type(value).__name__}, expected an int.")
    if at_least is not None and value < at_least:
        raise ValueError(f"{name} is {shown(value)}, expected {at_least} or more.")
    if not -_MAX_INT <= value <= _MAX_INT:
        raise ValueError(f"{name} is {shown(value)}, expected an int of 64 bits.")
    return value if type(value) is int else int(value)


def check_count(name, value):
    """Raise unless `value` is an int of 1 or more."""
    as_integer(name, value, at_least=1)


def check_flag(name, value):
    """Raise unless `value` is a bool."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} is {shown(value)}, a {type(value).__name__}, expected True or False.")


def check_name(name, value, names, meaning=""):
    """Raise unless `value` is one of `names`; the message appends `meaning`."""
    if not isinstance(value, str):
        raise TypeError(f"{name} is a {type(value).__name__}, expected {_one_of(names)}{meaning}.")
    if value not in names:
        raise ValueError(f"{name} is {shown(value)}, expected {_one_of(names)}{meaning}.")


def check_module(model, name="model"):
    """Raise unless `model` is an nn.Module."""
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"{name} is a {type(model).__name__}, expected an nn.Module.")


def check_generator(generator):
    """Raise unless `generator` is None or a torch.Generator."""
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"generator is a {type(generator).__name__}, expected a torch.Generator or None.")


def as_shape(normalized_shape):
    """Return `normalized_shape` as a tuple of positive ints."""
    shape, expected = normalized_shape, "expected a positive int or a non-empty sequence of them"
    if _is_integer(shape):
        shape = (shape,)
    elif not isinstance(shape, (tuple, list)):
        unordered = not isinstance(shape, Iterable) or isinstance(shape, (str, bytes, bytearray, Mapping, Set))
        if unordered or getattr(shape, "ndim", 1) == 0:  # a 0-dimensional array is an Iterable too
            raise TypeError(f"normalized_shape is {shown(shape)}, a {type(shape).__name__}, {expected}.")
    shape = tuple(shape)
    if not all(map(_is_integer, shape)):
        raise TypeError(f"normalized_shape is {shown(normalized_shape)}, {expected}.")
    if not shape or not all(n > 0 for n in shape):
        raise ValueError(
            f"normalized_shape is {shown(normalized_shape)}, {expected}: "
            "there is nothing to normalize over no features."
        )
    return tuple([as_integer("normalized_shape", n) for n in shape])


def check_noise(noise):
    """Raise unless `noise` is "batch", "sample" or "token"."""
    check_name("noise", noise, get_args(Noise), ": the rows that share a draw")


def check_posterior(posterior):
    """Raise unless `posterior` is "sampled" or "deterministic"."""
    check_name("posterior", posterior, get_args(Posterior))


def check_dtype(dtype):
    """Raise for a torch.dtype that a layer's parameters cannot have; torch checks everything else."""
    if isinstance(dtype, torch.dtype) and dtype not in FLOATS:
        raise TypeError(f"dtype is {dtype}, expected one of {FLOAT_NAMES}.")


def check_out_dtype(out_dtype):
    """Raise unless `out_dtype` is None or a dtype that y can have."""
    if out_dtype is not None and not (isinstance(out_dtype, torch.dtype) and out_dtype in FLOATS):
        raise TypeError(f"out_dtype is {shown(out_dtype)}, expected None for the dtype of x, or one of {FLOAT_NAMES}.")


def as_options(dtype, *, noise, sample_dim, init_std, prior_std, generator, posterior, out_dtype):
    """Return a dict of the valid options, numbers as int or float; `dtype`: of the layer's parameters."""
    check_noise(noise)
    check_posterior(posterior)
    check_generator(generator)
    check_out_dtype(out_dtype)
    return {
        "noise": noise,
        "sample_dim": as_integer("sample_dim", sample_dim),
        "init_std": as_number("init_std", init_std, above=0, dtype=dtype),  # rho <= init_std, so rho is finite too
        "prior_std": as_number("prior_std", prior_std, above=0),
        "generator": generator,
        "posterior": posterior,
        "out_dtype": out_dtype,
    }


def describe_not_finite(named_tensors):
    """Say which tensors hold NaN or infinity, and where first: part of the message about a KL that is not finite."""
    found = []
    for name, tensor in named_tensors:
        bad = None if tensor is None else (~tensor.detach().isfinite()).flatten().nonzero()
        if bad is not None and len(bad):
            found.append(f"{name} has {len(bad)} such value(s), the first at index {bad[0].item()}")
    return "; ".join(found) or "every parameter and prior mean is finite, so a squared deviation or distance overflowed"


def named(name):
    """Return the qualified name of a layer, quoted for a message."""
    return repr(name or "(the model itself)")


def shown(value):
    """Return the repr of `value` for a message, on one line and cut after 60 characters."""
    try:
        text = " ".join(repr(value).split())
    except ValueError:  # Python prints no int of more than 4300 digits
        return f"a {type(value).__name__} of thousands of digits"
    return text if len(text) <= 60 else f"{text[:60]}..."


def _is_integer(value):
    return type(value) is int or (isinstance(value, Integral) and not isinstance(value, bool))


def _to_float(value):
    """Return a real number as a float, infinity if it is too large; None for anything else."""
    if not isinstance(value, Real) or isinstance(value, bool):
        return None
    try:
        return float(value)
    except OverflowError:
        return math.inf


def _one_of(names):
    return ("one of " if len(names) > 1 else "") + ", ".join(map(repr, names))
