"""CGD's network found in a symbol of MXNet: by how its operators are connected, whatever their names are.

    image -> ResNet v1 -> feature map -> S, M, G, each -> dense -> L2 -> concatenation or sum -> L2

S (SPoC) is the mean over the image, M (MAC) the maximum, G (GeM) the mean of p-th powers to the power 1 / p
(arXiv 1903.10663, section 3). Whatever else is between is an error: a network that is nearly CGD's would convert to
one that gives other embeddings.
"""

import math
import typing

from gpq_tf.convert import mxnet_symbol

LETTERS = "SMG"
_SAME = ("_copy", "Dropout", "BlockGrad")  # what a trained network passes on as it is
_SUMS = ("elemwise_add", "broadcast_add", "add_n")
_IMAGE_AXES = [2, 3]  # of (B, C, H, W)


class Unit(typing.NamedTuple):
    """A convolution and the batch normalisation behind it.

    Attributes:
        channels: int, that come out.
        kernel, stride: int, equal along both axes; kernel // 2 pixels of 0 are added at each side of the image.
        has_bias: bool.
        epsilon, momentum: float, of the normalisation; MXNet's momentum is Keras's.
        is_gamma_fixed: bool, gamma is 1 whatever is stored.
        convolution, normalization: dict of role -> name of the variable.
    """

    channels: int
    kernel: int
    stride: int
    has_bias: bool
    epsilon: float
    momentum: float
    is_gamma_fixed: bool
    convolution: dict
    normalization: dict


class Block(typing.NamedTuple):
    """relu(units + shortcut); the units with ReLU between them, shortcut None for the input itself.

    Attributes:
        units: tuple of Unit, two (basic) or three (bottleneck).
        shortcut: Unit or None.
    """

    units: tuple
    shortcut: Unit | None


class Pool(typing.NamedTuple):
    """The maximum over kernel x kernel pixels; the rim is filled with minus infinity."""

    kernel: int
    stride: int
    pad: int


class Dense(typing.NamedTuple):
    """A dense layer: size int, values that come out; variables, dict of role ("weight", "bias") -> name."""

    size: int
    variables: dict


class Gem(typing.NamedTuple):
    """mean(max(x, floor) ** p) ** (1 / p).

    Attributes:
        p: float, or None if it is a variable.
        variable: str, the name of the variable, or None.
        floor: float, 0 if the symbol has none.
    """

    p: float | None
    variable: str | None
    floor: float


class Branch(typing.NamedTuple):
    """A descriptor of the feature map.

    Attributes:
        letter: "S", "M" or "G".
        gem: Gem, or None for S and M.
        dense: Dense or None.
        is_normalized: bool, to unit length.
    """

    letter: str
    gem: Gem | None
    dense: Dense | None
    is_normalized: bool


class Classifier(typing.NamedTuple):
    """The dense layer of the auxiliary loss.

    Attributes:
        dense: Dense.
        place: what of the first branch it takes: "pooled", "dense" or "normalized".
    """

    dense: Dense
    place: str


class Network(typing.NamedTuple):
    """What a symbol says of a network of CGD.

    Attributes:
        stem: Unit.
        pool: Pool or None.
        stages: tuple of tuples of Block; a stage begins where a shortcut has a convolution.
        branches: tuple of Branch, in the order in which they are combined.
        combination: "concat" or "sum"; "concat" for a single branch.
        is_normalized: bool, the combined descriptor to unit length. False for a single branch that is normalised once,
            which is then the branch's own.
        l2_epsilon: float, added to the squared length under the root.
        classifier: Classifier or None.
    """

    stem: Unit
    pool: Pool | None
    stages: tuple
    branches: tuple
    combination: str
    is_normalized: bool
    l2_epsilon: float
    classifier: Classifier | None


class _Graph(typing.NamedTuple):
    path: str
    layers: dict

    def before(self, index):
        """The layer that this one takes its values from, without those that change nothing."""
        return self.skip(self.layers[index].inputs[0])

    def skip(self, index):
        while self.layers[index].op in _SAME:
            (index,) = self.layers[index].inputs
        return index

    def op(self, index):
        return self.layers[index].op

    def is_relu(self, index):
        layer = self.layers[index]
        return layer.op == "relu" or (layer.op == "Activation" and layer.attributes["act_type"] == "relu")

    def unlike(self, index, expected):
        layer = self.layers[index]
        return ValueError(f"Invalid {self.path!r}. Expected {expected}. Found: {layer.op} {layer.name!r}")


