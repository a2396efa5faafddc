"""Training of SPQ: it learns, repeats and resumes in the same bits, freezes where legacy says, keeps the best model."""

import functools
import importlib.util
import json
import math
import shutil

import keras
import numpy as np
import pytest

from gpq_tf import load_model, model_file, network, retrieval, starting, trainer
from gpq_tf import settings as settings_module
from gpq_tf.backbones import resnet
from gpq_tf.data import protocol
from gpq_tf.heads import spq
from gpq_tf.index import PQIndex
from gpq_tf.network import RetrievalModel

from small_data import CLASS_NAMES, coloured_images

HAS_TENSORBOARD = importlib.util.find_spec("tensorboard") is not None


@pytest.fixture(scope="module", autouse=True)
def shallow():
    """Two layers of one block, and one shape for all that is encoded: most of a test's time is tracing."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(resnet, "CHANNELS", (64, 128))
        patch.setattr(resnet, "BLOCKS_PER_LAYER", 1)
        patch.setattr(network, "BATCH_SIZE", 24)
        yield


@pytest.fixture(scope="module")
def data():
    """480 images to train on and to search, 120 queries."""
    images, labels = coloured_images(600)
    return protocol.train_test(images[:, 12:20, 12:20], labels, CLASS_NAMES, "coloured noise", np.arange(600) >= 480)


def settings(folder, **changes):
    given = {
        "head": "spq",
        "model_save_path": folder,
        "image_size": 8,
        "width_multiplier": 1 / 8,
        "n_book": 4,
        "len_code": 4,
        "batch_size": 48,  # 10 steps an epoch
        **changes,
    }
    return settings_module.resolve([f"--{name}={value}" for name, value in given.items()], "no_such_config.py")


def lines_of(folder, event):
    lines = (json.loads(line) for line in (folder / "spq_16bits.log.jsonl").read_text().splitlines())
    return [line for line in lines if line["event"] == event]


def weights(path):
    return {weight.path: keras.ops.convert_to_numpy(weight) for weight in load_model(path).weights}


def state_of(path):
    return model_file.training_state(model_file.read(path))


def check_equal(first, second, compare=np.testing.assert_array_equal):
    """Weights and training state of two saved models are equal in every bit, or as `compare` says."""
    for ours, theirs in ((weights(first), weights(second)), (state_of(first), state_of(second))):
        assert set(ours) == set(theirs)
        for name in ours:
            compare(ours[name], theirs[name], err_msg=name)


# With frozen batch statistics one run of several differed in the last bit of one momentum; the cause is not known.
almost = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-7)


def train(chosen, data, report=None, scores=None):
    """trainer.train; with `scores`, those are what the evaluations of the whole data find, one after the other."""
    if scores is None:
        return trainer.train(chosen, data, report)
    left, evaluate = list(scores), retrieval.evaluate

    def scripted(model, evaluated, top_n):
        found = evaluate(model, evaluated, top_n)
        return {**found, "mAP": left.pop(0)} if evaluated is data else found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(retrieval, "evaluate", scripted)
        result = trainer.train(chosen, data, report)
    assert not left
    return result


# --- a run by default


@pytest.fixture(scope="module")
def run(tmp_path_factory, data):
    """(folder, model, reports, settings) of a run of twelve epochs."""
    folder, reports = tmp_path_factory.mktemp("run"), []
    chosen = settings(folder, total_epochs=12, save_term=2, eval_epoch=6, keep=None, n_DB=50)
    model, _ = train(chosen, data, reports.append)
    return folder, model, reports, chosen


def test_it_learns_without_labels(run, data):
    folder, model, _, chosen = run
    untrained = retrieval.evaluate(starting.initial_model(chosen)[0], data, 50)["mAP"]
    found = retrieval.evaluate(model, data, 50)["mAP"]
    losses = [line["loss"] for line in lines_of(folder, "step")]
    assert np.mean(losses[-10:]) < np.mean(losses[:10]) - 0.5
    assert found > untrained + 0.2


def test_it_writes_and_says_what_it_promises(run):
    folder, model, reports, chosen = run
    stems = ["spq_16bits_best", *(f"spq_16bits_{epoch}" for epoch in (2, 4, 6, 8, 10, 12))]
    expected = sorted(["spq_16bits.log.jsonl", *(f"{stem}.{end}" for stem in stems for end in ("keras", "json"))])
    assert sorted(file.name for file in folder.iterdir()) == expected
    steps = lines_of(folder, "step")
    assert [line["step"] for line in steps] == list(range(1, 121))
    # constant for ten epochs, then half a cosine over the two that are left
    rates = [line["lr"] for line in steps]
    np.testing.assert_allclose(rates, [3e-4] * 110 + [1.5e-4] * 10, rtol=1e-6)
    assert set(steps[0]) == {"event", "step", "epoch", "loss", "lr", "images_per_second"}
    evaluations = lines_of(folder, "evaluation")
    assert [(line["epoch"], line["step"]) for line in evaluations] == [(6, 60), (12, 120)]
    best = max(evaluations, key=lambda line: line["mAP"])
    assert evaluations[-1]["best"] == best["mAP"]
    told = [line for line in reports if "mAP@" in line]
    for line, entry, loss in zip(told, evaluations, (steps[59]["loss"], steps[119]["loss"]), strict=True):
        assert line.startswith(f"epoch {entry['epoch']}: loss {loss:.4f}, mAP@50 {entry['mAP']:.4f}, best ")
    record = load_model(folder / "spq_16bits_best.keras").record
    assert (record["epoch"], record["mAP"]) == (best["epoch"], best["mAP"])
    assert record["settings"] == chosen.as_dict()
    assert state_of(folder / "spq_16bits_best.keras") is None
    assert json.loads((folder / "spq_16bits_best.json").read_text())["mAP"] == best["mAP"]
    assert load_model(folder / "spq_16bits_12.keras").record["epoch"] == 12
    assert model.head_name == "spq"


def test_the_evaluation_is_the_search_of_all_queries_in_all_codes(run, data):
    """A PQIndex of the model's codebook and metric, as any user makes it; each class is right for itself."""
    folder, _, _, _ = run
    model = load_model(folder / "spq_16bits_12.keras")
    index = PQIndex(model.codebook, model.search_metric)
    codes = model.encode(data.gallery_images)
    index.add(codes)
    queries = model.embed(data.query_images)
    distances, ids = index.search(queries, 50)
    # the published distance: Euclidean in every book, added up
    books = queries.reshape(120, 1, 4, 4).astype("float64") - model.codebook[np.arange(4), codes].astype("float64")
    expected = np.linalg.norm(books, axis=-1).sum(axis=-1)
    np.testing.assert_allclose(distances, np.sort(expected, axis=1)[:, :50], rtol=0, atol=1e-5 * expected.max())
    relevant = data.gallery_labels[ids] == data.query_labels[:, None]
    hits = np.cumsum(relevant, axis=1)
    precisions = np.sum(relevant * hits / np.arange(1, 51), axis=1) / np.maximum(hits[:, -1], 1)
    assert lines_of(folder, "evaluation")[-1]["mAP"] == pytest.approx(precisions.mean(), abs=1e-9)


