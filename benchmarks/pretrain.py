"""Pretrain GPQ's backbone on Tiny ImageNet at 32 x 32, in place of the ImageNet weights that the original starts from.

    python benchmarks/pretrain.py tinyimagenet32_jpeg.npz models/tinyimagenet.mat --precision=mixed_bfloat16
    python benchmarks/pretrain.py tinyimagenet32_jpeg.npz models/both.mat --unlabelled=./cifar10 ...

SOURCE packs JPEG files: train_bytes (all of them, one after the other), train_offsets, train_labels, and the same with
val_. The result is a .mat file as ImageNet_pretrained.mat, 40 arrays, for
`python train.py --ImageNet_pretrained_path=...`; a .json of the same name tells how it was made. Classification with
AdamW, a cosine to zero, label smoothing, random crops and mirror images. Runs on TensorFlow, or on JAX with
KERAS_BACKEND=jax.

--unlabelled adds what GPQ's protocol has without labels: each step also takes --batch_size of the 59,000 images of
CIFAR-10 that are no queries, two views of each as SPQ makes them, which are to find one another among all views of the
step (SPQ's loss without codes, which is SimCLR's, behind two dense layers that are thrown away). No label of CIFAR-10
is looked at. The batch statistics are then those of both sets, so that the accuracy on Tiny ImageNet is lower than what
the kernels could have: training from them takes statistics of its own.

Every --save_term epochs leave TARGET.state.npz, from which the same command goes on where it was interrupted, with the
same numbers; the finished run removes it.
"""

import argparse
import functools
import json
import os
import sys
import time
from pathlib import Path

import command
import numpy as np

from gpq_tf.settings import PRECISIONS

