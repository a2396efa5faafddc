"""Files of gluon's save_parameters, which name arrays by attributes: features.4.0.body.1.gamma.

The symbol calls that variable resnetv10_stage1_batchnorm0_gamma. Gluon numbers layers as they are made and saves them
as they are registered, which is the same order; the symbol lists them as they are computed.
"""

import re

_ROLES = ("weight", "bias", "gamma", "beta", "running_mean", "running_var")


def pair(source, symbol, needed, shapes):
    """Pair the variables of a symbol with the arrays of a save_parameters file.

    Variables that are named like attributes (net0_fc_S_weight, fc_S.weight) go together. The others do by their order:
    that of computing, where variables whose names differ in numbers only have the numbers rise.

    Args:
        source: str, names the file in errors.
        symbol: mxnet_symbol.Symbol.
        needed: set of str, variables that have to be found.
        shapes: dict of name in the file -> shape, in the file's order.

    Returns:
        dict of variable -> name in the file.

    Raises:
        ValueError: if there is not one array for each variable, or dense layers could be mistaken for each other.

    Example:
        >>> from gpq_tf.convert.mxnet_symbol import Node, Symbol
        >>> nodes = Node("null", "net0_dense0_weight", {}, ()), Node("null", "net0_dense0_bias", {}, ())
        >>> symbol = Symbol("some-symbol.json", nodes, ((1, 0),))
        >>> pair("some.params", symbol, set(), {"output.weight": (3, 2), "output.bias": (3,)})
        {'net0_dense0_weight': 'output.weight', 'net0_dense0_bias': 'output.bias'}
    """
    variables = dict.fromkeys(node.name for node in symbol.nodes if node.op == "null")
    variables = [variable for variable in variables if variable in needed or variable.endswith(_ROLES)]
    expected = f"an array for each of the {len(variables)} variables of {symbol.path!r}, named like them or in order"
    if len(shapes) != len(variables):
        raise ValueError(f"Invalid {source!r}. Expected {expected}. Found: {len(shapes)} arrays")
    _check_rising(source, shapes)
    pairs = _same_names(variables, shapes)
    left = _rising(variable for variable in variables if variable not in pairs)
    named = set(pairs.values())
    words = {}
    for variable, name in zip(left, (name for name in shapes if name not in named), strict=True):
        if not f"_{variable}".endswith("_" + name.rpartition(".")[2]):
            raise ValueError(f"Invalid {source!r}. Expected {expected}. Found: {name!r} in the place of {variable!r}")
        # The backbone's order is that of its layers. Dense layers beside each other may have been made in any.
        if len(shapes[name]) == 2 and words.setdefault(shapes[name], _words(variable)) != _words(variable):
            raise ValueError(
                f"Invalid {source!r}. Expected dense layers that can be told from each other, as in a file of gluon's "
                f"export. Found: {name!r} {shapes[name]}, which may be {variable!r} or another"
            )
        pairs[variable] = name
    return pairs


def _same_names(variables, names):
    """dict of variable -> name that it ends with, the dots being underscores."""
    pairs = {}
    for name in names:
        own = [variable for variable in variables if f"_{variable}".endswith("_" + name.replace(".", "_"))]
        if len(own) == 1 and own[0] not in pairs:
            pairs[own[0]] = name
    return pairs


def _rising(names):
    """The names, where those that differ in numbers only change places so that the numbers rise."""
    names = list(names)
    places = {}
    for place, name in enumerate(names):
        places.setdefault(_words(name), []).append(place)
    for own in places.values():
        for place, name in zip(own, sorted((names[place] for place in own), key=_integers), strict=True):
            names[place] = name
    return names


def _check_rising(source, names):
    """Python 2 saved arrays in no order; then paths such as body.0 and body.3 are not in order either."""
    if _rising(names) != list(names):
        raise ValueError(f"Invalid {source!r}. Expected arrays in gluon's order. Found: numbers that do not rise")


def _words(name):
    return re.sub(r"\d+", "#", name)


def _integers(name):
    return tuple(map(int, re.findall(r"\d{1,18}", name)))
