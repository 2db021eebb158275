"""The contestants of every operation."""

from collections.abc import Callable
from dataclasses import dataclass

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
        for place in self.requires:
            try:
                layers.imported(place)
            except Exception as error:  # whatever a peer's import raises, it is absent
                return reason(error)
        return None


def _peer(label, place, *others, **options):
    return Contestant(label, layers.build_peer(place, **options), requires=(place, *others))


def _apex(name):
    return _peer(f"apex {name}", f"apex.normalization:{name}", "fused_layer_norm_cuda", takes_fp32=False)


def _liger(place, **options):
    """Its RMSNorms not in place: else backward would overwrite the dy that the next call is given."""
    return _peer("Liger", f"liger_kernel.transformers.{place}", **options)


def _fla(name, **options):
    return _peer("flash-linear-attention", f"fla.modules:{name}", with_residual={"prenorm": True}, **options)


def _quack(name):
    return Contestant("quack", layers.build_quack, requires=(f"quack.rmsnorm:{name}",))


KLNORM = Contestant("klnorm", build_klnorm_functional, "klnorm")
OF_OPERATION = {
    "layer_norm": {
        "klnorm": Contestant("klnorm", build_klnorm, "klnorm"),
        "native": Contestant("nn.LayerNorm", build_native),
        "compiled": Contestant("torch.compile(nn.LayerNorm)", compiled(build_native)),
        "eager": Contestant("KL-Norm in eager PyTorch", build_eager, "kl"),
        "eager_compiled": Contestant("KL-Norm under torch.compile", compiled(build_eager), "kl"),
        "apex_fused": _apex("FusedLayerNorm"),
        "apex_fast": _peer("apex FastLayerNorm", "apex.contrib.layer_norm:FastLayerNorm", takes_fp32=False),
        "liger": _liger("layer_norm:LigerLayerNorm", bias=True),
        "quack": _quack("layernorm_bwd"),
        "fla": _fla("LayerNorm", bias=True),
    },
    "rms_norm": {
        "klnorm": KLNORM,
        "native": Contestant("nn.RMSNorm", build_native),
        "compiled": Contestant("torch.compile(nn.RMSNorm)", compiled(build_native)),
        "eager": Contestant("KL-RMSNorm in eager PyTorch", build_eager, "kl"),
        "eager_compiled": Contestant("KL-RMSNorm under torch.compile", compiled(build_eager), "kl"),
        "apex_fused": _apex("FusedRMSNorm"),
        "liger": _liger("rms_norm:LigerRMSNorm", in_place=False),
        "quack": _quack("rmsnorm"),
        "fla": _fla("RMSNorm"),
    },
    "residual": {
        "klnorm": KLNORM,
        "unfused": Contestant("add, then klnorm", unfused(build_klnorm), "klnorm"),
        "native": Contestant("add, then nn.LayerNorm", build_native),
        "compiled": Contestant("torch.compile(add, nn.LayerNorm)", compiled(build_native)),
        "fla": _fla("LayerNorm", bias=True),
    },
    "rms_residual": {
        "klnorm": KLNORM,
        "unfused": Contestant("add, then klnorm", unfused(build_klnorm_functional), "klnorm"),
        "native": Contestant("add, then nn.RMSNorm", build_native),
        "compiled": Contestant("torch.compile(add, nn.RMSNorm)", compiled(build_native)),
        "liger": _liger("fused_add_rms_norm:LigerFusedAddRMSNorm", in_place=False),
        "quack": _quack("rmsnorm"),
        "fla": _fla("RMSNorm"),
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
