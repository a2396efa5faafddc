"""Training: it learns, writes what it promises, starts from where it says, and stops where it must."""

import errno
import json
import math
import os

import keras
import numpy as np
import pytest

from gpq_tf import files, load_model, retrieval, running, starting, trainer
from gpq_tf import settings as settings_module
from gpq_tf.convert import gpq_names
from gpq_tf.heads import gpq
from gpq_tf.network import RetrievalModel

from small_data import coloured_data

NARROW = 1 / 16


@pytest.fixture(scope="module")
def data():
    return coloured_data()


def settings(folder, **changes):
    given = {"model_save_path": folder, "width_multiplier": NARROW, "batch_size": 50, "total_epochs": 1, **changes}
    return settings_module.resolve([f"--{name}={value}" for name, value in given.items()], "no_such_config.py")


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_training_learns_and_writes_what_it_promises(tmp_path, data):
    reports = []
    before = retrieval.evaluate(starting.initial_model(settings(tmp_path))[0], data)["mAP"]
    chosen = settings(tmp_path, total_epochs=25, save_term=10)
    model, path = trainer.train(chosen, data, reports.append)
    after = retrieval.evaluate(model, data)["mAP"]
    assert before < 0.5
    assert after > before + 0.2

    names = sorted(file.name for file in tmp_path.iterdir())
    stems = [f"gpq_48bits_{epoch}" for epoch in (10, 20, 25)]
    assert names == sorted([f"{s}.keras" for s in stems] + [f"{s}.json" for s in stems] + ["gpq_48bits.log.jsonl"])
    assert path == tmp_path / "gpq_48bits_25.keras"
    assert settings_module.load(path.with_suffix(".json")).as_dict() == chosen.as_dict()

    log = lines_of(tmp_path / "gpq_48bits.log.jsonl")
    steps = [line for line in log if line["event"] == "step"]
    assert [line["step"] for line in steps] == list(range(1, 51))  # 100 labelled in batches of 50: 2 steps an epoch
    for line in steps:
        assert line["loss"] == pytest.approx(line["hash"] + 0.1 * line["ent"] + 0.1 * line["cls"], rel=1e-5)
        assert line["lr"] == pytest.approx(2e-4)
        assert line["images_per_second"] > 0
    assert np.mean([line["loss"] for line in steps[-5:]]) < steps[0]["loss"]
    assert [line["epoch"] for line in log if line["event"] == "save"] == [10, 20, 25]
    assert log[0]["event"] == "start"
    assert log[0]["settings"] == chosen.as_dict()

    assert reports[0] == "starting from scratch (seed 0)"
    assert "50 steps take about" in reports[1]
    assert "mAP of the subset" in reports[-1]

    loaded = load_model(path)
    np.testing.assert_array_equal(loaded.embed(data.query_images), model.embed(data.query_images))
    assert loaded.record["epoch"] == 25
    assert loaded.record["settings"] == chosen.as_dict()
    assert loaded.record["class_names"] == data.class_names


@pytest.mark.usefixtures("uncompiled")
def test_keep_drops_the_oldest(tmp_path, data):
    trainer.train(settings(tmp_path, total_epochs=4, save_term=1, keep=2), data)
    assert sorted(file.stem for file in tmp_path.glob("*.keras")) == ["gpq_48bits_3", "gpq_48bits_4"]
    assert sorted(file.stem for file in tmp_path.glob("gpq_48bits_*.json")) == ["gpq_48bits_3", "gpq_48bits_4"]


@pytest.mark.usefixtures("uncompiled")
def test_names_follow_the_bits(tmp_path, data):
    _, path = trainer.train(settings(tmp_path, n_book=3, bn_word=5, len_code=4), data)
    assert path.name == "gpq_15bits_1.keras"
    assert load_model(path).codebook.shape == (3, 32, 4)


@pytest.mark.parametrize("precision", ["mixed_bfloat16", pytest.param("mixed_float16", marks=pytest.mark.slow)])
def test_mixed_precision_trains_float32_weights(tmp_path, data, precision):
    model, _ = trainer.train(settings(tmp_path, precision=precision), data)
    assert {keras.backend.standardize_dtype(weight.dtype) for weight in model.weights} == {"float32"}
    assert model.backbone.compute_dtype == precision.removeprefix("mixed_")
    losses = [line["loss"] for line in lines_of(tmp_path / "gpq_48bits.log.jsonl") if line["event"] == "step"]
    assert all(math.isfinite(loss) for loss in losses)
    assert model.embed(data.query_images).dtype == np.float32


