"""Normalization layers whose scale and shift are learned distributions."""

from .versions import __version__, require_versions

require_versions()

from . import functional, reference  # noqa: E402
from .choice import last_norms  # noqa: E402
from .conditional import KLConditionalLayerNorm  # noqa: E402
from .kl import kl_divergence, kl_layers  # noqa: E402
from .layers import KLLayerNorm, KLRMSNorm  # noqa: E402
from .plots import plot_summary  # noqa: E402
from .predict import mc_predict, sampling  # noqa: E402
from .replace import (  # noqa: E402
    replace_layer_norm,
    replace_rms_norm,
    restore_layer_norm,
    restore_rms_norm,
)
from .report import summary  # noqa: E402
from .training import KLWeight, param_groups  # noqa: E402

__all__ = [
    "KLConditionalLayerNorm",
    "KLLayerNorm",
    "KLRMSNorm",
    "KLWeight",
    "__version__",
    "functional",
    "kl_divergence",
    "kl_layers",
    "last_norms",
    "mc_predict",
    "param_groups",
    "plot_summary",
    "reference",
    "replace_layer_norm",
    "replace_rms_norm",
    "restore_layer_norm",
    "restore_rms_norm",
    "sampling",
    "summary",
]
