"""The specification of klnorm in plain PyTorch: slow, short, and differentiable by autograd."""

from .kl_norm import kl_layer_norm, kl_normal, kl_rms_norm
from .noise import normals, philox4x32

__all__ = ["kl_layer_norm", "kl_normal", "kl_rms_norm", "normals", "philox4x32"]
