"""Handwritten digits with 100 labels: nn.LayerNorm against KLLayerNorm.   Run: python -m klnorm.demo

A small transformer reads scikit-learn's bundled 8 x 8 digits. Each seed trains it twice, from the same initial
weights, on the same labelled images in the same order: once as it is, once after `klnorm.replace_layer_norm`. Both are
tested on clean images and on rotated, noisy ones. Where klnorm is used stands a number, (1) to (5).

How the settings were chosen: on development seeds 1000 to 1004 (the demo prints seeds 0, 1, ...), by mean NLL on the
images of the first 1,000 that a seed left unlabelled; the test images and the shift took no part. First the model,
learning rate and weight decay, for the plain LayerNorm model alone. With those fixed, INIT_STD and PRIOR_STD out of
(0.05, 0.1), (0.05, 0.2) and (0.1, 0.4), and RHO_LEARNING_RATE out of 0.01 and 0.03. So KLLayerNorm had more trials.
Steps were then cut from 300 to 200 for time. MAX_KL_WEIGHT out of 1, 0.1 and 0.01 made too little difference to choose
by: at 1, the evidence lower bound, 100 labels move no deviation off the prior and there is nothing to see in the
summary; at 0.1 some do move.
"""

import argparse
import time
from collections import defaultdict

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

import klnorm

try:
    import matplotlib  # noqa: F401, which klnorm.plot_summary needs
    from scipy import stats
    from sklearn.datasets import load_digits
    from sklearn.metrics import accuracy_score, log_loss
    from tabulate import tabulate
    from tqdm import tqdm
except ImportError as error:
    raise ImportError(f"klnorm.demo needs {error.name}. Remedy: pip install 'klnorm[demo]'") from error

TEST_START = 1000  # images from here on are the test set; labelled images are drawn from those before
BATCH = 50
LEARNING_RATE = 1e-3
WEIGHT_DECAY = 1.0
INIT_STD = 0.05  # posterior deviation before training
PRIOR_STD = 0.2
RHO_LEARNING_RATE = 3e-2  # at the rate of the weights the deviations would hardly move
MAX_KL_WEIGHT = 0.1  # 1 is the evidence lower bound; less trusts the data more
COLUMNS = {  # norm -> column of the tables -> draws to average over in prediction, 0 for the means
    "LayerNorm": {"LayerNorm": 0},
    "KLLayerNorm": {"KLLayerNorm, means": 0, "KLLayerNorm, 8 draws": 8},
}
RIGHT = {"colglobalalign": "right", "colalign": ["left"], "disable_numparse": True}  # how tables are aligned


# ---- Data and model: plain PyTorch, knows nothing of klnorm ----------------------------------------------------------


def load_images():
    """All digits: images (1797, 8, 8) in [0, 1] and labels (1797,)."""
    digits = load_digits()
    return torch.tensor(digits.images, dtype=torch.float32) / 16, torch.tensor(digits.target)


def labelled_indices(labels, seed):
    """Indices (100,) of ten training images of each class, drawn by `seed`."""
    order = torch.randperm(TEST_START, generator=torch.Generator().manual_seed(seed))
    return torch.cat([order[labels[order] == digit][:10] for digit in range(10)])


def shift(images, max_degrees=30, noise_std=0.15):
    """Rotate each image (n, 8, 8) by its own angle and add pixel noise; the same in every call."""
    generator = torch.Generator().manual_seed(0)
    angles = torch.deg2rad((2 * torch.rand(len(images), generator=generator) - 1) * max_degrees)
    cos, sin, zero = angles.cos(), angles.sin(), torch.zeros_like(angles)
    rotation = torch.stack([cos, -sin, zero, sin, cos, zero], dim=1).reshape(-1, 2, 3)
    grid = F.affine_grid(rotation, [len(images), 1, 8, 8], align_corners=False)
    rotated = F.grid_sample(images.unsqueeze(1), grid, align_corners=False).squeeze(1)
    return (rotated + noise_std * torch.randn(images.shape, generator=generator)).clamp(0, 1)


