"""The demo: encode a gallery, print the mAP (of CGD Recall@k), save ranked-list pictures."""

import errno
import os
from pathlib import Path

import numpy as np

from gpq_tf import convert, heads, recall, retrieval, visualize
from gpq_tf import data as data_module
from gpq_tf import settings as settings_module
from gpq_tf.data import images, metric_learning
from gpq_tf.data.similarity import read_similarity
from gpq_tf.index import PQIndex

# What is evaluated where model_load_path names nothing, by head.
SHIPPED_MODELS = {
    "gpq": "gpq-cifar10-48bits",
    "spq": "spq-cifar10-32bits",
    "cgd": "cgd-tinyimagenet-32bytes",
}
# How a photo of the user is brought to the size of the gallery's images, by protocol: smoothly, but where those were
# resized as well, as they were.
_RESIZES = {"gpq": "fast", "train_test": "fast", "unseen_classes": "opencv"}
# What answers are ranked by, and how it is printed: descriptors may be nearly alike.
_FIGURES = {"distance": ".4f", "squared distance": ".4g"}
RESULT = "retrieval_result"
# Images shown for a photo of the user.
N_ANSWERS = 10


def run(settings, report=None, progress=None, pictures=True):
    """Evaluate a model on a split image set, or show what it finds for one image file.

    Args:
        settings: gpq_tf.settings.Settings; model_load_path names the model, data_dir and dataset the images.
        report: callable(str), told what a user should know, or None.
        progress: callable(iterable of batches, what) -> iterable, or None.
        pictures: bool, whether to save retrieval_result_<query>.png and retrieval_result.json in the current folder.
            Only with them query_image is looked at: then its answers are told and drawn, and nothing is evaluated.

    Returns:
        float, the mean average precision, or Recall@1 of a CGD model; None with query_image.

    Raises:
        ValueError: if model, data or settings are wrong or do not fit each other.
        OSError: if a file cannot be read or written.
    """
    report = report or (lambda line: None)
    if pictures and not os.access(".", os.W_OK):  # better now than after all has been encoded
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(Path(f"{RESULT}.json").absolute()))
    model, name, notes = open_model(settings)
    # What is printed and saved is what is in force: where nothing else was given, the model's own sizes.
    fixed = heads.fixed_by(model.architecture)
    own = {**fixed, "legacy": model.architecture["legacy"], **_size_of_training(model, name)}
    settings = settings.completed({key: value for key, value in own.items() if key not in settings.given})
    report(settings_module.describe(settings))
    settings_module.check_fixed(settings, fixed, name)
    for note in notes:
        report(note)
    protocol = heads.recipe(settings.head).PROTOCOL
    photo = None
    if pictures and settings.query_image:
        photo = read_photo(settings.query_image, settings.image_size, _RESIZES[protocol])
    if protocol == "unseen_classes":
        return _run_recall(settings, model, name, photo, report, progress, pictures)
    data = data_module.load_for(settings, protocol)
    report(data.source)
    if photo is not None:
        _answer_photo(settings, model, name, data, photo, report, progress)
        return None
    shown = _queries_to_show(settings, len(data.query_labels)) if pictures else []
    similarity = _similarity(settings, data)
    report(
        f"gallery {len(data.gallery_labels)}, queries {len(data.query_labels)}, {settings.n_bits} bits a code "
        f"({settings.n_book} books of {settings.intn_word} codewords)"
        f"{f', mAP@{settings.n_DB}' if settings.n_DB < len(data.gallery_labels) else ''}"
    )
    found = retrieval.evaluate(model, data, settings.n_DB, similarity, progress)
    for phase, seconds in found["seconds"].items():
        report(f"{phase}: {seconds:.1f} s")
    report(f"mAP: {found['mAP']:.4f}")
    for query in shown:
        path = f"{RESULT}_{query}.png"
        shown_list = retrieval.answers(query, found, data, similarity)
        visualize.ranked_list(path, **shown_list, class_names=data.class_names)
        report(f"saved {path}")
    if pictures:
        settings_module.save(
            settings,
            f"{RESULT}.json",
            mAP=found["mAP"],
            model=name,
            source=data.source,
            seconds=found["seconds"],
            queries_shown=shown,
        )
    return found["mAP"]


def _size_of_training(model, name):
    """{"image_size": n} where the model's record tells on which size it was trained, else {}."""
    before = model.record.get("settings")
    if not isinstance(before, dict) or "image_size" not in before:
        return {}
    return {"image_size": settings_module.parse("image_size", before["image_size"], name)}


def read_photo(path, size, resize="fast"):
    """An image file of any format that Pillow reads, turned as EXIF asks.

    Args:
        path: str or Path.
        size: int, pixels.
        resize: str, see `images.image_batches`.

    Returns:
        (shown, taken): uint8 (H, W, 3) as a viewer shows it, and (size, size, 3) as the network takes it.

    Raises:
        OSError: if it cannot be opened.
        ValueError: if it is no image.
    """
    shown = images.decode(Path(path).read_bytes(), str(path), upright=True)
    return shown, images.read_image(path, None, size, size, resize, upright=True)


