"""Images that are made when they are asked for, where memory would not hold them all."""

import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np

_MEMORY = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 0  # not on Windows
# Pixels of a set that takes no more are held: a quarter of the machine's memory, and in any case 2 GiB.
LARGEST_IN_MEMORY = max(2 * 2**30, _MEMORY // 4)  # bytes


class LazyImages:
    """In place of an array uint8 (N, side, side, 3): images are made anew whenever they are asked for.

    Indexing by an integer, a slice or integers (n,) makes those images; `take` chooses among them without making any.

    Args:
        make: callable(int64 (n,)) -> uint8 (n, side, side, 3), the images at these positions.
        index: int64 (N,), the positions of these images.
        side: int, pixels.

    Example:
        >>> images = LazyImages(lambda index: np.zeros((len(index), 4, 4, 3), "uint8"), np.arange(9), 4)
        >>> images.shape, images[2:5].shape, images[0].shape, images.take(np.array([8, 1])).shape
        ((9, 4, 4, 3), (3, 4, 4, 3), (4, 4, 3), (2, 4, 4, 3))
    """

    dtype, ndim = np.dtype("uint8"), 4

    def __init__(self, make, index, side):
        self._make, self._index, self._side = make, index, side
        self.shape = (len(index), side, side, 3)

    def __len__(self):
        return len(self._index)

    def __getitem__(self, key):
        index = self._index[key]
        return self._make(index) if index.ndim else self._make(index[None])[0]

    def take(self, index):
        """The images at some places of these: integers (n,) or a slice -> LazyImages."""
        return LazyImages(self._make, self._index[index], self._side)


def images(n, side, make):
    """N images as an array where memory holds them, as `LazyImages` where it does not (`LARGEST_IN_MEMORY`).

    Args:
        n: int N.
        side, make: see `LazyImages`.

    Returns:
        numpy uint8 (N, side, side, 3), or LazyImages.
    """
    if are_held(n, side):
        return make(np.arange(n))
    return LazyImages(make, np.arange(n), side)


def are_held(n, side):
    """Whether memory holds the pixels of n images of this height and width."""
    return n * side**2 * 3 <= LARGEST_IN_MEMORY


def take(images, index):
    """Some of the images of an array or of LazyImages, as the same kind: integers (n,) or a slice."""
    return images.take(index) if isinstance(images, LazyImages) else images[index]


def ahead(make, keys):
    """`make(key)` of each key, in order: while one is used, a thread makes the next.

    Args:
        make: callable(key).
        keys: iterable.

    Example:
        >>> list(ahead(lambda number: number * 10, range(3)))
        [0, 10, 20]
    """
    with ThreadPoolExecutor(1) as thread:
        waiting = None
        for key in keys:
            made, waiting = waiting, thread.submit(make, key)
            if made is not None:
                yield made.result()
        if waiting is not None:
            yield waiting.result()
