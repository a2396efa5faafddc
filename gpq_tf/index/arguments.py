"""What PQIndex accepts: every argument checked and brought into the type that is kept."""

import os
import re

import numpy as np

ENGINES = ("auto", "exact", "faiss")
FAISS_LARGEST_K = 256
METRICS = ("inner_product", "l2", "squared_l2")
LARGEST_M, SMALLEST_K, LARGEST_K = 256, 2, 65_536

_INT64_MAX = np.iinfo(np.int64).max
_LONGEST_MODEL_NAME = 4096  # characters, a long path; the header of a file has room for it


def checked_metric(metric):
    """`metric`, or ValueError."""
    if metric not in METRICS:
        raise ValueError(f"Invalid metric. Expected one of {', '.join(METRICS)}. Received: metric={metric!r}")
    return metric


def checked_engine(engine, K):
    """`engine`, one of `ENGINES` that can search codewords numbered below K, or ValueError."""
    if engine not in ENGINES:
        raise ValueError(f"Invalid engine. Expected one of {', '.join(ENGINES)}. Received: engine={engine!r}")
    if engine == "faiss" and K > FAISS_LARGEST_K:
        raise ValueError(
            f"Invalid engine. Expected exact or auto for K={K}: Faiss's scans serve up to {FAISS_LARGEST_K} codewords. "
            "Received: engine='faiss'"
        )
    return engine


def checked_codebook(codebook):
    """A read-only copy of `codebook`, float32 (M, K, d), or ValueError."""
    with np.errstate(over="ignore"):  # float64 values above float32's become inf and are refused below
        codebook = np.array(codebook, np.float32)
    if codebook.ndim != 3 or codebook.size == 0:
        raise ValueError(
            f"Invalid codebook. Expected a non-empty array of shape (M, K, d). Received: shape {codebook.shape}"
        )
    if codebook.shape[0] > LARGEST_M or not SMALLEST_K <= codebook.shape[1] <= LARGEST_K:
        raise ValueError(
            f"Invalid codebook. Expected shape (M, K, d) with M up to {LARGEST_M} and K from {SMALLEST_K} to "
            f"{LARGEST_K}. Received: shape {codebook.shape}"
        )
    if not np.isfinite(codebook).all():
        book, word = np.argwhere(~np.isfinite(codebook))[0, :2]
        raise ValueError(
            f"Invalid codebook. Expected finite values. Received: NaN or infinity in book {book}, word {word}"
        )
    codebook.setflags(write=False)
    return codebook


def checked_model(model):
    """`model` as a new dict of name and sha256, None, or ValueError."""
    if model is None:
        return None
    fits = (
        isinstance(model, dict)
        and set(model) == {"name", "sha256"}
        and all(isinstance(value, str) for value in model.values())
        and len(model["name"]) <= _LONGEST_MODEL_NAME
        and re.fullmatch("[0-9a-f]{64}", model["sha256"])
    )
    if not fits:
        raise ValueError(
            'Invalid model. Expected None or {"name": str, "sha256": 64 hexadecimal digits}. '
            f"Received: model={str(model)[:200]!r}"
        )
    return dict(model)


def checked_codes(codes, M, K):
    """`codes` as an integer array (n, M) of values below K, or ValueError."""
    codes = _integers("codes", codes)
    if codes.ndim != 2 or codes.shape[1] != M:
        raise ValueError(f"Invalid codes. Expected shape (n, M={M}). Received: shape {codes.shape}")
    if codes.size and (codes.min() < 0 or codes.max() >= K):
        row, book = np.argwhere((codes < 0) | (codes >= K))[0]
        raise ValueError(
            f"Invalid codes. Expected values in [0, K={K}). Received: {codes[row, book]} in row {row}, book {book}"
        )
    return codes


def checked_ids(ids):
    """`ids` as int64 (n,), or ValueError."""
    ids = _integers("ids", ids)
    if ids.ndim != 1:
        raise ValueError(f"Invalid ids. Expected shape (n,). Received: shape {ids.shape}")
    if ids.size and ids.max() > _INT64_MAX:
        raise ValueError(f"Invalid ids. Expected int64. Received: {ids.max()}")
    return ids.astype(np.int64)


