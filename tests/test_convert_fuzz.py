"""A short run of benchmarks/fuzz_convert.py; benchmarks/results/fuzz_convert.json holds a long one."""

import importlib.util
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[1] / "benchmarks" / "fuzz_convert.py"


def test_damaged_files_are_refused_or_harmless():
    spec = importlib.util.spec_from_file_location("fuzz_convert", SCRIPT)
    fuzz = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fuzz)
    result = fuzz.campaign(40, seed=1)
    assert result["crashes"] == []
    assert sum(fuzz.total(result, outcome) for outcome in ("refused", "equal", "changed")) == 40
    assert fuzz.total(result, "refused") >= 20
    checked = [target for target in fuzz.TARGETS if target not in fuzz.WITHOUT_CHECKSUM]
    assert fuzz.total(result, "changed", checked) == 0
