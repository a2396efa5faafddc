"""Training of CGD: it learns classes it never saw, repeats and resumes in the same bits, keeps the best by Recall@1."""

import functools
import json
import math

import keras
import numpy as np
import pytest
from PIL import Image

from gpq_tf import data as data_module
from gpq_tf import demo, heads, load_model, model_file, recall, starting, trainer, visualize
from gpq_tf import settings as settings_module
from gpq_tf.backbones import resnet_v1
from gpq_tf.data import lazy, metric_learning
from gpq_tf.heads import cgd
from gpq_tf.metrics import recall_at_k

from gradients import losses_of_batch

NO_FILE = "no_such_config.py"
# Folders of classes: so many of them, and images of each.
TRAIN, TEST = (10, 12), (8, 10)


@pytest.fixture(scope="module", autouse=True)
def shallow():
    """One block a stage, and one shape for all that is described: most of a test's time is tracing."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(resnet_v1, "bottlenecks", functools.partial(resnet_v1.bottlenecks, blocks=(1, 1, 1, 1)))
        patch.setattr(recall, "BATCH_SIZE", 16)
        yield


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Images whose class is a tint: noise, and a brightness that says nothing, hide it from an untrained network."""
    root, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for part, (n_class, n_image) in {"train": TRAIN, "test": TEST}.items():
        for label in range(n_class):
            folder = root / part / f"{part}{label}"
            folder.mkdir(parents=True)
            tint = rng.normal(0, 20, 3)
            for i in range(n_image):
                pixels = 128 + tint + rng.uniform(-70, 70) + rng.normal(0, 30, (36, 40, 3))
                Image.fromarray(np.clip(pixels, 0, 255).astype("uint8")).save(folder / f"{i:02d}.png")
    return root


def settings(folder, folders, **changes):
    given = {
        "head": "cgd",
        "dataset": "image_folders",
        "data_dir": folders,
        "model_save_path": folder,
        "image_size": 32,
        "width_multiplier": 1 / 16,
        "n_dim": 12,
        "batch_size": 24,  # of 120 images: 5 steps an epoch
        "init": None,
        "learning_rate": 5e-3,
        **changes,
    }
    return settings_module.resolve([f"--{name}={value}" for name, value in given.items()], NO_FILE)


@pytest.fixture(scope="module")
def data(folders):
    return data_module.load_for(settings("models", folders), cgd.PROTOCOL)


def lines_of(folder, event):
    lines = (json.loads(line) for line in (folder / "cgd_12d.log.jsonl").read_text().splitlines())
    return [line for line in lines if line["event"] == event]


def weights(path):
    return {weight.path: keras.ops.convert_to_numpy(weight) for weight in load_model(path).weights}


def check_equal(first, second):
    """Weights and training state of two saved models are equal in every bit."""
    states = (model_file.training_state(model_file.read(path)) for path in (first, second))
    for ours, theirs in ((weights(first), weights(second)), states):
        assert set(ours) == set(theirs)
        for name in ours:
            np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)


def recalls(model, data):
    """Recall of the definition: the nearest other image by distances in float64, one after the other."""
    x = np.concatenate([model.embed(data.test.pixels[i : i + 1]) for i in range(len(data.test))]).astype("float64")
    distances = np.square(x[:, None] - x).sum(axis=-1)
    np.fill_diagonal(distances, np.inf)
    right = data.test.labels[np.argsort(distances, axis=1, kind="stable")] == data.test.labels[:, None]
    return {f"R@{k}": right[:, :k].any(axis=1).mean() for k in (1, 2, 4, 8)}


# --- a run by default


@pytest.fixture(scope="module")
def run(tmp_path_factory, folders, data):
    """(folder, model, reports, settings) of a run of eight epochs."""
    folder, reports = tmp_path_factory.mktemp("run"), []
    chosen = settings(folder, folders, total_epochs=8, save_term=2, keep=None)
    model, _ = trainer.train(chosen, data, reports.append)
    return folder, model, reports, chosen


def test_it_learns_to_tell_classes_apart_that_it_never_saw(run, data):
    folder, _, _, chosen = run
    untrained = recalls(starting.initial_model(trainer.settings_of_data(chosen, data))[0], data)["R@1"]
    losses = [line["loss"] for line in lines_of(folder, "step")]
    assert np.mean(losses[-10:]) < np.mean(losses[:5]) - 0.5
    # The best of eight: the last wanders by a tenth with the rounding, which the number of threads decides.
    assert recalls(load_model(folder / "cgd_12d_best.keras"), data)["R@1"] > untrained + 0.2


