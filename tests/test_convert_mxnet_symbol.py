import copy
import json

import numpy as np
import pytest

from gpq_tf.convert import mxnet_params, mxnet_symbol

import golden
import mxnet_reference

PARAMS = golden.CGD / "params"
FLOAT32 = 3e-6  # what float32 programs agree to, relative to the largest magnitude


@pytest.fixture
def path(tmp_path):
    return tmp_path / "some-symbol.json"


def read(path, graph):
    path.write_text(json.dumps(graph))
    return mxnet_symbol.read(path)


def node(op, name="some", n_inputs=1, **attributes):
    """A graph of one operator behind `n_inputs` variables."""
    variables = [{"op": "null", "name": f"v{place}", "inputs": []} for place in range(n_inputs)]
    own = {"op": op, "name": name, "inputs": [[place, 0, 0] for place in range(n_inputs)], "attrs": attributes}
    return {"nodes": [*variables, own], "heads": [[n_inputs, 0, 0]]}


def last(path, graph):
    return list(mxnet_symbol.layers(read(path, graph)).values())[-1]


def golden_outputs():
    """(prefix, recorded, name of the input, name of the output) of the golden checkpoints."""
    for symbol in sorted(PARAMS.glob("*-symbol.json")):
        prefix = str(symbol).removesuffix("-symbol.json")
        own = PARAMS / f"{symbol.name.removesuffix('-symbol.json')}_output.npz"
        if own.exists():
            yield prefix, own, "data", "out"
        else:
            yield prefix, PARAMS / "output.npz", "data_nchw", "embedding"


# --- networks of MXNet


@golden.needs_golden
def test_golden_networks_compute_what_mxnet_computed():
    n_compared = 0
    for prefix, recorded, data, out in golden_outputs():
        layers = mxnet_symbol.layers(mxnet_symbol.read(f"{prefix}-symbol.json"))
        arrays = mxnet_params.read(f"{prefix}-0000.params")
        arrays = {mxnet_params.variable_name(name): values for name, values in arrays.items()}
        recorded = golden.load(recorded)
        found = mxnet_reference.values(layers, arrays, recorded[data])
        assert golden.worst(list(found.values())[-1], recorded[out]) < FLOAT32
        for name, expected in recorded.items():
            if name.startswith("internal/"):
                layer, _, part = name.removeprefix("internal/").rpartition("_output")
                own = found[layer]
                if part == "__img0":
                    is_thinned = name in recorded["internal_names_with_img0_subsampled_by_4"]
                    own = own[0, :, ::4, ::4] if is_thinned else own[0]
                elif part:
                    own = own.mean((2, 3))
                assert golden.worst(own, expected) < FLOAT32, name
                n_compared += 1
    assert n_compared >= 20


@golden.needs_golden
def test_golden_batch_norms_have_the_defaults_of_mxnet():
    layers = mxnet_symbol.layers(mxnet_symbol.read(PARAMS / "bn_attributes-symbol.json"))
    found = {layer.name: layer.attributes for layer in layers.values() if layer.op == "BatchNorm"}
    nodes = json.loads((PARAMS / "bn_attributes-symbol.json").read_text())["nodes"]
    written = {entry["name"]: entry.get("attrs", {}) for entry in nodes if entry["op"] == "BatchNorm"}
    assert found.keys() == written.keys() and len(found) == 3
    for name, attributes in found.items():
        assert attributes["eps"] == float(written[name].get("eps", 1e-3))
        assert attributes["fix_gamma"] == (written[name].get("fix_gamma", "True") == "True")
    assert {attributes["fix_gamma"] for attributes in found.values()} == {True, False}


@golden.needs_golden
def test_the_oldest_layout_says_the_same(path):
    graph = json.loads((PARAMS / "bn_attributes-symbol.json").read_text())
    expected = mxnet_symbol.layers(mxnet_symbol.read(PARAMS / "bn_attributes-symbol.json"))
    old, place_of = [], {}
    for place, entry in enumerate(graph["nodes"]):
        if not entry["name"].endswith(("_moving_mean", "_moving_var")):
            place_of[place] = len(old)
            inputs = [[place_of[source], output] for source, output, _ in entry["inputs"] if source in place_of]
            old.append({"op": entry["op"], "param": entry.get("attrs", {}), "name": entry["name"], "inputs": inputs})
    found = mxnet_symbol.layers(read(path, {"nodes": old, "heads": [[len(old) - 1, 0]]}))
    for old_layer, layer in zip(found.values(), expected.values(), strict=True):
        assert old_layer._replace(inputs=()) == layer._replace(inputs=())


