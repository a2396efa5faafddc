"""PQIndex.search with n_probe: right distances, all lists are all codes, lists that keep up with the codes."""

import pickle
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import faiss
import numpy as np
import pytest

from gpq_tf.index import METRICS, PQIndex, distance_table, inverted_lists
from gpq_tf.index.inverted_lists import InvertedLists
from tests.test_index_threads import run_together


def clustered(rng, n, M, K, n_clusters=30):
    """Codes with structure: near one of some prototypes in most of their books."""
    prototypes = np.random.default_rng(99).integers(0, K, (n_clusters, M))
    codes = prototypes[rng.integers(0, n_clusters, n)]
    other = rng.random((n, M)) < 0.3
    codes[other] = rng.integers(0, K, other.sum())
    return codes


def clustered_index(n=3000, M=6, K=16, metric="l2", seed=0, ids=None, **choices):
    rng = np.random.default_rng(seed)
    index = PQIndex(rng.standard_normal((M, K, 3)), metric, **choices)
    index.add(clustered(rng, n, M, K), ids)
    return index


def queries_near(index, n, seed=1):
    """What some of the codes stand for, and some noise."""
    rng = np.random.default_rng(seed)
    codes = index.codes[rng.integers(0, len(index), n)]
    decoded = index.codebook[np.arange(index.M), codes].reshape(n, -1)
    return decoded + 0.3 * rng.standard_normal(decoded.shape)


def number_of_lists(index):
    return len(index._built[InvertedLists][1].centroids)


def assert_right(index, queries, distances, ids):
    """Every distance is that of the code returned; in order, ties by insertion order; padded at the end."""
    position = {number: at for at, number in enumerate(index.ids.tolist())}
    tables = distance_table(np.float32(queries), index.codebook, index.metric)
    for query, (row, found) in enumerate(zip(distances, ids, strict=True)):
        n = np.count_nonzero(found != -1)
        assert (found[n:] == -1).all() and np.isposinf(row[n:]).all()
        places = np.array([position[number] for number in found[:n].tolist()], int)
        assert len(set(places)) == n
        total = np.zeros(n, np.float32)
        for book, words in enumerate(index.codes[places].T):
            total += tables[book, words, query]
        np.testing.assert_array_equal(row[:n], total)
        np.testing.assert_array_equal(np.lexsort((places, total)), np.arange(n))


def recall(index, queries, k, n_probe):
    """Share of the places of the exact answer whose distance is reached."""
    distances, ids = index.search(queries, k, n_probe)
    assert_right(index, queries, distances, ids)
    return (distances <= index.search(queries, k)[0][:, -1:]).mean()


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(("M", "K"), [(12, 16), (5, 7), (8, 256)])
def test_few_lists_find_most_and_all_lists_find_all(M, K, metric):
    index = clustered_index(4000, M, K, metric)
    queries = queries_near(index, 40)
    shares = [recall(index, queries, 15, n_probe) for n_probe in (1, 4, 16)]
    assert shares == sorted(shares)
    assert shares[0] < 1 and shares[1] > 0.8 and shares[2] > 0.95
    assert number_of_lists(index) == 63
    assert recall(index, queries, 15, 62) >= 0.999
    for n_probe in (63, 64, np.int64(10**9)):
        for found, expected in zip(index.search(queries, 15, n_probe), index.search(queries, 15), strict=True):
            np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("engine", ["exact", "faiss"])
def test_all_lists_answer_by_the_engine(engine):
    """Also where Faiss's scan cannot tell the codes apart: nearly equal words beside far ones that no code names."""
    rng = np.random.default_rng(0)
    codebook = rng.standard_normal((8, 16, 4)).astype(np.float32)
    codebook[:, :8] = codebook[:, :1] + 1e-3 * rng.standard_normal((8, 8, 4))
    index = PQIndex(codebook, "l2", engine=engine)
    index.add(rng.integers(0, 8, (9000, 8)))
    queries = codebook[None, :, 0].reshape(1, -1) + 1e-4 * rng.standard_normal((5, 32))
    assert recall(index, queries, 20, 93) < 0.9
    for found, expected in zip(index.search(queries, 20, 94), index.search(queries, 20), strict=True):
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("ids", [np.random.default_rng(3).permutation(3000) * 7 - 9000, np.arange(50, 3050)])
def test_ids_and_labels_are_those_of_the_codes(ids):
    index = PQIndex(np.random.default_rng(0).standard_normal((6, 16, 3)))
    index.add(clustered(np.random.default_rng(0), 3000, 6, 16), ids, labels=np.abs(ids))
    queries = queries_near(index, 20)
    distances, found = index.search(queries, 10, n_probe=6)
    assert_right(index, queries, distances, found)
    np.testing.assert_array_equal(index.labels[index.positions(found.ravel())], np.abs(found.ravel()))


