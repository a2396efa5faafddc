"""CIFAR-10 files for tests, written by the script in benchmarks/."""

import importlib.util
from pathlib import Path

import numpy as np

SCRIPT = Path(__file__).resolve().parents[1] / "benchmarks" / "make_cifar10.py"
CLASS_NAMES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


def script():
    """The module benchmarks/make_cifar10.py."""
    spec = importlib.util.spec_from_file_location("make_cifar10", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def numbered_images(n):
    """n different images, uint8 (n, 32, 32, 3): the number in the first pixel, noise in the others."""
    images = np.random.default_rng(0).integers(0, 256, (n, 32, 32, 3), np.uint8)
    images[:, 0, 0, 0], images[:, 0, 0, 1] = np.arange(n) // 256, np.arange(n) % 256
    return images


def write_folder(folder, images, labels):
    """The original's seven files; the first five sixths of the images are the train batches."""
    make = script()
    for i, name in enumerate([*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]):
        part = slice(i * len(images) // 6, (i + 1) * len(images) // 6)
        make.write_batch(folder / name, images[part], labels[part], name)
    meta = {b"label_names": [name.encode() for name in CLASS_NAMES]}
    (folder / "batches.meta").write_bytes(make.python2_pickle(meta))
