"""CIFAR-10 from whichever of three places holds it, in the original's order, split as GPQ or as SPQ splits it."""

from importlib import resources
from pathlib import Path

import numpy as np

from gpq_tf.data import jpegs, pickles, protocol, tfds_files
from gpq_tf.settings import CIFAR10

BATCHES = ("data_batch_1", "data_batch_2", "data_batch_3", "data_batch_4", "data_batch_5", "test_batch")
LAYOUT = (*BATCHES, "batches.meta")
UNPACKED = "cifar-10-batches-py"  # the folder that the archive of the python version unpacks to
N_TRAIN = 50_000  # of the whole set; the sample remembers where its images stood


def load(dataset="cifar10", data_dir="./cifar10", download=False, legacy=False, split="gpq"):
    """Load CIFAR-10 and split it into labelled, gallery and query images.

    Args:
        dataset: str. "cifar10" takes the first that is there of the other three: "cifar10_folder", the python
            version's seven files (data_batch_1 ...) in `data_dir` or in its folder cifar-10-batches-py, as the
            archive unpacks and torchvision keeps them; "cifar10_tfds", tensorflow-datasets' cifar10 prepared in
            `data_dir`, $TFDS_DATA_DIR or ~/tensorflow_datasets; "cifar10_sample", 12,000 images inside this package.
        data_dir: str or Path.
        download: bool; True lets tensorflow-datasets fetch CIFAR-10 into `data_dir` where it is not there
            (170 MB). Without it nothing touches the network.
        legacy: bool; True splits in the order of numpy 1.16, as the original did (see `protocol.split`). The
            sample is always split in the stable order, in which its queries, gallery and labelled images are
            queries, gallery and labelled images of the whole set.
        split: str, "gpq" (`protocol.split`) or "train_test" (`protocol.train_test`).

    Returns:
        RetrievalData; its `source` says in one line what was loaded.

    Raises:
        ValueError: if `dataset` or `split` is unknown, or what is asked for is absent, incomplete or damaged.
        OSError: if a file cannot be read, or CIFAR-10 not be downloaded.

    Example:
        >>> data = load("cifar10_sample")
        >>> data.query_images.shape, data.gallery_images.shape, data.labelled_images.shape
        ((200, 32, 32, 3), (10800, 32, 32, 3), (1000, 32, 32, 3))
    """
    if dataset not in CIFAR10:
        raise ValueError(f"Invalid dataset. Expected one of {', '.join(CIFAR10)}. Received: dataset={dataset!r}")
    if dataset == "cifar10":
        dataset = _first_present(data_dir, download)
    protocol.check_name(split)
    if dataset == "cifar10_folder":
        *labelled_images, in_test = _read_folder(data_dir)
    elif dataset == "cifar10_tfds":
        *labelled_images, in_test = _read_tfds(data_dir, download)
    else:
        *labelled_images, in_test = _read_sample(data_dir)
        legacy = False
    if split == "train_test":
        return protocol.train_test(*labelled_images, in_test)
    return protocol.split(*labelled_images, legacy=legacy)


def _first_present(data_dir, download):
    # One file of the seven is enough to mean the folder: an incomplete one must never turn into the sample.
    if any((_layout_folder(data_dir) / name).exists() for name in LAYOUT):
        return "cifar10_folder"
    if download or tfds_files.prepared("cifar10", data_dir):
        return "cifar10_tfds"
    return "cifar10_sample"


def _layout_folder(data_dir):
    """`data_dir`, or its folder cifar-10-batches-py where the files can lie there only."""
    own, unpacked = Path(data_dir), Path(data_dir) / UNPACKED
    return unpacked if unpacked.is_dir() and not any((own / name).exists() for name in LAYOUT) else own


def load_asked(settings, split="gpq"):
    """`load` what settings ask for.

    Args:
        settings: gpq_tf.settings.Settings.
        split: str, as for `load`.

    Returns:
        RetrievalData.

    Raises:
        ValueError, OSError: as `load`; also if a data_dir was given and holds no CIFAR-10: the sample is for users who
            asked for nothing.
    """
    data_dir = Path(settings.data_dir)
    asked = "data_dir" in settings.given and settings.dataset == "cifar10"
    if asked and _first_present(data_dir, settings.download) == "cifar10_sample":
        raise ValueError(
            f"Invalid data_dir {settings.data_dir!r}. Expected CIFAR-10's python version (data_batch_1 ...) or "
            "tensorflow-datasets' cifar10. Received: a folder without them, or none. Leave it out for the embedded "
            "sample, or add --download=True"
        )
    return load(settings.dataset, data_dir, settings.download, settings.legacy, split)


