"""Code that exists because of other libraries or uses private parts of torch: short functions, each with its reason."""

import inspect

import torch
from torch import nn

from . import checks

# ---- torch ----------------------------------------------------------------------------------------------------------

# These are private because torch has no public equivalent. Without the first, transforms end in an error of torch.
# Without the others, every call goes through the dispatcher, which is correct but slower.
transforms_active = getattr(torch._C, "_are_functorch_transforms_active", bool)
_active_modes = getattr(torch._C, "_len_torch_dispatch_stack", lambda: True)
_has_storage = getattr(torch._C, "_has_storage", lambda tensor: False)
_PLAIN = {torch.Tensor, nn.Parameter}


def transforming():
    """Whether a transform of torch.func (grad, vmap, ...) is active; False under torch.compile."""
    return not torch.compiler.is_compiling() and transforms_active()


def in_backward():
    """Whether a backward pass is running: a forward is then a repeat by checkpointing. False under torch.compile."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def is_watched():
    """Whether tracing, a transform or a dispatch mode is active, which has to see the operators."""
    return torch.compiler.is_compiling() or transforms_active() or _active_modes()


def are_plain(*tensors):
    """Whether a call with these tensors may skip torch's dispatcher, the largest part of a small call's time.

    The dispatcher is needed for subclasses of Tensor, for the meta device, for tensors with the negative bit, which it
    resolves, and for the tensors of is_grads_batched=True, which have no memory.
    """
    for t in tensors:
        if t is not None and (type(t) not in _PLAIN or t.is_neg() or t.is_meta or not _has_storage(t)):
            return False
    return True


def is_readable(tensor):
    """Whether the host can read the value: not on the meta device, nor under tracing, transforms or graph capture."""
    return (
        type(tensor) is torch.Tensor
        and tensor.device.type != "meta"
        and not (torch.compiler.is_compiling() or transforms_active())
        and not (tensor.is_cuda and torch.cuda.is_current_stream_capturing())
    )


def guard_shortcut(layer, guarded):
    """Attach a hook that does nothing to `layer` if `guarded`, else remove it.

    In evaluation mode nn.TransformerEncoderLayer does not call its norms: it reads their weight and bias, unless one of
    its modules has a hook: https://docs.pytorch.org/docs/stable/generated/torch.nn.TransformerEncoderLayer.html
    """
    if guarded and layer._shortcut_guard is None:
        layer._shortcut_guard = layer.register_forward_pre_hook(_nothing)
    elif not guarded and layer._shortcut_guard is not None:
        layer._shortcut_guard.remove()
        layer._shortcut_guard = None


def _nothing(module, args):
    """Do nothing, as a forward pre-hook."""


# ---- Checkpoints of plain norms --------------------------------------------------------------------------------------


def with_posterior(layer, state_dict, prefix, assigned):
    """Return `state_dict`; if it holds a plain norm, add the posterior of `layer`: loaded values become means and prior
    means, deviations stay. With prior="standard" (`klnorm.replace_layer_norm`) prior means stay as well.

    `assigned`: loaded tensors replace the layer's (assign=True), so added tensors get their device and dtype.
    """
    added = [f"{prefix}{name}_{kind}" for name in layer._means for kind in ("rho", "prior")]
    if f"{prefix}weight" not in state_dict or any(key in state_dict for key in added):
        return state_dict
    state_dict = dict(state_dict)
    for name in layer._means:
        loaded = state_dict.get(f"{prefix}{name}")
        if loaded is None:
            continue
        rho, prior = getattr(layer, f"{name}_rho"), getattr(layer, f"{name}_prior")
        if isinstance(loaded, torch.Tensor):  # torch refuses anything else, naming this key alone
            rho = rho if rho is None or not assigned else _rho_like(layer, rho.detach(), loaded)
            prior = prior if prior is None else layer._prior_for(name, loaded)
        values = (f"{prefix}{name}_rho", rho), (f"{prefix}{name}_prior", prior)
        state_dict.update({key: value for key, value in values if value is not None})
    return state_dict


def _rho_like(layer, rho, loaded):
    return torch.full_like(loaded, layer._initial_rho()) if rho.is_meta else rho.to(loaded)


# ---- FSDP2 ----------------------------------------------------------------------------------------------------------


def is_sharded(tensor):
    """Whether FSDP2 has sharded the tensor, a DTensor; builds of torch without distributed lack that class."""
    return hasattr(tensor, "device_mesh")


def whole(tensor):
    """Return the full tensor of a DTensor, for which all its ranks communicate; a plain tensor as it is."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def sum_over_shards(total, mean, parameters, priors):
    """Apply `total(parameters, priors)`, a sum over elements, to each rank's shards; return a DTensor of partial sums.

    `parameters`: lists of DTensors sharded like `mean`; `priors`: tensors that every rank holds whole.
    Ranks send nothing.
    """
    from torch.distributed.tensor import DTensor, Partial, distribute_tensor

    mesh, placements = mean.device_mesh, mean.placements
    priors = [distribute_tensor(prior, mesh, placements, src_data_rank=None).to_local() for prior in priors]
    local = total([[t.to_local() for t in tensors] for tensors in parameters], priors)
    of_sum = [Partial() if placement.is_shard() else placement for placement in placements]
    return DTensor.from_local(local, mesh, of_sum, run_check=False)


