"""Ids: a range while they are consecutive, which takes no memory; int64 rows otherwise. And finding them again."""

import numpy as np

from gpq_tf.index.rows import Rows


def as_array(ids):
    """int64 (N,) of a range or Rows."""
    # Not np.arange(start, stop): a stop of 2**63 is no int64.
    return np.int64(ids.start) + np.arange(len(ids)) if isinstance(ids, range) else ids.array


def of_array(array):
    """A range where `array`, int64 (N,), counts up by one or is empty, else Rows."""
    if len(array) == 0:
        return range(0)
    if int(array[-1]) - int(array[0]) == len(array) - 1 and (np.diff(array) == 1).all():
        return range(int(array[0]), int(array[0]) + len(array))
    return Rows.of(array)


def taken_from(ids, positions):
    """The ids at `positions`, int64 of any shape, where -1, for none, stays what it is."""
    if len(ids) == 0 or (isinstance(ids, range) and ids.start == 0):
        return positions
    taken = np.int64(ids.start) + positions if isinstance(ids, range) else ids.array[positions]
    return np.where(positions < 0, np.int64(-1), taken)


def appended(ids, more):
    """A range or Rows, and int64 `more` behind it."""
    if len(ids) == 0:
        return of_array(more)
    if isinstance(ids, range):
        following = of_array(more)
        if isinstance(following, range) and following.start == ids.stop:
            return range(ids.start, following.stop)
        ids = Rows.of(as_array(ids))
    return ids.appended(more)


def kept(ids, keep):
    """The ids where `keep`, bool (N,), is True. What is left of a range by cutting at its ends is a range."""
    return of_array(as_array(ids)[keep])


def positions(ids, wanted):
    """Where each id is.

    A range answers at once; rows are all gone through.

    Args:
        ids: range or Rows.
        wanted: int64 (n,).

    Returns:
        intp (n,).

    Raises:
        ValueError: naming the first of `wanted` that is not there.
    """
    if isinstance(ids, range):
        known = (wanted >= ids.start) & (wanted < ids.stop)
        found = wanted[known] - ids.start
    else:
        places = np.flatnonzero(np.isin(ids.array, wanted))
        places = places[np.argsort(ids.array[places], kind="stable")]
        ordered = ids.array[places]
        known = in_sorted(wanted, ordered)
        found = places[np.searchsorted(ordered, wanted[known])]
    if not known.all():
        raise ValueError(f"Invalid ids. Expected ids in the index. Received: unknown id {wanted[known.argmin()]}")
    return found.astype(np.intp)


def in_sorted(values, ascending):
    """Which of `values` are among the `ascending` ones: bool like `values`."""
    if len(ascending) == 0:
        return np.zeros(len(values), bool)
    places = np.searchsorted(ascending, values)
    places[places == len(ascending)] = 0
    return ascending[places] == values


# Whether an id is taken is looked up in sorted runs, each at least twice as long as the next, so that there are few
# (the logarithmic method of Bentley and Saxe, 1980): adding n ids to N sorts those n and merges now and then, about
# n log N steps in all, instead of sorting N. They take 8 bytes an id and exist once they have been needed.


def runs_of(array):
    """The runs of int64 (N,); without a copy where it ascends."""
    return [array if (array[1:] > array[:-1]).all() else np.sort(array)]


def in_runs(runs, values):
    """Which of `values` are in a run."""
    found = np.zeros(len(values), bool)
    for run in runs:
        found |= in_sorted(values, run)
    return found


def runs_with(runs, more):
    """The runs after int64 `more` has been added."""
    runs, last = list(runs), np.sort(more)
    while runs and len(runs[-1]) < 2 * len(last):
        last = np.sort(np.concatenate([runs.pop(), last]), kind="stable")  # merges what is in order already
    return [*runs, last]


def runs_without(runs, fewer):
    """The runs after int64 `fewer` has been removed."""
    return [run[np.isin(run, fewer, invert=True)] for run in runs]
