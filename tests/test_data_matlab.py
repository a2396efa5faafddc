import struct
import zlib

import numpy as np
import pytest
import scipy.io
import scipy.sparse
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from gpq_tf.data import matlab
from tests import golden

TYPES = ["f8", "f4", "i1", "u1", "i2", "u2", "i4", "u4", "i8", "u8"]
SPARSE = scipy.sparse.csc_matrix(np.array([[0, 1.5, 1], [-2, 0, 0]]))


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tmp_path_factory.mktemp("matlab") / "some.mat"


@golden.needs_golden
def test_reads_what_scipy_reads_of_a_trusted_file():
    trusted = scipy.io.loadmat(golden.GPQ / "narrow" / "ImageNet_pretrained.mat")
    arrays = matlab.load_matlab(golden.GPQ / "narrow" / "ImageNet_pretrained.mat")
    assert len(arrays) == 40
    assert set(arrays) == {name for name in trusted if not name.startswith("__")}
    for name, array in arrays.items():
        assert array.dtype == trusted[name].dtype and (array == trusted[name]).all()


shapes = npst.array_shapes(min_dims=2, max_dims=4, min_side=0, max_side=5)
some_arrays = st.sampled_from(TYPES).flatmap(lambda dtype: npst.arrays(dtype, shapes))


@settings(max_examples=100, deadline=None)
@given(some_arrays, st.booleans())
def test_reads_what_scipy_writes(path, array, do_compression):
    scipy.io.savemat(path, {"x": array, "a name beyond four bytes": array}, do_compression=do_compression)
    read = matlab.load_matlab(path)
    assert set(read) == {"x", "a name beyond four bytes"}
    for name in read:
        assert read[name].dtype == array.dtype and read[name].shape == array.shape
        assert np.array_equal(read[name], array, equal_nan=array.dtype.kind == "f")


@pytest.mark.parametrize("do_compression", [False, True])
@pytest.mark.parametrize("matrix", [SPARSE, SPARSE != 0, SPARSE[:, :0], scipy.sparse.csc_matrix((2, 3))])
def test_reads_sparse_matrices(path, matrix, do_compression):
    scipy.io.savemat(path, {"s": matrix}, do_compression=do_compression)
    read = matlab.load_matlab(path)["s"]
    assert isinstance(read, scipy.sparse.csc_matrix) and read.shape == matrix.shape
    assert (read.toarray() == matrix.toarray()).all()


def test_other_classes_are_left_out(path):
    others = {
        "text": "abc",
        "cell": np.array([1, "a"], object),
        "struct": {"a": 1},
        "complex": np.array([[1j]]),
    }
    scipy.io.savemat(path, {**others, "x": np.eye(2)})
    assert list(matlab.load_matlab(path)) == ["x"]


def element(kind, content):
    return struct.pack("<II", kind, len(content)) + content + b"\0" * (-len(content) % 8)


def ints(*values):
    return element(5, np.array(values, "<i4").tobytes())


def file_of(*parts, matrix_class=6, compress=False):
    """A MATLAB file of one variable x."""
    flags = element(6, struct.pack("<II", matrix_class, 0))
    shape, *values = parts
    variable = element(14, flags + shape + element(1, b"x") + b"".join(values))
    if compress:
        packed = zlib.compress(variable)
        variable = struct.pack("<II", 15, len(packed)) + packed
    return b" " * 124 + b"\x00\x01IM" + variable


def sparse_file(rows, starts, n_values):
    return file_of(ints(2, 3), ints(*rows), ints(*starts), element(9, bytes(8 * n_values)), matrix_class=5)


DOUBLES = element(9, bytes(48))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "another header"),
        (b"MATLAB 5.0 MAT-file", "another header"),
        (b" " * 124 + b"\x00\x02IM", "another header"),
        (file_of(ints(2, 3), DOUBLES)[:-1], "an element of .* that is cut off"),
        (
            file_of(ints(2, 3), DOUBLES) + struct.pack("<II", 14, 2**32 - 1),
            "an element of 4,294,967,295 bytes that",
        ),
        (file_of(ints(2, 3), DOUBLES) + b"\0\0\0", "unpack_from requires"),
        (file_of(ints(2, 3), DOUBLES, compress=True)[:-3], "an element of .* that is cut off"),
        (
            file_of(ints(2, 3), element(9, bytes(10**7)), compress=True),
            "cut off or grows beyond 1,000,000 bytes",
        ),
        (file_of(ints(2, 4), DOUBLES), r"'x' that claims shape \(2, 4\) for 6 numbers"),
        (file_of(ints(2**31 - 1, 2**31 - 1), DOUBLES), "'x' that claims shape .* for 6 numbers"),
        (file_of(ints(2, 3)), r"'x' that claims shape \(2, 3\) for 0 numbers"),
        (file_of(ints(-2, -3), DOUBLES), "'x' without a plain shape"),
        (file_of(ints(6), DOUBLES), "'x' without a plain shape"),
        (file_of(DOUBLES, DOUBLES), "'x' without a plain shape"),
        (file_of(ints(2, 3), element(9, bytes(47))), "buffer size must be a multiple"),
        (file_of(ints(2, 3), element(16, b"text")), "kind 16 where numbers are expected"),
        (sparse_file([1, 0, 0], [0, 1, 2], 3), "column starts do not rise from 0"),
        (sparse_file([1, 0, 0], [0, 2, 1, 3], 3), "column starts do not rise from 0"),
        (sparse_file([1, 0, 0], [0, 1, 2, -1], 3), "column starts do not rise from 0"),
        (sparse_file([1, 0, 0], [1, 1, 2, 3], 3), "column starts do not rise from 0"),
        (sparse_file([1, 0, 0], [0, 1, 2, 2**31 - 1], 3), "claims 2,147,483,647 values of 3"),
        (sparse_file([1, 0], [0, 1, 2, 3], 3), "claims 3 values of 3"),
        (sparse_file([1, 0, 2], [0, 1, 2, 3], 3), r"rows outside 0\.\.1"),
        (sparse_file([1, 0, -1], [0, 1, 2, 3], 3), r"rows outside 0\.\.1"),
        (file_of(ints(2, 3), ints(0), matrix_class=5), "without rows, columns and values"),
    ],
)
def test_refuses_damaged_and_hostile_files(path, content, message):
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        matlab.load_matlab(path, max_bytes=10**6)
    assert str(error.value).startswith(f"Invalid {path}. Expected a MATLAB file of version 5. Found: ")


@pytest.mark.parametrize("array", [SPARSE, np.arange(6.0).reshape(2, 3)])
def test_every_flipped_bit_is_refused_or_read(path, array):
    scipy.io.savemat(path, {"label_Similarity": array})
    whole = path.read_bytes()
    for bit in range(8 * 120, 8 * len(whole)):
        changed = bytearray(whole)
        changed[bit // 8] ^= 1 << bit % 8
        path.write_bytes(changed)
        try:
            for read in matlab.load_matlab(path).values():
                scipy.sparse.coo_matrix(read).sum_duplicates()  # goes through every index
        except ValueError as error:
            assert str(error).startswith(f"Invalid {path}. Expected a MATLAB file of version 5")


def test_an_absent_file_is_an_oserror_that_names_it(tmp_path):
    with pytest.raises(OSError, match=r"absent\.mat"):
        matlab.load_matlab(tmp_path / "absent.mat")
