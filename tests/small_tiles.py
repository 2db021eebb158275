"""Tiles and plans other than the tuned ones: small enough for Triton's interpreter, or of another kind."""

from klnorm import tuning


def prepare(monkeypatch, prepared=True):
    """Whether parameters are prepared, however small the work is."""
    monkeypatch.setattr(tuning, "prepares", lambda rows, n_cols: prepared and rows.noise != "none")


def in_pieces(monkeypatch, block_n, block_m=1):
    """Rows are worked through in small pieces: the interpreter's time is in the number of its programs."""
    shape = tuning.Shape(block_m, block_n, 4)
    monkeypatch.setattr(tuning, "is_wide", lambda n_cols, itemsize: True)
    for name in "forward_shape", "dx_wide_shape", "sums_wide_shape":
        monkeypatch.setattr(tuning, name, lambda *args: shape)


def in_halves(monkeypatch):
    """Rows of up to 128 features are taken in halves by the backward of a draw a row."""
    monkeypatch.setattr(tuning, "backward_shape", lambda *args: tuning.Shape(1, 64, 4))
