"""The noise stream: Philox4x32-7 words turned into normals.

Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC11.
"""

import math
from collections.abc import Sequence

import torch

SCALE_STREAM, SHIFT_STREAM, MERGED_STREAM = 0, 1, 2

ROUNDS = 7  # the fewest that pass BigCrush (SC11, table 2)

_MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
_WEYL = 0x9E3779B9, 0xBB67AE85
_MASK = 0xFFFFFFFF


def philox4x32(counter: Sequence, key: Sequence, rounds: int = ROUNDS) -> tuple:
    """Apply Philox4x32: return four 32-bit words for a counter of four and a key of two 32-bit words.

    All words are int64 tensors (or integers) holding values in [0, 2^32), of shapes that broadcast.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(rounds):
        # int64 products wrap around but keep their low 64 bits; the mask removes the shift's sign extension.
        product_0, product_1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1 = (product_1 >> 32) & _MASK ^ c1 ^ k0, product_1 & _MASK
        c2, c3 = (product_0 >> 32) & _MASK ^ c3 ^ k1, product_0 & _MASK
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


def normal_pair(word):
    """Return two normals in fp64: Box-Muller on the 16-bit halves of a word, int64 in [0, 2^32)."""
    uniform = ((word & 0xFFFF).double() + 0.5) / 65536
    angle = (word >> 16).double() * (2 * math.pi / 65536)
    radius = torch.sqrt(-2 * torch.log(uniform))
    return radius * torch.cos(angle), radius * torch.sin(angle)


def normals(
    seed: torch.Tensor, draw: torch.Tensor, feature: int | torch.Tensor, stream: int | torch.Tensor
) -> torch.Tensor:
    """Return normals for draws and features.

    Args:
        seed: int64 tensor of one element.
        draw: int64 tensor (D,), each in [0, 2^32).
        feature: N for the features 0 .. N - 1; or an int64 tensor (N,) in [0, 2^35).
        stream: SCALE_STREAM, SHIFT_STREAM or MERGED_STREAM; or a tensor (D, 1) of them.

    Returns:
        fp32 tensor (D, N) on the device of `seed`; element (d, j) depends on (seed, draw[d], feature[j], stream) alone.
    """
    if not torch.is_tensor(feature):
        eights = torch.arange(-(-feature // 8), device=seed.device)
        return _normals_by_eight(seed, draw, eights, stream)[:, :feature]
    z = _normals_by_eight(seed, draw, feature // 8, stream).unflatten(1, (-1, 8))
    return z.gather(2, (feature % 8).expand(len(draw), -1).unsqueeze(2)).squeeze(2)


def _normals_by_eight(seed, draw, eights, stream):
    """Return normals (D, 8 * len(eights)) of features 8 * e .. 8 * e + 7 for every e: one Philox call per eight."""
    key = seed.item() & _MASK, (seed.item() >> 32) & _MASK
    zero = torch.zeros_like(eights)
    words = torch.stack(philox4x32((eights, draw[:, None], zero + stream, zero), key), dim=-1)
    return torch.stack(normal_pair(words), dim=-1).flatten(1).float()
