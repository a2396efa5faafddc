"""Faiss beside PQIndex: handing over and back, the engine's fidelity to the exact search, inverted lists."""

import functools
from concurrent.futures import ThreadPoolExecutor

import faiss
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from gpq_tf.index import METRICS, PQIndex, distance_table
from gpq_tf.index.faiss_engine import FaissEngine, Lookup, from_faiss, packed_nibbles, to_faiss
from gpq_tf.index.inverted_lists import InvertedLists


def exact_distances(codebook, metric, codes, query):
    """float32 (N,): the sums of the distance table's entries, first book first."""
    table = distance_table(query[None], codebook, metric)[:, :, 0]
    total = table[0][codes[:, 0]]
    for book in range(1, len(table)):
        total = total + table[book][codes[:, book]]
    return total


def check_answer(codebook, metric, codes, queries, k, distances, positions):
    """Every returned distance is that of the code returned, in order, ties by position, and padded past the end.

    Returns:
        float, the share of places whose distance is the exact one.
    """
    assert (distances.dtype, positions.dtype) == (np.float32, np.int64)
    assert distances.shape == positions.shape == (len(queries), k)
    right = []
    for query, row, found in zip(queries, distances, positions, strict=True):
        true = exact_distances(codebook, metric, codes, query)
        n = np.count_nonzero(found >= 0)
        assert (found[n:] == -1).all() and np.isposinf(row[n:]).all()
        assert len(set(found[:n].tolist())) == n
        np.testing.assert_array_equal(row[:n], true[found[:n]])
        np.testing.assert_array_equal(np.lexsort((found[:n], row[:n])), np.arange(n))
        nearest = np.full(k, np.inf, np.float32)
        nearest[: min(k, len(true))] = np.sort(true)[:k]
        right.append(row == nearest)
    return np.mean(right)


@functools.cache
def structured(M, K, d, n, n_queries, seed=0, clusters=40):
    """A codebook that Faiss learned on clustered descriptors, their codes, and queries from the same clusters."""
    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((clusters, M * d))

    def draw(n):
        return (centres[rng.integers(0, clusters, n)] + 0.5 * rng.standard_normal((n, M * d))).astype(np.float32)

    quantizer = faiss.ProductQuantizer(M * d, M, K.bit_length() - 1)
    quantizer.cp.min_points_per_centroid = 1
    quantizer.train(draw(3000))
    codebook = faiss.vector_to_array(quantizer.centroids).reshape(M, K, d)
    packed = quantizer.compute_codes(draw(n))
    return codebook, faiss.unpack_bitstrings(packed, M, K.bit_length() - 1).astype(np.uint8), draw(n_queries)


# ---------------------------------------------------------------- to Faiss and back


@settings(derandomize=True, deadline=None, max_examples=60)
@given(data=st.data())
def test_there_and_back_through_a_file(data, tmp_path_factory):
    M, d, n = (data.draw(st.integers(low, high), name) for low, high, name in ((1, 7, "M"), (1, 5, "d"), (0, 40, "n")))
    n_bits = data.draw(st.sampled_from([1, 2, 3, 4, 5, 6, 8, 10, 12]), "n_bits")
    metric = data.draw(st.sampled_from(["inner_product", "squared_l2"]), "metric")
    K = 2**n_bits
    assume(d != 2 or K >= 8)
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32), "seed"))
    codebook = rng.standard_normal((M, K, d)).astype(np.float32)
    codes = rng.integers(0, K, (n, M)).astype(np.min_scalar_type(K - 1))
    ids = rng.permutation(10**12 + np.arange(n)) if data.draw(st.booleans(), "ids") else None
    packed = packed_nibbles(codes, M) if K == 16 and data.draw(st.booleans(), "packed") else codes

    path = str(tmp_path_factory.mktemp("faiss") / "index")
    faiss.write_index(to_faiss(codebook, metric, packed, ids), path)
    read = faiss.read_index(path)
    assert type(read) is (faiss.IndexPQ if ids is None else faiss.IndexIDMap2)
    back_codebook, back_metric, back_codes, back_ids = from_faiss(read)
    np.testing.assert_array_equal(back_codebook, codebook, strict=True)
    np.testing.assert_array_equal(back_codes, codes, strict=True)
    assert back_metric == metric
    assert (back_ids is None) == (ids is None)
    if ids is not None:
        np.testing.assert_array_equal(back_ids, ids, strict=True)

    if n:
        ours = PQIndex(codebook, metric)
        ours.add(codes, ids)
        queries = rng.standard_normal((2, M * d)).astype(np.float32)
        expected, expected_ids = ours.search(queries, n)
        values, found = read.search(queries, n)
        values = M - values if metric == "inner_product" else values
        np.testing.assert_allclose(values, expected, rtol=1e-5, atol=1e-5)
        # The order is equal but among distances that rounding cannot tell apart.
        places = np.argsort(expected_ids, axis=1)
        place_of = np.take_along_axis(places, _ranks(expected_ids, found), axis=1)
        np.testing.assert_allclose(np.take_along_axis(expected, place_of, axis=1), expected, rtol=1e-5, atol=1e-5)


