"""Settings: precedence, types, derived values, and the errors a typing mistake gives."""

import json
import runpy
from pathlib import Path

import pytest

from gpq_tf import settings

ROOT = Path(__file__).resolve().parents[1]
NO_FILE = "no_such_config.py"


def write(folder, text):
    path = folder / "config.py"
    path.write_text(text)
    return path


def test_config_py_of_the_checkout_holds_the_defaults():
    names = {name: value for name, value in runpy.run_path(str(ROOT / "config.py")).items() if name[0] != "_"}
    assert names == {name: default for name, (default, _) in settings.FIELDS.items()}
    assert list(names) != sorted(names)  # grouped for a reader, not by the alphabet
    assert settings.resolve([], ROOT / "config.py").as_dict() == settings.resolve([], NO_FILE).as_dict()


def test_every_line_of_config_py_gives_a_reason():
    lines = [line for line in (ROOT / "config.py").read_text().splitlines() if " = " in line and line[0] != "#"]
    assert len(lines) == len(settings.FIELDS)
    assert all("  # " in line for line in lines)


def test_command_line_beats_file_beats_default(tmp_path):
    path = write(tmp_path, "n_book = 6\nalpha = 3\n")
    found = settings.resolve(["--n_book=8"], path)
    assert (found.n_book, found.alpha, found.len_code) == (8, 3.0, 12)
    assert isinstance(found.alpha, float)
    assert found.given == {"n_book", "alpha"}


def test_derived_values_follow_overrides():
    found = settings.resolve(["--n_book=8", "--bn_word=8", "--batch_size=100"], NO_FILE)
    assert (found.n_bits, found.intn_word, found.batch_size) == (64, 256, 100)


def test_an_expression_in_the_file_does_not_fight_the_command_line(tmp_path):
    path = write(tmp_path, "n_book = 6\nbn_word = 4\nintn_word = pow(2, bn_word)\nn_bits = n_book * bn_word\n")
    assert settings.resolve([], path).n_bits == 24
    assert settings.resolve(["--n_book=8"], path).n_bits == 32


def test_an_agreeing_derived_value_is_welcome():
    assert settings.resolve(["--n_book=8", "--n_bits=32"], NO_FILE).n_bits == 32


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--n_bits=32"],
            "Invalid n_bits (the command line). Expected n_book * bn_word = 48, or that it is left out",
        ),
        (["--intn_word=32"], "Invalid intn_word (the command line). Expected 2 ** bn_word = 16"),
        (["--n_boook=8"], "Invalid setting 'n_boook' (the command line). Did you mean 'n_book'?"),
        (["--lam1=.2"], "Did you mean 'lam_1'?"),
        (["--ImageNet_path=x"], "Did you mean 'ImageNet_pretrained_path'?"),
        (
            ["--n_book=twelve"],
            "Invalid n_book (the command line). Expected an integer from 1 to 256. Received: n_book",
        ),
        (["--n_book=8.5"], "Expected an integer"),
        (["--n_book=0"], "Expected an integer from 1 to 256"),
        (["--batch_size=-3"], "Invalid batch_size"),
        (["--alpha=nan"], "Expected a number above 0. Received: alpha=nan"),
        (["--alpha=inf"], "Expected a number above 0"),
        (["--lam_1=-1"], "Expected a number of at least 0"),
        (["--width_multiplier=0"], "Expected a number above 0 and at most 8"),
        (["--precision=float64"], "Expected one of float32, mixed_bfloat16, mixed_float16"),
        (["--legacy=maybe"], "Expected one of True, False"),
        (["--head=vgg"], "Expected one of gpq, spq"),
        (["--dataset=mnist"], "Expected one of cifar10"),
        (["--seed"], "Invalid seed"),
        (["--data_dir="], "Invalid data_dir"),
        (["n_book=8"], "Expected --name=value. Received: 'n_book=8'"),
        (["--n_book=8", "--n_book=9"], "Expected --n_book once"),
    ],
)
def test_mistakes_are_named(arguments, message):
    with pytest.raises(ValueError) as caught:
        settings.resolve(arguments, NO_FILE)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("n_boook = 8\n", "Invalid setting 'n_boook'"),
        ("n_book = 'x'\n", "Invalid n_book"),
        ("n_book = 8\nn_bits = 48\n", "Invalid n_bits"),
        ("n_book = \n", "Received, line 1: SyntaxError"),
        ("import no_such_module_anywhere\n", "ModuleNotFoundError"),
    ],
)
def test_mistakes_in_the_file_name_the_file(tmp_path, text, message):
    with pytest.raises(ValueError) as caught:
        settings.resolve([], write(tmp_path, text))
    assert message in str(caught.value)
    assert "config.py" in str(caught.value)


def test_both_spellings_are_one_setting(tmp_path):
    for name in ("ImagNet_pretrained_path", "ImageNet_pretrained_path"):
        found = settings.resolve([f"--{name}=a.mat"], NO_FILE)
        assert found.ImagNet_pretrained_path == found.ImageNet_pretrained_path == "a.mat"
    path = write(tmp_path, "ImagNet_pretrained_path = 'b'\n")
    assert settings.resolve([], path).ImageNet_pretrained_path == "b"
    assert settings.resolve(["--ImageNet_pretrained_path=c"], path).ImagNet_pretrained_path == "c"
    with pytest.raises(ValueError, match="two spellings"):
        settings.resolve(["--ImagNet_pretrained_path=a", "--ImageNet_pretrained_path=b"], NO_FILE)


def test_flags_and_none():
    found = settings.resolve(
        ["--legacy", "--download=true", "--query=None", "--keep=3", "--jit_compile=False"], NO_FILE
    )
    assert (found.legacy, found.download, found.query, found.keep, found.jit_compile) == (
        True,
        True,
        None,
        3,
        False,
    )


def test_saved_settings_come_back(tmp_path):
    found = settings.resolve(["--n_book=8", "--init=x.keras"], NO_FILE)
    settings.save(found, tmp_path / "s.json", mAP=0.5)
    assert settings.load(tmp_path / "s.json").as_dict() == found.as_dict()
    assert json.loads((tmp_path / "s.json").read_text())["mAP"] == 0.5
    (tmp_path / "s.json").write_text("{")
    with pytest.raises(ValueError, match="Expected settings as JSON"):
        settings.load(tmp_path / "s.json")


def test_description_shows_every_setting_once():
    lines = settings.describe(settings.resolve(["--n_book=8"], NO_FILE)).splitlines()
    assert "n_book = 8" in lines
    assert "n_bits = 32" in lines
    assert len(lines) == len(set(lines)) == len(settings.FIELDS) - 1
