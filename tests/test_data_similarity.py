import numpy as np
import pytest
import scipy.io
import scipy.sparse
from hypothesis import given, settings
from hypothesis import strategies as st

from gpq_tf.data import similarity

MATRIX = np.array([[0, 1, 1], [1, 0, 0]])


def write(folder, matrix, name="label_Similarity"):
    scipy.io.savemat(folder / "similarity.mat", {name: matrix, "other": np.zeros(3)}, do_compression=True)
    return folder / "similarity.mat"


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    return tmp_path_factory.mktemp("similarity") / "similarity.mat"


labels = st.lists(st.integers(0, 3), min_size=1, max_size=30)


@settings(max_examples=50, deadline=None)
@given(labels, labels)
def test_what_is_written_is_equality_of_labels(scratch, query_labels, gallery_labels):
    similarity.write_similarity(scratch, query_labels, gallery_labels)
    stored = scipy.io.loadmat(scratch)["label_Similarity"]
    matrix = similarity.read_similarity(scratch, len(query_labels), len(gallery_labels))
    assert scipy.sparse.issparse(stored) and isinstance(matrix, scipy.sparse.csr_matrix) and matrix.dtype == bool
    for q, query_label in enumerate(query_labels):
        for n, gallery_label in enumerate(gallery_labels):
            assert (stored[q, n] == 1) == matrix[q, n] == (query_label == gallery_label)


@pytest.mark.parametrize(
    "stored",
    [
        MATRIX.astype(float),
        MATRIX.astype(np.uint8),
        scipy.sparse.csc_matrix(MATRIX, dtype=float),
        scipy.sparse.csr_matrix(MATRIX, dtype=float),
        scipy.sparse.csc_matrix(MATRIX, dtype=bool),
        scipy.sparse.csc_matrix((np.array([1.0, 0, 1, 1]), [1, 1, 0, 0], [0, 1, 3, 4]), (2, 3)),  # a stored zero
    ],
)
def test_reads_sparse_and_dense_numbers(tmp_path, stored):
    matrix = similarity.read_similarity(write(tmp_path, stored), 2, 3)
    assert matrix.dtype == bool and matrix.nnz == 3
    assert (matrix.toarray() == MATRIX).all()


def test_the_papers_size_is_small_on_disk(tmp_path):
    query_labels, gallery_labels = np.repeat(np.arange(10), 100), np.repeat(np.arange(10), 5400)
    similarity.write_similarity(tmp_path / "whole.mat", query_labels, gallery_labels)
    assert (tmp_path / "whole.mat").stat().st_size < 1e6
    matrix = similarity.read_similarity(tmp_path / "whole.mat", 1000, 54000)
    assert matrix.nnz == 5_400_000
    assert (matrix[999].indices == np.arange(48600, 54000)).all()


@pytest.mark.parametrize(
    ("stored", "name", "message"),
    [
        (MATRIX.T.copy(), "label_Similarity", r"of shape \(2, 3\)\. Found: \(3, 2\)"),
        (MATRIX, "similarity", r"of shape \(2, 3\)\. Found: similarity, other"),
        (MATRIX * 2, "label_Similarity", "of 0 and 1. Found: other values"),
        (np.full((2, 3), np.nan), "label_Similarity", "of 0 and 1. Found: other values"),
        (scipy.sparse.csc_matrix(MATRIX * 0.5), "label_Similarity", "of 0 and 1. Found: other values"),
        (np.full((2, 3), "x", object), "label_Similarity", "Found: other"),
    ],
)
def test_refuses_other_matrices(tmp_path, stored, name, message):
    path = write(tmp_path, stored, name)
    with pytest.raises(ValueError, match=message) as error:
        similarity.read_similarity(path, 2, 3)
    assert str(error.value).startswith(f"Invalid {path}. Expected label_Similarity")


def test_a_file_that_grows_beyond_what_a_dense_matrix_takes_is_refused(tmp_path):
    path = write(tmp_path, np.zeros((1000, 1000)))
    with pytest.raises(ValueError, match="grows beyond 1,048,672 bytes"):
        similarity.read_similarity(path, 2, 3)


def test_refuses_labels_that_are_not_classes(tmp_path):
    with pytest.raises(ValueError, match=r"Invalid gallery_labels. Expected integers of one axis. Received: float64"):
        similarity.write_similarity(tmp_path / "x.mat", [0, 1], [0.5, 1.0])
    with pytest.raises(
        ValueError, match=r"Invalid query_labels. Expected integers of one axis. Received: int64 \(1, 2"
    ):
        similarity.write_similarity(tmp_path / "x.mat", [[0, 1]], [0, 1])
    assert not list(tmp_path.iterdir())


def test_an_absent_file_is_an_oserror_that_names_it(tmp_path):
    with pytest.raises(OSError, match=r"absent\.mat"):
        similarity.read_similarity(tmp_path / "absent.mat", 2, 3)