def write_mat(path, model):
    import scipy.io

    arrays = {}
    for name, (variable, _) in gpq_names.backbone_targets(model.backbone).items():
        values = keras.ops.convert_to_numpy(variable)
        arrays[f"{name}:0"] = values + 0.01 if values.ndim == 1 else values
    scipy.io.savemat(path, arrays)


def test_the_start_is_the_mat_file_when_present(tmp_path):
    other = RetrievalModel(width_multiplier=NARROW, seed=5)
    write_mat(tmp_path / "ImageNet_pretrained.mat", other)
    model, line = starting.initial_model(
        settings(tmp_path, ImageNet_pretrained_path=tmp_path / "ImageNet_pretrained", seed=2)
    )
    assert line == f"starting from {tmp_path}/ImageNet_pretrained.mat (backbone; head from seed 2)"
    kernels = [m.backbone.convolutions[9].kernel for m in (model, other)]
    np.testing.assert_array_equal(*map(keras.ops.convert_to_numpy, kernels))
    fresh = RetrievalModel(width_multiplier=NARROW, seed=2)
    np.testing.assert_array_equal(model.codebook, fresh.codebook)


def test_the_start_is_another_model_when_asked(tmp_path):
    other = RetrievalModel(width_multiplier=NARROW, seed=5)
    other.save(tmp_path / "other.keras")
    model, line = starting.initial_model(settings(tmp_path, init=tmp_path / "other.keras"))
    assert line == f"starting from {tmp_path}/other.keras (backbone and head)"
    images = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), np.uint8)
    np.testing.assert_array_equal(model.embed(images), other.embed(images))

    model, line = starting.initial_model(settings(tmp_path, init=tmp_path / "other.keras", n_book=6))
    assert "backbone; the head has other sizes" in line
    assert model.codebook.shape[0] == 6
    with pytest.raises(ValueError, match="is its width_multiplier another"):
        starting.initial_model(settings(tmp_path, init=tmp_path / "other.keras", width_multiplier=0.125))


def test_a_start_that_was_asked_for_and_is_absent_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"Invalid ImageNet_pretrained_path. Expected a .mat file"):
        starting.initial_model(settings(tmp_path, ImageNet_pretrained_path=tmp_path / "nothing.mat"))
    with pytest.raises(ValueError, match="Invalid model"):
        starting.initial_model(settings(tmp_path, init=tmp_path / "nothing.keras"))


@pytest.mark.usefixtures("uncompiled")
def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_what_was_saved(tmp_path, data, monkeypatch):
    monkeypatch.setattr(gpq, "compare", _nan_from(gpq.compare, step=5))
    with pytest.raises(running.Diverged) as caught:
        trainer.train(settings(tmp_path, total_epochs=4, save_term=2), data)
    message = str(caught.value)
    assert "Loss is nan at step 5 (epoch 3)" in message
    assert f"the last good model is {tmp_path}/gpq_48bits_2.keras" in message
    assert "Try --precision=float32" in message
    assert load_model(tmp_path / "gpq_48bits_2.keras").record["step"] == 4
    assert [file.name for file in tmp_path.glob("*.keras")] == ["gpq_48bits_2.keras"]


@pytest.mark.usefixtures("uncompiled")
def test_the_step_of_a_loss_that_is_known_late_is_named(tmp_path, data, monkeypatch):
    """On a GPU, where the next step is under way by then."""
    monkeypatch.setattr(trainer, "_is_asynchronous", lambda: True)
    monkeypatch.setattr(gpq, "compare", _nan_from(gpq.compare, step=3))
    with pytest.raises(running.Diverged, match=r"^Loss is nan at step 3 .epoch 2."):
        trainer.train(settings(tmp_path, total_epochs=4, save_term=4), data)


def test_steps_in_16_bits_that_are_skipped_are_told_and_not_counted(tmp_path, data, monkeypatch):
    def overflowing(recipe, chosen, steps_per_epoch):
        return keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(1e-3), initial_scale=scale)

    monkeypatch.setattr(trainer, "make_optimizer", overflowing)
    monkeypatch.setattr(running, "MOST_SKIPPED", 3)
    monkeypatch.setattr(gpq, "learning_rate", lambda *_: lambda updates: 1.0 + updates)
    scale = float("inf")
    with pytest.raises(running.Diverged, match="Gradients overflowed in the last 3 steps, up to step 3, and none was"):
        trainer.train(settings(tmp_path / "never", total_epochs=4, save_term=4), data)
    assert not list((tmp_path / "never").glob("*.keras"))
    scale, compare = 2.0**127, gpq.compare

    def steep(*given):
        losses = compare(*given)
        return {**losses, "loss": 8 * losses["loss"]}

    monkeypatch.setattr(gpq, "compare", steep)
    monkeypatch.setattr(running, "MOST_SKIPPED", 50)
    trainer.train(settings(tmp_path / "late", total_epochs=4, save_term=4), data)
    steps = [line for line in lines_of(tmp_path / "late" / "gpq_48bits.log.jsonl") if line["event"] == "step"]
    skipped = [line["skipped"] for line in steps]
    n = int(sum(skipped))
    assert 0 < n < len(steps) and skipped == [1.0] * n + [0.0] * (len(steps) - n)
    assert [line["loss_scale"] for line in steps] == [scale / 2 ** min(i, n) for i in range(len(steps))]
    assert [line["lr"] for line in steps] == [1.0 + max(0, i - n) for i in range(len(steps))]


