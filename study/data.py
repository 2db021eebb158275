"""The tasks: few labelled examples for training, and test sets in and out of their domain."""

import gzip
import json
from collections import defaultdict
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tabulate import tabulate
from torch.nn.utils.rnn import pad_sequence

from . import speech

SUBSET_SEED = 20261124  # of the test subsets, the same in every run
MAX_TOKENS = 40
DEV_PER_TASK = 300  # of the training file, never trained on by anyone: what settings are chosen by


class Source(NamedTuple):
    """Where the `datasets` library finds a split: arguments of load_dataset, their split, our column -> theirs.

    `outside`: name of their class of what is out of scope, which is no class of ours.
    """

    name: tuple
    split: str
    columns: dict
    outside: str | None = None


def _hub(*name, train="train", test="test", outside=None, ood=None, text="text", label="label", text_b=None):
    """{our split: Source} of a task whose splits lie in one place, `ood`'s excepted."""
    columns = {"text": text, **({"text_b": text_b} if text_b else {}), "label": label}
    found = {ours: Source(name, theirs, columns, outside) for ours, theirs in (("train", train), ("test", test))}
    if outside:
        found["oos"] = found["test"]
    return {**found, **({"ood": ood} if ood else {})}


@dataclass(frozen=True)
class Task:
    """A task of the study.

    `train` examples are drawn by the seed, equally many of each class. `files`: our split -> name of the file of the
    data folder; "oos" has no labels. `metric`: "accuracy" or "mcc". `hub`: our split -> Source, where the hub has it.
    """

    name: str
    classes: int
    train: int
    batch: int
    steps: int
    base_lr: float
    files: dict = field(default_factory=dict)
    metric: str = "accuracy"
    hub: dict | None = None

    @property
    def speech(self):
        return not self.files


def _text(name, classes, train, batch=8, metric="accuracy", ood=None, test="test", hub=None, **more):
    files = {"train": f"{name}.train", "test": f"{name}.{test}", **({"ood": ood} if ood else {}), **more}
    return Task(name, classes, train, batch, 200, 5e-5, files, metric, hub)


TASKS = {
    task.name: task
    for task in (
        _text("trec", 6, 96, hub=_hub("CogComp/trec", label="coarse_label")),
        _text(
            "sst2", 2, 100, ood="sst2.ood",
            hub=_hub(
                "nyu-mll/glue", "sst2", test="validation", text="sentence",
                ood=Source(("SetFit/CR",), "test", {"text": "text", "label": "label"}),
            ),
        ),
        Task("fsdd", 10, 100, 16, 400, 5e-4),
        _text("sick", 3, 99, hub=_hub("RobZamp/sick", text="sentence_A", text_b="sentence_B")),
        # The hub's validation set is in and out of domain at once, so that there is no "ood" there.
        _text(
            "cola", 2, 100, metric="mcc", test="dev", ood="cola.ood",
            hub=_hub("nyu-mll/glue", "cola", test="validation", text="sentence"),
        ),
        _text("banking77", 77, 308, batch=16, hub=_hub("PolyAI/banking77")),
        _text(
            "clinc150", 150, 300, batch=16, oos="clinc150.oos",
            hub=_hub("clinc/clinc_oos", "small", label="intent", outside="oos"),
        ),
    )
}  # fmt: skip


@dataclass
class Split:
    """Examples on the CPU: `inputs`, token ids (length,) or frames (length, bands) each, and `labels` (n,).

    `segments`: which sentence of a pair a token belongs to, like `inputs`; None where there are no pairs.
    """

    inputs: list
    labels: torch.Tensor
    segments: list | None = None

    def __len__(self):
        return len(self.inputs)

    def take(self, indices):
        pick = [int(i) for i in indices]
        segments = None if self.segments is None else [self.segments[i] for i in pick]
        return Split([self.inputs[i] for i in pick], self.labels[pick], segments)

    def batch(self, indices, device):
        """(keyword arguments of the classifier, labels) of some examples, padded to the longest of them."""
        part = self.take(indices)
        lengths = torch.tensor([len(x) for x in part.inputs])
        arguments = {
            "inputs": pad_sequence(part.inputs, batch_first=True),
            "mask": (torch.arange(int(lengths.max())) < lengths[:, None]).long(),
        }
        if part.segments is not None:
            arguments["segments"] = pad_sequence(part.segments, batch_first=True)
        return {name: value.to(device) for name, value in arguments.items()}, part.labels.to(device)

    def batches(self, size, device):
        """All examples, those of about one length together, and their places: (arguments, labels, indices)."""
        order = sorted(range(len(self)), key=lambda i: len(self.inputs[i]))
        for start in range(0, len(order), size):
            indices = order[start : start + size]
            yield *self.batch(indices, device), indices


