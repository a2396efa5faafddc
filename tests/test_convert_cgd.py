import json

import numpy as np
import pytest

from gpq_tf import convert, settings, starting
from gpq_tf.convert import cgd_graph, cgd_names, gluon_names, mxnet_checkpoint, mxnet_params, mxnet_symbol

import golden
import mxnet_files
import mxnet_reference

PARAMS = golden.CGD / "params"
FLOAT32 = 3e-6  # what float32 programs agree to, relative to the largest magnitude
IMAGES = np.random.default_rng(0).normal(size=(2, 40, 32, 3))
NETWORKS = [
    {},
    {"bottleneck": False},
    {"letters": "GM", "combination": "sum"},
    {"letters": "MGS", "combination": "sum", "p": None},
    {"letters": "S"},
    {"letters": "G", "p": None, "bottleneck": False},
    {"norm": {}, "letters": "MS"},
    {"n_classes": 4, "p": "2.5"},
]


@pytest.fixture
def prefix(tmp_path):
    return tmp_path / "CGD.CUB200.C_concat_SMG.ResNet50v.dim15"  # dots as in the name of the released one


def write(prefix, **options):
    graph, arrays = mxnet_files.cgd(**options)
    mxnet_files.write_checkpoint(prefix, graph, arrays)
    return graph, arrays


def contents(prefix):
    return mxnet_checkpoint.read(mxnet_checkpoint.find(prefix))


def network(prefix, graph):
    """What is found in a graph of JSON."""
    path = prefix.with_name("other-symbol.json")
    path.write_text(json.dumps(graph))
    return cgd_graph.network_of(mxnet_symbol.read(path))


def by_name(graph):
    return {entry["name"]: entry for entry in graph["nodes"]}


# --- the network and its weights


@golden.needs_golden
def test_the_golden_checkpoint_gives_its_embeddings():
    (symbol,) = PARAMS.glob("*div16*-symbol.json")
    recorded = golden.load("params/output.npz", golden.CGD)
    found = contents(str(symbol).removesuffix("-symbol.json"))
    embeddings = mxnet_reference.embed(found, recorded["data_nchw"].transpose(0, 2, 3, 1))
    assert golden.worst(embeddings, recorded["embedding"]) < FLOAT32
    assert found.targets.keys() == found.arrays.keys() and not found.ignored
    assert len(set(found.targets.values())) == len(found.targets)
    assert [len(blocks) for blocks in found.network.stages] == [3, 4, 6, 3]
    assert [blocks[0].units[0].stride for blocks in found.network.stages] == [1, 2, 2, 2]
    assert all(len(block.units) == 3 for blocks in found.network.stages for block in blocks)
    assert sum(branch.dense.size for branch in found.network.branches) == recorded["embedding"].shape[1]


@pytest.mark.parametrize("options", NETWORKS)
def test_the_description_gives_what_the_operators_give(prefix, options):
    _, arrays = write(prefix, **options)
    layers = mxnet_symbol.layers(mxnet_symbol.read(f"{prefix}-symbol.json"))
    arrays = {mxnet_params.variable_name(name): values for name, values in arrays.items()}
    expected = mxnet_reference.output(layers, arrays, IMAGES.transpose(0, 3, 1, 2))
    assert golden.worst(mxnet_reference.embed(contents(prefix), IMAGES), expected) < 1e-12


@pytest.mark.parametrize("options", NETWORKS)
def test_every_array_is_used_or_ignored(prefix, options):
    _, arrays = write(prefix, **options)
    found = contents(prefix)
    assert found.targets.keys() | found.ignored.keys() == found.arrays.keys() == arrays.keys()
    assert not found.targets.keys() & found.ignored.keys()
    assert len(set(found.targets.values())) == len(found.targets)
    gammas = {name for name in arrays if name.endswith("gamma")}
    assert found.ignored.keys() == (gammas if options.get("norm") == {} else set())
    assert set(found.ignored.values()) <= {"gamma is 1 by fix_gamma, which is MXNet's default"}