def _ranks(among, values):
    return np.stack([np.searchsorted(np.sort(a), v) for a, v in zip(among, values, strict=True)])


def test_an_index_that_faiss_trained_gives_its_codes_and_its_answers():
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((2000, 24)).astype(np.float32)
    trained = faiss.IndexPQ(24, 6, 4)
    trained.train(vectors)
    trained.add(vectors)
    codebook, metric, codes, ids = from_faiss(trained)
    assert (codebook.shape, metric, ids) == ((6, 16, 4), "squared_l2", None)
    ours = PQIndex(codebook, metric)
    ours.add(codes)
    distances, positions = ours.search(vectors[:20], 1)
    theirs, _ = trained.search(vectors[:20], 1)
    np.testing.assert_allclose(distances, theirs, rtol=1e-5)
    decoded = codebook[np.arange(6), codes].reshape(-1, 24)
    np.testing.assert_allclose(((vectors[:20] - decoded[positions[:, 0]]) ** 2).sum(1), theirs[:, 0], rtol=1e-5)
    np.testing.assert_array_equal(decoded, trained.sa_decode(trained.sa_encode(vectors)))


def small(M=2, K=4, d=3, n=5, metric="squared_l2", ids=None):
    rng = np.random.default_rng(0)
    codebook = rng.standard_normal((M, K, d)).astype(np.float32)
    return codebook, metric, rng.integers(0, K, (n, M)).astype(np.uint8), ids


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            small(metric="l2"),
            "Invalid metric. Expected one of inner_product, squared_l2. Received: metric='l2', a sum of Euclidean "
            "distances over the books, which no Faiss index computes",
        ),
        (small(metric="cosine"), "Invalid metric. Expected one of inner_product, l2, squared_l2. Received: "),
        (small(K=10), "Invalid codebook. Expected K a power of two from 2 to 65536, as in Faiss. Received: K=10"),
        (small(K=1), "Invalid codebook. Expected shape (M, K, d) with M up to 256 and K from 2 to 65536. Received: "),
        (small(d=2), "Invalid codebook. Expected K from 8 up with d=2, for Faiss to search. Received: K=4"),
        (
            small(ids=np.arange(4)),
            "Invalid ids. Expected shape (N=5,). Received: shape (4,)",
        ),
        (
            (small(M=4)[0], "squared_l2", np.zeros((5, 3), np.uint8)),
            "Invalid codes. Expected unsigned integers of shape (N, M=4) or packed (N, 2). "
            "Received: uint8, shape (5, 3)",
        ),
        (
            (small(K=32)[0], "squared_l2", np.zeros((5, 1), np.uint8)),
            "Invalid codes. Expected unsigned integers of shape (N, M=2). Received: uint8, shape (5, 1)",
        ),
        (
            (np.zeros((3, 4)), "squared_l2", np.zeros((5, 3), np.uint8)),
            "Invalid codebook. Expected a non-empty array of shape (M, K, d). Received: shape (3, 4)",
        ),
    ],
)
def test_what_faiss_cannot_hold_is_refused(arguments, message):
    with pytest.raises(ValueError) as caught:
        to_faiss(*arguments)
    assert str(caught.value).startswith(message)


