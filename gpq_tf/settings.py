"""The settings: defaults <- config.py of the current folder <- --key=value; checked, typed, then derived."""

import difflib
import json
import math
import runpy
import types
from pathlib import Path

PRECISIONS = ("float32", "mixed_bfloat16", "mixed_float16")
HEADS = ("gpq", "spq", "cgd")
AUGMENTATIONS = ("simclr", "spq2021")
CIFAR10 = ("cifar10", "cifar10_folder", "cifar10_tfds", "cifar10_sample")
METRIC_LEARNING = (
    "image_lists",
    "cub200",
    "image_folders",
    "caltech_birds2011",
    "cars196",
    "stanford_online_products",
    "cgd_sample",
)
DATASETS = (*CIFAR10, *METRIC_LEARNING)
BACKBONES = ("resnet_v1", "keras_cv")


def _integer(low, high):
    def parse(value):
        if isinstance(value, str):
            value = int(value)
        if isinstance(value, bool) or value != int(value) or not low <= value <= high:
            raise ValueError
        return int(value)

    parse.expected = f"an integer from {low} to {high}" if low < high else str(low)
    return parse


def _number(low, high=math.inf, above=False):
    def parse(value):
        if isinstance(value, bool):
            raise ValueError
        value = float(value)
        if not low <= value <= high or (above and value == low) or math.isinf(value):
            raise ValueError
        return value

    upper = "" if high == math.inf else f" and at most {high:g}"
    parse.expected = f"a number {'above' if above else 'of at least'} {low:g}{upper}"
    return parse


def _choice(*choices):
    def parse(value):
        value = {"true": True, "false": False}.get(str(value).lower(), value)
        if not any(value is choice or (isinstance(value, str) and value == choice) for choice in choices):
            raise ValueError
        return value

    parse.expected = "one of " + ", ".join(map(str, choices))
    return parse


def _text(value):
    if not isinstance(value, str | Path) or not str(value):
        raise ValueError
    return str(value)


_text.expected = "a path or name"


def _optional(parse):
    def parse_or_none(value):
        return None if value is None or value == "None" else parse(value)

    parse_or_none.expected = f"{parse.expected}, or None"
    return parse_or_none


def _letters(value):
    if not isinstance(value, str) or not value or set(value) - set("SMG") or len(set(value)) < len(value):
        raise ValueError
    return value


_letters.expected = "distinct letters of S (SPoC), M (MAC) and G (GeM), such as SMG"

_boolean = _choice(True, False)

