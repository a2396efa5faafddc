"""A whole training step of each head beside the plain classification step of its backbone; what waits for what.

    python benchmarks/step_time.py                                       # all heads on this machine, full width
    KERAS_BACKEND=jax python benchmarks/step_time.py --peak=989e12       # on a GPU, here an H100

At the published sizes: 500 + 500 images (gpq), two views of 256 (spq), 128 of 224x224 (cgd); random pixels. "Whole" is
what train.py does with them: augmentation, forward, losses, backward, Adam. "Plain" sends as many images, without
augmentation, through the same backbone and one dense layer, cross entropy, backward, Adam. Both take turns for --rounds
rounds of --steps steps; figures are medians. Then --steps steps in the trainer's own order, where a thread draws the
next batch while one is trained on: "outside" is the share of that time in which no step was under way, "handing over"
what a step takes longer because its batch comes from the host's memory.

With JAX, the operations of the backbone are counted by XLA (three times those of the way forward), and --peak, the
processor's operations a second, gives the share of it that a whole step reaches; --profile tells how long a GPU was
busy while steps were taken, and with what. Writes benchmarks/results/step_time_<backend>.json.
"""

import argparse
import os
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import step_profile

HERE = Path(__file__).parent
HEADS = ("gpq", "spq", "cgd")
WARM_UP = 2


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--heads", nargs="*", choices=HEADS, default=HEADS)
    parser.add_argument("--precisions", nargs="*", default=["float32", "mixed_bfloat16"])
    parser.add_argument("--width", type=float, default=1.0)
    parser.add_argument("--batch", type=int, help="the published one is the default")
    parser.add_argument("--side", type=int, help="pixels of cgd's images")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peak", type=float, help="operations a second")
    parser.add_argument("--profile", action="store_true", help="with JAX: also what the time goes to")
    parser.add_argument("--out", type=Path, help="benchmarks/results/step_time_<backend>.json is the default")
    options = parser.parse_args(arguments)
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

    import keras
    from side_by_side import machine

    from gpq_tf.files import write_json

    backend = keras.backend.backend()
    where = {"backend": backend, "machine": machine(), "device": _device()}
    given = sys.argv[1:] if arguments is None else arguments
    report = {"command": " ".join(["python benchmarks/step_time.py", *given]), **where, "heads": {}}
    for head in options.heads:
        for precision in options.precisions:
            found = report["heads"].setdefault(head, {})[precision] = measure(head, precision, options)
            print(head, precision, found, flush=True)
    write_json(options.out or HERE / "results" / f"step_time_{backend}.json", report)


def _device():
    """What JAX computes on, such as "NVIDIA H100 80GB HBM3"; None with TensorFlow."""
    import keras

    if keras.backend.backend() != "jax":
        return None
    import jax

    return jax.devices()[0].device_kind


def measure(head, precision, options):
    """The figures of one head in one precision, a dict."""
    import our_steps

    from gpq_tf import heads, trainer

    given = {"batch_size": options.batch, "image_size": options.side if head == "cgd" else None}
    given = {name: value for name, value in given.items() if value is not None}
    chosen = our_steps.settings_of(head, precision=precision, width_multiplier=options.width, **given)
    data, recipe = our_steps.random_data(chosen), heads.recipe(head)
    jit = trainer.use_jit(chosen)
    model, whole = our_steps.make(chosen, data, jit)
    batch = recipe.draw_batch(data, chosen, 0)
    images = _through_the_network(batch, chosen)
    plain = _plain_step(model, images, chosen, jit)
    plain_batch = _on_device({"images": images, "labels": np.arange(len(images), dtype="int32") % our_steps.N_CLASSES})
    resident = _on_device(batch)

    seconds = {"whole": [], "plain": [], "handed": []}
    for step, each in ((whole, resident), (whole, batch), (plain, plain_batch)):
        for _ in range(WARM_UP):
            _finish(step(each))
    for _ in range(options.rounds):
        for name, step, each in (
            ("whole", whole, resident),
            ("handed", whole, batch),
            ("plain", plain, plain_batch),
        ):
            seconds[name] += [_timed(step, each) for _ in range(options.steps)]
    whole_s, handed_s, plain_s = (statistics.median(seconds[name]) for name in ("whole", "handed", "plain"))
    found = {
        "images": len(images),
        "whole_step_s": round(whole_s, 4),
        "plain_step_s": round(plain_s, 4),
        "whole_of_plain": round(whole_s / plain_s, 3),
        "images_per_s": round(len(images) / whole_s, 1),
        "handing_over": round(max(0.0, 1 - whole_s / handed_s), 4),
        "outside": _share_outside(whole, data, recipe, chosen, options.steps * options.rounds),
        "whole_step_range_s": [round(min(seconds["whole"]), 4), round(max(seconds["whole"]), 4)],
    }
    found |= _share_of_peak(model, images, found, options.peak)
    return found | ({"profile": step_profile.profile(whole, resident)} if options.profile else {})


