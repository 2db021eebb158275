"""The KL divergence is that of the last forward where its graph may be used, else the closed form."""

import copy

import pytest
import torch
from kl_models import (
    Checkpointed,
    N,
    assert_exact,
    assert_same,
    batch,
    closed_form,
    gradients_of,
    is_attached,
    small_model,
)
from torch import nn

import klnorm
from klnorm import kl_divergence

# The last forward, or the closed form


def test_the_last_forward_is_used_while_a_following_layer_keeps_the_output(device):
    model = small_model(device)
    assert_exact(model, attached=False)
    loss = model(batch(device)).square().sum()
    kl = kl_divergence(model)
    assert is_attached(kl)
    data, kl_grads = gradients_of(loss, model), closed_form(model)[1]
    (loss + 0.1 * kl).backward()
    by_hand = {name: grad + (0 if kl_grads[name] is None else 0.1 * kl_grads[name]) for name, grad in data.items()}
    assert_same({name: p.grad for name, p in model.named_parameters()}, by_hand)
    assert_exact(model, attached=False)  # that graph is spent


def test_the_last_forward_is_used_for_inputs_of_any_dimension(device):
    """A linear layer saves of (2, 5, 4) not that tensor but a view of it, which must keep that tensor."""
    model = small_model(device)
    loss = model(torch.stack([batch(device), batch(device)])).square().sum()
    assert_exact(model, attached=True)
    assert loss.requires_grad


def test_value_and_gradient_of_the_last_forward(device):
    model = small_model(device)
    y = model(batch(device))
    assert_exact(model, attached=True)
    assert y.requires_grad


def test_an_output_that_nobody_keeps_has_its_kl_all_the_same(device):
    model = small_model(device, following=nn.Dropout)  # which saves its mask alone
    loss = model(batch(device)).square().sum()
    assert_exact(model, attached=True)
    (loss + kl_divergence(model)).backward()
    assert_exact(model, attached=False)


def test_the_kl_can_be_taken_again_while_somebody_holds_it(device):
    model = small_model(device)
    y = model(batch(device))
    loss = y.square().sum() + kl_divergence(model)
    for _ in range(2):
        assert is_attached(kl_divergence(model))
    assert_exact(model, attached=True)  # which differentiates it
    del loss
    assert_exact(model, attached=False)
    with torch.no_grad():
        model(batch(device))


def test_looking_without_gradients_does_not_take_the_kl(device):
    model = small_model(device)
    y = model(batch(device))
    with torch.no_grad():
        value = kl_divergence(model)
    torch.testing.assert_close(value, closed_form(model)[0], rtol=1e-12, atol=0)
    assert_exact(model, attached=True)
    assert y.requires_grad


@pytest.mark.parametrize(
    "change",
    [nn.ReLU(inplace=True), lambda y: y.mul_(2), lambda y: y.to(torch.float32), lambda y: y[:1] * 2],
    ids=["relu_in_place", "mul_in_place", "cast", "part"],
)
def test_what_becomes_of_the_output_does_not_matter(device, change):
    model = small_model(device)
    x = batch(device)

    def data_loss():
        torch.manual_seed(1)
        return change(model[1](model[0](x))).sum()

    data, kl_grads = gradients_of(data_loss(), model), closed_form(model)[1]
    loss = data_loss()
    kl = kl_divergence(model)
    assert is_attached(kl)
    both = gradients_of(loss + kl, model)
    for name, grad in both.items():
        expected = [g for g in (data[name], kl_grads[name]) if g is not None]
        assert (grad is None) == (not expected)
        # one of the changes rounds to fp32, the same way both times
        torch.testing.assert_close(grad, sum(expected) if expected else None, rtol=1e-12, atol=1e-12)


def test_each_forward_replaces_the_one_before(device):
    model = small_model(device)
    first = model(batch(device))
    before = kl_divergence(model)
    with torch.no_grad():
        model[1].weight.add_(0.5)
    model(batch(device))
    with torch.no_grad():
        assert kl_divergence(model) != before
    assert_exact(model, attached=True)
    assert_exact(model, attached=False)  # that one has been taken and dropped
    assert first.requires_grad


