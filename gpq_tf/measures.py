"""What a training run is judged by: the mAP of codes, or Recall@1 of descriptors among unseen classes."""

import types
import typing

import numpy as np

from gpq_tf import metrics, recall, retrieval
from gpq_tf.data import lazy

# The fixed part of a split image set on which training is watched: every 5th query, every 10th image of the gallery;
# of unseen classes every 5th class, all of its images, for a search needs others of its class.
SUBSET_QUERIES, SUBSET_GALLERY, SUBSET_CLASSES = 5, 10, 5
# The query whose answers TensorBoard shows at every save.
_QUERY_SHOWN = 0


class Watched(typing.NamedTuple):
    """A look at a model in training.

    Attributes:
        score: float, of the subset.
        usage: dict, what `metrics.codebook_usage` found; empty without a codebook.
        answers: callable() -> dict, the arguments of `visualize.ranked_list` behind the path.
    """

    score: float
    usage: dict
    answers: typing.Callable


class Measure(typing.NamedTuple):
    """How models of a kind of data set are judged.

    Attributes:
        score: str, name of the figure that the best model has the highest of.
        name: callable(settings) -> str, what to call it in a message.
        evaluate: callable(model, data, settings) -> dict of name -> float, measured on all queries.
        watch: callable(model, data, settings) -> Watched.
    """

    score: str
    name: typing.Callable
    evaluate: typing.Callable
    watch: typing.Callable


def subset(data):
    """The fixed part of a split image set on which training is watched: its query and gallery images and labels."""
    return types.SimpleNamespace(
        query_images=lazy.take(data.query_images, slice(None, None, SUBSET_QUERIES)),
        query_labels=data.query_labels[::SUBSET_QUERIES],
        gallery_images=lazy.take(data.gallery_images, slice(None, None, SUBSET_GALLERY)),
        gallery_labels=data.gallery_labels[::SUBSET_GALLERY],
    )


def _evaluate_codes(model, data, settings):
    return {"mAP": retrieval.evaluate(model, data, settings.n_DB)["mAP"]}


def _watch_codes(model, data, settings):
    watched = subset(data)
    found = retrieval.evaluate(model, watched, settings.n_DB)

    def answers():
        return {**retrieval.answers(_QUERY_SHOWN, found, watched), "class_names": data.class_names}

    return Watched(found["mAP"], metrics.codebook_usage(found["index"].codes, found["index"].K), answers)


def _evaluate_recall(model, data, settings):
    return recall.evaluate(model, data.test)["scores"]


def _watch_recall(model, data, settings):
    labels = data.test.labels
    # Fewer than two classes have nothing to confuse.
    is_part = labels % SUBSET_CLASSES == 0 if labels.max() >= SUBSET_CLASSES else labels >= 0
    found = recall.evaluate(model, data.test, index=np.flatnonzero(is_part))
    return Watched(found["scores"]["R@1"], {}, lambda: recall.answers(_QUERY_SHOWN, found, data.test))


_CODES = Measure("mAP", lambda settings: f"mAP@{settings.n_DB}", _evaluate_codes, _watch_codes)
_RECALL = Measure("R@1", lambda settings: "R@1", _evaluate_recall, _watch_recall)
# By how the image set is split (`data.load_for`).
MEASURES = {"gpq": _CODES, "train_test": _CODES, "unseen_classes": _RECALL}
