"""What an index keeps: packed codes, consecutive ids for nothing, labels and paths that follow the codes."""

import copy
import pickle
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpq_tf.index import METRICS, PQIndex
from gpq_tf.index import ids as id_rows
from gpq_tf.index.store import pack, unpack
from tests.test_index import oracle


@pytest.fixture
def index():
    """Four codes with labels and paths."""
    index = PQIndex(np.arange(24.0).reshape(3, 4, 2))
    index.add([[0, 1, 2], [3, 2, 1], [0, 0, 0], [1, 1, 1]], labels=[5, 6, 7, 8], paths=["a", "", "c/é.png", "dd"])
    return index


class Model:
    """The same collection as plain lists of (id, code, label, path)."""

    def __init__(self):
        self.rows, self.next_id = [], 0

    def add(self, codes, ids, labels, paths):
        self.rows += list(zip(ids, map(tuple, codes), labels, paths, strict=True))
        self.next_id = max([self.next_id, *(i + 1 for i in ids)])

    def remove(self, ids):
        self.rows = [row for row in self.rows if row[0] not in ids]

    def column(self, number):
        return [row[number] for row in self.rows]


@settings(derandomize=True, deadline=None, max_examples=120)
@given(data=st.data())
def test_any_sequence_of_changes_equals_plain_lists(data, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "sequence.safetensors"
    M, K, d = (data.draw(values, name) for values, name in (
        (st.integers(1, 7), "M"), (st.sampled_from([2, 3, 10, 16, 17, 256, 257]), "K"), (st.integers(1, 3), "d")
    ))  # fmt: skip
    metric = data.draw(st.sampled_from(METRICS), "metric")
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32), "seed"))
    has_labels, has_paths = data.draw(st.booleans(), "labels"), data.draw(st.booleans(), "paths")
    # Whole numbers tie; few kinds of codes repeat.
    codebook = rng.integers(-2, 3, (M, K, d)).astype(np.float32)
    kinds = rng.integers(0, K, (8, M))
    index, model = PQIndex(codebook, metric), Model()

    for _ in range(data.draw(st.integers(1, 8), "steps")):
        step = data.draw(st.sampled_from(["add", "explicit", "remove", "ends", "load", "map"]), "step")
        if step in ("add", "explicit"):
            n = data.draw(st.integers(0, 6), "n")
            free = np.setdiff1d(np.arange(-20, 60), [-1, *model.column(0)])
            ids = rng.permutation(free)[:n] if step == "explicit" else model.next_id + np.arange(n)
            codes, labels = kinds[rng.integers(0, 8, n)], rng.integers(-9, 9, n)
            paths = [f"{i}é" * int(rng.integers(0, 3)) for i in ids]
            index.add(
                codes,
                ids if step == "explicit" else None,
                labels if has_labels else None,
                paths if has_paths else None,
            )
            model.add(codes, ids.tolist(), labels.tolist(), paths)
        elif step == "remove":
            gone = [i for i in model.column(0) if rng.random() < 0.3]
            index.remove(rng.permutation(np.array(gone, int)))
            model.remove(gone)
        elif step == "ends":  # what is left of consecutive ids stays consecutive
            gone = model.column(0)[: rng.integers(0, 3)] + model.column(0)[len(model.rows) - rng.integers(0, 3) :]
            index.remove(gone)
            model.remove(gone)
        else:
            index.save(path)
            index = PQIndex.load(path, verify=step == "load")

    assert len(index) == len(model.rows)
    np.testing.assert_array_equal(index.codes, np.array(model.column(1), int).reshape(-1, M))
    np.testing.assert_array_equal(index.ids, model.column(0))
    assert (index.labels is None) == (not has_labels or not model.rows)
    assert (index.paths is None) == (not has_paths or not model.rows)
    if index.labels is not None:
        np.testing.assert_array_equal(index.labels, model.column(2))
    if index.paths is not None:
        assert list(index.paths) == model.column(3)
    wanted = rng.permutation(np.array(model.column(0), int))
    np.testing.assert_array_equal(index.ids[index.positions(wanted)], wanted)
    for i in [*model.column(0)[:2], *model.column(0)[-2:]]:
        with pytest.raises(ValueError, match=rf"Received: {i}, which is in the index$"):
            index.add(kinds[:1], [i], [0] if index.labels is not None else None, [""] if index.paths else None)

    queries, k = rng.integers(-2, 3, (2, M * d)).astype(np.float32), data.draw(st.integers(1, 60), "k")
    distances, found = index.search(queries, k)
    codes, ids = np.array(model.column(1), int).reshape(-1, M), np.array(model.column(0), int)
    for row, query in enumerate(queries):
        expected_distances, expected_ids = oracle(codebook, metric, codes, ids, query, k)
        np.testing.assert_array_equal(distances[row], expected_distances)
        np.testing.assert_array_equal(found[row], expected_ids)
    queries[1, 0] = np.nan
    with pytest.raises(ValueError, match=r"NaN or infinity in row 1$"):
        index.search(queries, k)


