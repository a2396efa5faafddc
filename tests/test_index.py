"""PQIndex: distances bit for bit, order to the last tie, ids, growth and removal, refusals."""

import hypothesis.extra.numpy as arrays
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import gpq_tf.index.rows
import gpq_tf.index.snapshot
from gpq_tf.index import METRICS, PQIndex, distance_table, stable_argsort
from tests import golden


def entry(q, c, metric):
    """What one codeword adds to the distance, by a plain loop over the components."""
    if metric == "inner_product":
        return 1.0 - sum(float(a) * float(b) for a, b in zip(q, c, strict=True))
    squared = sum((float(b) - float(a)) ** 2 for a, b in zip(q, c, strict=True))
    return squared if metric == "squared_l2" else np.sqrt(squared)


def oracle(codebook, metric, codes, ids, query, k):
    """The k nearest: float32 sums of the table's entries in the order of the books, sorted stably."""
    parts = query.reshape(len(codebook), -1)
    table = [[np.float32(entry(parts[j], c, metric)) for c in book] for j, book in enumerate(codebook)]
    distances = np.zeros(len(codes), np.float32)
    for j in range(len(codebook)):
        distances += np.array(table[j], np.float32)[codes[:, j]]
    order = np.argsort(distances, kind="stable")[:k]
    missing = k - len(order)
    return np.append(distances[order], [np.float32(np.inf)] * missing), np.append(ids[order], [-1] * missing)


def random_index(rng, M=3, K=4, d=2, n=50, metric="inner_product"):
    index = PQIndex(rng.standard_normal((M, K, d)), metric)
    index.add(rng.integers(0, K, (n, M)))
    return index


def random_queries(rng, index, n):
    return rng.standard_normal((n, index.M * index.d)).astype(np.float32)


@settings(derandomize=True, deadline=None, max_examples=150)
@given(data=st.data())
def test_search_equals_the_oracle(data):
    M, d = data.draw(st.integers(1, 5), "M"), data.draw(st.integers(1, 4), "d")
    K = data.draw(st.integers(2, 6) | st.sampled_from([16, 17, 300]), "K")
    metric = data.draw(st.sampled_from(METRICS), "metric")
    k = data.draw(st.integers(1, 60), "k")
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32), "seed"))
    # Small whole numbers make many different codes equally far; real ones make every rounding count.
    draw = rng.standard_normal if data.draw(st.booleans(), "real") else lambda s: rng.integers(-1, 2, s)
    codebook, queries = draw((M, K, d)).astype(np.float32), draw((3, M * d)).astype(np.float32)

    index = PQIndex(codebook, metric)
    codes, ids, largest = np.empty((0, M), int), np.empty(0, int), -1
    for _ in range(data.draw(st.integers(0, 4), "changes")):
        n = data.draw(st.integers(0, 20), "n")
        added = rng.integers(0, K, (n, M))
        explicit = rng.permutation(np.setdiff1d(np.arange(-50, 100), [*ids, -1]))[:n]
        new_ids = explicit if data.draw(st.booleans(), "explicit") else largest + 1 + np.arange(n)
        index.add(added, ids=new_ids if new_ids is explicit else None)
        codes, ids = np.concatenate([codes, added]), np.concatenate([ids, new_ids])
        largest = max([largest, *new_ids])
        removed = ids[rng.random(len(ids)) < 0.2]
        index.remove(rng.permutation(removed))
        codes, ids = codes[~np.isin(ids, removed)], ids[~np.isin(ids, removed)]

    assert len(index) == len(ids)
    np.testing.assert_array_equal(index.codes, codes)
    np.testing.assert_array_equal(index.ids, ids)
    distances, found = index.search(queries, k)
    assert (distances.dtype, found.dtype) == (np.float32, np.int64)
    for row, query in enumerate(queries):
        expected_distances, expected_ids = oracle(codebook, metric, codes, ids, query, k)
        np.testing.assert_array_equal(distances[row], expected_distances)
        np.testing.assert_array_equal(found[row], expected_ids)