# name: (default, parser), in the order of config.py; another head's defaults follow below
FIELDS = {
    "data_dir": ("./cifar10", _text),
    "dataset": ("cifar10", _choice(*DATASETS)),
    "download": (False, _boolean),
    "meta_dir": (None, _optional(_text)),
    "boxes": (True, _boolean),
    "ImagNet_pretrained_path": ("./models/ImageNet_pretrained", _text),
    "ImageNet_pretrained_path": ("./models/ImageNet_pretrained", _text),
    "model_save_path": ("./models/", _text),
    "model_load_path": ("./models/48bits_example.ckpt", _text),
    "cifar10_label_sim_path": ("./cifar10/cifar10_Similarity.mat", _text),
    "n_CLASSES": (10, _integer(2, 100_000)),
    "image_size": (32, _integer(8, 4096)),
    "img_channels": (3, _integer(3, 3)),
    "n_DB": (54000, _integer(1, 10**9)),
    "total_epochs": (300, _integer(1, 10**6)),
    "batch_size": (500, _integer(1, 10**6)),
    "save_term": (20, _integer(1, 10**6)),
    "eval_epoch": (None, _optional(_integer(1, 10**6))),
    "images_per_class": (4, _integer(1, 10**6)),
    "learning_rate": (None, _optional(_number(0, above=True))),
    "head": ("gpq", _choice(*HEADS)),
    "len_code": (12, _integer(1, 4096)),
    "n_book": (12, _integer(0, 256)),
    "bn_word": (4, _integer(1, 16)),
    "intn_word": (16, _integer(2, 65536)),
    "n_bits": (48, _integer(0, 4096)),
    "descriptors": ("SMG", _letters),
    "n_dim": (1536, _integer(0, 2**20)),
    "combination": ("concat", _choice("concat", "sum")),
    "gem_p": (3.0, _number(0, 1000, above=True)),
    "learn_p": (False, _boolean),
    "backbone": ("resnet_v1", _choice(*BACKBONES)),
    "alpha": (20.0, _number(0, above=True)),
    "beta": (4.0, _number(0, above=True)),
    "lam_1": (0.1, _number(0)),
    "lam_2": (0.1, _number(0)),
    "temperature": (0.5, _number(0, above=True)),
    "margin": (0.1, _number(0)),
    "squared": (False, _boolean),
    "smoothing": (0.1, _number(0, 1)),
    "auxiliary": (True, _boolean),
    "augment": ("simclr", _choice(*AUGMENTATIONS)),
    "crop_area": (None, _optional(_number(0, 1, above=True))),
    "width_multiplier": (1.0, _number(0, 8, above=True)),
    "legacy": (False, _boolean),
    "seed": (0, _integer(0, 2**32 - 1)),
    "precision": ("float32", _choice(*PRECISIONS)),
    "jit_compile": ("auto", _choice("auto", True, False)),
    "strategy": ("auto", _choice("auto", "one", "mirrored", "multiworker")),
    "sync_batch_norm": (True, _boolean),
    "clip_norm": (None, _optional(_number(0, above=True))),
    "accumulate": (1, _integer(1, 10**6)),
    "init": (None, _optional(_text)),
    "resume": (None, _optional(_text)),
    "tensorboard": (False, _boolean),
    "keep": (None, _optional(_integer(1, 10**6))),
    "query": (None, _optional(_integer(0, 10**9))),
    "query_image": (None, _optional(_text)),
    "n_pictures": (1, _integer(0, 10**4)),
}
# What other heads have by default, and what legacy changes of that, where nothing was given.
_HEAD_DEFAULTS = {
    "spq": {
        "model_load_path": "./models/spq_32bits_best.keras",
        "n_DB": 1000,
        "total_epochs": 5000,
        "batch_size": 256,
        "eval_epoch": 100,
        "len_code": 16,
        "n_book": 8,
        "alpha": 5.0,
        "keep": 3,
    },
    "cgd": {
        "data_dir": "./data/CUB_200_2011",
        "dataset": "cub200",
        "model_load_path": "./models/cgd_1536d_best.keras",
        "image_size": 224,
        "total_epochs": 33,
        "batch_size": 128,
        "eval_epoch": 1,
        "n_book": 0,
        "bn_word": 8,
        "init": "imagenet",
        "keep": 3,
    },
}
_LEGACY_DEFAULTS = {"spq": {"augment": "spq2021"}}
_OLD_SPELLING, _SPELLING = "ImagNet_pretrained_path", "ImageNet_pretrained_path"
_DERIVED = {
    "intn_word": ("2 ** bn_word", lambda values: 2 ** values["bn_word"]),
    "n_bits": ("n_book * bn_word", lambda values: values["n_book"] * values["bn_word"]),
}


class Settings(types.SimpleNamespace):
    """The settings in force, one attribute each.

    `given` (a frozenset of names) tells which were set to another value than the default by config.py, or were
    given on the command line at all.
    """

    def __init__(self, values, given=()):
        super().__init__(**values)
        self.given = frozenset(given)

    def as_dict(self):
        """dict of plain values, in the order of config.py."""
        return {name: getattr(self, name) for name in FIELDS}

    def completed(self, values, given=None):
        """A copy with some values changed (not checked), the derived ones computed anew, and `given` as told.

        Where head or legacy change, so do the defaults of what was not given and has its default.
        """
        given = self.given if given is None else given
        changed = {**self.as_dict(), **values}
        if (changed["head"], changed["legacy"]) != (self.head, self.legacy):
            before, own = defaults_of(self.head, self.legacy), defaults_of(changed["head"], changed["legacy"])
            dependent = {name for names in (*_HEAD_DEFAULTS.values(), *_LEGACY_DEFAULTS.values()) for name in names}
            untouched = {name for name in dependent - set(values) - given if changed[name] == before[name]}
            changed |= {name: own[name] for name in untouched}
        return Settings({**changed, **_derived(changed)}, given)


