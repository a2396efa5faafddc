"""CGD's checkpoints as models, and `gpq-tf cgd`: against MXNet's embeddings and the original's recalls."""

import os

import numpy as np
import pytest
from PIL import Image

from gpq_tf import cgd_command, convert
from gpq_tf.__main__ import main
from gpq_tf.backbones.resnet_v1 import CHANNEL_DEVIATION, CHANNEL_MEAN
from gpq_tf.convert import mxnet_checkpoint
from gpq_tf.network import RetrievalModel, load_model

from golden import CGD, load, needs_golden
from mxnet_files import cgd, write_checkpoint
from mxnet_reference import embed


def checkpoint():
    return str(next((CGD / "params").glob("CGD.*-symbol.json"))).removesuffix("-symbol.json")


@needs_golden
def test_embeddings_are_the_originals(tmp_path):
    recorded = load("params/output.npz", CGD)
    model, lines = convert.convert(checkpoint())
    assert np.abs(model.embed(recorded["images"]) - recorded["embedding"]).max() < 1e-6
    assert len([line for line in lines if line.startswith("used")]) == len(model.weights)
    model.save(tmp_path / "cgd.keras")
    again = load_model(tmp_path / "cgd.keras")
    assert np.array_equal(again.embed(recorded["images"]), model.embed(recorded["images"]))
    assert (again.head_name, again.architecture) == ("cgd", model.architecture)


@needs_golden
@pytest.mark.slow  # a network is traced anew for each of the sizes
def test_the_command_prints_what_the_original_prints(capsys):
    recorded = load("end_to_end.npz", CGD)
    lists = [f"--{name}-txt={CGD / 'dataset' / f'{name}.txt'}" for name in ("train", "test", "bbox")]
    ks = ",".join(map(str, recorded["ranks"]))
    settings = sorted({key.partition("/")[0] for key in recorded if "/" in key})
    assert settings
    for setting in settings:
        width, height, batch = (int(part.lstrip("wh").removeprefix("batch")) for part in setting.split("_"))
        sizes = [f"--image-width={width}", f"--image-height={height}", f"--batch-size={batch}", f"--recallk={ks}"]
        data = [f"--data-dir={CGD / 'dataset'}", f"--pretrained-model={checkpoint()}", *lists]
        assert main(["cgd", *data, *sizes, "--gpu=-1"]) == 0
        expected = zip(recorded["ranks"], recorded[f"{setting}/recall"], strict=True)
        assert capsys.readouterr().out.splitlines()[-len(recorded["ranks"]) :] == [
            f"R@{k:4d}: {recall:.4f}" for k, recall in expected
        ]


@pytest.mark.parametrize(
    ("letters", "options"),
    [
        ("S", {}),
        ("GM", {"bottleneck": False, "norm": {"eps": 1e-3}}),
        ("MGS", {"combination": "sum", "n_classes": 7}),
        ("G", {"p": None}),
    ],
)
def test_other_networks_convert_too(tmp_path, letters, options):
    write_checkpoint(tmp_path / "some", *cgd(letters, **options))
    images = np.random.default_rng(0).integers(0, 256, (3, 40, 56, 3), "uint8")
    contents = mxnet_checkpoint.read(mxnet_checkpoint.find(tmp_path / "some"))
    model, _ = convert.convert(tmp_path / "some")
    assert model.architecture["descriptors"] == letters
    expected = embed(contents, (images / 255.0 - CHANNEL_MEAN) / CHANNEL_DEVIATION)
    assert np.abs(model.embed(images) - expected).max() < 3e-6


