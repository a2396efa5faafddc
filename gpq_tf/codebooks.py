"""A codebook for descriptors that were learned without one: fitted by Faiss, and put into a CGD model."""

import numpy as np

from gpq_tf import retrieval
from gpq_tf.network import RetrievalModel
from gpq_tf.quantizer import decode

METHODS = ("kmeans", "opq")
# Faiss's numbers are ints of C.
_MOST_SEEDS = 2**31
# Turns of rotation and codewords; the error of clustered descriptors hardly falls after so many.
_ROUNDS = 20


def fit(descriptors, n_book, n_word=256, method="kmeans", seed=0):
    """Fit a product quantizer to descriptors: the codewords of each book are k-means centres of its sub-vectors.

    "kmeans" is product quantization (Jegou, Douze and Schmid, TPAMI 2011). "opq" first learns a rotation that spreads
    the descriptors' variance over the books, by turns with the codewords (Ge, He, Ke and Sun, "Optimized Product
    Quantization", TPAMI 2014, section 3.1). k-means is Faiss's.

    Args:
        descriptors: float (N, D), at least n_word of them. Faiss takes a sample of more than 256 a codeword.
        n_book: int M, divides D.
        n_word: int K, a power of two from 2 to 65536.
        method: "kmeans" or "opq".
        seed: int >= 0, of what k-means and the rotation begin with.

    Returns:
        codebook: float32 (M, K, D / M).
        rotation: float32 (D, D), orthogonal; the codebook is for descriptors @ rotation. None by "kmeans".

    Raises:
        ValueError: if an argument does not fit, there are too few descriptors, some are not finite, or Faiss is not
            installed.

    Example:
        >>> descriptors = np.random.default_rng(0).normal(size=(50, 6)).astype("float32")
        >>> codebook, rotation = fit(descriptors, n_book=3, n_word=4, method="opq")
        >>> codebook.shape, rotation.shape
        ((3, 4, 2), (6, 6))
    """
    descriptors = np.ascontiguousarray(descriptors, np.float32)
    if descriptors.ndim != 2 or not descriptors.shape[1]:
        raise ValueError(f"Invalid descriptors. Expected shape (N, D). Received: shape {descriptors.shape}")
    check_sizes(len(descriptors), descriptors.shape[1], n_book, n_word, method)
    if not np.isfinite(descriptors).all():
        row = int(np.argmin(np.isfinite(descriptors).all(axis=1)))
        raise ValueError(f"Invalid descriptors. Expected finite values. Received: others in row {row}")
    try:
        import faiss
    except ImportError as error:
        raise ValueError(
            "Invalid installation. Expected Faiss, which fits the codebook (`pip install faiss-cpu`). "
            f"Received: {error}"
        ) from error
    rotation = None
    quantizer = faiss.ProductQuantizer(descriptors.shape[1], n_book, n_word.bit_length() - 1)
    quantizer.cp.seed = seed % _MOST_SEEDS
    quantizer.cp.min_points_per_centroid = 1  # it prints a warning otherwise
    if method == "opq":
        rotation = _rotation(descriptors, quantizer, faiss.ProductQuantizer.Train_hot_start, seed)
    quantizer.train(turned(descriptors, rotation))
    return faiss.vector_to_array(quantizer.centroids).reshape(n_book, n_word, -1), rotation


def check_sizes(n, size, n_book, n_word, method):
    """Refuse with a ValueError what `fit` refuses of N descriptors of D values, before there are any.

    Args:
        n: int N.
        size: int D.
        n_book, n_word, method: as of `fit`.

    Example:
        >>> check_sizes(1000, 48, n_book=5, n_word=16, method="opq")
        Traceback (most recent call last):
        ...
        ValueError: Invalid n_book. Expected a positive integer up to 256 dividing D=48. Received: n_book=5
    """
    if not 1 <= n_book <= 256 or size % n_book:
        raise ValueError(
            f"Invalid n_book. Expected a positive integer up to 256 dividing D={size}. Received: n_book={n_book}"
        )
    if not 2 <= n_word <= 65_536 or n_word & (n_word - 1):
        raise ValueError(f"Invalid n_word. Expected a power of two from 2 to 65536. Received: n_word={n_word}")
    if method not in METHODS:
        raise ValueError(f"Invalid method. Expected one of {', '.join(METHODS)}. Received: method={method!r}")
    if n < n_word:
        raise ValueError(
            f"Invalid descriptors. Expected at least n_word={n_word}, one for each codeword. Received: {n}"
        )