def test_a_network(prefix):
    graph, _ = write(prefix, p="2.5", n_classes=4)
    found = network(prefix, graph)
    norm = {role: f"bn0_{role}" for role in ("gamma", "beta", "moving_mean", "moving_var")}
    assert found.stem == cgd_graph.Unit(4, 7, 2, False, 1e-5, 0.9, False, {"weight": "conv0_weight"}, norm)
    assert found.pool == cgd_graph.Pool(3, 2, 1)
    units = [[[(u.channels, u.kernel, u.stride) for u in b.units] for b in blocks] for blocks in found.stages]
    assert units == [[[(2, 1, 1), (2, 3, 1), (8, 1, 1)]] * 2, [[(3, 1, 2), (3, 3, 1), (12, 1, 1)]]]
    assert [[bool(b.shortcut) for b in blocks] for blocks in found.stages] == [[True, False], [True]]
    dense = [cgd_graph.Dense(5, {"weight": f"fc_{letter}_weight"}) for letter in "smg"]
    assert found.branches == (
        cgd_graph.Branch("S", None, dense[0], True),
        cgd_graph.Branch("M", None, dense[1], True),
        cgd_graph.Branch("G", cgd_graph.Gem(2.5, None, 1e-6), dense[2], True),
    )
    assert (found.combination, found.is_normalized, found.l2_epsilon) == ("concat", True, 1e-10)
    classes = cgd_graph.Dense(4, {"weight": "classes_weight", "bias": "classes_bias"})
    assert found.classifier == cgd_graph.Classifier(classes, "pooled")


def test_the_table(prefix):
    graph, _ = write(prefix, letters="GS", p=None, n_classes=4)
    rows = {row.variable: row[1:] for row in cgd_names.table(network(prefix, graph))}
    some = {
        "conv0_weight": ("backbone/conv0/kernel", "OIHW to HWIO", (4, 3, 7, 7), ""),
        "bn0_moving_var": ("backbone/norm0/moving_variance", "as they are", (4,), ""),
        "stage1_unit2_conv3_bias": ("backbone/stage1_2_conv3/bias", "as they are", (8,), ""),
        "stage2_unit1_conv1_weight": ("backbone/stage2_1_conv1/kernel", "OIHW to HWIO", (3, 8, 1, 1), ""),
        "stage2_unit1_sc_weight": ("backbone/stage2_1_shortcut_conv/kernel", "OIHW to HWIO", (12, 8, 1, 1), ""),
        "stage2_unit1_sc_bn_beta": ("backbone/stage2_1_shortcut_norm/beta", "as they are", (12,), ""),
        "gem_p": ("head/gem_p", "one number", None, ""),
        "fc_g_weight": ("head/fc_G/kernel", "transposed", (5, 12), ""),
        "classes_weight": ("head/classifier/kernel", "transposed", (4, 12), ""),
        "classes_bias": ("head/classifier/bias", "as they are", (4,), ""),
    }
    assert {name: rows[name] for name in some} == some


def test_values_are_turned_as_keras_has_them(prefix):
    _, arrays = write(prefix, p=None)
    found = contents(prefix)
    kernel, stored = found.arrays["arg:stage1_unit1_conv2_weight"], arrays["arg:stage1_unit1_conv2_weight"]
    for o, i, y, x in np.ndindex(stored.shape):
        assert kernel[y, x, i, o] == stored[o, i, y, x]
    assert np.array_equal(found.arrays["arg:fc_m_weight"].T, arrays["arg:fc_m_weight"])
    assert found.arrays["arg:gem_p"] == np.float32(2.5) and found.arrays["arg:gem_p"].shape == ()


# --- other ways to write the same network


def test_a_sum_may_be_bracketed_in_any_way(prefix):
    graph, arrays = write(prefix, combination="sum")
    expected = mxnet_reference.embed(contents(prefix), IMAGES)
    rewired("sum3", "l2_m", "l2_g")(graph)
    rewired("sum2", "l2_s", "sum3")(graph)
    mxnet_files.write_checkpoint(prefix, graph, arrays)
    found = contents(prefix)
    assert [branch.letter for branch in found.network.branches] == ["S", "M", "G"]
    assert np.array_equal(mxnet_reference.embed(found, IMAGES), expected)


