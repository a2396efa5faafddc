"""MXNet's networks (symbol.json), read without MXNet: a list of operators, each after those that it takes values from.

Attributes are text. Those that are not written have the default of the operator, which is what `layers` fills in: a
BatchNorm without `fix_gamma`, say, ignores its gamma. All versions are read; 0.8 and older leave out the statistics of
a BatchNorm, name attributes `param`, and have other names for some operators.
"""

import json
import math
import re
import typing
from pathlib import Path

_LARGEST = 8 * 2**20  # bytes; ResNet-152 has 0.5 MB, and what JSON becomes in memory is some 25 times as large
_REQUIRED = object()


class Node(typing.NamedTuple):
    """One entry of the file.

    Attributes:
        op: str, "null" for a variable.
        name: str.
        attributes: dict of str -> str, as written.
        inputs: tuple of (int, int): which node, which of its outputs.
    """

    op: str
    name: str
    attributes: dict
    inputs: tuple


class Symbol(typing.NamedTuple):
    """A network as the file has it.

    Attributes:
        path: str.
        nodes: tuple of Node; inputs come before the nodes that take them.
        heads: tuple of (int, int): the outputs of the network.
    """

    path: str
    nodes: tuple
    heads: tuple


class Layer(typing.NamedTuple):
    """An operator with all its attributes, or a variable that it computes with (op "null").

    Attributes:
        op: str, by its newest name.
        name: str.
        attributes: dict of str -> bool, int, float, str or tuple of int; defaults filled in.
        inputs: tuple of int, the keys of the layers whose values it takes.
        variables: dict of role ("weight", "bias", "gamma", "beta", "moving_mean", "moving_var") -> name.
    """

    op: str
    name: str
    attributes: dict
    inputs: tuple
    variables: dict


class _Operator(typing.NamedTuple):
    """roles: what the inputs are, None for any number of values; attributes: name -> (how to read it, default)."""

    roles: tuple | None
    attributes: dict


def read(path):
    """Read the nodes of a symbol.json.

    Args:
        path: str or Path.

    Returns:
        Symbol.

    Raises:
        OSError: if the file cannot be read.
        ValueError: if it is no symbol.json, or not a whole one.

    Example:
        >>> nodes = [{"op": "null", "name": "x", "inputs": []}, {"op": "relu", "name": "y", "inputs": [[0, 0, 0]]}]
        >>> _ = Path("/tmp/gpq_tf_doctest-symbol.json").write_text(json.dumps({"nodes": nodes, "heads": [[1, 0, 0]]}))
        >>> read("/tmp/gpq_tf_doctest-symbol.json").nodes[1]
        Node(op='relu', name='y', attributes={}, inputs=((0, 0),))
    """
    path = Path(path)
    try:
        if path.stat().st_size > _LARGEST:
            raise ValueError(f"{path.stat().st_size:,} bytes")
        graph = json.loads(path.read_bytes())
        return Symbol(str(path), *_graph(graph))
    except (ValueError, RecursionError) as error:  # too many brackets within each other are a RecursionError
        raise ValueError(f"Invalid {str(path)!r}. Expected a network of MXNet (symbol.json). Found: {error}") from error


def layers(symbol, head=0):
    """The operators that one output is computed by.

    Args:
        symbol: Symbol.
        head: int, which output.

    Returns:
        dict of int (place in the file) -> Layer, inputs before those that take them. The last one is the output.

    Raises:
        ValueError: if there is an operator that no network of CGD has, or a wrong attribute.

    Example:
        >>> nodes = Node("null", "x", {}, ()), Node("L2Normalization", "y", {"mode": "channel"}, ((0, 0),))
        >>> layers(Symbol("some-symbol.json", nodes, ((1, 0),)))[1].attributes
        {'eps': 1e-10, 'mode': 'channel'}
    """
    if not 0 <= head < len(symbol.heads):
        raise ValueError(f"Invalid {symbol.path!r}. Expected more than {head} outputs. Found: {len(symbol.heads)}")
    output = symbol.heads[head]
    if output[1]:
        node = symbol.nodes[output[0]]
        raise _invalid(symbol, node, "to be the network's output by its first value", f"number {output[1]}")
    found, waiting = {}, [output[0]]
    while waiting:
        index = waiting.pop()
        if index not in found:
            found[index] = layer(symbol, index)
            waiting += found[index].inputs
    return dict(sorted(found.items()))


