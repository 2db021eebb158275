"""`klnorm.plot_summary`, its artists read back."""

import io
import sys
from xml.etree import ElementTree

import matplotlib.image
import pytest
import torch
from matplotlib import colors, pyplot
from torch import nn

from klnorm import KLLayerNorm
from klnorm.plots import plot_summary
from klnorm.report import summary


def model_of(names, bias=lambda i: True):
    """A model with KL layers of these dotted names, no two alike."""
    torch.manual_seed(0)
    model = nn.Module()
    for i, name in enumerate(names):
        *path, last = name.split(".")
        parent = model
        for step in path:
            if not hasattr(parent, step):
                parent.add_module(step, nn.Module())
            parent = getattr(parent, step)
        layer = KLLayerNorm(6 + i, bias=bias(i))
        with torch.no_grad():
            for p in layer.parameters():
                p += 0.9 * torch.rand_like(p) * (torch.rand_like(p) < 0.7)
        parent.add_module(last, layer)
    return model


def bars(axis, name):
    """Centre -> (start, end) of the bars in the colour of the scale or of the shift, in the order drawn."""
    color = colors.to_rgba({"scale": "#8172b3", "shift": "#ccb974"}[name])
    found = [bar for bar in axis.patches if bar.get_facecolor() == color]
    return {round(b.get_y() + b.get_height() / 2, 6): (b.get_x(), b.get_x() + b.get_width()) for b in found}


def labels(axis):
    return [label.get_text() for label in axis.get_yticklabels()]


def test_bars_are_the_numbers_of_the_summary():
    table = summary(model_of(["a.x", "b.x", "c.x"], bias=lambda i: i != 1), threshold=0.6)
    kl, snr, fallen_back = plot_summary(table).axes
    rows = list(table.layers.values())
    assert len(rows) == 3
    assert rows[1].shift is None
    with_shift = [(y, row) for y, row in enumerate(rows) if row.shift]
    assert bars(kl, "scale") == {y: (0, row.scale.kl) for y, row in enumerate(rows)}
    assert bars(kl, "shift") == {y: (row.scale.kl, pytest.approx(row.kl)) for y, row in with_shift}
    assert bars(snr, "scale") == {y - 0.2: (0, row.scale.snr) for y, row in enumerate(rows)}
    assert bars(snr, "shift") == {y + 0.2: (0, row.shift.snr) for y, row in with_shift}
    assert bars(fallen_back, "scale") == {y - 0.2: (0, 100 * row.scale.fallen_back) for y, row in enumerate(rows)}
    assert bars(fallen_back, "shift") == {y + 0.2: (0, 100 * row.shift.fallen_back) for y, row in with_shift}
    assert any(0 < row.scale.fallen_back < 1 for row in rows)
    assert fallen_back.get_xlabel() == "% of features with a KL below 0.6 nats"
    assert fallen_back.get_xlim() == (0, 100)


def test_the_legend_names_the_colours():
    figure = plot_summary(model_of(["a"]))
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["scale", "shift"]
    expected = [colors.to_rgba(color) for color in ("#8172b3", "#ccb974")]
    assert [patch.get_facecolor() for patch in legend.get_patches()] == expected


def test_a_model_is_summarized_with_the_default_threshold():
    model = model_of(["a", "b"])
    axes, expected = plot_summary(model).axes, plot_summary(summary(model)).axes
    assert [axis.get_xlabel() for axis in axes] == [axis.get_xlabel() for axis in expected]
    for axis, other in zip(axes, expected, strict=True):
        for name in "scale", "shift":
            assert bars(axis, name) == bars(other, name) != {}


@pytest.mark.parametrize(
    ("names", "common", "left"),
    [
        (["encoder.0.norm", "encoder.1.norm"], "encoder.*.norm", ["0", "1"]),
        (["h.0.ln_1", "h.0.ln_2", "h.1.ln_1"], "h.*", ["0.ln_1", "0.ln_2", "1.ln_1"]),
        (["embeddings.norm", "layer.0.out.norm"], "*.norm", ["embeddings", "layer.0.out"]),
        (["a.norm", "b.ln"], "", ["a.norm", "b.ln"]),
        (["m.norm", "m.out.norm"], "m.*", ["norm", "out.norm"]),
        (["encoder.norm"], "", ["encoder.norm"]),
        (["a." + "x" * 60, "b"], "", ["…" + "x" * 47, "b"]),
    ],
)
def test_labels(names, common, left):
    axis = plot_summary(model_of(names)).axes[0]
    assert labels(axis) == left
    assert axis.get_ylabel() == common
    assert axis.get_ylim()[0] > axis.get_ylim()[1]  # the first on top


def test_a_layer_alone_and_a_fresh_one():
    axes = plot_summary(KLLayerNorm(4)).axes
    assert labels(axes[0]) == ["(the model)"]
    assert bars(axes[1], "scale") == {-0.2: (0, 0)}
    assert axes[1].get_xlim()[0] == 0


def test_more_layers_than_labels():
    figure, largest = (plot_summary(nn.Sequential(*[KLLayerNorm(2) for _ in range(n)])) for n in (250, 100))
    axis = figure.axes[0]
    assert labels(axis) == [str(i) for i in range(0, 250, 3)]
    assert list(axis.get_yticks()) == list(range(0, 250, 3))
    assert len(bars(axis, "scale")) == 250
    assert labels(largest.axes[0]) == [str(i) for i in range(100)]
    assert figure.get_figheight() == largest.get_figheight()


def test_files(tmp_path):
    model = model_of(["a.x", "b.x"])
    plot_summary(model, tmp_path / "new" / "s.png")
    image = matplotlib.image.imread(tmp_path / "new" / "s.png")[..., :3]
    for color in "#8172b3", "#ccb974":
        close = abs(image - torch.tensor(colors.to_rgb(color)).numpy()).max(-1) < 0.01
        assert close.sum() > 500  # pixels of bars
    plot_summary(model, str(tmp_path / "s.svg"))
    assert ElementTree.parse(tmp_path / "s.svg").getroot().tag.endswith("svg")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new", "s.svg"]


def test_pyplot_does_not_know_the_figure():
    before = pyplot.get_fignums()
    plot_summary(model_of(["a"]))
    assert pyplot.get_fignums() == before


def test_the_remedies(tmp_path):
    """What the errors of `test_errors` advise, done."""
    model, file = model_of(["a"]), io.BytesIO()
    plot_summary(model, tmp_path / "summary.png")
    plot_summary(model).savefig(file)
    assert (tmp_path / "summary.png").stat().st_size > 1000
    assert len(file.getvalue()) > 1000
    assert len(plot_summary(summary(model)).axes) == 3


def test_errors(tmp_path, monkeypatch):
    model = model_of(["a"])
    with pytest.raises(TypeError, match=r"source is a dict, expected what klnorm\.summary returned.*Remedy"):
        plot_summary(summary(model).as_dict())
    for name in "s.xyz", "s":
        with pytest.raises(ValueError, match=rf"path is '.*{name}', expected one that ends in .*\.png.*\.svg.*Remedy"):
            plot_summary(model, tmp_path / name)
    for path in 3, True, b"s.png", [tmp_path / "s.png"], io.BytesIO():
        came = type(path).__name__
        with pytest.raises(TypeError, match=rf"path is a {came}, expected a str, a pathlib\.Path or None\. Remedy"):
            plot_summary(model, path)
    with pytest.raises(ValueError, match="no KL layer"):
        plot_summary(nn.LayerNorm(4))
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"needs matplotlib. Remedy: pip install 'klnorm\[plot\]'"):
        plot_summary(model)