def trained(kind, *arguments):
    index = kind(*arguments)
    index.train(np.random.default_rng(0).standard_normal((600, index.d)).astype(np.float32))
    return index


def wrong_centroids():
    index = to_faiss(*small())
    faiss.copy_array_to_vector(np.zeros(7, np.float32), index.pq.centroids)
    return index


def wrong_codes():
    index = to_faiss(*small())
    index.ntotal = 10**9
    return index


def wrong_ids():
    index = to_faiss(*small(ids=np.arange(5)))
    faiss.copy_array_to_vector(np.arange(4), index.id_map)
    return index


KINDS = "Invalid index. Expected a faiss.IndexPQ, or an IndexIDMap2 around one. Received: "


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: faiss.IndexFlatL2(8), KINDS + "IndexFlatL2"),
        (lambda: trained(faiss.IndexPQFastScan, 8, 4, 4), KINDS + "IndexPQFastScan"),
        (lambda: faiss.IndexIDMap2(faiss.IndexFlatL2(8)), KINDS + "IndexIDMap2 around IndexFlatL2"),
        (lambda: faiss.IndexIDMap(faiss.IndexPQ(8, 4, 4)), KINDS + "IndexIDMap"),
        (lambda: faiss.IndexPQ(8, 4, 4), "Invalid index. Expected a trained one. Received: is_trained=False"),
        (
            lambda: trained(faiss.IndexPQ, 8, 4, 4, faiss.METRIC_L1),
            "Invalid index. Expected METRIC_INNER_PRODUCT or METRIC_L2. Received: metric_type=2, neither of them",
        ),
        (wrong_centroids, "Invalid index. Expected 24 values in pq.centroids. Received: 7"),
        (wrong_codes, "Invalid index. Expected 1000000000 values in codes. Received: 5"),
        (wrong_ids, "Invalid index. Expected 5 values in id_map. Received: 4"),
    ],
)
def test_other_faiss_indexes_are_refused_by_name(make, message):
    index = make()
    with pytest.raises(ValueError) as caught:
        from_faiss(index)
    assert str(caught.value).startswith(message)


# ---------------------------------------------------------------- the engine


