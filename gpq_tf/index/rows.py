"""Arrays that grow at the end, while whoever holds an earlier one keeps it unchanged."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

# Room to grow, as a share of what is there: each row is copied five times at most on average, however small the
# pieces that are added, and no more than a quarter of the memory lies unused.
_SPARE = 4


class _Room:
    """Memory shared by successive `Rows`: the first `used` rows of `array` are written and never written again."""

    def __init__(self, array, used):
        self.array, self.used = array, used


@dataclass(frozen=True)
class Rows:
    """An array (n, ...) that is never changed; `appended` makes a longer one, in the same memory where there is room.

    Attributes:
        array: read-only.
        room: _Room that it lies in, or None: the array of a file, or an array without room behind it.
    """

    array: np.ndarray
    room: _Room | None = None

    @classmethod
    def of(cls, array):
        """Take `array`, which nobody else writes to."""
        return cls(read_only(array[:]))

    def __len__(self):
        return len(self.array)

    def __reduce__(self):
        return Rows.of, (self.array,)  # the room stays behind when rows are sent to another process

    @property
    def nbytes(self):
        """int, bytes of memory, the room to grow included."""
        return self.array.nbytes if self.room is None else self.room.array.nbytes

    def appended(self, more):
        """These rows and `more` behind them."""
        n, size, room = len(self.array), len(self.array) + len(more), self.room
        # Somebody else has grown into the room: an older Rows may be appended to as well.
        if room is None or room.used != n or size > len(room.array):
            room = _Room(_copied(self.array, max(size, n + n // _SPARE)), n)
        room.array[n:size] = more
        room.used = size
        return Rows(read_only(room.array[:size]), room)

    def kept(self, keep):
        """The rows where `keep`, bool (n,), is True, in their order."""
        if self.array.ndim == 1:
            return Rows.of(self.array[keep])
        # Rows taken as single items of so many bytes: five times as fast.
        items = self.array.view(np.dtype((np.void, self.array.itemsize * self.array.shape[1])))[:, 0][keep]
        return Rows.of(items.view(self.array.dtype).reshape(-1, self.array.shape[1]))


@dataclass(frozen=True)
class Texts(Sequence):
    """A sequence of str, kept as their UTF-8 bytes end to end: 8 bytes each and no Python object.

    Attributes:
        utf8: Rows of uint8.
        ends: Rows of int64 (n,), where each text ends in `utf8`; it begins where the one before ends.
    """

    utf8: Rows
    ends: Rows

    @classmethod
    def of(cls, encoded):
        """Take a list of bytes."""
        empty = cls(Rows.of(np.empty(0, np.uint8)), Rows.of(np.empty(0, np.int64)))
        return empty.appended(encoded)

    def __len__(self):
        return len(self.ends)

    def __getitem__(self, which):
        if isinstance(which, slice):
            return [self[i] for i in range(*which.indices(len(self)))]
        i = range(len(self))[which]  # IndexError, negative numbers and NumPy's integers as in a list
        begin = self.ends.array[i - 1] if i else 0
        return self.utf8.array[begin : self.ends.array[i]].tobytes().decode("utf-8", "surrogateescape")

    @property
    def nbytes(self):
        """int, bytes of memory."""
        return self.utf8.nbytes + self.ends.nbytes

    def appended(self, encoded):
        """These texts and a list of bytes behind them."""
        ends = len(self.utf8) + np.cumsum([len(text) for text in encoded], dtype=np.int64)
        return Texts(self.utf8.appended(np.frombuffer(b"".join(encoded), np.uint8)), self.ends.appended(ends))

    def kept(self, keep):
        """The texts where `keep`, bool (n,), is True."""
        lengths = np.diff(self.ends.array, prepend=0)
        ends = np.cumsum(lengths[keep], dtype=np.int64)
        return Texts(self.utf8.kept(np.repeat(keep, lengths)), Rows.of(ends))


def read_only(view):
    """`view`, which can no longer be written to."""
    view.setflags(write=False)
    return view


def _copied(array, length):
    copied = np.empty((length, *array.shape[1:]), array.dtype)
    copied[: len(array)] = array
    return copied