# --- attributes


def test_defaults(path):
    found = {
        "Convolution": last(path, node("Convolution", n_inputs=3, kernel="(3, 1)", num_filter="4")).attributes,
        "BatchNorm": last(path, node("BatchNorm", n_inputs=5)).attributes,
        "FullyConnected": last(path, node("FullyConnected", n_inputs=3, num_hidden="7")).attributes,
        "Pooling": last(path, node("Pooling", kernel="(2, 2)")).attributes,
        "L2Normalization": last(path, node("L2Normalization")).attributes,
        "Concat": last(path, node("Concat", n_inputs=4, num_args="4")).attributes,
        "mean": last(path, node("mean")).attributes,
    }
    assert found == {
        "Convolution": {
            "kernel": (3, 1),
            "stride": (1, 1),
            "dilate": (1, 1),
            "pad": (0, 0),
            "num_filter": 4,
            "num_group": 1,
            "no_bias": False,
            "layout": "NCHW",
        },
        "BatchNorm": {"eps": 1e-3, "momentum": 0.9, "fix_gamma": True, "axis": 1},
        "FullyConnected": {"num_hidden": 7, "no_bias": False, "flatten": True},
        "Pooling": {
            "kernel": (2, 2),
            "stride": (1, 1),
            "pad": (0, 0),
            "pool_type": "max",
            "global_pool": False,
            "pooling_convention": "valid",
            "p_value": 0,
            "layout": "NCHW",
        },
        "L2Normalization": {"eps": 1e-10, "mode": "instance"},
        "Concat": {"dim": 1},
        "mean": {"axis": (), "keepdims": False, "exclude": False},
    }


@pytest.mark.parametrize(
    "text, value",
    [("(3, 1)", (3, 1)), ("[3,1]", (3, 1)), ("(3L, 1L)", (3, 1)), (" ( 3 , 1 ) ", (3, 1)), ("3", (3,)), ("(3,)", (3,))],
)
def test_spellings_of_tuples(path, text, value):
    assert last(path, node("Convolution", n_inputs=3, kernel=text, num_filter="4")).attributes["kernel"] == value


@pytest.mark.parametrize("text, value", [("True", True), ("1", True), ("TRUE", True), ("False", False), ("0", False)])
def test_spellings_of_flags(path, text, value):
    assert last(path, node("BatchNorm", n_inputs=5, fix_gamma=text)).attributes["fix_gamma"] is value


@pytest.mark.parametrize("text, value", [("1e-05", 1e-5), ("2", 2.0), ("1e-5f", 1e-5), ("None", 1e-3)])
def test_spellings_of_numbers(path, text, value):
    assert last(path, node("BatchNorm", n_inputs=5, eps=text)).attributes["eps"] == value


@pytest.mark.parametrize("key", ["attrs", "attr", "param"])
def test_attributes_by_the_name_of_each_version(path, key):
    graph = node("L2Normalization", eps="0.5")
    graph["nodes"][1][key] = graph["nodes"][1].pop("attrs")
    assert last(path, graph).attributes["eps"] == 0.5


@pytest.mark.parametrize(
    "old, new, n_inputs", [("_Plus", "elemwise_add", 2), ("ElementWiseSum", "add_n", 3), ("_PowerScalar", None, 1)]
)
def test_older_names_of_operators(path, old, new, n_inputs):
    assert last(path, node(old, n_inputs=n_inputs, scalar="3")).op == (new or "_power_scalar")


def test_inputs_and_variables(path):
    graph = node("FullyConnected", "fc", 2, num_hidden="7", no_bias="True")
    layer = last(path, graph)
    assert (layer.op, layer.name, layer.inputs, layer.variables) == ("FullyConnected", "fc", (0,), {"weight": "v1"})
    layer = last(path, node("BatchNorm", "bn", 5))
    names = {"gamma": "v1", "beta": "v2", "moving_mean": "v3", "moving_var": "v4"}
    assert (layer.inputs, layer.variables) == ((0,), names)


def test_only_what_an_output_needs_is_looked_at(path):
    graph = node("Flatten")
    graph["nodes"].append({"op": "SomethingElse", "name": "loss", "inputs": [[1, 0, 0]]})
    graph["heads"].append([2, 0, 0])
    assert list(mxnet_symbol.layers(read(path, graph))) == [0, 1]
    with pytest.raises(
        ValueError, match=r"Expected an operator that networks of CGD have\. Found: SomethingElse 'loss'$"
    ):
        mxnet_symbol.layers(read(path, graph), 1)


