"""Changes to a model that last as long as a `with` block; blocks may overlap in threads, generators and coroutines."""

import contextlib
import threading
import weakref

# One lock for all blocks, because they change the same modules. It is reentrant: the garbage collector may close a
# generator, and with it the block that the generator has open, while another block makes its change.
LOCK = threading.RLock()


class Temporary:
    """The value of a boolean attribute while a block is open. Copies and pickles get the value outside of blocks."""

    def __init__(self, value):
        self._value = value

    def __bool__(self):
        return self._value

    def __reduce__(self):
        return bool, (not self._value,)


class Switch:
    """A change of modules that lasts while any block is open: the first block makes it, the last one to end undoes it.

    Args:
        applies: function of a module that no open block has changed: whether a block changes it.
        change, undo: functions of a module; a second call has no further effect.
    """

    def __init__(self, applies, change, undo):
        self._applies, self._change, self._undo = applies, change, undo
        self._blocks = weakref.WeakKeyDictionary()  # module -> the open blocks that changed it

    @contextlib.contextmanager
    def on(self, model):
        """Context manager that changes the modules of `model`."""
        block, modules = object(), []
        try:
            with LOCK:
                modules += [module for module in model.modules() if module in self._blocks or self._applies(module)]
                for module in modules:
                    self._blocks.setdefault(module, set()).add(block)
                    self._change(module)
            yield
        finally:
            with LOCK:
                for module in modules:
                    self._end(block, module)

    def _end(self, block, module):
        blocks = self._blocks.get(module, set())
        blocks.discard(block)
        if not blocks:
            self._blocks.pop(module, None)
            self._undo(module)