def test_pooling_operators_and_flatten(prefix):
    graph, arrays = write(prefix, letters="SM")
    expected = mxnet_reference.embed(contents(prefix), IMAGES)
    for name, kind in (("spoc", "avg"), ("mac", "max")):
        entry = by_name(graph)[name]
        entry["op"], entry["attrs"] = "Pooling", {"global_pool": "True", "pool_type": kind, "kernel": "(7, 7)"}
    mxnet_files.write_checkpoint(prefix, graph, arrays)
    assert np.array_equal(mxnet_reference.embed(contents(prefix), IMAGES), expected)


def test_a_pooling_that_sums_powers_is_gem_where_length_is_of_no_matter(prefix):
    graph, arrays = write(prefix, letters="G")
    entry = by_name(graph)["gem_root"]
    entry["op"], entry["attrs"] = "Pooling", {"global_pool": "1", "pool_type": "lp", "p_value": "3", "kernel": "(1, 1)"}
    entry["inputs"] = by_name(graph)["gem_floor"]["inputs"]
    mxnet_files.write_checkpoint(prefix, graph, arrays)
    found = contents(prefix)
    assert found.network.branches[0].gem == cgd_graph.Gem(3.0, None, 0.0)
    layers = mxnet_symbol.layers(mxnet_symbol.read(f"{prefix}-symbol.json"))
    arrays = {mxnet_params.variable_name(name): values for name, values in arrays.items()}
    expected = mxnet_reference.output(layers, arrays, IMAGES.transpose(0, 3, 1, 2))
    assert golden.worst(mxnet_reference.embed(found, IMAGES), expected) < 1e-8
    by_name(graph)["fc_g"]["attrs"]["no_bias"] = "False"
    by_name(graph)["fc_g"]["inputs"].append(by_name(graph)["fc_g"]["inputs"][1])
    with pytest.raises(
        ValueError, match=r"Expected GeM's mean, or a dense layer without bias and L2Normalization behind"
    ):
        network(prefix, graph)


@pytest.mark.parametrize("text, p", [("2", 2.0), ("3.0", 3.0)])
def test_p_may_be_rounded_in_the_text(prefix, text, p):
    graph, _ = mxnet_files.cgd("G", p=text)
    by_name(graph)["gem_root"]["attrs"]["scalar"] = f"{1 / p:.6g}"
    assert network(prefix, graph).branches[0].gem.p == p


def test_the_classifier_may_hang_anywhere_on_the_first_branch(prefix):
    for place, source in (("pooled", "spoc"), ("dense", "fc_s"), ("normalized", "l2_s")):
        graph, _ = mxnet_files.cgd(n_classes=4)
        names = [entry["name"] for entry in graph["nodes"]]
        by_name(graph)["drop"]["inputs"] = [[names.index(source), 0, 0]]
        found = network(prefix, graph)
        assert found.classifier.place == place
        shapes = {row.target: row.shape for row in cgd_names.table(found)}
        assert shapes["head/classifier/kernel"] == ((4, 12) if place == "pooled" else (4, 5))
    by_name(graph)["drop"]["inputs"] = [[names.index("mac"), 0, 0]]
    assert network(prefix, graph).classifier is None


def test_arrays_that_the_descriptor_does_without_are_named(prefix):
    graph, arrays = mxnet_files.cgd(n_classes=4)
    names = [entry["name"] for entry in graph["nodes"]]
    by_name(graph)["drop"]["inputs"] = [[names.index("mac"), 0, 0]]
    mxnet_files.write_checkpoint(prefix, graph, {**arrays, "arg:extra": np.zeros(2, np.int64)})
    assert contents(prefix).ignored == {
        "arg:classes_weight": "the descriptor is not computed with it",
        "arg:classes_bias": "the descriptor is not computed with it",
        "arg:extra": "no variable of the symbol",
    }


# --- networks that are not CGD's


def changed(name, **attributes):
    """A change of a graph: other attributes of a node."""

    def change(graph):
        entry = by_name(graph)[name]
        entry["attrs"] = {**entry.get("attrs", {}), **attributes}

    return change


def rewired(name, *sources, op=None):
    """A change of a graph: other inputs, and perhaps another operator, of a node."""

    def change(graph):
        names = [entry["name"] for entry in graph["nodes"]]
        entry = by_name(graph)[name]
        entry["inputs"] = [[names.index(source), 0, 0] for source in sources]
        entry["op"] = op or entry["op"]

    return change