# --- files that are wrong


@pytest.mark.parametrize(
    "content, found",
    [
        ("", "Expecting value: line 1 column 1 (char 0)"),
        ("[]", "no object of JSON"),
        ("{}", "no list of nodes"),
        ('{"nodes": [], "heads": []}', "no output"),
        ('{"nodes": [], "heads": [[0, 0, 0]]}', "an output that is node 0, not one of the 0 before"),
        ('{"nodes": [3], "heads": []}', "node 0 that is no object"),
        ('{"nodes": [{"name": "a", "inputs": []}], "heads": []}', "node 0 without op and name"),
        ('{"nodes": [{"op": "null", "name": "\\n", "inputs": []}], "heads": []}', "node 0 without op and name"),
        ('{"nodes": [{"op": "null", "name": "a"}], "heads": []}', "no list of inputs"),
        (
            '{"nodes": [{"op": "null", "name": "a", "attrs": {"b": 1}, "inputs": []}], "heads": []}',
            "attrs of 'a' that are no texts by name",
        ),
        (
            '{"nodes": [{"op": "relu", "name": "a", "inputs": [[0, 0, 0]]}], "heads": [[0, 0, 0]]}',
            "an input of 'a' that is node 0, not one of the 0 before",
        ),
        (
            '{"nodes": [{"op": "relu", "name": "a", "inputs": [[-1, 0]]}], "heads": []}',
            "an input of 'a' that is not [node, output]",
        ),
        (
            '{"nodes": [{"op": "relu", "name": "a", "inputs": [[true, 0]]}], "heads": []}',
            "an input of 'a' that is not [node, output]",
        ),
        (
            '{"nodes": [{"op": "null", "name": "a", "inputs": []}, '
            '{"op": "null", "name": "b", "inputs": [[0, 0, 0]]}], "heads": []}',
            "the variable 'b' with inputs",
        ),
    ],
)
def test_messages_of_files(path, content, found):
    path.write_text(content)
    with pytest.raises(ValueError) as caught:
        mxnet_symbol.read(path)
    assert str(caught.value) == f"Invalid {str(path)!r}. Expected a network of MXNet (symbol.json). Found: {found}"


def test_two_nodes_that_wait_for_each_other_are_refused(path):
    graph = node("elemwise_add", n_inputs=2)
    graph["nodes"][1] = {"op": "relu", "name": "back", "inputs": [[2, 0, 0]]}
    with pytest.raises(ValueError, match=r"Found: an input of 'back' that is node 2, not one of the 1 before$"):
        read(path, graph)


def test_brackets_without_end_and_large_files_are_refused(path):
    path.write_text("[" * 200_000)
    with pytest.raises(ValueError, match=r"^Invalid '.*-symbol\.json'\. Expected a network of MXNet"):
        mxnet_symbol.read(path)
    path.write_text(" " * 9_000_000)
    with pytest.raises(ValueError, match=r"Found: 9,000,000 bytes$"):
        mxnet_symbol.read(path)


@pytest.mark.parametrize(
    "graph, message",
    [
        (node("SliceChannel", "cut"), "an operator that networks of CGD have. Found: SliceChannel 'cut'"),
        (node("Convolution", "c", 3, num_filter="4"), "Convolution 'c' to have the attribute kernel. Found: none"),
        (node("Convolution", "c", 3, kernel="None"), "Convolution 'c' to have the attribute kernel. Found: none"),
        (
            node("Convolution", "c", 3, kernel="(3, x)", num_filter="4"),
            "Convolution 'c' to have a tuple of integers as its kernel. Found: '(3, x)'",
        ),
        (
            node("FullyConnected", "f", 3, num_hidden="4.5"),
            "FullyConnected 'f' to have an integer as its num_hidden. Found: '4.5'",
        ),
        (
            node("FullyConnected", "f", 3, num_hidden="9" * 5000),
            f"FullyConnected 'f' to have an integer as its num_hidden. Found: '{'9' * 40}'",
        ),
        (
            node("BatchNorm", "b", 5, fix_gamma="yes"),
            "BatchNorm 'b' to have True or False as its fix_gamma. Found: 'yes'",
        ),
        (node("BatchNorm", "b", 5, eps="nan"), "BatchNorm 'b' to have a finite number as its eps. Found: 'nan'"),
        (node("BatchNorm", "b", 4), "BatchNorm 'b' to have 5 inputs. Found: 4"),
        (node("FullyConnected", "f", 3, num_hidden="4", no_bias="1"), "FullyConnected 'f' to have 2 inputs. Found: 3"),
        (node("Concat", "c", 0), "Concat 'c' to have some inputs. Found: 0"),
    ],
)
def test_messages_of_operators(path, graph, message):
    with pytest.raises(ValueError) as caught:
        last(path, graph)
    assert str(caught.value).startswith(f"Invalid {str(path)!r}. Expected {message}")


