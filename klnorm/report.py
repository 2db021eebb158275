"""Summarizes the posteriors of a model: numbers per layer, as a table and as a flat dict."""

import math
from dataclasses import dataclass

import torch
from torch import nn

from . import checks, compat
from .compat import whole
from .kl import some_kl_layers
from .reference.kl_norm import kl_deterministic, kl_normal, softplus

_MEANS = {"scale": "weight", "shift": "bias"}
_TINY = 1e-30  # smallest divisor: a ratio to a deviation that underflows stays finite in fp32, which TensorBoard stores
_COLUMNS = {"KL, nats": ("both", "scale", "shift")} | dict.fromkeys(
    ("deviation", "signal/noise", "fallen back"), ("scale", "shift")
)
_GAP = "  "


@dataclass(frozen=True)
class Part:
    """All scales or all shifts of a layer or of a model; see `klnorm.summary`.

    Attributes:
        features: how many there are.
        kl: KL divergence from the prior, the sum over features, in nats.
        deviation: mean of the posterior deviations.
        snr: median signal to noise.
        fallen_back: share of features whose posterior has fallen back to the prior, 0 to 1.
    """

    features: int
    kl: float
    deviation: float
    snr: float
    fallen_back: float


@dataclass(frozen=True)
class Row:
    """Scales and shifts of a layer, or of all layers; `shift` is None if there are none."""

    scale: Part
    shift: Part | None

    @property
    def kl(self) -> float:
        """KL divergence of scales and shifts together, in nats."""
        return self.scale.kl + (0.0 if self.shift is None else self.shift.kl)


@dataclass(frozen=True, repr=False)
class Summary:
    """The result of `klnorm.summary`; prints as a table.

    Attributes:
        layers: {qualified name of a layer: Row}.
        total: the Row of all layers together.
        threshold: KL in nats below which a feature has fallen back to its prior.
    """

    layers: dict[str, Row]
    total: Row
    threshold: float

    def as_dict(self) -> dict[str, float]:
        """Return a flat dict of finite floats, for TensorBoard or W&B.

        The keys are "klnorm/<layer>/<value>", and "klnorm/<value>" for all layers together. <value> is "kl",
        "scale_kl", "scale_deviation", "scale_snr", "scale_fallen_back", and with a shift also "shift_kl" and so on.
        """
        values = {}
        for name, row in [*self.layers.items(), ("", self.total)]:
            prefix = f"klnorm/{name}/" if name else "klnorm/"
            values[f"{prefix}kl"] = row.kl
            for part_name, part in (("scale", row.scale), ("shift", row.shift)):
                for key in ("kl", "deviation", "snr", "fallen_back") if part else ():
                    values[f"{prefix}{part_name}_{key}"] = getattr(part, key)
        return values

    def __repr__(self) -> str:
        names = ["", "layer", *(name or "(the model)" for name in self.layers), "total"]
        rows = [_cells(row) for row in [*self.layers.values(), self.total]]
        table = [["features", *(title for titles in _COLUMNS.values() for title in titles)], *rows]
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines = [_group_titles(widths)] + [_GAP.join(map(str.rjust, cells, widths)) for cells in table]
        indent = max(map(len, names))
        lines = [f"{name:<{indent}}{_GAP}{line}".rstrip() for name, line in zip(names, lines, strict=True)]
        return "\n".join([*lines, f"fallen back: share of features with a KL below {self.threshold:g} nats"])


def _group_titles(widths):
    """Return the line above the header, with each title centred over its columns."""
    titles, start = [" " * widths[0]], 1
    for title, columns in _COLUMNS.items():
        span = widths[start : start + len(columns)]
        titles.append(title.center(sum(span) + len(_GAP) * (len(span) - 1)))
        start += len(columns)
    return _GAP.join(titles)


def _cells(row):
    parts = row.scale, row.shift
    formats = {"kl": _nats, "deviation": "{:#.3g}".format, "snr": "{:#.3g}".format, "fallen_back": "{:.1%}".format}
    cells = [
        "-" if part is None else text(getattr(part, key)).rstrip(".") for key, text in formats.items() for part in parts
    ]
    return [f"{row.scale.features:,}", _nats(row.kl), *cells]


def _nats(kl):
    return f"{round(kl, 2) + 0.0:,.2f}"  # + 0.0 turns -0.0, possible in the deterministic reading, into 0.0


