"""Models for the training step, random weights: those of transformers where it is installed, else of the same sizes."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn


@dataclass(frozen=True)
class Size:
    """`causal`: a decoder that predicts the next token; otherwise an encoder that predicts masked ones."""

    vocabulary: int
    width: int
    layers: int
    heads: int
    positions: int
    causal: bool
    batch: int
    length: int


SIZES = {
    "BERT-base": Size(30522, 768, 12, 12, 512, False, 32, 128),
    "GPT-2 small": Size(50257, 768, 12, 12, 1024, True, 8, 1024),
}
SMOKE_SIZES = {
    "BERT-base": Size(64, 32, 2, 2, 16, False, 2, 8),
    "GPT-2 small": Size(64, 32, 2, 2, 16, True, 2, 8),
}


def source():
    """Where the models come from."""
    try:
        from transformers import __version__
    except ImportError:
        return "plain torch modules of the same sizes (transformers is not installed)"
    return f"transformers {__version__}"


def make_model(size, device):
    """A model with random weights whose call (tokens, labels) returns the loss."""
    torch.manual_seed(0)
    try:
        model = _from_transformers(size)
    except ImportError:
        model = PlainTransformer(size)
    return model.to(device).train()


def make_batch(size, device):
    """(tokens, labels), random."""
    generator = torch.Generator().manual_seed(0)
    tokens, labels = torch.randint(size.vocabulary, (2, size.batch, size.length), generator=generator).to(device)
    return tokens, labels


class FromTransformers(nn.Module):
    """transformers' model as a function of (tokens, labels)."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, tokens, labels):
        return self.model(input_ids=tokens, labels=labels).loss


def _from_transformers(size):
    import transformers

    if size.causal:
        config = transformers.GPT2Config(
            vocab_size=size.vocabulary, n_positions=size.positions, n_embd=size.width, n_layer=size.layers,
            n_head=size.heads, bos_token_id=0, eos_token_id=0, use_cache=False,
        )  # fmt: skip
        return FromTransformers(transformers.GPT2LMHeadModel(config))
    config = transformers.BertConfig(
        vocab_size=size.vocabulary, max_position_embeddings=size.positions, hidden_size=size.width,
        num_hidden_layers=size.layers, num_attention_heads=size.heads, intermediate_size=4 * size.width,
    )  # fmt: skip
    return FromTransformers(transformers.BertForMaskedLM(config))


class Block(nn.Module):
    """Attention and a feed-forward network, normalized before (decoder, as GPT-2) or after (encoder, as BERT)."""

    def __init__(self, size):
        super().__init__()
        self.heads, self.causal = size.heads, size.causal
        self.norm1, self.norm2 = nn.LayerNorm(size.width), nn.LayerNorm(size.width)
        self.qkv, self.out = nn.Linear(size.width, 3 * size.width), nn.Linear(size.width, size.width)
        self.up, self.down = nn.Linear(size.width, 4 * size.width), nn.Linear(4 * size.width, size.width)

    def forward(self, x):
        if self.causal:
            x = x + self._attend(self.norm1(x))
            return x + self._feed(self.norm2(x))
        x = self.norm1(x + self._attend(x))
        return self.norm2(x + self._feed(x))

    def _attend(self, x):
        q, k, v = (t.unflatten(2, (self.heads, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, dim=2))
        attended = F.scaled_dot_product_attention(q, k, v, dropout_p=0.1, is_causal=self.causal)
        return F.dropout(self.out(attended.transpose(1, 2).flatten(2)), 0.1)

    def _feed(self, x):
        return F.dropout(self.down(F.gelu(self.up(x))), 0.1)


class PlainTransformer(nn.Module):
    """Embeddings, blocks, a last normalization, a head tied to the embeddings."""

    def __init__(self, size):
        super().__init__()
        self.token, self.position = nn.Embedding(size.vocabulary, size.width), nn.Embedding(size.positions, size.width)
        self.blocks = nn.ModuleList(Block(size) for _ in range(size.layers))
        self.norm = nn.LayerNorm(size.width)
        self.shift = 1 if size.causal else 0
        for embedding in self.token, self.position:
            nn.init.normal_(embedding.weight, std=0.02)

    def forward(self, tokens, labels):
        x = self.token(tokens) + self.position.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        logits = F.linear(self.norm(x), self.token.weight)
        logits, labels = logits[:, : logits.shape[1] - self.shift], labels[:, self.shift :]
        return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())
