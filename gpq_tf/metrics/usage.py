"""How well the codes use their codebook."""

import numpy as np


def codebook_usage(codes, n_word):
    """How many codewords of each book a gallery uses, and how evenly.

    Args:
        codes: integer (N, M), N at least 1.
        n_word: int K.

    Returns:
        dict of name -> (M,): used, int64, codewords that occur; entropy, float64, in bits: log2(K) where all occur
        equally often, 0 where one takes all.

    Raises:
        ValueError: if `codes` is not (N, M) of integers below n_word, or is empty.

    Example:
        >>> usage = codebook_usage([[0, 1], [1, 1], [2, 1], [3, 1]], n_word=4)
        >>> usage["used"], usage["entropy"]
        (array([4, 1]), array([2., 0.]))
    """
    codes = np.asarray(codes)
    if codes.ndim != 2 or codes.dtype.kind not in "iu" or codes.size == 0:
        raise ValueError(f"Invalid codes. Expected integers (N, M). Received: {codes.dtype} of shape {codes.shape}")
    if codes.min() < 0 or codes.max() >= n_word:
        raise ValueError(f"Invalid codes. Expected 0 to {n_word - 1}. Received: {codes.min()} to {codes.max()}")
    shares = np.stack([np.bincount(book, minlength=n_word) for book in codes.T]) / len(codes)  # (M, K)
    surprise = -np.log2(shares, out=np.zeros_like(shares), where=shares > 0)
    return {"used": np.count_nonzero(shares, axis=1), "entropy": np.sum(shares * surprise, axis=1)}
