"""The arms: what each changes in the model, adds to the loss, and does after a step. Four settings each, no more.

An arm is a class: its constructor changes the classifier, `penalty` is added to the mean loss, `after_step` follows the
optimizer, `stochastic` makes evaluation draw the arm's own noise (where it has none, dropout's). `GRID` holds the
settings that are tried out, beside the learning rate `lr`, in multiples of the task's. Here are those of KL-Norm.
"""

import contextlib
from typing import ClassVar

from torch import nn

import klnorm

from .baselines import L2SP, VIB, AffineLR, Dropout, LayerNorm, Mixout, MoreDropout, grid

WARMUP = 0.1  # of the steps: learning rate, and weight of the KL


class _Sampled(LayerNorm):
    """KL-Norm: posteriors around the pretrained scales and shifts; KL / examples or KL / parameters, warmed up."""

    GRID = grid(per=("example", "parameter"))
    OPTIONS: ClassVar = {"init_std": 0.05, "prior_std": 0.1}
    FIXED_STDS = False

    def __init__(self, model, settings, examples, steps):
        super().__init__(model, settings, examples, steps)
        self._replace({**self.OPTIONS, **{k: v for k, v in settings.items() if k == "init_std"}})
        for layer in klnorm.kl_layers(model).values() if self.FIXED_STDS else ():
            layer.weight_rho.requires_grad_(False)
            layer.bias_rho.requires_grad_(False)
        per = {"per_parameter": model} if settings.get("per") == "parameter" else {"num_examples": examples}
        self.kl_weight = klnorm.KLWeight(
            **per, warmup_steps=round(WARMUP * steps), max_weight=float(settings.get("factor", 1))
        )

    def _replace(self, options):
        klnorm.replace_layer_norm(self.model.encoder, **options)

    def penalty(self):
        return self.kl_weight(self.model, check_finite=False)

    def after_step(self, lr):
        self.kl_weight.step()

    @contextlib.contextmanager
    def stochastic(self):
        with klnorm.sampling(self.model):
            yield


class KLSample(_Sampled):
    """KL-Norm in all norms, one draw an example. The primary arm."""


class KLToken(_Sampled):
    """KL-Norm in all norms, one draw a token."""

    OPTIONS: ClassVar = {**_Sampled.OPTIONS, "noise": "token"}


class KLBatch(_Sampled):
    """KL-Norm in all norms, one draw a step."""

    OPTIONS: ClassVar = {**_Sampled.OPTIONS, "noise": "batch"}


class KLLast(_Sampled):
    """KL-Norm in the last norm only, which bears more noise: three times that of kl_sample."""

    OPTIONS: ClassVar = {"init_std": 0.15, "prior_std": 0.3, "filter_fn": klnorm.last_norms(1)}


class KLAffine(_Sampled):
    """kl_sample whose means learn 10 or 100 times as fast as the rest, so that the KL has something to hold."""

    GRID = grid(lrs=(1,), affine_lr=(5e-4, 5e-3), per=("example", "parameter"))


class KLExample(_Sampled):
    """kl_sample with KL / examples in every setting: what is left of kl_affine without its learning rate."""

    GRID = grid(lrs=(0.5, 1, 2, 4))


class NoiseOnly(_Sampled):
    """Ablation: the noise of kl_sample with its deviation fixed, and no KL."""

    GRID = grid(init_std=(0.05, 0.1))
    FIXED_STDS = True

    def penalty(self):
        return 0.0


class KLOnly(_Sampled):
    """Ablation: the KL of kl_sample without its noise. Only the means are left to learn.

    The layers stay in evaluation mode, in which they are LayerNorms; what the deviations cost is a constant.
    """

    FIXED_STDS = True
    stochastic = LayerNorm.stochastic

    def training_mode(self):
        super().training_mode()
        for layer in klnorm.kl_layers(self.model).values():
            layer.eval()


class Deterministic(_Sampled):
    """The deterministic reading: no noise, KL(N(bias, weight^2) || N(pretrained bias, 1)), weighted by `factor`."""

    GRID = grid(factor=(0.1, 1.0))
    OPTIONS: ClassVar = {"posterior": "deterministic", "prior_std": 1.0}
    stochastic = LayerNorm.stochastic


class Conditional(_Sampled):
    """The input-conditioned reading: every example's posterior depends on a summary of it, padding left out."""

    def _replace(self, options):
        encoder = self.model.encoder
        for name, norm in [n for n in encoder.named_modules() if type(n[1]) is nn.LayerNorm]:
            layer = klnorm.KLConditionalLayerNorm(norm.normalized_shape, eps=norm.eps, **options)
            layer.load_state_dict(norm.state_dict())
            layer.register_forward_pre_hook(self._tell_mask, with_kwargs=True)
            encoder.set_submodule(name, layer.to(norm.weight.device))

    def _tell_mask(self, layer, args, kwargs):
        return args, {**kwargs, "mask": self.model.mask}


ARMS = {
    "layer_norm": LayerNorm,
    "dropout": Dropout,
    "l2_sp": L2SP,
    "mixout": Mixout,
    "vib": VIB,
    "kl_sample": KLSample,
    "kl_token": KLToken,
    "kl_batch": KLBatch,
    "kl_last": KLLast,
    "affine_lr": AffineLR,
    "kl_affine": KLAffine,
    "kl_example": KLExample,
    "more_dropout": MoreDropout,
    "noise_only": NoiseOnly,
    "kl_only": KLOnly,
    "deterministic": Deterministic,
    "conditional": Conditional,
}
