"""`gpq-tf cgd`: evaluate a CGD model as the original's test.py does, under its arguments."""

import argparse
import os

from gpq_tf.settings import METRIC_LEARNING, PRECISIONS

DESCRIPTION = """Print Recall@k of a CGD model: every test image searches among the others for one of its class.

A model with a codebook is measured twice: by its descriptors, and by the codes of all images but the searching one.
The arguments are those of the original's test.py; --resize and --precision are new."""

# Images of a batch from which on a model with constant weights is no faster (benchmarks/cgd_speed.py).
FREEZE_BELOW = 8
# Of a side, as in config.py.
MOST_PIXELS = 4096


def parser():
    """The arguments, an argparse.ArgumentParser."""
    made = parser_of_images("cgd", DESCRIPTION)
    add = made.add_argument
    add("--pretrained-model", required=True, help="prefix of -symbol.json and -0000.params, or a .keras file")
    add("--recallk", default="1,2,4,8", help="k of Recall@k, separated by commas (1,2,4,8)")
    return made


def parser_of_images(command, description):
    """The arguments that say where the images are and how they are read, for a command of this name."""
    made = argparse.ArgumentParser(
        prog=f"gpq-tf {command}", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.error = lambda message: _refuse(command, message)
    add = made.add_argument
    add("--image-width", type=int, default=224, help="pixels that images are stretched to, across (224)")
    add("--image-height", type=int, default=224, help="and downwards (224)")
    add("--batch-size", type=int, default=1, help="images a step; the result does not depend on it (1)")
    add("--num-workers", type=int, default=1, help="threads that read images (1); 0 is 1 as well")
    add("--data-dir", default="./data/CUB_200_2011", help="folder of the images (./data/CUB_200_2011)")
    lists = "naver/cgd's, ./meta/CUB200/"
    add("--train-txt", default="./meta/CUB200/train.txt", help=f"list: id, class, path; a header ({lists}train.txt)")
    add("--test-txt", default="./meta/CUB200/test.txt", help=f"list of test images, likewise ({lists}test.txt)")
    add("--bbox-txt", default="./meta/CUB200/bbox.txt", help=f"boxes; empty for whole images ({lists}bbox.txt)")
    add(
        "--dataset",
        choices=METRIC_LEARNING,
        default="image_lists",
        help="the lists above, or what lies in --data-dir, as in config.py (image_lists)",
    )
    add("--gpu", type=int, help="number of the GPU, -1 for the CPU (CUDA_VISIBLE_DEVICES if that is set, else 0)")
    add(
        "--resize",
        choices=("opencv", "fast"),
        default="opencv",
        help="the original's, to the bit, or Pillow's (opencv)",
    )
    add("--precision", choices=PRECISIONS, default="float32", help="(float32)")
    return made


def parse(arguments):
    """Arguments -> argparse.Namespace, checked; ValueError where one does not fit."""
    made = parser()
    options = made.parse_args(arguments)
    check_sizes(made, options)
    given = options.recallk
    try:
        options.recallk = [int(k) for k in options.recallk.split(",")]
    except ValueError:
        options.recallk = [0]
    if not all(0 < k < 2**63 for k in options.recallk):
        made.error(f"--recallk: expected positive integers separated by commas, received {given!r}")
    return options


def check_sizes(made, options):
    """Refuse sizes that no image or batch has (ValueError), of options that `parser_of_images` describes."""
    for name, high in (("image_width", MOST_PIXELS), ("image_height", MOST_PIXELS), ("batch_size", 10**6)):
        if not 1 <= getattr(options, name) <= high:
            expected = f"an integer of 1 to {high}"
            made.error(f"--{name.replace('_', '-')}: expected {expected}, received {getattr(options, name)}")
    if options.num_workers < 0:
        made.error(f"--num-workers: expected an integer of 0 or more, received {options.num_workers}")


def hide_other_gpus(options):
    """Have TensorFlow see the GPU that was asked for, else the first of those it would see. Before it is imported."""
    if options.gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = str(options.gpu)
    else:
        os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")


def read_lists(options, report):
    """(train, test): ImageLists, see `data.metric_learning.load`; how many images they have is reported."""
    from gpq_tf.data import cub, metric_learning

    if options.dataset == "image_lists":
        train, test = cub.read_meta(options.data_dir, options.train_txt, options.test_txt, options.bbox_txt or None)
    else:
        train, test = metric_learning.load(options.dataset, options.data_dir, boxes=bool(options.bbox_txt))
    report(
        f"training: {len(train.files)} images of {len(train.class_names)} classes; "
        f"test: {len(test.files)} images of {len(test.class_names)} classes"
    )
    return train, test


def load(source, options, report):
    """A model to embed images with: a .keras file, or the original's files, which are converted.

    Args:
        source: str, path of a .keras file or prefix of -symbol.json and -0000.params.
        options: argparse.Namespace, with the precision in which it computes and the images of a batch.
        report: callable(str).

    Returns:
        RetrievalModel, frozen where batches are small.

    Raises:
        ValueError, OSError: if there is no such model, it is damaged, or of another head.
    """
    from gpq_tf import codebooks, convert

    model, lines = convert.load(source, precision=options.precision)
    codebooks.check_model(model)
    report(", ".join([f"model: {source}", *lines[:1]]))
    if options.gpu is not None and options.gpu >= 0 and not _has_gpu():
        report(f"there is no GPU {options.gpu} here: computing on the CPU")
    if options.batch_size < FREEZE_BELOW:
        model.freeze()
    return model


def _has_gpu():
    import keras

    try:
        return bool(keras.distribution.list_devices("gpu"))
    except RuntimeError:  # JAX without any
        return False


def embed(model, images, options, progress):
    """The descriptors of an ImageList, float32 (N, D); images are read as `options` say."""
    import numpy as np

    from gpq_tf.data.images import image_batches
    from gpq_tf.data.metric_learning import UPRIGHT

    batches = image_batches(
        images.files,
        images.boxes,
        options.image_height,
        options.image_width,
        options.batch_size,
        options.resize,
        max(1, options.num_workers),
        upright=options.dataset in UPRIGHT,
    )
    n_batch = -(-len(images.files) // options.batch_size)
    return np.concatenate([model.embed(batch) for batch in progress(batches, "images", n_batch)])


def run(options, report, progress):
    """Evaluate.

    Args:
        options: argparse.Namespace of `parse`.
        report: callable(str), told what a user should know.
        progress: callable(iterable, what) -> iterable.

    Returns:
        dict of k -> recall: of the descriptors, and of the codes under "codes" where the model has a codebook.

    Raises:
        ValueError, OSError: if model, lists or images are wrong.
    """
    from gpq_tf import metrics, recall, retrieval

    _, test = read_lists(options, report)
    model = load(options.pretrained_model, options, report)
    embeddings = embed(model, test, options, progress)
    recalls = metrics.recall_at_k(embeddings, test.labels, options.recallk)
    if not model.architecture["n_book"]:
        _report_recalls(recalls, options.recallk, report)
        return recalls
    report(f"float32 descriptors, {embeddings[0].nbytes} bytes each:")
    _report_recalls(recalls, options.recallk, report)
    codes = retrieval.codes_of(model, embeddings)
    report(recall.headline_of_codes(model))
    of_codes = retrieval.recall_of_codes(model, embeddings, codes, test.labels, options.recallk)
    _report_recalls(of_codes, options.recallk, report)
    return {**recalls, "codes": of_codes}


def _report_recalls(recalls, ks, report):
    from gpq_tf import recall

    for k in ks:
        report(recall.line(k, recalls[k]))


def _refuse(command, message):
    raise ValueError(f"Invalid arguments of {command}. {message}")
