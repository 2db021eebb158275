"""The specification in plain PyTorch: slow, short, and differentiable by autograd."""

from .kl_norm import kl_layer_norm, kl_normal
from .noise import normals, philox4x32

__all__ = ["kl_layer_norm", "kl_normal", "normals", "philox4x32"]
