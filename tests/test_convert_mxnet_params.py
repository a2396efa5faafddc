import re
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from gpq_tf.convert import mxnet_params

import golden
import mxnet_files

PARAMS = golden.CGD / "params"
SMALL = {"arg:w": np.arange(6, dtype=np.float32).reshape(2, 3), "aux:m": np.array([1, -2], np.int8)}
HEAD = "<3Q"


@pytest.fixture
def path(tmp_path):
    return tmp_path / "some.params"


@pytest.fixture(scope="module")
def any_path(tmp_path_factory):
    return tmp_path_factory.mktemp("params") / "any.params"


def read(path, content):
    path.write_bytes(content)
    return mxnet_params.read(path)


def same(read, arrays):
    return list(read) == list(arrays) and all(
        read[name].dtype == values.dtype
        and read[name].shape == values.shape
        and read[name].tobytes() == values.tobytes()
        for name, values in arrays.items()
    )


def refusal(path, content):
    """What the error says behind the file's name."""
    with pytest.raises(ValueError) as caught:
        read(path, content)
    start = f"Invalid {str(path)!r}. "
    assert str(caught.value).startswith(start) and "\n" not in str(caught.value)
    return str(caught.value).removeprefix(start)


# --- files of MXNet


@golden.needs_golden
def test_golden_formats_are_read_bit_by_bit():
    expected, n_read = golden.load("params/formats/expected.npz", golden.CGD), 0
    for path in sorted((PARAMS / "formats").glob("*.params")):
        own = {
            name.partition("/")[2]: values for name, values in expected.items() if name.partition("/")[0] == path.name
        }
        if "sparse" in path.name:  # what was stored had zeros with a minus, which are no values of a sparse array
            own = {name: values + np.float32(0) for name, values in own.items()}
        if own:
            assert same(mxnet_params.read(path), own), path.name
            n_read += len(own)
        else:
            with pytest.raises(ValueError, match=r"^Invalid '.*\.params'\. Expected .* at byte \d+\. Found: "):
                mxnet_params.read(path)
    assert n_read >= 32


@golden.needs_golden
@pytest.mark.parametrize("params, values", [("*div16*-0000.params", "values.npz"), ("gluon_export-0000.params", None)])
def test_golden_checkpoints_are_read_bit_by_bit(params, values):
    (path,) = PARAMS.glob(params)
    stored = golden.load(f"params/{values or 'gluon_export_output.npz'}", golden.CGD)
    assert same(mxnet_params.read(path), {name: array for name, array in stored.items() if ":" in name})


@golden.needs_golden
def test_the_tests_write_as_mxnet_does():
    (path,) = PARAMS.glob("*div16*-0000.params")
    assert mxnet_files.params_bytes(mxnet_params.read(path)) == path.read_bytes()


# --- files of the tests' own writer

some_arrays = st.sampled_from(sorted(mxnet_files.TYPES)).flatmap(
    lambda dtype: npst.arrays(dtype, npst.array_shapes(min_dims=1, max_dims=5, max_side=4))
)
some_names = st.text(st.characters(codec="utf-8", categories=("L", "N", "P", "S")), max_size=20)


@settings(max_examples=100, deadline=None)
@given(
    st.dictionaries(some_names, some_arrays, max_size=8),
    st.sampled_from(sorted(mxnet_files.VERSIONS)),
    st.sampled_from([(1, 0), (2, 3), (3, 0)]),
)
def test_reads_what_is_written(any_path, arrays, version, device):
    assert same(read(any_path, mxnet_files.params_bytes(arrays, version, device)), arrays)


@pytest.mark.parametrize("values", [np.float32(2.5), np.zeros((0, 3), np.int64), np.zeros((3, 0, 2), np.float16)])
def test_scalars_and_empty_arrays_of_v3(path, values):
    assert same(read(path, mxnet_files.params_bytes({"a": values}, "V3")), {"a": np.asarray(values)})


def test_versions_can_be_mixed_and_names_can_be_absent(path):
    arrays = [np.full(2, place, np.float32) for place in range(4)]
    content = [
        mxnet_files.array_bytes(values, version) for values, version in zip(arrays, mxnet_files.VERSIONS, strict=True)
    ]
    assert same(read(path, mxnet_files.list_bytes(content)), {str(place): a for place, a in enumerate(arrays)})
    assert read(path, mxnet_files.list_bytes([])) == {}


