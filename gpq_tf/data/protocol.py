"""How the originals split a labelled image set into labelled, gallery and query images."""

import dataclasses
import hashlib

import numpy as np

from gpq_tf.data import lazy, numpy116

# Names of `split` and `train_test`.
PROTOCOLS = ("gpq", "train_test")
QUERY_STEP = 60  # every 60th image of the order by class is a query
LABELLED_SHARE = 120  # of N images, N // 120 per class are labelled: 500 of CIFAR-10's 60,000


@dataclasses.dataclass(frozen=True, eq=False)
class RetrievalData:
    """A split image set. Images are uint8 NHWC, labels int64, indices positions in the set as it was given.

    Images that memory would not hold are `lazy.LazyImages` in place of arrays.

    Attributes:
        labelled_images: (L, H, W, 3), the images whose labels training sees.
        labelled_labels: (L,).
        unlabelled_images: the gallery's images, which training sees without their labels; the same array.
        gallery_images: (N, H, W, 3), what is searched.
        gallery_labels: (N,).
        query_images: (Q, H, W, 3), what is searched for.
        query_labels: (Q,).
        class_names: list of C str; a label indexes it.
        source: str, one line for the user: where the images come from.
        labelled_index: int64 (L,).
        gallery_index: int64 (N,).
        query_index: int64 (Q,).
        identity: bytes that stand for the images in `fingerprint`, whether they are held or lazy; None: the pixels.
        files: list of paths of the images in the order in which the set was given, or None where each is not a file.
    """

    labelled_images: np.ndarray
    labelled_labels: np.ndarray
    unlabelled_images: np.ndarray
    gallery_images: np.ndarray
    gallery_labels: np.ndarray
    query_images: np.ndarray
    query_labels: np.ndarray
    class_names: list
    source: str
    labelled_index: np.ndarray
    gallery_index: np.ndarray
    query_index: np.ndarray
    identity: bytes | None = None
    files: list | None = None

    def parts(self):
        """All images, each once: (images, labels, index) of the gallery, of the labelled and of the queries."""
        return (
            (self.gallery_images, self.gallery_labels, self.gallery_index),
            (self.labelled_images, self.labelled_labels, self.labelled_index),
            (self.query_images, self.query_labels, self.query_index),
        )

    @property
    def image_shape(self):
        """(height, width, channels) of all images."""
        return self.query_images.shape[1:]

    def fingerprint(self):
        """sha256 of the images and labels that training sees: a resumed run must see the same.

        With an identity the pixels are not looked at: of image folders it holds the files' sizes in bytes.
        """
        digest = hashlib.sha256(self.identity or b"")
        pixels = (self.labelled_images, self.labelled_labels, self.unlabelled_images)
        stand_in = (self.labelled_index, self.labelled_labels, self.gallery_index)
        for array in pixels if self.identity is None else stand_in:
            digest.update(np.ascontiguousarray(array))
        return digest.hexdigest()


def split(images, labels, class_names, source, legacy=False):
    """Split as the original program does.

    Order the N images by class; every 60th of that order, beginning with the first, is a query. Of what
    remains of each class, the first N // 120 are labelled and the others are the gallery, which is also the
    unlabelled set. CIFAR-10's 60,000 images give 1,000 queries, 5,000 labelled images and a gallery of
    54,000.

    Args:
        images: uint8 (N, H, W, 3), an array or lazy.LazyImages.
        labels: integers (N,), 0..C-1.
        class_names: sequence of C str.
        source: str, kept as `RetrievalData.source`.
        legacy: bool. False: the order is stable and a class ends where its label does. True: the order is
            numpy 1.16's (see `numpy116.argsort`) and the images that are no queries are cut into C equal
            parts.

    Returns:
        RetrievalData.

    Raises:
        ValueError: if shapes do not fit, a label is no class, or a class is too small to be split.

    Example:
        >>> images = np.zeros((600, 8, 8, 3), np.uint8)
        >>> data = split(images, np.arange(600) % 10, list("abcdefghij"), "nowhere")
        >>> len(data.query_index), len(data.labelled_index), len(data.gallery_index)
        (10, 50, 540)
    """
    images, labels = _checked(images, labels)
    labelled, gallery, query = split_index(labels, len(class_names), legacy)
    return _split_by(images, labels, class_names, source, labelled, gallery, query)


