"""The KL divergence in the training loop of Lightning's Trainer."""

import torch
from lightning.pytorch import Callback

from ..kl import kl_divergence, kl_layers, some_kl_layers
from ..training import KLWeight


class KLCallback(Callback):
    """Adds the gradient of the weighted KL divergence once per optimizer step, and logs `kl` (nats) and `kl_weight`.

    `training_step` stays as it is and returns the loss of the data, without the KL. The callback adds the gradient
    after those of all micro-batches and processes are combined and unscaled, and before they are clipped, so it works
    with `accumulate_grad_batches`, gradient clipping, mixed precision and DDP. It counts steps in `kl_weight`, which
    checkpoints save and restore. Every optimizer that holds posteriors gets their gradient, and its steps are counted.

    Args:
        kl_weight: a `klnorm.KLWeight`.

    Raises:
        TypeError: `kl_weight` is not a KLWeight.
        ValueError: in training, if the model has no KL layers, or the optimizer is fused under a gradient scaler:
            gradients are then still scaled.

    Example:
        >>> from lightning.pytorch import LightningModule, Trainer
        >>> class Classifier(LightningModule):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.net = klnorm.replace_layer_norm(nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 2)))
        ...     def training_step(self, batch, index):
        ...         return F.cross_entropy(self.net(batch[0]), batch[1])
        ...     def configure_optimizers(self):
        ...         return torch.optim.AdamW(klnorm.param_groups(self, lr=1e-3))
        >>> data = torch.utils.data.TensorDataset(torch.randn(32, 8), torch.randint(2, (32,)))
        >>> callback = KLCallback(klnorm.KLWeight(num_examples=len(data), warmup_steps=2))
        >>> trainer = Trainer(max_epochs=1, callbacks=[callback], accelerator="cpu", logger=False,
        ...                   enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
        >>> trainer.fit(Classifier(), torch.utils.data.DataLoader(data, batch_size=8))
        >>> callback.kl_weight
        KLWeight(value=0.03125, steps=4)
    """

    def __init__(self, kl_weight: KLWeight) -> None:
        if not isinstance(kl_weight, KLWeight):
            raise TypeError(
                f"kl_weight is a {type(kl_weight).__name__}, expected a klnorm.KLWeight. "
                "Remedy: klnorm.KLWeight(num_examples=len(train_set))."
            )
        self.kl_weight = kl_weight

    def on_train_start(self, trainer, pl_module):
        some_kl_layers(pl_module, "the KL divergence to train with would be 0")

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        held = {parameter for group in optimizer.param_groups for parameter in group["params"]}
        posteriors = [p for layer in kl_layers(pl_module).values() for p in layer.posterior_parameters()]
        parameters = [p for p in posteriors if p in held and p.requires_grad]
        if not parameters:
            return
        _check_unscaled(trainer, optimizer)
        kl = kl_divergence(pl_module)
        # Not backward(), which would start another reduction of DDP.
        gradients = torch.autograd.grad(kl * self.kl_weight.value, parameters)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)
        pl_module.log_dict({"kl": kl.detach(), "kl_weight": self.kl_weight.value})
        self.kl_weight.step()

    def state_dict(self):
        return self.kl_weight.state_dict()

    def load_state_dict(self, state_dict):
        self.kl_weight.load_state_dict(state_dict)


def _check_unscaled(trainer, optimizer):
    scaled = getattr(trainer.precision_plugin, "scaler", None) is not None
    if scaled and getattr(optimizer, "_step_supports_amp_scaling", False):
        raise ValueError(
            "optimizer is fused and unscales gradients in its own step, expected one that does not: the gradient of "
            "the KL would be added to scaled ones. Remedy: fused=False, or precision='bf16-mixed'."
        )
