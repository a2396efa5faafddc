import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from gpq_tf.convert import tensor_bundle

import gpq_files

TYPES = ["f4", "f8", "i4", "u1", "i2", "i1", "i8", "?", "u2", "f2", "u4", "u8"]
ARRAYS = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "a/b": np.int64(7), "c": np.array([True, False])}


@pytest.fixture
def prefix(tmp_path):
    gpq_files.write_checkpoint(tmp_path / "some.ckpt", ARRAYS)
    return tmp_path / "some.ckpt"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("bundles")


def read_all(prefix):
    return {name: tensor_bundle.read(entry) for name, entry in tensor_bundle.read_index(prefix).items()}


def same(read, arrays):
    return set(read) == set(arrays) and all(
        read[name].dtype == values.dtype
        and read[name].shape == values.shape
        and read[name].tobytes() == values.tobytes()
        for name, values in arrays.items()
    )


some_arrays = st.sampled_from(TYPES).flatmap(
    lambda dtype: npst.arrays(dtype, npst.array_shapes(min_dims=0, max_dims=4, max_side=4))
)


@settings(max_examples=50, deadline=None)
@given(st.dictionaries(st.text("abc/_-", min_size=1, max_size=30), some_arrays, min_size=1, max_size=20))
def test_reads_what_tensorflow_writes(folder, arrays):
    gpq_files.write_checkpoint(folder / "any.ckpt", arrays)
    read = read_all(folder / "any.ckpt")
    assert list(read) == sorted(arrays)
    assert same(read, arrays)


def test_reads_shards(tmp_path):
    import tensorflow as tf

    gpq_files.write_checkpoint(tmp_path / "part_0", {"a": ARRAYS["a"]})
    gpq_files.write_checkpoint(tmp_path / "part_1", {"c": ARRAYS["c"]})
    parts = [str(tmp_path / "part_0"), str(tmp_path / "part_1")]
    tf.raw_ops.MergeV2Checkpoints(checkpoint_prefixes=parts, destination_prefix=str(tmp_path / "all"))
    assert (tmp_path / "all.data-00001-of-00002").exists()
    assert same(read_all(tmp_path / "all"), {"a": ARRAYS["a"], "c": ARRAYS["c"]})
    (tmp_path / "all.data-00001-of-00002").unlink()
    with pytest.raises(ValueError, match=r"Expected the data file '.*all\.data-00001-of-00002'. Found: no such file"):
        tensor_bundle.read_index(tmp_path / "all")


def test_strings_are_listed_without_a_type(tmp_path):
    gpq_files.write_checkpoint(tmp_path / "text", {"t": np.array([b"some", b"text"], object), "a": ARRAYS["a"]})
    entries = tensor_bundle.read_index(tmp_path / "text")
    assert entries["t"].dtype is None and entries["t"].shape == (2,)
    assert (tensor_bundle.read(entries["a"]) == ARRAYS["a"]).all()


