"""Where each array of a CGD checkpoint of MXNet goes in a RetrievalModel, as a table."""

import math
import typing

import numpy as np

from gpq_tf.convert import gluon_names
from gpq_tf.convert.mxnet_params import variable_name

# How values are stored there -> how they are here.
TRANSFORMS = {
    "as they are": lambda values: values,
    "OIHW to HWIO": lambda values: values.transpose(2, 3, 1, 0),
    "transposed": np.transpose,
    "one number": lambda values: values.reshape(()),
}
# Role in the symbol -> (name of our variable, key of TRANSFORMS).
CONVOLUTION = {"weight": ("kernel", "OIHW to HWIO"), "bias": ("bias", "as they are")}
DENSE = {"weight": ("kernel", "transposed"), "bias": ("bias", "as they are")}
NORMALIZATION = {
    "gamma": ("gamma", "as they are"),
    "beta": ("beta", "as they are"),
    "moving_mean": ("moving_mean", "as they are"),
    "moving_var": ("moving_variance", "as they are"),
}


class Row(typing.NamedTuple):
    """A variable of a symbol and its place here.

    Attributes:
        variable: str, its name in the symbol.
        target: str, the path of our variable, or None if the stored values do not count.
        transform: str, a key of TRANSFORMS.
        shape: tuple of int, as stored, or None for any shape of one value.
        remark: str, why they do not count, or "".
    """

    variable: str
    target: str | None
    transform: str
    shape: tuple | None
    remark: str


def table(network):
    """The variables that a network computes with.

    Args:
        network: cgd_graph.Network.

    Returns:
        list of Row. Targets are backbone/LAYER/NAME with the layers conv0, norm0, stage1_1_conv1, stage1_1_norm1, ...,
        stage1_1_shortcut_conv, stage1_1_shortcut_norm (stage, block and convolution from 1), and head/fc_S/NAME,
        head/fc_M/NAME, head/fc_G/NAME, head/gem_p, head/classifier/NAME.

    Example:
        >>> table(cgd_graph.network_of(symbol))[0]  # doctest: +SKIP
        Row(variable='conv0_weight', target='backbone/conv0/kernel', transform='OIHW to HWIO', shape=(64, 3, 7, 7),
            remark='')
    """
    rows, before = _unit_rows("backbone/", "conv0", "norm0", network.stem, 3), network.stem.channels
    for stage, blocks in enumerate(network.stages, 1):
        for number, block in enumerate(blocks, 1):
            scope, width = f"backbone/stage{stage}_{number}_", before
            for place, unit in enumerate(block.units, 1):
                rows += _unit_rows(scope, f"conv{place}", f"norm{place}", unit, width)
                width = unit.channels
            if block.shortcut:
                rows += _unit_rows(scope, "shortcut_conv", "shortcut_norm", block.shortcut, before)
            before = width
    for branch in network.branches:
        if branch.gem and branch.gem.variable:
            rows.append(Row(branch.gem.variable, "head/gem_p", "one number", None, ""))
        if branch.dense:
            rows += _dense_rows(f"head/fc_{branch.letter}", branch.dense, before)
    if network.classifier:
        first = network.branches[0].dense
        n_inputs = before if network.classifier.place == "pooled" or not first else first.size
        rows += _dense_rows("head/classifier", network.classifier.dense, n_inputs)
    return rows


def transformed(row, values):
    """Stored values as our variable has them.

    Args:
        row: Row.
        values: numpy array of the row's shape.

    Returns:
        numpy array, a view where that is possible.

    Example:
        >>> transformed(Row("fc_weight", "head/fc_S/kernel", "transposed", (2, 3), ""), np.zeros((2, 3))).shape
        (3, 2)
    """
    return TRANSFORMS[row.transform](values)


def match(source, symbol, rows, shapes):
    """Find the rows' variables in a file, and check their shapes.

    Args:
        source: str, names the file in errors.
        symbol: mxnet_symbol.Symbol.
        rows: list of Row.
        shapes: dict of name in the file -> shape, in the file's order.

    Returns:
        (names, ignored): dict of variable of the rows with a target -> name in the file; dict of each other name in the
        file -> why.

    Raises:
        ValueError: if a variable is missing, of another shape, or cannot be told from others.

    Example:
        >>> from gpq_tf.convert.mxnet_symbol import Symbol
        >>> row = Row("fc_weight", "head/fc_S/kernel", "transposed", (2, 3), "")
        >>> match("some.params", Symbol("some-symbol.json", (), ()), [row], {"arg:fc_weight": (2, 3), "arg:x": (1,)})
        ({'fc_weight': 'arg:fc_weight'}, {'arg:x': 'no variable of the symbol'})
    """
    names = {}
    for name in shapes:
        variable = variable_name(name)
        if variable in names:
            raise ValueError(f"Invalid {source!r}. Expected {variable!r} once. Found: {names[variable]!r} and {name!r}")
        names[variable] = name
    used = {row.variable: row for row in rows}
    if not used.keys() & names.keys():
        names = gluon_names.pair(source, symbol, used.keys(), shapes)
    for row in rows:
        if row is not used[row.variable]:
            raise ValueError(f"Invalid {symbol.path!r}. Expected each variable once. Found: {row.variable!r} twice")
        if row.target:
            _check_shape(source, row, names.get(row.variable), shapes)
    known = {node.name for node in symbol.nodes}
    ignored = {}
    for variable, name in names.items():
        if variable not in used:
            ignored[name] = (
                "the descriptor is not computed with it" if variable in known else "no variable of the symbol"
            )
        elif not used[variable].target:
            ignored[name] = used[variable].remark
    return {row.variable: names[row.variable] for row in rows if row.target}, ignored


def _check_shape(source, row, name, shapes):
    expected = f"{row.variable} {row.shape or 'of one value'}"
    if name is None:
        raise ValueError(f"Invalid {source!r}. Expected {expected}. Found: no such array")
    shape = tuple(shapes[name])
    if shape != row.shape if row.shape else math.prod(shape) != 1:
        raise ValueError(f"Invalid {source!r}. Expected {expected}. Found: {shape}")


def _unit_rows(scope, convolution, normalization, unit, before):
    shapes = {"weight": (unit.channels, before, unit.kernel, unit.kernel), "bias": (unit.channels,)}
    rows = [
        Row(variable, f"{scope}{convolution}/{CONVOLUTION[role][0]}", CONVOLUTION[role][1], shapes[role], "")
        for role, variable in unit.convolution.items()
    ]
    for role, variable in unit.normalization.items():
        name, transform = NORMALIZATION[role]
        target, remark = f"{scope}{normalization}/{name}", ""
        if role == "gamma" and unit.is_gamma_fixed:
            target, remark = None, "gamma is 1 by fix_gamma, which is MXNet's default"
        rows.append(Row(variable, target, transform, (unit.channels,), remark))
    return rows


def _dense_rows(scope, dense, before):
    shapes = {"weight": (dense.size, before), "bias": (dense.size,)}
    return [
        Row(variable, f"{scope}/{DENSE[role][0]}", DENSE[role][1], shapes[role], "")
        for role, variable in dense.variables.items()
    ]
