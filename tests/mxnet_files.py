"""Small files as MXNet writes them, for tests and for benchmarks/fuzz_convert.py."""

import json
import struct

import numpy as np

VERSIONS = {"oldest": None, "V1": 0xF993FAC8, "V2": 0xF993FAC9, "V3": 0xF993FACA}
TYPES = {"float32": 0, "float64": 1, "float16": 2, "uint8": 3, "int32": 4, "int8": 5, "int64": 6, "bool": 7}


def array_bytes(values, version="V2", device=(1, 0)):
    """One array of a .params file, without its name."""
    values = np.asarray(values)
    start = b"" if version == "oldest" else struct.pack("<I", VERSIONS[version])
    if version in ("V2", "V3"):
        start += struct.pack("<i", 0)  # dense
    axes = struct.pack(f"<I{values.ndim}{'I' if version == 'oldest' else 'q'}", values.ndim, *values.shape)
    kind = struct.pack("<iii", *device, TYPES[values.dtype.name])
    return start + axes + kind + values.astype(values.dtype.newbyteorder("<")).tobytes()


def row_sparse_bytes(values, rows=None, shape=None, index_type="int64"):
    """One array of a .params file that holds its rows other than zero alone; what is given is written instead."""
    values = np.asarray(values)
    own = np.flatnonzero(values.reshape(len(values), -1).any(axis=1))
    return _sparse_bytes(
        1, values[own], values.shape if shape is None else shape, [own if rows is None else rows], index_type
    )


def csr_bytes(values, ends=None, columns=None, shape=None, index_type="int64"):
    """One array of a .params file in compressed sparse rows; what is given is written instead."""
    values = np.asarray(values)
    own_rows, own_columns = np.nonzero(values)
    own_ends = np.concatenate([[0], np.cumsum(np.bincount(own_rows, minlength=len(values)))])
    indices = [own_ends if ends is None else ends, own_columns if columns is None else columns]
    shape = values.shape if shape is None else shape
    return _sparse_bytes(2, values[own_rows, own_columns], shape, indices, index_type)


def _sparse_bytes(storage, stored, shape, indices, index_type):
    indices = [np.asarray(index, index_type) for index in indices]
    content = struct.pack("<Ii", VERSIONS["V2"], storage)
    for one in (stored.shape, shape):
        content += struct.pack(f"<i{len(one)}q", len(one), *one)
    content += struct.pack("<iii", 1, 0, TYPES[stored.dtype.name])
    for index in indices:
        content += struct.pack(f"<ii{index.ndim}q", TYPES[index.dtype.name], index.ndim, *index.shape)
    return content + stored.tobytes() + b"".join(index.tobytes() for index in indices)


def list_bytes(arrays, names=()):
    """A whole .params file of arrays that are bytes already."""
    content = struct.pack("<3Q", 0x112, 0, len(arrays)) + b"".join(arrays) + struct.pack("<Q", len(names))
    for name in names:
        raw = name.encode()
        content += struct.pack("<Q", len(raw)) + raw
    return content


def params_bytes(arrays, version="V2", device=(1, 0)):
    """A whole .params file of a dict of name -> array."""
    return list_bytes([array_bytes(values, version, device) for values in arrays.values()], list(arrays))


