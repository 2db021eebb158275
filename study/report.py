"""Tables and plots of the reporting runs."""

import statistics as st
from collections import defaultdict

from bench.report import markdown

from .arms import ARMS
from .data import TASKS
from .plan import ATTRIBUTIONS, BASELINE, PRIMARY, REPORTED, SEEDS, TUNING, Sizes, arms_for, configuration, key
from .plots import PICTURES, draw
from .statistics import compare, holm

LEVEL = 0.05
LOWER_IS_BETTER = "nll", "ece", "gap"
PERCENT = "accuracy", "mcc", "ece", "gap"
MODES = {"mean": "means", "mc": "Monte Carlo"}


class Results:
    """The reporting runs by (task, arm): {seed: result}.

    A task has the arms that were begun, all of them after its first seed, and the seeds that all of those have.
    """

    def __init__(self, lines):
        lines = {key(line["config"]): line for line in lines if line["config"]["stage"] == "report"}.values()
        self.runs, self.settings, sizes = defaultdict(dict), {}, {}
        for line in lines:
            config, task, arm = line["config"], line["config"]["task"], line["config"]["arm"]
            size = {name: v for name, v in config.items() if name not in ("arm", "seed", "settings")}
            same = self.settings.setdefault((task, arm), config["settings"]) == config["settings"]
            if not same or sizes.setdefault(task, size) != size:
                raise ValueError(
                    f"the lines of {task}, {arm} have several models, sizes or settings, expected one. "
                    "Remedy: an --output for each."
                )
            self.runs[task, arm][config["seed"]] = line["result"]
        self.on_gpu = not any(line["environment"]["device"].startswith("CPU") for line in lines)
        self.environments = sorted({json_line(line["environment"]) for line in lines})
        self.arms = {name: [a for a in arms_for(task) if (name, a) in self.settings] for name, task in TASKS.items()}
        self.seeds = {
            name: sorted(set.intersection(*(set(self.runs[name, arm]) for arm in arms))) if arms else []
            for name, arms in self.arms.items()
        }
        self.tasks = [name for name, seeds in self.seeds.items() if len(seeds) >= 3]

    def values(self, task, arm, mode, split, measure):
        """One number a seed. Measure "metric" is the task's own, "gap" that of training minus test examples."""
        found = [self.runs[task, arm][seed]["metrics"] for seed in self.seeds[task]]
        metric = TASKS[task].metric
        if measure == "gap":
            return [m[mode]["train"][metric] - m[mode]["test"][metric] for m in found]
        return [m[mode][split][metric if measure == "metric" else measure] for m in found]

    def has(self, task, split):
        return split in next(iter(self.runs[task, BASELINE].values()))["metrics"]["mean"]


def json_line(environment):
    return ", ".join(f"{name} {value}" for name, value in environment.items())


def report(lines, folder):
    """Write report.md and the plots into `folder`; returns the text. Fewer than three seeds of a task are no result."""
    results = Results(lines)
    parts = ["# Low-resource study", _about(results)]
    if results.tasks:
        parts += [_primary(results), "## In short", _in_short(results)]
        draw(results, folder)
        parts.append("\n".join(f"![{name}]({name}.png)" for name in PICTURES))
        parts += ["## What makes a difference", *_attributions(results), "## Posteriors", _posteriors(results)]
    for task in results.tasks:
        parts += [f"## {task}", _measures(results, task), _costs(results, task)]
    parts += [f"## Differences to {BASELINE}, paired by seed", *_differences(results)] if results.tasks else []
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
    """Holm over the tasks of the plan, also those that are not done, whose p counts as 1."""
    tasks = [task for task in REPORTED if task in results.tasks]
    comparisons = [_compare(results, task, PRIMARY, BASELINE, "mean", "test", "nll") for task in tasks]
    adjusted = holm([c.p for c in comparisons] + [1.0] * (len(REPORTED) - len(tasks)))
    rows = [
        [task, c.seeds, f"{c.mean:+.4f}", f"{c.low:+.4f} to {c.high:+.4f}", f"{c.p:.4f}", f"{p:.4f}", _verdict(c, p)]
        for task, c, p in zip(tasks, comparisons, adjusted[: len(tasks)], strict=True)
    ]
    header = ["task", "seeds", "difference", "95 % interval (BCa)", "p, sign flips", "p, Holm", "verdict at 5 %"]
    return (
        f"## Primary comparison: test NLL of {PRIMARY} at the means minus that of {BASELINE}, paired by seed\n\n"
        + markdown(header, rows)
    )


def _compare(results, task, arm, baseline, mode, split, measure):
    return compare(*(results.values(task, a, mode, split, measure) for a in (arm, baseline)))


def _verdict(comparison, p):
    """Of an NLL. With n seeds no p of a sign-flip test is less than 2 / 2^n, and Holm takes it times the tests."""
    if p < LEVEL:
        return "better" if comparison.mean < 0 else "worse"
    few = len(REPORTED) * 2.0 ** (1 - comparison.seeds) >= LEVEL
    return "too few seeds to show one" if few else "no difference shown"


