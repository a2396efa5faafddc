"""Refusals that several metrics share."""

import numpy as np

TIES = ("stable", "expected")


def is_count(value):
    """Whether `value` is a positive integer."""
    return isinstance(value, int | np.integer) and not isinstance(value, bool) and value >= 1


def check_choice(name, value, choices):
    """ValueError unless `value` is one of `choices`."""
    if value not in choices:
        raise ValueError(f"Invalid {name}. Expected one of {', '.join(choices)}. Received: {name}={value!r}")


def checked_ranks(name, ranks):
    """int64 (n,), or ValueError unless all are positive integers and there is one."""
    ranks = list(ranks)
    if not ranks or not all(is_count(rank) and rank < 2**63 for rank in ranks):
        raise ValueError(f"Invalid {name}. Expected positive integers. Received: {name}={ranks!r}")
    return np.array(ranks, np.int64)


def checked_queries(index, queries):
    """float32 (Q, D) as the index compares them, or ValueError; at least one."""
    queries = index.checked_queries(queries)
    if len(queries) == 0:
        raise ValueError("Invalid queries. Expected at least one. Received: none")
    return queries
