"""`gpq-tf spq`: SPQ's training, called as the original program is called.

Its arguments have the original's names and defaults. Each stands for a setting of ours; the other settings can be given
as well.
"""

import argparse
import math

from gpq_tf import settings as settings_module

_SOURCE = "the command line"
# The original's name: (our setting, default where it is not that of the head spq, help).
_ARGUMENTS = {
    "if_download": ("download", None, "true lets tensorflow-datasets fetch CIFAR-10 into data_dir; default: false"),
    "data_dir": (
        "data_dir",
        "./data",
        "folder with CIFAR-10: cifar-10-batches-py as torchvision keeps it, or its seven files themselves; with "
        "--dataset=image_folders your own images; default: ./data, and without files in it an embedded sample",
    ),
    "batch_size": ("batch_size", None, "images a step, each seen in two views; default: 256"),
    "input_size": ("image_size", None, "height and width in pixels; images of another size are resized; default: 32"),
    "N_books": ("n_book", None, "codebooks; default: 8"),
    "N_words": ("bn_word", None, "codewords of a book, a power of two; default: 16"),
    "L_word": ("len_code", None, "values of a codeword; default: 16"),
    "soft_quantization_scale": ("alpha", None, "scale of the soft assignment, larger is harder; default: 5"),
    "contrastive_temperature": ("temperature", None, "temperature of the contrast between views; default: 0.5"),
    "num_cls": ("n_CLASSES", None, "classes, which must be those of the data; default: as many as they have, 10"),
    "eval_epoch": ("eval_epoch", None, "epochs from one measurement of the mAP to the next; default: 100"),
    "output_dir": ("model_save_path", ".", "folder for models and the log, made if it is missing; default: ."),
    "Top_N": ("n_DB", None, "nearest gallery images that enter the mAP; default: 1000"),
}
_GPU_ID = "number of the GPU, several as 0,1, -1 for none; default: CUDA_VISIBLE_DEVICES if that is set, else 0"
_NUM_WORKERS = "accepted, without effect: all images are in memory, and augmented where the network runs; default: 12"
_MORE = """Every setting of config.py can be given too, such as --precision=mixed_bfloat16, --total_epochs=20,
--width_multiplier=0.25, --augment=spq2021, --seed=1, --dataset=image_folders, --resume=MODEL, --legacy."""


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        raise ValueError(f"Invalid arguments ({_SOURCE}): {message}")


def usage():
    """The text of `gpq-tf spq --help`."""
    return _parser().format_help()


def read(arguments):
    """Read the command's arguments.

    Args:
        arguments: sequence of str, "--name=value" or "--name", "value"; "--name" alone means True.

    Returns:
        (settings, devices): gpq_tf.settings.Settings; str for CUDA_VISIBLE_DEVICES, or None where no gpu_id is given.

    Raises:
        ValueError: if a name is unknown (the message names the nearest right one), or a value wrong.

    Example:
        >>> settings, devices = read(["--gpu_id=1", "--N_books", "4", "--N_words=256"])
        >>> settings.head, settings.n_bits, settings.n_DB, devices
        ('spq', 32, 1000, '1')
    """
    found, unknown = _parser().parse_known_args(list(arguments))
    for argument in unknown:
        if not argument.startswith("--"):
            raise ValueError(f"Invalid argument. Expected --name=value. Received: {argument!r}")
        settings_module.check_known(argument[2:].partition("=")[0], _names(), _SOURCE)
    given = {name: _only(name, values) for name, values in vars(found).items() if values}
    devices = given.pop("gpu_id", None)
    _check_workers(given.pop("num_workers", "12"))
    ours = {}
    for name, value in given.items():
        setting = _ARGUMENTS[name][0] if name in _ARGUMENTS else name
        if setting in ours:
            raise ValueError(f"Invalid {name}. Expected --{setting} once. Received: it by two names")
        ours[setting] = _bits(value) if name == "N_words" else settings_module.parse(setting, value, _SOURCE, name)
        if setting == "n_book":
            settings_module.check_book_count(ours[setting], "spq", _SOURCE, name)
    settings = settings_module.resolve([f"--{name}={value}" for name, value in {"head": "spq", **ours}.items()])
    if settings.head != "spq":
        raise ValueError(f"Invalid head. Expected spq, which this command trains. Received: head={settings.head}")
    own = {setting: default for setting, default, _ in _ARGUMENTS.values() if default and setting not in settings.given}
    return settings.completed(own), devices


def headline(settings):
    """A line about the length of the codes.

    The original multiplies the books by the square root of the codewords, which is right for 4 and 16 of them only.

    Example:
        >>> headline(read(["--N_words=256"])[0])
        '64 bits a code: 8 books of 256 codewords'
        >>> headline(read(["--N_words=256", "--legacy"])[0])
        '128 bits a code as the original counts, in truth 64: 8 books of 256 codewords'
    """
    counted = int(settings.n_book * math.sqrt(settings.intn_word)) if settings.legacy else settings.n_bits
    right = "" if counted == settings.n_bits else f" as the original counts, in truth {settings.n_bits}"
    return f"{counted} bits a code{right}: {settings.n_book} books of {settings.intn_word} codewords"


def _names():
    return [*_ARGUMENTS, "gpu_id", "num_workers", *(name for name in settings_module.FIELDS if name not in _ARGUMENTS)]


def _parser():
    parser = _Parser(
        "gpq-tf spq",
        usage="%(prog)s [--name=value ...]",
        description="Train SPQ without labels, and print its mAP as training goes on.",
        epilog=_MORE,
        allow_abbrev=False,
    )
    helps = {"gpu_id": _GPU_ID, **{name: text for name, (_, _, text) in _ARGUMENTS.items()}}
    helps["num_workers"] = _NUM_WORKERS
    for name in _names():
        # The original's arguments are numbers and names, but for one.
        alone = {} if name in helps and name != "if_download" else {"nargs": "?", "const": "True"}
        shown = helps.get(name, argparse.SUPPRESS)
        parser.add_argument(f"--{name}", action="append", metavar="VALUE", help=shown, **alone)
    return parser


def _only(name, values):
    if len(values) > 1:
        raise ValueError(f"Invalid argument. Expected --{name} once. Received: it {len(values)} times")
    return values[0]


def _bits(value):
    """N_words as the logarithm that our setting is."""
    n_words = int(value) if value.isdecimal() else 0
    if not 2 <= n_words <= 2**16 or n_words & (n_words - 1):
        raise ValueError(
            f"Invalid N_words ({_SOURCE}). Expected a power of two from 2 to 65536. Received: N_words={value}"
        )
    return n_words.bit_length() - 1


def _check_workers(value):
    if not value.isdecimal():
        raise ValueError(
            f"Invalid num_workers ({_SOURCE}). Expected an integer of at least 0. Received: num_workers={value}"
        )