def network_of(symbol):
    """CGD's parts of a symbol, found going back from its first output, the one that the original takes.

    Args:
        symbol: mxnet_symbol.Symbol.

    Returns:
        Network.

    Raises:
        ValueError: if the first output is no descriptor of CGD on a ResNet v1. The message names the layer.

    Example:
        >>> symbol = mxnet_symbol.read("CGD.CUB200.C_concat_MG.ResNet50v.dim1536-symbol.json")  # doctest: +SKIP
        >>> [branch.letter for branch in network_of(symbol).branches]  # doctest: +SKIP
        ['M', 'G']
    """
    graph = _Graph(symbol.path, mxnet_symbol.layers(symbol))
    output = graph.skip(symbol.heads[0][0])
    combined = graph.before(output) if graph.op(output) == "L2Normalization" else output
    if graph.op(combined) not in ("L2Normalization", "Concat", *_SUMS):
        combined = output
    combination, parts = _parts(graph, combined)
    branches, places = zip(*(_branch(graph, part) for part in parts), strict=True)
    feature_map = places[0]["map"]
    for branch, place in zip(branches, places, strict=True):
        if place["map"] != feature_map:
            raise graph.unlike(place["map"], f"{branch.letter} to be of the same feature map as {branches[0].letter}")
    letters = "".join(branch.letter for branch in branches)
    if len(set(letters)) < len(letters):
        raise graph.unlike(combined, f"each descriptor once, not {letters}")
    if combined == output and not all(branch.is_normalized for branch in branches):
        raise graph.unlike(output, "an output of unit length (L2Normalization)")
    stem, pool, blocks = _backbone(graph, feature_map)
    return Network(
        stem,
        pool,
        _stages(blocks),
        branches,
        combination,
        combined != output,
        _l2_epsilon(graph),
        _classifier(symbol, graph, places[0]),
    )


def _parts(graph, index):
    """("concat" or "sum", the layers that are combined)."""
    layer, parts = graph.layers[index], [index]
    if layer.op == "Concat":
        if layer.attributes["dim"] != 1:
            raise graph.unlike(index, "descriptors to be concatenated along their values (dim=1)")
        parts = [graph.skip(part) for part in layer.inputs]
    # a + b + c is (a + b) + c
    while layer.op in _SUMS and len(parts) <= len(LETTERS):
        inner = next((place for place, part in enumerate(parts) if graph.op(part) in _SUMS), None)
        if inner is None:
            break
        parts[inner : inner + 1] = [graph.skip(part) for part in graph.layers[parts[inner]].inputs]
    if len(parts) > len(LETTERS):
        raise graph.unlike(index, f"at most {len(LETTERS)} descriptors to be combined")
    return ("sum" if layer.op in _SUMS else "concat"), parts


def _branch(graph, index):
    """(Branch, place -> layer); places are "normalized", "dense", "pooled" and "map"."""
    places, dense = {}, None
    if graph.op(index) == "L2Normalization":
        places["normalized"] = index
        index = graph.before(index)
    if graph.op(index) == "FullyConnected":
        places["dense"] = index
        dense = _dense(graph, index)
        index = graph.before(index)
    places["pooled"] = index
    while graph.op(index) == "Flatten":
        index = graph.before(index)
    how, places["map"] = _pooled(graph, index)
    if how in ("avg", "max"):
        gem = None
    elif how == "lp":
        gem = Gem(float(graph.layers[index].attributes["p_value"]), None, 0.0)
        # MXNet's operator has a sum where GeM has the mean, which only changes the length of what comes out.
        if dense is None or "bias" in dense.variables or "normalized" not in places or gem.p < 1:
            raise graph.unlike(index, "GeM's mean, or a dense layer without bias and L2Normalization behind the sum")
    else:
        gem, places["map"] = _gem(graph, index)
    letter = {"avg": "S", "max": "M"}.get(how, "G")
    return Branch(letter, gem, dense, "normalized" in places), places