def _in_short(results):
    """The README's table: what the arms reach at the posterior means."""
    columns = [(t, split) for t in results.tasks for split in ("test", "ood") if results.has(t, split)]
    titles = [t if split == "test" else f"{t}, out of domain" for t, split in columns]
    rows = []
    for arm in ARMS:
        cells = ["-"] * len(columns)
        for i, (task, split) in enumerate(columns):
            if arm in results.arms[task]:
                metric, nll = (st.mean(results.values(task, arm, "mean", split, m)) for m in ("metric", "nll"))
                cells[i] = f"{100 * metric:.1f}, {nll:.3f}"
        if any(cell != "-" for cell in cells):
            rows.append([arm, *cells])
    return markdown(["accuracy %, NLL; mean over seeds", *titles], rows)


def _measures(results, task):
    metric = TASKS[task].metric
    columns = [(mode, "test", m) for mode in MODES for m in (metric, "nll", "ece")] + [("mean", "test", "gap")]
    if results.has(task, "ood"):
        columns += [(mode, "ood", m) for mode in MODES for m in (metric, "nll", "ece")]
    if results.has(task, "oos"):
        columns += [(mode, "oos", "auroc") for mode in MODES]
    header = ["mean ± deviation over the seeds", *(_title(*column) for column in columns), f"worst seed, test {metric}"]
    rows = []
    for arm in results.arms[task]:
        cells = [_cell(results.values(task, arm, *column), column[2]) for column in columns]
        worst = min(results.values(task, arm, "mean", "test", metric))
        rows.append([arm, *cells, f"{100 * worst:.1f}"])
    return markdown(header, rows)


def _title(mode, split, measure):
    if measure == "gap":
        return "train - test %"
    name = "accuracy (or the task's metric)" if measure == "metric" else measure
    return f"{split} {name}{' %' if measure in (*PERCENT, 'metric') else ''}, {MODES[mode]}"


def _cell(values, measure):
    scale, digits = (100, 1) if measure in PERCENT else (1, 3)
    return f"{scale * st.mean(values):.{digits}f} ± {scale * st.stdev(values):.{digits}f}"


def _costs(results, task):
    memory = ["peak memory, bytes"] if results.on_gpu else []
    header = ["cost", "parameters", "bytes kept for backward of a batch", *memory, "step, ms (median over seeds)"]
    rows = []
    for arm in results.arms[task]:
        found = [results.runs[task, arm][seed] for seed in results.seeds[task]]
        names = "saved_bytes", *(["peak_bytes"] if results.on_gpu else [])
        numbers = [f"{st.median(r[name] for r in found):,.0f}" for name in names]
        rows.append([arm, f"{found[0]['parameters']:,}", *numbers, f"{st.median(r['step_ms'] for r in found):.1f}"])
    caveat = "" if results.on_gpu else "Steps were timed on a shared CPU, other runs beside them: only a hint.\n\n"
    return caveat + markdown(header, rows)


def _attributions(results):
    """What noise and KL add, each taken away alone: arm minus arm."""
    for measure in "nll", "metric":
        pairs = [(f"{arm} - {other}: {what}", arm, other) for arm, other, what in ATTRIBUTIONS]
        yield _difference_table(results, results.tasks, pairs, "mean", "test", measure)


def _posteriors(results):
    """How far posteriors are from their priors; of the arms that have some."""
    rows = [[arm, *(_posterior(results, task, arm) for task in results.tasks)] for arm in ARMS]
    header = "largest |mean - prior mean| / deviation (median of a layer), KL of a layer in nats; mean over seeds"
    return markdown([header, *results.tasks], [row for row in rows if set(row[1:]) != {"-"}])


def _posterior(results, task, arm):
    if arm not in results.arms[task]:
        return "-"
    runs = [results.runs[task, arm][seed]["layers"].values() for seed in results.seeds[task]]
    if not all(runs):
        return "-"
    distance = st.mean(max(max(scale, shift) for scale, shift, _ in run) for run in runs)
    return f"{distance:.3f}, {st.mean(st.mean(kl for *_, kl in run) for run in runs):.2f}"


def _differences(results):
    """A table for each measure: every arm, Holm over the tasks that have it."""
    pairs = [(arm, arm, BASELINE) for arm in ARMS if arm != BASELINE]
    columns = [(mode, split, m) for split in ("test", "ood") for m in ("metric", "nll", "ece") for mode in MODES]
    for mode, split, measure in [*columns, ("mean", "test", "gap"), *((mode, "oos", "auroc") for mode in MODES)]:
        tasks = [task for task in results.tasks if results.has(task, split)]
        if tasks:
            yield _difference_table(results, tasks, pairs, mode, split, measure)


def _difference_table(results, tasks, pairs, mode, split, measure):
    """`pairs`: (name of the row, arm, what it is compared with)."""
    scale, digits = (100, 2) if measure in (*PERCENT, "metric") else (1, 4)
    rows = []
    for name, arm, other in pairs:
        own = [task for task in tasks if {arm, other} <= set(results.arms[task])]
        if not own:
            continue
        comparisons = [_compare(results, task, arm, other, mode, split, measure) for task in own]
        cells = dict.fromkeys(tasks, "-")
        for task, c, p in zip(own, comparisons, holm([c.p for c in comparisons]), strict=True):
            mean, low, high = (scale * v for v in c[:3])
            mark = " *" if p < LEVEL else ""
            cells[task] = f"{mean:+.{digits}f} ({low:+.{digits}f} to {high:+.{digits}f}), p {p:.3f}{mark}"
        rows.append([name, *cells.values()])
    note = " (lower is better)" if measure in LOWER_IS_BETTER else ""
    return markdown([f"{_title(mode, split, measure)}{note}; p: Holm over tasks, * < {LEVEL}", *tasks], rows)
