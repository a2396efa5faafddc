"""Which of a run's models are kept, and which is called the best."""

import json
import os

import pytest

from gpq_tf import load_model
from gpq_tf import settings as settings_module
from gpq_tf.network import RetrievalModel
from gpq_tf.saves import Saves, find_last


@pytest.fixture(scope="module")
def model():
    return RetrievalModel(n_book=1, bn_word=1, len_code=1, n_classes=2, width_multiplier=1 / 64)


@pytest.fixture
def stem(tmp_path):
    return tmp_path / "gpq_1bits"


def saves(stem, keep=None, resume=None, epoch_of_resume=0, reports=None):
    given = [f"--keep={keep}", f"--resume={resume}"]
    chosen = settings_module.resolve(given, "no_such_config.py")
    return Saves(stem, chosen, "mAP", epoch_of_resume, (reports if reports is not None else []).append)


def save(kept, model, *epochs):
    for epoch in epochs:
        model.record = {"epoch": epoch, "mAP_of_subset": epoch / 100}
        kept.save(model, epoch)


def evaluate(kept, model, epoch, score):
    model.record = {"epoch": epoch, "mAP": score}
    return kept.save_if_best(model)


def names(stem):
    """Of the models, each of which has its settings beside it."""
    models, settings = ({file.stem for file in stem.parent.glob(f"*.{end}")} for end in ("keras", "json"))
    assert models == settings
    return {name.removeprefix(f"{stem.name}_") for name in models}


def test_a_model_goes_with_its_settings(stem, model):
    kept = saves(stem)
    assert kept.last_good is None
    assert kept.best == {"epoch": None, "mAP": -1.0}
    save(kept, model, 20)
    assert kept.last_good == stem.with_name("gpq_1bits_20.keras")
    assert load_model(kept.last_good).record["epoch"] == 20
    stored = json.loads(kept.last_good.with_suffix(".json").read_text())
    assert (stored["epoch"], stored["mAP_of_subset"]) == (20, 0.2)
    assert stored["settings"]["n_book"] == 12


@pytest.mark.parametrize(
    ("keep", "left"), [(None, {"8", "9", "10", "11"}), (4, {"8", "9", "10", "11"}), (2, {"10", "11"}), (1, {"11"})]
)
def test_the_oldest_goes_first(stem, model, keep, left):
    save(saves(stem, keep), model, 8, 9, 10, 11)
    assert names(stem) == left


def test_a_damaged_save_is_passed_over_and_named(stem, model):
    assert find_last(stem) is None
    save(saves(stem), model, 1, 2, 3)
    for age, epoch in enumerate((1, 2, 3)):
        os.utime(f"{stem}_{epoch}.keras", (1000 + age, 1000 + age))
    third = stem.with_name("gpq_1bits_3.keras")
    third.write_bytes(third.read_bytes()[:-100])
    stem.with_name("gpq_1bits_4.keras").symlink_to("nowhere")
    reports = []
    assert find_last(stem, reports.append) == stem.with_name("gpq_1bits_2.keras")
    assert len(reports) == 1 and reports[0].startswith(f"passed over: Invalid model file '{third}'")
    for epoch in (1, 2):
        stem.with_name(f"gpq_1bits_{epoch}.keras").unlink()
    with pytest.raises(ValueError, match=r"gpq_1bits_3\.keras"):
        find_last(stem)


def test_a_stopped_run_of_somebody_else_stays(stem, model):
    stopped = saves(stem).save_stopped(model)
    content, reports = stopped.read_bytes(), []
    save(saves(stem, reports=reports), model, 1)
    assert stopped.read_bytes() == content
    assert reports == [f"{stopped} is the save of another run: this one's will replace it where it is stopped"]
    save(saves(stem, resume=stopped, reports=reports), model, 1)
    assert not stopped.exists() and f"{stopped} is" not in "".join(reports[1:])


def test_a_model_that_somebody_took_away_is_no_error(stem, model):
    kept = saves(stem, keep=1)
    save(kept, model, 1)
    for file in stem.parent.iterdir():
        file.unlink()
    save(kept, model, 2)
    assert names(stem) == {"2"}


