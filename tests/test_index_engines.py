"""PQIndex by its engines: which is taken, that both answer alike while codes come and go, and the way to Faiss."""

import threading

import numpy as np
import pytest

from gpq_tf.index import METRICS, PQIndex, pq_index

faiss = pytest.importorskip("faiss")


def clustered(rng, n, M, K):
    """Codes with structure: near one of 20 prototypes in most of their books."""
    prototypes = rng.integers(0, K, (20, M))
    codes = prototypes[rng.integers(0, 20, n)]
    other = rng.random((n, M)) < 0.4
    codes[other] = rng.integers(0, K, other.sum())
    return codes


def pair(rng, M, K, metric):
    """Two indexes of one codebook: exact, Faiss."""
    codebook = rng.standard_normal((M, K, 3))
    return [PQIndex(codebook, metric, engine=engine) for engine in ("exact", "faiss")]


def assert_alike(exact, scanned, queries, k):
    distances, ids = exact.search(queries, k)
    found, found_ids = scanned.search(queries, k)
    assert (found == distances).mean() >= 0.999
    np.testing.assert_array_equal(found_ids < 0, ids < 0)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(("M", "K"), [(12, 16), (5, 16), (4, 256), (3, 7)])
def test_both_engines_answer_alike_while_codes_come_and_go(M, K, metric):
    rng = np.random.default_rng(M * K)
    both = pair(rng, M, K, metric)
    queries = rng.standard_normal((20, M * 3))
    for n in (3000, 1, 700):
        codes = clustered(rng, n, M, K)
        for index in both:
            index.add(codes)
        assert_alike(*both, queries, 50)
    gone = rng.choice(both[0].ids, 900, replace=False)
    for index in both:
        index.remove(gone)
    assert_alike(*both, queries, 50)
    assert_alike(*both, queries, len(both[0]) + 5)
    for index in both:
        index.add(codes, ids=10_000 + rng.permutation(700) if index is both[0] else both[0].ids[-700:])
    assert_alike(*both, queries, 50)


def test_nothing_in_it_finds_nothing_by_either():
    for index in pair(np.random.default_rng(0), 4, 16, "l2"):
        distances, ids = index.search(np.zeros((2, 12)), 3)
        assert (distances == np.inf).all()
        assert (ids == -1).all()


def test_auto_goes_by_the_number_of_codes(monkeypatch):
    monkeypatch.setattr(pq_index, "_FAISS_FROM", 10)
    rng = np.random.default_rng(0)
    index, large = PQIndex(rng.standard_normal((4, 16, 2))), PQIndex(rng.standard_normal((2, 300, 2)))
    index.add(rng.integers(0, 16, (9, 4)))
    assert "\nengine: exact (auto: fewer than 10 codes)\n" in index.describe()
    index.add(rng.integers(0, 16, (1, 4)))
    assert "\nengine: faiss (auto: 10 codes or more)\n" in index.describe()
    index.search(rng.standard_normal((1, 8)), 3)
    large.add(rng.integers(0, 300, (20, 2)))
    assert "\nengine: exact (auto: Faiss's scan is the faster one up to K=16)\n" in large.describe()
    assert "\nengine: faiss (as asked for)\n" in PQIndex(index.codebook, engine="faiss").describe()


@pytest.mark.parametrize(
    ("K", "engine", "message"),
    [
        (16, "scann", r"Invalid engine\. Expected one of auto, exact, faiss\. Received: engine='scann'"),
        (257, "faiss", r"Invalid engine\. Expected exact or auto for K=257: Faiss's scans serve up to 256"),
    ],
)
def test_an_engine_that_cannot_be_had_is_refused(K, engine, message):
    with pytest.raises(ValueError, match=message):
        PQIndex(np.zeros((2, K, 1)), engine=engine)


@pytest.mark.parametrize("ids", [None, [7, 3, 90, 4, 2**40]])
@pytest.mark.parametrize("metric", ["inner_product", "squared_l2"])
def test_to_faiss_and_back_through_a_file_of_faiss(tmp_path, metric, ids):
    rng = np.random.default_rng(1)
    index = PQIndex(rng.standard_normal((6, 16, 4)), metric)
    index.add(rng.integers(0, 16, (5, 6)), ids)
    faiss.write_index(index.to_faiss(), str(tmp_path / "index.faiss"))
    back = PQIndex.from_faiss(faiss.read_index(str(tmp_path / "index.faiss")))
    np.testing.assert_array_equal(back.codebook, index.codebook)
    np.testing.assert_array_equal(back.codes, index.codes)
    np.testing.assert_array_equal(back.ids, index.ids)
    assert back.metric == metric
    queries = rng.standard_normal((4, 24))
    for found, expected in zip(back.search(queries, 5), index.search(queries, 5), strict=True):
        np.testing.assert_array_equal(found, expected)
    # and Faiss itself answers in the same order
    _, of_faiss = index.to_faiss().search(queries.astype("float32"), 5)
    np.testing.assert_array_equal(of_faiss, index.search(queries, 5)[1])


def test_l2_has_no_faiss_index():
    with pytest.raises(ValueError, match="which no Faiss index computes"):
        PQIndex(np.zeros((2, 4, 1)), "l2").to_faiss()


def test_a_saved_index_is_opened_with_any_engine(tmp_path):
    rng = np.random.default_rng(2)
    exact, scanned = pair(rng, 5, 16, "l2")
    exact.add(clustered(rng, 4000, 5, 16))
    exact.save(tmp_path / "index")
    queries = rng.standard_normal((10, 15))
    for verify in (True, False):
        scanned = PQIndex.load(tmp_path / "index", verify, engine="faiss")
        assert_alike(exact, scanned, queries, 20)


def test_scans_while_another_thread_adds_see_one_state():
    rng = np.random.default_rng(3)
    index = PQIndex(rng.standard_normal((4, 16, 2)), engine="faiss")
    index.add(np.zeros((50, 4), int))
    query, wrong = rng.standard_normal((1, 8)), []

    def search():
        for _ in range(60):
            n_before = len(index)
            _, ids = index.search(query, 400)
            n_found = int((ids >= 0).sum())
            # every state holds 50 more codes than the one before, and ids count up from 0
            if n_found % 50 or not n_before <= n_found or set(ids[0, :n_found]) != set(range(n_found)):
                wrong.append(n_found)

    threads = [threading.Thread(target=search) for _ in range(3)]
    for thread in threads:
        thread.start()
    for _ in range(6):
        index.add(np.zeros((50, 4), int))
    for thread in threads:
        thread.join()
    assert wrong == []
