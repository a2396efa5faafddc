"""Small files as GPQ's TensorFlow 1 program writes them, for tests and for benchmarks/fuzz_convert.py."""

import numpy as np

# Scopes of the ten convolutions and of their batch normalisations, as the original's graph has them.
SCOPES = (
    ("conv2d", "batch0"),
    ("conv2d_1", "batch0-1"),
    ("conv2d_2", "batch1"),
    ("conv2d_3", "batch1-1"),
    ("conv2d_4", "batch2"),
    ("conv2d_5", "batch2-1"),
    ("conv2d_6", "batch2-2"),
    ("conv2d_7", "batch3"),
    ("conv2d_8", "batch3-1"),
    ("conv2d_9", "batch3-2"),
)
CHANNELS = (1, 1, 2, 2, 4, 4, 4, 8, 8, 8)  # a 64th of the original's
FEATURES = 12  # channels of the last block and of the third
N_BOOK, N_WORD, LEN_CODE, N_CLASSES = 3, 4, 8, 5


def backbone_arrays(seed=0):
    """dict of name -> float32 array: the 40 that are trained."""
    rng = np.random.default_rng(seed)
    arrays, before = {}, 3
    for (conv, norm), channels in zip(SCOPES, CHANNELS, strict=True):
        arrays[f"Fixed_VGG/{conv}/kernel"] = rng.normal(size=(3, 3, before, channels))
        arrays[f"Fixed_VGG/{conv}/bias"] = rng.normal(size=channels)
        arrays[f"Fixed_VGG/{norm}/beta"] = rng.normal(size=channels)
        arrays[f"Fixed_VGG/{norm}/gamma"] = rng.normal(size=channels)
        before = channels
    return {name: values.astype(np.float32) for name, values in arrays.items()}


def checkpoint_arrays(adam=False, seed=0):
    """dict of name -> array, all of a checkpoint: 85, or 175 with Adam's slots."""
    rng = np.random.default_rng(seed)
    size = N_BOOK * LEN_CODE
    trained = backbone_arrays(seed)
    trained["Fixed_VGG/dense/kernel"] = rng.normal(size=(FEATURES, size)).astype(np.float32)
    trained["Fixed_VGG/dense/bias"] = rng.normal(size=size).astype(np.float32)
    trained["C"] = rng.normal(size=(N_CLASSES, size)).astype(np.float32)
    trained["Z"] = rng.normal(size=(N_WORD, size)).astype(np.float32)
    arrays = dict(trained)
    for (_, norm), channels in zip(SCOPES, CHANNELS, strict=True):
        scope = f"Fixed_VGG/{norm}"
        arrays[f"{scope}/moving_mean"] = rng.normal(size=channels).astype(np.float32)
        arrays[f"{scope}/moving_variance"] = rng.uniform(0.5, 2, channels).astype(np.float32)
        arrays[f"{scope}/{scope}/moving_mean/biased"] = rng.normal(size=channels).astype(np.float32)
        arrays[f"{scope}/{scope}/moving_mean/local_step"] = np.float32(20)
    arrays["is_training"] = np.bool_(False)
    if adam:
        for name, values in trained.items():
            arrays[f"{name}/Adam"], arrays[f"{name}/Adam_1"] = values / 10, values**2
        arrays["beta1_power"], arrays["beta2_power"] = np.float32(0.125), np.float32(0.997)
    return arrays


def write_checkpoint(prefix, arrays):
    """Write prefix.index and prefix.data-00000-of-00001 as tf.compat.v1.train.Saver does."""
    import tensorflow as tf

    tf.raw_ops.SaveV2(
        prefix=str(prefix),
        tensor_names=list(arrays),
        shape_and_slices=[""] * len(arrays),
        tensors=[tf.constant(values) for values in arrays.values()],
    )


def write_mat(path, arrays, do_compression=False):
    """Write ImageNet_pretrained.mat: TensorFlow's ":0" behind the names, vectors as rows."""
    import scipy.io

    named = {f"{name}:0": np.atleast_2d(values) for name, values in arrays.items()}
    scipy.io.savemat(path, named, do_compression=do_compression)


def crc32c_bit_by_bit(content):
    """The definition of CRC-32C: a division of polynomials over two elements, lowest bit first."""
    state = 0xFFFFFFFF
    for byte in content:
        state ^= byte
        for _ in range(8):
            state = state >> 1 ^ (0x82F63B78 if state & 1 else 0)
    return state ^ 0xFFFFFFFF