class PatchTransformer(nn.Module):
    """Transformer encoder over the nine overlapping patches of an 8 x 8 image, with five LayerNorms."""

    def __init__(self, width=64, depth=2, heads=4, classes=10, tokens=9):
        super().__init__()
        self.embed = nn.Conv2d(1, width, kernel_size=4, stride=2)
        self.position = nn.Parameter(0.5 * torch.randn(tokens, width))
        options = {"dropout": 0.0, "activation": "gelu", "batch_first": True, "norm_first": True}
        layers = [nn.TransformerEncoderLayer(width, heads, 2 * width, **options) for _ in range(depth)]
        self.blocks = nn.Sequential(*layers)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(tokens * width, classes)

    def forward(self, images):
        """(batch, 8, 8) -> logits (batch, 10)."""
        tokens = self.embed(images.unsqueeze(1)).flatten(2).mT + self.position
        return self.head(self.norm(self.blocks(tokens)).flatten(1))


# ---- What klnorm is used for -----------------------------------------------------------------------------------------


def build_model(seed, norm):
    """The model of one arm, "LayerNorm" or "KLLayerNorm"; a seed gives both the same initial weights."""
    torch.manual_seed(seed)
    model = PatchTransformer()
    if norm == "KLLayerNorm":
        klnorm.replace_layer_norm(model, init_std=INIT_STD, prior_std=PRIOR_STD)  # (1) replace the layers, in place
    return model


def train(model, images, labels, steps, seed):
    """Train on images (n, 8, 8) and labels (n,), one loop for both arms; returns the seconds it took."""
    start = time.perf_counter()
    groups = klnorm.param_groups(  # (2) the deviations have a learning rate of their own
        model, lr=LEARNING_RATE, rho_lr=RHO_LEARNING_RATE, weight_decay=WEIGHT_DECAY
    )
    optimizer = torch.optim.AdamW(groups)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, [group["lr"] for group in groups], total_steps=steps)
    kl_weight = klnorm.KLWeight(num_examples=len(images), max_weight=MAX_KL_WEIGHT)
    batch_order = torch.Generator().manual_seed(seed)  # its own generator: the noise cannot change the order
    torch.manual_seed(seed)
    model.train()  # scale and shift are sampled
    for _ in range(steps):
        batch = torch.randperm(len(images), generator=batch_order)[:BATCH]
        nll = F.cross_entropy(model(images[batch]), labels[batch])
        loss = nll + kl_weight(model)  # (3) add the weighted KL divergence, which is 0 for the plain model
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        kl_weight.step()
    if images.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


@torch.no_grad()
def predict(model, images, draws):
    """Class probabilities (n, 10): averaged over draws of scale and shift, or with 0 draws at their means."""
    if draws:
        return klnorm.mc_predict(model, images, samples=draws).probabilities  # (4) average over draws
    return model.eval()(images).softmax(dim=-1)  # in evaluation mode the layers are plain LayerNorms


# ---- The comparison --------------------------------------------------------------------------------------------------


def calibration_error(labels, probabilities, bins=15):
    """Expected calibration error: |accuracy - confidence| of the bins (k/15, (k+1)/15], weighted with their counts."""
    confidence, correct = probabilities.max(axis=1), probabilities.argmax(axis=1) == labels
    bin_of = np.digitize(confidence, np.arange(1, bins) / bins, right=True)
    return np.abs(np.bincount(bin_of, weights=correct - confidence)).sum() / len(labels)


def measure(labels, probabilities):
    """Name -> number, of probabilities (n, 10) for labels (n,)."""
    return {
        "accuracy %": 100 * accuracy_score(labels, probabilities.argmax(axis=1)),
        "NLL": log_loss(labels, probabilities, labels=range(10)),
        "ECE %": 100 * calibration_error(labels, probabilities),
    }