@settings(derandomize=True, deadline=None, max_examples=120)
@given(data=st.data())
def test_the_engine_answers_as_the_oracle(data):
    M, d = data.draw(st.integers(1, 9), "M"), data.draw(st.integers(1, 4), "d")
    K = data.draw(st.sampled_from([2, 3, 9, 15, 16, 17, 40, 200, 256]), "K")
    metric = data.draw(st.sampled_from(METRICS), "metric")
    n, k = data.draw(st.sampled_from([0, 1, 30, 33, 400, 3000]), "n"), data.draw(st.integers(1, 60), "k")
    scale = data.draw(st.sampled_from([1.0, 1e-20, 1e8, 1e15]), "scale")
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32), "seed"))
    # Small whole numbers make many different codes equally far; real ones make every rounding count.
    draw = rng.standard_normal if data.draw(st.booleans(), "real") else lambda s: rng.integers(-1, 2, s)
    codebook, queries = draw((M, K, d)).astype(np.float32), (scale * draw((5, M * d))).astype(np.float32)
    distinct = rng.integers(0, K, (data.draw(st.sampled_from([1, 7, 10**4]), "distinct"), M)).astype(np.uint8)
    codes = distinct[rng.integers(0, len(distinct), n)]
    given_codes = packed_nibbles(codes, M) if K <= 16 and data.draw(st.booleans(), "packed") else codes

    engine = FaissEngine.of(codebook, metric, given_codes[: n // 3]).extended(given_codes)
    assert len(engine) == n
    distances, positions, proved = engine.search_with_proof(queries, k)
    share = check_answer(codebook, metric, codes, queries, k, distances, positions)
    assert share >= 0.999
    if proved.any():
        assert check_answer(codebook, metric, codes, queries[proved], k, distances[proved], positions[proved]) == 1


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(("M", "K"), [(12, 16), (5, 16), (8, 256)])
def test_distances_equal_the_exact_engines_at_999_of_1000_places(metric, M, K):
    codebook, codes, queries = structured(M, K, 6, 12_000, 60)
    exact = PQIndex(codebook, metric)
    exact.add(codes)
    distances, ids = exact.search(queries, 50)
    engine = FaissEngine.of(codebook, metric, codes)
    found_distances, found = engine.search(queries, 50)
    assert (found_distances == distances).mean() >= 0.999
    assert check_answer(codebook, metric, codes, queries, 50, found_distances, found) >= 0.999
    # Where all distances are right, other ids stand only at the last distance, of which some codes are left out.
    whole = (found_distances == distances).all(axis=1)
    other = (found != ids)[whole]
    assert (distances[whole][other] == np.broadcast_to(distances[whole, -1:], other.shape)[other]).all()


def test_the_second_look_finds_what_the_first_cannot_tell_apart():
    """Codes of nearly equal words beside far ones that no code names: one step of the first scan spans them all."""
    rng = np.random.default_rng(0)
    codebook = rng.standard_normal((8, 16, 4)).astype(np.float32)
    codebook[:, :8] = codebook[:, :1] + 1e-3 * rng.standard_normal((8, 8, 4))
    codes, queries = rng.integers(0, 8, (20_000, 8)).astype(np.uint8), codebook[None, :, 0].repeat(5, 0).reshape(5, -1)
    queries = queries + 1e-4 * rng.standard_normal(queries.shape).astype(np.float32)
    engine = FaissEngine.of(codebook, "l2", codes)
    k, table = 20, distance_table(queries, codebook, "l2")
    found, proved = (np.empty((5, k), np.float32), np.empty((5, k), np.int64)), np.ones(5, bool)
    engine._look(table, 3 * k + 32, *found, proved)
    assert not proved.any()
    assert check_answer(codebook, "l2", codes, queries, k, *found) < 0.9
    *found, proved = engine.search_with_proof(queries, k)
    assert proved.all()
    assert check_answer(codebook, "l2", codes, queries, k, *found) == 1


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("farthest", [None, 0.4])
def test_the_scan_is_off_by_half_a_step_a_book_at_most(metric, farthest):
    codebook, codes, queries = structured(11, 16, 6, 3000, 30)
    engine = FaissEngine.of(codebook, metric, codes)
    table = distance_table(queries, codebook, metric)
    if farthest is not None:
        smallest = np.stack([exact_distances(codebook, metric, codes, q) for q in queries]).min(axis=1)
        farthest = smallest + farthest * np.abs(smallest)
    lookup = Lookup.of(table, farthest)
    seen, found = engine.scans[0].search(lookup.query, 3000)
    seen = seen - lookup.constant[:, None]
    for row, query in enumerate(queries):
        true = (exact_distances(codebook, metric, codes[found[row]], query) - lookup.lowest[row]) / lookup.unit[row]
        error = np.abs(seen[row] - true)
        assert error[true <= 1].max(initial=0) < 11 * 0.501 / 255
        if farthest is None:
            assert error.max() < 11 * 0.501 / 255
        else:
            assert seen[row][true > 1].min(initial=np.inf) > 1 - 11 * 0.501 / 255


def test_thousands_of_equal_codes():
    codebook, codes, queries = structured(6, 16, 4, 6000, 20)
    codes = np.where(np.arange(6000)[:, None] % 2, codes, codes[0])
    for metric in METRICS:
        found = FaissEngine.of(codebook, metric, codes).search(queries, 30)
        assert check_answer(codebook, metric, codes, queries, 30, *found) >= 0.999


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("K", [2, 16, 200])
def test_codes_that_are_farthest_in_every_book_are_found_as_well(metric, K):
    """FastScan of inner products never returns them."""
    codebook = np.zeros((2, K, 1), np.float32)
    codebook[:, 0] = -1 if metric == "inner_product" else 9
    codes = np.zeros((5000, 2), np.uint8)
    codes[77] = 1
    queries = np.ones((1, 2), np.float32)
    lists = InvertedLists.of(codebook, metric, codes, n_lists=2)
    for found in (FaissEngine.of(codebook, metric, codes).search(queries, 3), lists.search(queries, 3, n_probe=2)):
        assert check_answer(codebook, metric, codes, queries, 3, *found) == 1
        assert found[1][0, 0] == 77 and (found[1] >= 0).all()


def test_codes_added_one_after_another():
    codebook, codes, queries = structured(5, 16, 4, 1500, 10)
    engine, sizes = FaissEngine.of(codebook, "l2", codes[:0]), []
    for n in [*range(1, 70), 500, 501, 900, 1500]:
        before, engine = engine, engine.extended(codes[:n])
        assert check_answer(codebook, "l2", codes[:n], queries, 9, *engine.search(queries, 9)) == 1
        sizes.append(len(engine.scans))
        assert sum(scan.ntotal for scan in engine.scans) == n
    assert max(sizes) <= 11
    assert sizes[62:65] == [6, 1, 2]  # 63, 64 and 65 codes: six structures, one, two
    np.testing.assert_array_equal(len(before), 900)
    with pytest.raises(ValueError, match=r"^Invalid codes\. Expected at least 1500\. Received: 3$"):
        engine.extended(codes[:3])


@pytest.mark.parametrize("kind", [FaissEngine, InvertedLists])
def test_nothing_to_search(kind):
    codebook, codes, queries = structured(3, 16, 4, 100, 2)
    search = {FaissEngine: {}, InvertedLists: {"n_probe": 2}}[kind]
    distances, positions = kind.of(codebook, "l2", codes[:0]).search(queries, 3, **search)
    assert np.isposinf(distances).all() and (positions == -1).all() and positions.shape == (2, 3)
    distances, positions = kind.of(codebook, "l2", codes).search(queries[:0], 3, **search)
    assert distances.shape == positions.shape == (0, 3)


@pytest.mark.parametrize("kind", [FaissEngine, InvertedLists])
def test_wrong_arguments_are_refused(kind):
    codebook, codes, queries = structured(3, 16, 4, 100, 600)
    search = {FaissEngine: {}, InvertedLists: {"n_probe": 2}}[kind]
    queries = np.concatenate([queries[:555], np.full((45, 12), 3e38, np.float32)])
    with pytest.raises(ValueError) as caught:
        kind.of(codebook, "inner_product", codes).search(queries, 3, **search)
    assert str(caught.value) == "Invalid queries. Expected distances that fit float32. Received: larger in row 555"
    name = {FaissEngine: "engine", InvertedLists: "lists"}[kind]
    with pytest.raises(ValueError) as caught:
        kind.of(np.zeros((2, 257, 3)), "l2", codes.astype(np.uint16))
    assert str(caught.value) == f"Invalid {name}. Expected K at most 256 for Faiss's scans. Received: K=257"
    with pytest.raises(ValueError, match=r"^Invalid metric\. Expected one of inner_product, l2, squared_l2\. Rec"):
        kind.of(codebook, "cosine", codes)


@pytest.mark.parametrize("kind", [FaissEngine, InvertedLists])
def test_threads_share_an_engine(kind):
    codebook, codes, queries = structured(12, 16, 6, 12_000, 60)
    engine = kind.of(codebook, "l2", codes)
    search = [{}] * 8 if kind is FaissEngine else [{"n_probe": n} for n in (1, 5, 2, 50) * 2]
    alone = [engine.search(queries[:9], 20, **arguments) for arguments in search]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda arguments: engine.search(queries[:9], 20, **arguments), search))
    for one, other in zip(alone, together, strict=True):
        np.testing.assert_array_equal(one[0], other[0])