class Graph:
    """A symbol and its arrays, built node by node; every method returns the number of the node that it adds."""

    def __init__(self, seed=0):
        self.rng, self.nodes, self.arrays = np.random.default_rng(seed), [], {}

    def add(self, op, name, *inputs, **attributes):
        inputs = [[source, 0, 0] for source in inputs]
        node = {"op": op, "name": name, "inputs": inputs}
        if attributes:
            node["attrs"] = {key: str(value) for key, value in attributes.items()}
        self.nodes.append(node)
        return len(self.nodes) - 1

    def variable(self, name, values, prefix="arg:"):
        self.arrays[prefix + name] = np.asarray(values, np.float32)
        return self.add("null", name)

    def convolution(self, name, source, before, channels, kernel, stride=1, bias=False):
        shape = (channels, before, kernel, kernel)
        inputs = [self.variable(f"{name}_weight", self.rng.normal(0, (before * kernel**2) ** -0.5, shape))]
        if bias:
            inputs.append(self.variable(f"{name}_bias", self.rng.normal(0, 0.2, channels)))
        window = {"kernel": (kernel, kernel), "stride": (stride, stride), "pad": (kernel // 2, kernel // 2)}
        return self.add("Convolution", name, source, *inputs, num_filter=channels, no_bias=not bias, **window)

    def norm(self, name, source, channels, **attributes):
        inputs = [
            self.variable(f"{name}_gamma", self.rng.uniform(0.5, 1.5, channels)),
            self.variable(f"{name}_beta", self.rng.normal(0, 0.2, channels)),
            self.variable(f"{name}_moving_mean", self.rng.normal(0, 0.2, channels), "aux:"),
            self.variable(f"{name}_moving_var", self.rng.uniform(0.5, 2, channels), "aux:"),
        ]
        return self.add("BatchNorm", name, source, *inputs, **attributes)

    def relu(self, name, source):
        return self.add("Activation", name, source, act_type="relu")

    def dense(self, name, source, before, size, bias=False):
        inputs = [self.variable(f"{name}_weight", self.rng.normal(0, before**-0.5, (size, before)))]
        if bias:
            inputs.append(self.variable(f"{name}_bias", self.rng.normal(0, 0.2, size)))
        return self.add("FullyConnected", name, source, *inputs, num_hidden=size, no_bias=not bias)

    def block(self, name, source, before, channels, stride, bottleneck=True, norm=None):
        """One block of ResNet v1: the stride in the first convolution, biases where gluon has them."""
        norm = norm or {}
        inner = channels // 4 if bottleneck else channels
        shapes = [(inner, 1, True), (inner, 3, False), (channels, 1, True)] if bottleneck else [(inner, 3, False)] * 2
        x, width = source, before
        for place, (own, kernel, bias) in enumerate(shapes, 1):
            x = self.convolution(f"{name}_conv{place}", x, width, own, kernel, stride if place == 1 else 1, bias)
            x = self.norm(f"{name}_bn{place}", x, own, **norm)
            if place < len(shapes):
                x = self.relu(f"{name}_relu{place}", x)
            width = own
        if stride > 1 or before != channels:
            source = self.convolution(f"{name}_sc", source, before, channels, 1, stride)
            source = self.norm(f"{name}_sc_bn", source, channels, **norm)
        return self.relu(f"{name}_relu", self.add("elemwise_add", f"{name}_plus", x, source))

    def descriptor(self, letter, source, p="3.0"):
        """S, M or G; p is text, or None for a variable."""
        if letter == "S":
            return self.add("mean", "spoc", source, axis=(2, 3))
        if letter == "M":
            return self.add("max", "mac", source, axis=(2, 3))
        floored = self.add("_maximum_scalar", "gem_floor", source, scalar=1e-6)
        if p is None:
            variable = self.variable("gem_p", [2.5])
            mean = self.add("mean", "gem", self.add("broadcast_power", "gem_powers", floored, variable), axis=(2, 3))
            return self.add(
                "broadcast_power", "gem_root", mean, self.add("_rdiv_scalar", "one_by_p", variable, scalar=1)
            )
        mean = self.add("mean", "gem", self.add("_power_scalar", "gem_powers", floored, scalar=p), axis=(2, 3))
        return self.add("_power_scalar", "gem_root", mean, scalar=1 / float(p))

    def json(self, heads=None):
        """What symbol.json holds."""
        heads = [[len(self.nodes) - 1, 0, 0]] if heads is None else heads
        variables = [place for place, node in enumerate(self.nodes) if node["op"] == "null"]
        return {
            "nodes": self.nodes,
            "arg_nodes": variables,
            "heads": heads,
            "attrs": {"mxnet_version": ["int", 10901]},
        }


STAGES = ((8, 2), (12, 1))


def cgd(
    letters="SMG",
    combination="concat",
    p="3.0",
    size=5,
    bottleneck=True,
    norm=None,
    n_classes=None,
    seed=0,
    stages=STAGES,
):
    """(graph of json, arrays) of a CGD network on a narrow ResNet.

    Args:
        letters: str, of S, M and G, the descriptors in their order.
        combination: "concat" or "sum".
        p: str, GeM's, or None for a variable.
        size: int, of each descriptor.
        bottleneck: bool.
        norm: dict of attributes of the BatchNorms, or None for gluon's.
        n_classes: int, of the dense layer of the auxiliary loss, or None for none.
        seed: int, of the weights.
        stages: tuple of (channels, number of blocks); each but the first one halves the image.
    """
    graph = Graph(seed)
    norm = {"eps": 1e-5, "fix_gamma": False} if norm is None else norm
    x = graph.add("null", "data")
    x = graph.relu("relu0", graph.norm("bn0", graph.convolution("conv0", x, 3, 4, 7, 2), 4, **norm))
    x = graph.add("Pooling", "pool0", x, kernel=(3, 3), stride=(2, 2), pad=(1, 1), pool_type="max")
    before = 4
    for stage, (channels, n_blocks) in enumerate(stages, 1):
        for number in range(1, n_blocks + 1):
            stride = 2 if stage > 1 and number == 1 else 1
            x = graph.block(f"stage{stage}_unit{number}", x, before, channels, stride, bottleneck, norm)
            before = channels
    parts, first = [], None
    for letter in letters:
        pooled = graph.descriptor(letter, x, p)
        first = pooled if first is None else first
        dense = graph.dense(f"fc_{letter.lower()}", pooled, before, size)
        parts.append(graph.add("L2Normalization", f"l2_{letter.lower()}", dense))
    while combination == "sum" and len(parts) > 1:
        parts[:2] = [graph.add("elemwise_add", f"sum{len(parts)}", *parts[:2])]
    joined = parts[0] if len(parts) == 1 else graph.add("Concat", "concat", *parts, num_args=len(parts), dim=1)
    embedding = graph.add("L2Normalization", "embedding", joined)
    heads = [[embedding, 0, 0]]
    if n_classes:
        heads.append(
            [graph.dense("classes", graph.add("Dropout", "drop", first, p=0.5), before, n_classes, True), 0, 0]
        )
    return graph.json(heads), graph.arrays


def write_checkpoint(prefix, graph, arrays, epoch=0):
    """Write PREFIX-symbol.json and PREFIX-0000.params."""
    with open(f"{prefix}-symbol.json", "w") as file:
        json.dump(graph, file)
    with open(f"{prefix}-{epoch:04d}.params", "wb") as file:
        file.write(params_bytes(arrays))
