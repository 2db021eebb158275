"""The demo, end to end in a small setting, and the parts of it that a wrong number could hide in."""

import io
import math

import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

import klnorm
from klnorm import demo
from klnorm import demo_report as report

SEEDS, STEPS = 2, 25

pytestmark = pytest.mark.usefixtures("one_thread")  # as main() sets


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Results, printed text and picture of one run through main()."""
    path = tmp_path_factory.mktemp("demo") / "new" / "picture.png"
    text = io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.stdout", text)
        results = demo.main(["--seeds", str(SEEDS), "--steps", str(STEPS), "--output", str(path), "--device", "cpu"])
    return results, text.getvalue(), path


def test_learns_in_every_column(finished):
    results, _, _ = finished
    assert list(results) == ["LayerNorm", "KLLayerNorm, means", "KLLayerNorm, 8 draws"]
    for column, runs in results.items():
        assert len(runs) == SEEDS
        for result in runs:
            metrics = result.metrics()
            assert all(math.isfinite(value) for value in metrics.values()), (column, metrics)
            assert metrics["test accuracy %"] > 50  # chance is 10
            assert 20 < metrics["shifted accuracy %"] < metrics["test accuracy %"]
            assert (metrics["KL, nats"] > 0) == (column != "LayerNorm")


def test_draws_differ_from_means_and_deviations_move(finished):
    results, _, _ = finished
    for means, draws in zip(results["KLLayerNorm, means"], results["KLLayerNorm, 8 draws"], strict=True):
        assert (means.probabilities["test"] - draws.probabilities["test"]).abs().max() > 1e-3
        assert len(means.layers) == 5
        for layer in means.layers.values():
            scale_std, shift_std = layer.scale.deviation, layer.shift.deviation
            assert scale_std > 1.1 * demo.INIT_STD  # the KL pulls them towards the wider prior
            assert shift_std > 1.1 * demo.INIT_STD


def test_same_seed_same_numbers(finished):
    results, _, _ = finished
    images, labels = demo.load_images("cpu")
    again = demo.run_seed(1, STEPS, images, labels, report.Progress(2 * STEPS, io.StringIO()))
    for column, result in again.items():
        for name, probabilities in result.probabilities.items():
            assert torch.equal(probabilities, results[column][1].probabilities[name]), (column, name)


def test_prints_tables_and_where_the_picture_is(finished):
    _, text, path = finished
    assert "Running on cpu" in text
    assert all(row in text for row in report.DECIMALS)
    assert "\r" not in text  # not a terminal: no bar that redraws itself
    assert text.count("seed 1, KLLayerNorm") == 1
    assert "Of 12 comparisons" in text
    assert str(path) in text


def test_picture_is_a_png_with_something_on_it(finished):
    from matplotlib.image import imread

    _, _, path = finished
    assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert imread(path)[..., :3].std() > 0.05


def test_arms_start_equal():
    models = demo.build_models(3, "cpu")
    plain, variational = models["LayerNorm"].state_dict(), models["KLLayerNorm"].state_dict()
    assert all(torch.equal(variational[name], tensor) for name, tensor in plain.items())
    assert sum(isinstance(m, klnorm.KLLayerNorm) for m in models["KLLayerNorm"].modules()) == 5
    assert not any(isinstance(m, klnorm.KLLayerNorm) for m in models["LayerNorm"].modules())
    images = torch.rand(4, 8, 8)
    torch.testing.assert_close(*(demo.predict(model, images) for model in models.values()), rtol=0, atol=0)


def test_arms_see_the_same_batches():
    seen = {}
    images, labels = torch.rand(100, 8, 8), torch.arange(100) % 10
    for arm, model in demo.build_models(3, "cpu").items():
        batches = seen[arm] = []
        model.register_forward_pre_hook(lambda _, inputs, batches=batches: batches.append(inputs[0]))
        demo.train(model, images, labels, steps=10, seed=3)
    for plain, variational in zip(*seen.values(), strict=True):
        assert plain.shape == (demo.BATCH, 8, 8)
        assert torch.equal(plain, variational)
    assert not torch.equal(seen["LayerNorm"][0], seen["LayerNorm"][1])


def test_optimizer_groups():
    model = demo.build_models(0, "cpu")["KLLayerNorm"]
    groups = demo.make_optimizer(model).param_groups
    parameters = [id(p) for group in groups for p in group["params"]]
    assert sorted(parameters) == sorted(id(p) for p in model.parameters())  # each once
    rho = {id(p) for name, p in model.named_parameters() if name.endswith("_rho")}
    assert {id(p) for p in groups[2]["params"]} == rho
    assert groups[2]["lr"] == demo.RHO_LEARNING_RATE
    assert groups[2]["weight_decay"] == 0
    assert all(p.ndim >= 2 for p in groups[0]["params"])


def test_labelled_images_are_balanced_and_not_test_images():
    _, labels = demo.load_images("cpu")
    chosen = demo.labelled_indices(labels, seed=5)
    assert torch.bincount(labels[chosen]).tolist() == [10] * 10
    assert len(chosen.unique()) == 100
    assert chosen.max() < demo.TEST_START
    assert torch.equal(chosen, demo.labelled_indices(labels, seed=5))
    assert not torch.equal(chosen, demo.labelled_indices(labels, seed=6))


def test_shift_is_the_same_every_time():
    images, _ = demo.load_images("cpu")
    shifted = demo.shift(images)
    torch.manual_seed(123)  # must not matter
    assert torch.equal(shifted, demo.shift(images))
    assert not torch.equal(shifted, demo.shift(images, seed=1))
    assert shifted.min() >= 0
    assert shifted.max() <= 1
    assert (shifted - images).abs().mean() > 0.05
    torch.testing.assert_close(demo.shift(images, max_degrees=0, noise_std=0), images, rtol=0, atol=1e-5)


def of_confidence(*confidences):
    """Two-class probabilities (n, 2) that predict class 1 with these confidences."""
    p = torch.tensor(confidences)
    return torch.stack([1 - p, p], dim=1)


@pytest.mark.parametrize(
    ("confidences", "labels", "expected"),
    [
        # bin of 0.9 holds one right, one wrong: 1/2 |0.5 - 0.9|; bin of 0.61 two right: 1/2 |1 - 0.61|
        ([0.9, 0.9, 0.61, 0.61], [1, 0, 1, 1], 0.2 + 0.195),
        # one bin, (9/15, 10/15], mean confidence 0.63, accuracy 1/2
        ([0.61, 0.65], [1, 0], 0.13),
        ([1.0, 1.0], [1, 1], 0.0),
        ([1.0], [0], 1.0),
    ],
)
def test_calibration_error_by_hand(confidences, labels, expected):
    error = report.calibration_error(of_confidence(*confidences), torch.tensor(labels))
    assert error == pytest.approx(expected, abs=1e-6)


def test_reliability_bins_are_closed_above():
    count, confidence, correct = report.reliability(of_confidence(0.5, 0.625, 1.0), torch.tensor([0, 0, 1]), bins=4)
    assert count.tolist() == [0, 1, 1, 1]
    assert confidence[1:].tolist() == [0.5, 0.625, 1.0]
    assert correct[1:].tolist() == [1.0, 0.0, 1.0]  # the tie of the first goes to class 0
    assert confidence[0].isnan()


def test_accuracy_and_nll_by_hand():
    probabilities, labels = of_confidence(0.9, 0.8), torch.tensor([1, 0])
    assert report.accuracy(probabilities, labels) == 0.5
    assert report.nll(probabilities, labels) == pytest.approx(-(math.log(0.9) + math.log(0.2)) / 2, abs=1e-6)


@pytest.mark.parametrize(
    ("difference", "lower_is_better", "verdict"),
    [
        # standard error 1 / sqrt(3), Student's t of 2 degrees of freedom 4.303: the interval is the mean ± 2.484
        ([1.0, 2.0, 3.0], True, "within noise"),
        ([2.0, 3.0, 4.0], True, "worse"),
        ([2.0, 3.0, 4.0], False, "better"),
        ([-2.0, -3.0, -4.0], True, "better"),
        ([0.0, 0.0, 0.0], True, "within noise"),
    ],
)
def test_verdict_by_hand(difference, lower_is_better, verdict):
    baseline = torch.tensor([5.0, -7.0, 11.0])  # large and shared: only a paired comparison sees past it
    mean, error, word = report.compare(baseline + torch.tensor(difference), baseline, lower_is_better)
    assert mean == pytest.approx(sum(difference) / 3)
    assert error == pytest.approx(0 if not any(difference) else 1 / math.sqrt(3))
    assert word == verdict


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_progress_on_a_terminal_redraws_one_line():
    stream = Terminal()
    progress = report.Progress(total=20, stream=stream)
    progress.begin("a run")
    for _ in range(20):
        progress.advance()
    assert stream.getvalue().count("\r") == 2
    assert stream.getvalue().endswith("\n")
    assert stream.getvalue().count("\n") == 1
    assert "100 %  a run" in stream.getvalue()


def test_missing_package_names_the_remedy():
    with pytest.raises(SystemExit, match=r"no_such_package.*pip install klnorm\[demo\]"):
        demo.check_installed("math", "no_such_package")


def test_too_few_seeds_are_refused(capsys):
    with pytest.raises(SystemExit):
        demo.main(["--seeds", "1"])
    assert "--seeds must be at least 2" in capsys.readouterr().err
