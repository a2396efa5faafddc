"""Which images a training batch of metric learning consists of."""

import numpy as np


def class_balanced_batch(labels, n_classes_per_batch, n_images_per_class, rng):
    """Draw P classes, and K images of each.

    Classes are drawn without replacement, all with the same probability, and so are the images of a class, as long as
    it has K; one that has fewer gives all of them, in turn, until there are K.

    Args:
        labels: integers (N,), >= 0.
        n_classes_per_batch: int P > 0.
        n_images_per_class: int K > 0.
        rng: numpy.random.Generator, such as `augment.generator(seed, step, stream)`: then the batch is a function of
            these.

    Returns:
        int64 (P * K,), positions in `labels`: K of one class, K of the next, ...

    Raises:
        ValueError: if there are fewer than P classes, or P or K is not positive.

    Example:
        >>> labels = np.array([0, 1, 2, 0, 1, 0])
        >>> batch = class_balanced_batch(labels, 2, 3, np.random.default_rng(0))
        >>> batch.shape, len(set(labels[batch[:3]])), len(set(labels[batch[3:]]))
        ((6,), 1, 1)
    """
    counts = np.bincount(labels)
    classes = np.flatnonzero(counts)
    if not 0 < n_classes_per_batch <= len(classes):
        raise ValueError(
            f"Invalid n_classes_per_batch. Expected 1 to {len(classes)}, the classes that have images. "
            f"Received: n_classes_per_batch={n_classes_per_batch}"
        )
    if n_images_per_class < 1:
        raise ValueError(
            "Invalid n_images_per_class. Expected a positive integer. "
            f"Received: n_images_per_class={n_images_per_class}"
        )
    chosen = rng.choice(classes, n_classes_per_batch, replace=False)
    place = np.full(len(counts), -1)
    place[chosen] = np.arange(n_classes_per_batch)
    # members: the images of the chosen classes, class by class, shuffled inside each
    members = rng.permutation(np.flatnonzero(place[labels] >= 0))
    members = members[np.argsort(place[labels[members]], kind="stable")]
    # batch[p, k] = members[start[p] + k % size[p]]
    size = counts[chosen][:, None]
    start = np.cumsum(size)[:, None] - size
    return members[start + np.arange(n_images_per_class) % size].ravel()
