"""The low-resource study: its statistics and its report."""

import itertools
from pathlib import Path
from statistics import NormalDist

import numpy as np
import pytest

from study import __main__ as command
from study import arms, plan, plots, statistics
from study import report as report_module
from study.data import TASKS

pytest.importorskip("transformers")

TREC = TASKS["trec"]

# ---- Statistics ------------------------------------------------------------------------------------------------------


def test_sign_flips_by_brute_force():
    difference = np.array([0.4, -0.1, 0.3, 0.25, 0.6, 0.05, -0.2])
    flips = np.array(list(itertools.product((1, -1), repeat=len(difference))))
    as_large = np.abs((flips * difference).mean(1)) >= difference.mean() - 1e-12
    found = statistics.compare(difference + 1.0, np.ones(7))
    assert found.p == pytest.approx(as_large.mean(), abs=1e-12)
    assert found.mean == pytest.approx(difference.mean())
    assert found.seeds == 7


def test_sign_flips_of_accuracies_that_tie():
    """Accuracies are k / 300: sums that are equal must count as equal, whatever they were rounded to."""
    generator = np.random.default_rng(1)
    for _ in range(30):
        k, baseline = generator.integers(-6, 8, 8), generator.integers(200, 260, 8)
        flips = np.array(list(itertools.product((1, -1), repeat=8)))
        as_large = np.abs((flips * k).sum(1)) >= abs(k.sum())
        found = statistics.compare((baseline + k) / 300, baseline / 300)
        assert found.p == pytest.approx(as_large.mean(), abs=1e-12)


def test_the_interval_is_the_bias_corrected_and_accelerated_one():
    difference = np.array([0.02, 0.05, 0.1, 0.12, 0.2, 0.25, 0.4, 0.7, 1.3, 3.0])
    draws = np.random.default_rng(9).choice(difference, (200_000, 10)).mean(1)
    normal, mean = NormalDist(), difference.mean()
    bias = normal.inv_cdf(((draws < mean).mean() + (draws <= mean).mean()) / 2)
    left_out = mean - (difference.sum() - difference) / 9  # mean of the jackknife's means minus each
    acceleration = (left_out**3).sum() / (6 * (left_out**2).sum() ** 1.5)
    found = statistics.compare(difference, np.zeros(10))
    for end, tail in (found.low, 0.025), (found.high, 0.975):
        z = bias + normal.inv_cdf(tail)
        level = normal.cdf(bias + z / (1 - acceleration * z))
        # 10,000 draws there: a quantile has a standard error of sqrt(level (1 - level) / 10,000) in probability, and
        # as much comes from the share of draws below the mean. A plain percentile interval is farther off.
        error = 5 * (level * (1 - level) / 1e4) ** 0.5
        assert abs((draws < end).mean() - level) < error < abs(tail - level)


def test_differences_without_spread():
    assert statistics.compare([1.0, 2.0, 3.0], [1.0, 2.0, 3.0])[:4] == (0.0, 0.0, 0.0, 1.0)
    assert statistics.compare([2.0, 3.0, 4.0], [1.0, 2.0, 3.0])[:4] == (1.0, 1.0, 1.0, 0.25)  # 2 of 8 sign patterns
    with pytest.raises(ValueError, match=r"2 seeds.*at least 3"):
        statistics.compare([1.0, 2.0], [0.0, 0.0])


def test_holm_by_hand():
    assert statistics.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert statistics.holm([0.5, 0.9]) == pytest.approx([1.0, 1.0])


# ---- The report ------------------------------------------------------------------------------------------------------


def made_up_lines(seeds=5, better=0.1, tasks=("trec", "sst2", "fsdd")):
    """Runs in which kl_sample has a test NLL lower by about `better`, all else random."""
    generator = np.random.default_rng(0)
    for seed, task, arm in ((s, TASKS[t], a) for s in range(seeds) for t in tasks for a in plan.arms_for(TASKS[t])):

        def metrics(shift=0.0):
            nll = 0.6 + 0.01 * generator.normal() - shift
            bins = [[3, 0.5, 0.4]] * 10
            return {"accuracy": 0.8 + 0.02 * generator.normal(), "nll": nll, "ece": 0.1, "mcc": 0.7, "bins": bins}

        shift = better if arm == "kl_sample" else 0.0
        found = {
            "mean": {"train": metrics(), "test": metrics(shift)},
            "mc": {"test": metrics(shift)},
        }
        for mode in found if task.name != "trec" else ():
            found[mode]["ood"] = metrics()
        layers = {"a": [0.1, 0.2, 3.0], "b": [0.3, 0.1, 2.0]} if arm.startswith("kl_") else {}
        yield {
            "config": plan.configuration("report", task, arm, seed, arms.ARMS[arm].GRID[0], plan.Sizes("m")),
            "result": {
                "metrics": found, "parameters": 10, "saved_bytes": 20, "peak_bytes": 30, "seconds": 1.0, "step_ms": 2.0,
                "layers": layers,
            },
            "environment": {"device": "a device", "torch": "2", "commit": "abc"},
        }  # fmt: skip


