"""Short runs of benchmarks/fuzz_*.py; benchmarks/results/fuzz_*.json hold long ones."""

import importlib
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture
def script(monkeypatch):
    """Import a script by name."""
    monkeypatch.syspath_prepend(SCRIPTS)
    return importlib.import_module


def test_damaged_files_to_convert_are_refused_or_harmless(script):
    fuzz = script("fuzz_convert")
    result = fuzz.campaign(40, seed=1)
    assert result["crashes"] == []
    assert sum(fuzz.total(result, outcome) for outcome in ("refused", "equal", "changed")) == 40
    assert fuzz.total(result, "refused") >= 20
    assert fuzz.summary(result)["changed_despite_checksum"] == 0


def test_damaged_indexes_are_refused_or_equal(script):
    fuzz = script("fuzz_index")
    result = fuzz.campaign(600, seed=1)
    assert result["crashes"] == []
    assert fuzz.summary(result)["changed_despite_checksum"] == 0
    for way in ("verified", "mapped"):
        assert sum(fuzz.total(result, outcome, way) for outcome in ("refused", "equal", "changed")) == 300
        # A header, a cut and more bytes are seen without reading the data.
        assert fuzz.total(result, "refused", way, ("cut", "insert")) == 100
        assert fuzz.total(result, "changed", way, ("cut", "insert", "header")) == 0
    assert fuzz.total(result, "refused", "verified", ("flip",)) == 50


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("equal", ["equal", ""]),
        ("changed", ["changed", ""]),
        ("refuse", ["refused", "one line"]),
        ("two lines", ["crashed", "two\nlines"]),
        ("fail", ["crashed", "KeyError('fail')"]),
        ("eat", ["crashed", "MemoryError()"]),
        ("sleep", ["crashed", "no answer, exit status -9"]),
        ("die", ["crashed", "no answer, exit status -6"]),
    ],
)
def test_what_happens_to_a_child_is_told(script, tmp_path, line, expected):
    child = tmp_path / "child.py"
    child.write_text(CHILD.format(scripts=str(SCRIPTS)))
    worker = script("fuzzing").Child(child, tmp_path, 2)
    try:
        assert list(worker.ask(line)) == expected
        assert list(worker.ask("equal")) == ["equal", ""]  # by the same process or another
    finally:
        worker.close()


CHILD = """
import os, sys, time
sys.path.insert(0, {scripts!r})
import fuzzing

def act(line):
    if line == "refuse":
        raise ValueError("one line")
    if line == "two lines":
        raise ValueError("two\\nlines")
    if line == "fail":
        raise KeyError(line)
    if line == "eat":
        bytearray(2**28)
    if line == "sleep":
        time.sleep(60)
    if line == "die":
        os.abort()
    return line == "equal"

fuzzing.answer_lines(act, (ValueError,), memory=2**26)
"""
