"""The commands as a user types them: what they print, what they write, how they fail."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from gpq_tf import __main__ as commands
from gpq_tf import load_model
from gpq_tf.data.similarity import write_similarity
from gpq_tf.network import RetrievalModel

from small_data import coloured_data, coloured_images

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def cifar_folder(tmp_path_factory):
    from cifar10_files import write_folder

    folder = tmp_path_factory.mktemp("cifar")
    write_folder(folder, *coloured_images())
    return folder


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty current folder, and no data of tensorflow-datasets anywhere."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("TFDS_DATA_DIR", raising=False)
    return tmp_path


@pytest.fixture
def model(here):
    RetrievalModel(width_multiplier=1 / 32).save("small.keras")
    return "small.keras"


def run(*arguments):
    return commands.main([str(argument) for argument in arguments])


def error_of(captured):
    """The one line on standard error."""
    lines = captured.err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    return lines[0]


def test_demo_prints_the_map_and_writes_pictures(here, model, cifar_folder, capsys):
    status = run(
        "demo", f"--model_load_path={model}", f"--data_dir={cifar_folder}", "--n_pictures=2", "--query=3", "--seed=1"
    )
    printed = capsys.readouterr().out
    assert status == 0
    assert "gallery 1080, queries 20, 48 bits a code (12 books of 16 codewords)" in printed
    assert "\nn_book = 12\n" in printed
    assert "\nwidth_multiplier = 0.03125\n" in printed  # the model's own, not the default
    for phase in ("encode gallery", "embed queries", "rank and score"):
        assert re.search(rf"^{phase}: [\d.]+ s$", printed, re.MULTILINE)
    score = float(re.search(r"^mAP: (\d\.\d{4})$", printed, re.MULTILINE)[1])
    pictures = sorted(here.glob("retrieval_result_*.png"))
    assert len(pictures) == 2
    assert here / "retrieval_result_3.png" in pictures
    result = json.loads((here / "retrieval_result.json").read_text())
    assert result["mAP"] == pytest.approx(score, abs=5e-5)
    assert result["settings"]["n_book"] == 12
    assert result["queries_shown"][0] == 3


@pytest.mark.usefixtures("uncompiled")
def test_the_query_shown_follows_the_seed(here, model, cifar_folder, capsys):
    for seed in (1, 1, 2):
        run("demo", f"--model_load_path={model}", f"--data_dir={cifar_folder}", f"--seed={seed}")
    saved = re.findall(r"saved (retrieval_result_\d+\.png)", capsys.readouterr().out)
    assert saved[0] == saved[1] != saved[2]


@pytest.mark.usefixtures("uncompiled")
def test_evaluate_prints_the_same_map_and_writes_nothing(here, model, cifar_folder, capsys):
    run("demo", f"--model_load_path={model}", f"--data_dir={cifar_folder}", "--n_pictures=0")
    demo = re.search(r"mAP: .*", capsys.readouterr().out)[0]
    before = sorted(here.iterdir())
    assert run("evaluate", model, cifar_folder) == 0
    assert re.search(r"mAP: .*", capsys.readouterr().out)[0] == demo
    assert sorted(here.iterdir()) == before


@pytest.mark.usefixtures("uncompiled")
def test_a_similarity_matrix_takes_the_place_of_labels(here, model, cifar_folder, capsys):
    data = coloured_data()
    write_similarity("same.mat", data.query_labels, data.gallery_labels)
    write_similarity("other.mat", (data.query_labels + 1) % 10, data.gallery_labels)
    scores = []
    for extra in ([], ["--cifar10_label_sim_path=same.mat"], ["--cifar10_label_sim_path=other.mat"]):
        assert run("evaluate", model, cifar_folder, *extra) == 0
        scores.append(re.search(r"mAP: .*", capsys.readouterr().out)[0])
    assert scores[0] == scores[1] != scores[2]


@pytest.mark.usefixtures("uncompiled")
def test_top_n_is_n_db(here, model, cifar_folder, capsys):
    scores = []
    for n in (5, 1080, 10**6):
        run("evaluate", model, cifar_folder, f"--n_DB={n}")
        scores.append(re.search(r"mAP: .*", capsys.readouterr().out)[0])
    assert scores[0] != scores[1] == scores[2]


def test_train_then_demo(here, cifar_folder, capsys):
    given = [f"--data_dir={cifar_folder}", "--width_multiplier=0.03125", "--batch_size=50"]
    assert run("train", *given, "--total_epochs=2", "--save_term=1", "--n_book=6") == 0
    printed = capsys.readouterr()
    assert "starting from scratch (seed 0)" in printed.out
    assert "done: models/gpq_24bits_2.keras" in printed.out
    assert "%|" not in printed.err  # no progress bar where there is no terminal
    assert sorted(file.name for file in Path("models").glob("*.keras")) == ["gpq_24bits_1.keras", "gpq_24bits_2.keras"]
    assert run("demo", f"--data_dir={cifar_folder}", "--model_load_path=models/gpq_24bits_2.keras") == 0
    assert "24 bits a code (6 books of 16 codewords)" in capsys.readouterr().out


@pytest.mark.usefixtures("uncompiled")
def test_config_py_of_the_current_folder_counts(here, cifar_folder, capsys):
    Path("config.py").write_text(f"data_dir = {str(cifar_folder)!r}\nwidth_multiplier = 1 / 32\nbatch_size = 50\n")
    assert run("train", "--total_epochs=1", "--bn_word=3") == 0
    assert load_model("models/gpq_36bits_1.keras").codebook.shape == (12, 8, 12)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["demo", "--n_boook=8"], "Did you mean 'n_book'?"),
        (["demo", "--n_bits=32"], "Expected n_book * bn_word = 48"),
        (["demo", "--model_load_path=small.keras", "--n_book=8"], "Invalid n_book. Expected 12, which the model"),
        (["demo", "--model_load_path=small.keras", "--width_multiplier=1"], "Invalid width_multiplier. Expected 0.031"),
        (["demo", "--model_load_path=nothing.keras"], "'nothing.keras', which does not exist"),
        (["demo", "--model_load_path=small.keras", "--query=200"], "Expected 0 to 199"),
        (["demo", "--model_load_path=small.keras", "--n_pictures=201"], "Expected at most 200"),
        (["demo", "--model_load_path=small.keras", "--dataset=cifar10_folder"], "batches.meta"),
        (["demo", "--model_load_path=small.keras", "--data_dir=~/cifar10"], "Invalid data_dir '~/cifar10'"),
        (["demo", "--model_load_path=small.keras", "--query_image=no.jpg"], "No such file or directory: 'no.jpg'"),
        (["demo", "--model_load_path=small.keras", "--query_image=small.keras"], "small.keras: expected an image"),
        (["demo", "--model_load_path=small.keras", "--head=spq"], "Invalid head. Expected gpq, which the model small"),
        (["demo", "--model_load_path=small.keras", "--dataset=image_folders", "--data_dir=no"], "directory: 'no'"),
        (["evaluate", "small.keras", "nowhere"], "Invalid data_dir 'nowhere'"),
        (["demo", "--model_load_path=small.keras", "--dataset=cifar10_tfds"], "--download=True"),
        (["demo", "--model_load_path=small.keras", "--cifar10_label_sim_path=no.mat"], "no.mat"),
        (["train", "--batch_size=2000"], "Expected at most 1000"),
        (["train", "--init=nothing"], "Invalid model"),
        (["evaluate"], "Expected MODEL [IMAGES]. Received: none"),
        (["convert", "a"], "Expected SRC DST. Received: a"),
        (["convert", "nothing.ckpt", "x.keras"], "Received: no such file"),
        (["convert", "small.keras", "x.keras"], "Received: a file of another kind"),
        (["convert", "nothing.ckpt", "x.h5"], "Expected a name that ends in .keras"),
        (["serve"], "Expected one of demo, train, spq, cgd, quantize, convert, evaluate"),
    ],
)
@pytest.mark.usefixtures("uncompiled")
def test_mistakes_are_one_line_and_exit_2(here, model, arguments, message, capsys):
    before = sorted(here.iterdir())
    assert run(*arguments) == 2
    assert message in error_of(capsys.readouterr())
    assert sorted(here.iterdir()) == before


def test_debug_shows_the_traceback(here, capsys):
    assert run("demo", "--n_boook=8", "--debug") == 2
    assert "Traceback" in capsys.readouterr().err


def test_help(capsys):
    assert run("--help") == 0
    assert run("demo", "-h") == 0
    assert "usage: gpq-tf COMMAND" in capsys.readouterr().out
    assert run() == 2


@pytest.mark.slow  # what the README's first command does
def test_without_a_model_the_shipped_one_is_shown_and_the_sample_announced(here, capsys):
    assert run("demo") == 0
    printed = capsys.readouterr().out
    assert "the shipped gpq-cifar10-48bits, since ./models/48bits_example.ckpt does not exist" in printed
    (line,) = [line for line in printed.splitlines() if "embedded CIFAR-10 sample" in line]
    assert "--download=True" in line
    # what models/README.md's card says of the sample
    assert float(re.search(r"mAP: (.*)", printed)[1]) > 0.6
    assert len(list(here.glob("retrieval_result_*.png"))) == 1


def test_the_shipped_cgd_is_shown_on_its_own_sample(here, capsys):
    assert run("demo", "--head=cgd") == 0
    printed = capsys.readouterr().out
    assert "the shipped cgd-tinyimagenet-32bytes, since ./models/cgd_1536d_best.keras does not exist" in printed
    assert "384 images of 24 unseen classes, from the embedded sample of Tiny ImageNet, since ./data" in printed
    of_descriptors, of_codes = re.findall(r"^R@   1: (.*)$", printed, re.MULTILINE)
    # chance is .04
    assert min(float(of_descriptors), float(of_codes)) > 0.15
    assert "codes, 32 bytes each" in printed
    assert len(list(here.glob("retrieval_result_*.png"))) == 1


@pytest.mark.usefixtures("uncompiled")
def test_a_home_that_is_missing_or_closed_holds_no_data(here, monkeypatch):
    from gpq_tf.data import cifar10

    def no_home():
        raise RuntimeError("Could not determine home directory.")

    def closed(self, pattern):
        raise PermissionError(13, "Permission denied", str(self))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "home", no_home)
        assert len(cifar10.load().query_labels) == 200
    monkeypatch.setattr(Path, "glob", closed)
    assert len(cifar10.load().query_labels) == 200


def test_a_mat_file_as_model_says_that_its_head_is_drawn(here, cifar_folder, capsys):
    from gpq_files import backbone_arrays, write_mat

    write_mat("pretrained.mat", backbone_arrays())
    assert (
        run("demo", "--model_load_path=pretrained.mat", f"--data_dir={cifar_folder}", "--n_pictures=0", "--seed=4") == 0
    )
    printed = capsys.readouterr().out
    assert re.search(r"^initialised .* seed 4", printed, re.MULTILINE)


def test_convert_refuses_settings_that_the_file_contradicts(here, capsys):
    from gpq_files import checkpoint_arrays, write_checkpoint

    write_checkpoint("20.ckpt", checkpoint_arrays())
    assert run("convert", "20.ckpt", "x.keras", "--n_book=3", "--bn_word=8") == 2
    assert "Invalid bn_word. Expected 2, which the model 20.ckpt has. Received: bn_word=8" in error_of(
        capsys.readouterr()
    )
    assert not Path("x.keras").exists()
    assert run("convert", "20.ckpt", "x.keras", "--n_book=3", "--bn_word=2") == 0


def test_a_folder_that_cannot_be_written_is_found_before_the_work(here, model, monkeypatch, capsys):
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert run("demo", f"--model_load_path={model}") == 2
    captured = capsys.readouterr()
    assert "Permission denied" in error_of(captured)
    assert "retrieval_result.json" in captured.err
    assert captured.out == ""


@pytest.mark.parametrize("script", ["Demo.py", "train.py"])
def test_the_scripts_are_commands(tmp_path, script):
    """In a process of their own: silent where nothing is wrong, one line and status 2 otherwise."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / script)]
    bad = subprocess.run([*command, "--seeed=1"], capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert bad.returncode == 2
    assert bad.stderr == "error: Invalid setting 'seeed' (the command line). Did you mean 'seed'?\n"
    small = tmp_path / "small.keras"
    RetrievalModel(width_multiplier=1 / 32).save(small)
    given = {
        "Demo.py": [f"--model_load_path={small}"],
        "train.py": ["--width_multiplier=0.03125", "--batch_size=500", "--total_epochs=1"],
    }[script]
    good = subprocess.run(
        [*command, "--dataset=cifar10_sample", *given], capture_output=True, text=True, cwd=tmp_path, env=environment
    )
    assert good.returncode == 0
    assert good.stderr == ""
    written = {"Demo.py": "retrieval_result.json", "train.py": "models/gpq_48bits_1.keras"}[script]
    assert (tmp_path / written).is_file()
    assert np.isfinite(json.loads((tmp_path / written).with_suffix(".json").read_text()).get("mAP", 0.0))
