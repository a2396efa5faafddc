"""A CIFAR-like set that a small network learns in seconds: ten colours, with noise."""

import types

import numpy as np
import pytest
from PIL import Image

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


def coloured_folders(root, sizes, side=64):
    """Write so many PNG and JPEG images a class into root/<part>/<class>/, for {part: number}; part "" is root."""
    rng = np.random.default_rng(2)
    for part, n in sizes.items():
        for name, colour in (("amber", (230, 160, 40)), ("blue", (40, 60, 210)), ("green", (50, 180, 80))):
            folder = root / part / name
            folder.mkdir(parents=True)
            for i in range(n):
                pixels = np.clip(np.array(colour) + rng.normal(0, 40, (side + i, side, 3)), 0, 255).astype("uint8")
                Image.fromarray(pixels).save(folder / f"{i:03d}{'.png' if i % 2 else '.jpg'}")


# The heads, of which one is quick to say whether something is amiss with steps.
HEADS = ("gpq", pytest.param("spq", marks=pytest.mark.slow), pytest.param("cgd", marks=pytest.mark.slow))
# Settings of steps on `small_set`.
SMALL = {
    "gpq": ["--batch_size=20", "--width_multiplier=0.0625"],
    "spq": ["--batch_size=16", "--width_multiplier=0.0625"],
    "cgd": [
        "--batch_size=16",
        "--width_multiplier=0.0625",
        "--n_dim=12",
        "--image_size=32",
        "--init=None",
        "--dataset=image_folders",
    ],
}


def small_set(head):
    """What `draw_batch` of a head takes; of cgd 80 images of 36x36 pixels, for windows of 32."""
    if head != "cgd":
        return coloured_data(600)
    images, labels = coloured_images(80)
    larger = np.pad(images, ((0, 0), (2, 2), (2, 2), (0, 0)), mode="edge")
    train = types.SimpleNamespace(labels=labels, class_names=CLASS_NAMES, side=36, read=larger.__getitem__)
    return types.SimpleNamespace(train=train)
