"""The replication: three primary comparisons on tasks that nobody had seen them on. The rule: study/PLAN.md."""

import statistics as st

from .plan import BASELINE, LEADS, MODES
from .results import FEWEST
from .statistics import holm
from .tables import COMPARISON, comparison_cells, table

TEXT = """\
Test NLL of an arm minus that of its baseline, paired by the seeds that both have; {tests} tests, two-sided, corrected
together by Holm. Missing are comparisons of fewer than three seeds, whose p counts as 1; what was seen before has no p.
A lead holds if it is better on at least three tasks and worse on none, on some if it is better on any, else it is
dropped."""


def replication(results):
    """The section's text: what becomes of the leads, and a table of comparisons for each."""
    rows, outcomes, tables = _comparisons(results), [], []
    for name, lead in LEADS.items():
        title = f"{_title(name)}, {MODES[lead.mode]}"
        verdicts = [rows[name, task][-1] for task in lead.tasks]
        counts = [verdicts.count(word) for word in ("better", "worse", "missing")]
        outcomes.append([title, len(verdicts), *counts, decide(verdicts)])
        own = [[task, *row] for (of, task), row in rows.items() if of == name]
        tables.append(table([title, *COMPARISON], own))
    tests = sum(len(lead.tasks) for lead in LEADS.values())
    leads = table(["lead", "tasks", "better", "worse", "missing", "verdict"], outcomes)
    return "\n\n".join([TEXT.format(tests=tests), leads, *tables])


def by_task(results):
    """A table of docs/study.md: the leads on each task, those first where LayerNorm is too sure of itself."""
    comparisons, rows = _comparisons(results), []
    for task in results.tasks:
        sure = st.mean(results.values(task, BASELINE, "mc", "test", "overconfidence"))
        left = st.mean(results.values(task, BASELINE, "mean", "train", "nll"))
        cells = [_brief(comparisons.get((name, task))) for name in LEADS]
        rows.append([sure, task, f"{100 * sure:+.1f}", f"{left:.3f}", *cells])
    state = [f"{BASELINE}, {what}" for what in ("Monte Carlo: confidence - accuracy %", "means: train nll")]
    return table(["task", *state, *map(_title, LEADS)], [row[1:] for row in sorted(rows, reverse=True)])


def _brief(row):
    """Difference, interval and verdict in one cell, of the cells of a comparison; None: it was not planned."""
    return "-" if row is None or row[-1] == "missing" else f"{row[1]} ({row[2]}), {row[-1]}"


def _title(lead):
    return f"{lead}: {LEADS[lead].arm} - {LEADS[lead].baseline}"


def _comparisons(results):
    """{(lead, task): cells under COMPARISON}; Holm goes over all that are primary."""
    found = {(name, task): _compare(results, lead, task) for name, lead in LEADS.items() for task in lead.tasks}
    corrected = dict(zip(found, holm([1.0 if c is None else c.p for c in found.values()]), strict=True))
    rows = {}
    for name, lead in LEADS.items():
        for task in lead.tasks:
            c, p = found[name, task], corrected[name, task]
            rows[name, task] = comparison_cells(c, p, len(found)) if c else _missing(results, lead, task)
        before = {task: _compare(results, lead, task) for task in lead.seen}
        rows |= {(name, task): comparison_cells(c) for task, c in before.items() if c}
    return rows


def decide(verdicts):
    """What becomes of a lead with these verdicts on its tasks: so far, while some are "missing"."""
    better, worse, missing = (verdicts.count(word) for word in ("better", "worse", "missing"))
    if missing == len(verdicts):
        return "not run"
    outcome = "holds" if better >= 3 and not worse else "holds on some" if better else "dropped"
    return f"{outcome} so far" if missing else outcome


def _compare(results, lead, task):
    seeds = results.seeds_of(task, lead.arm, lead.baseline)
    if len(seeds) < FEWEST:
        return None
    return results.compare(task, lead.arm, lead.baseline, lead.mode, "test", "nll", seeds)


def _missing(results, lead, task):
    return [len(results.seeds_of(task, lead.arm, lead.baseline)), "-", "-", "-", "-", "missing"]