def test_a_loaded_model_gives_the_bits_of_the_trained_one(run, data):
    folder, model, _, _ = run
    loaded = load_model(folder / "spq_16bits_12.keras")
    np.testing.assert_array_equal(loaded.embed(data.query_images), model.embed(data.query_images))
    np.testing.assert_array_equal(loaded.encode(data.gallery_images), model.encode(data.gallery_images))
    np.testing.assert_array_equal(loaded.codebook, model.codebook)


def test_again_and_resumed_it_ends_in_the_same_bits(run, tmp_path, data, monkeypatch):
    """The rates of the first ten epochs are the same for any number of epochs."""
    folder, _, _, _ = run
    traces, describe = [], spq.describe

    def counted(*arguments):
        traces.append(arguments[-1])
        return describe(*arguments)

    monkeypatch.setattr(spq, "describe", counted)
    train(settings(tmp_path / "again", total_epochs=2, n_DB=50), data)
    check_equal(tmp_path / "again" / "spq_16bits_2.keras", folder / "spq_16bits_2.keras")
    assert traces == [False]  # 20 steps, traced once

    asked = settings_module.resolve(
        [f"--resume={folder}/spq_16bits_2.keras", f"--model_save_path={tmp_path}/resumed", "--total_epochs=4"],
        "no_such_config.py",
    )
    reports = []
    _, path = train(asked, data, reports.append)
    assert reports[0] == f"resuming {folder}/spq_16bits_2.keras after step 20"
    assert path == tmp_path / "resumed" / "spq_16bits_4.keras"
    check_equal(path, folder / "spq_16bits_4.keras")