# ---- transformers ---------------------------------------------------------------------------------------------------


def initialize_unloaded(layer):
    """Initialize the tensors of `layer` that transformers has not loaded from a checkpoint.

    transformers marks the tensors that it has loaded and allocates the others without values. It initializes a norm's
    weight and bias, then marks the module; on that mark the layer initializes its other tensors. See
    https://github.com/huggingface/transformers/blob/main/src/transformers/initialization.py
    """
    for name, initialize in layer._initializers().items():
        tensor = getattr(layer, name)
        if tensor is not None and not getattr(tensor, "_is_hf_initialized", False):
            initialize(tensor)


# ---- PEFT -----------------------------------------------------------------------------------------------------------


def children_in_use(module, is_kl_layer):
    """Return [(name, child)] of `module`; for a PEFT wrapper of a KL layer only the active adapter's copies of it.

    modules_to_save and LN tuning copy a layer for every adapter: https://huggingface.co/docs/peft/package_reference/peft_model
    """
    children = [(name, child) for name, child in module._modules.items() if child is not None]
    if not hasattr(type(module), "adapter_layer_names"):
        return children
    copies = _active_copies(module)
    if any(is_kl_layer(m) for _, copy in copies for m in copy.modules()):
        return copies
    return [(name, child) for name, child in children if name not in module.adapter_layer_names]


def _active_copies(wrapper):
    """Return [(name, module)] of the copies that PEFT runs in place of the layer that it wraps."""
    if wrapper.disable_adapters or wrapper.merged_adapters:  # PEFT has swapped a merged copy with the base layer
        return []
    by_adapter = [(name, wrapper._modules.get(name)) for name in wrapper.adapter_layer_names]
    return [
        (f"{name}.{adapter}", copies[adapter])
        for name, copies in by_adapter
        if isinstance(copies, nn.ModuleDict)
        for adapter in wrapper.active_adapters
        if adapter in copies
    ]


# ---- accelerate, and other libraries that set `layer.forward` --------------------------------------------------------

_REMEDY_OF_OFFLOADING = (
    "Remedy: around the call enter accelerate.utils.align_module_device(layer) for every layer of "
    "klnorm.kl_layers(model).values(), all in one contextlib.ExitStack()."
)


def check_not_absent(name, layer, key, tensor):
    """Raise for a tensor on the meta device, where accelerate keeps offloaded parameters outside of forward.

    https://huggingface.co/docs/accelerate/usage_guides/big_modeling
    """
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
    """Raise for a layer whose parameters accelerate has offloaded: they have values during its forward only."""
    if "_hf_hook" in vars(layer):
        for key, tensor in layer.named_parameters(recurse=False):
            check_not_absent(name, layer, key, tensor)


def check_not_split(layers):
    """Raise if some tensors of the layers are on the meta device and others are not."""
    held = [
        (name, layer, key, tensor)
        for name, layer in layers.items()
        for key, tensor in layer.posterior_and_prior()._asdict().items()
        if tensor is not None
    ]
    if not all(tensor.is_meta for *_, tensor in held):
        for each in held:
            check_not_absent(*each)


def overrides_forward(layer):
    """Whether `forward` is an attribute of the instance, which overrides that of its class."""
    return "forward" in vars(layer)


def check_samples(name, layer):
    """Raise for a layer in training mode whose forward was replaced, as by Liger or unsloth, rather than wrapped: it
    does not sample, so its KL divergence must not enter the loss.
    """
    forward = inspect.unwrap(layer.forward)  # wrappers, accelerate's among them, set __wrapped__
    own = inspect.unwrap(type(layer).forward)
    if layer.training and layer.posterior == "sampled" and getattr(forward, "__func__", forward) is not own:
        raise ValueError(
            f"layer {checks.named(name)} is in training mode with a forward that another library put into it, expected "
            "its own: nothing is sampled, so there is no KL divergence to charge. Remedy: del layer.forward; or, where "
            "it calls the layer's own, make it with functools.wraps(layer.forward)."
        )
