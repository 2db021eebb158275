"""Parameter groups for the optimizer, and the weight of the KL divergence in the loss."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from . import checks
from .kl import kl_divergence, kl_layers
from .layers import KLNorm

_NORMS = KLNorm, nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.modules.batchnorm._NormBase


def param_groups(
    model: nn.Module, lr: float, *, rho_lr: float = 1e-2, weight_decay: float = 0.01
) -> list[dict[str, Any]]:
    """Return parameter groups for a torch optimizer; the deviations of klnorm layers get their own learning rate.

    There are up to three groups, in this order; every trainable parameter is in exactly one:

    - "decay": all other parameters, at `lr` with `weight_decay`;
    - "no_decay": the parameters of normalization layers, and all biases, at `lr` without decay;
    - "rho": `weight_rho` and `bias_rho` of klnorm layers, at `rho_lr` without decay.

    Normalization layers are those of torch.nn, their subclasses, and modules of a class whose name ends in "Norm".
    Call this after `klnorm.replace_layer_norm`, and again after freezing or unfreezing parameters.

    Args:
        model: any nn.Module, wrapped (DistributedDataParallel, PEFT, torch.compile) or not.
        lr, rho_lr: learning rates, > 0.
        weight_decay: of the first group, >= 0.

    Returns:
        List of dicts with the keys "name", "params", "lr" and "weight_decay".

    Raises:
        TypeError: `model` is not an nn.Module, or another argument is not a number.
        ValueError: a number is out of range, or no parameter of `model` is trainable.

    Example:
        >>> model = klnorm.replace_layer_norm(nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 2)))
        >>> optimizer = torch.optim.AdamW(klnorm.param_groups(model, lr=1e-4))
        >>> [(group["name"], len(group["params"]), group["lr"]) for group in optimizer.param_groups]
        [('decay', 2, 0.0001), ('no_decay', 4, 0.0001), ('rho', 2, 0.01)]
    """
    checks.check_module(model)
    lr = checks.as_number("lr", lr, above=0)
    rho_lr = checks.as_number("rho_lr", rho_lr, above=0)
    weight_decay = checks.as_number("weight_decay", weight_decay, at_least=0)
    trainable = [p for p in model.parameters() if p.requires_grad]
    if not trainable:
        raise ValueError(
            "model has no trainable parameter, expected at least one: an optimizer would have nothing to do. "
            "Remedy: set requires_grad of what is to be trained."
        )
    special = _special_parameters(model)
    settings = ("decay", lr, weight_decay), ("no_decay", lr, 0.0), ("rho", rho_lr, 0.0)
    groups = [
        {
            "name": name,
            "params": [p for p in trainable if special.get(p, "decay") == name],
            "lr": rate,
            "weight_decay": w,
        }
        for name, rate, w in settings
    ]
    return [group for group in groups if group["params"]]


def _special_parameters(model):
    """Return {parameter: name of its group} for the parameters that are not in "decay"."""
    special = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if hasattr(module, "posterior_parameters") and name.endswith("_rho"):
                special[parameter] = "rho"
            elif "bias" in name or isinstance(module, _NORMS) or type(module).__name__.lower().endswith("norm"):
                special.setdefault(parameter, "no_decay")
    return special


class KLWeight:
    """The weight of the KL divergence, for a loss that is a mean over examples.

    ::

        value = max_weight * min(1, steps / warmup_steps) / N        or  / D instead of  / N
        loss  = mean over examples of -log p(target | x)  +  value * KL

    With N, `num_examples`, and a `max_weight` of 1 the loss is the negative evidence lower bound per example; with a
    smaller `max_weight` the posterior is "cold". With D, `per_parameter`, the KL is averaged over scales and shifts
    (`arXiv 2502.01861 <https://arxiv.org/abs/2502.01861>`_): use it if weighting by 1 / N pulls posteriors to the
    prior. The warm-up starts at 0, so that the means settle first.

    Give exactly one of `num_examples` and `per_parameter`. Under gradient accumulation, divide the whole loss, KL
    included, by the number of micro-batches, and call `step` once per optimizer step. With gradients averaged over
    processes, every process adds the same KL, so it counts once.

    Args:
        num_examples: N, the number of examples in the whole training set, over all processes; target tokens for a
            language model, whose loss is a mean over tokens; int >= 1.
        per_parameter: nn.Module; D is the present number of its random scales and shifts, those of a shared layer once.
        warmup_steps: calls of `step` until the weight is full; int >= 0.
        max_weight: the weight of KL / N or KL / D after the warm-up, >= 0.
        device: of the model. Needed if torch.compile compiles the first call or a CUDA graph captures it; otherwise the
            first call finds the device. `step` changes the weight on that device, so that replays of a captured step
            see the warm-up.

    Attributes:
        steps: calls of `step` so far. value: the weight now, a float.

    Raises:
        TypeError: `num_examples` or `warmup_steps` is no int, `per_parameter` no nn.Module, `max_weight` no number.
        ValueError: both or neither of the first two are given, a number is out of range, or `per_parameter` has no KL
            layer. From a call: a CUDA graph captures it, `device` was not given and it is the first call.

    Example:
        >>> model = klnorm.replace_layer_norm(nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 2)))
        >>> optimizer = torch.optim.AdamW(klnorm.param_groups(model, lr=1e-4))
        >>> kl_weight = klnorm.KLWeight(num_examples=1000, warmup_steps=2)
        >>> for step in range(3):
        ...     x, target = torch.randn(6, 8), torch.randint(2, (6,))
        ...     loss = F.cross_entropy(model(x), target) + kl_weight(model)
        ...     optimizer.zero_grad()
        ...     loss.backward()
        ...     optimizer.step()
        ...     kl_weight.step()
        >>> kl_weight
        KLWeight(value=0.001, steps=3)
        >>> klnorm.KLWeight(per_parameter=model).value  # 8 scales and 8 shifts
        0.0625
    """

    value: float

    def __init__(
        self,
        *,
        num_examples: int | None = None,
        per_parameter: nn.Module | None = None,
        warmup_steps: int = 0,
        max_weight: float = 1.0,
        device: torch.device | str | None = None,
    ):
        if (num_examples is None) == (per_parameter is None):
            raise ValueError(
                f"{'neither' if num_examples is None else 'both'} of num_examples and per_parameter given, expected "
                "exactly one: the KL is weighted by 1 / N or by 1 / D. "
                "Remedy: num_examples=len(train_set), or per_parameter=model."
            )
        if per_parameter is None:
            num_examples = checks.as_integer("num_examples", num_examples, at_least=1)
        warmup_steps = checks.as_integer("warmup_steps", warmup_steps, at_least=0)
        max_weight = checks.as_number("max_weight", max_weight, at_least=0)
        divisor = _count_random(per_parameter) if num_examples is None else num_examples
        self._full, self._warmup_steps = max_weight / divisor, warmup_steps
        self._factors: dict[torch.device, torch.Tensor] = {}
        self.value = math.nan  # differs from every value, so that `_set_steps` sets it
        self._set_steps(0)
        for place in "cpu", "cpu" if device is None else device:
            self._factor(torch.empty(0, device=place).device)

    def _set_steps(self, steps):
        before, self.steps = self.value, steps
        self.value = self._full if steps >= self._warmup_steps else self._full * steps / self._warmup_steps
        if self.value != before:
            for factor in self._factors.values():
                factor.fill_(self.value)

    def _factor(self, device):
        """Return the value as a tensor on `device`, always the same: CUDA graphs and compiled losses read it anew."""
        factor = self._factors.get(device)
        if factor is None and torch.compiler.is_compiling():
            return self._factors[torch.device("cpu")]  # a tensor made while tracing may not outlive the graph
        if factor is None:
            if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
                raise ValueError(
                    f"KLWeight is captured into a CUDA graph before it has a value on {device}, expected one: a replay "
                    "would not see the warm-up. Remedy: KLWeight(..., device=device), or call it once before capture."
                )
            with torch.inference_mode(False):  # `step` could not change a tensor of inference mode
                factor = self._factors[device] = torch.full((), self.value, dtype=torch.float64, device=device)
        return factor

    def __call__(self, model: nn.Module, *, check_finite: bool | None = None) -> torch.Tensor:
        """Return the term for the loss: `value` times `klnorm.kl_divergence(model, check_finite=check_finite)`."""
        kl = kl_divergence(model, check_finite=check_finite)
        # A copy, so that `step` may change the value before a backward that still needs it.
        return kl * self._factor(kl.device).to(kl.device, kl.dtype, copy=True)

    def step(self) -> None:
        """Count an optimizer step."""
        self._set_steps(self.steps + 1)

    def state_dict(self) -> dict[str, int]:
        """Return the steps so far, for `load_state_dict`. Everything else comes from the constructor."""
        return {"steps": self.steps}

    def load_state_dict(self, state_dict: Mapping[str, int]) -> None:
        """Resume from the result of `state_dict`."""
        if not isinstance(state_dict, Mapping) or state_dict.keys() != {"steps"}:
            raise ValueError(
                f"state_dict is {checks.shown(state_dict)}, expected {{'steps': ...}}. "
                "Remedy: pass what state_dict() returned."
            )
        self._set_steps(checks.as_integer("state_dict['steps']", state_dict["steps"], at_least=0))

    def __repr__(self):
        return f"KLWeight(value={self.value:.6g}, steps={self.steps})"


def _count_random(model):
    """Return the number of posteriors in `model`; raise ValueError if there are none."""
    checks.check_module(model, "per_parameter")
    count = sum(layer.count_posteriors() for layer in kl_layers(model).values())
    if not count:
        raise ValueError(
            "per_parameter is a model without KL layers, expected at least one: there is no posterior to count. "
            "Remedy: klnorm.replace_layer_norm(model) first."
        )
    return count