@pytest.mark.usefixtures("uncompiled")
def test_what_was_learned_is_saved_where_a_batch_cannot_be_read(tmp_path, data, monkeypatch):
    draw = gpq.draw_batch

    def draw_or_fail(data, chosen, step):
        if step == 3:
            raise ValueError("photo.jpg: expected an image")
        return draw(data, chosen, step)

    monkeypatch.setattr(gpq, "draw_batch", draw_or_fail)
    with pytest.raises(ValueError, match=r"photo\.jpg: expected an image"):
        trainer.train(settings(tmp_path, total_epochs=4, save_term=4), data)
    assert load_model(tmp_path / "gpq_48bits_stopped.keras").record["step"] == 3


@pytest.mark.usefixtures("uncompiled")
def test_a_disk_that_is_full_names_the_last_good_model(tmp_path, data, monkeypatch):
    sync, second = files._sync, tmp_path / "gpq_48bits_2.keras"

    def fail_later(path):
        if ".gpq_48bits_2." in str(path):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(path)

    monkeypatch.setattr(files, "_sync", fail_later)
    with pytest.raises(OSError) as caught:
        trainer.train(settings(tmp_path, total_epochs=2, save_term=1), data)
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(second))
    first = tmp_path / "gpq_48bits_1.keras"
    assert caught.value.strerror == f"No space left on device; the last good model is {first}"
    assert load_model(first).record["step"] == 2 and not second.exists() and not list(tmp_path.glob(".*"))


def _nan_from(compare, step):
    """The losses, times NaN as soon as batch normalisation has been updated so many times (two a step)."""

    def broken(model, described, chosen):
        losses = compare(model, described, chosen)
        updates = model.backbone.normalizations[0].local_step
        factor = keras.ops.where(updates >= 2 * step, float("nan"), 1.0)
        return {**losses, "loss": losses["loss"] * factor}

    return broken


@pytest.mark.usefixtures("uncompiled")
def test_weights_that_are_not_finite_are_never_saved(tmp_path, data, monkeypatch):
    def poison(model, described, chosen):
        model.backbone.normalizations[0].moving_mean.assign(model.backbone.normalizations[0].moving_mean * float("nan"))
        zero = 0.0 * keras.ops.sum(model.head.prototypes)
        return {"loss": zero, "hash": zero, "cls": zero, "ent": zero}

    monkeypatch.setattr(gpq, "compare", poison)
    with pytest.raises(running.Diverged, match=r"moving_mean is not finite after step 2 .epoch 1.; no model was saved"):
        trainer.train(settings(tmp_path), data)
    assert not list(tmp_path.glob("*.keras"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_size": 64}, "Invalid image_size. Expected the data's, (32, 32, 3). Received: (64, 64, 3)"),
        ({"n_CLASSES": 21}, "Invalid n_CLASSES. Expected the data's, 10. Received: n_CLASSES=21"),
        ({"batch_size": 101}, "Invalid batch_size. Expected at most 100"),
    ],
)
def test_settings_that_do_not_fit_the_data_are_refused(tmp_path, data, changes, message):
    with pytest.raises(ValueError) as caught:
        trainer.train(settings(tmp_path, **changes), data)
    assert message in str(caught.value)
    assert not list(tmp_path.iterdir())


class Bar:
    """What the loop asks of a progress bar."""

    def __init__(self, total, unit):
        self.total, self.unit, self.count, self.closed, self.postfix = total, unit, 0, False, {}

    def set_postfix(self, values, refresh):
        self.postfix = values

    def update(self, n):
        self.count += n

    def close(self):
        self.closed = True


@pytest.mark.usefixtures("uncompiled")
def test_the_progress_bar_shows_losses_rate_and_speed(tmp_path, data):
    bars = []
    trainer.train(settings(tmp_path), data, progress=lambda **given: bars.append(Bar(**given)) or bars[0])
    (bar,) = bars
    assert (bar.total, bar.count, bar.closed) == (2, 2, True)
    assert set(bar.postfix) == {"loss", "hash", "cls", "ent", "lr", "images_per_second"}