@pytest.mark.parametrize("retain", [False, True])
def test_after_backward(device, retain):
    model = small_model(device)
    loss = model(batch(device)).square().sum()
    assert is_attached(kl_divergence(model))
    loss.backward(retain_graph=retain)
    assert_exact(model, attached=False)
    kl_divergence(model).backward()
    kl_divergence(model).backward()


def test_after_a_backward_of_the_kl_alone(device):
    model = small_model(device)
    loss = model(batch(device)).square().sum()
    assert is_attached(kl_divergence(model))
    torch.autograd.grad(kl_divergence(model), list(model[1].parameters()))
    assert_exact(model, attached=False)
    assert loss.requires_grad


def test_after_an_optimizer_step_it_has_the_new_values(device):
    model = small_model(device)
    for optimizer in torch.optim.SGD(model.parameters(), 0.1), torch.optim.AdamW(model.parameters(), 0.1):
        before = kl_divergence(model).item()
        loss = model(batch(device)).square().sum() + kl_divergence(model)
        loss.backward()
        optimizer.step()
        assert_exact(model, attached=False)
        assert abs(kl_divergence(model).item() - before) > 1e-3


@pytest.mark.parametrize("name", ["weight", "bias", "weight_rho", "bias_rho", "weight_prior", "bias_prior"])
def test_a_change_between_forward_and_kl_is_seen(device, name):
    model = small_model(device)
    y = model(batch(device))
    assert is_attached(kl_divergence(model))
    with torch.no_grad():
        getattr(model[1], name).add_(0.5)
    assert_exact(model, attached=False)
    assert y.requires_grad


def test_a_new_prior_deviation_between_forward_and_kl_is_seen(device):
    model = small_model(device)
    y = model(batch(device))
    assert is_attached(kl_divergence(model))
    model[1].prior_std = 1.5
    assert_exact(model, attached=False)
    assert y.requires_grad


def lookalike(parameter):
    """Another parameter, of other values, that has been changed in place as often."""
    other = parameter.detach() + 0.5
    while other._version < parameter._version:
        other.add_(0.1)
    return nn.Parameter(other)


def test_replaced_parameters_between_forward_and_kl_are_seen(device):
    model = small_model(device)
    y = model(batch(device))
    assert is_attached(kl_divergence(model))
    for name, p in list(model[1].named_parameters()):
        setattr(model[1], name, lookalike(p))
    assert_exact(model, attached=False)
    assert y.requires_grad


def test_a_forward_without_gradients_leaves_nothing_attached(device):
    model = small_model(device)
    with torch.no_grad():
        y = model(batch(device))
    assert_exact(model, attached=False)
    y = model(batch(device))
    assert is_attached(kl_divergence(model))
    with torch.no_grad():
        quiet = model[1](y.new_ones(3, N))
    assert_exact(model, attached=False)
    assert not quiet.requires_grad
    with torch.no_grad():
        assert not kl_divergence(model).requires_grad


def test_a_forward_in_inference_mode(device):
    model = small_model(device)
    with torch.inference_mode():
        y = model(batch(device))
        value = kl_divergence(model)
    torch.testing.assert_close(value.clone(), closed_form(model)[0], rtol=1e-12, atol=0)
    assert_exact(model, attached=False)
    assert y.is_inference()


def test_evaluation_has_the_same_kl(device):
    model = small_model(device).eval()
    y = model(batch(device))
    assert_exact(model, attached=False)
    assert y.requires_grad


def test_frozen_layers_still_count(device):
    model = small_model(device)
    expected = kl_divergence(model).item()
    model[1].requires_grad_(False)
    y = model(batch(device))
    assert kl_divergence(model).item() == pytest.approx(expected, rel=1e-12)
    assert y.requires_grad


def test_kl_of_a_graph_freed_below_the_layer_raises(device):
    """The documented limit of sharing a node with y: autograd's own error, never a wrong gradient."""
    model = small_model(device)
    hidden = model[0](batch(device))
    y = model[1](hidden)
    hidden.square().sum().backward()  # an auxiliary loss, which frees the graph below the layer
    model.zero_grad()
    with pytest.raises(RuntimeError, match="second time"):
        kl_divergence(model).backward()
    assert y.requires_grad