@settings(max_examples=60, deadline=None)
@given(
    npst.arrays(
        "float32", npst.array_shapes(min_dims=1, max_dims=4, max_side=4), elements=st.sampled_from([0, 1.5, -2])
    )
)
def test_sparse_arrays_are_read_as_dense_ones(any_path, values):
    arrays = [mxnet_files.array_bytes(values), mxnet_files.row_sparse_bytes(values)]
    if values.ndim == 2:
        arrays.append(mxnet_files.csr_bytes(values))
    found = read(any_path, mxnet_files.list_bytes(arrays))
    assert same(found, {str(place): values for place in range(len(arrays))})


def test_sparse_arrays_without_values_and_with_other_types(path):
    for dtype, index_type in (("float16", "int64"), ("int32", "int32")):
        values = np.zeros((3, 2), dtype)
        values[1, 1] = 7
        for some in (values, np.zeros((4, 5), dtype)):
            for write in (mxnet_files.row_sparse_bytes, mxnet_files.csr_bytes):
                content = mxnet_files.list_bytes([write(some, index_type=index_type)])
                assert same(read(path, content), {"0": some})


def test_arrays_are_aligned_and_own_their_values(path):
    for values in read(path, mxnet_files.params_bytes({"abc": np.ones(3, np.int8), "d": np.ones(2)})).values():
        assert values.flags.aligned and values.flags.writeable and values.base is None


def test_names_of_the_symbol():
    assert [mxnet_params.variable_name(name) for name in ("arg:a", "aux:b", "c", "arg:aux:d")] == [
        "a",
        "b",
        "c",
        "aux:d",
    ]


# --- files that are wrong


@pytest.mark.parametrize("version", mxnet_files.VERSIONS)
def test_every_truncation_is_refused_where_it_is(path, version):
    whole = mxnet_files.params_bytes(SMALL, version)
    for length in range(len(whole)):
        message = refusal(path, whole[:length])
        at, left = re.fullmatch(r"Expected .* at byte (\d+)\. Found: (\d+) bytes", message).groups()
        assert int(at) + int(left) == length


def number_refused_of_changed_bits(path, whole, check):
    """Each is refused in one line that names the place, or passes `check`."""
    n_refused = 0
    for bit in range(8 * len(whole)):
        changed = bytearray(whole)
        changed[bit // 8] ^= 1 << bit % 8
        try:
            found = read(path, changed)
        except ValueError as error:
            assert re.match(r"Invalid '.*'\. Expected [^\n]* at byte [\d,]+\. Found: [^\n]+$", str(error))
            n_refused += 1
        else:
            check(found)
    return n_refused


@pytest.mark.parametrize("version", mxnet_files.VERSIONS)
def test_every_changed_bit_is_refused_or_changes_a_value(path, version):
    whole = mxnet_files.params_bytes(SMALL, version)

    def check(found):
        assert [values.size for values in found.values()] == [6, 2]

    n_refused = number_refused_of_changed_bits(path, whole, check)
    n_values = 8 * sum(values.nbytes for values in SMALL.values())
    assert n_refused > (8 * len(whole) - n_values) / 2


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200), st.integers(0, 3))
def test_any_bytes_are_an_error_of_one_line(any_path, content, n_arrays):
    whole = struct.pack(HEAD, 0x112, 0, n_arrays) + content
    try:
        found = read(any_path, whole)
    except ValueError as error:
        assert str(error).startswith(f"Invalid {str(any_path)!r}. Expected ") and "\n" not in str(error)
    else:
        assert sum(values.nbytes for values in found.values()) <= len(content)


def one(start, rest=b""):
    """A list of one array."""
    return struct.pack(HEAD, 0x112, 0, 1) + start + rest


V2 = struct.pack("<Ii", 0xF993FAC9, 0)
EYE = np.eye(3, dtype=np.float32)


@pytest.mark.parametrize("write", [mxnet_files.row_sparse_bytes, mxnet_files.csr_bytes])
def test_every_truncation_of_a_sparse_array_is_refused(path, write):
    whole = mxnet_files.list_bytes([write(EYE)])
    for length in range(len(whole)):
        at, left = re.search(r"at byte (\d+)\. Found: (\d+) bytes$", refusal(path, whole[:length])).groups()
        assert int(at) + int(left) == length


