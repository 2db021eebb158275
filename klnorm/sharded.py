"""Parameters that FSDP2 has sharded: DTensors."""


def whole(tensor):
    """A plain tensor; for a DTensor the whole of it, for which all its ranks communicate."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def is_sharded(tensor):
    """Whether it is a DTensor."""
    return hasattr(tensor, "device_mesh")  # its class is there to be asked for only where torch has it
