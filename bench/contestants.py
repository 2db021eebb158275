"""The contestants of every operation."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module

from . import layers
from .cases import name_of
from .layers import build_eager, build_klnorm, build_klnorm_functional, build_native, compiled, unfused
from .report import reason


@dataclass(frozen=True)
class Contestant:
    """`family`: "klnorm", "kl" (KL-Norm with noise of unknown seed) or "layer_norm" (without noise); `requires`:
    modules it needs, or module:attribute.
    """

    label: str
    build: Callable
    family: str = "layer_norm"
    requires: tuple = ()

    def missing(self):
        """Why it cannot take part; None if it can."""
        for name in self.requires:
            module, _, attribute = name.partition(":")
            try:
                getattr(import_module(module), attribute) if attribute else import_module(module)
            except Exception as error:  # whatever a peer's import raises, it is absent
                return reason(error)
        return None


def _peer(label, build, *requires):
    return Contestant(label, build, requires=requires)


_LIGER = "liger_kernel.transformers."
KLNORM = Contestant("klnorm", build_klnorm_functional, "klnorm")
FLA_RMS = _peer("flash-linear-attention", layers.build_fla, "fla.modules:RMSNorm")
QUACK_RMS = _peer("quack", layers.build_quack, "quack.rmsnorm:rmsnorm")
OF_OPERATION = {
    "layer_norm": {
        "klnorm": Contestant("klnorm", build_klnorm, "klnorm"),
        "native": Contestant("nn.LayerNorm", build_native),
        "compiled": Contestant("torch.compile(nn.LayerNorm)", compiled(build_native)),
        "eager": Contestant("KL-Norm in eager PyTorch", build_eager, "kl"),
        "eager_compiled": Contestant("KL-Norm under torch.compile", compiled(build_eager), "kl"),
        "apex_fused": _peer(
            "apex FusedLayerNorm", layers.build_apex_fused, "apex.normalization", "fused_layer_norm_cuda"
        ),
        "apex_fast": _peer("apex FastLayerNorm", layers.build_apex_fast, "apex.contrib.layer_norm"),
        "liger": _peer("Liger", layers.build_liger, f"{_LIGER}layer_norm:LigerLayerNorm"),
        "quack": _peer("quack", layers.build_quack, "quack.rmsnorm:layernorm_bwd"),
        "fla": _peer("flash-linear-attention", layers.build_fla, "fla.modules:LayerNorm"),
    },
    "rms_norm": {
        "klnorm": KLNORM,
        "native": Contestant("nn.RMSNorm", build_native),
        "compiled": Contestant("torch.compile(nn.RMSNorm)", compiled(build_native)),
        "eager": Contestant("KL-RMSNorm in eager PyTorch", build_eager, "kl"),
        "eager_compiled": Contestant("KL-RMSNorm under torch.compile", compiled(build_eager), "kl"),
        "apex_fused": _peer(
            "apex FusedRMSNorm", layers.build_apex_fused, "apex.normalization:FusedRMSNorm", "fused_layer_norm_cuda"
        ),
        "liger": _peer("Liger", layers.build_liger, f"{_LIGER}rms_norm:LigerRMSNorm"),
        "quack": QUACK_RMS,
        "fla": FLA_RMS,
    },
    "residual": {
        "klnorm": KLNORM,
        "unfused": Contestant("add, then klnorm", unfused(build_klnorm), "klnorm"),
        "native": Contestant("add, then nn.LayerNorm", build_native),
        "compiled": Contestant("torch.compile(add, nn.LayerNorm)", compiled(build_native)),
        "fla": _peer("flash-linear-attention", layers.build_fla, "fla.modules:LayerNorm"),
    },
    "rms_residual": {
        "klnorm": KLNORM,
        "unfused": Contestant("add, then klnorm", unfused(build_klnorm_functional), "klnorm"),
        "native": Contestant("add, then nn.RMSNorm", build_native),
        "compiled": Contestant("torch.compile(add, nn.RMSNorm)", compiled(build_native)),
        "liger": _peer("Liger", layers.build_liger, f"{_LIGER}fused_add_rms_norm:LigerFusedAddRMSNorm"),
        "quack": QUACK_RMS,
        "fla": FLA_RMS,
    },
    "groups": {
        "klnorm": KLNORM,
        "native": Contestant("F.layer_norm, scaled and shifted", build_native),
        "compiled": Contestant("the same under torch.compile", compiled(build_native)),
    },
    "deterministic": {
        "klnorm": Contestant("klnorm", build_klnorm_functional),
        "eager": Contestant("the same reading in eager PyTorch", build_eager),
        "eager_compiled": Contestant("the same reading under torch.compile", compiled(build_eager)),
    },
}


def contestant_of(case):
    return OF_OPERATION[case.operation][case.contestant]


def at_hand():
    """({operation: {contestant: its family}} of those that can take part, {name of an absent one: why})."""
    families, absent = {operation: {} for operation in OF_OPERATION}, {}
    for operation, contestants in OF_OPERATION.items():
        for name, contestant in contestants.items():
            if why := contestant.missing():
                absent[name_of(operation, name)] = why
            else:
                families[operation][name] = contestant.family
    return families, absent
