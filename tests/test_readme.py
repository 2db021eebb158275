"""What README, docs and docstrings show, run as it stands there; the figures and links of all documents."""

import contextlib
import doctest
import importlib
import itertools
import json
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import nn
from torch.distributed import fsdp

import klnorm
from bench import table

ROOT = Path(__file__).parent.parent
# Their Python is run.
GUIDES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
DOCUMENTS = [*GUIDES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
DOCUMENTS += sorted(path for folder in ("bench", "study") for path in ROOT.glob(f"{folder}/**/*.md"))
WORDS = 1000  # what README says is read in five minutes


def read(name):
    return (ROOT / name).read_text(encoding="utf-8")


def test_readme_is_short_and_says_in_its_third_line_what_the_study_found():
    assert len(read("README.md").split()) <= WORDS
    assert "not more accurate than LayerNorm" in read("README.md").splitlines()[2]


def test_changelog_begins_with_this_version():
    (version, *_) = re.findall(r"^## (\S+) - \d{4}-\d\d-\d\d$", read("CHANGELOG.md"), re.MULTILINE)
    assert version == klnorm.__version__


def anchors(text):
    """GitHub's names of the headings in Markdown."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), re.MULTILINE)
    return [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_to_files_and_headings_of_the_repository(path):
    text = path.read_text(encoding="utf-8")
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if link.startswith("https://"):
            continue
        name, _, heading = link.partition("#")
        target = (path.parent / name).resolve() if name else path
        assert target.is_relative_to(ROOT), link
        assert target.exists(), link
        assert not heading or heading in anchors(target.read_text(encoding="utf-8")), link


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_documents_named_in_backquotes_are_in_the_repository(path):
    for name in re.findall(r"`([\w./-]+\.md)`", path.read_text(encoding="utf-8")):
        assert (ROOT / name).exists() or (path.parent / name).exists(), name


@pytest.mark.parametrize("path", GUIDES[1:], ids=lambda path: path.name)
def test_readme_links_to_every_guide(path):
    assert f"(docs/{path.name})" in read("README.md")


def unpadded(text):
    """Tables without the width of their columns."""
    return re.sub(r":?-+:?\|", "---|", re.sub(r" *\| *", "|", text.strip()))


def test_memory_table_is_that_of_the_result_file(capsys):
    table.main(["bench/results/memory_cpu.json"])
    assert unpadded(capsys.readouterr().out) in unpadded(read("bench/README.md"))


@pytest.mark.parametrize(("kind", "guide"), [("norms", "docs/speed.md"), ("train_step", "README.md")])
def test_speed_tables_are_those_of_the_newest_result_files(capsys, kind, guide):
    results = Path("bench/results").glob(f"{kind}_*.json")
    newest = max(results, key=lambda path: json.loads(path.read_text(encoding="utf-8"))["environment"]["time"])
    table.main([str(newest), "--short"])
    assert unpadded(capsys.readouterr().out) in unpadded(read(guide))
    assert f"python -m bench.table {newest}" in read(guide)


def test_operations_of_a_step_are_those_of_the_result_file():
    result = json.loads(Path("bench/results/operations_cpu.json").read_text(encoding="utf-8"))
    counts = {(r["norm"], r["mode"]): f"{r['launches']:,}" for r in result["records"]}
    ours, plain = ([counts[norm, mode] for mode in ("eager", "compiled")] for norm in ("klnorm, sample", "LayerNorm"))
    text = " ".join(read("bench/README.md").split())
    assert f"{ours[0]} in eager mode ({plain[0]} with nn.LayerNorm), {ours[1]} compiled ({plain[1]})" in text


def blocks():
    """The Python of all guides."""
    text = "\n".join(path.read_text(encoding="utf-8") for path in GUIDES)
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


def run(containing, namespace=None, **names):
    """Run the one block that contains the words, with these names around it; return its names."""
    (code,) = [code for code in blocks() if containing in code]
    namespace = {} if namespace is None else namespace
    namespace.update({"torch": torch, "F": F, "klnorm": klnorm, **names})
    exec(code, namespace)
    return namespace


def small_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 3))


def test_ten_lines():
    model = small_model()
    before = [p.clone() for p in model.parameters()]
    x, target = torch.randn(6, 4), torch.randint(3, (6,))
    names = run("for x, target in batches", model=model, batches=[(x, target)] * 3, num_examples=6)
    assert type(model[1]) is nn.LayerNorm
    assert not any(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    assert names["kl_weight"].steps == 3


@pytest.mark.usefixtures("inductor")
def test_a_compiled_loss(device):
    model = klnorm.replace_layer_norm(small_model().to(device))
    x, target = torch.randn(6, 4, device=device), torch.randint(3, (6,), device=device)
    kl_weight = klnorm.KLWeight(num_examples=6, device=device)
    names = run("torch.compile(loss_of)", model=model, x=x, target=target, kl_weight=kl_weight)
    assert all((p.grad != 0).any() for p in klnorm.kl_layers(model)["1"].parameters())
    losses = []
    for loss_of in names["compiled_loss"], names["loss_of"]:
        torch.manual_seed(3)
        losses.append(loss_of(x, target))
    assert device.type == "cuda" or torch.isclose(*losses)  # seeds are drawn in another way there
    assert names["compiled_loss"](x, target) != losses[0]


def without_a_gpu(monkeypatch, replays):
    """A stream that is none, and a graph that calls `replays` to replay."""

    class Stream(contextlib.nullcontext):
        def wait_stream(self, other):
            assert isinstance(other, Stream)

    class CUDAGraph:
        def replay(self):
            replays()

    stand_ins = {
        "Stream": Stream, "current_stream": Stream, "stream": lambda stream: stream, "CUDAGraph": CUDAGraph,
        "graph": lambda graph: contextlib.nullcontext(),
    }  # fmt: skip
    for name, stand_in in stand_ins.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)


@pytest.mark.own_process
def test_a_captured_step(device, monkeypatch):
    """Without a GPU, that the lines fit together: its stand-in for a graph runs the step again."""
    model, names = klnorm.replace_layer_norm(small_model().to(device)), {}
    if device.type != "cuda":
        without_a_gpu(monkeypatch, lambda: seen.append(names["step"]()))
    seen, weights = [], []
    x, target = torch.randn(6, 4, device=device), torch.randint(3, (6,), device=device)
    optimizer = torch.optim.AdamW(model.parameters(), capturable=device.type == "cuda")
    kl_weight = klnorm.KLWeight(num_examples=1, warmup_steps=4, device=device)

    def batches():
        for _ in range(4):
            weights.append(model[0].weight.detach().clone())
            yield torch.randn(6, 4), torch.randint(3, (6,))

    names.update(model=model, x=x, target=target, optimizer=optimizer, kl_weight=kl_weight, batches=batches())
    run("CUDAGraph()", names)
    assert kl_weight.steps == 4
    assert all(not torch.equal(a, b) for a, b in itertools.pairwise(weights))
    if device.type != "cuda":
        assert len(seen) == 4
        return
    names["graph"].replay()
    torch.cuda.synchronize()
    first = names["loss"].item()
    names["graph"].replay()
    assert names["loss"].item() != first


def bert():
    config = transformers.BertConfig(
        vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8
    )
    return transformers.BertForSequenceClassification(config)


def test_trainer_and_checkpoint(tmp_path):
    examples = [{"input_ids": torch.randint(20, (4,)), "labels": i % 2} for i in range(4)]
    arguments = transformers.TrainingArguments(
        str(tmp_path), max_steps=2, report_to="none", use_cpu=True, disable_tqdm=True, save_strategy="no"
    )
    names = run("KLTrainer(", model=bert(), arguments=arguments, train_dataset=examples)
    trained = names["model"]
    assert names["trainer"].kl_weight.value == 1 / 4
    assert "kl" in names["trainer"]._kl_logs
    trained.save_pretrained(tmp_path)
    bert_class = transformers.BertForSequenceClassification
    model = run("class KLBert", BertForSequenceClassification=bert_class, directory=tmp_path)["model"]
    assert model.state_dict().keys() == trained.state_dict().keys()
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in trained.state_dict().items())


def test_lightning():
    lightning = importlib.import_module("lightning")
    options = {"logger": False, "enable_checkpointing": False, "accelerator": "cpu", "enable_model_summary": False}
    names = run("KLCallback(", lightning=lightning, num_examples=10, options=options)
    assert names["callback"] in names["trainer"].callbacks


class Blocks(nn.Sequential):
    """A block with a norm in it, and a head."""

    def __init__(self):
        super().__init__(nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8)), nn.Linear(8, 3))
        self.blocks = [self[0]]


def train_distributed(sharded):
    wrappers = {"DistributedDataParallel": nn.parallel.DistributedDataParallel, "fully_shard": fsdp.fully_shard}
    policy = fsdp.MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    names = run("get_rank()", make_model=Blocks, sharded=sharded, policy=policy, **wrappers)
    model, x, target = names["model"], torch.randn(6, 4), torch.randint(3, (6,))
    loss = F.cross_entropy(model(x).float(), target) + klnorm.kl_divergence(model) / 6
    loss.backward()
    (layer,) = klnorm.kl_layers(model).values()
    assert klnorm.compat.whole(layer.weight_rho.grad).abs().min() > 0


@pytest.mark.parametrize("sharded", [False, True])
def test_distributed(sharded):
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        train_distributed(sharded)  # a DDP model that outlives its group can wait for gloo's thread for ever
    finally:
        torch.distributed.destroy_process_group()
    assert torch.initial_seed() == 1234


def test_prediction_and_inspection(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names = run("mc_predict", model=klnorm.replace_layer_norm(small_model()), inputs=torch.randn(5, 4))
    assert "signal/noise" in capsys.readouterr().out
    assert (tmp_path / "summary.png").stat().st_size > 1000
    assert names["logger_values"]["klnorm/kl"] > 0
    assert names["prediction"].entropy.shape == (5,)


def test_every_block_is_run():
    source = Path(__file__).read_text(encoding="utf-8")
    wanted = re.findall(r'run\(\s*"([^"]+)"', source)
    assert sorted(sum(word in code for code in blocks()) for word in wanted) == [1] * len(blocks())


@pytest.mark.parametrize(
    "module",
    [
        "choice",
        "conditional",
        "functional",
        "kl",
        "layers",
        "plots",
        "predict",
        "replace",
        "report",
        "training",
        "integrations.transformers",
        "integrations.lightning",
    ],
)
def test_docstring_examples(module):
    names = {"torch": torch, "nn": nn, "F": F, "klnorm": klnorm}
    failed, attempted = doctest.testmod(importlib.import_module(f"klnorm.{module}"), extraglobs=names)
    assert attempted > 0
    assert failed == 0
