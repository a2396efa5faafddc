import io
import pickle

import pytest

from gpq_tf.data.unpickler import RefusedError, unpickle


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_reads_plain_values(protocol):
    value = {"a": [1, -2, 2**70, 1.5, None, True, False], b"b": ((), (1,), (1, 2), "text"), "c": {"d": b"raw"}}
    if protocol == 2:  # which has bytes only as a call
        del value[b"b"], value["c"]
    assert unpickle(io.BytesIO(pickle.dumps(value, protocol))) == value


def test_pickles_that_follow_each_other_are_read_one_by_one():
    file = io.BytesIO(pickle.dumps([1], 2) + pickle.dumps("two", 4) + b"rest")
    assert (unpickle(file), unpickle(file), file.read()) == ([1], "two", b"rest")


def test_stand_ins_are_all_that_is_called():
    class Kept:
        value = None

    def keep(kept, value):
        kept.value = value

    content = b"\x80\x02cany.where\nname\nX\x01\x00\x00\x00aQ\x85RK\x07b."
    made = []

    def make(loaded):
        made.append(loaded)
        return Kept()

    found = unpickle(io.BytesIO(content), {("any.where", "name"): make}, {Kept: keep}, str.upper)
    assert made == ["A"] and found.value == 7
    with pytest.raises(
        ValueError, match=r"^it asks for any\.where\.name; nothing but arrays, strings, lists, dicts and"
    ):
        unpickle(io.BytesIO(content))
    with pytest.raises(ValueError, match=r"^it asks for the opcode BINPERSID; nothing but"):
        unpickle(io.BytesIO(content), {("any.where", "name"): make}, {Kept: keep})
    with pytest.raises(ValueError, match=r"^it sets the state of a Kept; nothing but"):
        unpickle(io.BytesIO(content), {("any.where", "name"): make}, {}, str.upper)


def test_what_a_stand_in_refuses_is_refused():
    def refuse():
        raise RefusedError("it has too little")

    with pytest.raises(
        ValueError, match=r"^it has too little; nothing but arrays, strings, lists, dicts and numbers is"
    ):
        unpickle(io.BytesIO(b"ca\nb\n)R."), {("a", "b"): refuse})


@pytest.mark.parametrize("content", [b"", b"}", b"X\xff\xff\xff\xff", b"\x80\x02ca\nb\n)R.", b"a", b"no pickle"])
def test_damage_is_one_kind_of_error(content):
    def fail():
        raise MemoryError

    with pytest.raises(ValueError, match=r"^it is damaged, cut off or no pickle \(\w+ while reading\)$"):
        unpickle(io.BytesIO(content), {("a", "b"): fail})
