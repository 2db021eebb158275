"""The operators `klnorm::norm_forward` and `klnorm::norm_backward`, and the autograd Functions around them.

Arguments of the operators, in order:

    x                                    (..., *normalized_shape), any floating dtype and strides
    residual                             None, or to be added to x first: shape of x, any floating dtype
    weight, bias, weight_rho, bias_rho   (groups, *normalized_shape), or normalized_shape for one group; one floating
                                         dtype; None where there is no shift; weight_rho None: deterministic reading
    weight_prior, bias_prior             normalized_shape or None: then the numbers below
    seed                                 int64, one element; None: no sampling (evaluation)
    weight_prior_value, bias_prior_value, prior_std, eps
    draws, inner                         row r uses draw (r // inner) % draws
    groups                               row r of M uses the parameters of group r // (M // groups)
    rms                                  RMSNorm: no mean is subtracted

Forward returns y (as x), the sum with the residual (as that), kl (scalar, or (groups,), in nats), mean and rstd (M,),
the latter three in fp32, or fp64 for fp64 `x`. What is not there is an empty tensor. Backward takes as z what was
normalized, x or the sum.
"""

import functools

import torch

from . import cpu
from .versions import require_triton

_PARAMETERS = """
    Tensor weight, Tensor? bias, Tensor? weight_rho, Tensor? bias_rho, Tensor? weight_prior, Tensor? bias_prior,
    Tensor? seed"""

_FORWARD = f"""norm_forward(
    Tensor x, Tensor? residual, {_PARAMETERS}, float weight_prior_value, float bias_prior_value, float prior_std,
    float eps, SymInt draws, SymInt inner, SymInt groups, bool rms
) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"""

# The gradients of z in the dtype of dy and, where that is another one, of z; then of the parameters.
_BACKWARD = f"""norm_backward(
    Tensor? dy, Tensor? dsum, Tensor? dkl, Tensor z, {_PARAMETERS}, Tensor? mean, Tensor rstd,
    float weight_prior_value, float bias_prior_value, float prior_std, SymInt draws, SymInt inner, SymInt groups
) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"""

_library = torch.library.Library("klnorm", "DEF")
for _schema in _FORWARD, _BACKWARD:
    _library.define(" ".join(_schema.split()), tags=torch.Tag.pt2_compliant_tag)


def _filled(outputs, like):
    return tuple(like.new_empty(0) if output is None else output for output in outputs)


@functools.cache
def _launch():
    """The host side of the kernels, imported when a CUDA tensor comes: a CPU machine may not have triton."""
    require_triton()
    from . import launch

    return launch


def _compute_forward(*args):
    return (_launch() if args[0].is_cuda else cpu).forward(*args)


def _compute_backward(*args):
    return (_launch() if args[3].is_cuda else cpu).backward(*args)


for _key in "CPU", "CUDA":
    _library.impl("norm_forward", lambda *args: _filled(_compute_forward(*args), args[0]), _key)
    _library.impl("norm_backward", lambda *args: _filled(_compute_backward(*args), args[3]), _key)


def _empty_like(tensor):
    """Contiguous; None for None."""
    return None if tensor is None else torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)