def layer(symbol, index):
    """One node with typed attributes.

    Args:
        symbol: Symbol.
        index: int, its place in the file.

    Returns:
        Layer.

    Raises:
        ValueError: as `layers`.

    Example:
        >>> nodes = Node("null", "x", {}, ()), Node("max", "y", {"axis": "(2, 3)"}, ((0, 0),))
        >>> layer(Symbol("some-symbol.json", nodes, ((1, 0),)), 1).attributes["axis"]
        (2, 3)
    """
    node = symbol.nodes[index]
    op = _NEWER_NAMES.get(node.op, node.op)
    if op == "null":
        return Layer(op, node.name, {}, (), {})
    if op not in OPERATORS:
        known = "an operator that networks of CGD have"
        raise ValueError(f"Invalid {symbol.path!r}. Expected {known}. Found: {node.op} {node.name!r}")
    attributes = {name: _attribute(symbol, node, name, *how) for name, how in OPERATORS[op].attributes.items()}
    # A stride, padding or dilation that is left out has as many axes as the kernel.
    for name, default in (("stride", 1), ("dilate", 1), ("pad", 0)):
        if attributes.get(name) == ():
            attributes[name] = (default,) * len(attributes["kernel"])
    return Layer(op, node.name, attributes, *_inputs(symbol, node, OPERATORS[op].roles, attributes))


def _inputs(symbol, node, roles, attributes):
    """(keys of the layers whose values are taken, role -> name of a variable)."""
    if roles is None:
        roles = ("data",) * len(node.inputs)
    if attributes.get("no_bias"):
        roles = roles[:-1]
    implied = ("moving_mean", "moving_var") if len(node.inputs) == 3 and "moving_var" in roles else ()
    if len(node.inputs) + len(implied) != len(roles) or not roles:
        raise _invalid(symbol, node, f"to have {len(roles) or 'some'} inputs", len(node.inputs))
    values, variables = [], {role: f"{node.name}_{role}" for role in implied}
    for role, (index, output) in zip(roles, node.inputs, strict=False):
        source = symbol.nodes[index]
        if output:
            raise _invalid(
                symbol, node, "to take the first value of other nodes", f"number {output} of {source.name!r}"
            )
        if role == "data":
            values.append(index)
        elif source.op == "null":
            variables[role] = source.name
        else:
            raise _invalid(symbol, node, f"to have a variable as its {role}", f"{source.op} {source.name!r}")
    return tuple(values), variables


def _attribute(symbol, node, name, parse, default):
    text = node.attributes.get(name, "None").strip()
    if text == "None":  # how the newer versions write that a value is left open
        if default is _REQUIRED:
            raise _invalid(symbol, node, f"to have the attribute {name}", "none")
        return default
    try:
        return parse(text)
    except ValueError as error:
        raise _invalid(symbol, node, f"to have {error} as its {name}", repr(text[:40])) from None


def _flag(text):
    if text.lower() not in ("true", "1", "false", "0"):
        raise ValueError("True or False")
    return text.lower() in ("true", "1")


def _integer(text):
    if not re.fullmatch(r"[+-]?[0-9]{1,9}L?", text):
        raise ValueError("an integer")
    return int(text.removesuffix("L"))  # Python 2 wrote 3L


def _number(text):
    try:
        number = float(text.removesuffix("f"))
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise ValueError("a finite number")
    return number


def _word(text):
    return text


def _integers(text):
    """(3, 3), [3,3], (3L, 3L), () or 3"""
    if text[:1] + text[-1:] in ("()", "[]"):
        text = text[1:-1].strip().removesuffix(",")
    try:
        return tuple(_integer(part.strip()) for part in text.split(",")) if text else ()
    except ValueError:
        raise ValueError("a tuple of integers") from None


def _invalid(symbol, node, expected, found):
    return ValueError(f"Invalid {symbol.path!r}. Expected {node.op} {node.name!r} {expected}. Found: {found}")


def _graph(graph):
    """(nodes, heads) of Symbol."""
    if not isinstance(graph, dict):
        raise ValueError("no object of JSON")
    entries = _list(graph.get("nodes"), "nodes")
    nodes = tuple(_node(entry, place) for place, entry in enumerate(entries))
    heads = tuple(_input(head, len(nodes), "an output") for head in _list(graph.get("heads"), "heads"))
    if not heads:
        raise ValueError("no output")
    return nodes, heads