def train_test(images, labels, class_names, source, in_test):
    """Split as SPQ does: the test images are the queries, the training images the gallery; no label is seen.

    CIFAR-10 gives 10,000 queries and a gallery of 50,000, which is also what training sees, without labels.

    Args:
        images, labels, class_names, source: as for `split`.
        in_test: bool (N,), which images are test images.

    Returns:
        RetrievalData without labelled images; both parts in the order of `images`.

    Raises:
        ValueError: if shapes do not fit, a label is no class, or one of the parts is empty.

    Example:
        >>> images = np.zeros((6, 8, 8, 3), np.uint8)
        >>> data = train_test(images, np.zeros(6, int), ["a"], "nowhere", np.arange(6) > 3)
        >>> data.gallery_index.tolist(), data.query_index.tolist(), len(data.labelled_index)
        ([0, 1, 2, 3], [4, 5], 0)
    """
    images, labels = _checked(images, labels)
    _check_classes(labels, len(class_names))
    in_test = np.asarray(in_test)
    if in_test.dtype != bool or in_test.shape != labels.shape or in_test.all() or not in_test.any():
        raise ValueError(
            f"Invalid in_test. Expected bool ({len(labels)},), some true and some false. "
            f"Received: {in_test.dtype} {in_test.shape}, {np.count_nonzero(in_test)} true"
        )
    nothing = np.empty(0, np.int64)
    parts = (nothing, np.flatnonzero(~in_test), np.flatnonzero(in_test))
    return _split_by(images, labels, class_names, source, *parts)


def check_name(split):
    """Refuse what is no protocol's name (ValueError)."""
    if split not in PROTOCOLS:
        raise ValueError(f"Invalid split. Expected one of {', '.join(PROTOCOLS)}. Received: split={split!r}")


def _checked(images, labels):
    images, labels = images if isinstance(images, lazy.LazyImages) else np.asarray(images), np.asarray(labels)
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3:
        raise ValueError(f"Invalid images. Expected uint8 (N, H, W, 3). Received: {images.dtype} {images.shape}")
    if labels.dtype.kind not in "iu" or labels.shape != images.shape[:1]:
        raise ValueError(f"Invalid labels. Expected integers ({len(images)},). Received: {labels.dtype} {labels.shape}")
    return images, labels.astype(np.int64)


def _split_by(images, labels, class_names, source, labelled, gallery, query):
    gallery_images = lazy.take(images, gallery)
    return RetrievalData(
        labelled_images=lazy.take(images, labelled),
        labelled_labels=labels[labelled],
        unlabelled_images=gallery_images,
        gallery_images=gallery_images,
        gallery_labels=labels[gallery],
        query_images=lazy.take(images, query),
        query_labels=labels[query],
        class_names=list(class_names),
        source=source,
        labelled_index=labelled,
        gallery_index=gallery,
        query_index=query,
    )


def split_index(labels, n_classes, legacy=False):
    """The rule of `split` on labels alone: int64 (N,) -> indices (labelled, gallery, query), int64 each."""
    _check_classes(labels, n_classes)
    n_labelled = len(labels) // LABELLED_SHARE
    order = np.array(numpy116.argsort(labels.tolist())) if legacy else np.argsort(labels, kind="stable")
    is_query = np.arange(len(order)) % QUERY_STEP == 0
    rest = order[~is_query]
    if legacy:
        if len(rest) % n_classes:
            raise ValueError(
                f"Invalid legacy split. Expected {n_classes} equal parts of the images that are no queries. "
                f"Received: {len(rest)} such images of {len(labels)}"
            )
        parts = np.split(rest, n_classes)
    else:
        parts = np.split(rest, np.searchsorted(labels[rest], np.arange(1, n_classes)))
    for i, part in enumerate(parts):
        if not 0 < n_labelled < len(part):
            raise ValueError(
                f"Invalid labels. Expected at least {LABELLED_SHARE} images, and of every class, without the "
                f"queries, more than the {n_labelled} to be labelled. "
                f"Received: {len(labels)} images, {len(part)} of class {i}"
            )
    labelled = np.concatenate([part[:n_labelled] for part in parts])
    gallery = np.concatenate([part[n_labelled:] for part in parts])
    return labelled, gallery, order[is_query]


def _check_classes(labels, n_classes):
    if len(labels) and not 0 <= labels.min() <= labels.max() < n_classes:
        raise ValueError(f"Invalid labels. Expected 0..{n_classes - 1}. Received: {labels.min()}..{labels.max()}")