@pytest.mark.parametrize(
    "change, message",
    [
        (
            changed("l2_s", mode="channel"),
            "L2Normalization of each image (mode='instance'). Found: L2Normalization 'l2_s'",
        ),
        (changed("l2_s", eps="1e-6"), "one eps of 0 or more in all L2Normalizations, not [1e-10, 1e-06]. Found: L2"),
        (
            changed("concat", dim="0"),
            "descriptors to be concatenated along their values (dim=1). Found: Concat 'concat'",
        ),
        (changed("fc_s", num_hidden="0"), "a dense layer of one value or more. Found: FullyConnected 'fc_s'"),
        (changed("spoc", axis="(1, 2)"), "a descriptor: the mean, the maximum or the generalised mean (GeM) over the"),
        (changed("spoc", exclude="True"), "a descriptor: the mean, the maximum or the generalised mean (GeM) over the"),
        (
            changed("gem_root", scalar="0.5"),
            "a descriptor: the mean, the maximum or the generalised mean (GeM) over the",
        ),
        (changed("gem_floor", scalar="-1"), "a floor of 0 or more before a power. Found: _maximum_scalar 'gem_floor'"),
        (rewired("mac", "relu0"), "M to be of the same feature map as S. Found: Activation 'relu0'"),
        (rewired("l2_m", "fc_s"), "each descriptor once, not SSG. Found: Concat 'concat'"),
        (rewired("concat", "l2_s", "l2_m", "l2_g", "l2_g"), "at most 3 descriptors to be combined. Found: Concat"),
        (rewired("embedding", "concat", op="Flatten"), "a descriptor: the mean, the maximum or"),
        (
            changed("stage2_unit1_relu", act_type="tanh"),
            "a block of ResNet v1, relu(a + b), to end the backbone. Found",
        ),
        (changed("stage1_unit1_relu2", act_type="tanh"), "a block of ResNet v1: two or three convolutions beside none"),
        (rewired("stage1_unit2_plus", "stage1_unit2_bn3", "stage1_unit2_bn3"), "a block of ResNet v1: two or three"),
        (rewired("stage1_unit2_plus", "stage1_unit2_bn3", "pool0"), "a block of ResNet v1: two or three convolutions"),
        (
            changed("bn0", axis="3"),
            "BatchNorm of the channels (axis=1) behind a convolution of ResNet v1. Found: Batch",
        ),
        (changed("bn0", eps="-1"), "eps and momentum that a BatchNorm can have. Found: BatchNorm 'bn0'"),
        (
            rewired("bn0", "data", *(f"bn0_{role}" for role in ("gamma", "beta", "moving_mean", "moving_var"))),
            "a convol",
        ),
        (
            changed("conv0", num_group="2"),
            "a convolution without groups and dilation, in NCHW. Found: Convolution 'conv0'",
        ),
        (changed("conv0", dilate="(2, 2)"), "a convolution without groups and dilation, in NCHW. Found: Convolution"),
        (changed("conv0", layout="NHWC"), "a convolution without groups and dilation, in NCHW. Found: Convolution"),
        (
            changed("conv0", stride="(2, 1)"),
            "two equal values of stride, 1 to 64, not (2, 1). Found: Convolution 'conv0'",
        ),
        (changed("conv0", kernel="(7,)"), "two equal values of kernel, 1 to 64, not (7,). Found: Convolution 'conv0'"),
        (
            changed("pool0", pooling_convention="full"),
            "the maximum over small windows behind the stem, pooling_convent",
        ),
        (
            changed("pool0", pool_type="avg"),
            "the maximum over small windows behind the stem, pooling_convention='valid'",
        ),
        (rewired("pool0", "bn0"), "the stem of ResNet v1: convolution, BatchNorm, relu. Found: BatchNorm 'bn0'"),
    ],
)
def test_messages_of_networks(prefix, change, message):
    graph, _ = mxnet_files.cgd()
    change(graph)
    with pytest.raises(ValueError) as caught:
        network(prefix, graph)
    path = prefix.with_name("other-symbol.json")
    assert str(caught.value).startswith(f"Invalid {str(path)!r}. Expected {message}")