def test_the_number_of_faiss_threads_is_left_alone():
    before = faiss.omp_get_max_threads()
    codebook, codes, queries = structured(3, 16, 4, 300, 4)
    FaissEngine.of(codebook, "l2", codes).search(queries, 3)
    InvertedLists.of(codebook, "l2", codes).search(queries, 3, n_probe=2)
    assert faiss.omp_get_max_threads() == before


# ---------------------------------------------------------------- inverted lists


@settings(derandomize=True, deadline=None, max_examples=60)
@given(data=st.data())
def test_all_lists_together_hold_the_exact_answer(data):
    M, d = data.draw(st.integers(1, 9), "M"), data.draw(st.integers(1, 4), "d")
    K = data.draw(st.sampled_from([2, 3, 16, 17, 256]), "K")
    metric = data.draw(st.sampled_from(METRICS), "metric")
    n, k = data.draw(st.sampled_from([1, 30, 400]), "n"), data.draw(st.integers(1, 60), "k")
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32), "seed"))
    codebook, queries = (rng.standard_normal(s).astype(np.float32) for s in ((M, K, d), (5, M * d)))
    codes = rng.integers(0, K, (n, M)).astype(np.uint8)
    given_codes = packed_nibbles(codes, M) if K <= 16 and data.draw(st.booleans(), "packed") else codes
    n_lists = data.draw(st.sampled_from([None, 1, n]), "n_lists")

    lists = InvertedLists.of(codebook, metric, given_codes, n_lists)
    assert lists.scan.ntotal == n == len(lists)
    found = lists.search(queries, k, n_probe=10**6)
    assert check_answer(codebook, metric, codes, queries, k, *found) >= 0.99


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(("M", "K"), [(12, 16), (8, 256)])
def test_few_lists_hold_most_of_the_answer(metric, M, K):
    codebook, codes, queries = structured(M, K, 6, 12_000, 60)
    lists = InvertedLists.of(codebook, metric, codes)
    assert len(lists.centroids) == 109
    shares = []
    for n_probe in (1, 8, 109):
        found = lists.search(queries, 20, n_probe)
        looked_at = np.bincount(lists.lists)
        assert looked_at.sum() == 12_000
        check_answer(codebook, metric, codes, queries, 20, *found)
        nearest = np.stack([np.sort(exact_distances(codebook, metric, codes, q))[19] for q in queries])
        shares.append((found[0] <= nearest[:, None]).mean())
    assert shares == sorted(shares)
    assert shares[1] > 0.9 and shares[2] >= 0.999


