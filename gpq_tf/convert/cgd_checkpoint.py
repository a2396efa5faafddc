"""CGD's checkpoints of MXNet (symbol and parameters) -> RetrievalModel."""

from gpq_tf.convert import gpq_names, mxnet_checkpoint
from gpq_tf.network import RetrievalModel


def convert(source, legacy=False):
    """Build a RetrievalModel from a checkpoint of CGD.

    Args:
        source: str or Path, prefix of PREFIX-symbol.json and PREFIX-0000.params, or one of these files.
        legacy: bool, kept with the model.

    Returns:
        (model, lines): RetrievalModel; list of str, the sizes, then one line per array.

    Raises:
        ValueError: if a file is damaged, the network is no CGD on a ResNet v1, or it is one that this library cannot
            compute.
        OSError: if a file cannot be read.
    """
    files = mxnet_checkpoint.find(source)
    contents = mxnet_checkpoint.read(files)
    try:
        model = RetrievalModel("cgd", **architecture_of(contents.network), legacy=legacy)
    except ValueError as error:
        raise ValueError(f"Invalid {str(files.symbol)!r}. Expected a network that a model can be. {error}") from error
    variables = {variable.path: variable for variable in model.weights}
    targets = {name: (variables[path], path) for name, path in contents.targets.items()}
    used = gpq_names.load(str(files.params), contents.arrays, targets)
    ignored = [f"ignored  {name} {contents.arrays[name].shape}: {why}" for name, why in contents.ignored.items()]
    return model, [_sizes(model), *([files.remark] if files.remark else []), *used, *ignored]


def architecture_of(network):
    """The arguments of RetrievalModel that a network of MXNet has.

    Args:
        network: cgd_graph.Network.

    Returns:
        dict.

    Raises:
        ValueError: if the branches differ in more than their pooling.
    """
    branches = network.branches
    sizes = {branch.dense and (branch.dense.size, "bias" in branch.dense.variables) for branch in branches}
    normalized = {branch.is_normalized for branch in branches}
    gems = [branch.gem for branch in branches if branch.gem]
    if len(sizes) > 1 or len(normalized) > 1:
        raise ValueError(
            "Invalid branches. Expected dense layers of one size, and all of them normalised or none. "
            f"Received: {len(sizes)} kinds of dense layers, normalised {sorted(normalized)}"
        )
    (dense,) = sizes
    size, has_bias = dense or (0, False)
    classifier = network.classifier
    architecture = {
        "layout": {
            "stem": _unit(network.stem),
            "pool": list(network.pool) if network.pool else None,
            "stages": [
                [{"units": [_unit(unit) for unit in block.units], "shortcut": _unit(block.shortcut)} for block in stage]
                for stage in network.stages
            ],
        },
        "descriptors": "".join(branch.letter for branch in branches),
        "n_dim": size * (len(branches) if network.combination == "concat" else 1),
        "combination": network.combination,
        "n_classes": classifier.dense.size if classifier else 0,
        "classifier_place": classifier.place if classifier else "pooled",
        "use_bias": has_bias,
        "l2_epsilon": network.l2_epsilon,
        "normalize_branches": normalized == {True},
        "normalize_combined": network.is_normalized,
        "learn_p": any(gem.variable for gem in gems),
    }
    if gems:
        architecture["gem_floor"] = gems[0].floor
        if gems[0].p is not None:
            architecture["gem_p"] = gems[0].p
    return architecture


def _unit(unit):
    """As gpq_tf.backbones.resnet_v1 describes a unit."""
    if unit is None:
        return None
    return [unit.channels, unit.kernel, unit.stride, unit.has_bias, float(unit.epsilon), float(unit.momentum)]


def _sizes(model):
    own = model.architecture
    blocks = "-".join(str(len(stage)) for stage in own["layout"]["stages"])
    return (
        f"descriptors = {own['descriptors']}, combination = {own['combination']}, n_dim = {own['n_dim']}, "
        f"ResNet v1 of {blocks} blocks"
    )
