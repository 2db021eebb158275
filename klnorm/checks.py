"""What a caller may get wrong, and messages that say which argument, what came, what was expected, what to do."""

import math
from collections.abc import Iterable
from numbers import Integral, Real

import torch

NOISES = "batch", "sample", "token"
FLOATS = torch.float32, torch.bfloat16, torch.float16, torch.float64
_MAX_ROWS = 1 << 32  # the draw is a 32-bit word of the counter
_MAX_GROUPS = 65535  # the second dimension of a CUDA grid
POSTERIORS = "sampled", "deterministic"
# torch.autograd.Function asks the same; where a version of torch lacks it, torch's own error refuses the transforms.
_transforms_active = getattr(torch._C, "_are_functorch_transforms_active", bool)


def check_config(prior_std, eps, noise):
    """Raise unless these are a layer's valid settings."""
    check_positive("prior_std", prior_std)
    check_not_negative("eps", eps)
    if noise not in NOISES:
        raise ValueError(
            f"noise is {noise!r}, expected one of {', '.join(map(repr, NOISES))}: the rows that share a draw."
        )


def check_module(model, name="model"):
    """Raise unless `model` is an nn.Module."""
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"{name} is a {type(model).__name__}, expected an nn.Module.")


def check_count(name, value, minimum=1):
    """Raise unless `value` is an int of `minimum` or more."""
    if not isinstance(value, Integral) or isinstance(value, bool):
        raise TypeError(f"{name} is a {type(value).__name__}, expected an int.")
    if value < minimum:
        raise ValueError(f"{name} is {value}, expected {minimum} or more.")


def as_shape(normalized_shape):
    """`normalized_shape` as a tuple of positive ints."""
    shape = tuple(normalized_shape) if isinstance(normalized_shape, Iterable) else (normalized_shape,)
    if not shape or not all(isinstance(n, Integral) and not isinstance(n, bool) and n > 0 for n in shape):
        raise ValueError(
            f"normalized_shape is {normalized_shape!r}, expected a positive int or a non-empty sequence of them: "
            "there is nothing to normalize over no features."
        )
    return shape


def check_input(x, shape):
    """Raise unless `x` is a floating-point tensor (..., *shape) that klnorm can read."""
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"x is a {type(x).__name__}, expected a torch.Tensor. Remedy: torch.as_tensor(x).")
    if x.is_nested:
        raise TypeError(
            "x is a nested tensor, expected a dense one. Remedy: x.to_padded_tensor(0.0), or for nn.TransformerEncoder "
            "in evaluation mode `with klnorm.sampling(model)`, which passes dense ones."
        )
    if x.dtype not in FLOATS:
        raise TypeError(f"x has dtype {x.dtype}, expected one of {_names(FLOATS)}. Remedy: x.float().")
    if x.layout != torch.strided:
        raise TypeError(f"x has layout {x.layout}, expected torch.strided. Remedy: x.to_dense().")
    if not (x.is_cuda or x.is_cpu or x.is_meta):
        raise ValueError(f"x is on {x.device}, expected a CPU or CUDA tensor. Remedy: x.cpu().")
    if x.shape[-len(shape) :] != shape:
        raise ValueError(
            f"x has shape {tuple(x.shape)}, expected (..., {', '.join(map(str, shape))}): its last dimensions must be "
            "normalized_shape. Remedy: permute x, or change normalized_shape."
        )


def check_posterior(posterior):
    """Raise unless `posterior` names a reading of KL-Norm."""
    if posterior not in POSTERIORS:
        raise ValueError(f"posterior is {posterior!r}, expected one of {', '.join(map(repr, POSTERIORS))}.")


