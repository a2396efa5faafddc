"""Training that was interrupted goes on as if it had not been, bit for bit."""

import json
import os
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest

from gpq_tf import convert, load_model, model_file, running, starting, trainer, training_state
from gpq_tf import settings as settings_module
from gpq_tf.heads import gpq
from gpq_tf.train_step import make_step

import golden
from gpq_files import checkpoint_arrays, write_checkpoint
from small_data import coloured_data


@pytest.fixture(scope="module")
def data():
    return coloured_data()


def settings(folder, **changes):
    given = {"model_save_path": folder, "width_multiplier": 1 / 16, "batch_size": 50, "save_term": 1, **changes}
    return settings_module.resolve([f"--{name}={value}" for name, value in given.items()], "no_such_config.py")


def weights(path):
    return [keras.ops.convert_to_numpy(weight) for weight in load_model(path).weights]


def same(first, second):
    return all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))


SLOW = [pytest.param(precision, marks=pytest.mark.slow) for precision in ("mixed_bfloat16", "mixed_float16")]


@pytest.mark.parametrize("precision", ["float32", *SLOW])
def test_a_resumed_run_ends_in_the_same_bits(tmp_path, data, precision):
    trainer.train(settings(tmp_path / "whole", total_epochs=3, precision=precision), data)
    whole = tmp_path / "whole" / "gpq_48bits_3.keras"
    for epoch in (1, 2):
        asked = settings_module.resolve(
            [f"--resume={tmp_path}/whole/gpq_48bits_{epoch}.keras", f"--model_save_path={tmp_path / str(epoch)}"],
            "no_such_config.py",
        )
        chosen = starting.settings_of_resumed(asked)
        # the settings of the run come from the file, what is given now from here
        assert (chosen.batch_size, chosen.total_epochs, chosen.precision) == (50, 3, precision)
        reports = []
        _, path = trainer.train(chosen, data, reports.append)
        assert reports[0].endswith(f"after step {2 * epoch}")
        assert same(weights(path), weights(whole))
        state, expected = (
            model_file.training_state(model_file.read(path)),
            model_file.training_state(model_file.read(whole)),
        )
        assert set(state) == set(expected)
        assert all(np.array_equal(state[name], expected[name]) for name in state)


@pytest.mark.usefixtures("uncompiled")
def test_what_cannot_go_on_says_why(tmp_path, data):
    trainer.train(settings(tmp_path, total_epochs=1), data)
    saved = tmp_path / "gpq_48bits_1.keras"
    load_model(saved).save(tmp_path / "bare.keras")  # a loaded model has no state
    asked = settings(tmp_path, resume=tmp_path / "bare.keras")
    with pytest.raises(ValueError, match=r"Received: a model without the optimiser's state; --init starts"):
        trainer.train(starting.settings_of_resumed(asked), data)
    with pytest.raises(ValueError, match=r"Invalid total_epochs. Expected more than the 2 steps"):
        trainer.train(starting.settings_of_resumed(settings(tmp_path, resume=saved, total_epochs=1)), data)
    with pytest.raises(ValueError, match=r"Invalid n_book. Expected 12, which the model .* has. Received: n_book=6"):
        starting.settings_of_resumed(settings(tmp_path, resume=saved, n_book=6))
    with pytest.raises(ValueError, match=r"Invalid model"):
        starting.settings_of_resumed(settings(tmp_path, resume=tmp_path / "nothing.keras"))
    asked = settings_module.resolve([f"--resume={saved}", "--batch_size=25"], "no_such_config.py")
    with pytest.raises(ValueError, match=r"Invalid batch_size\. Expected 50, with which .*gpq_48bits_1\.keras was"):
        starting.settings_of_resumed(asked)


