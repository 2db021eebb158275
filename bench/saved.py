"""Bytes that autograd keeps between forward and backward."""

import torch


def saved_bytes(forward, x, parameters):
    """(bytes of x, of parameters, of everything else) saved for backward by `forward(x)`; each storage counts once."""
    saved = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = tensor  # held, so that no address is given out twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        outputs = forward(x)
    sizes = {address: tensor.untyped_storage().nbytes() for address, tensor in saved.items() if address}
    of_x = sizes.pop(x.untyped_storage().data_ptr(), 0)
    of_parameters = sum(sizes.pop(p.untyped_storage().data_ptr(), 0) for p in parameters)
    del outputs
    return of_x, of_parameters, sum(sizes.values())
