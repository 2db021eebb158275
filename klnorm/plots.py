"""Plots a `klnorm.summary`."""

import itertools
import math
import os
from typing import TYPE_CHECKING

from torch import nn

from .report import Summary, summary

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_COLORS = {"scale": "#8172b3", "shift": "#ccb974"}
_FEWEST_ROWS, _MOST_LABELS = 3, 100
_LONGEST_LABEL = 48


def plot_summary(source: Summary | nn.Module, path: str | os.PathLike | None = None) -> "Figure":
    """Draw for every layer the KL, signal to noise and the share fallen back to the prior; scale and shift separately.

    The KL bars of scale and shift are stacked, so their total length is the layer's KL. Layers are in model order from
    top to bottom. Parts that all names begin or end with are removed from the labels and shown beside them.

    Args:
        source: the result of `klnorm.summary`, or an nn.Module, which is summarized with the default threshold.
        path: file to write; its ending (.png, .svg, .pdf) chooses the format. Makes missing folders. None: no file.

    Returns:
        matplotlib.figure.Figure, which a notebook shows. It is not registered with pyplot and needs no close().

    Raises:
        TypeError: `source` or `path` has another type.
        ValueError: matplotlib cannot write the format of `path`; or as `klnorm.summary`.
        ImportError: matplotlib is not installed.

    Example:
        >>> model = klnorm.replace_layer_norm(nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 4), nn.LayerNorm(4)))
        >>> figure = klnorm.plot_summary(model)
        >>> [axis.get_title() for axis in figure.axes]
        ['KL divergence from the prior', 'signal to noise', 'fallen back to the prior']
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plot_summary needs matplotlib. Remedy: pip install 'klnorm[plot]'") from error
    numbers = _as_summary(source)
    rows = list(numbers.layers.values())
    height = 1.6 + 0.22 * min(max(len(rows), _FEWEST_ROWS), _MOST_LABELS)
    figure = Figure(figsize=(13, height), layout="constrained")
    _check_path(path, figure.canvas.get_supported_filetypes())
    kl, snr, fallen_back = figure.subplots(1, 3, sharey=True)
    _stacked_bars(kl, rows)
    _paired_bars(snr, rows, "snr", 1)
    _paired_bars(fallen_back, rows, "fallen_back", 100)
    kl.set(title="KL divergence from the prior", xlabel="nats", xlim=(0, None))
    snr.set(title="signal to noise", xlabel="median of |mean - prior mean| / deviation", xlim=(0, None))
    fallen_back.set(title="fallen back to the prior", xlim=(0, 100))
    fallen_back.set_xlabel(f"% of features with a KL below {numbers.threshold:g} nats")
    for axis in figure.axes:
        axis.grid(alpha=0.3, axis="x")
        axis.set_axisbelow(True)
    _label_layers(kl, list(numbers.layers))
    figure.legend(*kl.get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    if path is not None:
        os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
        figure.savefig(path, dpi=120)
    return figure


def _as_summary(source):
    if isinstance(source, Summary):
        return source
    if not isinstance(source, nn.Module):
        raise TypeError(
            f"source is a {type(source).__name__}, expected what klnorm.summary returned, or an nn.Module. "
            "Remedy: plot_summary(klnorm.summary(model))."
        )
    return summary(source)


def _check_path(path, supported):
    if path is None:
        return
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(
            f"path is a {type(path).__name__}, expected a str, a pathlib.Path or None. "
            "Remedy: 'summary.png', or plot_summary(model).savefig(file) for an open file."
        )
    if os.path.splitext(path)[1][1:].lower() not in supported:
        raise ValueError(
            f"path is {os.fspath(path)!r}, expected one that ends in .{', .'.join(sorted(supported))}: "
            "the ending chooses the format. Remedy: 'summary.png'."
        )


def _stacked_bars(axis, rows):
    """Draw the KL of every layer: the shift's bar starts where the scale's ends."""
    for name in _COLORS:
        parts = _parts(rows, name)
        starts = [0.0 if name == "scale" else rows[y].scale.kl for y in parts]
        axis.barh(list(parts), [part.kl for part in parts.values()], 0.8, starts, color=_COLORS[name], label=name)


def _paired_bars(axis, rows, key, factor):
    """Draw for every layer one bar for the scale and one below it for the shift."""
    for name, offset in ("scale", -0.2), ("shift", 0.2):
        parts = _parts(rows, name)
        lengths = [factor * getattr(part, key) for part in parts.values()]
        axis.barh([y + offset for y in parts], lengths, 0.4, color=_COLORS[name])


def _parts(rows, name):
    """Return {index of the layer: Part} for the layers that have a scale or shift, as `name` says."""
    return {y: part for y, row in enumerate(rows) if (part := getattr(row, name)) is not None}


def _label_layers(axis, names):
    """Label the layers from top to bottom: at most _MOST_LABELS names, without their common parts."""
    common, labels = _shorten(names)
    step = math.ceil(len(names) / _MOST_LABELS)
    axis.set_yticks(range(0, len(names), step), labels[::step], fontsize=8)
    middle, half = (len(names) - 1) / 2, max(len(names), _FEWEST_ROWS) / 2
    axis.set_ylim(middle + half, middle - half)
    axis.set_ylabel(common)


def _shorten(names):
    """Return the common beginning and end of dotted names, as "a.*.b" or "", and the remainder of each name."""
    paths = [name.split(".") for name in names]
    shortest = min(map(len, paths)) - 1 if len(paths) > 1 else 0  # every name keeps one part
    start = _count_equal(paths, range(shortest))
    end = _count_equal(paths, range(-1, start - shortest - 1, -1))
    kept = [".".join(path[start : len(path) - end]) or "(the model)" for path in paths]
    kept = [name if len(name) <= _LONGEST_LABEL else "…" + name[1 - _LONGEST_LABEL :] for name in kept]
    common = ".".join([*paths[0][:start], "*", *paths[0][len(paths[0]) - end :]])
    return common if start or end else "", kept


def _count_equal(paths, positions):
    """Count the leading `positions` at which all paths are equal."""
    equal = (len({path[i] for path in paths}) == 1 for i in positions)
    return sum(1 for _ in itertools.takewhile(bool, equal))
