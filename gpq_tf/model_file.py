"""The .keras file of a RetrievalModel: a description and weights, checksummed, written atomically.

It is an ordinary Keras archive (config.json, metadata.json, model.weights.h5, nothing compressed) with one member more,
gpq_tf.json: version of the format, the architecture, a record of the model's making, and the sha256 of the other
members. A model saved in training has training.safetensors as well, the optimiser's state. Loading reads these members
and the weights only; no class or function named in a file is ever imported.
"""

import hashlib
import io
import json
import struct
import tempfile
import typing
import zipfile
import zlib
from pathlib import Path

import keras
import numpy as np
import safetensors.numpy

from gpq_tf import heads
from gpq_tf.files import replacing

FORMAT_VERSION = 1
_DESCRIPTION, _WEIGHTS, _TRAINING = "gpq_tf.json", "model.weights.h5", "training.safetensors"
_LARGEST_DESCRIPTION = 4 * 2**20
# A file may be larger than its weights: HDF5's own structures, and names.
_LARGEST_OVERHEAD = 4 * 2**20


def write(model, path, overwrite=True, weights_dtype="float32"):
    """Write `model`; see RetrievalModel.save."""
    path = Path(path)
    if path.suffix != ".keras":
        raise ValueError(f"Invalid filepath. Expected a name that ends in .keras. Received: {str(path)!r}")
    if weights_dtype not in ("float32", "float16"):
        raise ValueError(
            f'Invalid weights_dtype. Expected "float32" or "float16". Received: weights_dtype={weights_dtype!r}'
        )
    if path.exists() and not overwrite:
        raise ValueError(f"Invalid filepath. Expected a new name, since overwrite is False. Received: {str(path)!r}")
    with replacing(path) as temporary:
        members = _keras_members(model)
        if weights_dtype == "float16":
            members[_WEIGHTS] = _in_half_precision(members[_WEIGHTS])
        if model.training_state is not None:
            members[_TRAINING] = safetensors.numpy.save(model.training_state)
        description = {
            "format": "gpq_tf model",
            "version": FORMAT_VERSION,
            "architecture": model.architecture,
            "record": model.record,
            "weights_dtype": weights_dtype,
            "sha256": {name: hashlib.sha256(content).hexdigest() for name, content in members.items()},
        }
        members[_DESCRIPTION] = json.dumps(description, indent=2).encode()
        with zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive:
            for name, content in members.items():
                # A fixed date: equal models make equal files.
                archive.writestr(zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0)), content)


class ModelFile(typing.NamedTuple):
    """A model file, read once and verified.

    Attributes:
        path: str or Path.
        architecture: dict of RetrievalModel's arguments.
        record: dict about its making.
        weights: bytes, HDF5.
        training: bytes, safetensors, or None.
    """

    path: str | Path
    architecture: dict
    record: dict
    weights: bytes
    training: bytes | None


def read(path):
    """Read and verify a model file.

    Args:
        path: str or Path.

    Returns:
        ModelFile.

    Raises:
        ValueError: if the file is not a whole, unchanged model of a known version.
    """
    description, members = _verified(path)
    architecture = _checked_architecture(path, description.get("architecture"))
    _check_size(path, architecture, members[_WEIGHTS], description.get("weights_dtype"))
    record = description.get("record")
    record = record if isinstance(record, dict) else {}
    return ModelFile(path, architecture, record, members[_WEIGHTS], members.get(_TRAINING))