def test_it_writes_and_says_what_it_promises(run, data):
    folder, model, reports, _ = run
    stems = ["cgd_12d_best", *(f"cgd_12d_{epoch}" for epoch in (2, 4, 6, 8))]
    expected = sorted(["cgd_12d.log.jsonl", *(f"{stem}.{end}" for stem in stems for end in ("keras", "json"))])
    assert sorted(file.name for file in folder.iterdir()) == expected
    assert reports[0] == "starting from scratch (seed 0)"
    steps = lines_of(folder, "step")
    assert [line["step"] for line in steps] == list(range(1, 41))
    assert set(steps[0]) == {
        "event", "step", "epoch", "loss", "rank", "aux", "active", "lr", "images_per_second"
    }  # fmt: skip
    evaluations = lines_of(folder, "evaluation")
    assert [(line["epoch"], line["step"]) for line in evaluations] == [(i, 5 * i) for i in range(1, 9)]
    best = max(evaluations, key=lambda line: line["R@1"])
    told = [line for line in reports if ", best " in line]
    so_far = {"R@1": -1.0}
    for line, entry in zip(told, evaluations, strict=True):
        so_far = max(so_far, entry, key=lambda found: found["R@1"])
        loss = steps[entry["step"] - 1]["loss"]
        assert line == (
            f"epoch {entry['epoch']}: loss {loss:.4f}, R@1 {entry['R@1']:.4f}, "
            f"best {so_far['R@1']:.4f} (epoch {so_far['epoch']})"
        )
    record = load_model(folder / "cgd_12d_best.keras").record
    assert (record["epoch"], record["R@1"]) == (best["epoch"], best["R@1"])
    assert json.loads((folder / "cgd_12d_best.json").read_text())["R@1"] == best["R@1"]
    saved = [line for line in reports if ", saved " in line]
    assert len(saved) == 4 and saved[-1].endswith(f"saved {folder / 'cgd_12d_8.keras'}")
    assert model.architecture["n_classes"] == 10


def test_recall_is_that_of_the_definition_each_epoch(run, data):
    folder, model, _, _ = run
    for epoch, line in zip((2, 4, 6, 8), lines_of(folder, "evaluation")[1::2], strict=True):
        saved = load_model(folder / f"cgd_12d_{epoch}.keras")
        expected = recalls(saved, data)
        assert {name: line[name] for name in expected} == pytest.approx(expected, abs=1e-9)
    fifth = np.flatnonzero(data.test.labels % 5 == 0)
    assert 1 < len(set(data.test.labels[fifth])) < len(data.test.class_names)
    subset = recall.evaluate(model, data.test, index=fifth)
    assert subset["scores"]["R@1"] == lines_of(folder, "save")[-1]["R@1_of_subset"]
    of_every_fifth = model.embed(data.test.pixels[fifth])
    np.testing.assert_allclose(subset["embeddings"], of_every_fifth, rtol=0, atol=1e-5)
    assert subset["scores"]["R@1"] == recall_at_k(of_every_fifth, data.test.labels[fifth])[1]


def test_again_and_resumed_it_ends_in_the_same_bits(run, folders, tmp_path):
    """From files instead of memory, which changes no pixel."""
    folder, _, _, chosen = run
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lazy, "LARGEST_IN_MEMORY", 1000)
        unread = data_module.load_for(chosen, cgd.PROTOCOL)
    assert unread.train.pixels is None and unread.test.pixels is None
    asked = settings_module.resolve([f"--resume={folder}/cgd_12d_4.keras", f"--model_save_path={tmp_path}"], NO_FILE)
    reports = []
    _, path = trainer.train(asked, unread, reports.append)
    assert reports[0] == f"resuming {folder}/cgd_12d_4.keras after step 20"
    assert path == tmp_path / "cgd_12d_8.keras"
    check_equal(path, folder / "cgd_12d_8.keras")
    assert lines_of(tmp_path, "evaluation") == [
        {**line, "best": new["best"], "path": new["path"]}
        for line, new in zip(lines_of(folder, "evaluation")[4:], lines_of(tmp_path, "evaluation"), strict=True)
    ]


