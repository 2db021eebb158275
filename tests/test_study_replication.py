"""The study's replication: three comparisons, and what becomes of the leads, by hand."""

import pytest
from study_inputs import report_line, rows_of

from study import plan
from study.replication import by_task, decide, replication
from study.results import Results

pytest.importorskip("transformers")

# Differences of ten seeds. All of one sign: of 2^10 sign patterns 2 have a mean as far from 0. One of ten of the other
# sign: 22 have, those with no or one sign turned, 1 + 10, twice. Five of ten: all have.
LESS, MORE, MOSTLY_LESS, NEITHER = [-1.0] * 10, [1.0] * 10, [-1.0] * 9 + [1.0], [-1.0, 1.0] * 5
EXTREME, NEAR_EXTREME = 2 / 1024, 22 / 1024


def lines_of(differences, seeds=range(10)):
    """Runs in which the arm of a lead differs from its baseline as {(lead, task): differences} says, in its mode alone.

    What it does not name is equal. A and B share a baseline, B and C an arm, at another mode.
    """
    for task in ("sst2", *plan.REPLICATED):
        a, b, c = (differences.get((lead, task), [0.0] * 10) for lead in "ABC")
        for seed in seeds:
            # (at the means, average of draws)
            nll = {"layer_norm": (9.0, 2.0 + seed), "kl_sample": (5.0, 2.0 + seed + a[seed])}
            nll |= {"kl_affine": (4.0 - seed + c[seed], 2.0 + seed + b[seed]), "affine_lr": (4.0 - seed, 7.0)}
            for arm, losses in nll.items():
                metrics = {mode: {"test": {"nll": loss}} for mode, loss in zip(("mean", "mc"), losses, strict=True)}
                yield report_line(task, arm, seed, metrics)


def tables(lines):
    """The table of the leads, and those of their comparisons by "A", "B" and "C"; the text above them."""
    text, leads, comparisons = replication(Results(lines)).split("\n\n", 2)
    leads = rows_of(leads, "lead")[1]
    return leads, {title[0]: rows_of(comparisons, title)[1] for title in leads}, text


def test_the_leads_by_hand():
    leads, found, text = tables(lines_of({
        ("A", "sick"): LESS, ("A", "cola"): LESS, ("A", "banking77"): LESS, ("A", "clinc150"): MOSTLY_LESS,
        ("B", "sst2"): LESS, ("B", "sick"): MORE, ("B", "cola"): NEITHER,
        ("C", "clinc150"): MORE,
    }))  # fmt: skip
    assert "14 tests" in text
    assert [list(found[lead]) for lead in "ABC"] == [
        ["sick", "cola", "banking77", "clinc150", "sst2"], *[["sst2", "sick", "cola", "banking77", "clinc150"]] * 2
    ]  # fmt: skip
    assert found["A"]["sst2"]["verdict at 5 %"] == "seen before"
    row = found["A"]["sick"]
    assert (row["seeds"], row["difference"], row["verdict at 5 %"]) == ("10", "-1.0000", "better")
    # Six comparisons are extreme: Holm takes the first 14 times, and no later one can be less.
    for lead, task in ("A", "banking77"), ("B", "sst2"), ("B", "sick"), ("C", "clinc150"):
        assert found[lead][task]["p, sign flips"] == f"{EXTREME:.4f}"
        assert found[lead][task]["p, Holm"] == f"{14 * EXTREME:.4f}" == "0.0273"
    row = found["A"]["clinc150"]
    assert row["p, Holm"] == f"{(14 - 6) * NEAR_EXTREME:.4f}" == "0.1719"
    assert row["difference"] == "-0.8000"
    assert row["verdict at 5 %"] == "no difference shown"
    assert found["B"]["cola"]["p, sign flips"] == found["B"]["cola"]["p, Holm"] == "1.0000"
    assert found["B"]["sick"]["verdict at 5 %"] == found["C"]["clinc150"]["verdict at 5 %"] == "worse"
    assert [list(row.values())[1:] for row in leads.values()] == [
        ["4", "3", "0", "0", "holds"], ["5", "1", "1", "0", "holds on some"], ["5", "0", "1", "0", "dropped"]
    ]  # fmt: skip
    assert list(leads) == [
        "A: kl_sample - layer_norm, Monte Carlo", "B: kl_affine - layer_norm, Monte Carlo",
        "C: kl_affine - affine_lr, means",
    ]  # fmt: skip