@torch.library.register_fake("klnorm::norm_forward", lib=_library)
def _forward_fake(x, residual, weight, *args):
    *_, groups, rms = args
    rstd = x.new_empty((x.numel() * groups // weight.numel(),), dtype=cpu.accumulation_dtype(x))
    kl = rstd.new_empty(() if groups == 1 else (groups,))
    return _filled((_empty_like(x), _empty_like(residual), kl, None if rms else torch.empty_like(rstd), rstd), x)


@torch.library.register_fake("klnorm::norm_backward", lib=_library)
def _backward_fake(dy, dsum, dkl, z, weight, bias, weight_rho, bias_rho, *_):
    dx = None if dy is None else torch.empty(z.shape, dtype=dy.dtype, device=z.device)
    dresidual = None if dy is None or dy.dtype == z.dtype else _empty_like(z)
    return _filled((dx, dresidual, *map(_empty_like, (weight, bias, weight_rho, bias_rho))), z)


_TENSORS = {torch.Tensor, torch.nn.Parameter}
_PLAIN = _TENSORS | {float, int, bool, type(None)}
# Private, as nothing public tells; where a version of torch lacks them, every call is the operator's.
_transforms_active = getattr(torch._C, "_are_functorch_transforms_active", lambda: True)
_active_modes = getattr(torch._C, "_len_torch_dispatch_stack", lambda: True)
_has_storage = getattr(torch._C, "_has_storage", lambda tensor: False)


def is_plain(x, *args):
    """Whether torch's dispatcher, which costs more than all else here, would only pass a call of an operator on.

    Tracing, transforms, dispatch modes, subclasses of tensors and the meta device have to see the operator. So have
    tensors whose memory holds the negative of their values, which the dispatcher turns into plain ones.
    """
    seen = torch.compiler.is_compiling() or _transforms_active() or _active_modes() or x.is_meta
    if seen or not _PLAIN.issuperset(map(type, (x, *args))):
        return False
    return True not in [arg.is_neg() for arg in args if type(arg) in _TENSORS]


def _forward(*args):
    """As the operator, or None for what is not there; the seed may be an int as well."""
    if is_plain(args[0], *args):
        return _compute_forward(*args)
    return torch.ops.klnorm.norm_forward.default(*args[:8], _seed_tensor(args[8], args[0]), *args[9:])


def _backward(*args):
    """As the operator, or None for what is not there; the seed may be an int as well."""
    # The cotangents of is_grads_batched=True look like ordinary tensors, but have no memory.
    if is_plain(args[3], *args) and all(g is None or _has_storage(g) for g in args[:3]):
        return _compute_backward(*args)
    return torch.ops.klnorm.norm_backward.default(*args[:10], _seed_tensor(args[10], args[3]), *args[11:])


def _seed_tensor(seed, x):
    return torch.tensor([seed], device=x.device) if isinstance(seed, int) else seed


class KLNormFunction(torch.autograd.Function):
    """(y, sum, kl) and the gradients of them. Saves z, the parameters, the seed, and mean and rstd of every row.

    The seed is a tensor or an int, see `klnorm.seeds`. Takes the tensors among the operator's arguments and then the
    numbers in one tuple: autograd spends time on each.
    """

    @staticmethod
    def forward(ctx, *inputs):
        *tensors, numbers = inputs
        y, sum_, kl, mean, rstd = _forward(*tensors, *numbers)
        _save(ctx, inputs, sum_, mean, rstd)
        return y, sum_ if ctx.has_residual else None, kl

    @staticmethod
    def backward(ctx, dy, dsum, dkl):
        ctx.consumed = True
        if ctx.last_kl is not None and (last_kl := ctx.last_kl()) is not None:
            last_kl.release(ctx)
        gradients = _GradientsOnce.apply if torch.is_grad_enabled() else _gradients
        *tensors, seed, mean, rstd = ctx.saved_tensors
        seed = seed if ctx.key is None else ctx.key
        dx, dresidual, *rest = gradients(dy, dsum, dkl, *tensors, seed, mean, rstd, *ctx.numbers)
        if ctx.has_residual:  # autograd casts dsum to the dtype of x
            dx, dresidual = (dsum, dsum) if dy is None else (dx, dx if dresidual is None else dresidual)
        return dx, dresidual, *rest, None, None, None, None


class TransformableFunction(KLNormFunction):
    """The same under torch.func's transforms. Apart, because autograd spends microseconds on calls of this form."""

    @staticmethod
    def forward(*inputs):
        *tensors, numbers = inputs
        return torch.ops.klnorm.norm_forward.default(*tensors, *numbers)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, sum_, _, *statistics = output
        _save(ctx, inputs, sum_, *statistics)

    @staticmethod
    def backward(ctx, dy, dsum, dkl, *_):
        return KLNormFunction.backward(ctx, dy, dsum, dkl)

    @staticmethod
    def vmap(info, in_dims, *inputs):
        return _one_by_one(TransformableFunction.apply, info, in_dims, inputs)

    @staticmethod
    def jvp(*_):
        raise RuntimeError(
            "klnorm has no forward-mode derivatives, which torch.func.jvp, jacfwd and hessian take. "
            "Remedy: torch.func.vjp or jacrev, or klnorm.reference.kl_layer_norm there."
        )


def _save(ctx, inputs, sum_, mean, rstd):
    x, residual, *parameters, seed, numbers = inputs
    weight_prior_value, bias_prior_value, prior_std, _, draws, inner, groups, rms = numbers
    ctx.last_kl, ctx.consumed = None, False  # for klnorm.kl: who holds this graph, and whether it is spent
    ctx.has_residual = residual is not None
    ctx.key, seed = (seed, None) if isinstance(seed, int) else (None, seed)
    ctx.save_for_backward(sum_ if ctx.has_residual else x, *parameters, seed, None if rms else mean, rstd)
    ctx.numbers = weight_prior_value, bias_prior_value, prior_std, draws, inner, groups
    ctx.set_materialize_grads(False)


def _gradients(dy, dsum, dkl, z, *args):
    """As the operator's, None for what there is not."""
    dx, dresidual, *rest = _backward(dy, dsum, dkl, z, *args)
    if dy is None:
        dx = None
    if dy is None or dy.dtype == z.dtype:
        dresidual = None
    return dx, dresidual, *(None if p is None else gradient for p, gradient in zip(args, rest, strict=False))


class _GradientsOnce(torch.autograd.Function):
    """The gradients where autograd records (create_graph=True): their derivatives must raise, not come out as zero."""

    @staticmethod
    def forward(*inputs):
        return _gradients(*inputs)

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError(
            "klnorm has no second derivatives: a backward of the backward (create_graph=True) went through it. "
            "Remedy: use klnorm.reference.kl_layer_norm there, which autograd differentiates any number of times."
        )

    @staticmethod
    def vmap(info, in_dims, *inputs):
        return _one_by_one(_GradientsOnce.apply, info, in_dims, inputs)


def _one_by_one(function, info, in_dims, inputs):
    """The rule of vmap: one call for every index of the mapped dimension, outputs stacked."""
    calls = [
        function(*(v.select(dim, i) if isinstance(dim, int) else v for v, dim in zip(inputs, in_dims, strict=True)))
        for i in range(info.batch_size)
    ]
    outputs = [None if values[0] is None else torch.stack(values) for values in zip(*calls, strict=True)]
    return tuple(outputs), tuple(None if output is None else 0 for output in outputs)