def test_other_images_are_no_resumption(run, folders, tmp_path, data):
    folder, _, _, chosen = run
    other = metric_learning.UnseenClasses(data.test, data.test, "elsewhere")
    asked = chosen.completed({"resume": str(folder / "cgd_12d_4.keras"), "total_epochs": 9}, frozenset())
    with pytest.raises(ValueError, match=r"^Invalid (n_CLASSES|data)\. Expected"):
        trainer.train(asked, other)


# --- what a step draws and computes


def test_a_batch_is_a_function_of_seed_and_step(folders, data):
    chosen = settings("models", folders, seed=3, images_per_class=6)
    first, again, next_one = (cgd.draw_batch(data, chosen, step) for step in (7, 7, 8))
    assert set(first) == {"images", "labels", "flips", "offsets"}
    for name in first:
        np.testing.assert_array_equal(first[name], again[name])
        assert (first[name] != next_one[name]).any()
    assert first["images"].shape == (24, 36, 36, 3) and first["images"].dtype == np.uint8
    assert sorted(np.bincount(first["labels"], minlength=10).tolist()) == [0] * 6 + [6] * 4
    assert first["offsets"].min() >= 0 and first["offsets"].max() == 4


@pytest.mark.parametrize(("auxiliary", "squared"), [(True, False), (False, True)])
def test_the_losses_are_those_of_the_head(folders, data, auxiliary, squared):
    given = {"auxiliary": auxiliary, "squared": squared, "margin": 0.3, "smoothing": 0.2, "temperature": 0.7}
    chosen = settings("models", folders, n_CLASSES=10, **given)
    model = starting.initial_model(chosen)[0]
    assert model.architecture["n_classes"] == (10 if auxiliary else 0)
    batch = cgd.draw_batch(data, chosen, 0)
    windows = np.stack(
        [
            image[row : row + 32, column : column + 32][:, :: -1 if flip else 1]
            for image, flip, (row, column) in zip(batch["images"], batch["flips"], batch["offsets"], strict=True)
        ]
    )
    found = losses_of_batch(cgd, model, batch, chosen)
    features = model.backbone(cgd.preprocess(windows), training=True)
    logits = model.head.first_descriptor_logits(features) if auxiliary else None
    expected = model.head.losses_of(model.head(features), batch["labels"], logits, 0.3, 0.7, 0.2, squared)
    assert {name: float(value) for name, value in found.items()} == pytest.approx(
        {name: float(value) for name, value in expected.items()}, rel=1e-5
    )
    assert (float(found["aux"]) > 0) == auxiliary


def test_the_rate_falls_when_the_authors_let_it_fall(folders):
    """1,500 steps, a tenth after 400 and after 800, counted from 0; from scratch later."""

    def rates(steps, **changes):
        rate = cgd.learning_rate(settings("models", folders, total_epochs=30, **changes), 50)
        return [float(rate(step)) for step in steps]

    falling = np.array([1, 1, 0.1, 0.1, 0.01, 0.01])
    of_weights, of_scratch = (0, 399, 400, 799, 800, 1499), (0, 899, 900, 1199, 1200, 1499)
    np.testing.assert_allclose(rates(of_weights, init="some.h5", learning_rate=None), 1e-4 * falling, rtol=1e-6)
    np.testing.assert_allclose(rates(of_scratch, learning_rate=None), 3e-3 * falling, rtol=1e-6)
    np.testing.assert_allclose(rates(of_scratch, learning_rate=0.5), 0.5 * falling, rtol=1e-6)


# --- settings


def test_defaults_are_the_papers():
    chosen = settings_module.resolve(["--head=cgd"], NO_FILE)
    expected = {"dataset": "cub200", "data_dir": "./data/CUB_200_2011", "image_size": 224, "batch_size": 128}
    expected |= {"margin": 0.1, "temperature": 0.5, "smoothing": 0.1, "gem_p": 3.0, "learn_p": False, "n_dim": 1536}
    expected |= {"eval_epoch": 1, "init": "imagenet", "auxiliary": True, "boxes": True, "learning_rate": None}
    assert {name: getattr(chosen, name) for name in expected} == expected
    assert cgd.file_stem(chosen) == "cgd_1536d"
    assert cgd.file_stem(chosen.completed({"n_dim": 0, "descriptors": "MG", "width_multiplier": 0.25})) == "cgd_1024d"