def test_other_networks_are_refused(prefix):
    graph, _ = mxnet_files.cgd()
    names = [entry["name"] for entry in graph["nodes"]]
    for output, message in {
        "fc_s": "an output of unit length (L2Normalization). Found: FullyConnected 'fc_s'",
        "data": "a descriptor: the mean, the maximum or the generalised mean",
        "stage2_unit1_relu": "a descriptor: the mean, the maximum or the generalised mean",
    }.items():
        graph["heads"] = [[names.index(output), 0, 0]]
        with pytest.raises(ValueError) as caught:
            network(prefix, graph)
        assert f"Expected {message}" in str(caught.value)


def test_sums_of_sums_do_not_grow(prefix):
    graph = mxnet_files.Graph()
    x = graph.add("null", "data")
    for place in range(5000):
        x = graph.add("elemwise_add", f"twice{place}", x, x)
    with pytest.raises(ValueError, match=r"Expected at most 3 descriptors to be combined\. Found: elemwise_add"):
        network(prefix, graph.json())


@golden.needs_golden
def test_golden_networks_of_another_kind_are_refused():
    others = [path for path in PARAMS.glob("*-symbol.json") if "div16" not in path.name]
    for path in others:
        with pytest.raises(ValueError, match=r"^Invalid '.*-symbol\.json'\. Expected an? "):
            cgd_graph.network_of(mxnet_symbol.read(path))
    assert len(others) == 2


# --- weights that do not fit


def refusal(prefix, arrays):
    graph, _ = mxnet_files.cgd()
    mxnet_files.write_checkpoint(prefix, graph, arrays)
    with pytest.raises(ValueError) as caught:
        contents(prefix)
    start = f"Invalid {str(prefix) + '-0000.params'!r}. "
    assert str(caught.value).startswith(start) and "\n" not in str(caught.value)
    return str(caught.value).removeprefix(start)


def test_messages_of_weights(prefix):
    _, arrays = mxnet_files.cgd()
    without = {name: values for name, values in arrays.items() if name != "arg:fc_m_weight"}
    assert refusal(prefix, without) == "Expected fc_m_weight (5, 12). Found: no such array"
    other = {**arrays, "arg:fc_m_weight": np.zeros((12, 5), np.float32)}
    assert refusal(prefix, other) == "Expected fc_m_weight (5, 12). Found: (12, 5)"
    twice = {**arrays, "aux:fc_m_weight": arrays["arg:fc_m_weight"]}
    assert refusal(prefix, twice) == "Expected 'fc_m_weight' once. Found: 'arg:fc_m_weight' and 'aux:fc_m_weight'"
    negative = {**arrays, "aux:bn0_moving_var": np.array([1, 1, -2, 1], np.float32)}
    assert refusal(prefix, negative) == "Expected variances of 0 or more in aux:bn0_moving_var. Found: -2.0"
    nothing = {**arrays, "aux:bn0_moving_var": np.full(4, np.nan, np.float32)}
    assert refusal(prefix, nothing) == "Expected variances of 0 or more in aux:bn0_moving_var. Found: nan"


def test_a_weight_that_two_layers_share_is_refused(prefix):
    graph, arrays = mxnet_files.cgd()
    names = [entry["name"] for entry in graph["nodes"]]
    by_name(graph)["fc_m"]["inputs"][1] = [names.index("fc_s_weight"), 0, 0]
    mxnet_files.write_checkpoint(prefix, graph, arrays)
    with pytest.raises(ValueError, match=r"symbol\.json'\. Expected each variable once\. Found: 'fc_s_weight' twice$"):
        contents(prefix)


def test_p_below_0_is_refused(prefix):
    graph, arrays = mxnet_files.cgd("G", p=None)
    mxnet_files.write_checkpoint(prefix, graph, {**arrays, "arg:gem_p": np.array([-2], np.float32)})
    with pytest.raises(ValueError, match=r"Expected GeM's p above 0 in arg:gem_p\. Found: -2\.0$"):
        contents(prefix)