def test_missing_comparisons_count_as_tests_that_show_nothing():
    lines = [line for line in lines_of({("A", "sick"): LESS}) if line["config"]["task"] == "sick"]
    leads, found, _ = tables(
        line for line in lines if line["config"]["seed"] < 9 or "affine" not in line["config"]["arm"]
    )
    assert found["A"]["sick"]["p, Holm"] == f"{14 * EXTREME:.4f}"
    assert list(found["A"]["cola"].values())[1:] == ["0", "-", "-", "-", "-", "missing"]
    assert found["B"]["sick"]["seeds"] == "9"
    assert leads["A: kl_sample - layer_norm, Monte Carlo"]["verdict"] == "holds on some so far"
    assert [row["verdict"] for row in leads.values()][1:] == ["dropped so far"] * 2
    _, found, _ = tables(line for line in lines if line["config"]["seed"] < 2)
    assert found["A"]["sick"]["verdict at 5 %"] == "missing"
    assert found["A"]["sick"]["seeds"] == "2"
    leads, _, _ = tables([])
    assert {row["verdict"] for row in leads.values()} == {"not run"}


def test_pairs_are_of_seeds_that_both_arms_have():
    """And 14 x 2 / 2^n is less than 0.05 from n = 10 on."""
    lacking = {("layer_norm", 9), ("kl_sample", 0), ("affine_lr", 4)}
    lines = lines_of({("A", "sick"): [-1.0, *[-2.0] * 9], ("C", "sick"): LESS})
    _, found, _ = tables(x for x in lines if (x["config"]["arm"], x["config"]["seed"]) not in lacking)
    row = found["A"]["sick"]
    assert (row["seeds"], row["difference"], row["p, sign flips"]) == ("8", "-2.0000", f"{2 / 256:.4f}")
    assert row["verdict at 5 %"] == "too few seeds to show one"
    assert found["B"]["sick"]["seeds"] == found["C"]["sick"]["seeds"] == "9"


def test_what_was_seen_before_has_no_p():
    lines = [dict(line, config={**line["config"], "task": "trec"}) for line in lines_of({("A", "sst2"): LESS})][:40]
    _, found, _ = tables(lines)
    assert list(found["A"]["trec"].values())[1:] == ["10", "-1.0000", "-1.0000 to -1.0000", "-", "-", "seen before"]
    assert [list(found[lead])[-1] for lead in "ABC"] == ["trec"] * 3


def test_tasks_are_ordered_by_how_sure_layer_norm_is():
    lines = [line for line in lines_of({("B", "sick"): LESS}) if line["config"]["task"] in ("cola", "sick")]
    for line in lines:
        surer = 0.5 if line["config"]["task"] == "sick" else 0.0
        means, draws = (line["result"]["metrics"][mode] for mode in ("mean", "mc"))
        means["train"] = {"nll": line["config"]["seed"] / 10}
        draws["test"]["bins"] = [[3, 0.2 + surer, 0.4], [0, None, None], [1, 0.1 + surer, 0.1]]
    header, rows = rows_of(by_task(Results(lines)), "task")
    sure, train, *leads = header[1:]
    assert list(rows) == ["sick", "cola"]
    assert [row[sure] for row in rows.values()] == ["+35.0", "-15.0"]  # 3/4 of -0.2 and 1/4 of 0, and 0.5 more
    assert {row[train] for row in rows.values()} == {"0.450"}
    assert [rows["sick"][lead] for lead in leads] == [
        "+0.0000 (+0.0000 to +0.0000), no difference shown", "-1.0000 (-1.0000 to -1.0000), better",
        "+0.0000 (+0.0000 to +0.0000), no difference shown",
    ]  # fmt: skip
    lines = [line for line in lines if line["config"]["arm"] != "kl_affine"]
    _, rows = rows_of(by_task(Results(lines)), "task")
    assert [rows["sick"][lead] for lead in leads[1:]] == ["-", "-"]


@pytest.mark.parametrize(
    ("verdicts", "expected"),
    [
        (["better"] * 3 + ["no difference shown"], "holds"),
        (["better"] * 2 + ["too few seeds to show one"] * 2, "holds on some"),
        (["better"] * 3 + ["worse"], "holds on some"),
        (["better"] + ["worse"] * 3, "holds on some"),
        (["worse"] + ["no difference shown"] * 3, "dropped"),
        (["better"] * 3 + ["missing"], "holds so far"),
    ],
)
def test_the_rule(verdicts, expected):
    assert decide(verdicts) == expected
