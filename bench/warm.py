"""Compile ahead of timing, in processes side by side: what they compile, the timed process finds in caches on disk."""

import contextlib
import multiprocessing
import time


def warm(function, items, workers, seconds):
    """Call `function(item)` for every item in `workers` processes, ended after `seconds` at the latest. Number done.

    What an item raises is not reported here: the timed process will meet it again. One that hangs or dies takes no more
    than its own process with it.
    """
    deadline = time.monotonic() + seconds
    context = multiprocessing.get_context("spawn")
    begun, done = context.Value("i", 0), context.Value("i", 0)
    processes = [context.Process(target=_work, args=(function, items, begun, done)) for _ in range(workers)]
    try:
        for process in processes:
            process.start()
        for process in processes:
            process.join(max(0.0, deadline - time.monotonic()))
    finally:
        for process in processes:
            if process.is_alive():
                process.kill()
                process.join(10)  # its memory on the GPU is wanted back before anything is timed
    return done.get_obj().value  # without the lock, which a killed process may hold


def _work(function, items, begun, done):
    while True:
        with begun.get_lock():
            begun.value += 1
            place = begun.value - 1
        if place >= len(items):
            return
        with contextlib.suppress(Exception):
            function(items[place])
            with done.get_lock():
                done.value += 1
