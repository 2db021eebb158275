"""The operators `klnorm::norm_forward` and `klnorm::norm_backward`, and the autograd Functions around them.

Arguments of the operators, in order:

    x                                    (..., *normalized_shape), any floating dtype and strides
    residual                             None, or to be added to x first: shape of x, any floating dtype
    weight, bias, weight_rho, bias_rho   (groups, *normalized_shape), or normalized_shape for one group; one floating
                                         dtype; None where there is no shift; weight_rho None: deterministic reading
    weight_prior, bias_prior             normalized_shape, or with per_head as weight; None: the numbers below
    seed                                 int64, one element; None: no sampling (evaluation)
    weight_prior_value, bias_prior_value, prior_std, eps
    weight_offset                        added to the weight, it gives the scale; the prior's means are without it
    draws, inner                         row r uses draw (r // inner) % draws
    groups                               row r of M uses the parameters of group r // (M // groups)
    per_head                             or of r % groups, and, with k = r // groups for r, draw (k // inner) % draws of
                                         this group's own
    rms                                  RMSNorm: no mean is subtracted
    dtype                                forward: of y, None for that of x; backward: of the gradient of x

Forward returns y, the sum with the residual (as that), kl (scalar, or (groups,) of several or with per_head, in nats)
and statistics, (M, 2) of mean and 1 / deviation or, for RMSNorm, (M, 1); the latter two in fp32, or fp64 for fp64 `x`.
What is not there is an empty tensor. Backward takes as z what was normalized, x or the sum.

Inside of klnorm the tensors are `Parameters` and everything else is a `Spec`, see `klnorm.spec`.
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

# The gradients of z in the dtype of x and, where that is another one, of z; then of the parameters.
_BACKWARD = f"""norm_backward(
    Tensor? dy, Tensor? dsum, Tensor? dkl, Tensor z, {_ARGUMENTS}, Tensor statistics, {_NUMBERS}
) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"""

_library = torch.library.Library("klnorm", "DEF")
for _schema in _FORWARD, _BACKWARD:
    _library.define(" ".join(_schema.split()), tags=torch.Tag.pt2_compliant_tag)


@functools.cache
def _launch():
    """The host side of the kernels, imported when a CUDA tensor comes: a CPU machine may not have triton."""
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
    """(y, sum or None, kl) of plain tensors where nobody watches; the seed is a tensor, an int or None."""
    if torch.is_grad_enabled():
        return KLNormFunction.apply(x, residual, *parameters[:4], (parameters[4:], seed, spec))
    return _compute_forward(x, residual, parameters, seed, spec)[:3]


def compute_watched(x, residual, parameters, seed, numbers):
    """The same of any tensors, by the operators; the seed is a tensor or None."""
    if compat.transforming():
        return TransformableFunction.apply(x, residual, *parameters, seed, numbers)[:3]
    if torch.is_grad_enabled():
        return OperatorFunction.apply(x, residual, *parameters, seed, numbers)[:3]
    # Dynamo cannot trace a Function without gradients whose numbers are symbols, as with batches of any size.
    return OperatorFunction.forward(x, residual, *parameters, seed, numbers)[:3]


class KLNormFunction(torch.autograd.Function):
    """(y, sum, kl) and the gradients of them. Saves z, the parameters, the seed and the statistics of every row.

    For plain tensors where nobody watches: autograd spends time on every argument, and microseconds on Functions that
    torch.func can transform.
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
    """The same for everybody else, by the operators; statistics are an output here."""

    @staticmethod
    def forward(x, residual, *args):
        *parameters, seed, numbers = args
        y, sum_, kl, statistics = torch.ops.klnorm.norm_forward.default(x, residual, *parameters, seed, *numbers)
        return y, None if residual is None else sum_, kl, statistics

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, residual, *parameters, seed, numbers = inputs
        _, sum_, _, statistics = output
        numbers = *numbers[:-1], x.dtype  # as the backward's operator takes them
        _save(ctx, x if residual is None else sum_, parameters, seed, statistics, numbers)
        ctx.has_residual = residual is not None

    @staticmethod
    def backward(ctx, dy, dsum, dkl, _):
        return *_backward(ctx, dy, dsum, dkl), None, None, None, None


class TransformableFunction(OperatorFunction):
    """The same under torch.func's transforms. Apart, because torch.compile takes no Function that has these rules."""

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
    """For `_backward`; `work`: a Spec, or the numbers of the backward's operator."""
    ctx.last_kl, ctx.consumed = None, False  # for klnorm.kl: who holds this graph, and whether it is spent
    ctx.key, seed = (seed, None) if type(seed) is int else (None, seed)
    ctx.save_for_backward(z, *parameters, seed, statistics)
    ctx.set_materialize_grads(False)
    ctx.work = work


def _backward(ctx, dy, dsum, dkl):
    """The gradients of x, the residual and the four parameters."""
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
    """As the operator's, None for what there is not."""
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
    """The gradients where autograd records (create_graph=True): their derivatives must raise, not come out as zero."""

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
    """The rule of vmap: one call for every index of the mapped dimension, outputs stacked."""
    calls = [
        function(*(v.select(dim, i) if isinstance(dim, int) else v for v, dim in zip(inputs, in_dims, strict=True)))
        for i in range(info.batch_size)
    ]
    outputs = [None if values[0] is None else torch.stack(values) for values in zip(*calls, strict=True)]
    return tuple(outputs), tuple(None if output is None else 0 for output in outputs)
