"""Benchmarks; run from the root as `python -m bench.norms`. Not installed with klnorm."""
