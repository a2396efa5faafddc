"""A CIFAR-like set that a small network learns in seconds: ten colours, with noise."""

import numpy as np

from gpq_tf.data import protocol

CLASS_NAMES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


def coloured_images(n=1200, seed=0):
    """(images uint8 (n, 32, 32, 3), labels int64 (n,)): every class has its colour, half drowned in noise."""
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.arange(n) % 10)
    colours = np.random.default_rng(1).integers(40, 216, (10, 3))
    noise = rng.normal(0, 60, (n, 32, 32, 3))
    return np.clip(colours[labels][:, None, None] + noise, 0, 255).astype("uint8"), labels


def coloured_data(n=1200, seed=0):
    """`coloured_images`, split: n / 60 queries, n / 12 labelled images, the others gallery."""
    return protocol.split(*coloured_images(n, seed), CLASS_NAMES, "coloured noise")
