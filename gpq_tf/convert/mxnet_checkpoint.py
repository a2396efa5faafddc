"""MXNet checkpoints of CGD: PREFIX-symbol.json beside PREFIX-0000.params, as in the original's checkpoints folder."""

import re
import typing
from pathlib import Path

from gpq_tf.convert import cgd_graph, cgd_names, mxnet_params, mxnet_symbol


class Files(typing.NamedTuple):
    """The two files of a checkpoint.

    Attributes:
        symbol: Path.
        params: Path.
        remark: str, which of several epochs this is and why, or "".
    """

    symbol: Path
    params: Path
    remark: str


class Contents(typing.NamedTuple):
    """A checkpoint, read.

    Attributes:
        network: cgd_graph.Network.
        arrays: dict of name in the file -> numpy array, in the file's order; those with a target as our variable has
            them.
        targets: dict of name -> path of our variable (see `cgd_names.table`).
        ignored: dict of each other name -> why.
    """

    network: cgd_graph.Network
    arrays: dict
    targets: dict
    ignored: dict


def find(source):
    """The files that `source` means: a prefix, as the original's --pretrained-model, or one of the two files.

    A prefix takes epoch 0, which is the one that the original loads, else the highest there is, else PREFIX.params
    (gluon's save_parameters).

    Args:
        source: str or Path.

    Returns:
        Files, or None if there is no such pair.

    Example:
        >>> find("checkpoints/no_such_prefix") is None
        True
    """
    prefix, end = _split(source)
    symbol = Path(f"{prefix}-symbol.json")
    if not symbol.is_file():
        return None
    if end:
        return Files(symbol, Path(source), "") if Path(source).is_file() else None
    epochs = _epochs(prefix)
    if not epochs:
        params = Path(f"{prefix}.params")
        return Files(symbol, params, "") if params.is_file() else None
    chosen = 0 if 0 in epochs else max(epochs)
    remark = ""
    if len(epochs) > 1:
        why = "the one that the original loads" if chosen == 0 else "the highest"
        remark = f"epoch {chosen} of {', '.join(map(str, sorted(epochs)))}, {why}; name another file for another"
    return Files(symbol, epochs[chosen], remark)


def missing(source):
    """What a source that `find` found nothing for lacks, in words, or None if it does not look like a checkpoint.

    Example:
        >>> missing("photo.jpg") is None
        True
    """
    prefix, end = _split(source)
    symbol = Path(f"{prefix}-symbol.json")
    if symbol.is_file():
        return f"an MXNet symbol without its weights, {Path(prefix).name}{end or '-0000.params'}"
    if Path(f"{prefix}{end or '.params'}").is_file() or (not end and _epochs(prefix)):
        return f"MXNet weights without their symbol, {symbol.name}, which save_checkpoint and gluon's export write"
    archive = Path(f"{prefix.removesuffix('.tar.gz')}.tar.gz")
    return f"an archive; unpack it first (tar zxvf {archive.name})" if archive.is_file() else None


def read(files):
    """Read a checkpoint.

    Args:
        files: Files.

    Returns:
        Contents.

    Raises:
        ValueError: if a file is damaged, the network is no CGD on a ResNet v1, or an array is missing, of another
            shape, a variance below 0 or a p of GeM that is not above 0.
        OSError: if a file cannot be read.

    Example:
        >>> contents = read(find("checkpoints/CGD.CUB200.C_concat_MG.ResNet50v.dim1536"))  # doctest: +SKIP
        >>> contents.targets["arg:fc_m_weight"]  # doctest: +SKIP
        'head/fc_M/kernel'
    """
    source = str(files.params)
    symbol = mxnet_symbol.read(files.symbol)
    network = cgd_graph.network_of(symbol)
    rows = cgd_names.table(network)
    arrays = mxnet_params.read(files.params)
    names, ignored = cgd_names.match(source, symbol, rows, {name: values.shape for name, values in arrays.items()})
    targets = {}
    for row in rows:
        if row.target is None:
            continue
        name = names[row.variable]
        # Nothing else would show that such a bit is wrong.
        if row.target.endswith("moving_variance") and not (arrays[name] >= 0).all():
            raise ValueError(
                f"Invalid {source!r}. Expected variances of 0 or more in {name}. Found: {arrays[name].min()}"
            )
        if row.target == "head/gem_p" and not (arrays[name] > 0).all():
            raise ValueError(f"Invalid {source!r}. Expected GeM's p above 0 in {name}. Found: {arrays[name].min()}")
        arrays[name] = cgd_names.transformed(row, arrays[name])
        targets[name] = row.target
    return Contents(network, arrays, targets, ignored)


def _split(source):
    """(prefix, the part of a .params file's name behind it or "")."""
    match = re.fullmatch(r"(.+?)(-symbol\.json|(?:-\d{4,})?\.params)?", str(source), re.DOTALL)
    prefix, end = match.groups() if match else (str(source), None)
    return prefix, end if end and end.endswith(".params") else ""


def _epochs(prefix):
    """dict of epoch -> Path of the files that save_checkpoint and export write for a prefix."""
    folder, name = Path(prefix).parent, Path(prefix).name
    if not folder.is_dir():
        return {}
    found = {}
    for path in folder.iterdir():
        match = re.fullmatch(rf"{re.escape(name)}-(\d{{4,18}})\.params", path.name)
        if match and path.is_file():
            found[int(match[1])] = path
    return found