@pytest.mark.parametrize(("K", "M"), [(2, 1), (16, 12), (16, 5), (10, 3), (17, 5), (256, 8), (65536, 2)])
def test_packing_is_reversible(K, M):
    codes = np.random.default_rng(0).integers(0, K, (100, M))
    packed = pack(codes, K)
    assert packed.nbytes == 100 * ((M + 1) // 2 if K <= 16 else M if K <= 256 else 2 * M)
    np.testing.assert_array_equal(unpack(packed, M, K), codes)


@pytest.mark.parametrize(("M", "bits"), [(12, 4), (5, 4), (8, 8)])
def test_packed_codes_are_those_of_faiss(M, bits):
    faiss = pytest.importorskip("faiss")
    codes = np.random.default_rng(1).integers(0, 2**bits, (50, M)).astype(np.int32)
    np.testing.assert_array_equal(pack(codes, 2**bits), faiss.pack_bitstrings(codes, bits))


@pytest.mark.parametrize(("pieces", "most"), [(1, 6.01), (100, 6 * 1.25 + 0.01)])
def test_a_code_of_48_bits_takes_6_bytes_and_its_id_none(pieces, most):
    codes = np.zeros((200_000 // pieces, 12), np.uint8)
    index = PQIndex(np.zeros((12, 16, 2)))
    tracemalloc.start()
    for _ in range(pieces):
        index.add(codes)
    taken, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert 6 <= taken / 200_000 < most
    assert isinstance(index._store.ids, range)


def test_explicit_ids_take_8_bytes():
    index = PQIndex(np.zeros((12, 16, 2)))
    ids = np.random.default_rng(2).permutation(100_000) * 3
    tracemalloc.start()
    index.add(np.zeros((100_000, 12), np.uint8), ids)
    taken, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert taken / 100_000 < 14.01


def test_consecutive_ids_stay_a_range_as_long_as_they_can():
    index = PQIndex(np.zeros((1, 2, 1)))
    index.add([[0]] * 5, ids=[3, 4, 5, 6, 7])
    index.add([[0]] * 2)
    index.remove([4, 3, 9])
    assert index._store.ids == range(5, 9)
    index.add([[0]])  # 9 was given once
    np.testing.assert_array_equal(index.ids, [5, 6, 7, 8, 10])
    index.remove([10])
    assert index._store.ids == range(5, 9)
    index.remove([6])
    np.testing.assert_array_equal(index.ids, [5, 7, 8])
    index.remove([5, 7, 8])
    index.add([[0], [1]])
    np.testing.assert_array_equal(index.ids, [11, 12])
    assert index._store.ids == range(11, 13)


def test_ids_reach_both_ends_of_int64():
    index = PQIndex(np.zeros((1, 2, 1)))
    index.add([[0], [1]], ids=[2**63 - 2, 2**63 - 1])
    index.add([[1]], ids=[-(2**63)])
    np.testing.assert_array_equal(index.ids, [2**63 - 2, 2**63 - 1, -(2**63)])
    assert index.positions([-(2**63), 2**63 - 1]).tolist() == [2, 1]


def test_looking_ids_up_sorts_little(monkeypatch):
    sizes, sort = [], np.sort
    index = PQIndex(np.zeros((1, 2, 1)))
    ids = np.random.default_rng(3).permutation(20_000)
    index.add(np.zeros((19_000, 1), int), ids[:19_000])
    monkeypatch.setattr(np, "sort", lambda array, **how: sizes.append(len(array)) or sort(array, **how))
    for i in ids[19_000:]:
        index.add([[0]], [i])
        with pytest.raises(ValueError, match="which is in the index"):
            index.add([[0]], [i])
    # All once, then merges of the 1,000 new ones: fewer than log2(1000) = 10 for each, and three checks of one id.
    assert sum(sizes) < 19_000 + 1_000 * 10 + 1_000 * 4
    assert max(sizes[1:]) <= 1_000
    assert len(index._runs) <= 12
    index.remove(ids[:10_000])
    index.add(np.ones((1, 1), int), ids[:1])
    np.testing.assert_array_equal(index.ids, [*ids[10_000:], ids[0]])


@settings(derandomize=True, deadline=None)
@given(st.lists(st.lists(st.integers(0, 40), max_size=9, unique=True), max_size=12))
def test_runs_are_a_set(pieces):
    runs, known = id_rows.runs_of(np.empty(0, np.int64)), set()
    for number, piece in enumerate(pieces):
        piece = set(piece)
        if number % 3 < 2:
            piece -= known
            runs = id_rows.runs_with(runs, np.array(list(piece), np.int64))
            known |= piece
        else:
            runs = id_rows.runs_without(runs, np.array(list(piece), np.int64))
            known -= piece
        expected = [i in known for i in range(41)]
        np.testing.assert_array_equal(id_rows.in_runs(runs, np.arange(41)), expected)


def test_labels_and_paths_follow_the_codes(index):
    before = index.labels
    index.remove([1])
    index.add([[2, 2, 2]], ids=[77], labels=np.array([9], np.int64), paths=["e"])
    assert index.labels.dtype == np.int32
    assert index.labels.tolist() == [5, 7, 8, 9]
    assert before.tolist() == [5, 6, 7, 8]
    assert list(index.paths) == ["a", "c/é.png", "dd", "e"]
    assert index.paths[-1] == "e"
    assert index.paths[1:3] == ["c/é.png", "dd"]
    assert index.paths[index.positions([3])[0]] == "dd"
    with pytest.raises(IndexError):
        index.paths[4]
    with pytest.raises(ValueError, match="read-only"):
        index.labels[0] = 1


def test_multi_hot_labels(index):
    index.remove([0, 1, 2, 3])
    assert index.labels is None
    assert index.paths is None
    index.add([[0, 0, 0]] * 2, labels=np.array([[True, False], [True, True]]))
    index.add([[0, 0, 0]], labels=[[0, 1]])
    assert index.labels.dtype == np.uint8
    np.testing.assert_array_equal(index.labels, [[1, 0], [1, 1], [0, 1]])


def test_names_that_are_no_utf8_survive(index):
    name = b"caf\xe9.png".decode("utf-8", "surrogateescape")  # what os.listdir makes of a Latin-1 name
    index.add([[0, 0, 0]], labels=[0], paths=[name])
    assert index.paths[4] == name


@pytest.mark.parametrize(
    ("labels", "paths", "message"),
    [
        (None, ["x"], "Invalid labels. Expected one for each code, as in the index. Received: None"),
        ([1], None, "Invalid paths. Expected one for each code, as in the index. Received: None"),
        ([[1, 0]], ["x"], "Invalid labels. Expected shape (1,), as in the index. Received: shape (1, 2)"),
        ([1, 2], ["x"], "Invalid labels. Expected shape (n=1,) or (n=1, C). Received: shape (2,)"),
        ([[]], ["x"], "Invalid labels. Expected shape (n=1,) or (n=1, C). Received: shape (1, 0)"),
        ([0.5], ["x"], "Invalid labels. Expected integers. Received: dtype float64"),
        ([2**31], ["x"], "Invalid labels. Expected values from -2147483648 to 2147483647. Received: 2147483648"),
        ([[2, 0]], ["x"], "Invalid labels. Expected values from 0 to 1. Received: 2"),
        ([1], [], "Invalid paths. Expected one for each of 1 codes. Received: 0"),
        ([1], "x", "Invalid paths. Expected a sequence of them. Received: 'x'"),
        ([1], [3], "Invalid paths. Expected text or pathlib.Path. Received: 3 in row 0"),
        ([1], ["\ud800"], "Invalid paths. Expected text or pathlib.Path. Received: '\\ud800' in row 0"),
    ],
)
def test_labels_and_paths_that_do_not_fit_are_refused(index, labels, paths, message):
    with pytest.raises(ValueError) as error:
        index.add([[0, 0, 0]], labels=labels, paths=paths)
    assert str(error.value) == message
    assert len(index) == len(index.labels) == len(index.paths) == 4


@pytest.mark.parametrize("what", [{"labels": [1]}, {"paths": ["a"]}])
def test_labels_cannot_begin_in_the_middle(what):
    index = PQIndex(np.zeros((1, 2, 1)))
    index.add([[0]])
    with pytest.raises(ValueError, match="Expected None, since the codes in the index have no"):
        index.add([[0]], **what)
    assert len(index) == 1


@pytest.mark.parametrize(
    "model", ["name", {"name": "a"}, {"name": "a", "sha256": "0" * 63}, {"name": 1, "sha256": "0" * 64}]
)
def test_a_model_that_says_nothing_is_refused(model):
    with pytest.raises(ValueError, match=r'^Invalid model. Expected None or {"name": str, "sha256": 64 hexadecimal'):
        PQIndex(np.zeros((1, 2, 1)), model=model)


def test_positions_of_unknown_ids_are_refused(index):
    for _ in range(2):
        with pytest.raises(ValueError, match=r"^Invalid ids. Expected ids in the index. Received: unknown id -1$"):
            index.positions([0, -1])
        index.remove([2]) if 2 in index.ids else None


@pytest.mark.parametrize("clone", [copy.copy, copy.deepcopy, lambda index: pickle.loads(pickle.dumps(index))])
def test_a_copy_grows_on_its_own(index, clone):
    for _ in range(9):
        index.add([[3, 3, 3]], labels=[1], paths=["e"])
    assert len(index._store.packed.room.array) > 13  # so that both could grow into it
    other = clone(index)
    index.add([[1, 2, 3]], labels=[2], paths=["first"])
    other.add([[0, 1, 0]], labels=[3], paths=["second"])
    assert (index.codes[-1].tolist(), other.codes[-1].tolist()) == ([1, 2, 3], [0, 1, 0])
    assert (index.labels[-1], other.labels[-1]) == (2, 3)
    assert (index.paths[-1], other.paths[-1]) == ("first", "second")
    np.testing.assert_array_equal(index.search(np.ones((1, 6)), 3)[1], index.search(np.ones((1, 6)), 9)[1][:, :3])


def test_describe():
    index = PQIndex(np.zeros((3, 10, 4)), "l2")
    index.add(np.zeros((7, 3), int), ids=np.arange(7)[::-1], labels=np.zeros(7, int), paths=["ab"] * 7)
    index.snapshot()  # as the metrics do
    first, second, third, fourth = index.describe().split("\n")
    assert first == "7 codes of 12 bits (M=3 books, K=10 codewords of d=4), l2"
    grouped = 3 * 1 + 8 * (7 + 7 + 2)
    assert second == f"bytes: codes 14, ids 56, labels 28, paths 70, grouped for metrics {grouped}, lists 0"
    assert third.startswith("engine: exact")
    assert fourth == "lists for n_probe: none"
