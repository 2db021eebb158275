"""Without gradients: torch.no_grad() and torch.inference_mode(), in training and in evaluation mode."""

import math

import pytest
import torch
from bert_training import assert_equal, bert, gradients_of, loss_of, new_batch

import klnorm

modes = pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])


def logits_of(model, batch):
    torch.manual_seed(3)
    return model(**batch).logits


@modes
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_the_output_has_the_same_bits_and_no_graph(device, mode, training):
    model, batch = bert(device, torch.float32).train(training), new_batch(device)
    expected = logits_of(model, batch)
    assert expected.requires_grad
    with mode():
        found = logits_of(model, batch)
        kl = klnorm.kl_divergence(model)
    assert torch.equal(found, expected)
    assert not found.requires_grad
    assert not kl.requires_grad
    assert found.is_inference() == (mode is torch.inference_mode)


@modes
def test_training_is_the_same_after_it(device, mode):
    model, batch = bert(device, torch.float32), new_batch(device)
    expected = gradients_of(loss_of, model, batch)
    with mode():
        outside = logits_of(model, batch)
        klnorm.kl_divergence(model)
    assert_equal(gradients_of(loss_of, model, batch), expected)
    assert outside.isfinite().all()


def test_a_backbone_under_no_grad_trains_by_the_kl_alone(device):
    model, batch = bert(device, torch.float32), new_batch(device)
    with torch.no_grad():
        pooled = model.bert(batch["input_ids"], batch["attention_mask"]).pooler_output
    torch.nn.functional.cross_entropy(model.classifier(pooled), batch["labels"]).backward()
    assert model.classifier.weight.grad.any()
    assert all(p.grad is None for p in model.bert.parameters())
    klnorm.kl_divergence(model).backward()
    for layer in klnorm.kl_layers(model).values():  # the KL divergence alone: of deviation 0.2 from the prior's 0.1
        expected = torch.full_like(layer.weight_rho, (0.2 / 0.1**2 - 1 / 0.2) * (1 - math.exp(-0.2)))
        torch.testing.assert_close(layer.weight_rho.grad, expected)
