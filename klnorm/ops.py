"""The operators `klnorm::layer_norm_forward` and `klnorm::layer_norm_backward`, and the autograd Function around them.

Arguments of the operators, in order:

    x                                    (..., *normalized_shape), any floating dtype and strides
    weight, bias, weight_rho, bias_rho   normalized_shape, one floating dtype; bias and bias_rho None together
    weight_prior, bias_prior             normalized_shape or None: then the numbers below
    seed                                 int64, one element; None: no sampling (evaluation)
    weight_prior_value, bias_prior_value, prior_std, eps
    draws, inner                         row r uses draw (r // inner) % draws

Forward returns y (as x), kl (scalar, nats), mean and rstd (M,), the latter three in fp32, or fp64 for fp64 `x`.
"""

import functools

import torch

from . import cpu
from .versions import require_triton

_FORWARD = """layer_norm_forward(
    Tensor x, Tensor weight, Tensor? bias, Tensor weight_rho, Tensor? bias_rho,
    Tensor? weight_prior, Tensor? bias_prior, Tensor? seed,
    float weight_prior_value, float bias_prior_value, float prior_std, float eps, SymInt draws, SymInt inner
) -> (Tensor, Tensor, Tensor, Tensor)"""

# A gradient that does not exist (no shift, or dy is None) comes back as an empty tensor.
_BACKWARD = """layer_norm_backward(
    Tensor? dy, Tensor? dkl,
    Tensor x, Tensor weight, Tensor? bias, Tensor weight_rho, Tensor? bias_rho,
    Tensor? weight_prior, Tensor? bias_prior, Tensor? seed, Tensor mean, Tensor rstd,
    float weight_prior_value, float bias_prior_value, float prior_std, SymInt draws, SymInt inner
) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"""

_library = torch.library.Library("klnorm", "DEF")
for _schema in _FORWARD, _BACKWARD:
    _library.define(" ".join(_schema.split()), tags=torch.Tag.pt2_compliant_tag)


def _filled(gradients, like):
    return tuple(like.new_empty(0) if g is None else g for g in gradients)


@functools.cache
def _launch():
    """The host side of the kernels, imported when a CUDA tensor comes: a CPU machine may not have triton."""
    require_triton()
    from . import launch

    return launch


_library.impl("layer_norm_forward", cpu.forward, "CPU")
_library.impl("layer_norm_forward", lambda *args: _launch().forward(*args), "CUDA")
_library.impl("layer_norm_backward", lambda *args: _filled(cpu.backward(*args), args[2]), "CPU")
_library.impl("layer_norm_backward", lambda *args: _filled(_launch().backward(*args), args[2]), "CUDA")


@torch.library.register_fake("klnorm::layer_norm_forward", lib=_library)
def _forward_fake(x, weight, *_):
    statistics = x.new_empty((x.numel() // weight.numel(),), dtype=cpu.accumulation_dtype(x))
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    return y, statistics.new_empty(()), statistics, torch.empty_like(statistics)


@torch.library.register_fake("klnorm::layer_norm_backward", lib=_library)
def _backward_fake(dy, dkl, x, weight, bias, weight_rho, bias_rho, *_):
    dx = None if dy is None else torch.empty(x.shape, dtype=x.dtype, device=x.device)
    parameters = (None if p is None else torch.empty(p.shape, dtype=p.dtype, device=p.device)
                  for p in (weight, bias, weight_rho, bias_rho))  # fmt: skip
    return _filled((dx, *parameters), x)


_forward = torch.ops.klnorm.layer_norm_forward.default
_backward = torch.ops.klnorm.layer_norm_backward.default


class KLLayerNormFunction(torch.autograd.Function):
    """(y, kl) and the gradients of both. Saves x, the parameters, the seed, and mean and rstd of every row."""

    @staticmethod
    def forward(ctx, *inputs):
        y, kl, mean, rstd = _forward(*inputs)
        _save(ctx, inputs, mean, rstd)
        return y, kl

    @staticmethod
    def backward(ctx, dy, dkl):
        ctx.consumed = True  # tells klnorm.kl that this graph is spent
        gradients = _GradientsOnce.apply if torch.is_grad_enabled() else _gradients
        return *gradients(dy, dkl, *ctx.saved_tensors, *ctx.numbers), *[None] * 9


class TransformableFunction(KLLayerNormFunction):
    """The same under torch.func's transforms. Apart, because autograd spends microseconds on calls of this form."""

    @staticmethod
    def forward(*inputs):
        return _forward(*inputs)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _save(ctx, inputs, *output[2:])

    @staticmethod
    def backward(ctx, dy, dkl, *_):
        return KLLayerNormFunction.backward(ctx, dy, dkl)

    @staticmethod
    def vmap(info, in_dims, *inputs):
        return _one_by_one(TransformableFunction.apply, info, in_dims, inputs)

    @staticmethod
    def jvp(*_):
        raise RuntimeError(
            "klnorm has no forward-mode derivatives, which torch.func.jvp, jacfwd and hessian take. "
            "Remedy: torch.func.vjp or jacrev, or klnorm.reference.kl_layer_norm there."
        )


def _save(ctx, inputs, mean, rstd):
    tensors, (weight_prior_value, bias_prior_value, prior_std, _, draws, inner) = inputs[:8], inputs[8:]
    ctx.save_for_backward(*tensors, mean, rstd)
    ctx.numbers = weight_prior_value, bias_prior_value, prior_std, draws, inner
    ctx.set_materialize_grads(False)


def _gradients(dy, dkl, x, weight, bias, *args):
    dx, dweight, dbias, dweight_rho, dbias_rho = _backward(dy, dkl, x, weight, bias, *args)
    if dy is None:
        dx = None
    if bias is None:
        dbias = dbias_rho = None
    return dx, dweight, dbias, dweight_rho, dbias_rho


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
        function(*(v if dim is None else v.select(dim, i) for v, dim in zip(inputs, in_dims, strict=True)))
        for i in range(info.batch_size)
    ]
    outputs = [None if values[0] is None else torch.stack(values) for values in zip(*calls, strict=True)]
    return tuple(outputs), tuple(None if output is None else 0 for output in outputs)
