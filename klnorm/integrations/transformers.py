"""The KL divergence in the training loop of Hugging Face's Trainer."""

from collections.abc import Callable
from typing import Any

import torch
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import has_length

from .. import checks
from ..kl import kl_divergence, some_kl_layers
from ..training import KLWeight, param_groups


class KLTrainerMixin:
    """Adds the weighted KL divergence to the training loss of a `transformers.Trainer`, and nothing to evaluation.

    Put it before the Trainer class: `class MyTrainer(KLTrainerMixin, Seq2SeqTrainer)`. The loss itself is computed as
    before: by the model, label smoothing, `compute_loss_func` or the `compute_loss` of a base class. The KL counts once
    per optimizer step for any `gradient_accumulation_steps`, `num_items_in_batch` and number of processes. Training
    logs get `kl` (nats) and `kl_weight` of the last forward before the step; `loss` is the sum.

    Some heads of transformers, BertForSequenceClassification among them, take `num_items_in_batch` and ignore it. Their
    loss, not the KL, then counts `gradient_accumulation_steps` times. Remedy: `model.accepts_loss_kwargs = False`
    before the Trainer is made.

    Unless an optimizer is given, Trainer makes its own with `klnorm.param_groups`, from the `learning_rate` and
    `weight_decay` of TrainingArguments; the scheduler scales every group. `kl_weight.steps` follows Trainer's
    `global_step`, which checkpoints save, so `resume_from_checkpoint` resumes the warm-up.

    Args:
        kl_weight: a `klnorm.KLWeight`. None: KL / N with N = len(train_dataset), for a loss that is a mean over
            examples; for a mean over tokens pass a KLWeight with the number of target tokens.
        rho_lr: learning rate of the deviations, > 0.
        Other arguments: as for the Trainer.

    Raises:
        TypeError: `kl_weight` is not a KLWeight, `rho_lr` not a number.
        ValueError: `rho_lr` is not above 0. In training: the model has no KL layers, there is no `kl_weight` and no
            length of `train_dataset`, or `optim` names an optimizer that groups parameters itself, such as GaLore.

    Example:
        >>> import tempfile
        >>> from transformers import BertConfig, BertForSequenceClassification, TrainingArguments
        >>> config = BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
        >>> model = klnorm.replace_layer_norm(BertForSequenceClassification(config))
        >>> examples = [{"input_ids": torch.arange(4), "labels": i % 2} for i in range(8)]
        >>> arguments = TrainingArguments(tempfile.mkdtemp(), learning_rate=1e-4, report_to="none")
        >>> trainer = KLTrainer(model, arguments, train_dataset=examples, rho_lr=3e-3)
        >>> trainer.kl_weight
        KLWeight(value=0.125, steps=0)
    """

    train_dataset: Any  # of the Trainer
    add_callback: Callable[..., None]

    def __init__(self, *args: Any, kl_weight: KLWeight | None = None, rho_lr: float = 1e-2, **kwargs: Any) -> None:
        if kl_weight is not None and not isinstance(kl_weight, KLWeight):
            raise TypeError(
                f"kl_weight is a {type(kl_weight).__name__}, expected a klnorm.KLWeight. "
                "Remedy: klnorm.KLWeight(num_examples=len(train_dataset))."
            )
        rho_lr = checks.as_number("rho_lr", rho_lr, above=0)
        super().__init__(*args, **kwargs)
        if kl_weight is None and self.train_dataset is not None and has_length(self.train_dataset):
            kl_weight = KLWeight(num_examples=len(self.train_dataset))
        self.kl_weight, self.rho_lr = kl_weight, rho_lr
        self._kl_logs: dict = {}
        self.add_callback(_RequireKLLayers())
        if kl_weight is not None:
            self.add_callback(_FollowGlobalStep(kl_weight))

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Return Trainer's loss, in training mode with the weighted KL added. Arguments and result are Trainer's."""
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch)
        if model.training:
            loss = loss + self._weighted_kl(model, num_items_in_batch).to(loss.device)
        return (loss, outputs) if return_outputs else loss

    def _weighted_kl(self, model, num_items_in_batch):
        """Return the term for one micro-batch, such that the KL counts once per optimizer step."""
        if self.kl_weight is None:
            raise ValueError(
                "kl_weight is None and train_dataset has no length, expected one of them: the KL is weighted by 1 / N. "
                "Remedy: kl_weight=klnorm.KLWeight(num_examples=...)."
            )
        kl = kl_divergence(model)
        self._kl_logs = {"kl": kl.detach(), "kl_weight": self.kl_weight.value}
        shares = self.current_gradient_accumulation_steps if self._is_already_scaled(num_items_in_batch) else 1
        return kl * (self.kl_weight.value / shares)

    def _is_already_scaled(self, num_items_in_batch):
        """Whether Trainer takes the loss as scaled for gradient accumulation: the condition in its `training_step`."""
        declared = getattr(self, "loss_is_scaled_for_ga", None)
        if declared is not None:
            return declared
        return (self.model_accepts_loss_kwargs and num_items_in_batch is not None) or (
            self.compute_loss_func is not None
        )

    def log(self, logs, *args, **kwargs):
        """Log as Trainer does, with `kl` and `kl_weight` beside the training loss."""
        if "loss" in logs:
            logs = {**logs, **{name: float(value) for name, value in self._kl_logs.items()}}
        super().log(logs, *args, **kwargs)

    def create_optimizer(self, model=None):
        """Make Trainer's optimizer with the groups of `klnorm.param_groups`; keep an optimizer that was given."""
        if self.optimizer is not None:
            return super().create_optimizer(model)
        target = self.model if model is None else model
        given = self.optimizer_cls_and_kwargs
        cls, kwargs = given or self.get_optimizer_cls_and_kwargs(self.args, target)
        _check_groupable(cls, kwargs)
        groups = param_groups(
            target,
            kwargs.get("lr", self.args.learning_rate),
            rho_lr=self.rho_lr,
            weight_decay=self.args.weight_decay,
        )
        self.optimizer_cls_and_kwargs = cls, {**kwargs, "params": groups}  # "params" replaces Trainer's groups
        try:
            return super().create_optimizer(model)
        finally:
            self.optimizer_cls_and_kwargs = given


class KLTrainer(KLTrainerMixin, Trainer):
    """`transformers.Trainer` with the weighted KL divergence in its training loss: see `KLTrainerMixin`."""


class _FollowGlobalStep(TrainerCallback):
    """Sets the steps of a KLWeight to the optimizer steps that Trainer counts, saves and restores."""

    def __init__(self, kl_weight):
        self.kl_weight = kl_weight

    def on_train_begin(self, args, state, control, **kwargs):
        self.kl_weight.load_state_dict({"steps": state.global_step})

    on_step_end = on_train_begin


class _RequireKLLayers(TrainerCallback):
    """Raises ValueError when a training starts without KL layers; evaluation needs none."""

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        some_kl_layers(model, "the KL divergence in the loss would be 0")


def _check_groupable(cls, kwargs):
    """Raise for an optimizer that cannot take other groups: GaLore, APOLLO, LOMO, and factories such as Muon's."""
    own = {"params", "model", "optimizer_dict"} & kwargs.keys()
    if own or not (isinstance(cls, type) and issubclass(cls, torch.optim.Optimizer)):
        raise ValueError(
            f"the optimizer, {getattr(cls, '__name__', cls)}, comes with groups of its own, expected one without: "
            "the deviations need a learning rate of their own. Remedy: pass optimizers=(optimizer, None)."
        )
