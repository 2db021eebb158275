"""What is run, in which order, and which settings the trials chose. The reasons: study/PLAN.md."""

import json
import math
import statistics
from typing import NamedTuple

from .arms import ARMS
from .data import TASKS

BASELINE, PRIMARY = "layer_norm", "kl_sample"
ATTRIBUTIONS = (
    ("kl_sample", "noise_only", "what KL and learned deviations add to noise"),
    ("kl_sample", "kl_only", "what noise adds to the KL"),
    ("kl_affine", "affine_lr", "noise and KL, at the rates of kl_affine"),
    ("kl_affine", "kl_example", "what the rates of kl_affine add to KL / examples"),
    ("kl_example", "kl_sample", "KL / examples instead of KL / parameters"),
    ("kl_example", "more_dropout", "scale and shift drawn, instead of dropout 0.25"),
)
SEEDS = range(10)
SAMPLES = 8
TEST = 300  # examples, at most, of every test set


class Tuning(NamedTuple):
    """Trials on development seeds whose choice holds for all tasks of a kind."""

    tasks: tuple
    seeds: tuple


TUNING = {"text": Tuning(("trec",), (1000, 1001)), "speech": Tuning(("fsdd",), (1000, 1001))}
REPORTED = "trec", "sst2", "fsdd"
REPLICATED = "sick", "cola", "banking77", "clinc150"  # tasks of the replication alone
LEAD_ARMS = "layer_norm", "l2_sp", "kl_sample", "affine_lr", "kl_affine"
CONTROLS = "kl_example", "more_dropout"
MODES = {"mean": "means", "mc": "Monte Carlo"}
FEW_ARMS = {
    # The longest texts; for time: the baselines that train alike, the primary arm, its ablations, the last norm alone.
    "sst2": ("dropout", "kl_last", "noise_only", "kl_only", *LEAD_ARMS, *CONTROLS),
    **dict.fromkeys(REPLICATED, LEAD_ARMS),
    # Where kl_affine gains: is it the learning rate, or the weight of the KL, or any noise of that size?
    **dict.fromkeys(("sick", "cola"), (*LEAD_ARMS, *CONTROLS)),
    # From scratch all learns fast enough for scales and shifts to move.
    "fsdd": tuple(name for name in ARMS if name not in ("affine_lr", "kl_affine", *CONTROLS)),
}
LATER = {  # arms on tasks that were reported before
    **dict.fromkeys(("trec", "sick", "cola"), CONTROLS),
    "sst2": ("affine_lr", "kl_affine", *CONTROLS),
}


class Lead(NamedTuple):
    """A primary comparison of the replication: test NLL of `arm` minus `baseline`'s, in a mode of MODES, on `tasks`.

    `seen`: the tasks on which it was seen before.
    """

    arm: str
    baseline: str
    mode: str
    tasks: tuple
    seen: tuple


LEADS = {
    "A": Lead("kl_sample", BASELINE, "mc", REPLICATED, REPORTED),
    "B": Lead("kl_affine", BASELINE, "mc", ("sst2", *REPLICATED), ("trec",)),
    "C": Lead("kl_affine", "affine_lr", "mean", ("sst2", *REPLICATED), ("trec",)),
}


class Sizes(NamedTuple):
    """What options of the command make other than planned; None: as the task has it."""

    model: str
    steps: int | None = None
    train: int | None = None
    test: int = TEST
    samples: int = SAMPLES
    hub: bool = False


def kind(task):
    return "speech" if task.speech else "text"


def arms_for(task):
    """Names of the arms planned for a task; two need a pretrained model, which speech has not."""
    planned = FEW_ARMS.get(task.name, ARMS)
    return [name for name, arm in ARMS.items() if name in planned and not (task.speech and arm.NEEDS_PRETRAINED)]


def configuration(stage, task, arm, seed, settings, sizes):
    """What the numbers of a run depend on beside the code: the key of its line. `settings` as in an arm's GRID."""
    return {
        "stage": stage, "task": task.name, "arm": arm, "seed": seed,
        "settings": {**settings, "lr": settings["lr"] * task.base_lr},
        "model": "" if task.speech else sizes.model, "steps": sizes.steps or task.steps,
        "train": sizes.train or task.train, "test": sizes.test, "samples": sizes.samples,
        **({"data": "hub"} if sizes.hub and not task.speech else {}),
    }  # fmt: skip


def key(config):
    return json.dumps(config, sort_keys=True)


def trials(kinds, sizes):
    """Configurations of the tuning: four settings of every arm, one development seed after the other."""
    return [
        configuration("tune", TASKS[name], arm, seed, settings, sizes)
        for k in kinds
        for seed in TUNING[k].seeds
        for name in TUNING[k].tasks
        for arm in arms_for(TASKS[name])
        for settings in ARMS[arm].GRID
    ]


def chosen(lines, kind_, arm, sizes):
    """The settings of an arm with the least NLL on development examples, in units of log(classes), over the trials.

    None while a trial is missing.
    """
    found = {key(line["config"]): line["result"]["metrics"]["mean"]["dev"]["nll"] for line in lines}
    losses = {}
    for i, settings in enumerate(ARMS[arm].GRID):
        runs = [
            (TASKS[name], configuration("tune", TASKS[name], arm, seed, settings, sizes))
            for seed in TUNING[kind_].seeds
            for name in TUNING[kind_].tasks
        ]
        if not all(key(config) in found for _, config in runs):
            return None
        loss = statistics.mean(found[key(config)] / math.log(task.classes) for task, config in runs)
        losses[i] = math.inf if math.isnan(loss) else loss
    return ARMS[arm].GRID[min(losses, key=losses.get)]


def reporting(names, seeds, lines, sizes):
    """Configurations of the reporting runs, a whole seed before the next, so that any part of them is balanced."""
    tuned = [line for line in lines if line["config"]["stage"] == "tune"]
    settings = {
        (k, arm): chosen(tuned, k, arm, sizes)
        for k in {kind(TASKS[name]) for name in names}
        for arm in arms_for(TASKS[TUNING[k].tasks[0]])
    }
    missing = sorted(f"{k}: {arm}" for (k, arm), value in settings.items() if value is None)
    if missing:
        raise ValueError(
            f"the trials of {', '.join(missing)} are not complete, expected all, with the same sizes. "
            "Remedy: python -m study tune."
        )
    return [
        configuration("report", TASKS[name], arm, seed, settings[kind(TASKS[name]), arm], sizes)
        for seed in seeds
        for name in names
        for arm in arms_for(TASKS[name])
    ]
