"""The demo, end to end in a small setting, and the parts of it that a wrong number could hide in."""

import contextlib
import importlib
import io
import math
import sys

import numpy as np
import pytest
import torch

import klnorm
from klnorm import demo

SEEDS, STEPS = 2, 25

pytestmark = pytest.mark.usefixtures("one_thread")  # as main() sets


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Numbers, printed text and picture of one run through main()."""
    path = tmp_path_factory.mktemp("demo") / "new" / "picture.png"
    text = io.StringIO()
    with contextlib.redirect_stdout(text):
        found = demo.main(["--seeds", str(SEEDS), "--steps", str(STEPS), "--output", str(path), "--device", "cpu"])
    return found, text.getvalue(), path


def test_learns_in_every_column(finished):
    found, _, _ = finished
    for metric, columns in found.items():
        assert list(columns) == ["LayerNorm", "KLLayerNorm, means", "KLLayerNorm, 8 draws"]
        assert all(len(numbers) == SEEDS and np.isfinite(numbers).all() for numbers in columns.values()), metric
    for column, accuracies in found["test accuracy %"].items():
        assert min(accuracies) > 50  # chance is 10
        assert min(found["shifted accuracy %"][column]) > 20
        assert max(found["shifted accuracy %"][column]) < min(accuracies)
        assert (min(found["KL, nats"][column]) > 0) == (column != "LayerNorm")


def test_same_seed_same_numbers_and_draws_differ_from_means(finished):
    found, _, _ = finished
    again, model = demo.run(1, STEPS, "cpu")
    for metric in found.keys() - {"training, s"}:
        assert again[metric] == {column: numbers[:1] for column, numbers in found[metric].items()}, metric
    assert found["test NLL"]["KLLayerNorm, means"] != found["test NLL"]["KLLayerNorm, 8 draws"]
    layers = klnorm.summary(model).layers.values()
    assert len(layers) == 5
    for layer in layers:  # the KL pulls the deviations towards the wider prior
        assert min(layer.scale.deviation, layer.shift.deviation) > 1.1 * demo.INIT_STD


def test_prints_tables_and_draws_the_summary(finished):
    found, text, path = finished
    assert [text.count(metric) for metric in found][:6] == [3] * 6  # a mean and two differences
    assert "%|" not in text  # the bar goes to stderr
    assert "blocks.1.norm2" in text
    assert str(path) in text
    assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def test_arms_start_equal_and_see_the_same_batches():
    images, labels, seen = torch.rand(100, 8, 8), torch.arange(100) % 10, {}
    plain, variational = (demo.build_model(3, norm) for norm in demo.COLUMNS)
    assert not klnorm.kl_layers(plain)
    assert len(klnorm.kl_layers(variational)) == 5
    assert all(torch.equal(variational.state_dict()[name], tensor) for name, tensor in plain.state_dict().items())
    torch.testing.assert_close(*(demo.predict(model, images, 0) for model in (plain, variational)), rtol=0, atol=0)
    for model in plain, variational:
        batches = seen[model] = []
        model.register_forward_pre_hook(lambda _, inputs, batches=batches: batches.append(inputs[0]))
        demo.train(model, images, labels, steps=10, seed=3)
    assert len(seen[plain]) == 10
    assert all(torch.equal(*pair) for pair in zip(*seen.values(), strict=True))
    assert seen[plain][0].shape == (demo.BATCH, 8, 8)
    assert not torch.equal(seen[plain][0], seen[plain][1])


def test_labelled_images_are_balanced_and_not_test_images():
    _, labels = demo.load_images()
    chosen = demo.labelled_indices(labels, seed=5)
    assert torch.bincount(labels[chosen]).tolist() == [10] * 10
    assert len(chosen.unique()) == 100
    assert chosen.max() < demo.TEST_START
    assert torch.equal(chosen, demo.labelled_indices(labels, seed=5))
    assert not torch.equal(chosen, demo.labelled_indices(labels, seed=6))


def test_shift_is_the_same_every_time():
    images, _ = demo.load_images()
    shifted = demo.shift(images)
    torch.manual_seed(123)  # must not matter
    assert torch.equal(shifted, demo.shift(images))
    assert shifted.min() >= 0
    assert shifted.max() <= 1
    assert (shifted - images).abs().mean() > 0.05
    torch.testing.assert_close(demo.shift(images, max_degrees=0, noise_std=0), images, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("confidences", "labels", "expected"),
    [
        # bin of 0.9 holds one right, one wrong: 1/2 |0.5 - 0.9|; bin of 0.61 two right: 1/2 |1 - 0.61|
        ([0.9, 0.9, 0.61, 0.61], [1, 0, 1, 1], 0.2 + 0.195),
        # one bin, (9/15, 10/15], mean confidence 0.63, accuracy 1/2
        ([0.61, 0.65], [1, 0], 0.13),
        # bins are closed above: 0.8 ends (11/15, 12/15], so these two fall into two bins
        ([0.8, 0.81], [1, 0], (0.2 + 0.81) / 2),
        # a sum of rounded draws may exceed 1, and stays in the last bin
        ([1 + 1e-7, 0.99], [1, 0], 0.495),
        ([1.0], [0], 1.0),
    ],
)
def test_calibration_error_by_hand(confidences, labels, expected):
    p = np.array(confidences)
    error = demo.calibration_error(np.array(labels), np.stack([1 - p, p], axis=1))
    assert error == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("difference", "higher_is_better", "verdict"),
    [
        # standard error 1 / sqrt(3), Student's t of 2 degrees of freedom 4.303: the interval is the mean ± 2.484
        ([1.0, 2.0, 3.0], False, "within noise"),
        ([2.0, 3.0, 4.0], False, "worse"),
        ([2.0, 3.0, 4.0], True, "better"),
        ([-2.0, -3.0, -4.0], False, "better"),
    ],
)
def test_verdict_by_hand(difference, higher_is_better, verdict):
    baseline = np.array([5.0, -7.0, 11.0])  # large and shared: only a paired comparison sees past it
    mean, low, high, word = demo.compare(baseline + difference, baseline, higher_is_better)
    assert mean == pytest.approx(sum(difference) / 3)
    assert (high - mean, mean - low) == pytest.approx((4.3027 / math.sqrt(3),) * 2, rel=1e-4)
    assert word == verdict


def test_missing_package_names_the_remedy(monkeypatch):
    monkeypatch.delitem(sys.modules, "klnorm.demo")
    monkeypatch.setitem(sys.modules, "tabulate", None)
    with pytest.raises(ImportError, match=r"needs tabulate.*pip install 'klnorm\[demo\]'"):
        importlib.import_module("klnorm.demo")


@pytest.mark.parametrize("option", ["--seeds", "--steps"])
def test_too_few_seeds_or_steps_are_refused(capsys, option):
    with pytest.raises(SystemExit):
        demo.main([option, "1" if option == "--seeds" else "0"])
    assert f"{option} must be at least " in capsys.readouterr().err
