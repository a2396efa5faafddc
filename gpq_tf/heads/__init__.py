"""Heads: what turns pooled features into descriptors, and which losses train it.

A head is one module, with these fixed names. The network:

    ARGUMENTS                        name -> `arguments.Argument` of RetrievalModel, beside those of all heads
    SMALLEST_SIDE                    int, pixels that an image must have in height and width
    preprocess(images)               uint8 (B, H, W, 3) -> what the backbone takes
    build(architecture, dtype)       (backbone, head), built layers
    descriptor_size(architecture)    int D
    kernel_size(architecture)        values that the network's kernels hold at least
    architecture_of(settings)        the arguments that settings give, beside those of all heads
    settings_of(architecture)        and back: the settings that a network fixes

and the recipe of its training:

    PROTOCOL                         how an image set is split: what `data.load_for` takes
    file_stem(settings), steps_per_epoch(data, settings), draw_batch(data, settings, step),
    describe(model, batch, settings, frozen), compare(model, described, settings), is_frozen(settings, epoch),
    learning_rate(settings, steps_per_epoch), optimizer(settings, steps_per_epoch)
"""

import importlib

from gpq_tf.heads.arguments import COMMON

NAMES = ("gpq", "spq", "cgd")


def recipe(name):
    """The module of a head.

    Args:
        name: str, one of `NAMES`.

    Raises:
        ValueError: if there is no such head.

    Example:
        >>> recipe("gpq").GPQHead.head_name
        'gpq'
    """
    if name not in NAMES:
        raise ValueError(f"Invalid head. Expected one of {', '.join(NAMES)}. Received: head={name!r}")
    return importlib.import_module(f"gpq_tf.heads.{name}")


def arguments_of(name):
    """dict of name -> `arguments.Argument`: what RetrievalModel takes for a head.

    Example:
        >>> arguments_of("spq")["n_book"].default
        8
    """
    return {**recipe(name).ARGUMENTS, **COMMON}


def architecture_of(settings):
    """The arguments of RetrievalModel that settings give, a dict; `fixed_by` goes the other way.

    Args:
        settings: gpq_tf.settings.Settings.
    """
    own = recipe(settings.head).architecture_of(settings)
    return {"head": settings.head, **own, "legacy": settings.legacy, "seed": settings.seed}


def fixed_by(architecture):
    """What a model fixes, under the settings' names: a dict.

    Args:
        architecture: dict of RetrievalModel's arguments.
    """
    head = architecture["head"]
    return {"head": head, **recipe(head).settings_of(architecture)}


def complete(head, given):
    """The whole description of a network: what is given, checked, and defaults for the rest.

    Args:
        head: str.
        given: dict of argument's name -> value.

    Returns:
        dict, "head" and all arguments of the head.

    Raises:
        ValueError: naming the argument, what was expected and what was received.

    Example:
        >>> complete("spq", {"n_book": 4})["len_code"]
        16
    """
    known = arguments_of(head)
    architecture = {"head": head}
    for name in given:
        if name not in known:
            raise ValueError(f"Invalid argument. Expected one of {', '.join(known)} for {head}. Received: {name}")
    for name, argument in known.items():
        value = architecture[name] = given.get(name, argument.default)
        if not argument.fits(value):
            raise ValueError(f"Invalid {name}. Expected {argument.expected}. Received: {name}={value!r}")
    return architecture