def balanced(labels, classes, count, seed):
    """`count` // `classes` indices of every class, drawn by `seed`, in random order."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(labels), generator=generator)
    shuffled = labels[order]
    chosen = torch.cat([order[shuffled == c][: count // classes] for c in range(classes)])
    if len(chosen) < count // classes * classes:
        raise ValueError(f"train is {count}, but some class has fewer than {count // classes} examples.")
    return chosen[torch.randperm(len(chosen), generator=generator)]


def subset(length, count):
    """At most `count` indices out of `length`, the same in every run."""
    return torch.randperm(length, generator=torch.Generator().manual_seed(SUBSET_SEED))[:count]


def splits_of(task, seed, source, tokenizer, train, test):
    """{"train", "dev", "test"[, "ood", "oos"]: Split} of a seed.

    `train` examples, about; at most `test` examples in each of the test sets. Development examples are the same for
    every seed of a text task and are not trained on by any. `source`: see `text_rows` and `speech.recordings`.
    """
    if task.speech:
        return _speech_splits(task, seed, source, train, test)
    names = task.hub if source == "hub" else task.files
    encoded = {name: _encode(task.name, name, source, tokenizer) for name in names}
    dev = subset(len(encoded["train"]), DEV_PER_TASK)
    rest = torch.ones(len(encoded["train"]), dtype=torch.bool)
    rest[dev] = False
    pool = encoded["train"].take(rest.nonzero().flatten())
    found = {"train": pool.take(balanced(pool.labels, task.classes, train, seed)), "dev": encoded["train"].take(dev)}
    for name in names:
        if name != "train":
            found[name] = encoded[name].take(subset(len(encoded[name]), test))
    found["dev"] = found["dev"].take(range(min(test, len(dev))))
    return found


def _speech_splits(task, seed, source, train, test):
    """One speaker is held out, in turn by seed: "ood". Of the others, takes are for "train", "dev" or "test"."""
    recordings = speech.recordings(source)
    digits, takes = torch.from_numpy(recordings["digit"]).long(), recordings["take"]
    speakers = sorted(set(recordings["speaker"].tolist()))
    held_out = recordings["speaker"] == speakers[seed % len(speakers)]
    pools = {
        "train": ~held_out & (takes % 3 == 0),
        "dev": ~held_out & (takes % 3 == 1),
        "test": ~held_out & (takes % 3 == 2),
        "ood": held_out,
    }
    found = {}
    for name, chosen in pools.items():
        places = torch.from_numpy(np.flatnonzero(chosen))
        picked = balanced(digits[places], task.classes, train, seed) if name == "train" else subset(len(places), test)
        places = places[picked]
        found[name] = Split([speech.frames(source, int(i)) for i in places], digits[places])
    return found


# ---- Text ------------------------------------------------------------------------------------------------------------


def text_rows(task, split, source):
    """Rows {"text"[, "text_b"], "label"} of a split; `source`: a folder, or "hub"."""
    if source == "hub":
        return _hub_rows(task, split)
    path = Path(source) / f"{task.files[split]}.jsonl.gz"
    if not path.exists():
        raise ValueError(
            f"data is {source}, which holds no {path.name}. Remedy: python -m study data says what is needed."
        )
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def _hub_rows(task, split):
    if split not in task.hub:
        raise ValueError(f"{task.name} has no split {split!r} on the hub. Remedy: --data DIR, which has it.")
    from datasets import load_dataset

    name, theirs, columns, outside = task.hub[split]
    found = load_dataset(*name, split=theirs)
    rows = [{ours: row[column] for ours, column in columns.items()} for row in found]
    if outside is None:
        return rows
    place = found.features[columns["label"]].names.index(outside)
    if split == "oos":
        return [{**row, "label": -1} for row in rows if row["label"] == place]
    return [{**row, "label": row["label"] - (row["label"] > place)} for row in rows if row["label"] != place]


@cache
def _encode(name, split, source, tokenizer):
    rows = text_rows(TASKS[name], split, source)
    pairs = [row["text_b"] for row in rows] if "text_b" in rows[0] else None
    encoded = tokenizer([row["text"] for row in rows], pairs, truncation=True, max_length=MAX_TOKENS)
    tensors = [torch.tensor(ids) for ids in encoded["input_ids"]]
    segments = [torch.tensor(ids) for ids in encoded["token_type_ids"]] if pairs else None
    return Split(tensors, torch.tensor([row["label"] for row in rows]), segments)


# ---- What is needed --------------------------------------------------------------------------------------------------

NEEDED = """\
Text, with --hub by name (pip install datasets):

{hub}

or with --data DIR from files DIR/NAME.jsonl.gz, lines of {{"text": ..., "label": 0}}, of pairs with "text_b" besides:

{files}

Speech, from DIR/{archive}. Download this archive ({license}) and unpack it,
    {url}
then: python -m study data --recordings UNPACKED/recordings --data DIR"""


def needed(names):
    """What the tasks of these names need, and how to get it: a text."""
    hub, files = [], []
    for task in (TASKS[name] for name in names if not TASKS[name].speech):
        splits = defaultdict(dict)
        for source in task.hub.values():
            splits[" ".join(source.name)][source.split] = None
        hub.append([task.name, ", ".join(f"{name} ({', '.join(found)})" for name, found in splits.items())])
        files.append([task.name, ", ".join(task.files.values())])
    hub, files = (tabulate(rows, tablefmt="plain") for rows in (hub, files))
    return NEEDED.format(hub=hub, files=files, archive=speech.ARCHIVE, url=speech.URL, license=speech.LICENSE)
