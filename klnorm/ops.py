"""The operators `klnorm::norm_forward` and `klnorm::norm_backward`, and the autograd Functions around them.

Arguments of the operators, in order:

    x                                    (..., *normalized_shape), any floating dtype and strides
    residual                             None, or a tensor to add to x first: shape of x, any floating dtype
    weight, bias, weight_rho, bias_rho   (groups, *normalized_shape), or normalized_shape for one group; one floating
                                         dtype; bias and bias_rho None: no shift; weight_rho None: deterministic reading
    weight_prior, bias_prior             normalized_shape, with per_head the shape of weight; None: the numbers below
    seed                                 int64, one element; None: no sampling (evaluation)
    weight_prior_value, bias_prior_value, prior_std, eps
    weight_offset                        scale = weight_offset + weight; prior means are in the units of weight
    draws, inner                         row r uses draw (r // inner) % draws
    groups                               row r of M uses the parameters of group r // (M // groups)
    per_head                             True: row r uses the parameters of group r % groups and, with k = r // groups,
                                         draw (k // inner) % draws of that group's own draws
    rms                                  RMSNorm: does not subtract the mean
    dtype                                forward: of y, None for that of x; backward: of the gradient of x

Forward returns y; the sum with the residual, in its dtype; kl in nats, a scalar, or (groups,) for several groups or
with per_head; and statistics, mean and 1 / deviation (M, 2), for RMSNorm the latter alone (M, 1). kl and statistics are
fp32, or fp64 for fp64 `x`. Empty tensors stand for absent outputs. Backward takes z, the normalized tensor: x or the
sum.

Inside klnorm, a `Parameters` holds the parameters and a `Spec` everything that is not a tensor, see `klnorm.spec`.
"""

import functools

import torch

from . import compat, cpu
from .spec import Parameters, Prior, Rows, Spec, dtypes_of, empty_like, make_spec
from .versions import require_triton

_ARGUMENTS = """
    Tensor weight, Tensor? bias, Tensor? weight_rho, Tensor? bias_rho, Tensor? weight_prior, Tensor? bias_prior,
    Tensor? seed"""
_NUMBERS = """
    float weight_prior_value, float bias_prior_value, float prior_std, float eps, float weight_offset,
    SymInt draws, SymInt inner, SymInt groups, bool per_head, bool rms,
    ScalarType? dtype"""

_FORWARD = f"""norm_forward(
    Tensor x, Tensor? residual, {_ARGUMENTS}, {_NUMBERS}
) -> (Tensor, Tensor, Tensor, Tensor)"""

# Returns the gradient of z in the dtype of x and, if z has another dtype, in that too; then those of the parameters.
_BACKWARD = f"""norm_backward(
    Tensor? dy, Tensor? dsum, Tensor? dkl, Tensor z, {_ARGUMENTS}, Tensor statistics, {_NUMBERS}
) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"""

_library = torch.library.Library("klnorm", "DEF")
for _schema in _FORWARD, _BACKWARD:
    _library.define(" ".join(_schema.split()), tags=torch.Tag.pt2_compliant_tag)


@functools.cache
def _launch():
    """Import `klnorm.launch` when the first CUDA tensor comes: a machine without GPU may not have triton."""
    require_triton()
    from . import launch

    return launch


def _compute_forward(x, *args):
    return (_launch() if x.is_cuda else cpu).forward(x, *args)


def _compute_backward(dy, dsum, dkl, z, *args):
    return (_launch() if z.is_cuda else cpu).backward(dy, dsum, dkl, z, *args)


def _forward_operator(x, residual, *args):
    *parameters, seed = args[:7]
    spec = _spec(x, dtypes_of(x, residual, *parameters), parameters, seed, *args[7:])
    return _filled(_compute_forward(x, residual, Parameters(*parameters), seed, spec), x)


def _backward_operator(dy, dsum, dkl, z, *args):
    *parameters, seed, statistics = args[:8]
    dtypes = args[-1], z.dtype, *dtypes_of(*parameters)
    spec = _spec(z, dtypes, parameters, seed, *args[8:])
    return _filled(_compute_backward(dy, dsum, dkl, z, Parameters(*parameters), seed, statistics, spec), z)