# --- a run as the original's


@pytest.fixture(scope="module")
def legacy(tmp_path_factory, data):
    """(folder, reports) of a run of six epochs, evaluated after every second; epoch 1's model lies in first/."""
    folder, reports = tmp_path_factory.mktemp("legacy"), []
    (folder / "first").mkdir()

    def report(line):
        reports.append(line)
        if line.startswith("epoch 1:"):
            shutil.copy(folder / "spq_16bits_1.keras", folder / "first")

    chosen = settings(
        folder, total_epochs=6, save_term=1, eval_epoch=2, legacy=True, n_DB=50, tensorboard=HAS_TENSORBOARD
    )
    assert (chosen.augment, chosen.keep) == ("spq2021", 3)
    train(chosen, data, report, scores=[0.5, 0.4, 0.5])
    return folder, reports


def test_three_models_and_the_best_are_kept(legacy):
    folder, _ = legacy
    kept = [f"spq_16bits_{which}" for which in (4, 5, 6, "best")]
    assert sorted(file.stem for file in folder.glob("*.keras")) == kept
    assert sorted(file.stem for file in folder.glob("*.json")) == kept


def test_the_best_is_replaced_by_a_better_one_alone(legacy):
    folder, reports = legacy
    assert load_model(folder / "spq_16bits_best.keras").record["epoch"] == 2
    best = str(folder / "spq_16bits_best.keras")
    found = [(line["epoch"], line["mAP"], line["best"], line["path"]) for line in lines_of(folder, "evaluation")]
    assert found == [(2, 0.5, 0.5, best), (4, 0.4, 0.5, None), (6, 0.5, 0.5, None)]
    told = [line.partition(", ")[2] for line in reports if "mAP@" in line]
    assert told == [f"mAP@50 {score}, best 0.5000 (epoch 2)" for score in ("0.5000", "0.4000", "0.5000")]


def test_legacy_freezes_the_statistics_after_the_first_evaluation(legacy):
    folder, _ = legacy
    paths = [folder / "first" / "spq_16bits_1.keras", *(folder / f"spq_16bits_{name}.keras" for name in ("best", 4, 6))]
    first, second, fourth, sixth = map(weights, paths)
    for name in first:
        moves = [(old != new).any() for old, new in ((first[name], second[name]), (second[name], fourth[name]))]
        assert moves == ([True, False] if "/moving_" in name else [True, True]), name
        assert (fourth[name] != sixth[name]).any() == ("/moving_" not in name), name


def test_legacy_resumed_freezes_in_the_same_step(legacy, tmp_path, data):
    folder, _ = legacy
    asked = settings_module.resolve(
        [f"--resume={folder}/first/spq_16bits_1.keras", f"--model_save_path={tmp_path}", "--tensorboard=False"],
        "no_such_config.py",
    )
    train(asked, data, scores=[0.5, 0.4, 0.5])
    check_equal(tmp_path / "spq_16bits_6.keras", folder / "spq_16bits_6.keras", almost)
    losses = [line["loss"] for line in lines_of(folder, "step")]
    assert [line["loss"] for line in lines_of(tmp_path, "step")] == pytest.approx(losses[10:], rel=1e-5)