def _answer_photo(settings, model, name, data, photo, report, progress):
    """Tell, draw and save what a model finds for one image, among all images whatever they are in the protocol."""
    index = PQIndex(model.codebook, model.search_metric)
    parts = [part for part in data.parts() if len(part[0])]
    for pixels, _, positions in parts:
        index.add(model.encode(pixels, progress and (lambda b: progress(b, "images"))), ids=positions)
    distances, ids = index.search(model.embed(photo[1][None]), N_ANSWERS)
    best = ids[0][ids[0] >= 0]
    # Of each answer its image and label, from the part that has it.
    answers = [
        (pixels[at], labels[at])
        for each in best
        for pixels, labels, positions in parts
        for at in np.flatnonzero(positions == each)
    ]
    found = {"result_images": [pixels for pixels, _ in answers], "result_classes": [int(label) for _, label in answers]}
    found |= {"class_names": data.class_names}
    _tell_answers(settings, name, data.source, photo[0], "distance", distances[0], best, data.files, found, report)


def _tell_answers(settings, name, source, shown, figure, values, best, files, found, report):
    """Tell, draw and save the answers to an image file.

    `figure` names what they were ranked by, `files` holds the paths behind the positions `best`, or is None.
    """
    labels, class_names = found["result_classes"], found["class_names"]
    answers = [
        {"rank": rank, figure: float(value), "class": class_names[label], "index": int(position)}
        for rank, (value, label, position) in enumerate(zip(values, labels, best, strict=False), start=1)
    ]
    for answer in answers:
        where = f"image {answer['index']}"
        if files and isinstance(files[answer["index"]], str | Path):  # and no part of a larger file
            where = answer["file"] = str(files[answer["index"]])
        value = f"{figure} {answer[figure]:{_FIGURES[figure]}}"
        report(f"{answer['rank']:2d}. {value}, class {answer['class']}, {where}")
    path = f"{RESULT}_{Path(settings.query_image).stem}.png"
    visualize.ranked_list(path, shown, Path(settings.query_image).name, **found, relevant=None)
    report(f"saved {path}")
    settings_module.save(settings, f"{RESULT}.json", model=name, source=source, answers=answers)


def _run_recall(settings, model, name, photo, report, progress, pictures):
    """`run` of a model whose descriptors are compared as they are, among images of unseen classes."""
    gallery, source = metric_learning.load_test_for(settings)
    report(source)
    if photo is not None:
        shown, taken = photo
        if not gallery.upright:  # a photo that is in the gallery would not find itself
            size, resize = settings.image_size, _RESIZES["unseen_classes"]
            taken = images.read_image(settings.query_image, None, size, size, resize)
        embeddings = recall.embed(model, gallery, np.arange(len(gallery)), progress)
        best, distances = (found[:N_ANSWERS] for found in recall.nearest(embeddings, model.embed(taken[None])[0]))
        found = {"result_images": gallery.read(best), "result_classes": gallery.labels[best].tolist()}
        found |= {"class_names": gallery.class_names}
        files = gallery.listed.files
        _tell_answers(settings, name, source, shown, "squared distance", distances, best, files, found, report)
        return None
    shown = _queries_to_show(settings, len(gallery)) if pictures else []
    found = recall.evaluate(model, gallery, progress=progress)
    for k in recall.KS:
        report(recall.line(k, found["scores"][f"R@{k}"]))
    if model.architecture["n_book"]:
        report(recall.headline_of_codes(model))
        for k in recall.KS:
            report(recall.line(k, found["scores"][f"R@{k}_of_codes"]))
    for query in shown:
        path = f"{RESULT}_{query}.png"
        visualize.ranked_list(path, **recall.answers(query, found, gallery))
        report(f"saved {path}")
    if pictures:
        about = {"model": name, "source": source, "queries_shown": shown}
        settings_module.save(settings, f"{RESULT}.json", **found["scores"], **about)
    return found["scores"]["R@1"]


def open_model(settings):
    """The model that model_load_path means: a .keras file, a shipped name, or weights of the original.

    Args:
        settings: gpq_tf.settings.Settings.

    Returns:
        (model, name, notes): RetrievalModel, str, list of str for the user.

    Raises:
        ValueError: if there is no such model, or it is damaged.
    """
    source, notes = settings.model_load_path, []
    foreign = convert.is_source(source)
    legacy = settings.legacy if "legacy" in settings.given else None
    if not foreign and not Path(source).exists() and "model_load_path" not in settings.given:
        source = SHIPPED_MODELS.get(settings.head, source)
    if source != settings.model_load_path:
        notes.append(f"model: the shipped {source}, since {settings.model_load_path} does not exist")
    else:
        notes.append(f"model: {source}")
    n_book = settings.n_book if "n_book" in settings.given else None
    model, lines = convert.load(source, n_book, legacy, heads.architecture_of(settings), settings.precision)
    if foreign:
        notes += [f"converted: {lines[0]}", *(line for line in lines if line.startswith("initialised"))]
    return model, str(source), notes


def _queries_to_show(settings, n_queries):
    if settings.n_pictures > n_queries:
        raise ValueError(
            f"Invalid n_pictures. Expected at most {n_queries}, the number of queries. "
            f"Received: n_pictures={settings.n_pictures}"
        )
    drawn = np.random.default_rng(settings.seed).permutation(n_queries).tolist()
    if settings.query is not None:
        if settings.query >= n_queries:
            raise ValueError(
                f"Invalid query. Expected 0 to {n_queries - 1}, there are {n_queries} queries. "
                f"Received: query={settings.query}"
            )
        drawn.remove(settings.query)
        drawn.insert(0, settings.query)
    return drawn[: settings.n_pictures]


def _similarity(settings, data):
    """The matrix of the file when there is one, None to go by labels."""
    path, given = settings.cifar10_label_sim_path, "cifar10_label_sim_path" in settings.given
    # The original's file belongs to GPQ's split.
    if not given and (settings.head != "gpq" or not Path(path).exists()):
        return None
    return read_similarity(path, len(data.query_labels), len(data.gallery_labels))