@pytest.mark.parametrize("write", [mxnet_files.row_sparse_bytes, mxnet_files.csr_bytes])
def test_every_changed_bit_of_a_sparse_array_is_refused_or_changes_a_value(path, write):
    whole = mxnet_files.list_bytes([write(EYE)])

    def check(found):
        assert sum(values.nbytes for values in found.values()) <= 2**28

    assert number_refused_of_changed_bits(path, whole, check) > 4 * len(whole)


ROWS, COLUMNS = (
    "Expected rows of an array (3, 3), with their numbers",
    "Expected rows of a CSR array (3, 3), with their",
)
SHAPE = "Expected a shape that an array can have at byte"
FEW = "Expected the shape of a sparse array that takes up to 268,435,456 bytes when dense at byte"


@pytest.mark.parametrize(
    "array, message",
    [
        (mxnet_files.row_sparse_bytes(EYE, rows=[0, 1, 3]), ROWS),
        (mxnet_files.row_sparse_bytes(EYE, rows=[-1, 1, 2]), ROWS),
        (mxnet_files.row_sparse_bytes(EYE, rows=[0, 1, 1]), ROWS),
        (mxnet_files.row_sparse_bytes(EYE, rows=[2, 1, 0]), ROWS),
        (mxnet_files.row_sparse_bytes(EYE, rows=[0, 1]), ROWS),
        (mxnet_files.row_sparse_bytes(EYE, rows=[[0, 1, 2]]), ROWS),
        (mxnet_files.row_sparse_bytes(EYE, rows=[0, 2**62, -(2**63)]), ROWS),
        (mxnet_files.csr_bytes(EYE, ends=[0, 1, 2]), COLUMNS),
        (mxnet_files.csr_bytes(EYE, ends=[1, 1, 2, 3]), COLUMNS),
        (mxnet_files.csr_bytes(EYE, ends=[0, 2, 1, 3]), COLUMNS),
        (mxnet_files.csr_bytes(EYE, ends=[0, 1, 2, 4]), COLUMNS),
        (mxnet_files.csr_bytes(EYE, ends=[0, 2**62, -(2**63), 3]), COLUMNS),
        (mxnet_files.csr_bytes(EYE, columns=[0, 1, 3]), COLUMNS),
        (mxnet_files.csr_bytes(EYE, columns=[0, -1, 2]), COLUMNS),
        (mxnet_files.csr_bytes(EYE, columns=[0, 1]), COLUMNS),
        (mxnet_files.csr_bytes(EYE, ends=[0, 3, 3, 3], columns=[0, 2, 1]), COLUMNS),
        (mxnet_files.csr_bytes(EYE, ends=[0, 3, 3, 3], columns=[0, 1, 1]), COLUMNS),
        (mxnet_files.row_sparse_bytes(EYE, shape=(2**24, 5)), f"{FEW} 56. Found: (16777216, 5)"),
        (mxnet_files.row_sparse_bytes(EYE, shape=(0, 2**62)), f"{SHAPE} 56. Found: (0, 4611686018427387904)"),
        (mxnet_files.row_sparse_bytes(EYE, shape=(-3, -3)), f"{SHAPE} 56. Found: (-3, -3)"),
        (mxnet_files.csr_bytes(EYE, shape=(2**40, 2**40)), f"{SHAPE} 48. Found: (1099511627776, 1099511627776)"),
        (mxnet_files.csr_bytes(EYE, shape=(3, 3, 1)), "Expected rows of a CSR array (3, 3, 1), with their"),
        (
            mxnet_files.row_sparse_bytes(EYE, index_type="float32"),
            "Expected a type of indices, int32 or int64 at byte 84. Found: float32",
        ),
    ],
)
def test_sparse_arrays_that_are_wrong(path, array, message):
    assert refusal(path, mxnet_files.list_bytes([array])).startswith(message)