def _through_the_network(batch, chosen):
    """As many images as a whole step sends through the backbone, of the size that it sees."""
    images = batch["images"][:, : chosen.image_size, : chosen.image_size] if chosen.head == "cgd" else batch["images"]
    return np.concatenate([images, images]) if chosen.head == "spq" else images


def _plain_step(model, images, chosen, jit):
    """A classifier of the same kind of backbone, and its step."""
    import keras
    import our_steps
    from keras import ops

    from gpq_tf import heads
    from gpq_tf.train_step import make_step

    recipe = heads.recipe(chosen.head)
    backbone, _ = recipe.build(model.architecture, model.dtype_policy)
    size = backbone.compute_output_spec(keras.KerasTensor((1, *images.shape[1:]), "float32")).shape[-1]
    dense = keras.layers.Dense(our_steps.N_CLASSES, dtype="float32")
    dense.build((None, size))
    classifier = keras.layers.Layer()
    classifier.backbone, classifier.dense, classifier.built = backbone, dense, True
    cross_entropy = keras.losses.SparseCategoricalCrossentropy(from_logits=True)

    def losses_of(batch):
        features = backbone(recipe.preprocess(batch["images"]), training=True)
        if len(features.shape) == 4:  # a map: the mean of its places
            features = ops.mean(features, axis=(1, 2))
        return {"loss": cross_entropy(batch["labels"], dense(features))}

    return make_step(classifier, losses_of, keras.optimizers.Adam(1e-4), jit)


def _on_device(batch):
    """The same arrays in the memory of the device."""
    import keras

    return keras.tree.map_structure(keras.ops.convert_to_tensor, batch)


def _finish(losses):
    return {name: float(value) for name, value in losses.items()}


def _timed(step, batch):
    start = time.perf_counter()
    _finish(step(batch))
    return time.perf_counter() - start


def _share_outside(step, data, recipe, chosen, steps):
    """Share of the time of a loop such as the trainer's in which no step was under way."""
    from gpq_tf.data import lazy

    inside, start = 0.0, None
    for batch in lazy.ahead(lambda number: recipe.draw_batch(data, chosen, number), range(1 + steps)):
        if start is None:  # from the first batch on
            start = time.perf_counter()
        inside += _timed(step, batch)
    return round(1 - inside / (time.perf_counter() - start), 4)


def _share_of_peak(model, images, found, peak):
    """Operations of the backbone, and the share of the processor's that they are; where XLA counts them."""
    import keras

    if keras.backend.backend() != "jax":
        return {}
    import jax

    # Counted of the description of the function, for a CPU, where none is a library's call: nothing is compiled.
    def forward(x, *values):
        return model.backbone.stateless_call(*values, x, training=False)[0]

    def shape_of(each):
        return jax.ShapeDtypeStruct(each.shape, each.dtype)

    groups = (model.backbone.trainable_variables, model.backbone.non_trainable_variables)
    one = jax.ShapeDtypeStruct((1, *images.shape[1:]), "float32")
    with jax.default_device(jax.devices("cpu")[0]):
        analysis = (
            jax.jit(forward).lower(one, *([shape_of(each) for each in group] for group in groups)).cost_analysis()
        )
    if analysis is None:
        return {}
    operations = 3 * analysis["flops"] * len(images)
    rate = operations / found["whole_step_s"]
    counted = {"operations": operations, "operations_per_s": round(rate)}
    return counted | ({"share_of_peak": round(rate / peak, 4)} if peak else {})


if __name__ == "__main__":
    main()
