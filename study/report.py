"""Tables and plots of the reporting runs."""

import itertools
import statistics as st
from collections import defaultdict

from .arms import ARMS
from .data import TASKS
from .plan import (
    ATTRIBUTIONS,
    BASELINE,
    MODES,
    PRIMARY,
    REPLICATED,
    REPORTED,
    SEEDS,
    TUNING,
    Sizes,
    configuration,
)  # fmt: skip
from .plots import PICTURES, draw
from .replication import by_task, replication
from .results import Results
from .statistics import holm
from .tables import COMPARISON, LEVEL, comparison_cells, table

LOWER_IS_BETTER = "nll", "ece", "gap"
PERCENT = "accuracy", "mcc", "ece", "gap", "metric", "overconfidence"
NAMES = {"metric": "accuracy (or the task's metric)", "overconfidence": "confidence - accuracy"}


def report(lines, folder):
    """Write report.md and the plots into `folder`; returns the text. Fewer than three seeds of a task are no result."""
    results = Results(lines)
    parts = ["# Low-resource study", _about(results)]
    groups = [tasks for names in (REPORTED, REPLICATED) if (tasks := [t for t in names if t in results.tasks])]
    if groups:
        title = f"## Primary comparison: test NLL of {PRIMARY} at the means minus that of {BASELINE}, paired by seed"
        parts += [title, _primary(results), "## In short", *(in_short(results, tasks) for tasks in groups)]
        draw(results, groups[0], folder)
        parts.append("\n".join(f"![{name}]({name}.png)" for name in PICTURES))
        parts += ["## Replication: two leads on tasks they were not seen on", replication(results), by_task(results)]
        parts += ["## What makes a difference", *_attributions(results, groups)]
        parts += ["## Posteriors", *_posteriors(results, groups)]
        for task in results.tasks:
            parts += [f"## {task}", _measures(results, task), _costs(results, task)]
        parts += [f"## Differences to {BASELINE}, paired by seed", *_differences(results, groups)]
    parts += ["## Trials: mean NLL on development examples, which choose the settings", *_trials(lines)]
    text = "\n\n".join(parts) + "\n"
    (folder / "report.md").write_text(text, encoding="utf-8")
    return text


def _about(results):
    done = "; ".join(f"{task} {len(seeds)}" for task, seeds in results.seeds.items() if seeds)
    text = (
        "Made by `python -m study report`; the plan is in `study/PLAN.md`. The text model is "
        "all-MiniLM-L6-v2, a sentence-embedding model, unless `--model` named another. "
        f"Seeds that every arm has finished, of {len(SEEDS)} planned: {done or 'none'}."
    )
    if not results.tasks:
        return f"{text} **Fewer than three of a task: nothing to report yet.**"
    rows = _rows_of_arms(results.tasks, lambda arm, task: _setting(results.settings.get((task, arm))))
    settings = table(["settings chosen on development seeds", *results.tasks], rows)
    return f"{text} Run on {'; '.join(results.environments)}.\n\n{settings}"


def _setting(settings):
    return "-" if settings is None else ", ".join(f"{name} {settings[name]}" for name in sorted(settings))


def _rows_of_arms(columns, cell):
    """[arm, cell(arm, column), ...] of every arm that has more than "-" in them."""
    rows = [[arm, *(cell(arm, column) for column in columns)] for arm in ARMS]
    return [row for row in rows if set(row[1:]) != {"-"}]


def _primary(results):
    """Holm over the tasks of the plan, also those that are not done, whose p counts as 1."""
    tasks = [task for task in REPORTED if task in results.tasks]
    found = [results.compare(task, PRIMARY, BASELINE, "mean", "test", "nll") for task in tasks]
    corrected = holm([c.p for c in found] + [1.0] * (len(REPORTED) - len(tasks)))
    rows = [
        [task, *comparison_cells(c, p, len(REPORTED))]
        for task, c, p in zip(tasks, found, corrected[: len(tasks)], strict=True)
    ]
    return table(["task", *COMPARISON], rows)


def in_short(results, tasks):
    """Two tables of docs/study.md: what the arms reach at the posterior means."""

    def cell(arm, column):
        if arm not in results.arms[column[0]]:
            return "-"
        metric, nll = (st.mean(results.values(column[0], arm, "mean", column[1], m)) for m in ("metric", "nll"))
        return f"{100 * metric:.1f}, {nll:.3f}"

    measures = f"accuracy{' (cola: MCC)' if 'cola' in tasks else ''} %, NLL"
    columns = [(t, split) for t in tasks for split in ("test", "ood") if results.has(t, split)]
    titles = [t if split == "test" else f"{t}, out of domain" for t, split in columns]
    return table([f"{measures}; mean over seeds", *titles], _rows_of_arms(columns, cell))


def _attributions(results, groups):
    """What a part of an arm adds: arm minus arm."""
    pairs = [(f"{arm} - {other}: {what}", arm, other) for arm, other, what in ATTRIBUTIONS]
    for tasks in groups:
        for mode, measure in itertools.product(MODES, ("nll", "metric")):
            yield _difference_table(results, tasks, pairs, mode, "test", measure)