@pytest.mark.slow  # test_saves.py has it without the training
def test_the_best_is_kept_across_a_resume(legacy, tmp_path, data):
    folder, _ = legacy
    own = shutil.copytree(folder, tmp_path / "own")
    asked = settings_module.resolve(
        [f"--resume={own}/spq_16bits_4.keras", f"--model_save_path={own}", "--tensorboard=False"], "no_such_config.py"
    )
    before = (own / "spq_16bits_best.keras").read_bytes()
    reports = []
    train(asked, data, reports.append, scores=[0.45])
    assert (own / "spq_16bits_best.keras").read_bytes() == before
    assert any("mAP@50 0.4500, best 0.5000 (epoch 2)" in line for line in reports)
    assert sorted(file.stem for file in own.glob("*.keras")) == [f"spq_16bits_{n}" for n in (4, 5, 6, "best")]
    check_equal(own / "spq_16bits_6.keras", folder / "spq_16bits_6.keras", almost)


@pytest.mark.skipif(not HAS_TENSORBOARD, reason="tensorboard is not installed")
def test_tensorboard_shows_its_course(legacy):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (events,) = (legacy[0] / "tensorboard" / "spq_16bits").iterdir()
    events = EventAccumulator(str(events), size_guidance={"images": 0, "scalars": 0}).Reload()
    for name in ("loss", "lr", "images_per_second"):
        assert [point.step for point in events.Scalars(name)] == list(range(1, 61))
    assert [point.step for point in events.Scalars("mAP")] == [20, 40, 60]
    assert [point.value for point in events.Scalars("mAP")] == pytest.approx([0.5, 0.4, 0.5])
    assert [point.step for point in events.Scalars("mAP_of_subset")] == [10, 20, 30, 40, 50, 60]
    assert len(events.Images("ranked_list")) == 6
    assert sum(name.startswith("codebook_used/book_") for name in events.Tags()["scalars"]) == 4


# --- precisions, mistakes


@pytest.mark.parametrize("precision", [pytest.param("mixed_bfloat16", marks=pytest.mark.slow), "mixed_float16"])
def test_mixed_precision_trains_float32_weights(tmp_path, data, precision):
    model, path = train(settings(tmp_path, total_epochs=1, eval_epoch=None, precision=precision), data)
    assert {keras.backend.standardize_dtype(weight.dtype) for weight in model.weights} == {"float32"}
    assert model.backbone.compute_dtype == precision.removeprefix("mixed_")
    losses = [line["loss"] for line in lines_of(tmp_path, "step")]
    assert all(math.isfinite(loss) for loss in losses)
    start = RetrievalModel(**model.architecture)
    for weight, old in zip(model.trainable_variables, start.trainable_variables, strict=True):
        apart = np.abs(keras.ops.convert_to_numpy(weight) - keras.ops.convert_to_numpy(old)).max()
        assert 0 < apart < 10 * 2 * 3e-4, weight.path
    assert load_model(path, precision=precision).embed(data.query_images).dtype == np.float32


def test_a_batch_larger_than_the_data_is_refused(tmp_path, data):
    with pytest.raises(ValueError) as caught:
        trainer.train(settings(tmp_path, batch_size=481), data)
    assert (
        str(caught.value) == "Invalid batch_size. Expected at most 480, the number of images. Received: batch_size=481"
    )
    assert not list(tmp_path.iterdir())


def test_the_number_of_classes_is_the_datas_unless_it_was_given(tmp_path, data):
    assert trainer.settings_of_data(settings(tmp_path), data).n_CLASSES == len(CLASS_NAMES)
    with pytest.raises(ValueError, match=r"^Invalid n_CLASSES. Expected the data's, 10. Received: n_CLASSES=7$"):
        trainer._check(settings(tmp_path, n_CLASSES=7), data)


def test_a_backbone_of_the_other_head_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"Expected none with head=spq: --init takes models. Received: .*no such file"):
        starting.initial_model(settings(tmp_path, ImageNet_pretrained_path=tmp_path / "some.mat"))
