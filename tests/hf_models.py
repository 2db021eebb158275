"""Tiny transformers models with random weights, for the tests that use the real library."""

from typing import NamedTuple

import pytest
import torch
from torch import nn

import klnorm

transformers = pytest.importorskip("transformers")

VOCABULARY, WIDTH = 50, 16
SIZES = {"hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
# Attention in plain PyTorch: its backward is deterministic on a GPU too. Not saved with a model, so `load` repeats it.
EAGER = {"attn_implementation": "eager"}
TEXT = {"vocab_size": VOCABULARY, "max_position_embeddings": 16, **SIZES, **EAGER}


class Family(NamedTuple):
    """A model class, the options of its configuration, how many nn.LayerNorms it has, name and shape of its input."""

    model: type
    options: dict
    norms: int
    input_name: str
    input_shape: tuple


FAMILIES = {
    "bert": Family(transformers.BertModel, TEXT, 5, "input_ids", (3, 6)),
    "roberta": Family(transformers.RobertaModel, TEXT, 5, "input_ids", (3, 6)),
    "gpt2": Family(
        transformers.GPT2Model,
        {
            "vocab_size": VOCABULARY, "n_positions": 16, "n_embd": WIDTH, "n_layer": 2, "n_head": 2,
            "bos_token_id": 1, "eos_token_id": 2, **EAGER,
        },
        5, "input_ids", (3, 6),
    ),
    "vit": Family(  # with a head: a plain subclass of ViTModel too does not read the checkpoints of ViTModel
        transformers.ViTForImageClassification,
        {"image_size": 8, "patch_size": 4, **SIZES, **EAGER},
        5, "pixel_values", (3, 3, 8, 8),
    ),
    "wav2vec2": Family(
        transformers.Wav2Vec2Model,
        {
            "conv_dim": (8, 12), "conv_kernel": (10, 3), "conv_stride": (5, 2), "feat_extract_norm": "layer",
            "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "do_stable_layer_norm": True,
            "mask_time_prob": 0.0, "layerdrop": 0.0, **SIZES, **EAGER,
        },
        8, "input_values", (3, 80),
    ),
}  # fmt: skip


def new_model(family, device="cpu"):
    """A model of the family in evaluation mode, with scales and shifts as training leaves them: not 1 and 0."""
    model_class, options = FAMILIES[family][:2]
    return scattered(model_class(model_class.config_class(**options)).to(device).eval())


def scattered(model):
    """`model` with random scales and shifts around 1 and 0 in every norm, in place."""
    with torch.no_grad():
        for norm in model.modules():
            if isinstance(norm, nn.LayerNorm):
                norm.weight.normal_(1.0, 0.2)
                norm.bias.normal_(0.0, 0.2)
    return model


def new_inputs(family, device="cpu"):
    name, shape = FAMILIES[family][-2:]
    ids = torch.randint(3, VOCABULARY, shape, device=device)
    return {name: ids if name == "input_ids" else torch.randn(shape, device=device)}


def output(model, inputs):
    """What the model computes: its last hidden state, or logits."""
    return model(**inputs)[0]


def token_ids(device="cpu"):
    return {"input_ids": torch.randint(3, VOCABULARY, (3, 6), device=device)}


def assert_same_state(model, other):
    state, expected = model.state_dict(), other.state_dict()
    assert state.keys() == expected.keys()
    assert [key for key in state if not torch.equal(state[key], expected[key])] == []


def evaluated(model, inputs):
    with torch.no_grad():
        return output(model.eval(), inputs)


def sampled(model, inputs, seed=0):
    """The output in training mode, of given noise."""
    torch.manual_seed(seed)
    with torch.no_grad():
        return output(model.train(), inputs)


def train(model, inputs, steps=3):
    """A few steps on a loss with the KL divergence in it; the losses."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    target = torch.randn_like(evaluated(model, inputs))
    losses = []
    model.train()
    for _ in range(steps):
        loss = (output(model, inputs) - target).square().mean() + klnorm.kl_divergence(model) / 1000
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def replaced_class(base, replace=klnorm.replace_layer_norm, **options):
    """A subclass of `base` whose instances have KL layers from the start, as a user writes it."""

    class KLModel(base):
        def __init__(self, config):
            super().__init__(config)
            replace(self, **options)

    return KLModel


def load(model_class, path, **options):
    return model_class.from_pretrained(path, **EAGER, **options)
