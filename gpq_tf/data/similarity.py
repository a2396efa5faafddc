"""cifar10_Similarity.mat: which gallery images are relevant to which query."""

import numpy as np

from gpq_tf import files
from gpq_tf.data import matlab

NAME = "label_Similarity"


def read_similarity(path, n_query, n_gallery):
    """Read the relevance matrix of the original program, a MATLAB file.

    Args:
        path: str or Path of the .mat; its `label_Similarity` is (n_query, n_gallery), 0 or 1, sparse or not.
        n_query: int, Q.
        n_gallery: int, N.

    Returns:
        scipy.sparse.csr_matrix, bool (Q, N): True where gallery image n is relevant to query q.

    Raises:
        OSError: if the file cannot be opened.
        ValueError: if it is no MATLAB file of version 5 with such a matrix, or shape or a value is another.

    Example:
        >>> write_similarity("/tmp/gpq_tf_doctest.mat", [0, 1], [1, 1, 0])
        >>> read_similarity("/tmp/gpq_tf_doctest.mat", 2, 3).toarray().astype(int)
        array([[0, 0, 1],
               [1, 1, 0]])
    """
    import scipy.sparse

    # Sixteen bytes an entry: more than even a dense matrix of doubles takes.
    variables = matlab.load_matlab(path, max_bytes=16 * n_query * n_gallery + 2**20)
    shapes = {name: array.shape for name, array in variables.items()}
    if shapes.get(NAME) != (n_query, n_gallery):
        found = shapes.get(NAME) or ", ".join(list(shapes)[:3]) or "nothing"
        raise ValueError(f"Invalid {path}. Expected {NAME} of shape ({n_query}, {n_gallery}). Found: {found}")
    matrix = scipy.sparse.csr_matrix(variables[NAME])
    if not np.isin(matrix.data, (0, 1)).all():
        raise ValueError(f"Invalid {path}. Expected {NAME} of 0 and 1. Found: other values")
    matrix = matrix.astype(bool)
    matrix.sum_duplicates()
    matrix.eliminate_zeros()
    return matrix


def write_similarity(path, query_labels, gallery_labels):
    """Write the relevance matrix that labels imply: relevant means of the same class.

    Args:
        path: str or Path of the .mat (compressed; about 0.2 MB for CIFAR-10), written atomically.
        query_labels: integers (Q,).
        gallery_labels: integers (N,).

    Raises:
        ValueError: if the labels are not one-dimensional integers.

    Example: see `read_similarity`.
    """
    import scipy.io
    import scipy.sparse

    query_labels, gallery_labels = np.asarray(query_labels), np.asarray(gallery_labels)
    for name, labels in (("query_labels", query_labels), ("gallery_labels", gallery_labels)):
        if labels.ndim != 1 or labels.dtype.kind not in "iu":
            raise ValueError(f"Invalid {name}. Expected integers of one axis. Received: {labels.dtype} {labels.shape}")
    # Row q is the row of its class: matrix[q, n] = query_labels[q] == gallery_labels[n]
    members = {label: np.flatnonzero(gallery_labels == label).astype(np.int32) for label in set(query_labels.tolist())}
    rows = [members[label] for label in query_labels.tolist()]
    starts = np.cumsum([0] + [len(row) for row in rows])
    indices = np.concatenate([*rows, np.empty(0, np.int32)])
    matrix = scipy.sparse.csr_matrix(
        (np.ones(len(indices), bool), indices, starts), shape=(len(query_labels), len(gallery_labels))
    )
    with files.replacing(path) as temporary, open(temporary, "wb") as file:
        scipy.io.savemat(file, {NAME: matrix}, do_compression=True)
