"""`gpq-tf cgd`: evaluate a CGD model as the original's test.py does, under its arguments."""

import argparse
import os

DESCRIPTION = """Print Recall@k of a CGD model: every test image searches among the others for one of its class.

The arguments are those of the original's test.py; --resize and --precision are new."""


def parser():
    """The arguments, an argparse.ArgumentParser."""
    made = argparse.ArgumentParser(
        prog="gpq-tf cgd", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.error = _refuse
    add = made.add_argument
    add("--pretrained-model", required=True, help="prefix of -symbol.json and -0000.params, or a .keras file")
    add("--image-width", type=int, default=224, help="pixels that images are stretched to, across (224)")
    add("--image-height", type=int, default=224, help="and downwards (224)")
    add("--batch-size", type=int, default=1, help="images a step; the result does not depend on it (1)")
    add("--num-workers", type=int, default=1, help="threads that read images (1); 0 is 1 as well")
    add("--recallk", default="1,2,4,8", help="k of Recall@k, separated by commas (1,2,4,8)")
    add("--data-dir", default="./data/CUB_200_2011", help="folder of the images (./data/CUB_200_2011)")
    add("--train-txt", default="./meta/CUB200/train.txt", help="list of training images; only counted here")
    add("--test-txt", default="./meta/CUB200/test.txt", help="list of test images: id, path, label; one line of header")
    add("--bbox-txt", default="./meta/CUB200/bbox.txt", help="boxes that images are cut to; empty for whole images")
    add("--gpu", type=int, default=0, help="number of the GPU, -1 for the CPU (0; without a GPU the CPU)")
    add(
        "--resize",
        choices=("opencv", "fast"),
        default="opencv",
        help="the original's, to the bit, or Pillow's (opencv)",
    )
    add("--precision", choices=("float32", "mixed_bfloat16", "mixed_float16"), default="float32", help="(float32)")
    return made


def parse(arguments):
    """Arguments -> argparse.Namespace, checked; ValueError where one does not fit."""
    options = parser().parse_args(arguments)
    for name in ("image_width", "image_height", "batch_size"):
        if getattr(options, name) < 1:
            _refuse(f"--{name.replace('_', '-')}: expected a positive integer, received {getattr(options, name)}")
    try:
        options.recallk = [int(k) for k in options.recallk.split(",")]
    except ValueError:
        _refuse(f"--recallk: expected integers separated by commas, received {options.recallk!r}")
    return options


def hide_other_gpus(options):
    """Have TensorFlow see the GPU that was asked for. Before it is imported."""
    os.environ["CUDA_VISIBLE_DEVICES"] = str(options.gpu)


def run(options, report, progress):
    """Evaluate.

    Args:
        options: argparse.Namespace of `parse`.
        report: callable(str), told what a user should know.
        progress: callable(iterable, what) -> iterable.

    Returns:
        dict of k -> recall.

    Raises:
        ValueError, OSError: if model, lists or images are wrong.
    """
    import numpy as np

    from gpq_tf import convert, metrics
    from gpq_tf.data import cub, images
    from gpq_tf.network import in_precision, load_model

    train, test = cub.read_meta(options.data_dir, options.train_txt, options.test_txt, options.bbox_txt or None)
    report(
        f"training: {len(train.files)} images of {len(train.class_names)} classes; "
        f"test: {len(test.files)} images of {len(test.class_names)} classes"
    )
    source = options.pretrained_model
    if convert.is_source(source):
        model, lines = convert.convert(source)
        model = in_precision(model, options.precision)
        report(f"model: {source}, {lines[0]}")
    else:
        model = load_model(source, precision=options.precision)
        report(f"model: {source}")
    batches = images.image_batches(
        test.files,
        test.boxes,
        options.image_height,
        options.image_width,
        options.batch_size,
        options.resize,
        max(1, options.num_workers),
    )
    n_batch = -(-len(test.files) // options.batch_size)
    embeddings = np.concatenate([model.embed(batch) for batch in progress(batches, "images", n_batch)])
    recalls = metrics.recall_at_k(embeddings, test.labels, options.recallk)
    for k in options.recallk:
        report(f"R@{k:4d}: {recalls[k]:.4f}")
    return recalls


def _refuse(message):
    raise ValueError(f"Invalid arguments of cgd. {message}")
