"""What replacing and restoring may not change, and whether they have."""

import torch


def snapshot(model):
    """Everything about the modules of a model that a failed call must leave as it was."""
    return [
        (name, type(module), dict(vars(module)), list(module._parameters.items()), list(module._buffers.items()))
        for name, module in model.named_modules()
    ]


def graph(model):
    """Every object that hangs on the modules of `model`, by identity, and the values of all tensors."""
    objects, tensors = [], []
    for name, module in model.named_modules():
        objects.append((name, id(module), type(module)))
        for key, value in vars(module).items():
            objects.append((key, id(value), value if isinstance(value, (bool, int, float, str)) else None))
            if isinstance(value, (dict, set)):  # parameters, buffers, children, hooks
                objects.append([(entry, id(value[entry])) if isinstance(value, dict) else entry for entry in value])
        for tensor in [*module._parameters.values(), *module._buffers.values()]:
            if tensor is not None:
                objects.append((tensor._version, tensor.requires_grad, tensor.dtype, tensor.data_ptr()))
                tensors.append(tensor.detach().clone())
    return objects, tensors


def assert_unchanged(model, before):
    objects, tensors = graph(model)
    assert objects == before[0]
    assert all(torch.equal(a, b) for a, b in zip(tensors, before[1], strict=True))