def test_report_tells_the_difference_that_is_there(tmp_path):
    text = report_module.report(list(made_up_lines(seeds=8)), tmp_path)
    for task in "trec", "sst2", "fsdd":
        (row,) = [line for line in text.splitlines() if line.startswith(f"| {task} | 8 |")]
        assert row.endswith("| better |")
        assert abs(float(row.split("|")[3]) + 0.1) < 0.02
        assert row.split("|")[5:7] == [" 0.0078 ", " 0.0234 "]  # 2 of 256 sign patterns, times three tasks
    assert (tmp_path / "report.md").read_text(encoding="utf-8") == text
    assert sorted(p.name for p in tmp_path.glob("*.png")) == ["calibration.png", "differences.png", "posteriors.png"]
    assert all(f"]({p.name})" in text for p in tmp_path.glob("*.png"))
    text = report_module.report(list(made_up_lines(seeds=8, better=-0.1)), tmp_path)
    assert "| worse |" in text
    text = report_module.report(list(made_up_lines(seeds=8, better=0.0)), tmp_path)
    assert "no difference shown" in text


def test_report_corrects_for_all_tasks_of_the_plan_and_says_when_seeds_are_few(tmp_path):
    text = report_module.report(list(made_up_lines(seeds=8, tasks=("trec",))), tmp_path)
    assert "| 0.0078 | 0.0234 | better |" in text
    for seeds, verdict in (6, "too few seeds to show one"), (7, "better"):  # 3 x 2 / 2^6 > 0.05 > 3 x 2 / 2^7
        text = report_module.report(list(made_up_lines(seeds=seeds, tasks=("trec",))), tmp_path)
        assert f"| {verdict} |" in text


def rows_of(text, title):
    """Header and rows of the first table whose header begins so: lists of cells."""
    lines = text.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(f"| {title}"))
    table = itertools.takewhile(lambda line: line.startswith("|"), lines[start:])
    header, _, *rows = ([cell.strip() for cell in line[2:-2].split(" | ")] for line in table)
    return header, {row[0]: dict(zip(header, row, strict=True)) for row in rows}


def test_numbers_of_the_report_by_hand(tmp_path):
    lines = list(made_up_lines(seeds=5))
    text = report_module.report(lines, tmp_path)
    runs = {(x["config"]["task"], x["config"]["arm"], x["config"]["seed"]): x["result"]["metrics"] for x in lines}

    def values(task, arm, mode, split, measure):
        return np.array([runs[task, arm, seed][mode][split][measure] for seed in range(5)])

    _, rows = rows_of(text[text.index("## sst2") :], "mean ± deviation")
    cells = rows["l2_sp"]
    train, test = (values("sst2", "l2_sp", "mean", split, "accuracy") for split in ("train", "test"))
    assert cells["test accuracy %, means"] == f"{100 * test.mean():.1f} ± {100 * test.std(ddof=1):.1f}"
    assert cells["train - test %"] == f"{100 * (train - test).mean():.1f} ± {100 * (train - test).std(ddof=1):.1f}"
    assert cells["worst seed, test accuracy"] == f"{100 * test.min():.1f}"
    outside = values("sst2", "l2_sp", "mc", "ood", "nll")
    assert cells["ood nll, Monte Carlo"] == f"{outside.mean():.3f} ± {outside.std(ddof=1):.3f}"

    _, rows = rows_of(text, "accuracy %, NLL; mean over seeds")
    accuracy, nll = (values("sst2", "l2_sp", "mean", "ood", measure).mean() for measure in ("accuracy", "nll"))
    assert rows["l2_sp"]["sst2, out of domain"] == f"{100 * accuracy:.1f}, {nll:.3f}"
    assert rows["mixout"]["fsdd"] == "-"

    differences = text[text.index("## Differences to") :]
    for title, mode, split in (("ood nll, means", "mean", "ood"), ("test nll, Monte Carlo", "mc", "test")):
        header, rows = rows_of(differences, title)
        tasks = [task for task in header[1:] if rows["kl_sample"][task] != "-"]
        assert tasks == (["sst2", "fsdd"] if split == "ood" else ["trec", "sst2", "fsdd"])
        found = {
            task: statistics.compare(*(values(task, arm, mode, split, "nll") for arm in ("kl_sample", "layer_norm")))
            for task in tasks
        }
        for task, p in zip(tasks, statistics.holm([c.p for c in found.values()]), strict=True):
            c = found[task]
            expected = f"{c.mean:+.4f} ({c.low:+.4f} to {c.high:+.4f}), p {p:.3f}{' *' if p < 0.05 else ''}"
            assert rows["kl_sample"][task] == expected
    _, rows = rows_of(differences, "train - test %")
    train, test, base_train, base_test = (
        values("trec", arm, "mean", s, "accuracy") for arm in ("mixout", "layer_norm") for s in ("train", "test")
    )
    expected = 100 * ((train - test) - (base_train - base_test)).mean()
    assert rows["mixout"]["trec"].startswith(f"{expected:+.2f} (")

    _, rows = rows_of(text, "largest |mean")
    assert rows["kl_token"]["trec"] == rows["kl_sample"]["sst2"] == "0.300, 2.50"  # of 0.1, 0.2, 3.0 and 0.3, 0.1, 2.0
    assert rows["kl_token"]["sst2"] == "-"
    assert "layer_norm" not in rows

    _, rows = rows_of(text[text.index("## What makes a difference") :], "test nll, means")
    affine = next(row for name, row in rows.items() if name.startswith("kl_affine - affine_lr"))
    one, other = (values("trec", arm, "mean", "test", "nll") for arm in ("kl_affine", "affine_lr"))
    assert affine["trec"].startswith(f"{(one - other).mean():+.4f} (")
    assert affine["fsdd"] == "-"