def _posteriors(results, groups):
    """How far posteriors are from their priors; of the arms that have some."""

    def cell(arm, task):
        seeds = results.seeds[task] if arm in results.arms[task] else []
        runs = [results.runs[task, arm][seed]["layers"].values() for seed in seeds]
        if not runs or not all(runs):
            return "-"
        distance = st.mean(max(max(scale, shift) for scale, shift, _ in run) for run in runs)
        return f"{distance:.3f}, {st.mean(st.mean(kl for *_, kl in run) for run in runs):.2f}"

    header = "largest distance of mean and prior mean in deviations (median of a layer), KL of a layer in nats"
    for tasks in groups:
        yield table([f"{header}; mean over seeds", *tasks], _rows_of_arms(tasks, cell))


def _measures(results, task):
    metric = TASKS[task].metric

    def columns_of(split, *measures):
        return [(mode, split, measure) for mode in MODES for measure in measures if results.has(task, split)]

    columns = [*columns_of("test", metric, "nll", "ece", "overconfidence"), ("mean", "test", "gap")]
    columns += [("mean", "train", "nll")]
    columns += [*columns_of("ood", metric, "nll", "ece"), *columns_of("oos", "auroc")]
    header = ["mean ± deviation over the seeds", *(_title(*column) for column in columns), f"worst seed, test {metric}"]
    rows = []
    for arm in results.arms[task]:
        cells = [_cell(results.values(task, arm, *column), column[2]) for column in columns]
        rows.append([arm, *cells, f"{100 * min(results.values(task, arm, 'mean', 'test', metric)):.1f}"])
    return table(header, rows)


def _title(mode, split, measure):
    if measure == "gap":
        return "train - test %"
    return f"{split} {NAMES.get(measure, measure)}{' %' if measure in PERCENT else ''}, {MODES[mode]}"


def _cell(values, measure):
    scale, digits = (100, 1) if measure in PERCENT else (1, 3)
    return f"{scale * st.mean(values):.{digits}f} ± {scale * st.stdev(values):.{digits}f}"


def _costs(results, task):
    sizes = {"bytes kept for backward of a batch": "saved_bytes"}
    if results.on_gpu:
        sizes["peak memory, bytes"] = "peak_bytes"
    rows = []
    for arm in results.arms[task]:
        found = [results.runs[task, arm][seed] for seed in results.seeds[task]]
        numbers = [f"{st.median(r[name] for r in found):,.0f}" for name in sizes.values()]
        rows.append([arm, f"{found[0]['parameters']:,}", *numbers, f"{st.median(r['step_ms'] for r in found):.1f}"])
    caveat = "" if results.on_gpu else "Steps were timed on a shared CPU, other runs beside them: only a hint.\n\n"
    return caveat + table(["cost", "parameters", *sizes, "step, ms (median over seeds)"], rows)


def _differences(results, groups):
    """A table for each measure: every arm, Holm over the tasks that have it."""
    pairs = [(arm, arm, BASELINE) for arm in ARMS if arm != BASELINE]
    columns = [(mode, split, m) for split in ("test", "ood") for m in ("metric", "nll", "ece") for mode in MODES]
    columns += [("mean", "test", "gap"), *((mode, "oos", "auroc") for mode in MODES)]
    for group in groups:
        for mode, split, measure in columns:
            tasks = [task for task in group if results.has(task, split)]
            if tasks:
                yield _difference_table(results, tasks, pairs, mode, split, measure)


def _difference_table(results, tasks, pairs, mode, split, measure):
    """`pairs`: (name of the row, arm, what it is compared with)."""
    scale, digits = (100, 2) if measure in PERCENT else (1, 4)
    rows = []
    for name, *pair in pairs:
        own = [task for task in tasks if set(pair) <= set(results.arms[task])]
        found = [results.compare(task, *pair, mode, split, measure) for task in own]
        cells = dict.fromkeys(tasks, "-")
        for task, c, p in zip(own, found, holm([c.p for c in found]), strict=True):
            mean, low, high = (f"{scale * v:+.{digits}f}" for v in c[:3])
            cells[task] = f"{mean} ({low} to {high}), p {p:.3f}{' *' if p < LEVEL else ''}"
        rows += [[name, *cells.values()]] if own else []
    note = " (lower is better)" if measure in LOWER_IS_BETTER else ""
    return table([f"{_title(mode, split, measure)}{note}; p: Holm over tasks, * < {LEVEL}", *tasks], rows)


def _trials(lines):
    """A table a task: the settings of an arm from best to worst, over the seeds that all four have."""
    for task in dict.fromkeys(name for tuning in TUNING.values() for name in tuning.tasks):
        losses = defaultdict(dict)
        for config, result in ((line["config"], line["result"]) for line in lines):
            if config["stage"] == "tune" and config["task"] == task:
                nll = result["metrics"]["mean"]["dev"]["nll"]
                losses[config["arm"], _setting(config["settings"])][config["seed"]] = nll
        rows = []
        for arm in ARMS:
            wanted = [
                _setting(configuration("", TASKS[task], arm, 0, g, Sizes(""))["settings"]) for g in ARMS[arm].GRID
            ]
            found = {setting: losses[arm, setting] for setting in wanted}
            seeds = sorted(set.intersection(*map(set, found.values())))
            if seeds:
                means = {setting: st.mean(values[seed] for seed in seeds) for setting, values in found.items()}
                rows.append([arm, len(seeds), *(f"{means[s]:.3f} ({s})" for s in sorted(means, key=means.get))])
        if rows:
            yield table([task, "seeds", "best", "second", "third", "worst"], rows)