def test_p_of_any_shape_with_one_value(prefix):
    graph, arrays = mxnet_files.cgd("G", p=None)
    for shape in ((1,), (1, 1, 1, 1)):
        mxnet_files.write_checkpoint(prefix, graph, {**arrays, "arg:gem_p": np.full(shape, 2, np.float32)})
        assert contents(prefix).arrays["arg:gem_p"] == 2
    mxnet_files.write_checkpoint(prefix, graph, {**arrays, "arg:gem_p": np.ones(2, np.float32)})
    with pytest.raises(ValueError, match=r"Expected gem_p of one value\. Found: \(2,\)$"):
        contents(prefix)


# --- gluon's save_parameters


@golden.needs_golden
def test_golden_save_parameters_are_those_of_the_export():
    symbol = mxnet_symbol.read(PARAMS / "gluon_export-symbol.json")
    exported = mxnet_params.read(PARAMS / "gluon_export-0000.params")
    saved = mxnet_params.read(PARAMS / "gluon_save_parameters.params")
    shapes = {name: values.shape for name, values in saved.items()}
    pairs = gluon_names.pair("saved", symbol, set(), shapes)
    assert {pairs[mxnet_params.variable_name(name)] for name in exported} == saved.keys()
    for name, values in exported.items():
        assert np.array_equal(saved[pairs[mxnet_params.variable_name(name)]], values)


def gluon(attributes_of_dense, numbers_of_dense):
    """(graph, arrays by symbol names, names in a save_parameters file in its order) of a network as gluon names it."""
    graph, arrays = mxnet_files.cgd("SM", bottleneck=False)
    new, saved, layer_of = {}, {}, {}
    convolutions = {}
    for entry in graph["nodes"]:
        name, _, role = entry["name"].partition("_moving_") if "_moving_" in entry["name"] else ("", "", "")
        if entry["op"] != "null" or entry["name"] == "data":
            continue
        name, role = (name, f"running_{role}") if name else entry["name"].rsplit("_", 1)
        kind = "dense" if name.startswith("fc") else "batchnorm" if "bn" in name else "conv"
        stage = name.partition("_")[0] + "_" if name.startswith("stage") else ""
        if name not in layer_of:
            count = convolutions.setdefault((stage, kind), 0)
            convolutions[stage, kind] += 1
            layer_of[name] = f"{stage}{kind}{numbers_of_dense[name] if kind == 'dense' else count}"
        new[entry["name"]] = f"net0_{layer_of[name]}_{role}"
        path = attributes_of_dense[name] if kind == "dense" else f"features.{len(layer_of)}"
        saved[new[entry["name"]]] = f"{path}.{role}"
    for entry in graph["nodes"]:
        entry["name"] = new.get(entry["name"], entry["name"])
    arrays = {new[mxnet_params.variable_name(name)]: values for name, values in arrays.items()}
    return graph, arrays, saved


def save(prefix, graph, arrays, saved):
    """Write what gluon would: the symbol, and the arrays by attributes."""
    mxnet_files.write_checkpoint(prefix, graph, {})
    prefix.with_name(f"{prefix.name}-0000.params").unlink()
    content = mxnet_files.params_bytes({saved[variable]: arrays[variable] for variable in saved})
    prefix.with_name(f"{prefix.name}.params").write_bytes(content)


def test_save_parameters_in_order(prefix):
    numbers, attributes = {"fc_s": 0, "fc_m": 1}, {"fc_s": "first", "fc_m": "second"}
    graph, arrays, saved = gluon(attributes, numbers)
    save(prefix, graph, arrays, saved)
    names = cgd_names.match("saved", *_symbol_and_rows(prefix), {saved[v]: arrays[v].shape for v in saved})[0]
    assert names == saved
    found = contents(prefix)
    assert np.array_equal(found.arrays["first.weight"], arrays[_dense(arrays, 0)].T)
    assert found.targets["first.weight"] == "head/fc_S/kernel"


