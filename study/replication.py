"""The replication: three primary comparisons on tasks that nobody had seen them on. The rule: study/PLAN.md."""

from .plan import LEADS, MODES
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
    found = {(name, task): _compare(results, lead, task) for name, lead in LEADS.items() for task in lead.tasks}
    corrected = dict(zip(found, holm([1.0 if c is None else c.p for c in found.values()]), strict=True))
    outcomes, tables = [], []
    for name, lead in LEADS.items():
        rows = []
        for task in lead.tasks:
            c, p = found[name, task], corrected[name, task]
            rows.append([task, *(comparison_cells(c, p, len(found)) if c else _missing(results, lead, task))])
        verdicts = [row[-1] for row in rows]
        before = {task: _compare(results, lead, task) for task in lead.seen}
        rows += [[task, *comparison_cells(c)] for task, c in before.items() if c]
        title = f"{name}: {lead.arm} - {lead.baseline}, {MODES[lead.mode]}"
        counts = [verdicts.count(word) for word in ("better", "worse", "missing")]
        outcomes.append([title, len(verdicts), *counts, decide(verdicts)])
        tables.append(table([title, *COMPARISON], rows))
    leads = table(["lead", "tasks", "better", "worse", "missing", "verdict"], outcomes)
    return "\n\n".join([TEXT.format(tests=len(found)), leads, *tables])


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
