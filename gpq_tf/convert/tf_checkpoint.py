"""TensorFlow 1 checkpoints of GPQ (prefix.index, prefix.data-00000-of-00001)."""

import math
import re
from pathlib import Path

from gpq_tf import training_state
from gpq_tf.convert import book_count, gpq_names, tensor_bundle
from gpq_tf.heads import gpq
from gpq_tf.network import RetrievalModel

# The variable by which checkpoints of TensorFlow 2's objects are known.
_OBJECT_GRAPH = "_CHECKPOINTABLE_OBJECT_GRAPH"
_BETA_2 = 0.999
_LENGTH = 12  # of a codeword, where nothing says how many books there are


def without_suffix(source):
    """The checkpoint prefix that `source` means: itself without .index, .meta or .data-00000-of-00001.

    Example:
        >>> without_suffix("models/20.ckpt.meta")
        'models/20.ckpt'
    """
    return re.sub(r"\.(index|meta|data-\d{5}-of-\d{5})$", "", str(source))


def find(source):
    """The checkpoint prefix that `source` means, or None when there is no such index.

    Example:
        >>> find("no_such.ckpt") is None
        True
    """
    prefix = without_suffix(source)
    return prefix if tensor_bundle.index_path(prefix).is_file() else None


def convert(prefix, n_book=None, legacy=False):
    """Build a RetrievalModel from a TensorFlow 1 checkpoint of GPQ.

    Train-time checkpoints (with Adam's slots) and those of the demo are both read. K, D, C and the width come from
    the shapes. The number of books is in no file: `n_book`, else the bits in the file's name divided by log2 K, else
    D / 12.

    Args:
        prefix: str, path without ".index".
        n_book: int M or None.
        legacy: bool, search as the original.

    Returns:
        (model, lines): RetrievalModel; list of str, the sizes and where M comes from, then one line per variable.

    Raises:
        ValueError: if the checkpoint is damaged (the checksum of every variable is compared, also of those that are
            not used), incomplete, or not GPQ's, or n_book does not divide D.
        OSError: if a file cannot be read.
    """
    entries = tensor_bundle.read_index(prefix)
    if _OBJECT_GRAPH in entries:
        raise ValueError(
            f"Invalid checkpoint {prefix!r}. Expected one that TensorFlow 1's Saver wrote. "
            "Received: one of TensorFlow 2's objects"
        )
    shapes = {name: entry.shape for name, entry in entries.items() if entry.dtype}
    width = gpq_names.width_multiplier_of(prefix, shapes)
    n_word, size = _axes(prefix, shapes, "Z", "(K, M * d), K a power of two")
    if n_word < 2 or n_word & (n_word - 1):
        raise ValueError(f"Invalid checkpoint {prefix!r}. Expected Z of a power of two rows. Received: {n_word}")
    n_classes, _ = _axes(prefix, shapes, "C", "(C, M * d)")
    bn_word = n_word.bit_length() - 1
    name = Path(prefix).name
    n_book, why = book_count.choose(n_book, size, _LENGTH, name, book_count.named_bits(name, bn_word))
    arrays = {name: tensor_bundle.read(entry) for name, entry in entries.items() if entry.dtype}
    try:
        model = RetrievalModel(
            n_book=n_book,
            bn_word=bn_word,
            len_code=size // n_book,
            n_classes=n_classes,
            width_multiplier=width,
            legacy=legacy,
        )
    except ValueError as error:
        raise ValueError(f"Invalid checkpoint {prefix!r}. Expected sizes that a model can have. {error}") from error
    targets = {
        **gpq_names.backbone_targets(model.backbone),
        **gpq_names.statistics_targets(model.backbone),
        **gpq_names.head_targets(model.head),
    }
    used = gpq_names.load(prefix, arrays, targets)
    used += _carry_training_state(prefix, model, arrays, targets)
    named = {line.split()[1] for line in used}
    ignored = [
        f"ignored  {name} {entry.shape}: {_why_ignored(name)}" for name, entry in entries.items() if name not in named
    ]
    return model, [gpq_names.sizes(model, why), *used, *ignored]


def _carry_training_state(prefix, model, arrays, targets):
    """Give the model Adam's slots and step, if the checkpoint has all of them; returns a line for each.

    The step follows from beta2_power, .999 to the power of one more than the steps taken: beta1_power, .5 to the same
    power, underflows near step 149.
    """
    trained = {name: variable for name, (variable, _) in targets.items() if variable.trainable}
    names = {f"{name}/{slot}" for name in trained for slot in ("Adam", "Adam_1")}
    if not names | {"beta2_power"} <= set(arrays):
        return []
    power = float(arrays["beta2_power"])
    if not 0 < power < 1:
        raise ValueError(f"Invalid checkpoint {prefix!r}. Expected beta2_power between 0 and 1. Received: {power}")
    step = round(math.log(power) / math.log(_BETA_2)) - 1
    optimizer = gpq.optimizer()
    optimizer.build(model.trainable_variables)
    optimizer.iterations.assign(step)
    slots = {}
    for name, variable in trained.items():
        mean, mean_square = training_state.slot_variables(optimizer, variable)
        slots[f"{name}/Adam"] = mean, "training state, mean of the gradient"
        slots[f"{name}/Adam_1"] = mean_square, "training state, mean of its square"
    lines = gpq_names.load(prefix, arrays, slots)
    model.training_state = training_state.from_optimizer(optimizer, step)
    return [*lines, f"used     beta2_power () -> training state, step {step}"]


def _axes(prefix, shapes, name, expected):
    """The two lengths of a matrix."""
    if len(shapes.get(name, ())) != 2:
        raise ValueError(
            f"Invalid checkpoint {prefix!r}. Expected {name} {expected}. Received: {shapes.get(name, 'no such array')}"
        )
    return shapes[name]


def _why_ignored(name):
    if name.endswith(("/Adam", "/Adam_1")):
        return "Adam's slot; the checkpoint does not hold all that is needed to go on"
    if name == "beta1_power":
        return "Adam's step counter, which underflows; beta2_power says the same"
    if name == "beta2_power":
        return "Adam's step counter; the checkpoint does not hold all that is needed to go on"
    if name == "is_training":
        return "a switch of tflearn that GPQ does not read"
    return "no variable of GPQ's network"