def test_computed_weights_and_second_outputs_are_refused(path):
    graph = node("FullyConnected", "fc", 2, num_hidden="7", no_bias="True")
    graph["nodes"][1] = {"op": "relu", "name": "w", "inputs": [[0, 0, 0]]}
    with pytest.raises(
        ValueError, match=r"Expected FullyConnected 'fc' to have a variable as its weight\. Found: relu 'w'$"
    ):
        last(path, graph)
    graph = node("Flatten", "flat")
    graph["nodes"][1]["inputs"] = [[0, 1, 0]]
    with pytest.raises(
        ValueError, match=r"Expected Flatten 'flat' to take the first value of other nodes\. Found: number 1 of 'v0'$"
    ):
        last(path, graph)
    graph = node("BatchNorm", "bn", 5)
    graph["heads"] = [[5, 2, 0]]
    with pytest.raises(ValueError, match=r"Expected BatchNorm 'bn' to be the network's output by its first value\."):
        last(path, graph)
    with pytest.raises(ValueError, match=r"Expected more than 1 outputs\. Found: 1$"):
        mxnet_symbol.layers(read(path, node("Flatten")), 1)


def places(value, so_far=()):
    """Every place in a value of JSON, as a path of keys."""
    yield so_far
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in children:
        yield from places(child, (*so_far, key))


def test_any_value_in_any_place_is_an_error_of_one_line(path):
    graph = node("Convolution", "c", 3, kernel="(3, 3)", num_filter="4")
    graph["nodes"].append({"op": "BatchNorm", "name": "b", "inputs": [[3, 0, 0], [1, 0, 0], [2, 0, 0]]})
    graph["heads"] = [[4, 0, 0]]
    n_refused = n_read = 0
    for place in places(graph):
        for value in (None, True, -1, 10**30, 1.5, float("nan"), "", "x", "\ud800", [], [[]], {}, {"a": 1}):
            changed = copy.deepcopy(graph)
            if place:
                owner = changed
                for key in place[:-1]:
                    owner = owner[key]
                owner[place[-1]] = value
            else:
                changed = value
            try:
                mxnet_symbol.layers(read(path, changed))
                n_read += 1
            except ValueError as error:
                assert str(error).startswith(f"Invalid {str(path)!r}. Expected ") and "\n" not in str(error)
                n_refused += 1
    assert n_refused > 4 * n_read > 0


def test_the_reference_agrees_with_plain_loops():
    """Convolution and pooling of the oracle itself, which the golden networks see with few strides and pads."""
    rng = np.random.default_rng(0)
    x, weight = rng.normal(size=(2, 3, 7, 6)), rng.normal(size=(4, 3, 3, 2))
    window = {"kernel": (3, 2), "stride": (2, 3), "pad": (1, 0)}
    found = mxnet_reference.convolution(x, weight, dilate=(1, 1), num_group=1, num_filter=4, **window)
    padded = np.pad(x, ((0, 0), (0, 0), (1, 1), (0, 0)))
    assert found.shape == (2, 4, 4, 2)
    for b, o, i, j in np.ndindex(found.shape):
        seen = padded[b, :, 2 * i : 2 * i + 3, 3 * j : 3 * j + 2]
        assert abs(found[b, o, i, j] - (seen * weight[o]).sum()) < 1e-12
    own = {"global_pool": False, "pooling_convention": "valid", "p_value": 0, "pool_type": "max"}
    found = mxnet_reference.pooling(x, **window, **own)
    padded = np.pad(x, ((0, 0), (0, 0), (1, 1), (0, 0)), constant_values=-np.inf)
    for b, c, i, j in np.ndindex(found.shape):
        assert found[b, c, i, j] == padded[b, c, 2 * i : 2 * i + 3, 3 * j : 3 * j + 2].max()
