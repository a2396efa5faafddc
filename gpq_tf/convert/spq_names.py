"""How SPQ's PyTorch program names its tensors, and where each goes in a RetrievalModel.

The network is nn.Sequential(ResNet_Baseline, Quantization_Head), so the backbone's names begin with "0." and the
head's with "1.". PyTorch keeps a convolution's kernel as (out, in, height, width) and a dense layer's as (out, in);
Keras as (height, width, in, out) and (in, out). The codebook C is (K, M * d) there and (M, K, d) here.
"""

import math
import re
import typing

import numpy as np

from gpq_tf.backbones import resnet
from gpq_tf.convert import book_count, gpq_names

LENGTH = 16  # of a codeword, where nothing says how many books there are
CODEBOOK = "1.C"

# axes of a layer's weight in PyTorch -> (PyTorch's name, Keras's, Keras's axes among PyTorch's) of its variables
_VARIABLES = {
    4: (("weight", "kernel", (2, 3, 1, 0)),),  # a convolution
    2: (("weight", "kernel", (1, 0)), ("bias", "bias", (0,))),  # a dense layer
    1: (  # a batch normalisation
        ("weight", "gamma", (0,)),
        ("bias", "beta", (0,)),
        ("running_mean", "moving_mean", (0,)),
        ("running_var", "moving_variance", (0,)),
    ),
}
_STEPS = "num_batches_tracked"


class Entry(typing.NamedTuple):
    """One tensor of the state_dict.

    Attributes:
        name: str.
        shape: tuple of int, PyTorch's.
        path: str, of the variable of a RetrievalModel, or None for what is not converted.
        axes: tuple of int, for numpy.transpose, or None for the codebook and what is not converted.
    """

    name: str
    shape: tuple
    path: str | None
    axes: tuple | None


def entries(width_multiplier=1.0, size=128, n_word=16):
    """The tensors of SPQ's state_dict, in its order.

    Args:
        width_multiplier: float > 0, 1 for the published network.
        size: int D.
        n_word: int K.

    Returns:
        list of Entry.

    Example:
        >>> entries()[0]
        Entry(name='0.conv1.weight', shape=(64, 3, 3, 3), path='backbone/conv1/kernel', axes=(2, 3, 1, 0))
    """
    rows = []
    for scope, where, shape in _layers(width_multiplier, size):
        if scope == "1.fc":  # a module's own parameters stand before those of the modules in it
            rows.append(Entry(CODEBOOK, (n_word, size), "quantizer/codebook", None))
        for name, variable, axes in _VARIABLES[len(shape)]:
            own = shape if name == "weight" else shape[:1]
            rows.append(Entry(f"{scope}.{name}", own, f"{where}/{variable}", axes))
        if len(shape) == 1:
            rows.append(Entry(f"{scope}.{_STEPS}", (), None, None))
    return rows


def _layers(width_multiplier, size):
    """Yield (PyTorch's scope, path of the layer here, shape of the weight)."""
    widths = resnet.widths(width_multiplier)
    before = widths[0]
    yield "0.conv1", "backbone/conv1", (before, 3, 3, 3)
    yield "0.bn1", "backbone/norm1", (before,)
    for stage, width in enumerate(widths, 1):
        for block in range(resnet.BLOCKS_PER_LAYER):
            layers = [
                ("conv1", "conv1", (width, before, 3, 3)),
                ("bn1", "norm1", (width,)),
                ("conv2", "conv2", (width, width, 3, 3)),
                ("bn2", "norm2", (width,)),
            ]
            if stage > 1 and block == 0:  # where the stride is 2
                layers += [
                    ("shortcut.0", "shortcut_conv", (width, before, 1, 1)),
                    ("shortcut.1", "shortcut_norm", (width,)),
                ]
            for name, layer, shape in layers:
                yield f"0.layer{stage}.{block}.{name}", f"backbone/layer{stage}_{block}/{layer}", shape
            before = width
    yield "0.fc_out", "backbone/fc_out", (before, before)
    yield "1.fc", "head/projection", (size, before)