def test_sparse_arrays_of_a_file_share_what_room_there_is(path):
    one = mxnet_files.row_sparse_bytes(EYE, shape=(2**23, 3))  # 96 MiB
    assert [values.shape for values in read(path, mxnet_files.list_bytes([one, one])).values()] == [(2**23, 3)] * 2
    assert "a sparse array that takes up to 67,108,864 bytes" in refusal(path, mxnet_files.list_bytes([one] * 3))


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "Expected the head of a .params file (24 bytes) at byte 0. Found: 0 bytes"),
        (
            b"PK\3\4" + bytes(20),
            "Expected 0x112 and 0, which every .params file begins with at byte 0. Found: 0x4034b50 and 0x0",
        ),
        (
            struct.pack(HEAD, 0x112, 0, 2**63),
            "Expected at most 10,000 arrays at byte 16. Found: 9,223,372,036,854,775,808",
        ),
        (one(b"<htm"), "Expected an array of 1 to 32 axes at byte 24. Found: 0x6d74683c axes"),
        (one(struct.pack("<I", 33)), "Expected an array of 1 to 32 axes at byte 24. Found: 33 axes"),
        (one(V2 + struct.pack("<i", 0)), "Expected an array of 1 to 32 axes at byte 24. Found: 0 axes"),
        (
            one(struct.pack("<Iii", 0xF993FACA, 0, -1)),
            "Expected an array of 0 to 32 axes at byte 24. Found: -1 axes",
        ),
        (
            one(struct.pack("<Ii", 0xF993FAC9, 7)),
            "Expected how an array is stored, one of 0, 1, 2 at byte 28. Found: 7",
        ),
        (
            one(V2 + struct.pack("<iqiii", 1, 2, 1, 0, 12), bytes(4)),
            "Expected the number of a type, one of 0, 1, 2, 3, 4, 5, 6, 7 at byte 52. Found: 12",
        ),
        (
            one(V2 + struct.pack("<i2qiii", 2, -1, -8, 1, 0, 0), bytes(32)),
            "Expected a shape that an array can have at byte 36. Found: (-1, -8)",
        ),
        (
            one(V2 + struct.pack("<i2qiii", 2, 2**62, 2**62, 1, 0, 0), bytes(32)),
            "Expected a shape that an array can have at byte 36. Found: (4611686018427387904, 4611686018427387904)",
        ),
        (
            one(struct.pack("<Ii", 0xF993FACA, 0) + struct.pack("<i2qiii", 2, 0, 2**62, 1, 0, 0), bytes(32)),
            "Expected a shape that an array can have at byte 36. Found: (0, 4611686018427387904)",
        ),
        (
            one(V2 + struct.pack("<i2qiii", 2, 2**20, 2**20, 1, 0, 1), bytes(32)),
            "Expected the values of float64 (1048576, 1048576) (8,796,093,022,208 bytes) at byte 64. Found: 32 bytes",
        ),
        (
            mxnet_files.list_bytes([mxnet_files.array_bytes(np.ones(1, np.int8))] * 2, ["a"]),
            "Expected as many names as arrays, 2, or none at byte 90. Found: 1",
        ),
        (
            mxnet_files.params_bytes({"a": np.ones(1, np.int8)})[:-9] + struct.pack("<Q", 2**60) + b"a",
            "Expected a name of 1,152,921,504,606,846,976 bytes at byte 73. Found: 1 bytes",
        ),
        (
            mxnet_files.list_bytes([mxnet_files.array_bytes(np.ones(1, np.int8))] * 2, ["a", "a"]),
            "Expected a name that has not been before at byte 107. Found: 'a'",
        ),
        (
            mxnet_files.params_bytes({"a\nb": np.ones(1, np.int8)}),
            "Expected a name that can be printed at byte 73. Found: b'a\\nb'",
        ),
        (
            mxnet_files.params_bytes({"ab": np.ones(1, np.int8)})[:-2] + b"\xff\xfe",
            "Expected a name that can be printed at byte 73. Found: b'\\xff\\xfe'",
        ),
        (mxnet_files.params_bytes({}) + b"abc", "Expected the end of the file at byte 32. Found: 3 bytes more"),
    ],
)
def test_messages(path, content, message):
    assert refusal(path, content) == message


def test_an_absent_file_is_an_oserror_that_names_it(tmp_path):
    with pytest.raises(OSError, match=r"absent\.params"):
        mxnet_params.read(tmp_path / "absent.params")
