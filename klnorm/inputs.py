"""Checks of the tensors of a call; messages as in `klnorm.checks`."""

import torch

from . import checks, compat

_MAX_ROWS = 1 << 32  # the number of a draw is a 32-bit word of the noise's counter
MAX_GROUPS = 65535  # the largest second dimension of a CUDA grid


def check_tensor(name, value):
    """Raise unless `value` is a tensor."""
    if not isinstance(value, torch.Tensor):
        raise TypeError(
            f"{name} is a {type(value).__name__}, expected a torch.Tensor. Remedy: torch.as_tensor({name})."
        )


def check_input(x, shape):
    """Raise unless `x` is a floating-point tensor (..., *shape) that klnorm can read."""
    if isinstance(x, torch.fx.Proxy):
        raise TypeError(
            "x is a Proxy of torch.fx, expected a torch.Tensor: symbolic tracing cannot look into a KL layer. Remedy: "
            "klnorm.restore_layer_norm(model) or klnorm.restore_rms_norm(model) first; or a Tracer of which KL layers "
            "are leaves (is_leaf_module)."
        )
    check_tensor("x", x)
    if not isinstance(shape, tuple):
        raise TypeError(
            f"normalized_shape is {checks.shown(shape)}, a {type(shape).__name__}, expected a tuple of ints: it was "
            "changed after the layer was made. Remedy: layer.normalized_shape = tuple(layer.weight.shape)."
        )
    if x.is_nested:
        raise TypeError(
            "x is a nested tensor, expected a dense one. Remedy: x.to_padded_tensor(0.0), or for nn.TransformerEncoder "
            "in evaluation mode `with klnorm.sampling(model)`, which passes dense ones."
        )
    if x.dtype not in checks.FLOATS:
        raise TypeError(f"x has dtype {x.dtype}, expected one of {checks.FLOAT_NAMES}. Remedy: x.float().")
    check_layout("x", x)
    if not (x.is_cuda or x.is_cpu or x.is_meta):
        raise ValueError(f"x is on {x.device}, expected a CPU or CUDA tensor. Remedy: x.cpu().")
    if x.shape[-len(shape) :] != shape:
        raise ValueError(
            f"x has shape {tuple(x.shape)}, expected (..., {', '.join(map(str, shape))}): its last dimensions must be "
            "normalized_shape. Remedy: permute x, or change normalized_shape."
        )


def check_layout(name, tensor):
    """Raise unless `tensor` is dense and strided."""
    if tensor.is_nested:
        raise TypeError(f"{name} is a nested tensor, expected a dense one. Remedy: {name}.to_padded_tensor(0.0).")
    if tensor.layout != torch.strided:
        raise TypeError(f"{name} has layout {tensor.layout}, expected torch.strided. Remedy: {name}.to_dense().")


def check_device(name, tensor, x):
    """Raise unless `tensor` is on the device of `x`."""
    if tensor.device != x.device:
        raise ValueError(f"{name} is on {tensor.device}, expected {x.device}, where x is. Remedy: {name}.to(x.device).")


def shape_of_heads(x, shape):
    """Return (H, *shape) of an `x` (..., H, *shape); raise if `x` has no dimension of heads."""
    if x.dim() == len(shape):
        raise ValueError(
            f"x has shape {tuple(x.shape)}, expected (..., heads, {', '.join(map(str, shape))}): per_head=True is for "
            "an x whose last dimension before normalized_shape counts heads. Remedy: x.unsqueeze(0) for one head."
        )
    return tuple(x.shape[x.dim() - len(shape) - 1 :])


def check_parameters(x, shape, weight, bias, weight_rho, bias_rho, posterior="sampled", per_head=False):
    """Raise unless the posterior's parameters fit each other and `x`; return the number of groups or heads, else None.

    `shape`: that of one group, or with `per_head` that of all heads.
    """
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
    grouped = (
        not per_head
        and isinstance(weight, torch.Tensor)
        and not weight.is_nested
        and weight.dim() == len(shape) + 1
        and weight.shape[1:] == shape
    )
    shape = tuple(weight.shape) if grouped else shape
    _check_like("weight", weight, x, shape, per_head)
    for name, parameter in ("bias", bias), ("weight_rho", weight_rho), ("bias_rho", bias_rho):
        if parameter is None and (name != "weight_rho" or posterior == "deterministic"):
            continue
        _check_like(name, parameter, x, shape, per_head)
        if parameter.dtype != weight.dtype:
            raise TypeError(
                f"{name} has dtype {parameter.dtype}, expected weight's {weight.dtype}: all share one dtype. "
                f"Remedy: {name}.to({weight.dtype})."
            )
    return shape[0] if grouped or per_head else None