def test_save_parameters_of_layers_that_were_made_in_another_order(prefix):
    numbers, attributes = {"fc_s": 1, "fc_m": 0}, {"fc_s": "second", "fc_m": "first"}
    graph, arrays, saved = gluon(attributes, numbers)
    s, m = _dense(arrays, 1), _dense(arrays, 0)
    saved[m], saved[s] = saved.pop(m), saved.pop(s)  # registered as they were made
    save(prefix, graph, arrays, saved)
    found = contents(prefix)
    assert found.targets["first.weight"] == "head/fc_M/kernel" and found.targets["second.weight"] == "head/fc_S/kernel"


def test_save_parameters_with_own_names(prefix):
    numbers, attributes = {"fc_s": "S", "fc_m": "M"}, {"fc_s": "denseS", "fc_m": "denseM"}
    graph, arrays, saved = gluon(attributes, numbers)
    saved[_dense(arrays, "S")] = saved.pop(_dense(arrays, "S"))  # last
    save(prefix, graph, arrays, saved)
    assert contents(prefix).targets["denseS.weight"] == "head/fc_S/kernel"
    graph, arrays, saved = gluon({"fc_s": "a", "fc_m": "b"}, numbers)
    save(prefix, graph, arrays, saved)
    with pytest.raises(
        ValueError, match=r"Expected dense layers that can be told from each other, as in .*'b\.weight'"
    ):
        contents(prefix)


def _dense(arrays, number):
    (name,) = [name for name in arrays if name.endswith(f"dense{number}_weight")]
    return name


def _symbol_and_rows(prefix):
    symbol = mxnet_symbol.read(f"{prefix}-symbol.json")
    return symbol, cgd_names.table(cgd_graph.network_of(symbol))


def test_messages_of_save_parameters(prefix):
    graph, arrays, saved = gluon({"fc_s": "first", "fc_m": "second"}, {"fc_s": 0, "fc_m": 1})
    save(prefix, graph, arrays, saved)
    own = _symbol_and_rows(prefix)
    shapes = {saved[variable]: arrays[variable].shape for variable in saved}
    with pytest.raises(ValueError, match=r"Expected arrays in gluon's order\. Found: numbers that do not rise$"):
        cgd_names.match("saved", *own, dict(reversed(shapes.items())))
    fewer = dict(list(shapes.items())[:-1])
    with pytest.raises(ValueError, match=rf"^Invalid 'saved'\. Expected .* Found: {len(fewer)} arrays$"):
        cgd_names.match("saved", *own, fewer)
    last = dict(list(shapes.items())[1:] + list(shapes.items())[:1])
    with pytest.raises(ValueError, match=r"Found: .* in the place of 'net0_conv0_weight'$|numbers that do not rise$"):
        cgd_names.match("saved", *own, last)


# --- finding the files


def test_any_name_of_a_checkpoint_finds_it(prefix):
    write(prefix)
    symbol, params = (prefix.with_name(prefix.name + end) for end in ("-symbol.json", "-0000.params"))
    for source in (prefix, str(prefix), symbol, params):
        assert mxnet_checkpoint.find(source) == mxnet_checkpoint.Files(symbol, params, "")


def test_which_epoch(prefix):
    graph, arrays = mxnet_files.cgd()
    found = {}
    for epoch in (3, 12, 10000, 0):
        mxnet_files.write_checkpoint(prefix, graph, arrays, epoch)
        files = mxnet_checkpoint.find(prefix)
        found[epoch] = (files.params.name.removeprefix(prefix.name), files.remark)
    assert found == {
        3: ("-0003.params", ""),
        12: ("-0012.params", "epoch 12 of 3, 12, the highest; name another file for another"),
        10000: ("-10000.params", "epoch 10000 of 3, 12, 10000, the highest; name another file for another"),
        0: (
            "-0000.params",
            "epoch 0 of 0, 3, 12, 10000, the one that the original loads; name another file for another",
        ),
    }
    files = mxnet_checkpoint.find(f"{prefix}-0003.params")
    assert files.params.name.endswith("-0003.params") and files.remark == ""
    assert mxnet_checkpoint.find(f"{prefix}-0004.params") is None


