"""One run: train an arm on one seed of one task, evaluate it; a line of results."""

import resource
import statistics
import sys
import time
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from sklearn.metrics import accuracy_score, matthews_corrcoef, roc_auc_score

import klnorm
from bench.measure import saved_bytes

from .arms import ARMS, WARMUP
from .data import TASKS, splits_of
from .models import load_tokenizer, make_classifier
from .statistics import calibration

CLIP = 1.0
EVALUATION_BATCH = 64
SMALLEST = 1e-12  # probability, in the negative log-likelihood


def run(config, data, device):
    """The results of `config`, a dict as `plan.configuration` makes it: a dict of numbers for one JSON line.

    `data`: the folder of the examples, for what is not loaded from the hub.
    """
    task, device = TASKS[config["task"]], torch.device(device)
    tokenizer = None if task.speech else load_tokenizer(config["model"])
    splits = splits_of(task, config["seed"], config.get("data", data), tokenizer, config["train"], config["test"])
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    model = make_classifier(task, config["seed"], config["model"], device)
    arm = ARMS[config["arm"]](model, config["settings"], len(splits["train"]), config["steps"])
    lr = config["settings"]["lr"]
    seconds, step_seconds = train(arm, splits["train"], config["steps"], task.batch, lr, config["seed"], device)
    if config["stage"] == "tune":
        measured = {"mean": evaluate(arm, {"dev": splits["dev"]}, 0, config["seed"], device)}
    else:
        tests = {name: splits[name] for name in ("test", "ood", "oos") if name in splits}
        measured = {
            "mean": evaluate(arm, {"train": splits["train"], **tests}, 0, config["seed"], device),
            "mc": evaluate(arm, tests, config["samples"], config["seed"], device),
        }
    return {
        "metrics": measured,
        "parameters": sum(p.numel() for p in model.parameters()),
        "saved_bytes": _saved(arm, splits["train"], task.batch, device),
        "peak_bytes": _peak_bytes(device),
        "seconds": round(seconds, 2),
        "step_ms": round(1e3 * step_seconds, 2),
        "layers": _posteriors(model),
    }


def train(arm, split, steps, batch, lr, seed, device):
    """AdamW, 10 % linear warm-up, then linear decay to 0; (seconds, median seconds of a step)."""
    groups = arm.param_groups(lr)
    optimizer = torch.optim.AdamW(groups, fused=True)  # bias-corrected
    warmup = max(1, round(WARMUP * steps))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, (steps - step) / max(1, steps - warmup))
    )
    order = batch_order(len(split), steps, batch, seed)
    torch.manual_seed(seed)
    arm.training_mode()
    durations, start = [], time.perf_counter()
    for indices in order:
        began = time.perf_counter()
        arguments, labels = split.batch(indices, device)
        loss = arm.loss(arguments, labels) + arm.penalty()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for group in groups for p in group["params"]], CLIP)
        optimizer.step()
        arm.after_step(optimizer.param_groups[0]["lr"])
        schedule.step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        durations.append(time.perf_counter() - began)
    return time.perf_counter() - start, statistics.median(durations)


def batch_order(examples, steps, batch, seed):
    """Indices (steps, batch): one shuffled epoch after the other, the same for every arm of a seed."""
    generator = torch.Generator().manual_seed(seed)
    epochs = [torch.randperm(examples, generator=generator) for _ in range(-(-steps * batch // examples))]
    return torch.cat(epochs)[: steps * batch].view(steps, batch)


@torch.no_grad()
def evaluate(arm, splits, samples, seed, device):
    """{split: metrics}: at the means, or for `samples` > 0 averaged over draws, dropout's where there are no others."""
    arm.model.eval()
    torch.manual_seed(seed)
    if samples:
        with arm.stochastic():
            found = {name: _probabilities(arm.model, split, samples, device) for name, split in splits.items()}
    else:
        found = {name: _probabilities(arm.model, split, 1, device) for name, split in splits.items()}
    metrics = {name: _metrics(p, splits[name].labels) for name, p in found.items() if name != "oos"}
    if "oos" in found:
        confidence = torch.cat([found["test"], found["oos"]]).amax(1)
        inside = torch.arange(len(confidence)) < len(found["test"])
        metrics["oos"] = {"auroc": float(roc_auc_score(inside, confidence))}
    return metrics


def _probabilities(model, split, samples, device):
    """Class probabilities (n, classes) on the CPU, averaged over the calls."""
    found = None
    for arguments, _, indices in split.batches(EVALUATION_BATCH, device):
        p = sum(model(**arguments).float().softmax(-1) for _ in range(samples)).cpu() / samples
        found = p.new_empty((len(split), p.shape[1])) if found is None else found
        found[indices] = p
    return found


def _metrics(probabilities, labels):
    """Of class probabilities (n, classes) and labels (n,): a dict of numbers, and "bins" as `calibration` has them."""
    probabilities = probabilities.double()
    confidence, predicted = probabilities.max(1)
    error, bins = calibration(confidence.numpy(), (predicted == labels).double().numpy())
    return {
        "accuracy": float(accuracy_score(labels, predicted)),
        "mcc": float(matthews_corrcoef(labels, predicted)),
        # Not sklearn's log_loss: it warns of fp32 probabilities, which sum to 1 within 1e-7.
        "nll": F.nll_loss(probabilities.clamp_min(SMALLEST).log(), labels).item(),
        "ece": error,
        "bins": bins,
    }


def _saved(arm, split, batch, device):
    """Bytes that autograd keeps for backward of one batch, parameters and buffers left out: an exact count."""
    arm.training_mode()
    arguments, labels = split.batch(range(min(batch, len(split))), device)
    parameters, buffers = dict(arm.model.named_parameters()), list(arm.model.buffers())
    step = SimpleNamespace(forward=lambda: (arm.loss(arguments, labels),), parameters=parameters, buffers=buffers)
    *_, others = saved_bytes(step, ())
    return others


def _peak_bytes(device):
    """Of device memory; on a CPU the largest so far of the whole process, which no arm has for itself."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def _posteriors(model):
    """{layer: [signal to noise of the scales, of the shifts, KL in nats]} where there are posteriors that sample."""
    if not any(layer.posterior == "sampled" for layer in klnorm.kl_layers(model).values()):
        return {}
    layers = klnorm.summary(model).layers
    return {name: [round(v, 4) for v in (row.scale.snr, row.shift.snr, row.kl)] for name, row in layers.items()}
