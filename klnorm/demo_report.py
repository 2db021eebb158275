"""How the demo measures and shows its results: metrics, tables, picture, progress bar. How to use klnorm: demo.py."""

import math
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

BINS = 15
BASELINE = "LayerNorm"
DECIMALS = {
    "test accuracy %": 2,
    "test NLL": 4,
    "test ECE %": 2,
    "shifted accuracy %": 2,
    "shifted NLL": 4,
    "shifted ECE %": 2,
    "parameters": 0,
    "KL, nats": 1,
    "training, s": 2,
}
COLORS = ("#4c72b0", "#dd8452", "#55a868")


@dataclass
class Result:
    """One model of one seed, evaluated one way."""

    probabilities: dict[str, torch.Tensor]  # test set ("test", "shifted") -> (n, classes)
    labels: torch.Tensor  # (n,)
    parameters: int
    seconds: float
    layers: dict  # of `klnorm.summary(model)`

    def metrics(self):
        """Row of the table -> number, in the order of DECIMALS."""
        rows = {}
        for name, probabilities in self.probabilities.items():
            rows[f"{name} accuracy %"] = 100 * accuracy(probabilities, self.labels)
            rows[f"{name} NLL"] = nll(probabilities, self.labels)
            rows[f"{name} ECE %"] = 100 * calibration_error(probabilities, self.labels)
        rows["parameters"] = self.parameters
        rows["KL, nats"] = sum(layer.kl for layer in self.layers.values())
        rows["training, s"] = self.seconds
        return rows


# ---- Metrics ---------------------------------------------------------------------------------------------------------


def accuracy(probabilities, labels):
    """Fraction of rows of probabilities (n, classes) whose largest entry is the label's, labels (n,)."""
    return (probabilities.argmax(dim=1) == labels).double().mean().item()


def nll(probabilities, labels):
    """Mean negative log-likelihood in nats."""
    of_label = probabilities.double().gather(1, labels.unsqueeze(1))
    return -of_label.clamp_min(1e-12).log().mean().item()


def reliability(probabilities, labels, bins=BINS):
    """Count, mean confidence and accuracy, each (bins,), by bin (k/bins, (k+1)/bins] of confidence; NaN if empty."""
    confidence, predicted = probabilities.double().max(dim=1)
    correct = (predicted == labels).double()
    bin_of = (confidence * bins).ceil().long().clamp(1, bins) - 1
    count = torch.bincount(bin_of, minlength=bins)
    return count, torch.bincount(bin_of, confidence, bins) / count, torch.bincount(bin_of, correct, bins) / count


def calibration_error(probabilities, labels, bins=BINS):
    """Expected calibration error: |accuracy - confidence| of the bins, averaged with their counts as weights."""
    count, confidence, correct = reliability(probabilities, labels, bins)
    gap = (correct - confidence).abs().nan_to_num()  # an empty bin's NaN has weight 0
    return (count * gap).sum().item() / len(labels)


# ---- Tables ----------------------------------------------------------------------------------------------------------


def values_of(results, column, row):
    """One metric of one column, over the seeds: (seeds,)."""
    return torch.tensor([result.metrics()[row] for result in results[column]], dtype=torch.float64)


def format_table(title, columns, rows):
    """Right-aligned cells under `columns`; `rows` maps a row's name to its cells."""
    width = 3 + max(len(text) for cells in (columns, *rows.values()) for text in cells)
    lines = ["".join([f"{name:<20}", *(f"{cell:>{width}}" for cell in cells)]).rstrip() for name, cells in rows.items()]
    header = " " * 20 + "".join(f"{column:>{width}}" for column in columns)
    return "\n".join(["", title, header, *lines])


def summary_table(results):
    """Mean ± standard deviation over the seeds of every metric."""
    rows = {}
    for row, decimals in DECIMALS.items():
        values = [values_of(results, column, row) for column in results]
        rows[row] = [f"{v.mean():,.{decimals}f} ± {v.std():.{decimals}f}" for v in values]
        if row == "parameters":
            rows[row] = [f"{v[0]:,.0f}" for v in values]
    return format_table("Mean ± standard deviation over the seeds", list(results), rows)


def compare(values, baseline, lower_is_better):
    """Paired difference of values (seeds,): its mean, standard error, and what the 95 % Student t interval says."""
    from scipy.stats import t  # comes with scikit-learn

    difference = values - baseline
    mean, error = difference.mean().item(), difference.std().item() / math.sqrt(len(difference))
    if abs(mean) <= t.ppf(0.975, df=len(difference) - 1) * error:
        return mean, error, "within noise"
    return mean, error, "better" if (mean < 0) == lower_is_better else "worse"


def difference_table(results):
    """Paired differences to the baseline with standard errors, and a sentence that counts the verdicts."""
    columns = [column for column in results if column != BASELINE]
    rows, verdicts = {}, []
    for row, decimals in list(DECIMALS.items())[:6]:
        rows[row] = []
        for column in columns:
            pair = values_of(results, column, row), values_of(results, BASELINE, row)
            mean, error, verdict = compare(*pair, lower_is_better="accuracy" not in row)
            rows[row].append(f"{mean:+.{decimals}f} ± {error:.{decimals}f}  {verdict:<12}")
            verdicts.append(verdict)
    counts = ", ".join(f"{verdicts.count(word)} {word}" for word in ("better", "worse", "within noise"))
    title = f"Difference to {BASELINE} on the same seeds: mean ± standard error, verdict at 95 % (Student t)"
    return (
        format_table(title, columns, rows)
        + f"\n\nOf {len(verdicts)} comparisons: {counts}. Chance alone would mark about one in twenty. Seeds vary"
        + "\nthe labelled images, initial weights, batches and noise; the test images are the same for all."
    )