def sizes_of(source, shapes):
    """Read the sizes of an SPQ network off the shapes of its tensors, of which all that are converted must be there.

    Args:
        source: str, names the file in errors.
        shapes: dict of str -> shape; may hold more.

    Returns:
        (width_multiplier, size, n_word): float, 1.0 for the published network; int D; int K.

    Raises:
        ValueError: if a tensor is missing or its shape is not that of SPQ's network of this width, D and K, or K is no
            power of two.
    """
    features, codebook = tuple(shapes.get("0.fc_out.weight", ())), tuple(shapes.get(CODEBOOK, ()))
    if len(features) != 2 or len(codebook) != 2:
        some = ", ".join(list(shapes)[:3]) + (", ..." if len(shapes) > 3 else "")
        raise ValueError(
            f"Invalid file {source!r}. Expected SPQ's tensors, 0.fc_out.weight (512, 512) and {CODEBOOK} (K, M * d) "
            f"among them. Received: {len(shapes)} tensors{f', {some}' if some else ''}"
        )
    n_word, size = codebook
    if n_word < 2 or n_word & (n_word - 1) or not size:
        raise ValueError(
            f"Invalid file {source!r}. Expected {CODEBOOK} (K, M * d), K a power of two. Received: {codebook}"
        )
    width_multiplier = features[0] / resnet.CHANNELS[-1]  # of the last layer, where rounding changes it least
    for name, shape, path, _ in entries(width_multiplier, size, n_word):
        found = tuple(shapes[name]) if name in shapes else "no such tensor"
        if path is not None and found != shape:
            raise ValueError(
                f"Invalid file {source!r}. Expected {name} {shape}, SPQ's network at {width_multiplier:g} of its "
                f"width. Received: {found}"
            )
    return width_multiplier, size, n_word


def choose_n_book(file_name, n_book, n_word, size):
    """The number of books: as given, else by the file's name, else D / 16.

    The original begins a checkpoint's name with int(M * sqrt(K)), which it takes for the number of bits, as in
    32_0.7935_checkpoint.pth; M * log2(K) is the same for 4 and 16 words only. Other names are read as those of GPQ's
    checkpoints, 32bits.pth.

    Args:
        file_name: str.
        n_book: int M or None.
        n_word: int K, a power of two.
        size: int D.

    Returns:
        (int M, str): M, and which rule it comes from.

    Raises:
        ValueError: if n_book does not divide D, or nothing says M and 16 does not divide D.

    Example:
        >>> choose_n_book("45_0.7935_checkpoint.pth", None, n_word=32, size=128)
        (8, "the 45 bits = int(M * sqrt(32)) in the file's name")
    """
    named = book_count.named_bits(file_name, n_word.bit_length() - 1)
    found = re.match(r"(\d+)_[01]\.\d+_checkpoint", file_name)
    if found:
        root = math.sqrt(n_word)
        fitting = [count for count in range(1, size + 1) if int(count * root) == int(found[1])]
        said = f"{int(found[1])} bits = int(M * sqrt({n_word}))"
        named = book_count.Named(fitting[0] if fitting else None, said, f"K = {n_word}")
    return book_count.choose(n_book, size, LENGTH, file_name, named)


def to_keras(arrays, n_book):
    """Bring the tensors that are converted into Keras's order of axes.

    Args:
        arrays: dict of str -> numpy array, a state_dict whose shapes `sizes_of` has accepted.
        n_book: int M.

    Returns:
        dict of path (see `Entry`) -> numpy array, contiguous.

    Example:
        >>> arrays = {entry.name: np.zeros(entry.shape) for entry in entries()}
        >>> to_keras(arrays, n_book=8)["quantizer/codebook"].shape
        (8, 16, 16)
    """
    values = {}
    for name, _, path, axes in entries():
        if name == CODEBOOK:
            values[path] = gpq_names.books_of(arrays[name], n_book)
        elif path is not None:
            values[path] = np.ascontiguousarray(arrays[name].transpose(axes))
    return values


def to_names(values):
    """Undo `to_keras`: a state_dict that the original's network takes.

    Args:
        values: dict of path -> numpy array.

    Returns:
        dict of str -> numpy array, in the state_dict's order. The steps that batch normalisation has counted, which
        nothing depends on, are 0.

    Example:
        >>> arrays = {entry.name: np.ones(entry.shape) for entry in entries()}
        >>> [name for name, array in to_names(to_keras(arrays, n_book=8)).items() if not array.any()][0]
        '0.bn1.num_batches_tracked'
    """
    arrays = {}
    for name, _, path, axes in entries():
        if path is None:
            arrays[name] = np.zeros((), np.int64)
        elif name == CODEBOOK:
            n_book, n_word, length = values[path].shape
            arrays[name] = values[path].transpose(1, 0, 2).reshape(n_word, n_book * length)
        else:
            arrays[name] = np.ascontiguousarray(values[path].transpose(np.argsort(axes)))
    return arrays


def why_ignored(name):
    """Why a tensor is not converted; for every name that `entries` gives no path."""
    if name.endswith(f".{_STEPS}"):
        return "a count of training steps, which nothing reads: the original's batch normalisation has a fixed momentum"
    return "no tensor of SPQ's network"
