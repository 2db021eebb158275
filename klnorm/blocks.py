"""What `with` blocks change in a model meanwhile, where they overlap: in threads, generators, coroutines."""

import contextlib
import threading
import weakref

# One for all, as blocks change the same modules. Reentrant, as the garbage collector may close a generator, and with it
# the block that this has left open, in the middle of another block's change.
LOCK = threading.RLock()


class Meanwhile:
    """A flag's value while a block is open. What is copied or pickled then, no block ends for: it gets the opposite."""

    def __init__(self, value):
        self._value = value

    def __bool__(self):
        return self._value

    def __reduce__(self):
        return bool, (not self._value,)


class Switch:
    """A change of modules for as long as any block is open: the first block makes it, the last one to end undoes it.

    Args:
        applies: whether a block changes this module, as it is outside of blocks.
        change, undo: functions of a module, which do no harm when done twice.
    """

    def __init__(self, applies, change, undo):
        self._applies, self._change, self._undo = applies, change, undo
        self._blocks = weakref.WeakKeyDictionary()  # module -> the open blocks that changed it

    @contextlib.contextmanager
    def on(self, model):
        """A block for all modules of `model`."""
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