def summary(model: nn.Module, *, threshold: float = 0.01) -> Summary:
    """Summarize the posteriors of the KL layers in `model`, scale and shift separately.

    ::

        KL            sum over features, in closed form from the parameters
        deviation     mean over features of s = softplus(rho)
        signal/noise  median over features of |mean - prior mean| / s
        fallen back   share of features with a KL below `threshold`

    A layer with posterior="deterministic" has one posterior, that of the normalized activation: its mean is the shift,
    its deviation the absolute value of the scale. Its numbers are in the columns of the scale. For a
    KLConditionalLayerNorm the numbers describe the posterior of a sample whose condition is 0.

    The signal is the distance of a feature's mean from its prior mean, the noise its posterior deviation. The ratio is
    0 for a feature that has not moved, and far below 1 if a reset to the prior mean would change less than sampling
    does. For a prior mean of 0 it is the ratio by which Bayesian networks are pruned (Blundell et al. 2015, "Weight
    uncertainty in neural networks"); for another, |mean| / s would show the initial weight, not what was learned. The
    median describes the typical feature; a mean would be dominated by a few features with large ratios.

    The mean of a feature with less than 0.01 nats is within 0.15 prior deviations of its prior mean, its deviation
    within 11 % of the prior's. From one draw, an observer tells posterior from prior in at most 53.6 % of cases
    (Pinsker's inequality). Either nothing was learned about the feature, or the weight of the KL is too large.

    The layers are those of `klnorm.kl_layers(model)`, in training and evaluation mode. The call computes no gradient
    and waits for a GPU once. It gathers parameters sharded by FSDP2, so every rank has to call it.

    Args:
        model: any nn.Module with KL layers.
        threshold: in nats, > 0.

    Returns:
        A `Summary`, which prints as a table. `.layers[name]` and `.total` have `.kl`, `.scale` and `.shift` (None
        without a shift); these have `.features`, `.kl`, `.deviation`, `.snr` and `.fallen_back`, computed in fp64.
        `.as_dict()` is flat, for a logger.

    Raises:
        TypeError: `model` is not an nn.Module, or `threshold` is not a number.
        ValueError: `threshold` is out of range, `model` has no KL layer, or a layer is on the meta device, offloaded by
            accelerate or not, or has values that are not finite.

    Example:
        >>> model = klnorm.replace_layer_norm(nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 4), nn.LayerNorm(4)))
        >>> summary = klnorm.summary(model)
        >>> summary
                              KL, nats         deviation     signal/noise  fallen back
        layer  features  both  scale  shift   scale   shift  scale  shift  scale  shift
        0             8  5.09   2.55   2.55  0.0500  0.0500   0.00   0.00   0.0%   0.0%
        2             4  2.55   1.27   1.27  0.0500  0.0500   0.00   0.00   0.0%   0.0%
        total        12  7.64   3.82   3.82  0.0500  0.0500   0.00   0.00   0.0%   0.0%
        fallen back: share of features with a KL below 0.01 nats
        >>> round(summary.layers["0"].scale.deviation, 6)
        0.05
        >>> round(summary.as_dict()["klnorm/2/kl"], 3)
        2.545
    """
    checks.check_positive("threshold", threshold)
    layers = some_kl_layers(model, "there is no posterior to look at")
    parts = _parts(layers, threshold)
    rows = {name: Row(parts[name, "scale"], parts.get((name, "shift"))) for name in [*layers, None]}
    return Summary(total=rows.pop(None), layers=rows, threshold=float(threshold))


@torch.no_grad()
def _parts(layers, threshold):
    """Return {(name of a layer, "scale" or "shift"): Part}; the name None stands for all layers together."""
    features = {
        (name, part): _features(name, layer, part)
        for part, mean in _MEANS.items()
        for name, layer in layers.items()
        if getattr(layer, mean) is not None and (part == "scale" or layer.posterior == "sampled")
    }
    device = next(iter(features.values())).device
    for part in _MEANS:
        columns = [values.to(device) for (_, its_part), values in features.items() if its_part == part]
        if columns:
            features[None, part] = torch.cat(columns, dim=1)
    numbers = torch.stack([_reduce(values, threshold).to(device) for values in features.values()]).tolist()
    for (name, part), row in zip(features, numbers, strict=True):
        if not all(map(math.isfinite, row)):
            raise ValueError(_explain(name, layers[name], part))
    return {key: Part(features[key].shape[1], *row) for key, row in zip(features, numbers, strict=True)}


def _features(name, layer, part):
    """Return KL, deviation and signal to noise of every feature, (3, features) in fp64."""
    tensors = [tensor.double().flatten() for tensor in _tensors(name, layer, part).values()]
    if layer.posterior == "deterministic":
        weight, mean, prior = (*tensors, *[torch.zeros_like(tensors[0])] * 2)[:3]
        weight = weight + layer._weight_offset
        deviation, kl = weight.abs(), kl_deterministic(weight, mean, prior, layer.prior_std)
    else:
        mean, rho, prior = tensors
        deviation, kl = softplus(rho), kl_normal(mean, rho, prior, layer.prior_std)
    return torch.stack([kl, deviation, (mean - prior).abs() / deviation.clamp_min(_TINY)])


def _tensors(name, layer, part):
    """Return {name: tensor} of the tensors that a part's numbers are computed from; gathers sharded ones."""
    mean = _MEANS[part]
    keys = (mean, f"{mean}_rho", f"{mean}_prior") if layer.posterior == "sampled" else ("weight", "bias", "bias_prior")
    tensors = layer.posterior_and_prior()._asdict()
    tensors = {key: tensors[key] for key in keys if tensors[key] is not None}
    for key, tensor in tensors.items():
        compat.check_not_absent(name, layer, key, tensor)
    return {key: whole(tensor) for key, tensor in tensors.items()}


def _reduce(features, threshold):
    """Return the numbers of a Part, (4,): `features` (3, features) is the result of `_features`."""
    kl, deviation, snr = features
    ordered, half = snr.sort().values, (len(snr) - 1) / 2  # torch.median returns the lower of two middle values
    median = (ordered[math.floor(half)] + ordered[math.ceil(half)]) / 2
    return torch.stack([kl.sum(), deviation.mean(), median, (kl < threshold).double().mean()])


def _explain(name, layer, part):
    what = checks.describe_not_finite(_tensors(name, layer, part).items())
    return (
        f"the {part} of layer {checks.named(name)} has values that are not finite: {what}. "
        "Remedy: look for a diverged step or a bad checkpoint; a lower learning rate for rho often helps."
    )
