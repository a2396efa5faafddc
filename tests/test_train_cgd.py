"""Training of CGD: it learns classes it never saw, repeats and resumes in the same bits, keeps the best by Recall@1."""

import functools
import json
import math

import keras
import numpy as np
import pytest
from PIL import Image

from gpq_tf import heads, load_model, model_file, recall, trainer
from gpq_tf import data as data_module
from gpq_tf import settings as settings_module
from gpq_tf.backbones import resnet_v1
from gpq_tf.data import metric_learning
from gpq_tf.heads import cgd
from gpq_tf.metrics import recall_at_k

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
            tint = rng.normal(0, 15, 3)
            for i in range(n_image):
                pixels = 128 + tint + rng.uniform(-70, 70) + rng.normal(0, 30, (20, 24, 3))
                Image.fromarray(np.clip(pixels, 0, 255).astype("uint8")).save(folder / f"{i:02d}.png")
    return root


def settings(folder, folders, **changes):
    given = {
        "head": "cgd",
        "dataset": "image_folders",
        "data_dir": folders,
        "model_save_path": folder,
        "image_size": 16,
        "width_multiplier": 1 / 16,
        "n_dim": 12,
        "batch_size": 24,  # of 120 images: 5 steps an epoch
        "init": None,
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
    folder, model, _, chosen = run
    untrained = recalls(trainer.initial_model(trainer.settings_of_data(chosen, data))[0], data)["R@1"]
    losses = [line["loss"] for line in lines_of(folder, "step")]
    print(untrained, [e["R@1"] for e in lines_of(folder,"evaluation")], losses[::5])
    assert np.mean(losses[-10:]) < np.mean(losses[:5]) - 0.5
    assert recalls(model, data)["R@1"] > untrained + 0.2
