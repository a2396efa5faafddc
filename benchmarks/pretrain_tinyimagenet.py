"""Pretrain GPQ's backbone on Tiny ImageNet at 32 x 32, in place of the ImageNet weights that the original starts from.

    python benchmarks/pretrain_tinyimagenet.py tinyimagenet32_jpeg.npz models/tinyimagenet_quarter.mat --width=0.25

SOURCE packs JPEG files: train_bytes (all of them, one after the other), train_offsets, train_labels, and the same with
val_. The result is a .mat file as ImageNet_pretrained.mat, 40 arrays, for
`python train.py --ImageNet_pretrained_path=...`; a .json of the same name tells how it was made. Runs on TensorFlow, or
on JAX with KERAS_BACKEND=jax.
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path

import numpy as np

N_CLASSES = 200


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("source")
    parser.add_argument("target")
    parser.add_argument("--width", type=float, default=0.25)
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--batch_size", type=int, default=500)
    parser.add_argument("--rate", type=float, default=2e-3, help="largest learning rate of AdamW; cosine to zero")
    parser.add_argument("--weight_decay", type=float, default=5e-2)
    parser.add_argument("--precision", default="float32")
    parser.add_argument("--limit", type=int, default=None, help="use only so many training images (to try it out)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

    import keras
    import scipy.io
    from keras import ops

    from gpq_tf import augment
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
            self.dense = keras.layers.Dense(N_CLASSES, dtype="float32", name="dense")
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
    cross_entropy = keras.losses.SparseCategoricalCrossentropy(from_logits=True)

    def losses_of(batch):
        x = augment.flip_and_crop(vgg.preprocess(batch["images"]), batch["flips"], batch["offsets"])
        return {"loss": cross_entropy(batch["labels"], model(x, training=True))}

    step_function = make_step(model, losses_of, optimizer)
    predict = compiled_call(model, lambda x: ops.argmax(model(vgg.preprocess(x)), axis=-1))

    def accuracy():
        parts = [np.asarray(predict(val_images[i : i + 500])) for i in range(0, len(val_images), 500)]
        return float(np.mean(np.concatenate(parts) == val_labels))

    start, history = time.time(), []
    for epoch in range(options.epochs):
        rng = augment.generator(options.seed, epoch, 0)
        order = rng.permutation(len(images))
        losses = []
        for i in range(steps_per_epoch):
            chosen = order[i * options.batch_size : (i + 1) * options.batch_size]
            flips, offsets = augment.draw_flip_and_crop(rng, len(chosen))
            batch = {"images": images[chosen], "labels": labels[chosen], "flips": flips, "offsets": offsets}
            losses.append(step_function(batch)["loss"])
        history.append({"epoch": epoch + 1, "loss": float(np.mean([float(x) for x in losses])), "top1": accuracy()})
        print(json.dumps(history[-1]), f"{time.time() - start:.0f} s", flush=True)

    arrays = {
        f"{name}:0": ops.convert_to_numpy(variable) for name, (variable, _) in backbone_targets(model.backbone).items()
    }
    with replacing(options.target) as temporary:
        scipy.io.savemat(temporary, arrays, do_compression=True)
    write_json(
        Path(options.target).with_suffix(".json"),
        {
            "command": ["benchmarks/pretrain_tinyimagenet.py", *(sys.argv[1:] if arguments is None else arguments)],
            "seconds": round(time.time() - start, 1),
            "backend": keras.backend.backend(),
            "history": history,
        },
    )
    print(f"saved {options.target}")


if __name__ == "__main__":
    main()