def test_what_is_missing_is_said(prefix):
    assert mxnet_checkpoint.find(prefix) is None and mxnet_checkpoint.missing(prefix) is None
    name = prefix.name
    prefix.with_name(f"{name}.tar.gz").write_bytes(b"")
    for source in (prefix, f"{prefix}.tar.gz"):
        assert mxnet_checkpoint.missing(source) == f"an archive; unpack it first (tar zxvf {name}.tar.gz)"
    params = prefix.with_name(f"{name}-0000.params")
    params.write_bytes(mxnet_files.params_bytes({}))
    words = f"MXNet weights without their symbol, {name}-symbol.json, which save_checkpoint and gluon's export write"
    for source in (prefix, params):
        assert mxnet_checkpoint.find(source) is None and mxnet_checkpoint.missing(source) == words
    params.rename(prefix.with_name(f"{name}.params"))
    for source in (prefix, f"{prefix}.params"):
        assert mxnet_checkpoint.find(source) is None and mxnet_checkpoint.missing(source) == words
    prefix.with_name(f"{name}.params").rename(prefix.with_name(f"{name}-symbol.json"))
    for source in (prefix, f"{prefix}-symbol.json", params):
        assert mxnet_checkpoint.find(source) is None
        assert mxnet_checkpoint.missing(source) == f"an MXNet symbol without its weights, {name}-0000.params"


# --- anything else


def change_somewhere(graph, rng):
    """Another operator, input, output or attribute, drawn."""
    entry = graph["nodes"][rng.integers(len(graph["nodes"]))]
    kind = rng.integers(5)
    if kind == 0:
        entry["op"] = rng.choice(sorted(mxnet_symbol.OPERATORS))
    elif kind == 1 and entry["inputs"]:
        entry["inputs"][rng.integers(len(entry["inputs"]))][0] = int(rng.integers(len(graph["nodes"])))
    elif kind == 2 and entry.get("attrs"):
        del entry["attrs"][rng.choice(sorted(entry["attrs"]))]
    elif kind == 3 and entry.get("attrs"):
        entry["attrs"][rng.choice(sorted(entry["attrs"]))] = rng.choice(["1", "2", "(1, 1)", "(2, 2)", "avg", "True"])
    elif kind == 4:
        graph["heads"] = [[int(rng.integers(len(graph["nodes"]))), 0, 0]]


def test_a_changed_network_is_refused_or_described_as_it_is(prefix):
    """Whatever is not refused gives what its operators, one by one, give."""
    rng = np.random.default_rng(0)
    images = IMAGES[:1, :16, :16]
    n_refused = n_found = 0
    for number in range(700):
        graph, arrays = mxnet_files.cgd("SG" if number % 2 else "MS", bottleneck=False, n_classes=2)
        change_somewhere(graph, rng)
        mxnet_files.write_checkpoint(prefix, graph, arrays)
        try:
            found = contents(prefix)
        except ValueError as error:
            assert str(error).startswith("Invalid '") and "\n" not in str(error)
            n_refused += 1
            continue
        n_found += 1
        layers = mxnet_symbol.layers(mxnet_symbol.read(f"{prefix}-symbol.json"))
        named = {mxnet_params.variable_name(name): values for name, values in arrays.items()}
        expected = mxnet_reference.output(layers, named, images.transpose(0, 3, 1, 2))
        assert golden.worst(mxnet_reference.embed(found, images), expected) < 1e-9, number
    assert n_refused > 250 and n_found > 100


@pytest.mark.parametrize("letters", ["SMG", "G"])
def test_a_converted_network_is_trained_on(prefix, letters):
    """One with biases in its convolutions, as gluon's has and no setting asks for."""
    write(prefix, letters=letters)
    converted, _ = convert.convert(prefix)
    n_dim = converted.architecture["n_dim"]
    given = ["--head=cgd", f"--descriptors={letters}", f"--n_dim={n_dim}", "--auxiliary=False", f"--init={prefix}"]
    model, line = starting.initial_model(settings.resolve(given, "no_such_config.py"))
    assert line == f"starting from {prefix} (backbone and head)"
    images = np.random.default_rng(1).integers(0, 256, (2, 40, 32, 3), "uint8")
    np.testing.assert_array_equal(model.embed(images), converted.embed(images))
    with pytest.raises(ValueError, match=r"is it of another head or backbone\?"):
        starting.initial_model(settings.resolve(["--head=gpq", f"--init={prefix}"], "no_such_config.py"))