def check_groups(rows):
    """Raise unless groups have equal sizes and hold whole samples, or samples hold whole groups."""
    groups, n_rows = rows.groups, rows.n_rows
    if not 1 <= groups <= MAX_GROUPS:
        name = "heads" if rows.per_head else "groups"
        raise ValueError(f"weight has {groups} {name}, expected 1 to {MAX_GROUPS}: its first dimension counts them.")
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
    """Raise unless `residual` is None or a tensor like `x`, of any floating dtype; fp64 if and only if `x` is."""
    if residual is None:
        return
    if not isinstance(residual, torch.Tensor):
        raise TypeError(f"residual is a {type(residual).__name__}, expected a tensor of x's shape {tuple(x.shape)}.")
    if residual.dtype not in checks.FLOATS:
        raise TypeError(f"residual has dtype {residual.dtype}, expected one of {checks.FLOAT_NAMES}.")
    check_layout("residual", residual)
    if (residual.dtype == torch.float64) != (x.dtype == torch.float64):
        raise TypeError(
            f"residual has dtype {residual.dtype} and x {x.dtype}, expected fp64 for both or neither. "
            "Remedy: x.double() or residual.double()."
        )
    if residual.shape != x.shape:
        raise ValueError(f"residual has shape {tuple(residual.shape)}, expected that of x, {tuple(x.shape)}.")
    check_device("residual", residual, x)


def check_prior(name, prior, x, shape, per_head=False):
    """Raise unless `prior` is None or a tensor like the parameter whose prior mean it is."""
    if prior is not None:
        _check_like(name, prior, x, shape, per_head)


def resolve_sample_dim(x, n_normalized, sample_dim):
    """Return `sample_dim` counted from 0; raise unless it comes before the last `n_normalized` dimensions of `x`."""
    leading = x.dim() - n_normalized
    if leading == 0:
        return 0
    dim = sample_dim + x.dim() if sample_dim < 0 else sample_dim
    if not 0 <= dim < leading:
        raise ValueError(
            f"sample_dim is {sample_dim}, expected 0 to {leading - 1}: a dimension of x, shape {tuple(x.shape)}, "
            f"before the last {n_normalized}, which are normalized or heads. Remedy: name the dimension that counts "
            "samples."
        )
    return dim


def check_seed(seed, x):
    """Raise unless `seed` is None, or an int64 tensor of one element on the device of `x`."""
    if seed is None:
        return
    if not isinstance(seed, torch.Tensor):
        raise TypeError(
            f"seed is a {type(seed).__name__}, expected an int64 tensor. Remedy: torch.tensor([seed], device=x.device)."
        )
    if seed.dtype != torch.int64:
        raise TypeError(f"seed has dtype {seed.dtype}, expected torch.int64. Remedy: seed.long().")
    check_layout("seed", seed)
    if seed.numel() != 1:
        raise ValueError(f"seed has {seed.numel()} elements, expected 1: every row's noise comes from one seed.")
    check_device("seed", seed, x)


def check_generator(generator, x):
    """Raise unless `generator` is None, or a torch.Generator for the device of `x`."""
    checks.check_generator(generator)
    if generator is not None and generator.device.type != x.device.type:
        raise ValueError(
            f"generator is for {generator.device}, expected {x.device}, where x is. "
            "Remedy: torch.Generator(device=x.device)."
        )


def check_drawn_from(generator, x):
    """Raise unless a seed for `x` can be drawn from `generator`: not if checkpointing repeats the forward."""
    check_generator(generator, x)
    if generator is not None and compat.in_backward():
        raise ValueError(
            "generator is one of your own in a forward that activation checkpointing repeats, expected None: only the "
            "noise of torch's own generators is replayed, so the gradients would be those of other noise. "
            "Remedy: leave generator out and use torch.manual_seed, or do not checkpoint this layer."
        )


def check_rows(n_rows):
    """Raise if there are more rows than numbers of draws."""
    if n_rows > _MAX_ROWS:
        raise ValueError(f"x has {n_rows} rows, expected at most 2^32. Remedy: split x.")


def _check_like(name, parameter, x, shape, per_head=False):
    if not isinstance(parameter, torch.Tensor):
        raise TypeError(f"{name} is a {type(parameter).__name__}, expected a tensor of shape {shape}.")
    if parameter.dtype not in checks.FLOATS:
        raise TypeError(
            f"{name} has dtype {parameter.dtype}, expected one of {checks.FLOAT_NAMES}. Remedy: {name}.float()."
        )
    check_layout(name, parameter)
    if per_head and parameter.shape != shape:
        raise ValueError(
            f"{name} has shape {tuple(parameter.shape)}, expected {shape}, as per_head=True, the last dimensions of x, "
            f"shape {tuple(x.shape)}. Remedy: {name}.expand({shape}) if all heads have the same, or permute x so that "
            "its heads come last before normalized_shape."
        )
    if parameter.shape != shape:
        raise ValueError(
            f"{name} has shape {tuple(parameter.shape)}, expected {shape}, normalized_shape "
            "(after the number of groups, where weight has groups)."
        )
    check_device(name, parameter, x)