def _pooled(graph, index):
    """("avg", "max" or "lp", the layer before) if a layer takes one value of each channel of a map, else twice None."""
    layer = graph.layers[index]
    own = layer.attributes
    how = None
    if layer.op == "Pooling" and own["global_pool"] and own["layout"] == "NCHW":
        how = own["pool_type"]
    elif layer.op in ("mean", "max") and not own["exclude"] and sorted(axis % 4 for axis in own["axis"]) == _IMAGE_AXES:
        how = "avg" if layer.op == "mean" else "max"
    return (how, graph.before(index)) if how in ("avg", "max", "lp") else (None, None)


def _gem(graph, index):
    """(Gem, the layer before)."""
    expected = "a descriptor: the mean, the maximum or the generalised mean (GeM) over the image"
    root, root_variable, mean = _power(graph, index)
    how, powers = _pooled(graph, mean) if root else (None, None)
    if how != "avg":
        raise graph.unlike(index, expected)
    p, variable, below = _power(graph, powers)
    if not p or p < 0 or root_variable != variable or not math.isclose(root * p, -1 if variable else 1, rel_tol=1e-5):
        raise graph.unlike(index, f"{expected}, its powers p and 1 / p")
    floor = 0.0
    if graph.op(below) == "_maximum_scalar":
        floor = graph.layers[below].attributes["scalar"]
        if floor < 0:
            raise graph.unlike(below, "a floor of 0 or more before a power")
        below = graph.before(below)
    return Gem(None if variable else p, variable, floor), below


def _power(graph, index):
    """(exponent, its variable, the layer before) of a power, else three times None.

    The exponent is a number and the variable None, or the exponent is 1 for the variable and -1 for 1 / variable.
    """
    layer = graph.layers[index]
    if layer.op == "_power_scalar":
        return layer.attributes["scalar"], None, graph.before(index)
    if layer.op == "broadcast_power":
        exponent, sign = graph.skip(layer.inputs[1]), 1
        if graph.op(exponent) == "_rdiv_scalar" and graph.layers[exponent].attributes["scalar"] == 1:
            exponent, sign = graph.before(exponent), -1
        if graph.op(exponent) == "null":
            return sign, graph.layers[exponent].name, graph.before(index)
    return None, None, None


def _dense(graph, index):
    layer = graph.layers[index]
    if layer.attributes["num_hidden"] < 1:
        raise graph.unlike(index, "a dense layer of one value or more")
    return Dense(layer.attributes["num_hidden"], layer.variables)


def _l2_epsilon(graph):
    found = {index: layer for index, layer in graph.layers.items() if layer.op == "L2Normalization"}
    for index, layer in found.items():
        if layer.attributes["mode"] != "instance":
            raise graph.unlike(index, "L2Normalization of each image (mode='instance')")
    epsilons = sorted({layer.attributes["eps"] for layer in found.values()})
    if len(epsilons) > 1 or epsilons[0] < 0:
        raise graph.unlike(index, f"one eps of 0 or more in all L2Normalizations, not {epsilons}")
    return epsilons[0]


def _backbone(graph, index):
    """(stem, pool, list of blocks) of what ends in layer `index`."""
    blocks, sums = [], []
    while graph.is_relu(index) and graph.op(graph.before(index)) in _SUMS:
        sums.insert(0, graph.before(index))
        block, index = _block(graph, sums[0])
        blocks.insert(0, block)
    if not blocks:
        raise graph.unlike(index, "a block of ResNet v1, relu(a + b), to end the backbone")
    pool = None
    if graph.op(index) == "Pooling":
        pool = _pool(graph, index)
        index = graph.before(index)
    if not graph.is_relu(index):
        raise graph.unlike(index, "the stem of ResNet v1: convolution, BatchNorm, relu")
    stem, image = _unit(graph, graph.before(index))
    if graph.op(image) != "null":
        raise graph.unlike(image, "the image before the stem of ResNet v1")
    channels = stem.channels
    for block, place in zip(blocks, sums, strict=True):
        if not block.shortcut and block.units[-1].channels != channels:
            raise graph.unlike(place, f"{channels} channels on both sides, not {block.units[-1].channels} on one")
        channels = block.units[-1].channels
    return stem, pool, blocks


