"""Training steps of any head as train.py takes them, on random images: what the speed benchmarks measure."""

import types

import numpy as np

# Random images in memory: enough for any batch.
N_LABELLED, N_UNLABELLED, N_CLASSES = 5000, 54000, 10
CGD_CLASSES = 100  # of CUB-200-2011; a batch of 128 has 32 of them


def settings_of(head, **given):
    """gpq_tf.settings.Settings of a head, the defaults but for `given`."""
    from gpq_tf import settings

    if head == "cgd":
        given = {"init": None, "n_CLASSES": CGD_CLASSES, **given}
    return settings.resolve([f"--head={head}", *(f"--{key}={value}" for key, value in given.items())], "no config.py")


def random_data(chosen):
    """What a head's `draw_batch` takes, of random images."""
    from gpq_tf.data import RetrievalData
    from gpq_tf.data.metric_learning import ImageSet

    rng = np.random.default_rng(0)
    if chosen.head == "cgd":
        side = chosen.image_size * 9 // 8
        pixels = rng.integers(0, 256, (4 * max(chosen.batch_size, CGD_CLASSES), side, side, 3), "uint8")
        labels = np.arange(len(pixels)) % CGD_CLASSES
        names = list(map(str, range(CGD_CLASSES)))
        listed = types.SimpleNamespace(labels=labels, class_names=names)
        return types.SimpleNamespace(train=ImageSet(listed, side, pixels=pixels))
    labelled, unlabelled = (rng.integers(0, 256, (n, 32, 32, 3), "uint8") for n in (N_LABELLED, N_UNLABELLED))
    empty = dict.fromkeys(RetrievalData.__dataclass_fields__)
    labels = rng.integers(0, N_CLASSES, N_LABELLED)
    images = {"labelled_images": labelled, "labelled_labels": labels, "unlabelled_images": unlabelled}
    return RetrievalData(**{**empty, **images})


def make(chosen, data, jit=False):
    """The model, and a step that trains it.

    Returns:
        (RetrievalModel, callable(batch) -> dict of scalar tensors).
    """
    from gpq_tf import heads
    from gpq_tf.network import RetrievalModel
    from gpq_tf.train_step import make_step

    recipe = heads.recipe(chosen.head)
    model = RetrievalModel(**heads.architecture_of(chosen), dtype=chosen.precision)
    step = make_step(
        model,
        lambda described: recipe.compare(model, described, chosen),
        recipe.optimizer(chosen, recipe.steps_per_epoch(data, chosen)),
        jit,
        describe=lambda batch: recipe.describe(model, batch, chosen),
        batch_size=chosen.batch_size,
        accumulate=chosen.accumulate,
    )
    return model, step