@pytest.mark.slow
def test_legacy_and_data_go_on_too(tmp_path, data):
    trainer.train(settings(tmp_path, total_epochs=1, legacy=True), data)
    saved = tmp_path / "gpq_48bits_1.keras"
    asked = settings_module.resolve([f"--resume={saved}"], "no_such_config.py")
    assert starting.settings_of_resumed(asked).legacy is True
    converted = load_model(saved)
    converted.record = {}  # as a converted checkpoint, which knows its architecture only
    converted.training_state = model_file.training_state(model_file.read(saved))
    converted.save(tmp_path / "converted.keras")
    asked = settings_module.resolve([f"--resume={tmp_path}/converted.keras"], "no_such_config.py")
    assert starting.settings_of_resumed(asked).legacy is True
    with pytest.raises(ValueError, match=r"Invalid data. Expected the images that .* was trained on: coloured noise"):
        trainer.train(settings(tmp_path, resume=saved, total_epochs=2), coloured_data(seed=9))


@pytest.mark.slow
def test_saves_of_before_count(tmp_path, data, monkeypatch):
    trainer.train(settings(tmp_path, total_epochs=2), data)
    chosen = settings(tmp_path, resume=tmp_path / "gpq_48bits_2.keras", total_epochs=4, keep=2)
    trainer.train(chosen, data)
    assert sorted(file.stem for file in tmp_path.glob("*.keras")) == ["gpq_48bits_3", "gpq_48bits_4"]

    def nan(model, described, given):
        loss = keras.ops.sum(model.head.prototypes) * float("nan")
        return {"loss": loss, "hash": loss, "cls": loss, "ent": loss}

    monkeypatch.setattr(gpq, "compare", nan)
    with pytest.raises(running.Diverged, match=r"the last good model is .*gpq_48bits_4.keras"):
        trainer.train(settings(tmp_path, resume=tmp_path / "gpq_48bits_4.keras", total_epochs=5), data)


@pytest.mark.slow
def test_a_used_folder_is_announced(tmp_path, data):
    trainer.train(settings(tmp_path, total_epochs=2), data)
    reports = []
    trainer.train(settings(tmp_path, total_epochs=1), data, reports.append)
    assert f"{tmp_path} holds 2 models of another run: those of the same epochs will be replaced" in reports


def test_a_state_of_another_optimiser_is_refused():
    variable = keras.Variable(np.zeros(3, "float32"), name="x")
    optimizer = gpq.optimizer()
    optimizer.build([variable])
    state = training_state.from_optimizer(optimizer, 7)
    assert training_state.into_optimizer(state, optimizer) == 7
    name = next(key for key in state if key.endswith("momentum"))
    with pytest.raises(ValueError, match=r"Received: \(4,\)"):
        training_state.into_optimizer({**state, name: np.zeros(4)}, optimizer)
    with pytest.raises(ValueError, match=r"differs"):
        training_state.into_optimizer({**state, "stranger": np.zeros(1)}, optimizer)


@pytest.mark.slow
@golden.needs_golden
def test_a_converted_checkpoint_goes_on_where_the_original_stopped(tmp_path):
    """Slots and step equal the recorded ones, and the third step equals that of our own uninterrupted run."""
    from test_golden_step import as_legacy, batch_of, losses_function, narrow_model, variables_of

    stored = golden.load("narrow/step.npz")
    converted, _ = convert.convert(golden.GPQ / "narrow/train.ckpt")
    converted.save(tmp_path / "converted.keras")
    model = load_model(tmp_path / "converted.keras")
    optimizer = gpq.optimizer()
    optimizer.build(model.trainable_variables)
    state = model_file.training_state(model_file.read(tmp_path / "converted.keras"))
    assert training_state.into_optimizer(state, optimizer) == 2
    assert int(keras.ops.convert_to_numpy(optimizer.iterations)) == 2

    names = {**variables_of(model), "Z": model.head.quantizer.codebook}
    for name, variable in names.items():
        assert np.array_equal(as_legacy(model, name), stored[f"final/{name}"]), name
        if variable.trainable:
            slots = training_state.slot_variables(optimizer, variable)
            for slot, legacy_name in zip(slots, ("Adam", "Adam_1"), strict=True):
                assert np.array_equal(as_legacy(model, name, slot), stored[f"final/{name}/{legacy_name}"]), name

    resumed = make_step(model, losses_function(model), optimizer)(batch_of(stored))
    own, own_optimizer = narrow_model(stored), gpq.optimizer()
    step = make_step(own, losses_function(own), own_optimizer)
    for _ in range(3):
        uninterrupted = step(batch_of(stored))
    for name in uninterrupted:
        assert float(resumed[name]) == pytest.approx(float(uninterrupted[name]), rel=1e-5)
    for name in names:
        if not ("conv2d" in name and name.endswith("bias")):
            difference = np.abs(as_legacy(model, name) - as_legacy(own, name)).max()
            assert difference < 3e-4, name