def test_every_changed_bit_of_the_index_is_refused_or_without_effect(prefix):
    index = tensor_bundle.index_path(prefix)
    whole = index.read_bytes()
    n_without_effect = 0
    for bit in range(8 * len(whole)):
        changed = bytearray(whole)
        changed[bit // 8] ^= 1 << bit % 8
        index.write_bytes(changed)
        try:
            assert same(read_all(prefix), ARRAYS)
            n_without_effect += 1
        except ValueError as error:
            assert str(error).startswith("Invalid ") and "\n" not in str(error)
    # What a change cannot matter in: the footer's filling, and the block that is always empty.
    assert n_without_effect < 8 * 64


def test_every_changed_bit_of_the_data_is_refused(prefix):
    data = prefix.with_name("some.ckpt.data-00000-of-00001")
    whole = data.read_bytes()
    assert len(whole) == sum(values.nbytes for values in ARRAYS.values())
    for bit in range(8 * len(whole)):
        changed = bytearray(whole)
        changed[bit // 8] ^= 1 << bit % 8
        data.write_bytes(changed)
        with pytest.raises(ValueError, match=r"Expected the values of .* that the index has the checksum of"):
            read_all(prefix)


@pytest.mark.parametrize("suffix", ["index", "data-00000-of-00001"])
def test_every_truncation_is_refused(prefix, suffix):
    path = prefix.with_name(f"some.ckpt.{suffix}")
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="Invalid "):
            read_all(prefix)


def test_an_absent_index_is_an_oserror_that_names_it(tmp_path):
    with pytest.raises(OSError, match=r"absent\.index"):
        tensor_bundle.read_index(tmp_path / "absent")


# An index written by hand, every checksum right: what a stranger could send.


def varint(number):
    number &= 2**64 - 1
    content = b""
    while number > 127:
        content += bytes([number & 127 | 128])
        number >>= 7
    return content + bytes([number])


def field(number, value):
    """A field of a protocol buffer: an integer, or a message within."""
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    return varint(number << 3 | 2) + varint(len(value)) + value


def entry(shape=(1,), dtype=1, shard=0, offset=0, size=4, checksum=0):
    axes = b"".join(field(2, field(1, length)) for length in shape)
    checksum = b"\x35" + struct.pack("<I", checksum)
    return field(1, dtype) + field(2, axes) + field(3, shard) + field(4, offset) + field(5, size) + checksum


HEADER = field(1, 1) + field(3, field(1, 1))


def pair(key, value, n_shared=0):
    return varint(n_shared) + varint(len(key)) + varint(len(value)) + key + value


def block(content, n_restarts=1, kind=0):
    content += bytes(4) + struct.pack("<I", n_restarts)
    checksum = gpq_files.crc32c_bit_by_bit(content + bytes([kind]))
    masked = ((checksum >> 15 | checksum << 17) + 0xA282EAD8) & 0xFFFFFFFF
    return content + bytes([kind]) + struct.pack("<I", masked)


def index_of(*pairs, data=None, handle=None):
    data = block(b"".join(pairs)) if data is None else data
    listing = block(pair(b"z", handle or varint(0) + varint(len(data) - 5)))
    footer = varint(0) + varint(0) + varint(len(data)) + varint(len(listing) - 5)
    return data + listing + footer.ljust(40, b"\0") + struct.pack("<Q", 0xDB4775248B80FB57)


def with_x(**changes):
    return index_of(pair(b"", HEADER), pair(b"x", entry(**changes)))


def test_the_index_written_by_hand_is_as_tensorflows(tmp_path):
    zeros = gpq_files.crc32c_bit_by_bit(bytes(4))
    checksum = ((zeros >> 15 | zeros << 17) + 0xA282EAD8) & 0xFFFFFFFF
    (tmp_path / "x.index").write_bytes(with_x(checksum=checksum))
    (tmp_path / "x.data-00000-of-00001").write_bytes(bytes(4))
    assert same(read_all(tmp_path / "x"), {"x": np.zeros(1, np.float32)})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "another kind of file, or one that is cut off"),
        (b"text " * 20, "another kind of file, or one that is cut off"),
        (bytes(2**22 + 1), "4,194,305 bytes"),
        (with_x(shape=(-1,)), r"x of shape \(18446744073709551615,\) in 4 bytes"),
        (with_x(shape=(2**62, 2**62)), "x of shape .* in 4 bytes"),
        (with_x(shape=(0,), size=0), r"x of shape \(0,\) in 0 bytes"),
        (with_x(shape=(2,)), r"x of shape \(2,\) in 4 bytes"),
        (with_x(shape=(1,) * 300), "a shape that is none"),
        (with_x(shape=(2**38,), size=2**40), r"Expected at least 1,099,511,627,776 bytes. Found: 4"),
        (with_x(offset=1), "Expected at least 5 bytes. Found: 4"),
        (with_x(offset=-1), "Expected at least 18,446,744,073,709,551,619 bytes. Found: 4"),
        (with_x(shard=1), "x in data file 1 of 1"),
        (with_x(checksum=1), "Expected the values of x that the index has the checksum of"),
        (index_of(pair(b"", HEADER), pair(b"x", entry()), pair(b"y", entry())), "Expected at least 8 bytes. Found: 4"),
        (index_of(pair(b"", HEADER), pair(b"x", entry()), pair(b"x", entry())), "keys that are not sorted"),
        (index_of(pair(b"", HEADER), pair(b"\xff", entry())), "can't decode byte"),
        (index_of(pair(b"", HEADER), pair(b"\x1b[31m", entry())), "name that is no text"),
        (index_of(pair(b"", HEADER), pair(b"x", b"\xff" * 20)), "a number without an end"),
        (index_of(pair(b"", HEADER), pair(b"x", b"\x0b")), "a field of kind 3"),
        (index_of(pair(b"", HEADER), pair(b"x", b"\x0a\x09")), "a field that is cut off"),
        (index_of(pair(b"", HEADER), pair(b"x", b"\x35")), "unpack_from requires"),
        (index_of(pair(b"", HEADER), pair(b"x", field(1, b"text"))), "bytes where field 1 is a number"),
        (index_of(pair(b"", HEADER), pair(b"x", field(1, 1) + field(2, 1))), "a number where a shape is expected"),
        (index_of(pair(b"", HEADER), pair(b"x", field(1, 1) + field(2, field(2, 1)))), "a shape that is none"),
        (index_of(pair(b"x", entry())), "no header"),
        (index_of(data=block(b"")), "no header"),
        (index_of(pair(b"", field(1, 1) + field(2, 1))), "a big-endian machine"),
        (index_of(pair(b"", b"")), "0 data files"),
        (index_of(pair(b"", field(1, 10**9))), "1000000000 data files"),
        (index_of(pair(b"", HEADER, n_shared=5)), "an entry that is cut off"),
        (index_of(data=block(varint(0) + varint(9) + varint(9) + b"x")), "an entry that is cut off"),
        (index_of(data=block(b"", n_restarts=2**32 - 1)), "a block without its end"),
        (index_of(data=block(pair(b"", HEADER), kind=1)), "a compressed block"),
        (index_of(handle=varint(0) + varint(2**60)), "a block that is cut off"),
        (index_of(handle=varint(0) + varint(3)), "a block with another checksum"),
        (index_of(handle=b"\x80"), "index out of range"),
    ],
)
def test_refuses_hostile_indexes(tmp_path, content, message):
    (tmp_path / "x.index").write_bytes(content)
    (tmp_path / "x.data-00000-of-00001").write_bytes(bytes(4))
    with pytest.raises(ValueError, match=message) as error:
        read_all(tmp_path / "x")
    assert str(error.value).startswith(f"Invalid '{tmp_path}/x.") and "\n" not in str(error.value)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(st.binary(max_size=5), st.binary(max_size=40)), max_size=4))
def test_any_index_with_right_checksums_is_read_or_refused(folder, pairs):
    (folder / "any.index").write_bytes(index_of(*(pair(*one) for one in [(b"", HEADER), *sorted(pairs)])))
    (folder / "any.data-00000-of-00001").write_bytes(bytes(4))
    try:
        tensor_bundle.read_index(folder / "any")
    except ValueError as error:
        assert str(error).startswith("Invalid ")
