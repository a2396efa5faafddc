"""`gpq-tf spq`: every argument of the original, what each stands for, and a short run."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from gpq_tf import __main__ as commands
from gpq_tf import load_model, settings, spq_command, trainer
from gpq_tf.network import RetrievalModel

from small_data import coloured_folders, coloured_images

ROOT = Path(__file__).resolve().parents[1]
# The original's argparse: name, default, our setting (None: none of ours).
ORIGINAL = [
    ("gpu_id", "0", None),
    ("if_download", False, "download"),
    ("data_dir", "./data", "data_dir"),
    ("batch_size", 256, "batch_size"),
    ("num_workers", 12, None),
    ("input_size", 32, "image_size"),
    ("N_books", 8, "n_book"),
    ("N_words", 16, "intn_word"),
    ("L_word", 16, "len_code"),
    ("soft_quantization_scale", 5.0, "alpha"),
    ("contrastive_temperature", 0.5, "temperature"),
    ("num_cls", 10, "n_CLASSES"),
    ("eval_epoch", 100, "eval_epoch"),
    ("output_dir", ".", "model_save_path"),
    ("Top_N", 1000, "n_DB"),
]
OTHERS = {
    "if_download": True,
    "data_dir": "elsewhere",
    "batch_size": 64,
    "input_size": 64,
    "N_books": 4,
    "N_words": 256,
    "L_word": 8,
    "soft_quantization_scale": 2.5,
    "contrastive_temperature": 0.25,
    "num_cls": 21,
    "eval_epoch": 7,
    "output_dir": "out",
    "Top_N": 5000,
}


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty current folder; CUDA_VISIBLE_DEVICES comes back after the test."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("TFDS_DATA_DIR", raising=False)
    return tmp_path


def run(*arguments):
    return commands.main(["spq", *map(str, arguments)])


def test_the_originals_defaults_are_ours(here):
    chosen, devices = spq_command.read([])
    assert devices is None
    assert (chosen.head, chosen.total_epochs, chosen.augment, chosen.legacy) == ("spq", 5000, "simclr", False)
    for _, default, ours in ORIGINAL:
        assert ours is None or getattr(chosen, ours) == default
    # what nobody gave may still be taken from the data, or be the sample
    assert not {"n_CLASSES", "data_dir"} & chosen.given


@pytest.mark.parametrize(("name", "ours"), [(name, ours) for name, _, ours in ORIGINAL if ours])
@pytest.mark.parametrize("apart", [False, True])
def test_every_argument_of_the_original_is_taken(here, name, ours, apart):
    value = OTHERS[name]
    chosen, _ = spq_command.read([f"--{name}", str(value)] if apart else [f"--{name}={value}"])
    before, _ = spq_command.read([])
    assert getattr(chosen, ours) == value
    changed = {key for key, new in chosen.as_dict().items() if new != getattr(before, key)}
    assert changed == {ours} | {"N_words": {"bn_word", "n_bits"}, "N_books": {"n_bits"}}.get(name, set())


def test_true_and_false_are_meant(here):
    for text, meant in (("True", True), ("true", True), ("False", False), ("false", False)):
        assert spq_command.read([f"--if_download={text}"])[0].download is meant
        assert spq_command.read(["--if_download", text])[0].download is meant
    assert spq_command.read(["--if_download"])[0].download is True


def test_the_help_explains_every_argument(capsys):
    assert run("--help") == 0
    printed = capsys.readouterr().out
    assert printed == spq_command.usage()
    for name, default, _ in ORIGINAL:
        (text,) = re.findall(rf"^  --{name} .*?(?=^  --|^\S)", printed, re.MULTILINE | re.DOTALL)
        explained = " ".join(text.split())
        assert len(explained) > len(f"--{name} VALUE") + 20
        shown = (
            "as many as they have, 10"
            if name == "num_cls"
            else f"{default:g}"
            if name[0] != "g" and isinstance(default, float)
            else str(default).lower()
        )
        assert f"default: {shown}" in explained or name == "gpu_id"
    assert "--precision" in printed and "n_boook" not in printed
    assert commands.main(["--help"]) == 0
    assert "gpq-tf spq --help" in capsys.readouterr().out


def test_our_own_settings_are_reachable(here):
    given = ["--precision=mixed_bfloat16", "--total_epochs", "20", "--width_multiplier=.25", "--legacy", "--seed=3"]
    chosen, _ = spq_command.read([*given, "--bn_word=6", "--augment=simclr"])
    assert (chosen.precision, chosen.total_epochs, chosen.width_multiplier) == ("mixed_bfloat16", 20, 0.25)
    assert (chosen.legacy, chosen.seed, chosen.intn_word, chosen.augment) == (True, 3, 64, "simclr")
    assert spq_command.read(["--legacy"])[0].augment == "spq2021"
    assert set(settings.FIELDS) <= set(spq_command._names())


def test_config_py_counts(here):
    Path("config.py").write_text("n_book = 4\nwidth_multiplier = 0.5\nmodel_save_path = './models/'\n")
    chosen, _ = spq_command.read(["--N_words=4"])
    assert (chosen.n_book, chosen.width_multiplier, chosen.n_bits, chosen.model_save_path) == (4, 0.5, 8, ".")


@pytest.mark.parametrize(
    ("n_words", "bits", "original"),
    [(4, 16, 16), (8, 24, 22), (16, 32, 32), (32, 40, 45), (64, 48, 64), (256, 64, 128)],
)
def test_the_headline_counts_bits_and_with_legacy_as_the_original(here, n_words, bits, original):
    """`original`: what the original prints for 8 books, golden/spq's behaviours."""
    line = spq_command.headline(spq_command.read([f"--N_words={n_words}"])[0])
    assert line == f"{bits} bits a code: 8 books of {n_words} codewords"
    line = spq_command.headline(spq_command.read([f"--N_words={n_words}", "--legacy"])[0])
    assert line.startswith(f"{original} bits a code")
    assert ("in truth" in line) == (original != bits)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--N_boks=8"], "Invalid setting 'N_boks' (the command line). Did you mean 'N_books'?"),
        (["--N_wordss", "8"], "Did you mean 'N_words'?"),
        (["--precison=float32"], "Did you mean 'precision'?"),
        (["--num_wrkers=1"], "Did you mean 'num_workers'?"),
        (["--gpu=1"], "Did you mean 'gpu_id'?"),
        (["--N_words=12"], "Expected a power of two from 2 to 65536. Received: N_words=12"),
        (["--N_words=1"], "Received: N_words=1"),
        (["--N_words=131072"], "Received: N_words=131072"),
        (["--N_words=x"], "Received: N_words=x"),
        (["--N_books=0"], "Invalid N_books (the command line). Expected an integer from 1 to 256. Received: N_books=0"),
        (["--Top_N=-1"], "Invalid Top_N"),
        (["--Top_N", "-1"], "Invalid Top_N"),
        (
            ["--contrastive_temperature=0"],
            "Invalid contrastive_temperature (the command line). Expected a number above",
        ),
        (["--if_download=maybe"], "Invalid if_download (the command line). Expected one of True, False"),
        (["--num_workers=-1"], "Invalid num_workers (the command line). Expected an integer of at least 0"),
        (["--N_books"], "argument --N_books: expected one argument"),
        (["--N_books=8", "--N_books=4"], "Expected --N_books once. Received: it 2 times"),
        (["--N_books=8", "--n_book=8"], "Invalid n_book. Expected --n_book once. Received: it by two names"),
        (["--N_words=16", "--n_bits=64"], "Invalid n_bits (the command line). Expected n_book * bn_word = 32"),
        (["--head=gpq"], "Expected spq, which this command trains. Received: head=gpq"),
        (["cifar"], "Expected --name=value. Received: 'cifar'"),
        (["-b", "3"], "Expected --name=value. Received: '-b'"),
        (["--data_dir=nowhere"], "Invalid data_dir 'nowhere'"),
        (["--num_cls=21"], "Invalid n_CLASSES. Expected the data's, 10. Received: n_CLASSES=21"),
    ],
)
def test_mistakes_are_one_line_and_status_2(here, arguments, message, capsys):
    assert run(*arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and message in line
    assert list(here.iterdir()) == []


@pytest.mark.parametrize(
    ("before", "arguments", "after"),
    [("-1", [], "-1"), (None, [], "0"), ("-1", ["--gpu_id=1,2"], "1,2"), ("3", ["--gpu_id", "-1"], "-1")],
)
def test_gpu_id_says_which_devices_are_seen(here, monkeypatch, before, arguments, after):
    if before is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", before)
    seen = []
    monkeypatch.setattr(commands, "_train", lambda *_: seen.append(os.environ["CUDA_VISIBLE_DEVICES"]))
    assert run(*arguments) == 0
    assert seen == [after]


def test_the_devices_are_chosen_before_tensorflow_is_imported(here):
    program = (
        "import os, sys; from gpq_tf import __main__ as commands\n"
        "def train(*_): print('tensorflow' in sys.modules, os.environ['CUDA_VISIBLE_DEVICES'])\n"
        "commands._train = train; commands.main(['spq', '--gpu_id=5'])"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    printed = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment).stdout
    assert printed == "False 5\n"


def test_a_short_run_evaluates_and_keeps_the_best(here, capsys, monkeypatch):
    """torchvision's layout, an output folder that is not there, an evaluation every epoch."""
    from cifar10_files import write_folder

    (here / "data" / "cifar-10-batches-py").mkdir(parents=True)
    write_folder(here / "data" / "cifar-10-batches-py", *coloured_images(300))
    own = ["--width_multiplier=0.03125", "--total_epochs=2", "--precision=float32"]
    given = [
        "--gpu_id=-1",
        "--batch_size=60",
        "--N_books",
        2,
        "--N_words=4",
        "--L_word=4",
        "--eval_epoch=1",
        "--Top_N=50",
    ]
    assert run(*given, *own, "--output_dir=new/folder", "--num_cls=10", "--num_workers=0") == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    assert captured.out.splitlines()[0] == "4 bits a code: 2 books of 4 codewords"
    scores = [float(score) for score in re.findall(r"mAP@50 (\d\.\d{4}), best", captured.out)]
    assert len(scores) == 2
    best = load_model("new/folder/spq_4bits_best.keras")
    assert best.record["mAP"] == pytest.approx(max(scores), abs=5e-5)
    assert best.codebook.shape == (2, 4, 4)
    assert json.loads(Path("new/folder/spq_4bits_best.json").read_text())["settings"]["n_DB"] == 50

    # What goes on with a model counts its bits.
    monkeypatch.setattr(trainer, "train", lambda settings, *_: (None, settings.model_save_path))
    assert run("--resume=new/folder/spq_4bits_2.keras", "--total_epochs=3") == 0
    printed = capsys.readouterr().out.splitlines()
    assert (printed[0], printed[-1]) == ("4 bits a code: 2 books of 4 codewords", "done: new/folder")


def test_an_output_folder_that_cannot_be_made_is_found_before_training(here, capsys, monkeypatch):
    coloured_folders(here / "own", {"": 12})
    Path("file").write_text("")
    given = ["--dataset=image_folders", "--data_dir=own", "--batch_size=10", "--width_multiplier=0.03125"]
    assert run(*given, "--output_dir=file") == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ") and "file" in captured.err and captured.err.count("\n") == 1
    assert "s a step" not in captured.out


def test_a_gpq_model_cannot_be_resumed(here, capsys):
    RetrievalModel(width_multiplier=1 / 32).save("gpq.keras")
    assert run("--resume=gpq.keras") == 2
    assert "Invalid head. Expected gpq, which the model gpq.keras has" in capsys.readouterr().err