def test_a_model_without_a_codebook_says_so():
    tiny = {"stem": [4, 3, 2, False, 1e-5, 0.9], "pool": None, "stages": []}
    model = RetrievalModel("cgd", layout=tiny, n_dim=6, descriptors="MG")
    images = np.zeros((2, 9, 7, 3), "uint8")
    assert model.embed(images).shape == (2, 6)
    for use in (lambda: model.codebook, lambda: model.encode(images)):
        with pytest.raises(ValueError, match=r"^Invalid model. Expected one with a codebook"):
            use()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "the following arguments are required: --pretrained-model"),
        (
            ["--pretrained-model=x", "--recallk=1,a"],
            "--recallk: expected positive integers separated by commas, received '1,a'",
        ),
        (
            ["--pretrained-model=x", "--recallk=1,0"],
            "--recallk: expected positive integers separated by commas, received '1,0'",
        ),
        (["--pretrained-model=x", f"--recallk={2**63}"], "--recallk: expected positive integers"),
        (["--pretrained-model=x", "--num-workers=-1"], "--num-workers: expected an integer of 0 or more, received -1"),
        (["--pretrained-model=x", "--batch-size=0"], "--batch-size: expected an integer of 1 to 1000000, received 0"),
        (["--pretrained-model=x", "--image-width=5000"], "--image-width: expected an integer of 1 to 4096, received"),
        (["--pretrained-model=x", "--batch-size=many"], "invalid int value: 'many'"),
        (["--pretrained-model=x", "--no-such=1"], "unrecognized arguments: --no-such=1"),
        (["--pretrained-model=x", "--bbox-txt=none.txt"], "none.txt"),
    ],
)
def test_bad_arguments_are_one_line(arguments, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["cgd", *arguments]) == 2
    output, errors = capsys.readouterr()
    assert errors.startswith("error: ") and errors.count("\n") == 1 and words in errors
    assert not output


def test_help_explains_every_argument_of_the_original(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["cgd", "--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    names = "image-width image-height batch-size num-workers recallk data-dir train-txt test-txt bbox-txt gpu"
    assert all(f"--{name}" in text for name in [*names.split(), "pretrained-model"])
    defaults = cgd_command.parse(["--pretrained-model=x"])
    assert (defaults.image_width, defaults.batch_size, defaults.recallk) == (224, 1, [1, 2, 4, 8])
    assert defaults.train_txt == "./meta/CUB200/train.txt"


@pytest.mark.parametrize(
    ("given", "before", "expected"),
    [([], None, "0"), ([], "3", "3"), ([], "", ""), (["--gpu=1"], "3", "1"), (["--gpu=-1"], None, "-1")],
)
def test_the_gpu_asked_for_is_the_one_seen(monkeypatch, given, before, expected):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "to be put back")
    if before is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", before)
    cgd_command.hide_other_gpus(cgd_command.parse(["--pretrained-model=x", *given]))
    assert os.environ["CUDA_VISIBLE_DEVICES"] == expected


def test_a_checkpoint_that_lacks_a_file_says_which(tmp_path):
    (tmp_path / "symbol_alone-symbol.json").write_text("{}")
    (tmp_path / "weights_alone-0000.params").write_bytes(b"")
    (tmp_path / "packed.tar.gz").write_bytes(b"")
    options = cgd_command.parse(["--pretrained-model=x"])
    for name, words in {
        "symbol_alone": "an MXNet symbol without its weights, symbol_alone-0000.params",
        "weights_alone": "MXNet weights without their symbol, weights_alone-symbol.json",
        "packed": "an archive; unpack it first",
    }.items():
        with pytest.raises(ValueError, match=words):
            cgd_command.load(str(tmp_path / name), options, print)


def test_other_sets_and_other_devices_than_the_originals(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    for name, colour in (("a", "red"), ("b", "green"), ("c", "blue"), ("d", "white")):
        (tmp_path / name).mkdir()
        for number in range(2):
            Image.new("RGB", (9, 9), colour).save(tmp_path / name / f"{number}.png")
    folders = ["--dataset=image_folders", f"--data-dir={tmp_path}", "--image-width=16", "--image-height=16"]
    assert main(["cgd", "--pretrained-model=cgd-tinyimagenet-32bytes", "--gpu=7", "--recallk=1", *folders]) == 0
    output = capsys.readouterr().out
    assert "test: 4 images of 2 classes" in output and "there is no GPU 7 here: computing on the CPU" in output
    assert "R@   1: 1.0000" in output
    assert main(["cgd", "--pretrained-model=gpq-cifar10-48bits", *folders]) == 2
    assert "Expected one of the head cgd" in capsys.readouterr().err