def test_peak_memory_is_told_where_it_is_an_arm_s_own(tmp_path):
    lines = list(made_up_lines(seeds=3, tasks=("trec",)))
    assert "| peak memory, bytes |" in report_module.report(lines, tmp_path)
    for line in lines:
        line["environment"]["device"] = "CPU, x86_64"
    text = report_module.report(lines, tmp_path)
    assert "peak memory" not in text
    assert "only a hint" in text


def test_report_counts_whole_seeds_only(tmp_path):
    lines = list(made_up_lines(seeds=4, tasks=("trec",)))[:-1]
    assert "| trec | 3 |" in report_module.report(lines, tmp_path)
    without = [line for line in lines if line["config"]["arm"] != "kl_affine"]
    text = report_module.report(without, tmp_path)  # of an arm that is not begun nothing is told
    assert "| trec | 3 |" in text
    assert "kl_affine" not in text
    few = list(made_up_lines(seeds=2, tasks=("trec",)))
    assert "trec 2. **Fewer than three" in report_module.report(few, tmp_path)


@pytest.mark.parametrize("change", [{"model": "another"}, {"steps": 7}, {"settings": {"lr": 1.0}}, {"data": "hub"}])
def test_report_mixes_no_configurations(change, tmp_path):
    lines = list(made_up_lines(seeds=3, tasks=("trec",)))
    other = dict(lines[0], config={**lines[0]["config"], **change, "seed": 99})
    with pytest.raises(ValueError, match=r"trec, layer_norm.*several models, sizes or settings.*--output"):
        report_module.report([*lines, other], tmp_path)


def test_the_table_of_readme_is_that_of_the_lines_and_the_report():
    table = report_module._in_short(report_module.Results(command.read_lines(command.OUTPUT)))
    assert len(table.splitlines()) > 5
    assert table in (command.OUTPUT / "report.md").read_text(encoding="utf-8")
    assert table in (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def test_report_ranks_the_trials_over_the_seeds_that_all_settings_have(tmp_path):
    losses = {1000: [1.0, 3.0, 2.0, 2.4], 1001: [3.0, 3.0, 1.8, 1.0], 1002: [0.1]}
    lines = [
        {
            "config": plan.configuration("tune", TREC, "dropout", seed, settings, plan.Sizes("m")),
            "result": {"metrics": {"mean": {"dev": {"nll": nll}}}},
        }
        for seed, values in losses.items()
        for settings, nll in zip(arms.ARMS["dropout"].GRID, values, strict=False)
    ]
    (row,) = [line for line in report_module.report(lines, tmp_path).splitlines() if line.startswith("| dropout | 2 |")]
    assert [cell.split()[0] for cell in row.split("|")[3:7]] == ["1.700", "1.900", "2.000", "3.000"]
    assert row.split("|")[3].strip() == "1.700 (lr 0.0001, p 0.25)"


def test_pooled_bins():
    runs = [[[2, 0.5, 1.0], [0, None, None]], [[6, 0.7, 0.5], [0, None, None]]]
    assert plots.pooled(runs) == [(pytest.approx(0.65), pytest.approx(0.625))]
