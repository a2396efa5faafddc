"""What an index holds at one moment, in few bytes: packed codes, ids, and labels or paths of the codes."""

import functools
from dataclasses import dataclass, replace

import numpy as np

from gpq_tf.index import ids as id_rows
from gpq_tf.index.rows import Rows, Texts, read_only

PACKED_K = 16  # up to here two codewords share a byte
_CHUNK_CODES = 2**16  # unpacked at a time where all are looked at


@dataclass(frozen=True)
class Store:
    """N codes with what belongs to them. Nothing here is ever changed: `added` and `removed` make another store.

    Attributes:
        M: int, books.
        K: int, codewords a book.
        packed: Rows (N, W), the codes as `pack` makes them.
        ids: range, or Rows of int64 (N,).
        next_id: int, the id that counts on: above all ids ever given.
        labels: Rows of int32 (N,) or uint8 (N, C), or None.
        paths: Texts, N of them, or None.
        unchecked: str, the file that the codes lie in, when nobody looked at them as it was read, or None.
        removals: int, how often codes were removed: between two stores of an index with the same number lie additions
            alone, so that the codes of the shorter one are the first of the longer one.
    """

    M: int
    K: int
    packed: Rows
    ids: range | Rows
    next_id: int = 0
    labels: Rows | None = None
    paths: Texts | None = None
    unchecked: str | None = None
    removals: int = 0

    @classmethod
    def empty(cls, M, K):
        """No codes of M books of K codewords."""
        return cls(M, K, Rows.of(np.empty((0, packed_width(M, K)), packed_type(K))), range(0))

    def __len__(self):
        return len(self.packed)

    def codes(self):
        """A new array (N, M) in the smallest unsigned type for K - 1, or the stored one where nothing is packed."""
        return read_only(unpack(self.checked_rows(), self.M, self.K))

    def checked_rows(self):
        """The packed codes, (N, W); refused where they lie in a file that was not looked at and one is above K - 1."""
        if self._wrong_row is not None:
            found = self.packed.array[self._wrong_row].tolist()
            raise ValueError(
                f"Invalid index file {self.unchecked!r}. Expected codes below K={self.K}. Received: {found} (packed) "
                f"in row {self._wrong_row}"
            )
        return self.packed.array

    @functools.cached_property
    def _wrong_row(self):
        # Looked for once: the codes do not change. Two threads that come first may both look, and find the same.
        return None if self.unchecked is None else wrong_row(self.packed.array, self.M, self.K)

    def added(self, codes, ids, labels=None, paths=None):
        """This store and n codes behind it.

        Args:
            codes: integer (n, M), n at least 1, values in [0, K).
            ids: int64 (n,), none of them here.
            labels: as in the attributes, for the n codes; None exactly where this store has codes without labels.
            paths: list of n bytes, or None, likewise.
        """
        self.checked_rows()  # the first change copies what lies in a file: read anyway, and never asked about again
        packed = self.packed.appended(pack(codes, self.K))
        if labels is not None:
            labels = self.labels.appended(labels) if len(self) else Rows.of(labels)
        if paths is not None:
            paths = self.paths.appended(paths) if len(self) else Texts.of(paths)
        next_id = max(self.next_id, int(ids.max()) + 1)
        all_ids = id_rows.appended(self.ids, ids)
        return replace(self, packed=packed, ids=all_ids, next_id=next_id, labels=labels, paths=paths, unchecked=None)

    def removed(self, positions):
        """This store without the codes at `positions`, intp (n,), n at least 1; the rest keeps its order."""
        keep = np.ones(len(self), bool)
        keep[positions] = False
        some = bool(keep.any())
        self.checked_rows()
        return replace(
            self,
            packed=self.packed.kept(keep),
            ids=id_rows.kept(self.ids, keep),
            labels=self.labels.kept(keep) if some and self.labels is not None else None,
            paths=self.paths.kept(keep) if some and self.paths is not None else None,
            unchecked=None,
            removals=self.removals + 1,
        )


def packed_width(M, K):
    """int, elements of `packed_type` a code."""
    return (M + 1) // 2 if K <= PACKED_K else M


def packed_type(K):
    """The dtype of packed codes."""
    return np.min_scalar_type(K - 1)


def pack(codes, K):
    """Codes as they are kept: two codewords a byte up to K = 16, one an element above.

    The first of the two is in the low nibble, as in Faiss; with an odd number of books the last high nibble is 0.

    Args:
        codes: integer (n, M), values in [0, K).
        K: int.

    Returns:
        unsigned (n, W), in the smallest type for K - 1.

    Example:
        >>> pack(np.array([[1, 2, 15]]), K=16)
        array([[33, 15]], dtype=uint8)
    """
    if K > PACKED_K:
        return codes.astype(packed_type(K))
    packed = codes[:, 0::2].astype(np.uint8)
    packed[:, : codes.shape[1] // 2] |= codes[:, 1::2].astype(np.uint8) << 4
    return packed


def unpack(packed, M, K):
    """The inverse of `pack`, (n, M); the same memory where nothing is packed.

    Example:
        >>> unpack(np.array([[33, 15]], np.uint8), M=3, K=16)
        array([[ 1,  2, 15]], dtype=uint8)
    """
    if K > PACKED_K:
        return packed[:]
    codes = np.empty((len(packed), M), np.uint8)
    codes[:, 0::2] = packed & 15
    codes[:, 1::2] = packed[:, : M // 2] >> 4
    return codes


def wrong_row(packed, M, K):
    """The first row of packed codes that `pack` would not make, or None."""
    if np.iinfo(packed.dtype).max + 1 == K or (K == PACKED_K and M % 2 == 0):
        return None  # there is no wrong one
    for at in range(0, len(packed), _CHUNK_CODES):
        chunk = packed[at : at + _CHUNK_CODES]
        wrong = (unpack(chunk, M, K) >= K).any(axis=1)
        if K <= PACKED_K and M % 2:
            wrong |= chunk[:, -1] > 15
        if wrong.any():
            return at + int(wrong.argmax())
    return None