def defaults_of(head="gpq", legacy=False):
    """Every setting's default, dict of name -> value: some depend on the head, and on legacy.

    Example:
        >>> defaults_of("gpq")["n_book"], defaults_of("spq")["n_book"]
        (12, 8)
    """
    defaults = {name: default for name, (default, _) in FIELDS.items()}
    defaults |= _HEAD_DEFAULTS.get(head, {}) | (_LEGACY_DEFAULTS.get(head, {}) if legacy else {})
    return {**defaults, **_derived(defaults)}


def _derived(values):
    return {name: derive(values) for name, (_, derive) in _DERIVED.items()}


def resolve(arguments=(), config_path="config.py"):
    """Settle every setting.

    Args:
        arguments: sequence of str, "--name=value" ("--name" alone means True).
        config_path: path of a Python file of flat `name = value` lines; need not exist.

    Returns:
        Settings.

    Raises:
        ValueError: if a name is unknown (the message names the nearest right one), a value has the wrong type or
            range, or a derived value (intn_word, n_bits) contradicts what it is derived from.

    Example:
        >>> settings = resolve(["--n_book=8"], config_path="no_such_file.py")
        >>> settings.n_book, settings.n_bits
        (8, 32)
    """
    from_file = _parse_all(_read_config(config_path), str(config_path))
    from_arguments = _parse_all(_read_arguments(arguments), "the command line")
    # The file is held against itself first: its n_bits belongs to its n_book, not to the command line's.
    gpq = defaults_of()
    _settle(gpq, from_file, str(config_path))
    # A value that equals the file's default is no wish: another head has other defaults.
    from_file = {name: value for name, value in from_file.items() if value != gpq[name] and name not in _DERIVED}
    both = {"head": gpq["head"], "legacy": gpq["legacy"], **from_file, **from_arguments}
    values = _settle(defaults_of(both["head"], both["legacy"]), from_file, str(config_path))
    values = _settle(values, from_arguments, "the command line")
    check_book_count(
        values["n_book"], values["head"], "the command line" if "n_book" in from_arguments else config_path
    )
    given = {*from_file, *from_arguments} - set(_DERIVED)
    return Settings(values, given | {_OLD_SPELLING, _SPELLING} if given & {_OLD_SPELLING, _SPELLING} else given)


def check_fixed(settings, fixed, source):
    """Refuse settings that were given and contradict a model: they would be ignored otherwise.

    Raises:
        ValueError: naming the first of them.
    """
    for name, value in fixed.items():
        if name in settings.given and getattr(settings, name) != value:
            raise ValueError(
                f"Invalid {name}. Expected {value}, which the model {source} has. "
                f"Received: {name}={getattr(settings, name)}. Leave it out, or train such a model with train.py"
            )


def describe(settings):
    """The settings in force as text, a line each.

    Example:
        >>> describe(resolve([], config_path="no_such_file.py")).splitlines()[0]
        'data_dir = ./cifar10'
    """
    return "\n".join(f"{name} = {value}" for name, value in settings.as_dict().items() if name != _SPELLING)


def save(settings, path, **more):
    """Write the settings in force (and what else is given) as JSON, atomically."""
    from gpq_tf.files import write_json

    write_json(path, {**more, "settings": settings.as_dict()})


def load(path):
    """Read the settings that `save` wrote.

    Raises:
        ValueError: if the file is not such a file.
    """
    try:
        stored = json.loads(Path(path).read_text())["settings"]
    except (OSError, json.JSONDecodeError, KeyError, TypeError, UnicodeDecodeError) as error:
        raise ValueError(f"Invalid file {str(path)!r}. Expected settings as JSON. {error!r}") from error
    return from_dict(stored, str(path))


