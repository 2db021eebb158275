"""Bytes that autograd keeps between forward and backward."""

import torch


def saved_bytes(forward, inputs, parameters):
    """(bytes of what is normalized, of parameters, of everything else) saved for backward by `forward(*inputs)`.

    What is normalized is x, or x and residual, and their sum, the output after y. Each storage counts once.
    """
    saved = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = tensor  # held, so that no address is given out twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        outputs = forward(*inputs)
    sizes = {address: tensor.untyped_storage().nbytes() for address, tensor in saved.items() if address}
    normalized = [*inputs, *outputs[1 : len(inputs)]]
    of_normalized, of_parameters = (
        sum(sizes.pop(t.untyped_storage().data_ptr(), 0) for t in tensors) for tensors in (normalized, parameters)
    )
    return of_normalized, of_parameters, sum(sizes.values())