def test_lists_that_hold_fewer_codes_leave_places_empty():
    index = clustered_index()
    queries = queries_near(index, 9)
    distances, ids = index.search(queries, 2000, n_probe=1)
    assert_right(index, queries, distances, ids)
    assert (ids[:, 0] >= 0).all() and (ids[:, -1] == -1).all()


@pytest.fixture
def learned(monkeypatch):
    """The numbers of codes from which lists have been learned since."""
    sizes, centroids = [], inverted_lists._centroids
    monkeypatch.setattr(
        inverted_lists, "_centroids", lambda book, codes, n: sizes.append(len(codes)) or centroids(book, codes, n)
    )
    return sizes


def test_lists_grow_with_the_codes_and_are_learned_again_where_they_must(learned):
    index = clustered_index(1000)
    queries = queries_near(index, 20)
    index.search(queries, 3)
    assert learned == []
    for _ in range(3):
        assert recall(index, queries, 10, 8) > 0.8
    assert (learned, number_of_lists(index)) == ([1000], 31)

    rng = np.random.default_rng(5)
    for n in (1, 800, 2041):  # 3842 codes: 31 of 62 lists that would be learned
        index.add(clustered(rng, n, 6, 16))
        before = list(learned)
        queries = index.codebook[np.arange(6), index.codes[-1:]].reshape(1, -1)
        distances, ids = index.search(queries, 10, n_probe=2)
        assert distances[0, 0] == 0 and ids.max() >= 0
        assert (index.codes[index.positions(ids[:, 0])] == index.codes[-1]).all()
        assert_right(index, queries, distances, ids)
        assert learned == before
    index.add(clustered(rng, 2, 6, 16))
    index.search(queries, 10, 2)
    assert (learned, number_of_lists(index)) == ([1000, 3844], 62)

    gone = rng.choice(index.ids, 1900, replace=False)
    index.remove(gone)
    queries = queries_near(index, 20)
    assert recall(index, queries, 10, 8) > 0.8
    assert not np.isin(index.search(queries, 500, 8)[1], gone).any()
    assert (learned, number_of_lists(index)) == ([1000, 3844, 1944], 44)


def test_after_add_and_remove_in_turn_distances_are_right(learned):
    rng, index = np.random.default_rng(0), clustered_index(400, metric="inner_product")
    for _ in range(6):
        index.add(clustered(rng, 100, 6, 16), ids=10**6 * len(learned) + 10**6 + rng.permutation(100))
        index.remove(rng.choice(index.ids, 60, replace=False))
        index.add(clustered(rng, 30, 6, 16))
        queries = queries_near(index, 5)
        assert recall(index, queries, 9, 5) > 0.5
    assert len(learned) == 6


def test_an_empty_index_finds_nothing_and_what_comes_later():
    index = PQIndex(np.random.default_rng(0).standard_normal((4, 16, 2)))
    for _ in range(2):
        distances, ids = index.search(np.zeros((2, 8)), 3, n_probe=16)
        assert np.isposinf(distances).all() and (ids == -1).all() and ids.shape == (2, 3)
        assert index.search(np.zeros((0, 8)), 3, n_probe=16)[0].shape == (0, 3)
        index.add(np.ones((5, 4), int))
        assert sorted(index.search(np.zeros((1, 8)), 5, n_probe=16)[1][0]) == index.ids.tolist()
        index.remove(index.ids)


@pytest.mark.parametrize("n_probe", [0, -3, 1.0, "4", True, [2], np.float32(2)])
def test_other_numbers_of_lists_are_refused(n_probe):
    with pytest.raises(ValueError) as error:
        clustered_index(10).search(np.zeros((1, 18)), 3, n_probe)
    assert str(error.value) == f"Invalid n_probe. Expected a positive integer. Received: n_probe={n_probe!r}"


def test_codewords_that_lists_cannot_serve_are_refused():
    index = PQIndex(np.zeros((2, 257, 1)))
    with pytest.raises(ValueError) as error:
        index.search(np.zeros((1, 2)), 3, n_probe=4)
    expected = "Expected None for K=257: inverted lists serve up to 256 codewords. Received: n_probe=4"
    assert str(error.value) == f"Invalid n_probe. {expected}"


@pytest.mark.parametrize(("value", "message"), [(np.nan, "NaN or infinity in row 1"), (3e38, "larger in row 1")])
def test_queries_that_have_no_distances_are_refused(value, message):
    queries = np.zeros((3, 18))
    queries[1] = value
    with pytest.raises(ValueError, match=message):
        clustered_index(metric="squared_l2").search(queries, 3, n_probe=4)


