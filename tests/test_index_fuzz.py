"""A short run of benchmarks/fuzz_index.py; benchmarks/results/fuzz_index.json holds a long one."""

import importlib.util
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[1] / "benchmarks" / "fuzz_index.py"


def test_damaged_indexes_are_refused_or_equal():
    spec = importlib.util.spec_from_file_location("fuzz_index", SCRIPT)
    fuzz = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fuzz)
    result = fuzz.campaign(600, seed=1)
    assert result["crashes"] == []
    assert fuzz.changed_unseen(result) == 0
    for way in ("verified", "mapped"):
        assert sum(fuzz.total(result, outcome, way) for outcome in ("refused", "equal", "changed")) == 300
        # A header, a cut and more bytes are seen without reading the data.
        assert fuzz.total(result, "refused", way, ("cut", "insert")) == 100
        assert fuzz.total(result, "changed", way, ("cut", "insert", "header")) == 0
    assert fuzz.total(result, "refused", "verified", ("flip",)) == 50