def check_shipped(path):
    """Compare a file with the sha256 that the file SHA256SUMS beside it says, as `sha256sum --check` does.

    Args:
        path: pathlib.Path.

    Raises:
        ValueError: if it has another, or is not listed, or the list is missing or damaged.
    """
    sums = path.parent / "SHA256SUMS"
    try:
        pairs = [line.split() for line in sums.read_text(encoding="utf-8").splitlines() if line.strip()]
        expected = {name.removeprefix("*"): checksum.lower() for checksum, name in pairs}.get(path.name)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"Invalid list of checksums {sums}. Expected a sha256 and a name on each line. Received: {error}; "
            "the package's files were changed: install it again"
        ) from error
    received = hashlib.sha256(path.read_bytes()).hexdigest()
    if received != expected:
        wanted = f"sha256 {expected}" if expected else f"its sha256 in {sums.name}, which lacks it"
        raise ValueError(
            f"Invalid shipped model {path}. Expected {wanted}. Received: {received}; "
            "the package's files were changed: install it again"
        )


def fingerprint(file, architecture):
    """sha256 of what decides about a model's codes: its architecture and its weights, in hexadecimal.

    Not of the whole file: what training adds to it changes no code, and `legacy`, which may be chosen on loading, does.

    Args:
        file: ModelFile.
        architecture: dict of RetrievalModel's arguments as they are in force.
    """
    digest = hashlib.sha256(json.dumps(architecture, sort_keys=True).encode())
    digest.update(hashlib.sha256(file.weights).digest())
    return digest.hexdigest()


def load_weights(model, file):
    """Load the weights of a file into a model of the same architecture.

    Raises:
        ValueError: if the weights do not fit the model.
    """
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder, _WEIGHTS)
        copy.write_bytes(file.weights)
        try:
            check_hdf5(copy)
            model.load_weights(copy)
        except Exception as error:  # HDF5 and Keras raise all kinds
            first_line = str(error).strip().split("\n")[0]
            raise _damaged(file.path, f"weights of the network it describes; {first_line}") from error


def training_state(file):
    """What a run needs besides the weights to go on (see `gpq_tf.training_state`), or None where the file has none.

    Raises:
        ValueError: if what the file has is none.
    """
    if file.training is None:
        return None
    try:
        return safetensors.numpy.load(file.training)
    except (safetensors.SafetensorError, ValueError, KeyError) as error:
        raise _damaged(file.path, f"a training state in {_TRAINING}; {error}") from error


def _verified(path):
    """The description (dict) and the other members (dict of bytes), after all checksums have been compared."""
    members = _read_archive(path)
    if _DESCRIPTION not in members or _WEIGHTS not in members:
        raise _damaged(path, f"a model written by gpq-tf; it holds no {_DESCRIPTION} or no {_WEIGHTS}")
    content = members.pop(_DESCRIPTION)
    if len(content) > _LARGEST_DESCRIPTION:
        raise _damaged(path, f"at most {_LARGEST_DESCRIPTION} bytes of {_DESCRIPTION}; it has {len(content)}")
    try:
        description = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise _damaged(path, f"JSON in {_DESCRIPTION}; {error}") from error
    if not isinstance(description, dict) or description.get("format") != "gpq_tf model":
        raise _damaged(path, f"a model written by gpq-tf; {_DESCRIPTION} says otherwise")
    if description.get("version") != FORMAT_VERSION:
        raise _damaged(path, f"format version {FORMAT_VERSION}; it has {description.get('version')!r}")
    checksums = description.get("sha256")
    if not isinstance(checksums, dict) or set(checksums) != set(members):
        raise _damaged(path, "the members that its description lists")
    for name, content in members.items():
        if hashlib.sha256(content).hexdigest() != checksums[name]:
            raise _damaged(path, f"the sha256 that was saved with it; {name} has another")
    return description, members


def _read_archive(path):
    """The members of a zip file, dict of name -> bytes."""
    try:
        with zipfile.ZipFile(path) as archive:
            infos = archive.infolist()
            # Stored, not compressed: what the members claim cannot exceed the file.
            claimed = sum(info.file_size for info in infos)
            if claimed > Path(path).stat().st_size:
                raise zipfile.BadZipFile(f"its members claim {claimed} bytes, more than it has")
            if any(info.compress_type != zipfile.ZIP_STORED for info in infos):
                raise zipfile.BadZipFile("its members are compressed")
            return {info.filename: archive.read(info) for info in infos}
    except (zipfile.BadZipFile, zlib.error, struct.error, ValueError, RuntimeError, EOFError, OSError) as error:
        raise _damaged(path, f"a whole .keras archive; {error}") from error


