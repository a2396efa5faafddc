"""The notebooks are what their scripts make, and the scripts run as a stranger runs them, in an empty folder.

    jupytext --to ipynb notebooks/*.py

makes them again.
"""

import os
import subprocess
import sys
from pathlib import Path

import jupytext
import pytest

NOTEBOOKS = Path(__file__).resolve().parents[1] / "notebooks"
SCRIPTS = sorted(NOTEBOOKS.glob("*.py"))


def cells(path):
    return [(cell.cell_type, cell.source) for cell in jupytext.read(path).cells]


def test_every_script_has_its_notebook_and_every_notebook_its_script():
    assert len(SCRIPTS) == 2
    assert [path.stem for path in sorted(NOTEBOOKS.glob("*.ipynb"))] == [path.stem for path in SCRIPTS]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_a_notebook_is_what_its_script_makes(script):
    made = cells(script.with_suffix(".ipynb"))
    assert made == cells(script)
    assert {kind for kind, _ in made} == {"code", "markdown"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "expected", "files"),
    [
        ("search_images", ["10,800 codes of 6 bytes", "mAP 0.", "True"], ["gallery.safetensors", "ranked_list.png"]),
        (
            "train",
            ["epoch 2: loss", "R@1"],
            ["models_gpq/gpq_48bits_2.keras", "models_spq/spq_32bits_best.keras", "models_cgd/cgd_96d_best.keras"],
        ),
    ],
)
def test_a_script_runs_in_an_empty_folder(tmp_path, name, expected, files):
    environment = {**os.environ, "MPLBACKEND": "agg", "TF_CPP_MIN_LOG_LEVEL": "3"}
    program = [sys.executable, NOTEBOOKS / f"{name}.py"]
    ran = subprocess.run(program, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-2000:]
    for text in expected:
        assert text in ran.stdout
    assert all((tmp_path / file).stat().st_size > 1000 for file in files)
