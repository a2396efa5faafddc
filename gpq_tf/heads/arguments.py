"""The sizes that make a head's network: what each may be, checked wherever they come from."""

from typing import NamedTuple


class Argument(NamedTuple):
    """An argument of RetrievalModel.

    Attributes:
        default: its value where none is given.
        fits: callable(value) -> bool.
        expected: str, what fits, for messages.
    """

    default: object
    fits: object
    expected: str


def integer(default, low, high):
    """An integer from low to high, both included."""
    return Argument(
        default,
        lambda value: isinstance(value, int) and not isinstance(value, bool) and low <= value <= high,
        f"an integer from {low} to {high}",
    )


def number(default, high, above_0=True):
    """A number above 0 (or from 0), at most `high`."""
    return Argument(
        default,
        lambda value: (
            isinstance(value, int | float)
            and not isinstance(value, bool)
            and 0 <= value <= high
            and (value or not above_0)
        ),
        f"a number {'above' if above_0 else 'from'} 0, at most {high}",
    )


def boolean(default):
    """True or False."""
    return Argument(default, lambda value: isinstance(value, bool), "True or False")


def choice(default, choices):
    """One of some strings."""
    return Argument(default, lambda value: isinstance(value, str) and value in choices, f"one of {', '.join(choices)}")


# What every head has.
COMMON = {
    "legacy": boolean(False),
    "seed": integer(0, 0, 2**32 - 1),
}


def with_codebook(n_book, bn_word, len_code):
    """The arguments of a network with a codebook and one width for all its layers, with these defaults.

    The largest values keep D and the codebook far below what memory holds.
    """
    return {
        "n_book": integer(n_book, 1, 256),
        "bn_word": integer(bn_word, 1, 16),
        "len_code": integer(len_code, 1, 4096),
        "width_multiplier": number(1.0, 8),
    }


def codebook_of(settings):
    """Those arguments as settings have them, a dict."""
    return {name: getattr(settings, name) for name in ("n_book", "bn_word", "len_code", "width_multiplier")}


def codebook_settings(architecture):
    """The settings that such a network fixes, a dict: they have the arguments' names."""
    return {name: architecture[name] for name in ("n_book", "bn_word", "len_code", "width_multiplier")}


def codebook_size(architecture):
    """int D = M * d of such a network."""
    return architecture["n_book"] * architecture["len_code"]