@pytest.mark.parametrize("metric", METRICS)
def test_the_answer_does_not_depend_on_batches_chunks_or_company(metric, monkeypatch):
    rng = np.random.default_rng(0)
    index = random_index(rng, M=5, K=7, d=3, n=400, metric=metric)
    queries = random_queries(rng, index, 70)
    distances, ids = index.search(queries, 100)
    for row, query in enumerate(queries):
        alone_distances, alone_ids = index.search(query[None], 100)
        np.testing.assert_array_equal(alone_distances[0], distances[row])
        np.testing.assert_array_equal(alone_ids[0], ids[row])
    monkeypatch.setattr(gpq_tf.index.snapshot, "_BLOCK_QUERIES", 9)
    monkeypatch.setattr(gpq_tf.index.snapshot, "_CHUNK_ENTRIES", 70)
    np.testing.assert_array_equal(index.search(queries, 100)[0], distances)
    monkeypatch.setattr(gpq_tf.index.snapshot, "_BLOCK_ENTRIES", 10)
    np.testing.assert_array_equal(index.search(queries, 100)[1], ids)


def test_equal_codes_have_bit_equal_distances_in_insertion_order():
    rng = np.random.default_rng(1)
    index = random_index(rng, n=0)
    kinds = rng.integers(0, index.K, (6, index.M))
    which = rng.integers(0, 6, 300)
    index.add(kinds[which])
    distances, ids = index.search(random_queries(rng, index, 4), 300)
    for row in range(4):
        for kind in range(6):
            places = np.flatnonzero(which[ids[row]] == kind)
            assert len(np.unique(distances[row, places])) == 1
            assert (np.diff(ids[row, places]) > 0).all()


def test_a_query_equally_far_from_everything_returns_insertion_order():
    index = random_index(np.random.default_rng(2), n=300)
    distances, ids = index.search(np.zeros((1, 6)), 40)
    np.testing.assert_array_equal(distances, np.full((1, 40), 3.0))
    np.testing.assert_array_equal(ids, [np.arange(40)])


def test_blocks_stay_small_and_in_order(monkeypatch):
    monkeypatch.setattr(gpq_tf.index.snapshot, "_BLOCK_ENTRIES", 400)
    rng = np.random.default_rng(3)
    index = random_index(rng, n=500)
    queries = random_queries(rng, index, 100)
    snapshot = index.snapshot()
    shapes = snapshot.map_distances(lambda rows, distances: (rows.start, rows.stop, distances.size), queries)
    assert [stop for _, stop, _ in shapes[:-1]] == [start for start, _, _ in shapes[1:]]
    assert (shapes[0][0], shapes[-1][1]) == (0, 100)
    assert len(shapes) > 1
    assert max(size for _, _, size in shapes) <= 400


def test_snapshot_groups_equal_codes():
    index = random_index(np.random.default_rng(4), M=2, K=3, n=40)
    snapshot = index.snapshot()
    np.testing.assert_array_equal(snapshot.distinct.T, np.unique(index.codes, axis=0))
    np.testing.assert_array_equal(snapshot.distinct.T[snapshot.inverse], index.codes)
    for u in range(snapshot.distinct.shape[1]):
        members = snapshot.members[snapshot.starts[u] : snapshot.starts[u + 1]]
        np.testing.assert_array_equal(members, np.flatnonzero(snapshot.inverse == u))
    assert index.snapshot() is snapshot
    index.add([[0, 0]])
    assert len(index.snapshot().inverse) == 41


def test_empty_index_finds_nothing():
    index = random_index(np.random.default_rng(5), n=0)
    distances, ids = index.search(np.zeros((2, 6)), 3)
    np.testing.assert_array_equal(distances, np.full((2, 3), np.inf))
    np.testing.assert_array_equal(ids, np.full((2, 3), -1))


def test_no_queries_give_no_rows():
    distances, ids = random_index(np.random.default_rng(6)).search(np.empty((0, 6)), 3)
    assert distances.shape == ids.shape == (0, 3)


