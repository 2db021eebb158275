"""Tiny transformers decoders and encoders whose norms are classes of their own."""

from typing import NamedTuple

import torch
from hf_models import TEXT

DECODER = {
    **TEXT, "num_key_value_heads": 1, "head_dim": 8, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


class Family(NamedTuple):
    """A model class, its options, its norm's class, how many of them there are, and the weight of a scale of 1."""

    model: type
    options: dict
    norm: str
    norms: int
    weight_of_1: float


def norms(model, family):
    """The model's norms by name, whether replaced or not."""
    return {name: m for name, m in model.named_modules() if type(m).__name__.endswith(family.norm)}


def new_model(family, device="cpu", model_class=None):
    """A model in evaluation mode, with parameters of the norms as training leaves them: not all the same."""
    model_class = model_class or family.model
    model = model_class(model_class.config_class(**family.options)).to(device).eval()
    with torch.no_grad():
        for norm in norms(model, family).values():
            for p in norm.parameters():
                p.add_(0.2 * torch.randn_like(p))
    return model