def _node(entry, place):
    if not isinstance(entry, dict):
        raise ValueError(f"node {place} that is no object")
    op, name = entry.get("op"), entry.get("name")
    # Both are printed.
    if not all(isinstance(text, str) and text.isprintable() for text in (op, name)) or not op:
        raise ValueError(f"node {place} without op and name")
    attributes = {}
    # 1.0 and newer write the first, some before it the second, 0.8 and older the third beside the second.
    for key in ("attrs", "attr", "param"):
        written = entry.get(key, {})
        if not isinstance(written, dict) or not all(isinstance(text, str) for text in written.values()):
            raise ValueError(f"{key} of {name!r} that are no texts by name")
        attributes |= written
    # That inputs come first also rules out a network that goes in circles.
    inputs = tuple(_input(one, place, f"an input of {name!r}") for one in _list(entry.get("inputs"), "inputs"))
    if inputs and op == "null":
        raise ValueError(f"the variable {name!r} with inputs")
    return Node(op, name, attributes, inputs)


def _input(entry, end, what):
    """(node, output) of [node, output] or [node, output, version]."""
    plain = isinstance(entry, list) and len(entry) in (2, 3) and all(type(number) is int for number in entry)
    if not plain or min(entry) < 0:
        raise ValueError(f"{what} that is not [node, output]")
    if entry[0] >= end:
        raise ValueError(f"{what} that is node {entry[0]}, not one of the {end} before")
    return entry[0], entry[1]


def _list(entry, what):
    if not isinstance(entry, list):
        raise ValueError(f"no list of {what}")
    return entry


_ONE, _TWO, _ANY = ("data",), ("data", "data"), None
OPERATORS = {
    "Convolution": _Operator(
        ("data", "weight", "bias"),
        {
            "kernel": (_integers, _REQUIRED),
            "stride": (_integers, ()),
            "dilate": (_integers, ()),
            "pad": (_integers, ()),
            "num_filter": (_integer, _REQUIRED),
            "num_group": (_integer, 1),
            "no_bias": (_flag, False),
            "layout": (_word, "NCHW"),
        },
    ),
    "FullyConnected": _Operator(
        ("data", "weight", "bias"),
        {"num_hidden": (_integer, _REQUIRED), "no_bias": (_flag, False), "flatten": (_flag, True)},
    ),
    "BatchNorm": _Operator(
        ("data", "gamma", "beta", "moving_mean", "moving_var"),
        {"eps": (_number, 1e-3), "momentum": (_number, 0.9), "fix_gamma": (_flag, True), "axis": (_integer, 1)},
    ),
    "Pooling": _Operator(
        _ONE,
        {
            "kernel": (_integers, ()),
            "stride": (_integers, ()),
            "pad": (_integers, ()),
            "pool_type": (_word, "max"),
            "global_pool": (_flag, False),
            "pooling_convention": (_word, "valid"),
            "p_value": (_integer, 0),
            "layout": (_word, "NCHW"),
        },
    ),
    "Activation": _Operator(_ONE, {"act_type": (_word, _REQUIRED)}),
    "relu": _Operator(_ONE, {}),
    "L2Normalization": _Operator(_ONE, {"eps": (_number, 1e-10), "mode": (_word, "instance")}),
    "Concat": _Operator(_ANY, {"dim": (_integer, 1)}),
    "elemwise_add": _Operator(_TWO, {}),
    "broadcast_add": _Operator(_TWO, {}),
    "add_n": _Operator(_ANY, {}),
    "mean": _Operator(_ONE, {"axis": (_integers, ()), "keepdims": (_flag, False), "exclude": (_flag, False)}),
    "max": _Operator(_ONE, {"axis": (_integers, ()), "keepdims": (_flag, False), "exclude": (_flag, False)}),
    "_maximum_scalar": _Operator(_ONE, {"scalar": (_number, _REQUIRED)}),
    "_power_scalar": _Operator(_ONE, {"scalar": (_number, _REQUIRED)}),
    "_rdiv_scalar": _Operator(_ONE, {"scalar": (_number, _REQUIRED)}),
    "broadcast_power": _Operator(_TWO, {}),
    "Flatten": _Operator(_ONE, {}),
    "_copy": _Operator(_ONE, {}),
    "Dropout": _Operator(_ONE, {}),
    "BlockGrad": _Operator(_ONE, {}),
}
# As files of 0.8 and older have them.
_NEWER_NAMES = {
    "_Plus": "elemwise_add",
    "ElementWiseSum": "add_n",
    "_PowerScalar": "_power_scalar",
    "_MaximumScalar": "_maximum_scalar",
    "_RDivScalar": "_rdiv_scalar",
}