@pytest.mark.parametrize(
    ("K", "dtype"),
    [(2, "uint8"), (16, "uint8"), (17, "uint8"), (256, "uint8"), (257, "uint16"), (65536, "uint16")],
)
def test_codes_are_kept_in_the_smallest_unsigned_type(K, dtype):
    index = PQIndex(np.zeros((1, K, 1)))
    index.add([[K - 1]])
    assert index.codes.dtype == dtype
    assert index.codes[0, 0] == K - 1


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "int32", "int64", "uint64"])
def test_any_integer_type_is_taken(dtype):
    index = PQIndex(np.zeros((2, 100, 1)))
    index.add(np.array([[99, 0]], dtype))
    np.testing.assert_array_equal(index.codes, [[99, 0]])


def test_properties():
    codebook = np.arange(24.0).reshape(2, 3, 4)
    index = PQIndex(codebook, "l2")
    assert (index.M, index.K, index.d, index.metric) == (2, 3, 4, "l2")
    np.testing.assert_array_equal(index.codebook, codebook)
    codebook[:] = 0
    assert index.codebook[1, 2, 3] == 23
    for array in (index.codebook, index.codes, index.ids):
        assert not array.flags.writeable


def test_what_was_handed_out_does_not_change():
    index = random_index(np.random.default_rng(7), n=5)
    codes, ids, before = index.codes, index.ids, index.codes.copy()
    index.add(np.zeros((1, 3), int))
    index.remove([0, 2])
    index.add(np.ones((20, 3), int))
    np.testing.assert_array_equal(codes, before)
    np.testing.assert_array_equal(ids, np.arange(5))


def test_adding_one_by_one_copies_little(monkeypatch):
    moved = []
    copied = gpq_tf.index.rows._copied
    monkeypatch.setattr(gpq_tf.index.rows, "_copied", lambda array, n: moved.append(len(array)) or copied(array, n))
    index = PQIndex(np.zeros((1, 2, 1)))
    index.add([[0]], ids=[-7])  # ids that are not consecutive
    for i in range(1, 1000):
        index.add([[i % 2]])
    np.testing.assert_array_equal(index.codes[:, 0], np.arange(1000) % 2)
    assert sum(moved) < 2 * 5 * 1000  # codes and ids


def test_implicit_ids_count_on_from_the_largest_ever_given():
    index = PQIndex(np.zeros((1, 2, 1)))
    index.add([[0], [1]])
    index.add([[0]], ids=[40])
    index.add([[1]], ids=[7])
    index.remove([40])
    index.add([[0], [0]])
    np.testing.assert_array_equal(index.ids, [0, 1, 7, 41, 42])
    index.add([[1]], ids=[40])  # free again
    np.testing.assert_array_equal(index.ids, [0, 1, 7, 41, 42, 40])


def test_empty_changes_change_nothing():
    index = PQIndex(np.zeros((1, 2, 1)))
    index.add(np.empty((0, 1), int))
    index.add(np.empty((0, 1), int), ids=[])
    index.remove([])
    assert len(index) == 0