def check_parameters(x, shape, weight, bias, weight_rho, bias_rho, posterior="sampled"):
    """Raise unless the posterior's parameters fit each other and `x`; return the number of groups, None without."""
    if posterior == "deterministic":
        for name, rho in ("weight_rho", weight_rho), ("bias_rho", bias_rho):
            if rho is not None:
                raise ValueError(
                    f"{name} is a {type(rho).__name__}, expected None: the deterministic reading has no deviations but "
                    "weight itself. Remedy: leave it out."
                )
    elif (bias is None) != (bias_rho is None):
        given, missing = ("bias_rho", "bias") if bias is None else ("bias", "bias_rho")
        raise ValueError(
            f"{missing} is None but {given} is not, expected both or neither. Remedy: pass {missing} as well."
        )
    grouped = isinstance(weight, torch.Tensor) and weight.dim() == len(shape) + 1 and weight.shape[1:] == shape
    groups = weight.shape[0] if grouped else None
    shape = tuple(weight.shape) if grouped else shape
    _check_like("weight", weight, x, shape)
    for name, parameter in ("bias", bias), ("weight_rho", weight_rho), ("bias_rho", bias_rho):
        if parameter is None and (name != "weight_rho" or posterior == "deterministic"):
            continue
        _check_like(name, parameter, x, shape)
        if parameter.dtype != weight.dtype:
            raise TypeError(
                f"{name} has dtype {parameter.dtype}, expected weight's {weight.dtype}: all share one dtype. "
                f"Remedy: {name}.to({weight.dtype})."
            )
    return groups


def check_groups(rows):
    """Raise unless the groups are of equal size, and do not cut the samples that draws of noise belong to."""
    groups, n_rows = rows.groups, rows.n_rows
    if not 1 <= groups <= _MAX_GROUPS:
        raise ValueError(f"weight has {groups} groups, expected 1 to {_MAX_GROUPS}: its first dimension counts them.")
    if n_rows % groups:
        raise ValueError(
            f"weight has {groups} groups, expected a divisor of {n_rows}, the number of rows of x: every group has as "
            "many rows. Remedy: pad x, or pass one row of parameters per sample."
        )
    if rows.in_group is None:
        raise ValueError(
            f"weight has {groups} groups of {rows.group_rows} rows, which cut samples of {rows.inner} neighbouring "
            'rows, expected groups of whole samples, or samples of whole groups. Remedy: noise="batch" or "token".'
        )


def check_residual(residual, x):
    """Raise unless `residual` is None or a tensor like `x`, of any floating dtype, but fp64 only together."""
    if residual is None:
        return
    if not isinstance(residual, torch.Tensor):
        raise TypeError(f"residual is a {type(residual).__name__}, expected a tensor of x's shape {tuple(x.shape)}.")
    if residual.dtype not in FLOATS:
        raise TypeError(f"residual has dtype {residual.dtype}, expected one of {_names(FLOATS)}.")
    if (residual.dtype == torch.float64) != (x.dtype == torch.float64):
        raise TypeError(
            f"residual has dtype {residual.dtype} and x {x.dtype}, expected fp64 for both or neither. "
            "Remedy: x.double() or residual.double()."
        )
    if residual.shape != x.shape:
        raise ValueError(f"residual has shape {tuple(residual.shape)}, expected that of x, {tuple(x.shape)}.")
    if residual.device != x.device:
        raise ValueError(f"residual is on {residual.device}, expected {x.device}, where x is.")


def check_prior(name, prior, x, shape):
    """Raise unless `prior` is None or a tensor like the parameter that it is the prior mean of."""
    if prior is not None:
        _check_like(name, prior, x, shape)


def check_prior_mean(name, value, shape):
    """Raise unless `value` is a finite number."""
    if not _is_real(value):
        raise TypeError(f"{name} is a {type(value).__name__}, expected a float or a tensor of shape {shape}.")
    if not -math.inf < value < math.inf:
        raise ValueError(f"{name} is {value}, expected a finite number.")


def check_sample_dim(sample_dim):
    """Raise unless `sample_dim` is an int."""
    if isinstance(sample_dim, bool) or not isinstance(sample_dim, int):
        raise TypeError(f"sample_dim is a {type(sample_dim).__name__}, expected an int.")


def resolve_sample_dim(x, n_normalized, sample_dim):
    """`sample_dim` as a non-negative dimension of `x`; raise where it is none, or a normalized one."""
    check_sample_dim(sample_dim)
    leading = x.dim() - n_normalized
    if leading == 0:
        return 0
    dim = sample_dim + x.dim() if sample_dim < 0 else sample_dim
    if not 0 <= dim < leading:
        raise ValueError(
            f"sample_dim is {sample_dim}, expected 0 to {leading - 1}: a dimension of x, shape {tuple(x.shape)}, "
            f"before the {n_normalized} normalized one(s). Remedy: name the dimension that counts samples."
        )
    return dim