def _checked_architecture(path, architecture):
    """The description of the network in a file, all of whose values have been checked."""
    if not isinstance(architecture, dict) or not isinstance(architecture.get("head"), str):
        raise _damaged(path, "a description of the network with the name of its head")
    head = architecture["head"]
    try:
        names = {"head", *heads.arguments_of(head)}
    except ValueError as error:
        raise _damaged(path, f"a network of this library. {error}") from error
    if set(architecture) != names:
        raise _damaged(path, f"a description of the network: {', '.join(sorted(names))}")
    try:
        return heads.complete(head, {name: value for name, value in architecture.items() if name != "head"})
    except ValueError as error:
        raise _damaged(path, f"a network of this library. {error}") from error


def _check_size(path, architecture, weights, weights_dtype):
    """Refuse sizes that the weights do not bear out, before memory is taken for them."""
    n_values = heads.recipe(architecture["head"]).kernel_size(architecture)
    bytes_a_value = 2 if weights_dtype == "float16" else 4
    if not n_values * bytes_a_value <= len(weights) <= n_values * 4 + _LARGEST_OVERHEAD:
        raise _damaged(path, f"weights for the network it describes, {n_values} values; they take {len(weights)} bytes")


def check_hdf5(path):
    """Refuse what an HDF5 file can do besides holding arrays: links, arrays that take less room than they claim.

    Raises:
        ValueError: naming the member.
        OSError: if it is no HDF5 file.
    """
    import h5py

    def check(group):
        for name in group:
            if not isinstance(group.get(name, getlink=True), h5py.HardLink):
                raise ValueError(f"{group.name} holds a link, {name}")
            item = group[name]
            if isinstance(item, h5py.Group):
                check(item)
            elif not isinstance(item, h5py.Dataset) or item.dtype.kind != "f" or not _is_plain(item):
                raise ValueError(f"{item.name} is no plain array of floats")

    with h5py.File(path, "r") as file:
        check(file)


def _is_plain(dataset):
    """Whether all values lie in the file, one after the other."""
    elsewhere = dataset.is_virtual or dataset.external or dataset.chunks
    return not elsewhere and dataset.id.get_storage_size() == dataset.nbytes


def _keras_members(model):
    """Contents of the archive that Keras writes, by name; metadata without the date."""
    with tempfile.TemporaryDirectory() as folder:
        plain = Path(folder, "model.keras")
        keras.Model.save(model, plain)
        with zipfile.ZipFile(plain) as archive:
            members = {name: archive.read(name) for name in archive.namelist()}
    metadata = json.loads(members["metadata.json"])
    metadata.pop("date_saved", None)
    members["metadata.json"] = json.dumps(metadata).encode()
    return members


def _in_half_precision(weights):
    """The HDF5 file with every array of two or more axes in float16; vectors hold statistics and cost nothing."""
    import h5py

    source, target = io.BytesIO(weights), io.BytesIO()
    with h5py.File(source, "r") as old, h5py.File(target, "w") as new:

        def copy(name, item):
            if isinstance(item, h5py.Group):
                made = new.require_group(name)
            else:
                values = item[()]
                if np.ndim(values) > 1 and np.abs(values).max(initial=0) > np.finfo("float16").max:
                    raise ValueError(f"Invalid weights_dtype. Expected weights up to 65504. Received: more in {name}")
                made = new.create_dataset(name, data=values.astype("float16") if np.ndim(values) > 1 else values)
            made.attrs.update(item.attrs)

        old.visititems(copy)
        new.attrs.update(old.attrs)
    return target.getvalue()


def _damaged(path, expected):
    return ValueError(f"Invalid model file {str(path)!r}. Expected {expected}")