def _read_folder(data_dir):
    data_dir = _layout_folder(data_dir)
    missing = [name for name in LAYOUT if not (data_dir / name).is_file()]
    if missing:
        raise ValueError(
            f"Invalid data_dir {data_dir}. Expected the files of CIFAR-10's python version. "
            f"Missing: {', '.join(missing)}"
        )
    class_names = pickles.load_cifar_meta(data_dir / "batches.meta")
    parts = [pickles.load_cifar_batch(data_dir / name, len(class_names)) for name in BATCHES]
    images, labels = (np.concatenate(part) for part in zip(*parts, strict=True))
    in_test = np.arange(len(images)) >= len(images) - len(parts[-1][1])
    return images, labels, class_names, f"CIFAR-10, {len(images):,} images from {data_dir} (original layout)", in_test


def _read_sample(data_dir):
    with resources.as_file(resources.files("gpq_tf.data") / "cifar10_sample.npz") as path:
        images, labels, class_names = jpegs.load_jpegs(path, "sample")
        with np.load(path) as stored:
            in_test = stored["sample_index"] >= N_TRAIN
    source = (
        f"embedded CIFAR-10 sample, {len(images):,} of 60,000 images; for all of them put the python "
        f"version's files (data_batch_1 ...) into {data_dir} or add --download=True"
    )
    return images, labels, class_names, source, in_test


def _read_tfds(data_dir, download):
    folder = tfds_files.prepared("cifar10", data_dir)
    if folder is None and not download:
        places = ", ".join(map(str, tfds_files.places(data_dir)))
        raise ValueError(
            f"Invalid dataset 'cifar10_tfds'. Expected a prepared cifar10 in one of {places}. Found none. "
            f"Add --download=True to fetch it into {data_dir} (170 MB, once)."
        )
    import tensorflow_datasets as tfds

    if folder is None:
        try:
            builder = tfds.builder("cifar10", data_dir=data_dir)
            builder.download_and_prepare()
        except Exception as error:  # its own, urllib's, tensorflow's
            raise OSError(f"Cannot download CIFAR-10 into {data_dir}: {type(error).__name__}: {error}") from error
        folder = Path(builder.data_dir)
    try:
        builder = tfds.builder_from_directory(folder)
        parts = [_read_tfds_split(tfds, builder, split) for split in ("train", "test")]
        class_names = list(builder.info.features["label"].names)
    except Exception as error:  # tensorflow's errors are no ValueErrors, and its asserts no errors of ours
        raise ValueError(
            f"Invalid {folder}. Expected tensorflow-datasets' cifar10: {type(error).__name__}: {error}. "
            f"To prepare it anew, delete that folder and add --download=True."
        ) from error
    images, labels = (np.concatenate(part) for part in zip(*parts, strict=True))
    source = f"CIFAR-10, {len(images):,} images from {folder} (tensorflow-datasets)"
    return images, labels, class_names, source, np.arange(len(images)) >= len(parts[0][1])


def _read_tfds_split(tfds, builder, split):
    """(images, labels) of one split, in the order of the original files.

    tensorflow-datasets shuffles when it prepares; the id, such as train_00123, remembers the order, which the
    protocol needs: it decides which images are labelled and which are queries.
    """
    if "id" not in builder.info.features:
        raise ValueError("its examples have no id, so the order of the original files is lost (version 3.0.2 has them)")
    batches = list(tfds.as_numpy(builder.as_dataset(split=split, batch_size=1000)))
    ids, images, labels = (np.concatenate([batch[key] for batch in batches]) for key in ("id", "image", "label"))
    if images.shape[1:] != (32, 32, 3):
        raise ValueError(f"its images have shape {images.shape[1:]}")
    order = np.argsort(ids)  # ids differ, and are padded with zeros
    return images[order], labels[order]
