"""What the tests of the study share: a tiny model, tiny data, made-up lines, and the cells of the report's tables."""

import gzip
import itertools
import json
import re

import numpy as np
import torch
from torch import nn

from study import arms, models, plan, training
from study.data import TASKS

WORDS = ["what", "who", "where", "is", "the", "capital", "of", "france", "a", "digit", "one", "two"]
TREC, CLINC, FSDD = (TASKS[name] for name in ("trec", "clinc150", "fsdd"))
CPU = torch.device("cpu")
SIZES = plan.Sizes("", steps=3, train=20, test=10, samples=2)


def make_model(folder):
    """Save a BERT of 16 features with random weights and a vocabulary of a dozen words."""
    import transformers

    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    (folder / "vocab.txt").write_text("\n".join(vocabulary))
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(vocabulary), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
        max_position_embeddings=64,
    )  # fmt: skip
    model = transformers.BertModel(config)
    for norm in model.modules():
        if isinstance(norm, nn.LayerNorm):  # as training leaves them: not 1 and 0
            nn.init.normal_(norm.weight, 1.0, 0.2)
            nn.init.normal_(norm.bias, 0.0, 0.2)
    model.save_pretrained(folder)
    transformers.BertTokenizerFast(vocab={word: i for i, word in enumerate(vocabulary)}).save_pretrained(folder)


def write_rows(path, rows):
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def sentences(count, classes, seed):
    generator = np.random.default_rng(seed)
    return [
        {"text": " ".join(generator.choice(WORDS, generator.integers(2, 9))), "label": i % classes}
        for i in range(count)
    ]


def make_data(folder):
    """Write trec and clinc150 of random words, recordings of noise by three speakers."""
    for name, count, classes, seed in (
        ("trec.train", 420, 6, 1),
        ("trec.test", 30, 6, 2),
        ("clinc150.train", 750, 150, 3),
        ("clinc150.test", 30, 150, 4),
    ):
        write_rows(folder / f"{name}.jsonl.gz", sentences(count, classes, seed))
    write_rows(folder / "clinc150.oos.jsonl.gz", [{**row, "label": -1} for row in sentences(12, 2, 5)])
    who, digit, take = (np.array(v) for v in zip(*itertools.product("abc", range(10), range(9)), strict=True))
    lengths = np.random.default_rng(0).integers(150, 1500, len(who))
    np.savez(
        folder / "fsdd.npz", audio=np.random.default_rng(1).integers(-3000, 3000, lengths.sum()).astype(np.int16),
        offset=np.concatenate([[0], lengths.cumsum()]), digit=digit.astype(np.int8), speaker=who,
        take=take.astype(np.int16), sample_rate=np.int32(8000),
    )  # fmt: skip


def run_of(task, arm, model_folder, data_folder, seed=0, stage="report", sizes=SIZES, settings=None):
    sizes = sizes._replace(model=model_folder)
    settings = settings or arms.ARMS[arm].GRID[0]
    return training.run(plan.configuration(stage, task, arm, seed, settings, sizes), data_folder, "cpu")


def classifier(model_folder, seed=0):
    return models.make_classifier(TREC, seed, model_folder, CPU)


def a_batch():
    tokens = torch.tensor([[2, 5, 6, 3, 0, 0], [2, 7, 8, 9, 10, 3]])
    return {"inputs": tokens, "mask": (tokens != 0).long()}, torch.tensor([1, 4])


def report_line(task, arm, seed, metrics):
    """A line of a reporting run: `metrics` are those of its result."""
    return {
        "config": plan.configuration("report", TASKS[task], arm, seed, arms.ARMS[arm].GRID[0], plan.Sizes("m")),
        "result": {
            "metrics": metrics, "parameters": 10, "saved_bytes": 20, "peak_bytes": 30, "seconds": 1.0, "step_ms": 2.0,
            "layers": {"a": [0.1, 0.2, 3.0], "b": [0.3, 0.1, 2.0]} if arm.startswith("kl_") else {},
        },
        "environment": {"device": "a device", "torch": "2", "commit": "abc"},
    }  # fmt: skip


def made_up_lines(seeds=5, better=0.1, tasks=("trec", "sst2", "fsdd")):
    """Runs in which kl_sample has a test NLL lower by about `better`, all else random."""
    generator = np.random.default_rng(0)
    for seed, task, arm in ((s, t, a) for s in range(seeds) for t in tasks for a in plan.arms_for(TASKS[t])):

        def metrics(shift=0.0):
            nll = 0.6 + 0.01 * generator.normal() - shift
            bins = [[3, 0.5, 0.4]] * 10
            return {"accuracy": 0.8 + 0.02 * generator.normal(), "nll": nll, "ece": 0.1, "mcc": 0.7, "bins": bins}

        shift = better if arm == "kl_sample" else 0.0
        found = {"mean": {"train": metrics(), "test": metrics(shift)}, "mc": {"test": metrics(shift)}}
        for mode in found if task != "trec" else ():
            found[mode]["ood"] = metrics()
        yield report_line(task, arm, seed, found)


def squeezed(text):
    """A text without the spaces that make columns of its tables equally wide."""
    return re.sub(" {2,}", " ", text)


def rows_of(text, title):
    """Header and rows of the first table whose header begins so: lists of cells."""
    lines = squeezed(text).splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(f"| {title}"))
    table = itertools.takewhile(lambda line: line.startswith("|"), lines[start:])
    header, _, *rows = ([cell.strip() for cell in line[2:-2].split(" | ")] for line in table)
    return header, {row[0]: dict(zip(header, row, strict=True)) for row in rows}
