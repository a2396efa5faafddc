"""Pretrain GPQ's backbone on Tiny ImageNet at 32 x 32, in place of the ImageNet weights that the original starts from.

    python benchmarks/pretrain.py tinyimagenet32_jpeg.npz models/tinyimagenet_quarter.mat --width=0.25

SOURCE packs JPEG files: train_bytes (all of them, one after the other), train_offsets, train_labels, and the same with
val_. The result is a .mat file as ImageNet_pretrained.mat, 40 arrays, for
`python train.py --ImageNet_pretrained_path=...`; a .json of the same name tells how it was made. Classification with
AdamW, a cosine to zero, label smoothing, mirror images and shifts. Runs on TensorFlow, or on JAX with
KERAS_BACKEND=jax.

With --window_epochs=N the first N epochs see random windows of 24 x 24 pixels, which cost little more than half of the
whole images: objects keep their size in pixels, and a part of each is enough to learn from for a while.

Every epoch leaves TARGET.state.npz, from which the same command goes on where it was interrupted, with the same
numbers; the finished run removes it.
"""

import argparse
import functools
import json
import os
import sys
import time
from pathlib import Path

import numpy as np

N_CLASSES = 200
WINDOW = 24


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("source")
    parser.add_argument("target", type=Path)
    parser.add_argument("--width", type=float, default=0.25)
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--batch_size", type=int, default=500)
    parser.add_argument("--rate", type=float, default=2e-3, help="largest learning rate of AdamW; cosine to zero")
    parser.add_argument("--weight_decay", type=float, default=5e-2)
    parser.add_argument("--smoothing", type=float, default=0.0, help="share of a label that goes to all classes")
    parser.add_argument("--window_epochs", type=int, default=0, help="first epochs, on windows of 24 x 24")
    parser.add_argument("--precision", default="float32")
    parser.add_argument("--limit", type=int, default=None, help="use only so many training images (to try it out)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

    import keras
    import scipy.io
    from keras import ops

    from gpq_tf import augment
    from gpq_tf.augment import window
    from gpq_tf.backbones import vgg
    from gpq_tf.convert.gpq_names import backbone_targets
    from gpq_tf.data.jpegs import load_jpegs
    from gpq_tf.files import replacing, write_json
    from gpq_tf.ops import compiled_call
    from gpq_tf.train_step import make_step

    images, labels, _ = load_jpegs(options.source, "train")
    val_images, val_labels, _ = load_jpegs(options.source, "val")
    images, labels = images[: options.limit], labels[: options.limit].astype("int32")
    print(f"{len(images)} training and {len(val_images)} validation images", flush=True)

    class Classifier(keras.layers.Layer):
        """The backbone with one dense layer, thrown away afterwards."""

        def __init__(self):
            super().__init__()
            self.backbone = vgg.VGG(options.width, options.seed, dtype=options.precision, name="backbone")
            initializer = keras.initializers.GlorotUniform(options.seed + 1000)
            self.dense = keras.layers.Dense(N_CLASSES, kernel_initializer=initializer, dtype="float32", name="dense")
            self.backbone.build((None, None, None, 3))
            self.dense.build((None, vgg.feature_size(options.width)))
            self.built = True

        def call(self, x, training=False):
            return self.dense(self.backbone(x, training=training))

    model = Classifier()
    steps_per_epoch = len(images) // options.batch_size
    total = options.epochs * steps_per_epoch
    schedule = keras.optimizers.schedules.CosineDecay(
        0.0, total, alpha=0.0, warmup_target=options.rate, warmup_steps=max(1, total // 20)
    )
    optimizer = keras.optimizers.AdamW(schedule, weight_decay=options.weight_decay)
    optimizer.exclude_from_weight_decay(var_names=["bias", "gamma", "beta"])
    optimizer.build(model.trainable_variables)
    cross_entropy = keras.losses.CategoricalCrossentropy(from_logits=True, label_smoothing=options.smoothing)

    def loss(x, labels):
        return {"loss": cross_entropy(ops.one_hot(labels, N_CLASSES), model(x, training=True))}

    def losses_of_images(batch):
        x = augment.flip_and_crop(vgg.preprocess(batch["images"]), batch["flips"], batch["offsets"])
        return loss(x, batch["labels"])

    def losses_of_windows(batch):
        x = window.crop_and_flip(batch["images"], batch["flips"], batch["offsets"], WINDOW, WINDOW)
        return loss(vgg.preprocess(x), batch["labels"])

    draw_windows = functools.partial(window.draw_crop_and_flip, margin=images.shape[1] - WINDOW)
    on_windows = draw_windows, make_step(model, losses_of_windows, optimizer)
    on_images = augment.draw_flip_and_crop, make_step(model, losses_of_images, optimizer)
    predict = compiled_call(model, lambda x: ops.argmax(model(vgg.preprocess(x)), axis=-1))

    def accuracy():
        parts = [np.asarray(predict(val_images[i : i + 500])) for i in range(0, len(val_images), 500)]
        return float(np.mean(np.concatenate(parts) == val_labels))

    variables = [*model.variables, *optimizer.variables]
    state = options.target.with_suffix(".state.npz")
    # Where a state is kept, it must be of the very run that is asked for.
    run = json.dumps({name: str(value) for name, value in vars(options).items()})
    history, seconds = read_state(state, run, variables) if state.exists() else ([], 0.0)
    start = time.time() - seconds
    for epoch in range(len(history), options.epochs):
        draw, take_step = on_windows if epoch < options.window_epochs else on_images
        rng = augment.generator(options.seed, epoch, 0)
        order = rng.permutation(len(images))
        losses = []
        for i in range(steps_per_epoch):
            chosen = order[i * options.batch_size : (i + 1) * options.batch_size]
            flips, offsets = draw(rng, len(chosen))
            batch = {"images": images[chosen], "labels": labels[chosen], "flips": flips, "offsets": offsets}
            losses.append(take_step(batch)["loss"])
        history.append({"epoch": epoch + 1, "loss": float(np.mean([float(x) for x in losses])), "top1": accuracy()})
        print(json.dumps(history[-1]), f"{time.time() - start:.0f} s", flush=True)
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
    main()