def _spec(
    x, dtypes, parameters, seed,
    weight_prior, bias_prior, prior_std, eps, offset, draws, inner, groups, per_head, rms, dtype,
):  # fmt: skip
    weight, _, weight_rho, *_ = parameters
    n_cols = weight.numel() // groups
    rows = Rows.of(seed is not None, x.numel() // n_cols, groups, draws, inner, per_head)
    kind, posterior = "rms" if rms else "layer", "deterministic" if weight_rho is None else "sampled"
    prior = Prior(weight_prior, bias_prior, prior_std)
    return make_spec(kind, posterior, eps, prior, n_cols, rows, dtypes, dtype, offset)


for _key in "CPU", "CUDA":
    _library.impl("norm_forward", _forward_operator, _key)
    _library.impl("norm_backward", _backward_operator, _key)


def _filled(outputs, like):
    return tuple(like.new_empty(0) if output is None else output for output in outputs)


@torch.library.register_fake("klnorm::norm_forward", lib=_library)
def _forward_fake(x, residual, weight, *args):
    *_, groups, per_head, rms, dtype = args
    n_rows = x.numel() * groups // weight.numel()
    statistics = x.new_empty((n_rows, 1 if rms else 2), dtype=cpu.accumulation_dtype(x))
    kl = statistics.new_empty((groups,) if per_head or groups != 1 else ())
    return _filled((empty_like(x, dtype), empty_like(residual), kl, statistics), x)


@torch.library.register_fake("klnorm::norm_backward", lib=_library)
def _backward_fake(dy, dsum, dkl, z, weight, bias, weight_rho, bias_rho, *args):
    dtype = args[-1]
    dx = None if dy is None else empty_like(z, dtype)
    dresidual = None if dy is None or dtype == z.dtype else empty_like(z)
    return _filled((dx, dresidual, *map(empty_like, (weight, bias, weight_rho, bias_rho))), z)


def compute(x, residual, parameters, seed, spec):
    """Return (y, sum or None, kl) for plain tensors without the dispatcher; the seed is a tensor, an int or None."""
    if torch.is_grad_enabled():
        return KLNormFunction.apply(x, residual, *parameters[:4], (parameters[4:], seed, spec))
    return _compute_forward(x, residual, parameters, seed, spec)[:3]


def compute_watched(x, residual, parameters, seed, numbers):
    """Return (y, sum or None, kl) for any tensors, through the operators; the seed is a tensor or None."""
    if compat.transforming():
        return TransformableFunction.apply(x, residual, *parameters, seed, numbers)[:3]
    if torch.is_grad_enabled():
        return OperatorFunction.apply(x, residual, *parameters, seed, numbers)[:3]
    # Without gradients Dynamo cannot trace a Function that takes symbolic numbers, as dynamic batch sizes make them.
    return OperatorFunction.forward(x, residual, *parameters, seed, numbers)[:3]


class KLNormFunction(torch.autograd.Function):
    """Computes (y, sum, kl) and their gradients. Saves z, the parameters, the seed and the statistics of every row.

    For plain tensors, without the dispatcher. Autograd spends time on every argument, so `others` is a single one, and
    microseconds on Functions that torch.func can transform, which this is not.
    """

    @staticmethod
    def forward(ctx, x, residual, weight, bias, weight_rho, bias_rho, others):
        priors, seed, spec = others
        parameters = Parameters(weight, bias, weight_rho, bias_rho, *priors)
        y, sum_, kl, statistics = _compute_forward(x, residual, parameters, seed, spec)
        _save(ctx, x if residual is None else sum_, parameters, seed, statistics, spec)
        ctx.has_residual = residual is not None
        return y, sum_, kl

    @staticmethod
    def backward(ctx, dy, dsum, dkl):
        return *_backward(ctx, dy, dsum, dkl), None


class OperatorFunction(torch.autograd.Function):
    """`KLNormFunction` for all other tensors, through the operators; also outputs the statistics."""

    @staticmethod
    def forward(x, residual, *args):
        *parameters, seed, numbers = args
        y, sum_, kl, statistics = torch.ops.klnorm.norm_forward.default(x, residual, *parameters, seed, *numbers)
        return y, None if residual is None else sum_, kl, statistics

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, residual, *parameters, seed, numbers = inputs
        _, sum_, _, statistics = output
        numbers = *numbers[:-1], x.dtype  # backward takes the dtype of dx here
        _save(ctx, x if residual is None else sum_, parameters, seed, statistics, numbers)
        ctx.has_residual = residual is not None

    @staticmethod
    def backward(ctx, dy, dsum, dkl, _):
        return *_backward(ctx, dy, dsum, dkl), None, None, None, None


class TransformableFunction(OperatorFunction):
    """`OperatorFunction` for torch.func's transforms; torch.compile refuses Functions that define vmap or jvp."""

    @staticmethod
    def vmap(info, in_dims, *inputs):
        return _one_by_one(TransformableFunction.apply, info, in_dims, inputs)

    @staticmethod
    def jvp(*_):
        raise RuntimeError(
            "klnorm has no forward-mode derivatives, which torch.func.jvp, jacfwd and hessian take. "
            "Remedy: torch.func.vjp or jacrev, or there klnorm.reference.kl_layer_norm or "
            "klnorm.reference.kl_rms_norm, with the same arguments and a seed."
        )


def _save(ctx, z, parameters, seed, statistics, work):
    """Save what `_backward` needs; `work`: a Spec, or the numbers of the backward operator."""
    ctx.last_kl, ctx.consumed = None, False  # for klnorm.kl: the LastKL of this graph, and whether it is used up
    ctx.key, seed = (seed, None) if type(seed) is int else (None, seed)
    ctx.save_for_backward(z, *parameters, seed, statistics)
    ctx.set_materialize_grads(False)
    ctx.work = work


def _backward(ctx, dy, dsum, dkl):
    """Return the gradients of x, the residual and the four parameters."""
    ctx.consumed = True
    if ctx.last_kl is not None and (last_kl := ctx.last_kl()) is not None:
        last_kl.release(ctx)
    z, *parameters, seed, statistics = ctx.saved_tensors
    seed = seed if ctx.key is None else ctx.key
    if torch.is_grad_enabled():
        gradients = _GradientsOnce.apply(dy, dsum, dkl, z, *parameters, seed, statistics, ctx.work)
    else:
        gradients = _gradients(dy, dsum, dkl, z, parameters, seed, statistics, ctx.work)
    if not ctx.has_residual:
        return gradients
    dx, dresidual, *rest = gradients
    if dy is None:
        return dsum, dsum, *rest  # autograd casts it to the dtype of x
    return dx, dx if dresidual is None else dresidual, *rest


def _gradients(dy, dsum, dkl, z, parameters, seed, statistics, work):
    """Return the outputs of the backward operator, None in place of empty tensors."""
    if type(work) is Spec and not compat.is_watched() and compat.are_plain(dy, dsum, dkl):
        return _compute_backward(dy, dsum, dkl, z, Parameters(*parameters), seed, statistics, work)
    seed = torch.tensor([seed], device=z.device) if type(seed) is int else seed
    numbers = work.numbers if type(work) is Spec else work
    dx, dresidual, *rest = torch.ops.klnorm.norm_backward.default(
        dy, dsum, dkl, z, *parameters, seed, statistics, *numbers
    )
    dresidual = None if dy is None or numbers[-1] == z.dtype else dresidual
    rest = [None if p is None else gradient for p, gradient in zip(parameters, rest, strict=False)]
    return None if dy is None else dx, dresidual, *rest


class _GradientsOnce(torch.autograd.Function):
    """The gradients under create_graph=True; its backward raises, because second derivatives would be 0."""

    @staticmethod
    def forward(dy, dsum, dkl, z, *args):
        *parameters, seed, statistics, work = args
        return _gradients(dy, dsum, dkl, z, parameters, seed, statistics, work)

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError(
            "klnorm has no second derivatives: a backward of the backward (create_graph=True) went through it. "
            "Remedy: klnorm.reference.kl_layer_norm or klnorm.reference.kl_rms_norm there, with the same arguments: "
            "autograd differentiates them any number of times."
        )

    @staticmethod
    def vmap(info, in_dims, *inputs):
        return _one_by_one(_GradientsOnce.apply, info, in_dims, inputs)


def _one_by_one(function, info, in_dims, inputs):
    """Implement vmap: one call for each index of the mapped dimension, with stacked outputs."""
    calls = [
        function(*(v.select(dim, i) if isinstance(dim, int) else v for v, dim in zip(inputs, in_dims, strict=True)))
        for i in range(info.batch_size)
    ]
    outputs = [None if values[0] is None else torch.stack(values) for values in zip(*calls, strict=True)]
    return tuple(outputs), tuple(None if output is None else 0 for output in outputs)
