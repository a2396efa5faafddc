import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from gpq_tf.data import numpy116
from tests import golden


@golden.needs_golden
def test_is_the_order_numpy_116_recorded():
    recorded = golden.load("data.npz")
    assert numpy116.argsort(recorded["labels"].tolist()) == recorded["argsort_numpy1166"].tolist()
    assert numpy116.argsort(recorded["big_labels"].tolist()) == recorded["big_argsort_numpy1166"].tolist()


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 700), st.integers(1, 256), st.integers(0, 2**32 - 1))
def test_is_the_order_numpy_still_gives_bytes(n, n_values, seed):
    # numpy 2 has no vectorised sort of 8-bit integers: they still go through the introsort of 1.16.
    values = np.random.default_rng(seed).integers(0, n_values, n).astype(np.uint8)
    assert numpy116.argsort(values.tolist()) == np.argsort(values).tolist()


def test_too_many_bad_partitions_end_in_heapsort(monkeypatch):
    values = _bad_for_median_of_three(250, n_distinct=60)
    sizes = []
    heapsort = numpy116.heapsort
    monkeypatch.setattr(numpy116, "heapsort", lambda v, indices: sizes.append(len(indices)) or heapsort(v, indices))
    assert numpy116.argsort(values) == np.argsort(np.array(values, np.uint8)).tolist()
    assert sizes == [220]  # 15 partitions that took off two values each


@given(st.lists(st.integers(0, 5), max_size=50))
def test_heapsort_sorts_what_it_is_given(values):
    indices = list(range(len(values)))[::-1]
    result = numpy116.heapsort(values, indices)
    assert sorted(result) == sorted(indices)
    assert [values[i] for i in result] == sorted(values)


def _bad_for_median_of_three(n, n_distinct):
    """McIlroy's adversary (A killer adversary for quicksort, 1999): values decided while they are compared.

    A value stays open, larger than all decided ones, until it is compared with another open one; then the
    likely pivot is decided to be the smallest still free. Open values that remain at the end are equal.
    """
    values = [n_distinct] * n
    decided = 0
    candidate = 0

    class Item:
        def __init__(self, index):
            self.index = index

        def __lt__(self, other):
            nonlocal decided, candidate
            x, y = self.index, other.index
            if values[x] == values[y] == n_distinct and decided < n_distinct:
                values[x if x == candidate else y] = decided
                decided += 1
            if values[x] == n_distinct:
                candidate = x
            elif values[y] == n_distinct:
                candidate = y
            return values[x] < values[y]

        def __ge__(self, other):
            return not self < other

    numpy116.argsort([Item(i) for i in range(n)])
    return values