@pytest.mark.parametrize(
    ("codes", "ids", "message"),
    [
        ([[0, 1, 2, 3]], None, r"Invalid codes. Expected shape (n, M=3). Received: shape (1, 4)"),
        ([0, 1, 2], None, r"Invalid codes. Expected shape (n, M=3). Received: shape (3,)"),
        ([[0.0, 1.0, 2.0]], None, r"Invalid codes. Expected integers. Received: dtype float64"),
        ([[True, False, True]], None, r"Invalid codes. Expected integers. Received: dtype bool"),
        (
            [[0, 0, 0], [0, 4, 0]],
            None,
            "Invalid codes. Expected values in [0, K=4). Received: 4 in row 1, book 1",
        ),
        ([[0, 0, -1]], None, r"Invalid codes. Expected values in [0, K=4). Received: -1 in row 0, book 2"),
        ([[0, 0, 0]], [[5]], r"Invalid ids. Expected shape (n,). Received: shape (1, 1)"),
        ([[0, 0, 0]], [5, 6], r"Invalid ids. Expected one for each of 1 codes. Received: 2"),
        ([[0, 0, 0]] * 2, [5, 5], r"Invalid ids. Expected unique ids. Received: 5 twice"),
        ([[0, 0, 0]] * 2, [5, 1], r"Invalid ids. Expected new ids. Received: 1, which is in the index"),
        (
            [[0, 0, 0]],
            [-1],
            r"Invalid ids. Expected ids other than -1, the mark of nothing found. Received: -1",
        ),
        ([[0, 0, 0]], [2**63], r"Invalid ids. Expected int64. Received: 9223372036854775808"),
        ([[0, 0, 0]], [0.5], r"Invalid ids. Expected integers. Received: dtype float64"),
    ],
)
def test_add_refuses_and_adds_nothing(codes, ids, message):
    index = random_index(np.random.default_rng(8), n=2)
    with pytest.raises(ValueError) as error:
        index.add(codes, ids)
    assert str(error.value) == message
    np.testing.assert_array_equal(index.ids, [0, 1])


def test_implicit_ids_end_where_int64_ends():
    index = PQIndex(np.zeros((1, 2, 1)))
    index.add([[0]], ids=[2**63 - 1])
    with pytest.raises(ValueError, match=r"Expected explicit ids. Received: None after the id 9223372036854775807"):
        index.add([[0]])


def test_remove_refuses_unknown_ids_and_removes_nothing():
    index = random_index(np.random.default_rng(9), n=5)
    with pytest.raises(ValueError, match=r"Invalid ids. Expected ids in the index. Received: unknown id 5"):
        index.remove([1, 5])
    assert len(index) == 5


@pytest.mark.parametrize(
    ("queries", "k", "message"),
    [
        (np.zeros(6), 1, "Invalid queries. Expected shape (Q, D=6). Received: shape (6,)"),
        (np.zeros((1, 5)), 1, "Invalid queries. Expected shape (Q, D=6). Received: shape (1, 5)"),
        (
            [[0.0] * 6, [0.0, np.nan, 0, 0, 0, 0]],
            1,
            "Expected finite values. Received: NaN or infinity in row 1",
        ),
        ([[np.inf] * 6], 1, "Invalid queries. Expected finite values. Received: NaN or infinity in row 0"),
        ([[1e300] * 6], 1, "Invalid queries. Expected finite values. Received: NaN or infinity in row 0"),
        (np.zeros((1, 6)), 0, "Invalid k. Expected a positive integer. Received: k=0"),
        (np.zeros((1, 6)), 1.0, "Invalid k. Expected a positive integer. Received: k=1.0"),
        (np.zeros((1, 6)), True, "Invalid k. Expected a positive integer. Received: k=True"),
    ],
)
def test_search_refuses(queries, k, message):
    with pytest.raises(ValueError) as error:
        random_index(np.random.default_rng(10)).search(queries, k)
    assert str(error.value).endswith(message)


def test_search_refuses_what_overflows_and_names_the_row():
    index = random_index(np.random.default_rng(11), metric="squared_l2")
    queries = np.zeros((130, 6), np.float32)
    queries[101] = 1e25
    with pytest.raises(ValueError, match=r"Expected distances that fit float32. Received: larger in row 101$"):
        index.search(queries, 1)


@pytest.mark.parametrize(
    ("codebook", "metric", "message"),
    [
        (np.zeros((257, 2, 1)), "l2", "M up to 256 and K from 2 to 65536. Received: shape (257, 2, 1)"),
        (np.zeros((1, 1, 1)), "l2", "M up to 256 and K from 2 to 65536. Received: shape (1, 1, 1)"),
        (np.zeros((1, 65_537, 1)), "l2", "M up to 256 and K from 2 to 65536. Received: shape (1, 65537, 1)"),
        (np.zeros((2, 3)), "l2", r"Expected a non-empty array of shape (M, K, d). Received: shape (2, 3)"),
        (
            np.zeros((2, 0, 3)),
            "l2",
            r"Expected a non-empty array of shape (M, K, d). Received: shape (2, 0, 3)",
        ),
        ([[[0.0], [np.nan]]], "l2", "Expected finite values. Received: NaN or infinity in book 0, word 1"),
        (
            np.zeros((1, 1, 1)),
            "cosine",
            "Invalid metric. Expected one of inner_product, l2, squared_l2. Received: metric='cosine'",
        ),
    ],
)
def test_a_wrong_index_is_refused(codebook, metric, message):
    with pytest.raises(ValueError) as error:
        PQIndex(codebook, metric)
    assert str(error.value).endswith(message)