@pytest.mark.parametrize(("M", "K"), [(12, 16), (5, 16), (8, 256)])
def test_describe_says_what_the_lists_take(M, K):
    index = clustered_index(2000, M, K)
    assert index.describe().endswith("lists for n_probe: none")
    assert ", lists 0\n" in index.describe()
    index.search(np.zeros((1, M * 3)), 3, n_probe=4)
    assert index.describe().endswith("lists for n_probe: 44 of 2000 codes")
    lists = index._built[InvertedLists][1]
    # What Faiss would write is what it holds, its codewords and a few numbers a list besides.
    of_faiss = len(faiss.serialize_index(lists.scan)) - 4 * lists.scan.pq.centroids.size()
    assert 0 <= of_faiss - (lists.nbytes - 44 * M * 3 * 4 - 2000 * 4) < 44 * 16 + 500
    assert f", lists {lists.nbytes}\n" in index.describe()
    index.add(np.zeros((1, M), int))
    assert index.describe().endswith("lists for n_probe: 44 of 2000 codes")
    index.search(np.zeros((1, M * 3)), 3, n_probe=4)
    assert index.describe().endswith("lists for n_probe: 44 of 2001 codes")


@pytest.mark.parametrize("verify", [True, False])
def test_no_file_and_no_copy_holds_the_lists(tmp_path, verify):
    index = clustered_index(K=7)
    index.save(tmp_path / "before")
    queries = queries_near(index, 20)
    index.search(queries, 10, n_probe=8)
    index.save(tmp_path / "after")
    assert (tmp_path / "before").read_bytes() == (tmp_path / "after").read_bytes()
    for other in (PQIndex.load(tmp_path / "after", verify), pickle.loads(pickle.dumps(index))):
        assert other.describe().endswith("lists for n_probe: none")
        assert recall(other, queries, 10, 8) > 0.8


def test_threads_wait_for_one_learning(learned):
    index = clustered_index()
    queries = queries_near(index, 8)
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda _: index.search(queries, 20, n_probe=4), range(8)))
    assert learned == [3000]
    for distances, ids in answers:
        np.testing.assert_array_equal(distances, answers[0][0])
        np.testing.assert_array_equal(ids, answers[0][1])


def test_a_change_while_lists_are_learned_belongs_to_the_next_search(monkeypatch):
    index = clustered_index(2000)
    queries, ids = queries_near(index, 10), index.ids
    expected, learn = clustered_index(2000).search(queries, 10, n_probe=5), InvertedLists.of

    def changed_meanwhile(*arguments):
        monkeypatch.undo()
        index.remove(ids[:1000])
        index.add(clustered(np.random.default_rng(4), 500, 6, 16))
        return learn(*arguments)

    monkeypatch.setattr(InvertedLists, "of", changed_meanwhile)
    for found, before in zip(index.search(queries, 10, n_probe=5), expected, strict=True):
        np.testing.assert_array_equal(found, before)
    distances, found = index.search(queries, 10, n_probe=5)
    assert_right(index, queries, distances, found)
    assert found.min() >= 1000


def test_a_search_that_waited_for_another_sees_what_was_added_meanwhile():
    index = clustered_index(2000)
    query = index.codebook[:, 3].reshape(1, -1)
    with ThreadPoolExecutor(1) as pool:
        with index._building[InvertedLists]:
            waiting = pool.submit(index.search, query, 1, n_probe=4)
            time.sleep(0.05)
            index.add([[3] * 6])
        distances, ids = waiting.result()
    assert (distances[0, 0], ids[0, 0]) == (0, 2000)


def test_no_answer_mixes_two_states():
    """An id belongs to one code for ever, while its position changes: a mixture would show in the distances."""
    rng, index = np.random.default_rng(0), clustered_index(1500)
    new = [(clustered(rng, 150, 6, 16), 10_000 + 150 * i + np.arange(150)) for i in range(12)]
    query, done, searches, distance_of = queries_near(index, 1), threading.Event(), [], {}
    for codes, ids in ((index.codes, index.ids), *new):
        alone = PQIndex(index.codebook, index.metric)
        alone.add(codes, ids)
        distances, ids = alone.search(query, len(ids))
        distance_of |= dict(zip(ids[0].tolist(), distances[0].tolist(), strict=True))
    living = [set(index.ids.tolist())]  # after each change, written down before the change is made

    def change():
        for number, (codes, ids) in enumerate(new):
            living.append(living[-1] | set(ids.tolist()))
            index.add(codes, ids)
            if number % 3 == 2:
                gone = rng.choice(sorted(living[-1]), 100, replace=False)
                living.append(living[-1] - set(gone.tolist()))
                index.remove(gone)
            while len(searches) < 3 * number and not done.is_set():
                time.sleep(0.001)
        done.set()

    def search():
        while not done.is_set():
            before = max(0, len(living) - 2)
            distances, ids = index.search(query, 300, n_probe=7)
            found = ids[0] >= 0
            numbers = ids[0, found].tolist()
            assert numbers and any(set(numbers) <= state for state in living[before:])
            assert [distance_of[number] for number in numbers] == distances[0, found].tolist()
            searches.append(1)

    run_together(change, search, search, search, done=done)
    assert len(searches) >= 30