def check_seed(seed, x):
    """Raise unless `seed` is an int64 tensor of one element on the device of `x`."""
    if not isinstance(seed, torch.Tensor):
        raise TypeError(
            f"seed is a {type(seed).__name__}, expected an int64 tensor. Remedy: torch.tensor([seed], device=x.device)."
        )
    if seed.dtype != torch.int64:
        raise TypeError(f"seed has dtype {seed.dtype}, expected torch.int64. Remedy: seed.long().")
    if seed.numel() != 1:
        raise ValueError(f"seed has {seed.numel()} elements, expected 1: every row's noise comes from one seed.")
    if seed.device != x.device:
        raise ValueError(f"seed is on {seed.device}, expected {x.device}, where x is. Remedy: seed.to(x.device).")


def check_generator(generator, x):
    """Raise unless `generator` is None, or a torch.Generator for the device of `x`, in a forward that is no repeat."""
    if generator is None:
        return
    if not isinstance(generator, torch.Generator):
        raise TypeError(f"generator is a {type(generator).__name__}, expected a torch.Generator or None.")
    if generator.device.type != x.device.type:
        raise ValueError(
            f"generator is for {generator.device}, expected {x.device}, where x is. "
            "Remedy: torch.Generator(device=x.device)."
        )
    if in_backward():
        raise ValueError(
            "generator is one of your own in a forward that activation checkpointing repeats, expected None: only the "
            "noise of torch's own generators is replayed, so the gradients would be those of other noise. "
            "Remedy: leave generator out and use torch.manual_seed, or do not checkpoint this layer."
        )


def check_rows(n_rows):
    """Raise for more rows than the noise can tell apart."""
    if n_rows > _MAX_ROWS:
        raise ValueError(f"x has {n_rows} rows, expected at most 2^32. Remedy: split x.")


def describe_not_finite(named_tensors):
    """Which of the tensors hold NaN or infinity, and where first; for a message about a KL that is not finite."""
    found = []
    for name, tensor in named_tensors:
        bad = None if tensor is None else (~tensor.detach().isfinite()).flatten().nonzero()
        if bad is not None and len(bad):
            found.append(f"{name} has {len(bad)} such value(s), the first at index {bad[0].item()}")
    return "; ".join(found) or "every parameter and prior mean is finite, so a squared deviation or distance overflowed"


def check_positive(name, value):
    """Raise unless `value` is a finite number above 0."""
    if not _is_real(value):
        raise TypeError(f"{name} is a {type(value).__name__}, expected a float.")
    if not 0 < value < math.inf:
        raise ValueError(f"{name} is {value}, expected a finite number above 0.")


def check_not_negative(name, value):
    """Raise unless `value` is a finite number of 0 or more."""
    if not _is_real(value):
        raise TypeError(f"{name} is a {type(value).__name__}, expected a float.")
    if not 0 <= value < math.inf:
        raise ValueError(f"{name} is {value}, expected a finite number of 0 or more.")


def transforming():
    """Whether a transform of torch.func (grad, vmap, ...) runs, outside of torch.compile."""
    return not torch.compiler.is_compiling() and _transforms_active()


def in_backward():
    """Whether a backward pass runs, outside of torch.compile: a forward is then one that checkpointing repeats."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def is_readable(tensor):
    """Whether the value can be looked at now: not traced, transformed, captured into a CUDA graph, or absent."""
    return (
        type(tensor) is torch.Tensor
        and tensor.device.type != "meta"
        and not (torch.compiler.is_compiling() or _transforms_active())
        and not (tensor.is_cuda and torch.cuda.is_current_stream_capturing())
    )


def _is_real(value):
    return type(value) is float or (isinstance(value, Real) and not isinstance(value, bool))


def _check_like(name, parameter, x, shape):
    if not isinstance(parameter, torch.Tensor):
        raise TypeError(f"{name} is a {type(parameter).__name__}, expected a tensor of shape {shape}.")
    if parameter.dtype not in FLOATS:
        raise TypeError(
            f"{name} has dtype {parameter.dtype}, expected one of {_names(FLOATS)}. Remedy: {name}.float()."
        )
    if parameter.shape != shape:
        raise ValueError(
            f"{name} has shape {tuple(parameter.shape)}, expected {shape}, normalized_shape "
            "(after the number of groups, where weight has groups)."
        )
    if parameter.device != x.device:
        raise ValueError(
            f"{name} is on {parameter.device}, expected {x.device}, where x is. Remedy: {name}.to(x.device)."
        )


def _names(dtypes):
    return ", ".join(map(str, dtypes))