def check_model(model):
    """Refuse with a ValueError a RetrievalModel that `with_codebook` does not take."""
    if model.head_name != "cgd":
        raise ValueError(
            f"Invalid model. Expected one of the head cgd; others learn their codebook. Received: {model.head_name}"
        )


def with_codebook(model, codebook, rotation=None, descriptors=None):
    """The same CGD model with a codebook for its descriptors.

    Args:
        model: RetrievalModel of the head cgd.
        codebook: float (M, K, d), K a power of two.
        rotation: float (D, D), orthogonal: descriptors are to come out multiplied by it. Or None.
        descriptors: float (N, D), those that the codebook was fitted to, rotated, whose mean and spread training would
            go on from. None takes the codewords'.

    Returns:
        RetrievalModel. A rotation that `model` has is kept, in front of the new one; its codebook is not.

    Raises:
        ValueError: if the model is of another head, or the sizes do not fit it.
    """
    check_model(model)
    n_book, n_word = codebook.shape[:2]
    rotated = rotation is not None or model.architecture["rotated"]
    sizes = {"n_book": n_book, "bn_word": n_word.bit_length() - 1, "rotated": rotated}
    made = RetrievalModel(**{**model.architecture, **sizes}, dtype=model.dtype_policy)
    if made.codebook.shape != codebook.shape:
        raise ValueError(f"Invalid codebook. Expected shape {made.codebook.shape}. Received: {codebook.shape}")
    values = {weight.path: weight for weight in model.weights if "/quantizer/" not in weight.path}
    for weight in made.weights:
        if weight.path in values:
            weight.assign(values[weight.path])
    if descriptors is None:
        centre = codebook.mean(axis=1, dtype=np.float64).reshape(-1)
        spread = np.sqrt(np.mean(np.square(codebook - centre.reshape(n_book, 1, -1))))
    else:
        centre = descriptors.mean(axis=0, dtype=np.float64)
        spread = np.sqrt(np.mean(np.square(descriptors - centre)))
    made.head.quantizer.place(codebook, centre, spread)
    if rotation is not None:
        made.head.rotation.assign(np.asarray(made.head.rotation) @ rotation)
    made.record = dict(model.record)
    return made


def turned(descriptors, rotation):
    """Descriptors multiplied by what `fit` returned as their rotation; themselves where that is None."""
    return descriptors if rotation is None else descriptors @ rotation


def variance_lost(model, descriptors):
    """Share of the descriptors' variance that codes lose: squared distances from what the codes stand for.

    Descriptors of a network that has learned little lie close together, so that the distances alone tell nothing.

    Args:
        model: RetrievalModel with a codebook.
        descriptors: float (N, D), what `model.embed` returned.

    Returns:
        float >= 0.
    """
    error = descriptors - np.asarray(decode(retrieval.codes_of(model, descriptors), model.codebook))
    variance = np.square(descriptors - descriptors.mean(axis=0)).sum()
    # Descriptors of one and the same image differ by rounding.
    return float(np.square(error).sum() / variance) if variance > 1e-12 * np.square(descriptors).sum() else 0.0


def _rotation(descriptors, quantizer, hot_start, seed):
    """The rotation of optimized product quantization, float32 (D, D); the quantizer is left trained for it, nearly.

    As faiss.OPQMatrix does, which takes no seed.
    """
    size, n_round = descriptors.shape[1], quantizer.cp.niter
    rotation = np.linalg.qr(np.random.default_rng(seed).normal(size=(size, size)))[0].astype(np.float32)
    for _ in range(_ROUNDS):
        rotated = descriptors @ rotation
        quantizer.train(rotated)
        quantizer.train_type, quantizer.cp.niter = hot_start, 4
        # The rotation that brings the descriptors nearest to what their codes stand for (orthogonal Procrustes).
        left, _, right = np.linalg.svd(descriptors.T @ quantizer.decode(quantizer.compute_codes(rotated)))
        rotation = left @ right
    quantizer.cp.niter = n_round
    return _orthogonal(rotation)


def _orthogonal(matrix):
    """The nearest orthogonal matrix, float32, to one that float32 sums have made so but for their rounding.

    One step of Newton's iteration for the polar decomposition (Higham, "Functions of Matrices", section 8.3), in
    float64.
    """
    matrix = matrix.astype(np.float64)
    return (matrix @ (1.5 * np.eye(len(matrix)) - 0.5 * matrix.T @ matrix)).astype(np.float32)
