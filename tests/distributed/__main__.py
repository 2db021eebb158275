"""Run every case of ddp.py and fsdp2.py on every rank, each from a generator of its own, and save what they return.

    python -m torch.distributed.run --standalone --nproc-per-node 2 tests/distributed OUTDIR

tests/test_distributed.py starts this, once for all, and looks at what it saves.
"""

import sys
from pathlib import Path

import ddp
import fsdp2
import torch
import torch.distributed as dist

if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    results = {
        program.__name__: {case.__name__: case(dist.get_rank()) for case in program.CASES} for program in (ddp, fsdp2)
    }
    torch.save(results, Path(sys.argv[1]) / f"rank{dist.get_rank()}.pt")
    dist.barrier()  # a rank that has gone aborts the other one, which still communicates
    dist.destroy_process_group()