class WithKL(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model(x), kl_divergence(self.model)


def test_functional_call_with_other_parameters(device):
    model, x = small_model(device), batch(device)
    others = {name: lookalike(p) for name, p in model.named_parameters()}
    y = torch.func.functional_call(model, others, (x,))
    assert_exact(model, attached=False)  # its own parameters, not those of the call
    prefixed = {f"model.{name}": p for name, p in others.items()}
    y, kl = torch.func.functional_call(WithKL(model), prefixed, (x,))
    moved = copy.deepcopy(model)
    moved.load_state_dict({**model.state_dict(), **others})
    value, grads = closed_form(moved)
    torch.testing.assert_close(kl.detach(), value, rtol=1e-12, atol=0)
    found = torch.autograd.grad(kl, list(others.values()), allow_unused=True)
    assert_same(dict(zip(others, found, strict=True)), grads)
    assert_exact(model, attached=False)
    assert y.requires_grad


def test_functional_call_with_another_prior(device):
    model, x = small_model(device), batch(device)
    y = torch.func.functional_call(model, {"1.weight_prior": model[1].weight_prior + 0.5}, (x,))
    assert_exact(model, attached=False)
    assert y.requires_grad


def test_thawed_parameters_receive_the_gradient(device):
    layer = klnorm.KLLayerNorm(8).to(device)
    layer.weight.requires_grad_(False)
    nn.init.constant_(layer.weight, 2.0)
    y = layer(torch.randn(3, 4, 8, device=device))
    layer.weight.requires_grad_(True)
    kl_divergence(layer).backward()
    assert torch.allclose(layer.weight.grad, torch.full((8,), 1 / 0.1**2, device=device))  # (2 - 1) / p^2
    assert y.requires_grad


# Accumulation and checkpointing


def test_gradient_accumulation_adds_the_kl_of_every_part(device):
    model = small_model(device)
    parts = [batch(device) for _ in range(4)]
    by_hand = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    kl_grads = closed_form(model)[1]
    for i, part in enumerate(parts):
        torch.manual_seed(i)
        for name, grad in gradients_of(model(part).square().sum(), model).items():
            by_hand[name] += grad + (0 if kl_grads[name] is None else 0.1 * kl_grads[name])
    for i, part in enumerate(parts):
        torch.manual_seed(i)
        (model(part).square().sum() + 0.1 * kl_divergence(model)).backward()
    assert_same({name: p.grad for name, p in model.named_parameters()}, by_hand)


def test_all_forwards_before_one_backward(device):
    model = small_model(device)
    parts = [batch(device) for _ in range(4)]
    kl_grads, by_hand = closed_form(model)[1], None
    torch.manual_seed(1)
    by_hand = gradients_of(sum(model(part).square().sum() for part in parts), model)
    torch.manual_seed(1)
    loss = sum(model(part).square().sum() for part in parts) + kl_divergence(model)
    loss.backward()
    expected = {name: grad + (0 if kl_grads[name] is None else kl_grads[name]) for name, grad in by_hand.items()}
    assert_same({name: p.grad for name, p in model.named_parameters()}, expected)


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non_reentrant"])
@pytest.mark.parametrize("place", [0, 1, 3], ids=["first", "middle", "last"])
def test_activation_checkpointing_changes_no_gradient(device, place, reentrant):
    plain = Checkpointed(device, place, None)
    model = Checkpointed(device, place, reentrant)
    model.load_state_dict(plain.state_dict())
    x = batch(device)

    def train(model, kl_after_backward=False):
        model.zero_grad()
        torch.manual_seed(3)
        loss = model(x).square().sum()
        if kl_after_backward:
            loss.backward()
            (0.1 * kl_divergence(model)).backward()
        else:
            (loss + 0.1 * kl_divergence(model)).backward()
        return {name: p.grad for name, p in model.named_parameters()}

    expected = train(plain)
    assert (expected[f"block.{place}.weight_rho"] != 0).all()
    for _ in range(2):  # a second step meets what the first one left
        assert_same(train(model), expected)
        assert_same(train(model, kl_after_backward=True), expected)
    assert_exact(model, attached=False)
