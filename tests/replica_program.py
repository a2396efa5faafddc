"""Steps of training in a process of its own, on one device or several: what the tests of strategies compare.

    python tests/replica_program.py OUT.npz --head=... --strategy=... [--setting=value ...]

A machine without a GPU is made to have two logical processors. With TF_CONFIG in the environment several such
processes are the workers of one step. OUT.npz gets the losses of each step, all weights and slots of the optimiser
after the first step (whose slots are the gradients, scaled) and after the last, and then some images' descriptors. The
optimiser is plain; with OWN_OPTIMIZER in the environment it is the head's.

The network is smooth, unless KINKS is in the environment: softplus in place of ReLUs, means in place of the largest of
a window. Of the millions of pre-activations of five steps some lie nearer to zero than rounding: on which side is the
processor's choice, and all layers before such a one then get another gradient, by as much as a tenth.
"""

import os
import sys

import numpy as np
import tensorflow as tf

N_STEP = 5
RATES = {"gpq": 1e-2, "spq": 1e-3, "cgd": 1e-6}


def make_smooth():
    import keras

    keras.ops.relu, keras.ops.max_pool = keras.ops.softplus, keras.ops.average_pool
    keras.layers.MaxPooling2D = keras.layers.AveragePooling2D


def main(out, *given):
    is_worker = "--strategy=multiworker" in given
    if not is_worker:
        (device,) = tf.config.list_physical_devices("CPU")
        tf.config.set_logical_device_configuration(device, 2 * [tf.config.LogicalDeviceConfiguration()])

    has_kinks = bool(os.environ.get("KINKS"))
    if not has_kinks:
        make_smooth()

    import keras

    from gpq_tf import heads, settings, strategies, train_step, trainer
    from gpq_tf.network import RetrievalModel

    from small_data import SMALL, small_set

    head = next(name.removeprefix("--head=") for name in given if name.startswith("--head="))
    names = [argument.partition("=")[0] for argument in given]
    small = [argument for argument in SMALL[head] if argument.partition("=")[0] not in names]
    chosen = settings.resolve([*small, *given], "no config.py")
    strategy = strategies.from_settings(chosen)
    strategies.check_batch_size(chosen, strategy)
    data = small_set(head)
    recipe = heads.recipe(head)
    with strategy.scope() if strategy else tf.distribute.get_strategy().scope():
        model = RetrievalModel(**heads.architecture_of(chosen), dtype=chosen.precision)
        trainer.synchronize(model, chosen.sync_batch_norm)
        # Adam makes whole steps of gradients that are nothing but rounding, such as those of biases before a batch
        # normalisation; with plain steps weights stay comparable.
        optimizer = keras.optimizers.SGD(0.0 if has_kinks else RATES[head], momentum=0.5)
        if os.environ.get("OWN_OPTIMIZER"):
            optimizer = trainer.make_optimizer(recipe, chosen, steps_per_epoch=10)
        optimizer.build(model.trainable_variables)
    step = train_step.make_step(
        model,
        lambda described: recipe.compare(model, described, chosen),
        optimizer,
        describe=lambda batch: recipe.describe(model, batch, chosen),
        strategy=strategy,
        batch_size=chosen.batch_size,
        clip_norm=chosen.clip_norm,
        accumulate=chosen.accumulate,
    )
    found = {"replicas": strategy.num_replicas_in_sync if strategy else 1}
    for number in range(N_STEP):
        losses = step(recipe.draw_batch(data, chosen, number))
        found |= {f"loss/{number}/{name}": float(value) for name, value in losses.items()}
        if number in (0, N_STEP - 1):
            for kind, owner in (("weight", model), ("slot", optimizer)):
                for i, variable in enumerate(owner.variables):
                    name = variable.path.split("/", 1)[-1].replace("/", "_")
                    found[f"{kind}/{number}/{i:03d}_{name}"] = np.asarray(variable.numpy())
    images = np.random.default_rng(3).integers(0, 256, (8, chosen.image_size, chosen.image_size, 3), "uint8")
    np.savez(out, **found, descriptors=model.embed(images))


if __name__ == "__main__":
    main(*sys.argv[1:])
