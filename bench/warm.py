"""Compile ahead of timing, in processes side by side: what they compile, the timed process finds in caches on disk."""

import concurrent.futures
import multiprocessing
import time


def warm(function, items, workers, seconds):
    """Call `function(item)` for every item in `workers` processes; stop handing out after `seconds`. Number done.

    What an item raises is not reported here: the timed process will meet it again.
    """
    deadline = time.monotonic() + seconds
    context = multiprocessing.get_context("spawn")
    done = 0
    with concurrent.futures.ProcessPoolExecutor(workers, mp_context=context) as pool:
        futures = [pool.submit(function, item) for item in items]
        try:
            for future in concurrent.futures.as_completed(futures, timeout=max(0.0, deadline - time.monotonic())):
                done += future.exception() is None
        except concurrent.futures.TimeoutError:
            pool.shutdown(wait=True, cancel_futures=True)
    return done
