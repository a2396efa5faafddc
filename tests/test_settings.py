"""Settings: precedence, types, derived values, and the errors a typing mistake gives."""

import json
import runpy
from pathlib import Path

import pytest

from gpq_tf import heads, settings

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
            "Invalid n_book (the command line). Expected an integer from 0 to 256. Received: n_book",
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
        (["--head=vgg"], "Expected one of gpq, spq, cgd"),
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


# --- the head decides the defaults

SPQ = {
    "n_DB": 1000,
    "total_epochs": 5000,
    "batch_size": 256,
    "eval_epoch": 100,
    "len_code": 16,
    "n_book": 8,
    "alpha": 5.0,
    "keep": 3,
    "augment": "simclr",
    "temperature": 0.5,
    "bn_word": 4,
    "intn_word": 16,
    "n_bits": 32,
}


def some_of(found, names=SPQ):
    return {name: getattr(found, name) for name in names}


def test_spq_has_its_own_defaults():
    found = settings.resolve(["--head=spq"], NO_FILE)
    assert some_of(found) == SPQ
    assert found.given == {"head"}
    gpq = settings.resolve([], NO_FILE).as_dict()
    others = {name: value for name, value in found.as_dict().items() if value != gpq[name]}
    assert set(others) == {"head", "n_bits", "model_load_path", *SPQ} - {
        "augment",
        "temperature",
        "bn_word",
        "intn_word",
    }
    assert settings.defaults_of("spq") == found.as_dict() | {"head": "gpq"}


@pytest.mark.parametrize("arguments", [["--head=spq", "--legacy"], ["--legacy=true", "--head=spq"]])
def test_legacy_spq_augments_as_the_original_did(arguments):
    assert some_of(settings.resolve(arguments, NO_FILE)) == {**SPQ, "augment": "spq2021"}
    assert settings.resolve([*arguments, "--augment=simclr"], NO_FILE).augment == "simclr"
    assert settings.resolve(["--legacy"], NO_FILE).augment == "simclr"


def test_a_file_that_spells_out_the_defaults_does_not_hold_another_head_to_them():
    """config.py of the checkout holds gpq's; with --head=spq they are no wishes."""
    assert some_of(settings.resolve(["--head=spq"], ROOT / "config.py")) == SPQ
    assert settings.resolve(["--head=spq"], ROOT / "config.py").given == {"head"}


def test_what_the_file_changes_holds_for_any_head(tmp_path):
    path = write(tmp_path, "n_book = 6\nbn_word = 4\nn_bits = n_book * bn_word\nbatch_size = 500\nlegacy = True\n")
    found = settings.resolve(["--head=spq"], path)
    assert (found.n_book, found.n_bits, found.batch_size, found.augment) == (6, 24, 256, "spq2021")
    assert found.given == {"head", "n_book", "legacy"}
    path = write(tmp_path, "head = 'spq'\nalpha = 7\n")
    found = settings.resolve(["--batch_size=500"], path)
    assert (found.head, found.alpha, found.batch_size, found.n_book) == ("spq", 7.0, 500, 8)
    assert settings.resolve(["--head=gpq"], path).n_book == 12


def test_what_is_given_to_a_head_is_checked_by_its_own_sizes():
    assert settings.resolve(["--head=spq", "--n_bits=32"], NO_FILE).n_bits == 32
    with pytest.raises(ValueError, match=r"Invalid n_bits .*Expected n_book \* bn_word = 32, or that it is left out"):
        settings.resolve(["--head=spq", "--n_bits=48"], NO_FILE)
    with pytest.raises(ValueError, match=r"Invalid augment .*Expected one of simclr, spq2021. Received: augment=none"):
        settings.resolve(["--head=spq", "--augment=none"], NO_FILE)


def test_a_completed_copy_changes_heads():
    gpq = settings.resolve(["--batch_size=64", "--n_book=6"], NO_FILE)
    spq = gpq.completed({"head": "spq"})
    expected = {**SPQ, "batch_size": 64, "n_book": 6, "n_bits": 24}
    assert some_of(spq) == expected
    assert spq.given == gpq.given
    assert gpq.n_DB == 54000  # a copy
    assert some_of(spq.completed({"legacy": True})) == {**expected, "augment": "spq2021"}
    assert spq.completed({"head": "gpq"}).as_dict() == gpq.as_dict()
    assert gpq.completed({"head": "spq", "n_DB": 77}).n_DB == 77
    assert gpq.completed({"head": "spq"}, {"alpha"}).alpha == 20.0


def test_a_completed_copy_keeps_what_a_saved_run_had():
    """Nothing was given now; what the run was trained with is no default."""
    for head in ("gpq", "spq"):
        stored = settings.resolve([f"--head={head}", "--batch_size=64", "--total_epochs=9"], NO_FILE).as_dict()
        saved = settings.from_dict(stored, "here")
        assert saved.given == frozenset()
        again = saved.completed({"legacy": True})
        assert (again.batch_size, again.total_epochs, again.legacy) == (64, 9, True)
        assert again.augment == ("spq2021" if head == "spq" else "simclr")


def test_saved_settings_of_a_head_come_back(tmp_path):
    found = settings.resolve(["--head=spq", "--legacy", "--n_book=4"], NO_FILE)
    settings.save(found, tmp_path / "s.json")
    assert settings.load(tmp_path / "s.json").as_dict() == found.as_dict()
    assert some_of(settings.from_dict({"head": "spq"}, "here")) == SPQ
    with pytest.raises(ValueError) as caught:
        settings.from_dict({"head": "spq", "n_bits": 48}, "old.json")
    assert "Invalid n_bits (old.json)" in str(caught.value)


def test_a_model_fixes_its_sizes():
    found = settings.resolve(["--head=spq", "--n_book=4", "--seed=3"], NO_FILE)
    architecture = heads.architecture_of(found)
    expected = {"head": "spq", "n_book": 4, "bn_word": 4, "len_code": 16, "width_multiplier": 1.0}
    assert architecture == {**expected, "legacy": False, "seed": 3}
    assert heads.fixed_by(architecture) == expected
    settings.check_fixed(found, expected, "m.keras")
    with pytest.raises(
        ValueError, match=r"Invalid n_book. Expected 8, which the model m.keras has. Received: n_book=4"
    ):
        settings.check_fixed(found, {**expected, "n_book": 8}, "m.keras")
    with pytest.raises(ValueError, match=r"Invalid head. Expected gpq, which the model m.keras has"):
        settings.check_fixed(found, {"head": "gpq"}, "m.keras")
