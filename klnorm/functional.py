"""The functional forms of the norms: check the arguments, lay out the draws, draw the seed and call `klnorm.ops`."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from . import checks, compat, inputs, ops, seeds
from .reference.kl_norm import accumulation_dtype, draw_layout
from .spec import Parameters, Prior, Rows, dtypes_of, make_spec


class Settings(NamedTuple):
    """The arguments of a norm that are neither tensors nor learned; see `kl_layer_norm`. `kind`: "layer" or "rms".

    `weight_prior` and `bias_prior` apply where the call has no tensors of prior means.
    """

    kind: str
    posterior: str
    noise: str
    sample_dim: int
    prior_std: float
    eps: float | None
    out_dtype: torch.dtype | None = None
    weight_offset: float = 0.0
    per_head: bool = False
    weight_prior: float = 0.0
    bias_prior: float = 0.0


def kl_layer_norm(
    x: torch.Tensor,
    normalized_shape: int | Sequence[int],
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    weight_rho: torch.Tensor | None,
    bias_rho: torch.Tensor | None,
    *,
    weight_prior: float | torch.Tensor = 1.0,
    bias_prior: float | torch.Tensor = 0.0,
    prior_std: float = 0.1,
    eps: float = 1e-5,
    noise: checks.Noise = "sample",
    sample_dim: int = 0,
    sample: bool = True,
    seed: torch.Tensor | None = None,
    generator: torch.Generator | None = None,
    posterior: checks.Posterior = "sampled",
    residual: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    weight_offset: float = 0.0,
    per_head: bool = False,
) -> tuple[torch.Tensor, ...]:
    r"""Layer normalization with Gaussian scale and shift; also returns their KL divergence from the prior.

    .. math::
        y = \gamma \hat x + \beta, \quad
        \gamma_j \sim N(\mathrm{weight}_j, \mathrm{softplus}(\mathrm{weight\_rho}_j)^2), \quad
        \beta_j \sim N(\mathrm{bias}_j, \mathrm{softplus}(\mathrm{bias\_rho}_j)^2)

    with the biased variance in :math:`\hat x`, and :math:`\mathrm{kl} = \sum_j \mathrm{KL}(\gamma_j \|
    N(\mathrm{weight\_prior}_j, \mathrm{prior\_std}^2))` plus the same sum for :math:`\beta`. This is one reading of
    Kumar, Narang and Lall, "KL Regularized Normalization Framework for Low Resource Tasks" (2022, arXiv 2212.11275).
    Their own equations are unverified here. Arithmetic is in fp32 (fp64 for fp64 `x`).

    Another reading is `posterior="deterministic"`: the normalized activation itself takes the place of the noise, so
    that :math:`y_j \sim N(\mathrm{bias}_j, \mathrm{weight}_j^2)`. There are no deviations, y is the output of
    LayerNorm, and :math:`\mathrm{kl} = \sum_j \mathrm{KL}(N(\mathrm{bias}_j, \mathrm{weight}_j^2) \|
    N(\mathrm{bias\_prior}_j, \mathrm{prior\_std}^2))`. Its logarithm takes :math:`\sqrt{\mathrm{weight}^2 +
    (\mathrm{prior\_std} / 1000)^2}` in place of :math:`|\mathrm{weight}|`, so that a weight of 0 costs log 1000 - 1/2
    nats instead of infinity.

    Args:
        x: (..., \*normalized_shape), floating point: M rows of N features. Not copied if features are adjacent in
            memory and all rows have one stride.
        normalized_shape: int or sequence of ints; N is their product.
        weight: posterior mean of the scale, of shape `normalized_shape`, any floating dtype. Or all four parameters are
            (G, \*normalized_shape), where G divides M: row r then has the parameters of group r // (M / G).
        bias: posterior mean of the shift, or None together with `bias_rho` for no shift.
        weight_rho: deviation of the scale before softplus, like `weight`; None in the deterministic reading.
        bias_rho: deviation of the shift before softplus, like `bias`; None in the deterministic reading.
        weight_prior: prior mean of the scale, a float or a tensor of `normalized_shape`; no gradient. Not used in the
            deterministic reading.
        bias_prior: prior mean of the shift, a float or a tensor of `normalized_shape`; no gradient.
        prior_std: deviation of the prior, > 0.
        eps: added to the variance, >= 0.
        noise: which rows share a draw of scale and shift: "batch" all rows, "sample" rows with the same index in
            `sample_dim`, "token" none.
        sample_dim: the dimension of `x` that counts samples; not a normalized one. Used for noise="sample" only.
        sample: whether to sample; False uses the means, which is LayerNorm.
        seed: int64 tensor of one element on the device of `x`, all 64 bits used; drawn from torch's generator if None.
        generator: torch.Generator of the device of `x` to draw the seed from; torch's own if None.
        posterior: "sampled" or "deterministic".
        residual: None, or a tensor in the shape of `x`, of any floating dtype (fp64 if and only if `x` is). The sum of
            both, rounded to the dtype of `residual`, is normalized, in one pass.
        out_dtype: floating dtype of y, to which it is rounded once; that of `x` if None.
        weight_offset: the scale is `weight_offset` + weight. Use 1 for checkpoints with weights around 0, such as
            Gemma's; `weight_prior`, in the units of `weight`, is then around 0 too.
        per_head: for norms of queries and keys: x is (..., H, \*normalized_shape), parameters and tensors of prior
            means are (H, \*normalized_shape), one per head. Heads share no noise.

    Returns:
        y, like `x` in shape and, unless `out_dtype` says otherwise, in dtype, contiguous; and kl in nats, fp32 (fp64
        for fp64 `x`), a scalar; (G,) for parameters with groups, (H,) with `per_head`. With a residual (y, x +
        residual, kl), the sum in the dtype of `residual`, contiguous. All are differentiable once in reverse mode, also
        by torch.func; torch.vmap runs one call per index.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, layout, shape, device or range, even if the mode
            does not use it. Numbers have to be real and finite in fp32 (fp64 for fp64 `x`), flags have to be bools.
            Also if activation checkpointing repeats a call with a `generator`, and on the CPU if the KL divergence is
            not finite.

    Example:
        >>> x, weight, bias = torch.randn(4, 5, 8), torch.ones(8), torch.zeros(8)
        >>> rho = torch.full((8,), -3.0)
        >>> y, kl = klnorm.functional.kl_layer_norm(x, 8, weight, bias, rho, rho, noise="token")
        >>> y.shape, kl.shape
        (torch.Size([4, 5, 8]), torch.Size([]))
        >>> y, kl = klnorm.functional.kl_layer_norm(
        ...     x, 8, weight, bias, None, None, posterior="deterministic", prior_std=1.0
        ... )
        >>> torch.allclose(y, F.layer_norm(x, (8,), weight, bias), atol=1e-6), abs(round(kl.item(), 5))
        (True, 0.0)
        >>> q, weight, rho = torch.randn(2, 5, 4, 8), torch.ones(4, 8), torch.full((4, 8), -3.0)  # time, then heads
        >>> y, kl = klnorm.functional.kl_layer_norm(q, 8, weight, weight * 0, rho, rho, per_head=True)
        >>> y.shape, kl.shape
        (torch.Size([2, 5, 4, 8]), torch.Size([4]))
    """
    parameters, priors = (weight, bias, weight_rho, bias_rho), (weight_prior, bias_prior)
    options = "layer", posterior, noise, sample_dim, prior_std, eps, out_dtype, weight_offset, per_head
    return _check_and_normalize(x, residual, normalized_shape, parameters, priors, options, sample, seed, generator)


def kl_rms_norm(
    x: torch.Tensor,
    normalized_shape: int | Sequence[int],
    weight: torch.Tensor,
    weight_rho: torch.Tensor | None,
    *,
    bias: torch.Tensor | None = None,
    bias_rho: torch.Tensor | None = None,
    weight_prior: float | torch.Tensor = 1.0,
    bias_prior: float | torch.Tensor = 0.0,
    prior_std: float = 0.1,
    eps: float | None = None,
    noise: checks.Noise = "sample",
    sample_dim: int = 0,
    sample: bool = True,
    seed: torch.Tensor | None = None,
    generator: torch.Generator | None = None,
    posterior: checks.Posterior = "sampled",
    residual: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    weight_offset: float = 0.0,
    per_head: bool = False,
) -> tuple[torch.Tensor, ...]:
    r"""RMS normalization with Gaussian scale and, if given, shift; also returns their KL divergence from the prior.

    :math:`y = \gamma \hat x` with :math:`\hat x = x / \sqrt{\mathrm{mean}(x^2) + \mathrm{eps}}` (Zhang and Sennrich
    2019, arXiv 1910.07467), or :math:`y = \gamma \hat x + \beta`; everything else as in `kl_layer_norm`.

    Args:
        eps: added to the mean square, >= 0; the machine epsilon of fp32 (fp64 for fp64 `x`) if None, as in nn.RMSNorm.
        bias, bias_rho: as for `kl_layer_norm`; both None for no shift. The deterministic reading takes `bias` alone.
        x, normalized_shape, weight, weight_rho, weight_prior, bias_prior, prior_std, noise, sample_dim, sample, seed,
            generator, posterior, residual, out_dtype, weight_offset, per_head: as for `kl_layer_norm`.

    Returns:
        (y, kl), or (y, x + residual, kl), as `kl_layer_norm`.

    Raises:
        TypeError, ValueError: as `kl_layer_norm`.

    Example:
        >>> x, weight, rho = torch.randn(4, 5, 8), torch.ones(8), torch.full((8,), -3.0)
        >>> y, total, kl = klnorm.functional.kl_rms_norm(x, 8, weight, rho, residual=torch.ones(4, 5, 8))
        >>> torch.equal(total, x + 1)
        True
        >>> k, weight, rho = torch.randn(2, 5, 4, 8), torch.ones(4, 8), torch.full((4, 8), -3.0)
        >>> klnorm.functional.kl_rms_norm(k, 8, weight, rho, per_head=True)[1].shape
        torch.Size([4])
    """
    parameters, priors = (weight, bias, weight_rho, bias_rho), (weight_prior, bias_prior)
    options = "rms", posterior, noise, sample_dim, prior_std, eps, out_dtype, weight_offset, per_head
    return _check_and_normalize(x, residual, normalized_shape, parameters, priors, options, sample, seed, generator)


def _check_and_normalize(x, residual, normalized_shape, parameters, priors, options, sample, seed, generator):
    """Check what `normalize` does not check, or checks only once, and return the result of the functional form."""
    inputs.check_tensor("x", x)
    shape = checks.as_shape(normalized_shape)
    checks.check_flag("sample", sample)
    inputs.check_seed(seed, x)
    inputs.check_generator(generator, x)
    tensors = [prior.detach() if isinstance(prior, torch.Tensor) else None for prior in priors]
    numbers = [0.0 if isinstance(prior, torch.Tensor) else prior for prior in priors]
    parameters = Parameters(*parameters, *tensors)
    settings = _as_settings((*options, *numbers), shape, x)  # in known calls too: as a key of `_known`, True equals 1
    for name, tensor in zip(Parameters._fields, parameters, strict=True):
        if isinstance(tensor, torch.Tensor):
            inputs.check_layout(name, tensor)
    y, sum_, kl = normalize(x, residual, shape, parameters, settings, sample, seed, generator)
    _check_finite(kl, parameters)
    return (y, kl) if residual is None else (y, sum_, kl)


_known: dict = {}  # calls that have been checked -> their Spec
_KNOWN_CALLS = 4096


def normalize(x, residual, shape, parameters, settings, sample, seed=None, generator=None):
    """Return (y, sum or None, kl); does not check that the KL is finite, which layers leave to `klnorm.kl_divergence`.

    A call that differs from an earlier one in values alone is not checked again: on small inputs the host's work takes
    most of the time.
    """
    if compat.is_watched() or not (seed is None or compat.are_plain(seed)):
        return _normalize_watched(x, residual, shape, parameters, settings, sample, seed, generator)
    tensors = x, residual, *parameters
    try:
        kinds = [None if t is None else (type(t), t.shape, t.dtype, t.device, t.is_neg()) for t in tensors]
        call = settings, sample, shape, x.layout, residual is None or residual.layout, *kinds
        spec = _known.get(call)
    except (AttributeError, RuntimeError, TypeError):  # not a tensor, a nested tensor, or an unhashable argument
        call = spec = None
    if spec is None:
        if call is None or not compat.are_plain(*tensors):
            return _normalize_watched(x, residual, shape, parameters, settings, sample, seed, generator)
        prior, eps, rows = _check_call(x, residual, shape, parameters, settings, sample)
        spec = make_spec(
            settings.kind, settings.posterior, eps, prior, math.prod(shape), rows, dtypes_of(*tensors),
            settings.out_dtype, settings.weight_offset,
        )  # fmt: skip
        if len(_known) >= _KNOWN_CALLS:
            _known.clear()
        _known[call] = spec
    if spec.rows.noise == "none":
        seed = None
    elif seed is None and seeds.known_to_host(x):
        if generator is not None:
            inputs.check_drawn_from(generator, x)
        seed = seeds.draw_key(seeds.default_generator(x.device) if generator is None else generator)
    else:
        seed = _seed_tensor(x, seed, generator)
    y, sum_, kl = ops.compute(x, residual, parameters, seed, spec)
    return y, sum_, _kl_by_group(kl, parameters, shape)


def _normalize_watched(x, residual, shape, parameters, settings, sample, seed, generator):
    """`normalize` through the operators, which tracing, transforms and dispatch modes see; checks every call."""
    prior, eps, rows = _check_call(x, residual, shape, parameters, settings, sample)
    seed = None if rows.noise == "none" else _seed_tensor(x, seed, generator)
    layout = rows.draws, rows.inner, rows.groups, rows.per_head
    numbers = *prior, eps, settings.weight_offset, *layout, settings.kind == "rms", settings.out_dtype
    y, sum_, kl = ops.compute_watched(x, residual, parameters, seed, numbers)
    return y, sum_, _kl_by_group(kl, parameters, shape)


def _kl_by_group(kl, parameters, shape):
    """Return kl with shape (1,) if parameters are (1, *shape), a single group; otherwise unchanged."""
    return kl if kl.dim() or parameters.weight.dim() == len(shape) else kl.reshape(1)


def _as_settings(settings, shape, x):
    """Check `settings`; return them as `Settings` with numbers as int or float, finite in the arithmetic on `x`."""
    kind, posterior, noise, sample_dim, prior_std, eps, out_dtype, weight_offset, per_head, *values = settings
    checks.check_posterior(posterior)
    checks.check_noise(noise)
    checks.check_out_dtype(out_dtype)
    checks.check_flag("per_head", per_head)
    dtype, or_tensor = accumulation_dtype(x), f" or a tensor of shape {shape}{' for every head' if per_head else ''}"
    if kind == "layer" or eps is not None:
        eps = checks.as_number("eps", eps, at_least=0, dtype=dtype)
    return Settings(
        kind,
        posterior,
        noise,
        checks.as_integer("sample_dim", sample_dim),
        checks.as_number("prior_std", prior_std, above=0, dtype=dtype),
        eps,
        out_dtype,
        checks.as_number("weight_offset", weight_offset, dtype=dtype),
        per_head,
        *[
            checks.as_number(name, value, dtype=dtype, instead=or_tensor)
            for name, value in zip(("weight_prior", "bias_prior"), values, strict=True)
        ],
    )


def _check_call(x, residual, shape, parameters, settings, sample):
    """Check that the arguments of a call fit together; return (`Prior`, eps, `Rows`)."""
    inputs.check_input(x, shape)
    kind, posterior, noise, sample_dim, prior_std, eps, _, _, per_head, *values = _as_settings(settings, shape, x)
    *posteriors, weight_prior, bias_prior = parameters
    inputs.check_residual(residual, x)
    if kind == "rms" and eps is None:
        eps = torch.finfo(accumulation_dtype(x)).eps
    n_rows, trailing = x.numel() // math.prod(shape), len(shape)
    if per_head:
        shape, trailing = inputs.shape_of_heads(x, shape), len(shape) + 1
    groups = inputs.check_parameters(x, shape, *posteriors, posterior, per_head)
    for name, prior in ("weight_prior", weight_prior), ("bias_prior", bias_prior):
        inputs.check_prior(name, prior, x, shape, per_head)
    sample = sample and posterior == "sampled"
    if noise == "sample" and sample:
        sample_dim = inputs.resolve_sample_dim(x, trailing, sample_dim)
    draws, inner = draw_layout(x.shape, trailing, noise if sample else "batch", sample_dim)
    inputs.check_rows(n_rows)
    rows = Rows.of(sample, n_rows, 1 if groups is None else groups, draws, inner, per_head)
    if groups is not None:
        inputs.check_groups(rows)
    return Prior(*values, prior_std), eps, rows


def _seed_tensor(x, seed, generator):
    """Return the caller's seed as (1,), or one that an operator of torch draws from `generator`."""
    if seed is not None:
        return seed.reshape(1)
    inputs.check_drawn_from(generator, x)
    # The keyword generator=, even None, selects the overload that inductor leaves to torch: the same seeds as eager.
    return torch.randint(2**63 - 1, (1,), device=x.device, generator=generator)


def _check_finite(kl, parameters):
    """Raise for a KL divergence that is not finite if reading it does not wait for a device: on the CPU."""
    if kl.device.type == "cpu" and compat.is_readable(kl) and not kl.detach().isfinite().all():
        raise ValueError(
            f"the KL divergence is {kl.tolist()}: {checks.describe_not_finite(parameters._asdict().items())}. "
            "Remedy: look for a diverged step or a bad checkpoint; a lower learning rate for rho often helps."
        )
