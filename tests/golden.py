"""Golden numbers recorded from the original programs; they lie beside the clone, not in it."""

from pathlib import Path

import numpy as np
import pytest

SHARED = Path(__file__).resolve().parents[2] / "shared"
GPQ, SPQ, CGD = (SHARED / "golden" / head for head in ("gpq", "spq", "cgd"))

needs_golden = pytest.mark.skipif(
    not GPQ.parent.is_dir(), reason="the golden numbers (../shared/golden) do not lie beside this checkout"
)


def load(relative, folder=GPQ):
    """The arrays of one golden .npz, as a dict; `relative` to the folder, such as "ops.npz"."""
    with np.load(folder / relative) as stored:
        return {name: stored[name] for name in stored.files}


def worst(actual, expected):
    """Largest absolute difference, relative to the largest magnitude of `expected`."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    if actual.shape != expected.shape:
        raise AssertionError(f"shapes differ: {actual.shape} and {expected.shape}")
    return np.abs(actual - expected).max() / max(np.abs(expected).max(), 1e-30)
