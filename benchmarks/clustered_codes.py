"""Codes with the structure of learned ones, for the benchmarks of the index.

Random codes mislead: no two are alike and all are about equally far. These come from descriptors in 1,000 clusters of
unequal size (share proportional to rank ** -.5) on a plane of 24 dimensions, with noise on and off the plane, every
book normalised as GPQ's; Faiss learns the codebook from such descriptors, and encodes.
"""

import numpy as np

N_CLUSTER, N_LATENT = 1000, 24
N_TRAIN = {16: 20_000, 256: 50_000}
CHUNK = 100_000


def clustered_codes(n, n_query, M, K, d, seed=0):
    """Draw a codebook, codes and queries.

    Returns:
        codebook: float32 (M, K, d).
        codes: uint8 (n, ceil(M * bits / 8)), as Faiss packs them.
        queries: float32 (n_query, M * d), from the same clusters.
    """
    import faiss

    rng = np.random.default_rng(seed)
    plane = rng.standard_normal((N_LATENT, M * d), dtype=np.float32)
    centres = rng.standard_normal((N_CLUSTER, N_LATENT), dtype=np.float32)
    share = np.arange(1, N_CLUSTER + 1) ** -0.5
    share /= share.sum()

    def descriptors(n):
        latent = centres[rng.choice(N_CLUSTER, n, p=share)]
        latent += 0.4 * rng.standard_normal(latent.shape, dtype=np.float32)
        x = (latent @ plane + rng.standard_normal((n, M * d), dtype=np.float32)).reshape(n, M, d)
        return (x / np.linalg.norm(x, axis=2, keepdims=True)).reshape(n, M * d)

    quantizer = faiss.ProductQuantizer(M * d, M, K.bit_length() - 1)
    quantizer.train(descriptors(N_TRAIN[K]))
    queries = descriptors(n_query)
    codes = [quantizer.compute_codes(descriptors(min(CHUNK, n - at))) for at in range(0, n, CHUNK)]
    return faiss.vector_to_array(quantizer.centroids).reshape(M, K, d), np.concatenate(codes), queries


def unpacked(codes, M):
    """uint8 (n, M), in Fortran order, so that a book is contiguous."""
    if codes.shape[1] == M:
        return np.asfortranarray(codes)
    words = np.empty((len(codes), M), np.uint8, order="F")
    words[:, ::2], words[:, 1::2] = codes & 15, codes[:, : M // 2] >> 4
    return words


def exact_distances(codebook, metric, codes, query):
    """float32 (n,), from unpacked codes: the sums that the exact engine makes."""
    from gpq_tf.index import distance_table

    table = distance_table(query[None], codebook, metric)[:, :, 0]
    total = table[0].take(codes[:, 0])
    for book in range(1, len(table)):
        total += table[book].take(codes[:, book])
    return total