def test_lists_extended_keep_their_centroids():
    codebook, codes, queries = structured(6, 16, 4, 3000, 20)
    first = InvertedLists.of(codebook, "squared_l2", codes[:2000])
    lists = first.extended(codes)
    assert lists.centroids is first.centroids and len(first) == 2000
    np.testing.assert_array_equal(lists.lists[:2000], first.lists)
    decoded = codebook[np.arange(6), codes].reshape(3000, -1)
    squared = ((decoded[:, None] - lists.centroids) ** 2).sum(axis=2)
    np.testing.assert_allclose(squared[np.arange(3000), lists.lists], squared.min(axis=1), rtol=1e-4, atol=1e-4)
    found = lists.search(queries, 10, n_probe=len(lists.centroids))
    assert check_answer(codebook, "squared_l2", codes, queries, 10, *found) >= 0.999
    assert len(InvertedLists.of(codebook, "l2", codes[:0]).extended(codes)) == 3000
    with pytest.raises(ValueError, match=r"^Invalid codes\. Expected at least 3000\. Received: 2$"):
        lists.extended(codes[:2])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda *a: InvertedLists.of(*a, n_lists=101),
            "Invalid n_lists. Expected 1 to N=100. Received: n_lists=101",
        ),
        (
            lambda *a: InvertedLists.of(*a).search(np.zeros((1, 12), np.float32), 1, n_probe=0),
            "Invalid n_probe. Expected a positive integer. Received: n_probe=0",
        ),
    ],
)
def test_wrong_numbers_of_lists_are_refused(call, message):
    codebook, codes, _ = structured(3, 16, 4, 100, 1)
    with pytest.raises(ValueError) as caught:
        call(codebook, "l2", codes)
    assert str(caught.value) == message
