"""The names and layouts of SPQ's PyTorch program, for tests: written down apart from the converter's table."""

import re

import numpy as np


def ours(name):
    """(path of our variable, function from the original's array to ours) of a name in the original's state_dict."""
    part, rest = name.split(".", 1)
    if part == "1":
        return {
            "C": ("quantizer/codebook", lambda value: value),
            "fc.weight": ("head/projection/kernel", np.transpose),
            "fc.bias": ("head/projection/bias", lambda value: value),
        }[rest]
    rest = rest.replace("shortcut.0", "shortcut_conv").replace("shortcut.1", "shortcut_norm")
    rest = re.sub(r"layer(\d)\.(\d)\.", r"layer\1_\2/", rest)
    layer, kind = re.sub(r"bn(\d)", r"norm\1", rest).rsplit(".", 1)
    if "norm" in layer:
        kinds = {"weight": "gamma", "bias": "beta", "running_mean": "moving_mean", "running_var": "moving_variance"}
        return f"backbone/{layer}/{kinds[kind]}", lambda value: value
    if kind == "bias":
        return f"backbone/{layer}/bias", lambda value: value
    return f"backbone/{layer}/kernel", np.transpose if "fc" in layer else lambda value: value.transpose(2, 3, 1, 0)


def books(matrix, n_book):
    """The original's codebook (K, M * d) as (M, K, d)."""
    return matrix.reshape(len(matrix), n_book, -1).transpose(1, 0, 2)


def as_matrix(codebook):
    """Ours (M, K, d) as the original's (K, M * d)."""
    return codebook.transpose(1, 0, 2).reshape(codebook.shape[1], -1)


def assign(model, state_dict, n_book):
    """Put the arrays of a state_dict (name -> array) into a model; every variable gets its own."""
    variables = {variable.path: variable for variable in model.weights}
    for name, value in state_dict.items():
        if name.endswith("num_batches_tracked"):
            continue
        path, transform = ours(name)
        variables.pop(path).assign(books(value, n_book) if name == "1.C" else transform(value))
    if variables:
        raise ValueError(f"left over: {sorted(variables)}")
