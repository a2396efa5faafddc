"""The expectation of average precision over all orders of equally far codes, in closed form."""

import numpy as np


class Harmonic:
    """Sums of reciprocals, 1 / (b + 1) + ... + 1 / (b + n), each to about the last bit.

    Args:
        n: int, largest b + n.

    Example:
        >>> between = Harmonic(10)
        >>> bool(between(2, 2) == 1 / 3 + 1 / 4)
        True
    """

    def __init__(self, n):
        reciprocals = 1 / np.arange(1, n + 1)
        self._high = np.concatenate([[0.0], np.cumsum(reciprocals)])
        # What rounding dropped from each partial sum, so that differences of large sums keep their digits.
        self._low = np.concatenate([[0.0], np.cumsum(reciprocals - np.diff(self._high))])

    def __call__(self, b, n):
        return (self._high[b + n] - self._high[b]) + (self._low[b + n] - self._low[b])


def expected_average_precision(sizes, hits, harmonic, top_n=None, n_relevant=None):
    """Mean of average precision over all orders within groups of equally far codes.

    A group of n codes, r of them relevant, follows b codes with h relevant ones. At its j-th place a relevant code
    stands with probability r / n, and then (j - 1)(r - 1) / (n - 1) others are expected before it in the group. So the
    group adds to the sum of precisions

        r / n * sum_j (h + 1 + (j - 1) a) / (b + j)  =  r / n * (n a + (h + 1 - a (b + 1)) (H(b + n) - H(b)))

    with a = (r - 1) / (n - 1) and H the harmonic numbers (after McSherry and Najork, ECIR 2008). Of the group that rank
    top_n cuts, the first m places count. Divided by all relevant codes, the sum merely ends at j = m. Divided by those
    found, the denominator is random too: x of the r fall on the m places with hypergeometric probability, given which
    they lie there as r lie in n; the expectation is the sum over x.

    Args:
        sizes: int (T,), codes in each group, nearest first.
        hits: int (T,), relevant ones among them.
        harmonic: Harmonic of at least sum(sizes).
        top_n: int >= 1, ranks that count; None means all.
        n_relevant: int, what to divide by; None for the relevant codes within top_n.

    Returns:
        float, in [0, 1]; 0 without a relevant code.

    Example:
        >>> one_of_two = expected_average_precision(np.array([2]), np.array([1]), Harmonic(2))
        >>> one_of_two == (1 / 1 + 1 / 2) / 2
        True
    """
    with_hits = np.flatnonzero(hits)
    before, found = (np.cumsum(sizes) - sizes)[with_hits], (np.cumsum(hits) - hits)[with_hits]
    sizes, hits = sizes[with_hits], hits[with_hits]
    places = sizes if top_n is None else np.clip(top_n - before, 0, sizes)
    if n_relevant is not None:
        total = np.sum(_expected_sum(places, hits, sizes, before, found, harmonic))
        return float(total / n_relevant) if n_relevant else 0.0
    n_whole = np.count_nonzero(places == sizes)  # the nearest groups; of at most one further, some places count
    nearest = slice(n_whole)
    total = np.sum(_expected_sum(places, hits, sizes, before, found, harmonic)[nearest])
    n_found = np.sum(hits[nearest])
    if n_whole == len(sizes) or places[n_whole] == 0:
        return float(total / n_found) if n_found else 0.0
    m = places[n_whole]
    x, probability = _hypergeometric(sizes[n_whole], hits[n_whole], m)
    totals = total + _expected_sum(m, x, m, before[n_whole], n_found, harmonic)
    return float(np.sum(probability * totals / np.maximum(n_found + x, 1)))  # without any, total is 0


def _expected_sum(m, r, n, b, h, harmonic):
    """What the first m of n places, after b places with h hits, add to the sum of precisions; r of the n are hits."""
    a = (r - 1) / np.maximum(n - 1, 1)
    return r / n * (m * a + (h + 1 - a * (b + 1)) * harmonic(b, m))


def _hypergeometric(n, r, m):
    """How many of r hits among n codes in random order stand on the first m places: numbers, their probabilities."""
    x = np.arange(max(0, m + r - n), min(m, r) + 1)
    at = x[:-1]
    # C(r, x) C(n - r, m - x) / C(n, m), from the ratio of each to the one before
    steps = np.log((r - at) / (at + 1)) + np.log((m - at) / (n - r - m + at + 1))
    logarithms = np.concatenate([[0.0], np.cumsum(steps)])
    weights = np.exp(logarithms - logarithms.max())
    return x, weights / weights.sum()