def _block(graph, index):
    """(Block, the layer before it)."""
    ways = [_ways_back(graph, graph.skip(side)) for side in graph.layers[index].inputs]
    # The block begins at the first place that both ways lead back to.
    begin = next((place for place in ways[0] if place in ways[-1]), None)
    if len(ways) == 2 and begin is not None:
        shortcut, units = sorted((way[begin] for way in ways), key=len)
        stride = math.prod(unit.stride for unit in units)
        if not shortcut and len(units) in (2, 3) and stride == 1:
            return Block(units, None), begin
        if len(shortcut) == 1 and len(units) in (2, 3):
            if (shortcut[0].stride, shortcut[0].channels) != (stride, units[-1].channels):
                raise graph.unlike(index, "the same stride and channels on both sides")
            return Block(units, shortcut[0]), begin
    raise graph.unlike(index, "a block of ResNet v1: two or three convolutions beside none or one")


def _ways_back(graph, index):
    """dict of layer -> tuple of the units from it to layer `index`, the nearest first."""
    ways, units = {index: ()}, ()
    while graph.op(index) == "BatchNorm" and len(units) < 3:
        unit, index = _unit(graph, index)
        units = (unit, *units)
        ways[index] = units
        if not graph.is_relu(index):
            break
        index = graph.before(index)
    return ways


def _unit(graph, index):
    """(Unit, the layer before it) of a BatchNorm that follows a convolution."""
    norm = graph.layers[index]
    if norm.op != "BatchNorm" or norm.attributes["axis"] != 1:
        raise graph.unlike(index, "BatchNorm of the channels (axis=1) behind a convolution of ResNet v1")
    if not (norm.attributes["eps"] >= 0 and 0 <= norm.attributes["momentum"] <= 1):
        raise graph.unlike(index, "eps and momentum that a BatchNorm can have")
    before = graph.before(index)
    convolution = graph.layers[before]
    if convolution.op != "Convolution":
        raise graph.unlike(before, f"a convolution before {norm.name!r}, as in ResNet v1")
    own = convolution.attributes
    kernel, stride, pad = (_equal_axes(graph, before, name) for name in ("kernel", "stride", "pad"))
    if own["num_group"] != 1 or set(own["dilate"]) != {1} or own["layout"] != "NCHW" or own["num_filter"] < 1:
        raise graph.unlike(before, "a convolution without groups and dilation, in NCHW")
    if kernel != 2 * pad + 1:
        raise graph.unlike(before, f"a convolution of odd kernel padded by half of it, not {kernel} by {pad}")
    unit = Unit(
        own["num_filter"],
        kernel,
        stride,
        not own["no_bias"],
        norm.attributes["eps"],
        norm.attributes["momentum"],
        norm.attributes["fix_gamma"],
        convolution.variables,
        norm.variables,
    )
    return unit, graph.before(before)


def _pool(graph, index):
    own = graph.layers[index].attributes
    is_usual = own["pool_type"] == "max" and own["pooling_convention"] == "valid" and own["layout"] == "NCHW"
    if own["global_pool"] or not is_usual:
        raise graph.unlike(index, "the maximum over small windows behind the stem, pooling_convention='valid', in NCHW")
    pool = Pool(*(_equal_axes(graph, index, name) for name in ("kernel", "stride", "pad")))
    if 2 * pool.pad > pool.kernel:
        raise graph.unlike(index, f"windows padded by half of them at most, not {pool.kernel} by {pool.pad}")
    return pool


def _equal_axes(graph, index, name):
    """The one value of kernel, stride or pad."""
    values = graph.layers[index].attributes[name]
    lowest = 0 if name == "pad" else 1
    if len(values) != 2 or values[0] != values[1] or not lowest <= values[0] <= 64:
        raise graph.unlike(index, f"two equal values of {name}, {lowest} to 64, not {values}")
    return values[0]


def _stages(blocks):
    stages = []
    for block in blocks:
        if not stages or block.shortcut:
            stages.append([])
        stages[-1].append(block)
    return tuple(map(tuple, stages))


def _classifier(symbol, graph, places):
    """The dense layer outside of the descriptor that takes something of the first branch."""
    place_of = {index: place for place, index in places.items() if place != "map"}
    for index, node in enumerate(symbol.nodes):
        if index not in graph.layers and node.op in ("FullyConnected", "Flatten", *_SAME):
            graph.layers[index] = mxnet_symbol.layer(symbol, index)
            (source,) = graph.layers[index].inputs
            if source in place_of and node.op == "FullyConnected":
                return Classifier(_dense(graph, index), place_of[source])
            if source in place_of:
                place_of[index] = place_of[source]
    return None