def test_a_model_fixes_its_settings(folders):
    given = {"descriptors": "GM", "combination": "sum", "learn_p": True, "gem_p": 2.5, "n_CLASSES": 7, "seed": 3}
    for auxiliary, n_book in ((True, 0), (False, 3)):
        chosen = settings("models", folders, **given, auxiliary=auxiliary, n_book=n_book)
        architecture = heads.complete("cgd", {k: v for k, v in heads.architecture_of(chosen).items() if k != "head"})
        fixed = heads.fixed_by(architecture)
        names = {"head", "descriptors", "n_dim", "combination", "learn_p", "gem_p", "width_multiplier", "auxiliary"}
        names |= {"backbone", "n_book"} | ({"n_CLASSES"} if auxiliary else set()) | ({"bn_word"} if n_book else set())
        assert fixed == {name: getattr(chosen, name) for name in names}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"descriptors": "SS"},
            "Invalid descriptors (the command line). Expected distinct letters of S (SPoC), M (MAC)",
        ),
        ({"combination": "mean"}, "Invalid combination (the command line). Expected one of concat, sum. Received"),
        ({"n_dim": 13}, "Invalid n_dim. Expected a multiple of 3, the number of descriptors. Received: n_dim=13"),
        (
            {"batch_size": 26},
            "Invalid batch_size. Expected a multiple of 4, the images of a class, of 2 to 10 classes. "
            "Received: batch_size=26",
        ),
        ({"batch_size": 44}, "of 2 to 10 classes. Received: batch_size=44"),
        ({"batch_size": 4}, "of 2 to 10 classes. Received: batch_size=4"),
        ({"n_CLASSES": 7}, "Invalid n_CLASSES. Expected the data's, 10. Received: n_CLASSES=7"),
        ({"image_size": 33}, "Invalid image_size. Expected the data's, (32, 32, 3). Received: (33, 33, 3)"),
    ],
)
def test_mistakes_are_named(tmp_path, folders, data, changes, message):
    with pytest.raises(ValueError) as caught:
        trainer.train(settings(tmp_path, folders, **changes), data)
    assert message in str(caught.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("head", "dataset", "expected"),
    [("cgd", "cifar10", "image_lists, cub200, image_folders"), ("gpq", "cub200", "cifar10, cifar10_folder")],
)
def test_a_set_made_for_another_head_is_refused(folders, head, dataset, expected):
    chosen = settings("models", folders, head=head, dataset=dataset)
    with pytest.raises(ValueError) as caught:
        data_module.load_for(chosen, heads.recipe(head).PROTOCOL)
    assert str(caught.value).startswith(f"Invalid dataset. Expected one of {expected}")
    assert str(caught.value).endswith(f"with head={head}. Received: dataset={dataset}")


@pytest.mark.parametrize("precision", [pytest.param("mixed_bfloat16", marks=pytest.mark.slow), "mixed_float16"])
def test_mixed_precision_trains_float32_weights(tmp_path, folders, data, precision):
    chosen = settings(tmp_path, folders, total_epochs=1, precision=precision, learn_p=True, combination="sum")
    model, _ = trainer.train(chosen, data)
    assert {keras.backend.standardize_dtype(weight.dtype) for weight in model.weights} == {"float32"}
    assert model.backbone.compute_dtype == precision.removeprefix("mixed_")
    assert all(math.isfinite(line["loss"]) for line in lines_of(tmp_path, "step"))
    assert float(model.head.gem_p) != 3
    assert not any(np.isnan(keras.ops.convert_to_numpy(weight)).any() for weight in model.weights)


# --- evaluate and Demo.py


def demo_settings(run, folders, *more):
    model = run[0] / "cgd_12d_8.keras"
    given = [f"--model_load_path={model}", "--dataset=image_folders", f"--data_dir={folders}", *more]
    return settings_module.resolve(given, NO_FILE)


