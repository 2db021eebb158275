"""Tables and plots of the reporting runs."""

import statistics as st
from collections import defaultdict

from ..report import markdown
from .arms import ARMS
from .data import TASKS
from .plan import BASELINE, PRIMARY, SEEDS, TUNING, Sizes, arms_for, configuration, key
from .plots import draw
from .statistics import compare, holm

LOWER_IS_BETTER = "nll", "ece"
PERCENT = "accuracy", "mcc", "ece"
MODES = {"mean": "means", "mc": "Monte Carlo"}


class Results:
    """The reporting runs by (task, arm): {seed: result}; a task has the seeds that all of its arms have."""

    def __init__(self, lines):
        lines = {key(line["config"]): line for line in lines if line["config"]["stage"] == "report"}.values()
        variants = {tuple(v for k, v in line["config"].items() if k in ("model", "test", "samples")) for line in lines}
        if len({v for v in variants if v[0]}) > 1:
            raise ValueError("the lines are of several models or sizes, expected one. Remedy: an --output for each.")
        self.runs, self.settings = defaultdict(dict), {}
        for line in lines:
            config = line["config"]
            self.runs[config["task"], config["arm"]][config["seed"]] = line["result"]
            self.settings[config["task"], config["arm"]] = config["settings"]
        self.environments = sorted({json_line(line["environment"]) for line in lines})
        self.seeds = {
            name: sorted(set.intersection(*(set(self.runs[name, arm]) for arm in arms_for(task))))
            for name, task in TASKS.items()
        }
        self.tasks = [name for name, seeds in self.seeds.items() if len(seeds) >= 3]

    def values(self, task, arm, mode, split, measure):
        """One number a seed; the train-test gap is the measure "gap"."""
        found = [self.runs[task, arm][seed]["metrics"] for seed in self.seeds[task]]
        if measure == "gap":
            metric = TASKS[task].metric
            return [m[mode]["train"][metric] - m[mode]["test"][metric] for m in found]
        return [m[mode][split][measure] for m in found]

    def has(self, task, split):
        return split in next(iter(self.runs[task, BASELINE].values()))["metrics"]["mean"]


def json_line(environment):
    return ", ".join(f"{name} {value}" for name, value in environment.items())


def report(lines, folder):
    """Write report.md and the plots into `folder`; returns the text. Fewer than three seeds of a task are no result."""
    results = Results(lines)
    parts = ["# Low-resource study", _about(results)]
    if results.tasks:
        parts.append(_primary(results))
        draw(results, folder)
    for task in results.tasks:
        parts += [f"## {task}", _measures(results, task), _costs(results, task)]
    parts += [f"## Differences to {BASELINE}", *_differences(results)] if results.tasks else []
    parts += ["## Trials: mean NLL on development examples, which choose the settings", *_trials(lines)]
    text = "\n\n".join(parts) + "\n"
    (folder / "report.md").write_text(text, encoding="utf-8")
    return text


def _about(results):
    done = "; ".join(f"{task} {len(seeds)}" for task, seeds in results.seeds.items() if seeds)
    text = (
        "Made by `python -m bench.low_resource report`; the plan is in `bench/STUDY.md`. The text model is "
        "all-MiniLM-L6-v2, a sentence-embedding model, unless `--model` named another. "
        f"Seeds that every arm has finished, of {len(SEEDS)} planned: {done or 'none'}."
    )
    if not results.tasks:
        return f"{text} **Fewer than three of a task: nothing to report yet.**"
    settings = markdown(
        ["settings chosen on development seeds", *results.tasks],
        [
            [arm, *(_setting(results.settings.get((task, arm))) for task in results.tasks)]
            for arm in ARMS
            if any((task, arm) in results.settings for task in results.tasks)
        ],
    )
    return f"{text} Run on {'; '.join(results.environments)}.\n\n{settings}"


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
            yield markdown([task, "seeds", "best", "second", "third", "worst"], rows)


def _setting(settings):
    return "-" if settings is None else ", ".join(f"{name} {settings[name]}" for name in sorted(settings))