def from_dict(stored, source):
    """Settings from a dict of values, which are checked as everywhere; what is not named has its default.

    Raises:
        ValueError: if a name is unknown or a value wrong; the message names `source`.
    """
    if not isinstance(stored, dict):
        raise ValueError(f"Invalid settings ({source}). Expected names and values. Received: {type(stored).__name__}")
    parsed = _parse_all(stored, source)
    defaults = defaults_of(parsed.get("head", "gpq"), parsed.get("legacy", False))
    return Settings(_settle(defaults, parsed, source))


def _read_config(path):
    path = Path(path)
    if not path.is_file():
        return {}
    try:
        names = runpy.run_path(str(path))
    except (Exception, SystemExit) as error:
        line = getattr(error, "lineno", None)
        where = f", line {line}" if line else ""
        raise ValueError(
            f"Invalid {path}. Expected lines `name = value`. Received{where}: {type(error).__name__}: {error}"
        ) from error
    # What the file imports to compute its values with (modules, functions, classes) is no setting.
    return {
        name: value
        for name, value in names.items()
        if name[0] != "_" and not isinstance(value, types.ModuleType) and not callable(value)
    }


def _read_arguments(arguments):
    given = {}
    for argument in arguments:
        name, equals, value = argument.removeprefix("--").partition("=")
        if not argument.startswith("--") or not name:
            raise ValueError(f"Invalid argument. Expected --name=value. Received: {argument!r}")
        if name in given:
            raise ValueError(f"Invalid argument. Expected --{name} once. Received: it twice")
        given[name] = value if equals else True
    return given


def _parse_all(given, source):
    parsed = {}
    for name, value in given.items():
        check_known(name, FIELDS, source)
        parsed[name] = parse(name, value, source)
    return parsed


def check_book_count(n_book, head, source, shown="n_book"):
    """Refuse a head without a codebook (ValueError), but for cgd; `source` and `shown` as of `parse`."""
    if not n_book and head != "cgd":
        raise ValueError(f"Invalid {shown} ({source}). Expected an integer from 1 to 256. Received: {shown}=0")


def check_known(name, names, source):
    """Refuse a name that is none of `names` (ValueError with the nearest of them)."""
    if name not in names:
        folded = {known.lower(): known for known in names}
        near = difflib.get_close_matches(name.lower(), folded, n=1, cutoff=0)
        raise ValueError(f"Invalid setting {name!r} ({source}). Did you mean {folded[near[0]]!r}?")


def parse(name, value, source, shown=None):
    """The value of a setting in its type.

    Args:
        name: str, the setting's.
        value: str, or a value of any type.
        source: str, where it comes from, for the message.
        shown: str, the name it goes by there, or None for its own.

    Raises:
        ValueError: if it is of another type or out of range.
    """
    parse_value, shown = FIELDS[name][1], shown or name
    try:
        return parse_value(value)
    except (ValueError, TypeError, OverflowError) as error:
        raise ValueError(
            f"Invalid {shown} ({source}). Expected {parse_value.expected}. Received: {shown}={value}"
        ) from error


def _settle(base, given, source):
    """`base` overridden by `given`, both spellings of the one name made equal, derived values computed."""
    values = {**base, **given}
    _settle_spelling(values, base, given, source)
    for name, (formula, derive) in _DERIVED.items():
        value = derive(values)
        if name in given and given[name] != value:
            raise ValueError(
                f"Invalid {name} ({source}). Expected {formula} = {value}, or that it is left out. "
                f"Received: {name}={given[name]}"
            )
        values[name] = value
    return values


def _settle_spelling(values, base, given, source):
    changed = [name for name in (_OLD_SPELLING, _SPELLING) if given.get(name, base[name]) != base[name]]
    if len(changed) == 2 and given[_OLD_SPELLING] != given[_SPELLING]:
        raise ValueError(
            f"Invalid {_SPELLING} ({source}). Expected one value for the two spellings of the name. "
            f"Received: {_OLD_SPELLING}={given[_OLD_SPELLING]} and {_SPELLING}={given[_SPELLING]}"
        )
    values[_OLD_SPELLING] = values[_SPELLING] = values[changed[0]] if changed else base[_SPELLING]