def test_only_a_better_model_becomes_the_best(stem, model):
    kept = saves(stem, keep=1)
    best = stem.with_name("gpq_1bits_best.keras")
    for epoch, score, expected in ((1, 0.0, best), (2, 0.5, best), (3, 0.4, None), (4, 0.5, None), (5, 0.6, best)):
        assert evaluate(kept, model, epoch, score) == expected
        save(kept, model, epoch)
    assert kept.best == {"epoch": 5, "mAP": 0.6}
    assert load_model(best).record == {"epoch": 5, "mAP": 0.6}
    assert json.loads(best.with_suffix(".json").read_text())["mAP"] == 0.6
    assert names(stem) == {"5", "best"}  # the best is not one of those to keep


def test_a_score_that_is_no_number_is_never_the_best(stem, model):
    kept = saves(stem)
    assert evaluate(kept, model, 1, float("nan")) is None
    assert names(stem) == set()


def test_a_new_run_leaves_others_models_alone_and_says_so(stem, model):
    first = saves(stem)
    save(first, model, 1, 2)
    evaluate(first, model, 2, 0.9)
    stem.with_name("gpq_1bits_of_mine.keras").write_bytes(b"")
    stem.with_name("gpq_10bits_7.keras").write_bytes(b"")
    reports = []
    second = saves(stem, keep=1, reports=reports)
    assert reports == [
        f"{stem.parent} holds 2 models of another run: those of the same epochs will be replaced",
        f"{stem}_best.keras is the best model of another run: this one's first evaluation will replace it",
    ]
    assert second.newest is None
    assert (second.last_good, second.best["mAP"]) == (None, -1.0)
    save(second, model, 3, 4)
    left = {file.name for file in stem.parent.glob("*.keras")}
    ours = {f"gpq_1bits_{which}.keras" for which in (1, 2, 4, "best", "of_mine")}
    assert left == {*ours, "gpq_10bits_7.keras"}


def test_a_resumed_run_goes_on_with_its_own(stem, model):
    first = saves(stem)
    save(first, model, 2, 4, 10, 12)
    evaluate(first, model, 4, 0.5)
    reports = []
    resumed = saves(stem, 2, stem.with_name("gpq_1bits_10.keras"), 10, reports)
    assert resumed.last_good == stem.with_name("gpq_1bits_10.keras")
    assert resumed.best == {"epoch": 4, "mAP": 0.5}
    assert len(reports) == 1  # epoch 12 is of a run that went on from here before
    assert evaluate(resumed, model, 11, 0.45) is None
    save(resumed, model, 11)
    assert names(stem) == {"10", "11", "12", "best"}
    assert evaluate(resumed, model, 12, 0.55) is not None


def test_a_best_of_later_epochs_is_not_the_resumed_runs(stem, model):
    first = saves(stem)
    save(first, model, 1, 2)
    evaluate(first, model, 2, 0.9)
    resumed = saves(stem, resume=stem.with_name("gpq_1bits_1.keras"), epoch_of_resume=1)
    assert resumed.best == {"epoch": None, "mAP": -1.0}
    assert evaluate(resumed, model, 2, 0.3) is not None


def test_a_file_called_best_that_was_never_evaluated_is_none(stem, model):
    kept = saves(stem)
    save(kept, model, 1)
    for end in ("keras", "json"):
        copied = stem.with_name(f"gpq_1bits_1.{end}").read_bytes()
        stem.with_name(f"gpq_1bits_best.{end}").write_bytes(copied)
    resumed = saves(stem, resume=stem.with_name("gpq_1bits_1.keras"), epoch_of_resume=1)
    assert resumed.best == {"epoch": None, "mAP": -1.0}


def test_a_damaged_best_is_named(stem, model):
    save(saves(stem), model, 1)
    stem.with_name("gpq_1bits_best.keras").write_bytes(b"PK")
    with pytest.raises(ValueError, match=r"Invalid model file '.*gpq_1bits_best.keras'. Expected a whole .keras"):
        saves(stem, resume=stem.with_name("gpq_1bits_1.keras"), epoch_of_resume=1)


def test_a_run_removes_what_a_killed_one_left(stem):
    left = stem.with_name(".gpq_1bits_20.0123456789abcdef.keras")
    left.touch()
    os.utime(left, (0, 0))
    saves(stem)
    assert not left.exists()
