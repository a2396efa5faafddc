"""Searches while others add and remove: every answer is that of one moment."""

import sys
import threading

import numpy as np
import pytest

from gpq_tf.index import PQIndex, exact


@pytest.fixture
def frequent_switches():
    """Threads that take turns as often as the interpreter lets them."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def run_together(*functions, done=None):
    """Run functions in threads of their own; raise what the first of them raised, which ends the others by `done`."""
    errors = []

    def guarded(function):
        try:
            function()
        except BaseException as error:
            errors.append(error)
            if done is not None:
                done.set()

    threads = [threading.Thread(target=guarded, args=(function,)) for function in functions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def test_no_answer_mixes_two_states(frequent_switches, tmp_path):
    rng = np.random.default_rng(0)
    codebook, query = rng.standard_normal((4, 16, 2)), rng.standard_normal((1, 8)).astype(np.float32)
    index = PQIndex(codebook)
    index.add(rng.integers(0, 16, (2000, 4)), labels=np.arange(2000))

    # Changes in turn, each with the answer after it, found by an index that nobody else touches.
    def answer(codes, ids):
        alone = PQIndex(codebook)
        alone.add(codes, ids)
        distances, found = alone.search(query, 100)
        return distances.tobytes(), found.tobytes()

    codes, ids, changes = index.codes, index.ids, []
    answers = {answer(codes, ids)}
    for number in range(300):
        if number % 2:
            gone = rng.permutation(ids)[:500]
            codes, ids = codes[~np.isin(ids, gone)], ids[~np.isin(ids, gone)]
            changes.append((None, gone))
        else:
            new, new_ids = rng.integers(0, 16, (500, 4)), 500 * (number + 4) + rng.permutation(500)
            codes, ids = np.concatenate([codes, new]), np.concatenate([ids, new_ids])
            changes.append((new, new_ids))
        answers.add(answer(codes, ids))

    done, searches = threading.Event(), []

    def change():
        for number, (new, which) in enumerate(changes):
            if new is None:
                index.remove(which)
            else:
                index.add(new, which, labels=which)
            while len(searches) < number and not done.is_set():
                pass  # as many searches as changes, in whatever order
        done.set()

    def search():
        while not done.is_set():
            distances, found = index.search(query, 100)
            assert (distances.tobytes(), found.tobytes()) in answers
            searches.append(1)

    def save():
        while not done.is_set():
            index.save(tmp_path / "a.safetensors")
            saved = PQIndex.load(tmp_path / "a.safetensors")
            assert answer(saved.codes, saved.ids) in answers
            np.testing.assert_array_equal(saved.labels, saved.ids)

    run_together(change, search, search, search, save, done=done)
    assert len(searches) >= 299
    assert answer(index.codes, index.ids) == answer(codes, ids)


def test_changes_of_several_threads_are_all_made(frequent_switches):
    index = PQIndex(np.zeros((2, 16, 1)))

    def work(number):
        for i in range(60):
            index.add([[number, i % 16]], ids=[100 * number + i])
            if i % 3 == 0:
                index.remove([100 * number + i])

    run_together(*(lambda number=number: work(number) for number in range(4)))
    assert len(index) == 4 * 40
    assert set(index.ids) == {100 * number + i for number in range(4) for i in range(60) if i % 3}
    np.testing.assert_array_equal(index.codes, np.stack([index.ids // 100, index.ids % 100 % 16], axis=1))


def test_a_change_while_a_search_prepares_itself_belongs_to_the_next_search(monkeypatch):
    rng = np.random.default_rng(1)
    index, query = PQIndex(rng.standard_normal((4, 16, 2))), rng.standard_normal((1, 8))
    codes = rng.integers(0, 16, (40, 4))
    index.add(codes[:20])
    before = index.search(query, 40)
    index.add(codes[:1], ids=[99])
    index.remove([99])
    nearest = exact.nearest

    def changed_meanwhile(*arguments):
        monkeypatch.undo()
        index.remove(range(10))
        index.add(codes[20:])
        return nearest(*arguments)

    monkeypatch.setattr(exact, "nearest", changed_meanwhile)
    for expected, found in zip(before, index.search(query, 40), strict=True):
        np.testing.assert_array_equal(found, expected)
    alone = PQIndex(index.codebook)
    alone.add(codes[10:], index.ids)
    for expected, found in zip(alone.search(query, 40), index.search(query, 40), strict=True):
        np.testing.assert_array_equal(found, expected)