def run(seeds, steps, device):
    """Metric -> column of the tables -> its numbers, one per seed; and the KLLayerNorm model of the last seed."""
    images, labels = load_images()
    test, test_labels = images[TEST_START:], labels[TEST_START:].numpy()
    tests = {"test": test.to(device), "shifted": shift(test).to(device)}
    images, targets, found = images.to(device), labels.to(device), defaultdict(lambda: defaultdict(list))
    for norm in COLUMNS:  # warm up: keeps what the first calls load and compile out of the timing
        train(build_model(0, norm).to(device), images[:BATCH], targets[:BATCH], steps=10, seed=0)
    for seed, norm in tqdm([(seed, norm) for seed in range(seeds) for norm in COLUMNS], unit="run"):
        model, labelled = build_model(seed, norm).to(device), labelled_indices(labels, seed)
        seconds = train(model, images[labelled], targets[labelled], steps, seed)
        for column, draws in COLUMNS[norm].items():
            for name, inputs in tests.items():
                probabilities = predict(model, inputs, draws).cpu().numpy()
                for metric, number in measure(test_labels, probabilities).items():
                    found[f"{name} {metric}"][column].append(number)
            found["parameters"][column].append(sum(p.numel() for p in model.parameters()))
            found["KL, nats"][column].append(klnorm.kl_divergence(model).item())
            found["training, s"][column].append(seconds)
    return found, model


def compare(numbers, baseline, higher_is_better):
    """Paired difference, each (seeds,): its mean, 95 % interval by Student's t, and what the interval says."""
    low, high = stats.ttest_rel(numbers, baseline).confidence_interval(0.95)
    verdict = "within noise" if low <= 0 <= high else "better" if (low > 0) == higher_is_better else "worse"
    return np.mean(numbers) - np.mean(baseline), low, high, verdict


def print_tables(found):
    """Print mean and standard deviation of every metric, and how far KLLayerNorm is from LayerNorm."""
    means, differences = [], []
    for metric, columns in found.items():
        digits = {"NLL": 4, "parameters": 0}.get(metric.split()[-1], 2)
        cells = [f"{np.mean(n):,.{digits}f} ± {np.std(n, ddof=1):.{digits}f}" for n in columns.values()]
        means.append([metric, *cells])
        if metric.startswith(("test", "shifted")):
            baseline, *others = columns.items()
            for column, numbers in others:
                *of_difference, verdict = compare(numbers, baseline[1], higher_is_better="accuracy" in metric)
                mean, low, high = (f"{number:+.{digits}f}" for number in of_difference)
                differences.append([metric, column, mean, f"{low} to {high}", verdict])
    print(f"\nMean ± standard deviation over the seeds\n{tabulate(means, ['', *columns], **RIGHT)}")
    print("\nDifference to LayerNorm on the same seeds")
    print(tabulate(differences, ["", "", "mean", "95 % interval (Student's t)", "verdict"], **RIGHT))
    print("\nChance alone would mark about one in twenty of these. Seeds vary the labelled images, initial weights,")
    print("batches and noise; the test images are the same for all.")


def main(arguments=None):
    """Run the demo; returns metric -> column of the table -> its numbers, one per seed."""
    parser = argparse.ArgumentParser(prog="python -m klnorm.demo", description="nn.LayerNorm against KLLayerNorm")
    devices = ["cuda", "cpu"] if torch.cuda.is_available() else ["cpu"]
    parser.add_argument("--seeds", type=int, default=5, help="number of seeds: 0, 1, ... (default 5)")
    parser.add_argument("--steps", type=int, default=200, help="training steps per model (default 200)")
    parser.add_argument("--output", default="klnorm_demo.png", help="file of the picture (default klnorm_demo.png)")
    parser.add_argument("--device", default=devices[0], choices=devices, help=f"(default {devices[0]})")
    options = parser.parse_args(arguments)
    if options.seeds < 2:
        parser.error("--seeds must be at least 2: the answer is a mean and its spread")
    if options.steps < 1:
        parser.error("--steps must be at least 1")
    torch.set_num_threads(1)  # more do not make so small a model faster, and unsettle the timing
    print(f"Handwritten digits, 100 labelled, {options.seeds} seeds x {options.steps} steps on {options.device}")
    found, model = run(options.seeds, options.steps, options.device)
    print_tables(found)
    print(f"\nThe posteriors of the last seed, which {options.output} shows")
    print(klnorm.summary(model))  # (5) look at what was learned
    klnorm.plot_summary(model, options.output)
    return found


if __name__ == "__main__":
    main()
