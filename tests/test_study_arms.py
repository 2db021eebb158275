"""The study: what its arms do to a model, a loss and a prediction."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from study_inputs import a_batch, classifier
from torch import nn

import klnorm
from study import arms, baselines

pytest.importorskip("transformers")

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("name", list(arms.ARMS))
def test_every_arm_has_four_settings(name):
    grid = arms.ARMS[name].GRID
    assert len(grid) == len({json.dumps(g, sort_keys=True) for g in grid}) == 4
    assert {"lr"} <= set(grid[0])


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
    mixout = baselines._Mixout(pretrained, p)
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
    own = name in ("vib", "noise_only", "conditional") or (name.startswith("kl_") and name != "kl_only")
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
    rho = groups.get("rho", {"params": [], "lr": baselines.RHO_LR})
    assert len(rho["params"]) == deviations
    assert rho["lr"] == 1e-2
    everything = [p for group in groups.values() for p in group["params"]]
    assert sorted(map(id, everything)) == sorted(id(p) for p in model.parameters() if p.requires_grad)
