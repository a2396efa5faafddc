"""`gpq-tf quantize`, and `gpq-tf cgd` with what it writes."""

import re

import numpy as np
import pytest
from PIL import Image

from gpq_tf import cgd_command, quantize_command
from gpq_tf.__main__ import main
from gpq_tf.network import RetrievalModel, load_model

TINY = {"stem": [4, 3, 2, False, 1e-5, 0.9], "pool": None, "stages": []}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Six classes of four images in the original's layout, three for training, and a model without a codebook."""
    folder = tmp_path_factory.mktemp("birds")
    rng = np.random.default_rng(0)
    lists = {name: ["image_id class_id path"] for name in ("train", "test")}
    boxes = []
    for number in range(24):
        label = number // 4
        pixels = np.clip(40 * label + rng.normal(0, 40, (14, 12, 3)), 0, 255).astype("uint8")
        Image.fromarray(pixels).save(folder / f"{number}.png")
        lists["train" if label < 3 else "test"].append(f"{number} {label} {number}.png")
        boxes.append(f"{number} 1 2 10 11")
    for name, lines in lists.items():
        (folder / f"{name}.txt").write_text("\n".join(lines) + "\n")
    (folder / "bbox.txt").write_text("\n".join(boxes) + "\n")
    RetrievalModel("cgd", layout=TINY, n_dim=12, descriptors="MG").save(folder / "plain.keras")
    return folder


def images_of(folder):
    lists = [f"--{name}-txt={folder / name}.txt" for name in ("train", "test", "bbox")]
    return [f"--data-dir={folder}", *lists, "--image-width=9", "--image-height=8", "--batch-size=5", "--gpu=-1"]


@pytest.mark.parametrize("method", ["kmeans", "opq"])
def test_quantized_models_are_written_and_measured(folder, tmp_path, method, capsys):
    out = tmp_path / "quantized.keras"
    sizes = ["--n_book=3", "--n_word=8", f"--method={method}", "--seed=2"]
    assert main(["quantize", str(folder / "plain.keras"), str(out), *sizes, *images_of(folder)]) == 0
    report = capsys.readouterr().out.splitlines()
    if method == "opq":
        assert report.pop(2) == "fitting 3 books of 8 codewords and a rotation, which may take minutes"
    what = "codes: 2 bytes, 3 books of 8 codewords, for 48 bytes of float32; "
    assert re.fullmatch(what + r"\d\.\d% of the training images' variance are lost", report[2])
    assert report[-1] == f"saved {out}"
    model = load_model(out)
    assert model.architecture["rotated"] == (method == "opq")
    fitted = model.record["codebook"]
    assert (fitted["model"], fitted["method"], fitted["images"], fitted["seed"]) == ("plain.keras", method, 12, 2)
    assert f"; {fitted['error']:.1%} of" in report[2]

    evaluate = [*images_of(folder), "--recallk=1,3"]
    assert main(["cgd", f"--pretrained-model={folder / 'plain.keras'}", *evaluate]) == 0
    plain = capsys.readouterr().out.splitlines()
    assert main(["cgd", f"--pretrained-model={out}", *evaluate]) == 0
    both = capsys.readouterr().out.splitlines()
    assert both[2] == "float32 descriptors, 48 bytes each:" and both[3:5] == plain[2:4]
    assert both[5] == "codes, 2 bytes each, searched by float32 descriptors:"
    assert [line[:7] for line in both[6:]] == ["R@   1:", "R@   3:"]

    options = cgd_command.parse([f"--pretrained-model={out}", *evaluate])
    lines = []
    recalls = cgd_command.run(options, lines.append, lambda batches, what, n: batches)
    assert lines == both
    assert [f"{recalls['codes'][k]:.4f}" for k in (1, 3)] == [line[8:] for line in both[6:]]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "Invalid arguments of quantize. the following arguments are required: MODEL, OUT"),
        (["plain.keras", "out.pth"], "OUT: expected a name that ends in .keras, received 'out.pth'"),
        (["plain.keras", "out.keras", "--method=lsq"], "--method: invalid choice: 'lsq'"),
        (["plain.keras", "out.keras", "--seed=-1"], "--seed: expected an integer of 0 or more, received -1"),
        (["plain.keras", "out.keras", "--batch-size=0"], "--batch-size: expected an integer of 1 to"),
        (["none.keras", "out.keras"], "'none.keras', which does not exist"),
        (["plain.keras", "out.keras", "--n_book=5"], "Invalid n_book. Expected a positive integer up to 256 dividing"),
        (["plain.keras", "out.keras", "--n_book=3", "--n_word=9"], "Invalid n_word. Expected a power of two from 2"),
        (["plain.keras", "out.keras", "--n_book=3"], "Expected at least n_word=256, one for each codeword. Received:"),
    ],
)
def test_bad_arguments_are_one_line_and_nothing_is_written(folder, monkeypatch, capsys, arguments, words):
    monkeypatch.chdir(folder)
    assert main(["quantize", *images_of(folder), *arguments]) == 2
    errors = capsys.readouterr().err
    assert errors.startswith("error: ") and errors.count("\n") == 1 and words in errors
    assert "images" not in errors  # the bar of images that are embedded
    assert not (folder / "out.keras").exists()


def test_help_and_defaults(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["quantize", "--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert all(f"--{name}" in text for name in ("n_book", "n_word", "method", "seed", "train-txt", "resize"))
    options = quantize_command.parse(["a", "b.keras"])
    assert (options.n_book, options.n_word, options.method, options.train_txt) == (
        32,
        256,
        "kmeans",
        "./meta/CUB200/train.txt",
    )