def checked_new_ids(ids, n):
    """`ids` as int64 (n,), without -1 and without repeats, or ValueError."""
    ids = checked_ids(ids)
    if len(ids) != n:
        raise ValueError(f"Invalid ids. Expected one for each of {n} codes. Received: {len(ids)}")
    if (ids == -1).any():
        raise ValueError("Invalid ids. Expected ids other than -1, the mark of nothing found. Received: -1")
    repeated = first_repeated(ids)
    if repeated is not None:
        raise ValueError(f"Invalid ids. Expected unique ids. Received: {repeated} twice")
    return ids


def first_repeated(ids):
    """The smallest id that int64 (n,) holds twice, or None. Ids in ascending order are not sorted again."""
    if (ids[1:] > ids[:-1]).all():
        return None
    ids = np.sort(ids)
    repeated = ids[1:][ids[1:] == ids[:-1]]
    return int(repeated[0]) if len(repeated) else None


def checked_labels(labels, n):
    """`labels` as int32 (n,), classes, or uint8 (n, C) of 0 and 1, multi-hot; or ValueError."""
    labels = np.asarray(labels)
    if labels.ndim not in (1, 2) or len(labels) != n or 0 in labels.shape[1:]:
        raise ValueError(f"Invalid labels. Expected shape (n={n},) or (n={n}, C). Received: shape {labels.shape}")
    if labels.size and labels.dtype.kind not in ("iu" if labels.ndim == 1 else "iub"):
        raise ValueError(f"Invalid labels. Expected integers. Received: dtype {labels.dtype}")
    dtype = np.dtype(np.int32 if labels.ndim == 1 else np.uint8)
    low, high = (np.iinfo(dtype).min, np.iinfo(dtype).max) if labels.ndim == 1 else (0, 1)
    wrong = labels[(labels < low) | (labels > high)]
    if len(wrong):
        raise ValueError(f"Invalid labels. Expected values from {low} to {high}. Received: {wrong[0]}")
    return labels.astype(dtype)


def checked_paths(paths, n):
    """`paths` as a list of n bytes, UTF-8, or ValueError."""
    if isinstance(paths, str | bytes):
        raise ValueError(f"Invalid paths. Expected a sequence of them. Received: {paths!r}")
    paths = list(paths)
    if len(paths) != n:
        raise ValueError(f"Invalid paths. Expected one for each of {n} codes. Received: {len(paths)}")
    encoded = []
    for row, path in enumerate(paths):
        try:
            # Names that are not UTF-8 reach Python with surrogates in place of the odd bytes, and leave as they came.
            encoded.append(os.fspath(path).encode("utf-8", "surrogateescape"))
        except (TypeError, AttributeError, UnicodeEncodeError) as error:
            raise ValueError(
                f"Invalid paths. Expected text or pathlib.Path. Received: {path!r} in row {row}"
            ) from error
    return encoded


def checked_queries(queries, D):
    """`queries` as float32 (Q, D), finite, or ValueError."""
    with np.errstate(over="ignore"):  # float64 values above float32's become inf and are refused below
        queries = np.asarray(queries)
        if queries.dtype.kind not in "fiub":
            raise ValueError(f"Invalid queries. Expected real numbers. Received: dtype {queries.dtype}")
        queries = queries.astype(np.float32)
    if queries.ndim != 2 or queries.shape[1] != D:
        raise ValueError(f"Invalid queries. Expected shape (Q, D={D}). Received: shape {queries.shape}")
    finite = np.isfinite(queries).all(axis=1)
    if not finite.all():
        raise ValueError(f"Invalid queries. Expected finite values. Received: NaN or infinity in row {finite.argmin()}")
    return queries


def checked_n_probe(n_probe, K):
    """`n_probe`, None or a number of lists of codes whose codewords are numbered below K, or ValueError."""
    if n_probe is None:
        return None
    if K > FAISS_LARGEST_K:
        raise ValueError(
            f"Invalid n_probe. Expected None for K={K}: inverted lists serve up to {FAISS_LARGEST_K} codewords. "
            f"Received: n_probe={n_probe!r}"
        )
    return checked_positive("n_probe", n_probe)


def checked_positive(name, value):
    """`value`, an integer from 1 up, or ValueError."""
    if not isinstance(value, int | np.integer) or isinstance(value, bool) or value < 1:
        raise ValueError(f"Invalid {name}. Expected a positive integer. Received: {name}={value!r}")
    return value


def _integers(name, values):
    values = np.asarray(values)
    if values.dtype.kind not in "iu" and values.size:
        raise ValueError(f"Invalid {name}. Expected integers. Received: dtype {values.dtype}")
    return values if values.dtype.kind in "iu" else values.astype(np.int64)
