"""A tiny replaced BERT classifier and its training step, for the tests of the machinery around training."""

import torch
from hf_models import TEXT, VOCABULARY, scattered, transformers

import klnorm

CLASSES = 3


def bert(device, dtype=torch.float64, **options):
    """BertForSequenceClassification in training mode, KL-Norms for norms, their means away from the prior's."""
    config = {**TEXT, "num_hidden_layers": 1, "num_labels": CLASSES, "use_cache": False, **options}
    model = transformers.BertForSequenceClassification(transformers.BertConfig(**config))
    return scattered(klnorm.replace_layer_norm(model, init_std=0.2)).to(device, dtype).train()


def checkpointed(model, reentrant):
    """`model` with activation checkpointing, by the name that its version of transformers gives it."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": reentrant})
    return model


def new_batch(device, size=4, tokens=6):
    mask = torch.ones(size, tokens, dtype=torch.long)
    mask[0, -2:] = 0
    batch = {
        "input_ids": torch.randint(3, VOCABULARY, (size, tokens)),
        "attention_mask": mask,
        "labels": torch.randint(CLASSES, (size,)),
    }
    return {name: t.to(device) for name, t in batch.items()}


def loss_of(model, batch):
    """What a training step minimizes: the model's own loss and the weighted KL divergence."""
    return model(**batch).loss + klnorm.kl_divergence(model) / 100


def gradients_of(function, model, *args, seed=3):
    """(name, tensor) of the loss that `function` returns and of every parameter's gradient, for one seed."""
    model.zero_grad()
    torch.manual_seed(seed)
    loss = function(model, *args)
    loss.backward()  # reentrant checkpointing refuses autograd.grad
    return {"loss": loss.detach(), **{name: p.grad for name, p in model.named_parameters()}}


def assert_equal(found, expected):
    """The same bits under the same names."""
    assert found.keys() == expected.keys()
    different = [name for name in found if not torch.equal(found[name], expected[name])]
    assert not different, f"different bits: {', '.join(different)}"


def assert_close(found, expected, tolerance):
    """Within `tolerance`, relative, of the largest element of each tensor: what rounding in sums amounts to."""
    assert found.keys() == expected.keys()
    for name, right in expected.items():
        limit = tolerance * max(1e-3, right.abs().max().item())  # of a gradient that vanishes rounding is left
        torch.testing.assert_close(
            found[name], right, rtol=0, atol=limit, msg=lambda text, name=name: f"{name}: {text}"
        )