def test_a_checkpoint_without_all_slots_has_no_training_state(tmp_path):
    arrays = checkpoint_arrays(adam=True)
    write_checkpoint(tmp_path / "whole.ckpt", arrays)
    model, lines = convert.convert(tmp_path / "whole.ckpt")
    power = float(arrays["beta2_power"])
    assert int(model.training_state["step"]) == round(np.log(power) / np.log(0.999)) - 1
    assert "used     C/Adam (5, 24) -> training state, mean of the gradient" in lines
    del arrays["C/Adam_1"]
    write_checkpoint(tmp_path / "part.ckpt", arrays)
    model, lines = convert.convert(tmp_path / "part.ckpt")
    assert model.training_state is None
    assert any(line.startswith("ignored  C/Adam ") for line in lines)
    write_checkpoint(tmp_path / "demo.ckpt", checkpoint_arrays())
    assert convert.convert(tmp_path / "demo.ckpt")[0].training_state is None


@pytest.mark.slow
@pytest.mark.parametrize(("head", "epochs", "steps"), [("gpq", 8, 32), ("spq", 6, 18), ("cgd", 8, 80)])
def test_killed_runs_end_in_the_same_bits(tmp_path, head, epochs, steps):
    """The campaign of benchmarks/kill_resume.py, shortened: a process killed at a random moment."""
    script = Path(__file__).parents[1] / "benchmarks" / "kill_resume.py"
    out = tmp_path / "result.json"
    command = [sys.executable, str(script), f"--head={head}", "--kills=1", f"--epochs={epochs}"]
    command += ["--short", f"--out={out}"]
    subprocess.run(command, check=True, cwd=tmp_path, stdout=subprocess.DEVNULL)
    result = json.loads(out.read_text())
    assert result["kills"] == 1
    assert result["steps"] == steps
    assert result["weights_equal"]
    assert result["optimiser_equal"]
    assert result["losses_equal"]


@pytest.mark.slow
def test_a_step_runs_with_deterministic_operations_only(tmp_path):
    """What a GPU is asked for: an operation without a deterministic form would raise."""
    program = f"""
import tensorflow as tf
tf.config.experimental.enable_op_determinism()
from gpq_tf import settings, trainer
from small_data import coloured_data
given = ["--width_multiplier=0.0625", "--batch_size=50", "--total_epochs=1", "--model_save_path={tmp_path}"]
print(trainer.train(settings.resolve(given, "no_such_config.py"), coloured_data())[1])
"""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr[-2000:]
    assert (tmp_path / "gpq_48bits_1.keras").is_file()


@pytest.mark.parametrize(("gpus", "switched"), [([], False), (["GPU:0"], True)])
def test_determinism_is_asked_for_on_a_gpu_alone(monkeypatch, gpus, switched):
    import tensorflow as tf

    calls = []
    monkeypatch.setattr(tf.config, "list_physical_devices", lambda kind: gpus)
    monkeypatch.setattr(tf.config.experimental, "enable_op_determinism", lambda: calls.append(True))
    trainer._make_deterministic()
    assert calls == [True] * switched
