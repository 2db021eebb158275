"""What other libraries, and what is private in torch, make necessary: one short function each, with its reason."""

import inspect

import torch
from torch import nn

from . import checks

# ---- torch ----------------------------------------------------------------------------------------------------------

# Private, as nothing public tells. Where a version of torch lacks the first, torch's own error refuses the transforms;
# where it lacks the others, every call goes through the dispatcher, which is right and slower.
transforms_active = getattr(torch._C, "_are_functorch_transforms_active", bool)
_active_modes = getattr(torch._C, "_len_torch_dispatch_stack", lambda: True)
_has_storage = getattr(torch._C, "_has_storage", lambda tensor: False)
_PLAIN = {torch.Tensor, nn.Parameter}


def transforming():
    """Whether a transform of torch.func (grad, vmap, ...) runs, outside of torch.compile."""
    return not torch.compiler.is_compiling() and transforms_active()


def in_backward():
    """Whether a backward pass runs, outside of torch.compile: a forward is then one that checkpointing repeats."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def is_watched():
    """Whether tracing, a transform or a dispatch mode has to see the operators now."""
    return torch.compiler.is_compiling() or transforms_active() or _active_modes()


def are_plain(*tensors):
    """Whether torch's dispatcher, which costs more than all else here, would only pass an operator of these on.

    Subclasses of tensors and the meta device have to see it. So have tensors whose memory holds the negative of their
    values, which the dispatcher turns into plain ones, and those of is_grads_batched=True, which have no memory.
    """
    for t in tensors:
        if t is not None and (type(t) not in _PLAIN or t.is_neg() or t.is_meta or not _has_storage(t)):
            return False
    return True


def is_readable(tensor):
    """Whether the value can be looked at now: not traced, transformed, captured into a CUDA graph, or absent."""
    return (
        type(tensor) is torch.Tensor
        and tensor.device.type != "meta"
        and not (torch.compiler.is_compiling() or transforms_active())
        and not (tensor.is_cuda and torch.cuda.is_current_stream_capturing())
    )


def guard_shortcut(layer, guarded):
    """Attach a hook that does nothing to `layer`, or take it away.

    nn.TransformerEncoderLayer in evaluation mode reads the weight and bias of its norms without calling them, unless
    one of its modules has a hook: https://docs.pytorch.org/docs/stable/generated/torch.nn.TransformerEncoderLayer.html
    """
    if guarded and layer._shortcut_guard is None:
        layer._shortcut_guard = layer.register_forward_pre_hook(_nothing)
    elif not guarded and layer._shortcut_guard is not None:
        layer._shortcut_guard.remove()
        layer._shortcut_guard = None


def _nothing(module, args):
    """A forward hook."""


# ---- Checkpoints of plain norms --------------------------------------------------------------------------------------


def with_posterior(layer, state_dict, prefix, assigned):
    """`state_dict`; where it holds a plain norm, with a posterior for `layer`: the loaded values become means and prior
    means, deviations stay. A prior that `klnorm.replace_layer_norm` centred on the standard values stays as well.

    `assigned`: the tensors loaded replace those of the layer, so that what is added has to be where they are.
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
        if isinstance(loaded, torch.Tensor):  # what is none torch refuses, and says so of it alone
            rho = rho if rho is None or not assigned else _rho_like(layer, rho.detach(), loaded)
            prior = prior if prior is None else layer._prior_for(name, loaded)
        values = (f"{prefix}{name}_rho", rho), (f"{prefix}{name}_prior", prior)
        state_dict.update({key: value for key, value in values if value is not None})
    return state_dict


def _rho_like(layer, rho, loaded):
    return torch.full_like(loaded, layer._initial_rho()) if rho.is_meta else rho.to(loaded)


# ---- FSDP2 ----------------------------------------------------------------------------------------------------------


def is_sharded(tensor):
    """Whether FSDP2 has sharded it: it is a DTensor, whose class is there to be asked for only where torch has it."""
    return hasattr(tensor, "device_mesh")


def whole(tensor):
    """A plain tensor; for a DTensor the whole of it, for which all its ranks communicate."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def sum_over_shards(total, mean, parameters, priors):
    """`total(parameters, priors)`, a sum over elements, of every rank's shards alone, as a DTensor of partial sums.

    `parameters`: lists of DTensors that are sharded like `mean`; `priors`: tensors that every rank has whole, so that
    nothing is sent.
    """
    from torch.distributed.tensor import DTensor, Partial, distribute_tensor

    mesh, placements = mean.device_mesh, mean.placements
    priors = [distribute_tensor(prior, mesh, placements, src_data_rank=None).to_local() for prior in priors]
    local = total([[t.to_local() for t in tensors] for tensors in parameters], priors)
    of_sum = [Partial() if placement.is_shard() else placement for placement in placements]
    return DTensor.from_local(local, mesh, of_sum, run_check=False)


# ---- transformers ---------------------------------------------------------------------------------------------------


def initialize_unloaded(layer):
    """Give values to the tensors of `layer` that no checkpoint had.

    transformers marks tensors that it has loaded, gives the others memory without values, initializes what it knows of
    a norm, weight and bias, and then marks the module: the moment to initialize what it does not know. See
    https://github.com/huggingface/transformers/blob/main/src/transformers/initialization.py
    """
    for name, initialize in layer._initializers().items():
        tensor = getattr(layer, name)
        if tensor is not None and not getattr(tensor, "_is_hf_initialized", False):
            initialize(tensor)


# ---- PEFT -----------------------------------------------------------------------------------------------------------


def children_in_use(module, is_kl_layer):
    """(name, child) of `module`; of a wrapper of PEFT that keeps copies of a KL layer the active adapter's alone.

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
    """(name, module) of what PEFT puts in the place of the layer that it has wrapped."""
    if wrapper.disable_adapters or wrapper.merged_adapters:  # a merged copy has changed places with the base layer
        return []
    by_adapter = [(name, wrapper._modules.get(name)) for name in wrapper.adapter_layer_names]
    return [
        (f"{name}.{adapter}", copies[adapter])
        for name, copies in by_adapter
        if isinstance(copies, nn.ModuleDict)
        for adapter in wrapper.active_adapters
        if adapter in copies
    ]


# ---- accelerate, and others that put a forward over a layer's own ----------------------------------------------------

_REMEDY_OF_OFFLOADING = (
    "Remedy: around the call enter accelerate.utils.align_module_device(layer) for every layer of "
    "klnorm.kl_layers(model).values(), all in one contextlib.ExitStack()."
)


def check_not_absent(name, layer, key, tensor):
    """Raise for a tensor on the meta device, where accelerate leaves what it has offloaded outside of forward.

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


def has_forward_of_its_own(layer):
    """Whether somebody has put a forward into the instance, over that of its class."""
    return "forward" in vars(layer)


def check_samples(name, layer):
    """Raise for a layer in training mode whose forward does not call that of its class, as one that Liger or unsloth
    puts there: nothing is sampled, and the KL divergence would be charged all the same.
    """
    forward = inspect.unwrap(layer.forward)  # accelerate's hooks, and whoever else wraps one, leave __wrapped__
    own = inspect.unwrap(type(layer).forward)
    if layer.training and layer.posterior == "sampled" and getattr(forward, "__func__", forward) is not own:
        raise ValueError(
            f"layer {checks.named(name)} is in training mode with a forward that another library put into it, expected "
            "its own: nothing is sampled, so there is no KL divergence to charge. Remedy: del layer.forward; or, where "
            "it calls the layer's own, make it with functools.wraps(layer.forward)."
        )