@pytest.mark.parametrize("metric", METRICS)
def test_distance_table_equals_the_loop(metric):
    rng = np.random.default_rng(12)
    codebook = rng.standard_normal((3, 4, 5)).astype(np.float32)
    queries = rng.standard_normal((2, 15)).astype(np.float32)
    table = distance_table(queries, codebook, metric)
    assert table.dtype == np.float32
    for (j, k, q), value in np.ndenumerate(table):
        assert value == np.float32(entry(queries[q].reshape(3, 5)[j], codebook[j, k], metric))


def test_l2_between_equal_vectors_is_exactly_zero():
    rng = np.random.default_rng(13)
    codebook = rng.standard_normal((4, 8, 3)).astype(np.float32)
    codes = rng.integers(0, 8, (20, 4))
    for metric in ("l2", "squared_l2"):
        index = PQIndex(codebook, metric)
        index.add(codes)
        decoded = codebook[np.arange(4), codes].reshape(20, 12)
        assert (index.search(decoded, 1)[0] == 0).all()


@settings(derandomize=True, deadline=None)
@given(
    arrays.arrays(
        np.float32,
        st.integers(0, 200),
        # x + 0.0 is what makes a 0.0 of a -0.0
        elements=st.floats(width=32, allow_nan=False).map(lambda x: x + 0.0) | st.sampled_from([-1.0, 0.0, 1.5]),
    )
)
def test_stable_argsort(values):
    np.testing.assert_array_equal(stable_argsort(values), np.argsort(values, kind="stable"))


@golden.needs_golden
@pytest.mark.parametrize("configuration", ["b12_k16_d12", "b8_k64_d8"])
def test_golden_distances_and_ranks(configuration):
    stored = golden.load("retrieval.npz")
    get = {name.split("/")[1]: value for name, value in stored.items() if name.startswith(configuration)}
    n_book = get["codes"].shape[1]
    # The original scores with codebook and queries exactly as they are.
    index = PQIndex(get["Z"].reshape(len(get["Z"]), n_book, -1).transpose(1, 0, 2))
    index.add(get["codes"])
    distances, ids = index.search(get["query"], len(index))
    assert golden.worst(distances, np.take_along_axis(get["dist"], ids, axis=1)) < 3e-7
    np.testing.assert_array_equal(ids[:, :200], get["rank200_stable"].T)
    # Where no other distance is equal, the original's unstable sort had no choice either.
    in_order = np.sort(get["dist"], axis=1)
    apart = np.diff(in_order, axis=1, prepend=-np.inf, append=np.inf) > 1e-5
    alone = apart[:, :-1] & apart[:, 1:]
    assert alone.mean() > 0.5
    np.testing.assert_array_equal(ids[alone], get["rank_full"].T[alone])


@golden.needs_golden
@pytest.mark.parametrize("checkpoint", ["train", "demo"])
def test_golden_narrow_network(checkpoint):
    get = golden.load("narrow/forward.npz")
    index = PQIndex(get[f"{checkpoint}/Z"].reshape(16, 12, 12).transpose(1, 0, 2))
    index.add(get[f"{checkpoint}/codes"])
    distances, ids = index.search(get[f"{checkpoint}/feature"], 16)
    assert golden.worst(distances, np.take_along_axis(get[f"{checkpoint}/dist"], ids, axis=1)) < 3e-7
    np.testing.assert_array_equal(ids, get[f"{checkpoint}/rank_stable"].T)