N_CLASSES = 200
# Streams of random numbers, of which each step (or epoch) has its own.
ORDER, CROPS, CHOICE, FIRST_VIEW, SECOND_VIEW = range(5)
RECIPE = "simclr"
PROJECTION = (512, 128)  # widths of the layers between features and the contrast of views
TEMPERATURE = 0.5


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("source")
    parser.add_argument("target", type=Path)
    parser.add_argument("--width", type=float, default=1.0)
    parser.add_argument("--epochs", type=command.positive, default=60)
    parser.add_argument("--batch_size", type=command.positive, default=500)
    parser.add_argument("--rate", type=float, default=2e-3, help="largest learning rate of AdamW; cosine to zero")
    parser.add_argument("--weight_decay", type=float, default=5e-2)
    parser.add_argument("--smoothing", type=float, default=0.1, help="share of a label that goes to all classes")
    parser.add_argument("--crop_area", type=float, default=0.35, help="least share of an image that a crop keeps")
    parser.add_argument("--unlabelled", help="folder of CIFAR-10, whose images without labels are learned along")
    parser.add_argument("--precision", choices=PRECISIONS, default="float32")
    parser.add_argument("--limit", type=command.positive, help="use only so many training images (to try it out)")
    parser.add_argument("--save_term", type=command.positive, default=1)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    if options.target.suffix != ".mat":
        parser.error(f"expected a target that ends in .mat, received {str(options.target)!r}")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

    import keras
    import scipy.io
    from keras import ops

    from gpq_tf.backbones import vgg
    from gpq_tf.convert.gpq_names import backbone_targets
    from gpq_tf.data import lazy
    from gpq_tf.data.jpegs import load_jpegs
    from gpq_tf.files import replacing, write_json
    from gpq_tf.ops import compiled_call
    from gpq_tf.train_step import make_step

    val_images, val_labels, _ = load_jpegs(options.source, "val")
    unlabelled = seen_without_labels(options.unlabelled) if options.unlabelled else None
    images, labels, _ = load_jpegs(options.source, "train")
    images, labels = images[: options.limit], labels[: options.limit].astype("int32")
    if len(images) < options.batch_size:
        raise ValueError(f"Expected {options.batch_size} training images or more, a batch. Received: {len(images)}")
    print(f"{len(images)} training and {len(val_images)} validation images", end="; ")
    print("none without labels" if unlabelled is None else f"{len(unlabelled)} without labels", flush=True)

    model = make_network(options, vgg)
    steps_per_epoch = len(images) // options.batch_size
    total = options.epochs * steps_per_epoch
    schedule = keras.optimizers.schedules.CosineDecay(
        0.0, total, alpha=0.0, warmup_target=options.rate, warmup_steps=max(1, total // 20)
    )
    optimizer = keras.optimizers.AdamW(schedule, weight_decay=options.weight_decay)
    optimizer.exclude_from_weight_decay(var_names=["bias", "gamma", "beta"])
    take_step = make_step(model, functools.partial(losses_of, model, options, vgg.preprocess), optimizer)
    predict = compiled_call(model, lambda x: ops.argmax(model.classify(vgg.preprocess(x)), axis=-1))

    def accuracy():
        parts = [np.asarray(predict(val_images[i : i + 500])) for i in range(0, len(val_images), 500)]
        return float(np.mean(np.concatenate(parts) == val_labels))

    variables = [*model.variables, *optimizer.variables]
    state = options.target.with_suffix(".state.npz")
    # Where a state is kept, it must be of the very run that is asked for.
    run = json.dumps({name: str(value) for name, value in vars(options).items()})
    history, seconds = read_state(state, run, variables) if state.exists() else ([], 0.0)
    start = time.time() - seconds
    draw = functools.partial(draw_batch, images, labels, unlabelled, options)
    batches = lazy.ahead(draw, range(len(history) * steps_per_epoch, total))
    for epoch in range(len(history) + 1, options.epochs + 1):
        losses = [take_step(next(batches)) for _ in range(steps_per_epoch)]
        means = {name: float(np.mean([float(each[name]) for each in losses])) for name in losses[0]}
        history.append({"epoch": epoch, **means, "top1": accuracy()})
        print(json.dumps(history[-1]), f"{time.time() - start:.0f} s", flush=True)
        if epoch % options.save_term == 0:
            write_state(state, run, variables, history, time.time() - start)

    arrays = {
        f"{name}:0": ops.convert_to_numpy(variable) for name, (variable, _) in backbone_targets(model.backbone).items()
    }
    with replacing(options.target) as temporary:
        scipy.io.savemat(temporary, arrays, do_compression=True)
    write_json(
        options.target.with_suffix(".json"),
        {
            "command": ["benchmarks/pretrain.py", *(sys.argv[1:] if arguments is None else arguments)],
            "seconds": round(time.time() - start, 1),
            "backend": keras.backend.backend(),
            "history": history,
        },
    )
    state.unlink(missing_ok=True)
    print(f"saved {options.target}")


def seen_without_labels(data_dir):
    """The images of CIFAR-10 that GPQ's training may see, uint8 (59000, 32, 32, 3): all but the queries."""
    from gpq_tf import data

    cifar10 = data.load("cifar10_folder", data_dir)
    return np.concatenate([cifar10.labelled_images, cifar10.unlabelled_images])


def make_network(options, vgg):
    """The backbone with what is thrown away afterwards: a classifier, and the projection of views if they are used."""
    import keras
    from keras import ops

    class Network(keras.layers.Layer):
        def __init__(self):
            super().__init__()
            self.backbone = vgg.VGG(options.width, options.seed, dtype=options.precision, name="backbone")
            self.backbone.build((None, None, None, 3))
            self.dense, size = dense(N_CLASSES, vgg.feature_size(options.width), 1000)
            self.projection = []
            if options.unlabelled:
                size = vgg.feature_size(options.width)
                for i, width in enumerate(PROJECTION):
                    layer, size = dense(width, size, 1001 + i)
                    self.projection.append(layer)
            self.built = True

        def classify(self, x, training=False):
            return self.dense(self.backbone(x, training=training))

        def project(self, x):
            x = self.projection[0](self.backbone(x, training=True))
            return self.projection[1](ops.relu(x))

    def dense(width, before, offset):
        initializer = keras.initializers.GlorotUniform(options.seed + offset)
        layer = keras.layers.Dense(width, kernel_initializer=initializer, dtype="float32")
        layer.build((None, before))
        return layer, width

    return Network()


def draw_batch(images, labels, unlabelled, options, step):
    """What one step sees, a dict of arrays: a function of (seed, step)."""
    from gpq_tf import augment
    from gpq_tf.augment import crop

    size = options.batch_size
    epoch, position = divmod(step, len(images) // size)
    chosen = order_of(options.seed, epoch, len(images))[position * size : (position + 1) * size]
    rng = augment.generator(options.seed, step, CROPS)
    boxes = crop.draw_boxes(rng, size, images.shape[1:3], least_area=options.crop_area)
    batch = {"images": images[chosen], "labels": labels[chosen], "boxes": boxes, "flips": rng.random(size) < 0.5}
    if unlabelled is None:
        return batch
    chosen = augment.generator(options.seed, step, CHOICE).choice(len(unlabelled), size, replace=False)
    views = {
        name: augment.draw_views(augment.generator(options.seed, step, stream), size, unlabelled.shape[1:3], RECIPE)
        for name, stream in (("first", FIRST_VIEW), ("second", SECOND_VIEW))
    }
    return {**batch, "unlabelled": unlabelled[chosen], **views}


@functools.lru_cache(2)
def order_of(seed, epoch, n):
    from gpq_tf import augment

    return augment.generator(seed, epoch, ORDER).permutation(n)


def losses_of(model, options, preprocess, batch):
    """Cross-entropy of the labelled images, plus the contrast of the views where there are any."""
    from keras import ops

    from gpq_tf import augment, losses
    from gpq_tf.augment import crop

    x = crop.crop_and_flip(preprocess(batch["images"]), batch["boxes"], batch["flips"])
    logits = model.classify(x, training=True)
    classified = losses.classification_smoothed(batch["labels"], logits, 1.0, options.smoothing)
    if "unlabelled" not in batch:
        return {"loss": classified}
    pixels = ops.cast(batch["unlabelled"], "float32") / 255
    first, second = (
        model.project(preprocess(255 * augment.apply_views(pixels, batch[view], RECIPE)))
        for view in ("first", "second")
    )
    # With descriptors in the place of quantized ones both halves of SPQ's loss are SimCLR's.
    contrast = losses.cross_quantized_contrastive(first, second, first, second, TEMPERATURE) / 2
    return {"loss": classified + contrast, "classification": classified, "contrast": contrast}


def write_state(path, run, variables, history, seconds):
    """All that a run goes on from, in one file, whole or not at all."""
    from keras import ops

    from gpq_tf.files import replacing

    arrays = {f"variable_{i}": np.asarray(ops.convert_to_numpy(each)) for i, each in enumerate(variables)}
    with replacing(path) as temporary, open(temporary, "wb") as file:
        np.savez(file, run=run, history=json.dumps(history), seconds=seconds, **arrays)


def read_state(path, run, variables):
    """(history, seconds) of an interrupted run, whose variables are put back."""
    with np.load(path) as kept:
        if str(kept["run"]) != run:
            raise SystemExit(f"error: {path} is of another run: {kept['run']}. Go on with that one, or remove the file")
        for i, variable in enumerate(variables):
            variable.assign(kept[f"variable_{i}"])
        return json.loads(str(kept["history"])), float(kept["seconds"])


if __name__ == "__main__":
    command.run(main)
