"""Activation checkpointing changes no gradient, the KL's included; single layers: tests/test_kl_forward.py."""

import pytest
import torch
from bert_training import assert_close, assert_equal, bert, checkpointed, gradients_of, loss_of, new_batch
from torch import nn
from torch.utils.checkpoint import checkpoint

import klnorm

both = pytest.mark.parametrize("reentrant", [False, True], ids=["non_reentrant", "reentrant"])
ROUNDING = 1e-12  # of fp64: the KL divergence's gradient is added in another place, or in another order


def data_loss(model, batch):
    return model(**batch).loss


def two_batches(function):
    """Two forwards before one backward, which repeats them in reverse."""

    def both_losses(model, batch):
        return data_loss(model, batch) + function(model, {name: t.flip(0) for name, t in batch.items()})

    return both_losses


@both
@pytest.mark.parametrize("function", [data_loss, two_batches(data_loss)], ids=["one", "two"])
def test_bert_without_the_kl_has_the_same_bits(device, reentrant, function):
    model, batch = bert(device, torch.float32, num_hidden_layers=2), new_batch(device)
    expected = gradients_of(function, model, batch)
    assert (expected["bert.encoder.layer.0.output.LayerNorm.weight_rho"] != 0).all()
    checkpointed(model, reentrant)
    assert_equal(gradients_of(function, model, batch), expected)


@both
@pytest.mark.parametrize("function", [loss_of, two_batches(loss_of)], ids=["one", "two"])
def test_bert_with_the_kl_in_its_loss(device, reentrant, function):
    model, batch = bert(device, num_hidden_layers=2), new_batch(device)
    expected = gradients_of(function, model, batch)
    checkpointed(model, reentrant)
    for _ in range(2):  # the second meets what the first one left
        assert_close(gradients_of(function, model, batch), expected, ROUNDING)


@both
def test_a_checkpoint_around_the_whole_loss(device, reentrant):
    """The KL divergence is then computed in the repetition too, from another forward."""
    model, batch = bert(device), new_batch(device)
    expected = gradients_of(loss_of, model, batch)

    def checkpointed(model, batch):
        anchor = torch.ones((), device=device, requires_grad=True)  # reentrant checkpoints need an input of a graph
        return checkpoint(lambda one: one * loss_of(model, batch), anchor, use_reentrant=reentrant)

    for _ in range(2):
        assert_close(gradients_of(checkpointed, model, batch), expected, ROUNDING)


@both
def test_a_generator_of_ones_own_is_refused_where_it_would_not_be_replayed(device, reentrant):
    layer = klnorm.KLLayerNorm(6, generator=torch.Generator(device)).to(device)
    block = nn.Sequential(layer, nn.GELU())
    x = torch.randn(3, 6, device=device, requires_grad=True)
    block(x).sum().backward()  # fine without a checkpoint
    loss = checkpoint(block, x, use_reentrant=reentrant).sum()
    with pytest.raises(ValueError, match=r"generator is one of your own.*expected None.*Remedy: leave generator out"):
        loss.backward()
    layer.generator = None
    checkpoint(block, x, use_reentrant=reentrant).sum().backward()
