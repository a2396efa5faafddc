"""Make CIFAR-10 files from packed JPEGs: the embedded sample, the original's layout, the similarity matrix.

    python benchmarks/make_cifar10.py SOURCE.npz --sample gpq_tf/data/cifar10_sample.npz
    python benchmarks/make_cifar10.py SOURCE.npz --layout cifar10 --similarity cifar10/cifar10_Similarity.mat

SOURCE.npz holds all 60,000 images (splits train and test; see gpq_tf/data/jpegs.py). A few seconds each.
"""

import argparse
import io
import struct
import zipfile
from pathlib import Path

import numpy as np

from gpq_tf import files
from gpq_tf.data import jpegs, protocol, similarity

N_SAMPLE = 12_000
MAX_SAMPLE_BYTES = 4_000_000


def sample_index(labels, n_classes, n_sample, seed):
    """Choose `n_sample` images and their order so that the protocol splits them as it splits the whole set.

    Labelled images of the sample are labelled in the whole set, gallery images gallery and queries queries: a
    network trained on the whole set's labels has never seen the label of what the sample's score is measured
    on. The same is made true of networks trained by the original, which labels other images (legacy): none of
    those becomes a query or a gallery image.

    Args:
        labels: int64 (N,), of the whole set in its order; every class equally often.
        n_classes: int, C.
        n_sample: int, a multiple of 60 C.
        seed: int.

    Returns:
        int64 (n_sample,), indices into `labels`, by class; within a class, the order that the protocol keeps.
    """
    rng = np.random.default_rng(seed)
    labelled, gallery, query = protocol.split_index(labels, n_classes)
    seen_by_original = protocol.split_index(labels, n_classes, legacy=True)[0]
    pools = {
        "labelled": labelled,
        "gallery": np.setdiff1d(gallery, seen_by_original),
        "query": np.setdiff1d(query, seen_by_original),
    }
    # Where each role stands in the order by class depends on the labels alone.
    sorted_labels = np.repeat(np.arange(n_classes), n_sample // n_classes)
    places = dict(zip(pools, protocol.split_index(sorted_labels, n_classes), strict=True))
    chosen = np.empty(n_sample, np.int64)
    for role, pool in pools.items():
        for label in range(n_classes):
            slots = places[role][sorted_labels[places[role]] == label]
            chosen[slots] = np.sort(rng.choice(pool[labels[pool] == label], len(slots), replace=False))
    return chosen


def write_sample(source, path, seed):
    """Write the sample: the source's JPEG files, byte for byte; `sample_index` counts train, then test."""
    parts = [jpegs.read_packed(source, split) for split in ("train", "test")]
    labels = np.concatenate([part[2] for part in parts])
    class_names = parts[0][3]
    contents = [piece for packed, offsets, _, _ in parts for piece in np.split(packed, offsets[1:-1])]
    chosen = sample_index(labels, len(class_names), N_SAMPLE, seed)
    arrays = {
        "sample_bytes": np.concatenate([contents[i] for i in chosen]),
        "sample_offsets": np.cumsum([0] + [len(contents[i]) for i in chosen]),
        "sample_labels": labels[chosen].astype(np.uint8),
        "sample_index": chosen.astype(np.int32),
        "class_names": np.array(class_names),
    }
    with files.replacing(path) as temporary:
        with zipfile.ZipFile(temporary, "w") as archive:
            for name, array in arrays.items():
                stored = io.BytesIO()
                np.lib.format.write_array(stored, array, allow_pickle=False)
                # Without a date: numpy.savez writes the time of day, and no two files would be equal.
                member = zipfile.ZipInfo(f"{name}.npy")
                archive.writestr(member, stored.getvalue(), zipfile.ZIP_DEFLATED, compresslevel=9)
        size = temporary.stat().st_size
        if size > MAX_SAMPLE_BYTES:
            raise ValueError(f"Invalid sample. Expected at most {MAX_SAMPLE_BYTES} bytes. Received: {size}")


def write_layout(source, folder):
    """Write the python version's seven files into `folder`, as Python 2 pickled them."""
    folder = Path(folder)
    images, labels, class_names = jpegs.load_jpegs(source, "train")
    for i in range(5):
        part = slice(i * len(images) // 5, (i + 1) * len(images) // 5)
        write_batch(folder / f"data_batch_{i + 1}", images[part], labels[part], f"training batch {i + 1} of 5")
    test_images, test_labels, _ = jpegs.load_jpegs(source, "test")
    write_batch(folder / "test_batch", test_images, test_labels, "testing batch 1 of 1")
    names = [name.encode() for name in class_names]
    meta = {b"num_cases_per_batch": len(test_labels), b"label_names": names, b"num_vis": 3072}
    with files.replacing(folder / "batches.meta") as temporary:
        temporary.write_bytes(python2_pickle(meta))


def write_batch(path, images, labels, name):
    """Write one batch: images uint8 (n, 32, 32, 3) channel first, as rows of 3072."""
    batch = {
        b"batch_label": name.encode(),
        b"labels": labels.tolist(),
        b"data": images.transpose(0, 3, 1, 2).reshape(len(images), -1),
        b"filenames": [f"{Path(path).name}_{i:05d}.png".encode() for i in range(len(images))],
    }
    with files.replacing(path) as temporary:
        temporary.write_bytes(python2_pickle(batch))


def python2_pickle(value):
    """Pickle as Python 2 does at protocol 2 (str is bytes); Python 3's own pickle of bytes is another.

    Args:
        value: dict, list, int, bytes or uint8 array, nested.
    """
    return b"\x80\x02" + _pickled(value) + b"."


def _pickled(value):
    if isinstance(value, dict):
        return b"}(" + b"".join(_pickled(key) + _pickled(item) for key, item in value.items()) + b"u"
    if isinstance(value, list):
        return b"](" + b"".join(map(_pickled, value)) + b"e"
    if isinstance(value, int):
        return b"J" + struct.pack("<i", value)
    if isinstance(value, bytes):
        return b"T" + struct.pack("<i", len(value)) + value
    if isinstance(value, np.ndarray) and value.dtype == np.uint8:
        # _reconstruct(ndarray, (0,), "b"), then its state: (1, shape, dtype, is_fortran, bytes)
        empty = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\x00tU\x01btR"
        dtype = b"cnumpy\ndtype\n(U\x02u1K\x00K\x01tR(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
        shape = b"(" + b"".join(map(_pickled, value.shape)) + b"t"
        return empty + b"(K\x01" + shape + dtype + b"\x89" + _pickled(value.tobytes()) + b"tb"
    raise TypeError(f"cannot pickle {type(value).__name__}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", help="packed JPEGs of the whole set (.npz)")
    parser.add_argument("--sample", metavar="NPZ", help="write the sample here")
    parser.add_argument("--layout", metavar="DIR", help="write data_batch_1 ... here")
    parser.add_argument("--similarity", metavar="MAT", help="write label_Similarity of the whole set's split here")
    parser.add_argument("--seed", type=int, default=0, help="of the sample's choice (0)")
    arguments = parser.parse_args()
    if arguments.layout:
        write_layout(arguments.source, arguments.layout)
    if arguments.similarity:
        packed = [jpegs.read_packed(arguments.source, split) for split in ("train", "test")]
        labels = np.concatenate([part[2] for part in packed])
        _, gallery, query = protocol.split_index(labels, len(packed[0][3]))
        similarity.write_similarity(arguments.similarity, labels[query], labels[gallery])
    if arguments.sample:
        write_sample(arguments.source, arguments.sample, arguments.seed)


if __name__ == "__main__":
    main()
