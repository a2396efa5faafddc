"""Scripts in benchmarks/ that make or replace what is shipped: wrong input is told first, and nothing is written."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from gpq_tf.data import jpegs, metric_learning

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def shades(seed):
    """uint8 (64, 64, 3), smooth, as JPEG keeps it."""
    corners = np.random.default_rng(seed).uniform(0, 255, (2, 2, 3))
    at = np.linspace(0, 1, 64)
    rows = corners[0] + at[:, None, None] * (corners[1] - corners[0])
    return (rows[:, None, 0] + at[None, :, None] * (rows[:, None, 1] - rows[:, None, 0])).astype("uint8")


def run(folder, script, *given):
    command = [sys.executable, str(BENCHMARKS / script), *map(str, given)]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("pretrain.py nothing.npz out.mat", "No such file or directory: 'nothing.npz'"),
        ("pretrain.py nothing.npz out", "expected a target that ends in .mat, received 'out'"),
        ("pretrain.py nothing.npz out.mat --save_term=0", "expected an integer of 1 or more, received '0'"),
        ("pretrain.py nothing.npz out.mat --precision=bf16", "invalid choice: 'bf16'"),
        ("ship_weights.py gpq-cifar10-48bits ../other", "expected a NAME of small letters, digits and hyphens"),
        ("ship_weights.py gpq-cifar10-48bits gpq-cifar10-48bits", "is shipped already; --replace puts another"),
        pytest.param(
            "ship_weights.py spq-cifar10-32bits another --codebook=pulled",
            "is for models of the head gpq, received one of spq",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "ship_weights.py spq-cifar10-32bits another --data_dir=absent",
            "Invalid data_dir absent",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "gpq_scoring.py cgd-tinyimagenet-32bytes", "Expected one of the head gpq. Received", marks=pytest.mark.slow
        ),
        ("learning.py . --variants=none", "expected variants among 'published', received none"),
        ("learning.py . --plan=bits --pretrained=none.mat", "none.mat does not exist"),
        ("pack_tinyimagenet.py absent out.npz", "No such file or directory: 'absent/wnids.txt'"),
    ],
)
def test_wrong_input_is_told_and_nothing_written(tmp_path, given, message):
    script, *arguments = given.split()
    shipped = BENCHMARKS.parent / "gpq_tf" / "weights"
    before = {path.name: path.stat().st_mtime_ns for path in shipped.iterdir()}
    ran = run(tmp_path, script, *arguments)
    assert ran.returncode == 2 and "Traceback" not in ran.stderr
    assert message in " ".join(ran.stderr.split())
    assert not list(tmp_path.iterdir())
    assert {path.name: path.stat().st_mtime_ns for path in shipped.iterdir()} == before


def test_tiny_imagenet_is_packed_for_pretraining_and_as_a_stand_in(tmp_path):
    from PIL import Image

    archive = tmp_path / "tiny"
    wnids = ["n2", "n1"]
    for number, wnid in enumerate(wnids):
        images = archive / "train" / wnid / "images"
        images.mkdir(parents=True)
        boxes = []
        for i in range(3):
            Image.fromarray(shades(10 * number + i)).save(images / f"{wnid}_{i}.JPEG")
            boxes.append(f"{wnid}_{i}.JPEG\t{i}\t1\t{40 + i}\t60")
        (archive / "train" / wnid / f"{wnid}_boxes.txt").write_text("\n".join(boxes) + "\n")
    (archive / "val" / "images").mkdir(parents=True)
    Image.fromarray(shades(5)).convert("L").save(archive / "val" / "images" / "v.JPEG")
    (archive / "val" / "val_annotations.txt").write_text("v.JPEG\tn1\t0\t0\t63\t63\n")
    (archive / "wnids.txt").write_text("n2\nn1\n")
    (archive / "words.txt").write_text("n1\tcat, feline\nn2\tgreat dog\nn3\tother\n")
    assert run(tmp_path, "pack_tinyimagenet.py", archive, "out.npz", "--stand_in=set").returncode == 0

    images, labels, names = jpegs.load_jpegs(tmp_path / "out.npz", "train")
    assert (labels.tolist(), names) == ([0, 0, 0, 1, 1, 1], ["great dog", "cat"])
    larger = np.asarray(Image.open(archive / "train" / "n1" / "images" / "n1_2.JPEG"), float)
    means = larger.reshape(32, 2, 32, 2, 3).mean(axis=(1, 3))
    assert np.abs(images[5] - means).mean() < 6  # but for what JPEG costs
    images, labels, _ = jpegs.load_jpegs(tmp_path / "out.npz", "val")
    assert images.shape == (1, 32, 32, 3) and labels.tolist() == [1]
    with np.load(tmp_path / "out.npz") as stored:
        assert stored["wnids"].tolist() == wnids

    train, test = metric_learning.load("image_lists", tmp_path / "set")
    assert train.labels.tolist() == test.labels.tolist() == [0, 0, 0]
    assert [Path(file).relative_to(tmp_path / "set") for file in train.files[:1]] == [
        Path("images/001.great_dog/n2_0.JPEG")
    ]
    np.testing.assert_array_equal(test.boxes, [[0, 1, 40, 59], [1, 1, 40, 59], [2, 1, 40, 59]])
    assert Path(test.files[2]).read_bytes() == (archive / "train" / "n1" / "images" / "n1_2.JPEG").read_bytes()
