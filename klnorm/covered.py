"""What another library has put over a layer, so that its KL divergence would be none, or another one."""

import inspect

from . import checks

_REMEDY_OF_OFFLOADING = (
    "Remedy: around the call enter accelerate.utils.align_module_device(layer) for every layer of "
    "klnorm.kl_layers(model).values(), all in one contextlib.ExitStack()."
)


def check_not_absent(name, layer, key, tensor):
    """Raise for a tensor on the meta device."""
    if not tensor.is_meta:
        return
    what = f"{key} of layer {checks.named(name)} is on the meta device"
    if "_hf_hook" in vars(layer):
        raise ValueError(
            f"{what}, where accelerate leaves what it has offloaded outside of forward, expected one that holds "
            f"values. {_REMEDY_OF_OFFLOADING}"
        )
    raise ValueError(
        f"{what}, expected one that holds values. Remedy: model.to_empty(device=...), then load a checkpoint."
    )


def check_not_offloaded(name, layer):
    """Raise for a layer whose parameters accelerate brings for its forward alone."""
    if "_hf_hook" in vars(layer):
        for key, tensor in layer.named_parameters(recurse=False):
            check_not_absent(name, layer, key, tensor)


def check_not_split(layers):
    """Raise for layers of which some tensors are on the meta device and some not."""
    held = [
        (name, layer, key, tensor)
        for name, layer in layers.items()
        for key, tensor in layer.posterior_and_prior()._asdict().items()
        if tensor is not None
    ]
    if not all(tensor.is_meta for *_, tensor in held):
        for each in held:
            check_not_absent(*each)


def check_forward(name, layer):
    """Raise for a layer that would sample but for a forward that does not call its own."""
    forward = inspect.unwrap(layer.forward)  # accelerate's hooks, and whoever else wraps one, leave __wrapped__
    own = inspect.unwrap(type(layer).forward)
    if layer.training and layer.posterior == "sampled" and getattr(forward, "__func__", forward) is not own:
        raise ValueError(
            f"layer {checks.named(name)} is in training mode with a forward that another library put into it, expected "
            "its own: nothing is sampled, so there is no KL divergence to charge. Remedy: del layer.forward; or, where "
            "it calls the layer's own, make it with functools.wraps(layer.forward)."
        )