def _primary(results):
    comparisons = [_compare(results, task, PRIMARY, "mean", "test", "nll") for task in results.tasks]
    adjusted = holm([c.p for c in comparisons])
    rows = [
        [task, c.seeds, f"{c.mean:+.4f}", f"{c.low:+.4f} to {c.high:+.4f}", f"{c.p:.4f}", f"{p:.4f}", _verdict(c, p)]
        for task, c, p in zip(results.tasks, comparisons, adjusted, strict=True)
    ]
    header = ["task", "seeds", "difference", "95 % interval (BCa)", "p, sign flips", "p, Holm", "verdict at 5 %"]
    return (
        f"## Primary comparison: test NLL of {PRIMARY} at the means minus that of {BASELINE}, paired by seed\n\n"
        + markdown(header, rows)
    )


def _compare(results, task, arm, mode, split, measure):
    return compare(*(results.values(task, a, mode, split, measure) for a in (arm, BASELINE)))


def _verdict(comparison, p, lower_is_better=True):
    if p >= 0.05:
        return "no difference shown"
    return "better" if (comparison.mean < 0) == lower_is_better else "worse"


def _measures(results, task):
    metric = TASKS[task].metric
    columns = [(mode, "test", m) for mode in MODES for m in (metric, "nll", "ece")] + [("mean", "test", "gap")]
    if results.has(task, "ood"):
        columns += [(mode, "ood", m) for mode in MODES for m in (metric, "nll", "ece")]
    if results.has(task, "oos"):
        columns += [(mode, "oos", "auroc") for mode in MODES]
    header = ["mean ± deviation over the seeds", *(_title(*column) for column in columns), f"worst seed, test {metric}"]
    rows = []
    for arm in arms_for(TASKS[task]):
        cells = [_cell(results.values(task, arm, *column), column[2]) for column in columns]
        worst = min(results.values(task, arm, "mean", "test", metric))
        rows.append([arm, *cells, f"{100 * worst:.1f}"])
    return markdown(header, rows)


def _title(mode, split, measure):
    if measure == "gap":
        return "train - test %"
    return f"{split} {measure}{' %' if measure in PERCENT else ''}, {MODES[mode]}"


def _cell(values, measure):
    scale, digits = (100, 1) if measure in (*PERCENT, "gap") else (1, 3)
    return f"{scale * st.mean(values):.{digits}f} ± {scale * st.stdev(values):.{digits}f}"


def _costs(results, task):
    header = ["cost", "parameters", "bytes kept for backward of a batch", "step, ms (median over seeds)"]
    rows = []
    for arm in arms_for(TASKS[task]):
        found = [results.runs[task, arm][seed] for seed in results.seeds[task]]
        saved, step = st.median(r["saved_bytes"] for r in found), st.median(r["step_ms"] for r in found)
        rows.append([arm, f"{found[0]['parameters']:,}", f"{saved:,.0f}", f"{step:.1f}"])
    return markdown(header, rows)


def _differences(results):
    """A table for each measure: every arm, Holm over the tasks that have it."""
    for split in ("test", "ood"):
        tasks = [task for task in results.tasks if results.has(task, split)]
        for measure in ("accuracy", "nll", "ece") if tasks else ():
            for mode in MODES:
                yield _difference_table(results, tasks, mode, split, measure)


def _difference_table(results, tasks, mode, split, measure):
    scale, digits = (100, 2) if measure in PERCENT else (1, 4)
    rows = []
    for arm in ARMS:
        own = [task for task in tasks if arm != BASELINE and arm in arms_for(TASKS[task])]
        if not own:
            continue
        comparisons = {task: _compare(results, task, arm, mode, split, measure) for task in own}
        adjusted = dict(zip(own, holm([c.p for c in comparisons.values()]), strict=True))
        cells = []
        for task in tasks:
            if task not in own:
                cells.append("-")
                continue
            mean, low, high = (scale * v for v in comparisons[task][:3])
            mark = " *" if adjusted[task] < 0.05 else ""
            cells.append(f"{mean:+.{digits}f} ({low:+.{digits}f} to {high:+.{digits}f}){mark}")
        rows.append([arm, *cells])
    note = " (lower is better)" if measure in LOWER_IS_BETTER else ""
    header = [f"{_title(mode, split, measure)}{note}; * p < 0.05, Holm over tasks", *tasks]
    return markdown(header, rows)
