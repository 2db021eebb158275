"""The study: its report."""

import itertools
from pathlib import Path

import numpy as np
import pytest
from study_inputs import TREC, made_up_lines, rows_of, squeezed

from study import __main__ as command
from study import arms, plan, plots, statistics
from study.data import TASKS
from study.replication import by_task
from study.report import in_short, report
from study.results import Results

pytest.importorskip("transformers")

pytestmark = pytest.mark.usefixtures("one_thread")

DOCS = Path(__file__).parents[1] / "docs"


def report_of(lines, folder):
    return squeezed(report(lines, folder))


def primary(text):
    """The rows of the primary comparison, by task."""
    return rows_of(text, "task | seeds")[1]


def test_report_tells_the_difference_that_is_there(tmp_path):
    text = report_of(list(made_up_lines(seeds=8)), tmp_path)
    assert list(primary(text)) == ["trec", "sst2", "fsdd"]
    for row in primary(text).values():
        assert (row["seeds"], row["verdict at 5 %"]) == ("8", "better")
        assert abs(float(row["difference"]) + 0.1) < 0.02
        assert (row["p, sign flips"], row["p, Holm"]) == ("0.0078", "0.0234")  # 2 of 256 sign patterns, three tasks
    assert squeezed((tmp_path / "report.md").read_text(encoding="utf-8")) == text
    assert sorted(p.name for p in tmp_path.glob("*.png")) == ["calibration.png", "differences.png", "posteriors.png"]
    assert all(f"]({p.name})" in text for p in tmp_path.glob("*.png"))
    for better, verdict in (-0.1, "worse"), (0.0, "no difference shown"):
        rows = primary(report_of(list(made_up_lines(seeds=8, better=better, tasks=("trec",))), tmp_path))
        assert rows["trec"]["verdict at 5 %"] == verdict


def test_report_corrects_for_all_tasks_of_the_plan_and_says_when_seeds_are_few(tmp_path):
    for seeds, p, verdict in (8, 0.0234, "better"), (7, 0.0469, "better"), (6, 0.0938, "too few seeds to show one"):
        row = primary(report_of(list(made_up_lines(seeds=seeds, tasks=("trec",))), tmp_path))["trec"]
        assert float(row["p, Holm"]) == p  # 3 x 2 / 2^seeds
        assert row["verdict at 5 %"] == verdict


def test_numbers_of_the_report_by_hand(tmp_path):
    lines = list(made_up_lines(seeds=5))
    text = report_of(lines, tmp_path)
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

    _, rows = rows_of(text, "largest distance of mean")
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
    assert "| peak memory, bytes |" in report_of(lines, tmp_path)
    for line in lines:
        line["environment"]["device"] = "CPU, x86_64"
    text = report_of(lines, tmp_path)
    assert "peak memory" not in text
    assert "only a hint" in text


def test_report_counts_whole_seeds_only(tmp_path):
    lines = list(made_up_lines(seeds=4, tasks=("trec",)))[:-1]
    text = report_of(lines, tmp_path)
    assert primary(text)["trec"]["seeds"] == "3"
    assert "| kl_affine |" in text
    without = [line for line in lines if line["config"]["arm"] != "kl_affine"]
    text = report_of(without, tmp_path)  # of an arm that is not begun nothing is told
    assert primary(text)["trec"]["seeds"] == "3"
    assert "| kl_affine |" not in text
    few = list(made_up_lines(seeds=2, tasks=("trec",)))
    assert "trec 2. **Fewer than three" in report_of(few, tmp_path)


@pytest.mark.parametrize("change", [{"model": "another"}, {"steps": 7}, {"settings": {"lr": 1.0}}, {"data": "hub"}])
def test_report_mixes_no_configurations(change, tmp_path):
    lines = list(made_up_lines(seeds=3, tasks=("trec",)))
    other = dict(lines[0], config={**lines[0]["config"], **change, "seed": 99})
    with pytest.raises(ValueError, match=r"trec, layer_norm.*several models, sizes or settings.*--output"):
        report_of([*lines, other], tmp_path)


def test_the_tables_of_the_docs_are_those_of_the_lines_and_the_report():
    results = Results(command.read_lines(command.OUTPUT))
    tables = [in_short(results, plan.REPORTED), in_short(results, plan.REPLICATED), by_task(results)]
    for path, made in itertools.product((command.OUTPUT / "report.md", DOCS / "study.md"), tables):
        text, lines = squeezed(path.read_text(encoding="utf-8")), squeezed(made).splitlines()
        assert len(lines) > 5
        assert lines[0] in text  # the line below it is "---", whose length is that of the column
        assert "\n".join(lines[2:]) in text


@pytest.mark.parametrize(("seeds", "joined"), [(3, False), (9, False), (10, True)])
def test_arms_that_came_later_join_a_task_with_their_last_seed(seeds, joined):
    lines = [
        line
        for line in made_up_lines(seeds=10, tasks=("sst2",))
        if line["config"]["arm"] not in plan.LATER["sst2"] or line["config"]["seed"] < seeds
    ]
    found = Results(lines)
    assert found.seeds["sst2"] == list(range(10))
    assert ({"affine_lr", "kl_affine"} <= set(found.arms["sst2"])) is joined


def test_tasks_of_the_replication_change_nothing_in_the_study_s_tables(tmp_path):
    """They have tables of their own: Holm goes over the same tasks as before."""
    lines = made_up_lines(seeds=4, tasks=(*plan.REPORTED, "cola", "clinc150"))
    lines = [line for line in lines if line["config"]["arm"] in plan.LEAD_ARMS]
    texts = [
        report_of([line for line in lines if line["config"]["task"] in tasks], tmp_path)
        for tasks in (plan.REPORTED, TASKS)
    ]
    for part, title in (
        ("## In short", "accuracy %"), ("## What", "test nll, means"), ("## Posteriors", "largest"),
        ("## Differences", "test nll, Monte Carlo"),
    ):  # fmt: skip
        before, after = (rows_of(text[text.index(part) :], title) for text in texts)
        assert before == after
    header, rows = rows_of(texts[1], "accuracy (cola: MCC) %, NLL")
    assert header[1:] == ["cola", "cola, out of domain", "clinc150", "clinc150, out of domain"]
    assert list(rows) == list(plan.LEAD_ARMS)


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
    (row,) = [line for line in report_of(lines, tmp_path).splitlines() if line.startswith("| dropout | 2 |")]
    assert [cell.split()[0] for cell in row.split("|")[3:7]] == ["1.700", "1.900", "2.000", "3.000"]
    assert row.split("|")[3].strip() == "1.700 (lr 0.0001, p 0.25)"


def test_pooled_bins():
    runs = [[[2, 0.5, 1.0], [0, None, None]], [[6, 0.7, 0.5], [0, None, None]]]
    assert plots.pooled(runs) == [(pytest.approx(0.65), pytest.approx(0.625))]