# ---- Picture ---------------------------------------------------------------------------------------------------------


def draw(results, path, deviations):
    """Save the picture and return its path; `deviations` maps a name to a reference value for posterior deviations."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(2, 2, figsize=(12, 9), layout="constrained")
    draw_accuracy(axes[0, 0], results)
    draw_reliability(axes[0, 1], results)
    layers = [result.layers for result in list(results.values())[-1]]
    draw_kl(axes[1, 0], layers)
    draw_deviations(axes[1, 1], layers, deviations)
    path = Path(path).resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png", dpi=120)
    plt.close(figure)
    return path


def draw_accuracy(ax, results):
    """Accuracy on the shifted set: a line per seed, mean and standard deviation over the seeds."""
    values = torch.stack([values_of(results, column, "shifted accuracy %") for column in results])  # (columns, seeds)
    ax.plot(values, color="0.75", linewidth=1, zorder=1)
    for x, (row, color) in enumerate(zip(values, COLORS, strict=True)):
        ax.errorbar(x, row.mean().item(), row.std().item(), fmt="o", color=color, markersize=9, capsize=6, linewidth=2)
    ax.set_xticks(range(len(results)), [column.replace(", ", "\n") for column in results])
    ax.set_xlim(-0.5, len(results) - 0.5)
    ax.set(title="Shifted digits: accuracy (grey: one line per seed)", ylabel="accuracy %")


def draw_reliability(ax, results):
    """Accuracy against confidence on the shifted set, all seeds together."""
    ax.plot([0, 1], [0, 1], color="0.6", linestyle="--", label="perfectly calibrated")
    for (column, runs), color in zip(results.items(), COLORS, strict=True):
        probabilities = torch.cat([run.probabilities["shifted"] for run in runs])
        count, confidence, correct = reliability(probabilities, torch.cat([run.labels for run in runs]))
        enough = count >= 10  # fewer than ten predictions say nothing
        ax.plot(confidence[enough], correct[enough], "o-", color=color, markersize=4, label=column)
    ax.legend(loc="upper left")
    ax.set(title="Shifted digits: reliability", xlabel="confidence", ylabel="accuracy", xlim=(0, 1), ylim=(0, 1))


def draw_kl(ax, layers):
    """KL of each layer after training: mean and standard deviation over the seeds."""
    names = list(layers[0])
    kl = torch.tensor([[layer[name].kl for name in names] for layer in layers])  # (seeds, layers)
    ax.barh(names, kl.mean(dim=0).tolist(), xerr=kl.std(dim=0).tolist(), color="#8c8c8c", capsize=4)
    ax.invert_yaxis()
    ax.set(title="KL of each layer after training", xlabel="nats, mean ± standard deviation over the seeds")


def draw_deviations(ax, layers, references):
    """Posterior deviations of each layer after training, averaged over its features and the seeds."""
    names = list(layers[0])
    std = torch.tensor(
        [[(layer[name].scale.deviation, layer[name].shift.deviation) for name in names] for layer in layers]
    ).mean(dim=0)  # (layers, 2)
    y = torch.arange(len(names)).numpy()
    ax.barh(y - 0.2, std[:, 0].tolist(), 0.38, color="#8172b3", label="scale")
    ax.barh(y + 0.2, std[:, 1].tolist(), 0.38, color="#ccb974", label="shift")
    for (name, value), style in zip(references.items(), (":", "--"), strict=True):
        ax.axvline(value, color="0.3", linestyle=style, label=f"{name} ({value})")
    ax.set_yticks(y, names)
    ax.invert_yaxis()
    ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=4, frameon=False)
    ax.set(title="Posterior deviation after training", xlim=(0, 1.15 * max(std.max().item(), *references.values())))


# ---- Progress --------------------------------------------------------------------------------------------------------


class Progress:
    """A bar that redraws itself on a terminal; elsewhere one line per training run."""

    WIDTH = 30

    def __init__(self, total, stream=None):
        self.total, self.done, self.label = total, 0, ""
        self.stream = stream or sys.stdout
        self.redraws = self.stream.isatty()

    def begin(self, label):
        """Name what is being trained from now on."""
        self.label = label
        if not self.redraws:
            print(f"[{100 * self.done // self.total:3d} %] {label}", file=self.stream, flush=True)

    def advance(self):
        """Count one step."""
        self.done += 1
        if self.redraws and (self.done % 10 == 0 or self.done == self.total):
            bar = "#" * (self.WIDTH * self.done // self.total)
            end = "\n" if self.done == self.total else ""
            text = f"\r[{bar:-<{self.WIDTH}}] {100 * self.done // self.total:3d} %  {self.label:<24}"
            print(text, end=end, file=self.stream, flush=True)
