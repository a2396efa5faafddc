"""A signal ends a run after the step in progress, with a save from which it goes on to the same bits."""

import os
import signal
import threading
from pathlib import Path

import keras
import numpy as np
import pytest

from gpq_tf import __main__ as commands
from gpq_tf import load_model, measures, model_file, saves, stopping, trainer
from gpq_tf import settings as settings_module

from small_data import coloured_data


@pytest.fixture(scope="module")
def data():
    return coloured_data()


@pytest.fixture(autouse=True)
def usual_handlers():
    """Those of a program that a user starts; one that is started in the background may have to ignore Ctrl-C."""
    usual = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
    before = {number: signal.signal(number, handler) for number, handler in usual.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def settings(folder, **changes):
    given = {"model_save_path": folder, "width_multiplier": 1 / 16, "batch_size": 50, "total_epochs": 3, **changes}
    return settings_module.resolve([f"--{name}={value}" for name, value in given.items()], "no_such_config.py")


class Bar:
    """A progress bar that sends this process a signal after some steps."""

    def __init__(self, number, after):
        self.number, self.left = number, after

    def __call__(self, total, unit):
        return self

    def update(self, n):
        self.left -= n
        if self.left == 0:
            signal.raise_signal(self.number)

    def set_postfix(self, *_, **__):
        pass

    def close(self):
        pass


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_signal_is_followed_by_a_save_from_which_the_run_goes_on_to_the_same_bits(tmp_path, data, number):
    _, whole = trainer.train(settings(tmp_path / "whole", save_term=2), data)
    folder = tmp_path / "stopped"
    with pytest.raises(stopping.Stopped) as stopped:
        # Known after step 4, so that the fifth of six steps, in the middle of the third epoch, is the last.
        trainer.train(settings(folder, save_term=2), data, progress=Bar(number, after=4))
    assert stopped.value.signal == number
    saved = folder / "gpq_48bits_stopped.keras"
    assert str(stopped.value) == (
        f"{stopping.NAMES[number]} after step 5 of 6; saved {saved}, --resume=last goes on from there"
    )
    assert model_file.read(saved).record["step"] == 5
    assert saves.find_last(folder / "gpq_48bits") == saved

    reports = []
    _, path = trainer.train(settings(folder, resume="last"), data, reports.append)
    assert f"resuming {saved} after step 5" in reports
    assert not saved.exists()  # what is further on replaces it
    for ours, theirs in zip(load_model(path).weights, load_model(whole).weights, strict=True):
        np.testing.assert_array_equal(*map(keras.ops.convert_to_numpy, (ours, theirs)), err_msg=ours.path)
    states = (model_file.training_state(model_file.read(file)) for file in (path, whole))
    for ours, theirs in zip(*(sorted(state.items()) for state in states), strict=True):
        np.testing.assert_array_equal(ours[1], theirs[1], err_msg=ours[0])


@pytest.mark.slow
def test_a_signal_in_the_last_step_changes_nothing(tmp_path, data):
    _, path = trainer.train(settings(tmp_path, total_epochs=1), data, progress=Bar(signal.SIGTERM, after=2))
    assert sorted(file.name for file in tmp_path.glob("*.keras")) == [path.name]


def test_a_signal_in_an_evaluation_saves_what_it_measured(tmp_path, data, monkeypatch):
    measure = measures.MEASURES["gpq"]

    def evaluate(model, data, settings):
        signal.raise_signal(signal.SIGTERM)
        return {"mAP": 0.5}

    monkeypatch.setitem(measures.MEASURES, "gpq", measure._replace(evaluate=evaluate))
    with pytest.raises(stopping.Stopped, match="terminated after step 2 of 6"):
        trainer.train(settings(tmp_path, eval_epoch=1), data)
    assert model_file.read(tmp_path / "gpq_48bits_stopped.keras").record["step"] == 2


def test_the_newest_save_is_the_last_whatever_its_epoch(tmp_path):
    stem = tmp_path / "gpq_48bits"
    for age, name in enumerate(("_7", "_stopped", "_3")):
        path = Path(f"{stem}{name}.keras")
        path.touch()
        os.utime(path, (1000 + age, 1000 + age))
    assert [path.name for path in saves.newest(stem)] == [
        f"gpq_48bits{name}.keras" for name in ("_3", "_stopped", "_7")
    ]


@pytest.mark.slow
def test_the_same_command_may_be_started_again_when_all_is_done(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    given = ["train", "--dataset=cifar10_sample", "--width_multiplier=0.0625", "--batch_size=450", "--resume=last"]
    for epochs, status in (("1", 0), ("1", 0)):
        assert commands.main([*given, f"--total_epochs={epochs}"]) == status
        assert capsys.readouterr().out.splitlines()[-1] == "done: models/gpq_48bits_1.keras"
    assert commands.main([*given[:-1], "--resume=models/gpq_48bits_1.keras", "--total_epochs=1"]) == 2
    assert "Expected more than the 2 steps" in capsys.readouterr().err


@pytest.mark.slow
def test_last_means_the_newest_save_or_a_new_run(tmp_path, data):
    stem = tmp_path / "gpq_48bits"
    assert saves.find_last(stem) is None
    reports = []
    trainer.train(settings(tmp_path, resume="last", total_epochs=2, save_term=1), data, reports.append)
    assert reports[0] == "starting from scratch (seed 0)"
    assert saves.find_last(stem).name == "gpq_48bits_2.keras"
    trainer.train(settings(tmp_path, resume="last"), data, reports.append)
    assert f"resuming {stem}_2.keras after step 4" in reports


def test_the_first_signal_is_noted_and_the_second_acts():
    handlers = {number: signal.getsignal(number) for number in stopping.NAMES}
    with stopping.on_request() as request:
        assert request.signal is None
        signal.raise_signal(signal.SIGINT)
        assert request.signal == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert {number: signal.getsignal(number) for number in stopping.NAMES} == handlers


def test_what_is_ignored_stays_ignored():
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with stopping.on_request() as request:
        signal.raise_signal(signal.SIGINT)
    assert request.signal is None


def test_other_threads_leave_signals_alone():
    found = []

    def use():
        with stopping.on_request() as request:
            found.append((request.signal, signal.getsignal(signal.SIGTERM)))

    thread = threading.Thread(target=use)
    before = signal.getsignal(signal.SIGTERM)
    thread.start()
    thread.join()
    assert found == [(None, before)]


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (stopping.Stopped("terminated after step 5", signal.SIGTERM), 143),
        (stopping.Stopped("interrupted after step 5", signal.SIGINT), 130),
        (stopping.LostWorker("Lost another worker"), 75),
    ],
)
def test_a_command_ends_with_the_status_that_the_readme_names(monkeypatch, capsys, error, status):
    def fail(arguments):
        raise error

    monkeypatch.setitem(commands.COMMANDS, "train", fail)
    assert commands.main(["train"]) == status
    assert capsys.readouterr().err.strip().endswith(str(error))
