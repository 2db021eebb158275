"""The contestants of every operation: klnorm, its peers, and KL-Norm as a user would write it."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module

from .cases import name_of
from .layers import build_eager, build_klnorm, build_klnorm_functional, build_native, compiled, unfused
from .peers import build_apex_fast, build_apex_fused, build_fla, build_liger, build_quack
from .report import reason


@dataclass(frozen=True)
class Contestant:
    """`family`: "klnorm", "kl" (KL-Norm with noise of unknown seed) or "layer_norm" (without noise); `requires`:
    modules it needs, or module:attribute.
    """

    label: str
    family: str
    build: Callable
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


CONTESTANTS = {  # of LayerNorm
    "klnorm": Contestant("klnorm", "klnorm", build_klnorm),
    "native": Contestant("nn.LayerNorm", "layer_norm", build_native),
    "compiled": Contestant("torch.compile(nn.LayerNorm)", "layer_norm", compiled(build_native)),
    "eager": Contestant("KL-Norm in eager PyTorch", "kl", build_eager),
    "eager_compiled": Contestant("KL-Norm under torch.compile", "kl", compiled(build_eager)),
    "apex_fused": Contestant(
        "apex FusedLayerNorm", "layer_norm", build_apex_fused, ("apex.normalization", "fused_layer_norm_cuda")
    ),
    "apex_fast": Contestant("apex FastLayerNorm", "layer_norm", build_apex_fast, ("apex.contrib.layer_norm",)),
    "liger": Contestant("Liger", "layer_norm", build_liger, ("liger_kernel.transformers.layer_norm:LigerLayerNorm",)),
    "quack": Contestant("quack", "layer_norm", build_quack, ("quack.rmsnorm:layernorm_bwd",)),
    "fla": Contestant("flash-linear-attention", "layer_norm", build_fla, ("fla.modules:LayerNorm",)),
}
KLNORM = Contestant("klnorm", "klnorm", build_klnorm_functional)
FLA_RMS = Contestant("flash-linear-attention", "layer_norm", build_fla, ("fla.modules:RMSNorm",))
QUACK_RMS = Contestant("quack", "layer_norm", build_quack, ("quack.rmsnorm:rmsnorm",))
OF_OPERATION = {
    "layer_norm": CONTESTANTS,
    "rms_norm": {
        "klnorm": KLNORM,
        "native": Contestant("nn.RMSNorm", "layer_norm", build_native),
        "compiled": Contestant("torch.compile(nn.RMSNorm)", "layer_norm", compiled(build_native)),
        "eager": Contestant("KL-RMSNorm in eager PyTorch", "kl", build_eager),
        "eager_compiled": Contestant("KL-RMSNorm under torch.compile", "kl", compiled(build_eager)),
        "apex_fused": Contestant(
            "apex FusedRMSNorm",
            "layer_norm",
            build_apex_fused,
            ("apex.normalization:FusedRMSNorm", "fused_layer_norm_cuda"),
        ),
        "liger": Contestant("Liger", "layer_norm", build_liger, ("liger_kernel.transformers.rms_norm:LigerRMSNorm",)),
        "quack": QUACK_RMS,
        "fla": FLA_RMS,
    },
    "residual": {
        "klnorm": KLNORM,
        "unfused": Contestant("add, then klnorm", "klnorm", unfused(build_klnorm)),
        "native": Contestant("add, then nn.LayerNorm", "layer_norm", build_native),
        "compiled": Contestant("torch.compile(add, nn.LayerNorm)", "layer_norm", compiled(build_native)),
        "fla": CONTESTANTS["fla"],
    },
    "rms_residual": {
        "klnorm": KLNORM,
        "unfused": Contestant("add, then klnorm", "klnorm", unfused(build_klnorm_functional)),
        "native": Contestant("add, then nn.RMSNorm", "layer_norm", build_native),
        "compiled": Contestant("torch.compile(add, nn.RMSNorm)", "layer_norm", compiled(build_native)),
        "liger": Contestant(
            "Liger", "layer_norm", build_liger, ("liger_kernel.transformers.fused_add_rms_norm:LigerFusedAddRMSNorm",)
        ),
        "quack": QUACK_RMS,
        "fla": FLA_RMS,
    },
    "groups": {
        "klnorm": KLNORM,
        "native": Contestant("F.layer_norm, scaled and shifted", "layer_norm", build_native),
        "compiled": Contestant("the same under torch.compile", "layer_norm", compiled(build_native)),
    },
    "deterministic": {
        "klnorm": Contestant("klnorm", "layer_norm", build_klnorm_functional),
        "eager": Contestant("the same reading in eager PyTorch", "layer_norm", build_eager),
        "eager_compiled": Contestant("the same reading under torch.compile", "layer_norm", compiled(build_eager)),
    },
}


def contestant_of(case):
    return OF_OPERATION[case.operation][case.contestant]


def at_hand():
    """({operation: {contestant: its family}} of those that can take part, {name of an absent one: why})."""
    everyone = [
        (op, name, c, c.missing()) for op, contestants in OF_OPERATION.items() for name, c in contestants.items()
    ]
    families = {operation: {} for operation in OF_OPERATION}
    for operation, name, contestant, why in everyone:
        if why is None:
            families[operation][name] = contestant.family
    return families, {name_of(operation, name): why for operation, name, _, why in everyone if why is not None}
