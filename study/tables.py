"""Tables of the report."""

from tabulate import tabulate

LEVEL = 0.05
COMPARISON = ["seeds", "difference", "95 % interval (BCa)", "p, sign flips", "p, Holm", "verdict at 5 %"]


def table(header, rows):
    """A Markdown table of cells that are written as they stand: the first column to the left, others to the right."""
    alignment = ["left"] + ["right"] * (len(header) - 1) if rows else None
    return tabulate(rows, header, "pipe", disable_numparse=True, colalign=alignment)


def comparison_cells(comparison, p=None, tests=1):
    """Cells under COMPARISON, of NLLs; `p` is corrected for so many tests, None of what was seen before."""
    c = comparison
    first = [c.seeds, f"{c.mean:+.4f}", f"{c.low:+.4f} to {c.high:+.4f}"]
    return [*first, "-", "-", "seen before"] if p is None else [*first, f"{c.p:.4f}", f"{p:.4f}", verdict(c, p, tests)]


def verdict(comparison, p, tests):
    """Of an NLL. With n seeds no p of a sign-flip test is less than 2 / 2^n, and Holm takes it times the tests."""
    if p < LEVEL:
        return "better" if comparison.mean < 0 else "worse"
    few = tests * 2.0 ** (1 - comparison.seeds) >= LEVEL
    return "too few seeds to show one" if few else "no difference shown"