def test_descriptors_are_trained_with_their_codes(tmp_path, folders, data):
    """--n_book: a codebook learned in the same steps, whose codes are measured, saved and searched."""
    chosen = settings(tmp_path, folders, n_book=3, bn_word=2, total_epochs=2)
    model, path = trainer.train(chosen, data)
    assert path == tmp_path / "cgd_12d_6bits_2.keras" and model.codebook.shape == (3, 4, 4)
    start = starting.initial_model(trainer.settings_of_data(chosen, data))[0]
    assert np.any(model.codebook != start.codebook)
    codes = model.encode(data.test.pixels)
    words = np.stack([model.codebook[range(3), row].reshape(-1) for row in codes]).astype("float64")
    distances = np.square(model.embed(data.test.pixels)[:, None].astype("float64") - words).sum(axis=-1)
    np.fill_diagonal(distances, np.inf)
    right = data.test.labels[np.argsort(distances, axis=1, kind="stable")] == data.test.labels[:, None]
    scores = recall.evaluate(model, data.test)["scores"]
    for k in (1, 2, 4, 8):
        # Codes that are alike are equally far but for rounding, and either may come first.
        assert scores[f"R@{k}_of_codes"] == pytest.approx(right[:, :k].any(axis=1).mean(), abs=0.05)
    lines = [json.loads(line) for line in (tmp_path / "cgd_12d_6bits.log.jsonl").read_text().splitlines()]
    measured = [line for line in lines if line["event"] == "evaluation"]
    assert [line["epoch"] for line in measured] == [1, 2] and measured[1]["R@1_of_codes"] == scores["R@1_of_codes"]
    printed = []
    given = settings_module.resolve(
        [f"--model_load_path={path}", "--dataset=image_folders", f"--data_dir={folders}"], NO_FILE
    )
    demo.run(given, printed.append, pictures=False)
    at = printed.index("codes, 2 bytes each, searched by float32 descriptors:")
    assert printed[at + 1] == f"R@   1: {scores['R@1_of_codes']:.4f}"


def test_evaluate_prints_the_recall_of_the_training(run, folders, data):
    reports = []
    found = demo.run(demo_settings(run, folders), reports.append, pictures=False)
    last = lines_of(run[0], "evaluation")[-1]
    assert found == last["R@1"]
    assert reports[-4:] == [f"R@{k:4d}: {last[f'R@{k}']:.4f}" for k in (1, 2, 4, 8)]
    assert reports[-5] == f"80 images of 8 unseen classes, from {folders}"


def test_the_demo_draws_the_nearest_others(run, folders, data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    drawn = []
    monkeypatch.setattr(visualize, "ranked_list", lambda path, **what: drawn.append((path, what)))
    demo.run(demo_settings(run, folders, "--query=7", "--n_pictures=2"))
    (path, what), _ = drawn
    assert path == "retrieval_result_7.png"
    x = run[1].embed(data.test.pixels).astype("float64")
    distances = np.square(x - x[7]).sum(axis=1)
    distances[7] = np.inf
    nearest = np.argsort(distances, kind="stable")[:10]
    np.testing.assert_array_equal(what["result_images"], data.test.pixels[nearest])
    assert what["result_classes"] == data.test.labels[nearest].tolist()
    assert what["relevant"] == (data.test.labels[nearest] == 0).tolist()
    np.testing.assert_array_equal(what["query_image"], data.test.pixels[7])
    saved = json.loads((tmp_path / "retrieval_result.json").read_text())
    assert saved["R@1"] == lines_of(run[0], "evaluation")[-1]["R@1"]
    assert saved["queries_shown"][0] == 7


def test_the_demo_answers_a_photo(run, folders, data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    reports = []
    photo = data.test.listed.files[13]
    assert demo.run(demo_settings(run, folders, f"--query_image={photo}"), reports.append) is None
    answers = [line for line in reports if ". squared distance " in line]
    assert len(answers) == 10 and answers[0].startswith(" 1. squared distance ")
    assert (tmp_path / "retrieval_result_03.png").exists()
    saved = json.loads((tmp_path / "retrieval_result.json").read_text())["answers"]
    values = [answer["squared distance"] for answer in saved]
    assert values == sorted(values)
    # Read as the gallery is, an image of it finds itself.
    assert saved[0]["index"] == 13 and values[0] < 1e-10 < values[1]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("--query=80", "Invalid query. Expected 0 to 79, there are 80 queries. Received: query=80"),
        ("--n_dim=24", "Invalid n_dim. Expected 12, which the model"),
        ("--descriptors=MG", "Invalid descriptors. Expected SMG, which the model"),
    ],
)
def test_mistakes_of_the_demo_are_named(run, folders, more, message):
    with pytest.raises(ValueError) as caught:
        demo.run(demo_settings(run, folders, more))
    assert message in str(caught.value)


def test_the_shipped_model_never_replaces_one_that_was_asked_for(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"'mine\.keras', which does not exist"):
        demo.run(settings_module.resolve(["--head=cgd", "--model_load_path=mine.keras"], NO_FILE))
