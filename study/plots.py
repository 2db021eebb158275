"""Pictures of the study: differences to LayerNorm, posteriors by layer, calibration."""

from .data import TASKS
from .plan import BASELINE, PRIMARY

DPI = 110
POSTERIORS = {"kl_sample": "#4c72b0", "kl_token": "#dd8452", "kl_batch": "#55a868", "kl_affine": "#c44e52"}
PICTURES = "differences", "posteriors", "calibration"


def draw(results, tasks, folder):
    """Of these tasks write differences.png, posteriors.png and calibration.png."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    for name, make in zip(PICTURES, (_differences, _posteriors, _calibration), strict=True):
        figure = make(pyplot, results, tasks)
        figure.savefig(folder / f"{name}.png", dpi=DPI)
        pyplot.close(figure)


def _differences(pyplot, results, tasks):
    """A row of panels a task: accuracy and NLL of every arm minus the baseline's, at the means and by Monte Carlo."""
    columns = [("metric", "test"), ("nll", "test"), ("metric", "ood"), ("nll", "ood")]
    figure, axes = pyplot.subplots(
        len(tasks), len(columns), figsize=(15, 3.6 * len(tasks)), squeeze=False, layout="constrained"
    )
    for line, task in zip(axes, tasks, strict=True):
        arms = [arm for arm in results.arms[task] if arm != BASELINE]
        for axis, (measure, split) in zip(line, columns, strict=True):
            if not results.has(task, split):
                axis.set_axis_off()
                continue
            axis.axvline(0, color="0.6", linewidth=1)
            for mode, color, offset in (("mean", "#4c72b0", -0.15), ("mc", "#dd8452", 0.15)):
                found = [results.compare(task, arm, BASELINE, mode, split, measure) for arm in arms]
                mean = [c.mean for c in found]
                errors = [[c.mean - c.low for c in found], [c.high - c.mean for c in found]]
                places = [i + offset for i in range(len(arms))]
                label = "at the means" if mode == "mean" else "Monte Carlo"
                axis.errorbar(mean, places, xerr=errors, fmt="o", color=color, markersize=4, label=label)
            axis.set_yticks(range(len(arms)), arms)
            axis.invert_yaxis()
            better, name = ("left", measure) if measure == "nll" else ("right", TASKS[task].metric)
            axis.set_title(f"{task}, {split}: {name} - {BASELINE}'s (better: {better})", fontsize=8)
    axes[0][0].legend(fontsize=8)
    return figure


def _posteriors(pyplot, results, tasks):
    """Signal to noise of scales and shifts by layer, mean over seeds."""
    figure, axes = pyplot.subplots(1, len(tasks), figsize=(5 * len(tasks), 4.5), squeeze=False, layout="constrained")
    for axis, task in zip(axes[0], tasks, strict=True):
        for arm, color in POSTERIORS.items():
            if arm not in results.arms[task]:
                continue
            layers = [results.runs[task, arm][seed]["layers"] for seed in results.seeds[task]]
            for part, style, name in ((0, "-", "scale"), (1, "--", "shift")):
                means = [sum(run[layer][part] for run in layers) / len(layers) for layer in layers[0]]
                axis.plot(means, style, color=color, marker="o", markersize=3, label=f"{arm}, {name}")
        axis.set_yscale("log")
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.set_xlabel("norm, in the order of the model")
        axis.set_title(task)
        axis.legend(fontsize=8)
    axes[0][0].set_ylabel("|mean - prior mean| / deviation, median of a layer")
    return figure


def _calibration(pyplot, results, tasks):
    """Accuracy against confidence, all seeds together, of the baseline and the primary arm."""
    panels = [(task, split) for task in tasks for split in ("test", "ood") if results.has(task, split)]
    figure, axes = pyplot.subplots(
        1, len(panels), figsize=(4 * len(panels), 4), squeeze=False, layout="constrained", sharey=True
    )
    for axis, (task, split) in zip(axes[0], panels, strict=True):
        axis.plot([0, 1], [0, 1], color="0.6", linewidth=1)
        for arm, color in ((BASELINE, "#4c72b0"), (PRIMARY, "#dd8452")):
            for mode, style in (("mean", "-"), ("mc", "--")):
                points = pooled(results.values(task, arm, mode, split, "bins"))
                label = f"{arm}, {'means' if mode == 'mean' else 'Monte Carlo'}"
                axis.plot(*zip(*points, strict=True), style, color=color, marker="o", markersize=3, label=label)
        axis.set_title(f"{task}, {split}")
        axis.set_xlabel("confidence")
    axes[0][0].set_ylabel("accuracy")
    axes[0][0].legend(fontsize=8)
    return figure


def pooled(runs):
    """[(confidence, accuracy)] of the bins that are not empty, over runs of [count, confidence, accuracy] bins."""
    points = []
    for bins in zip(*runs, strict=True):
        count = sum(n for n, _, _ in bins)
        if count:
            points.append(tuple(sum(n * b[i] for n, *b in bins if n) / count for i in (0, 1)))
    return points
