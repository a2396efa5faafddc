"""An index on disk: a safetensors file with checksums.

Eight bytes, the length of the header (little-endian); the header, JSON; the tensors' bytes, end to end, nothing left
over. Any safetensors reader opens it. The tensors:

    codebook    F32 (M, K, d)
    codes       U8 or U16 (N, W), packed as in `store.pack`
    ids         I64 (N,); absent where they are consecutive, from first_id on
    labels      I32 (N,), classes, or U8 (N, C), multi-hot; absent without labels
    paths       U8, UTF-8, end to end; absent without paths
    path_ends   I64 (N,), where each path ends

The header's metadata, all text: format, version, metric, count (N), M, K, d, next_id, first_id (absent with ids), model
(JSON; absent without), sha256 (JSON, one for each tensor's bytes), and header_sha256, that of the length and the header
themselves with 64 zeros in its own place: safetensors has no checksum of its own. Nothing a file says is believed
before it has been compared with the size of the file, so that no file makes more memory be taken than it has bytes.
"""

import hashlib
import json
import math
import os
import struct
from pathlib import Path

import numpy as np

from gpq_tf.files import replacing
from gpq_tf.index import arguments
from gpq_tf.index.rows import Rows, Texts
from gpq_tf.index.store import Store, packed_type, packed_width, wrong_row

FORMAT, FORMAT_VERSION = "gpq_tf index", 1
_DTYPES = {"F32": "<f4", "I64": "<i8", "I32": "<i4", "U16": "<u2", "U8": "u1"}
_LARGEST_HEADER = 2**20  # bytes; what `write` makes has fewer than 40,000
_CHUNK_BYTES = 2**20  # read and hashed at a time, while they are in the processor's cache
_ZEROS, _DIGEST_KEY = b"0" * 64, b'"header_sha256":"'
_TEXTS = {"format", "version", "metric", "count", "M", "K", "d", "next_id", "sha256", "header_sha256"}


def write(path, codebook, metric, model, store):
    """Write an index; see PQIndex.save."""
    tensors = {"codebook": codebook, "codes": store.packed.array}
    metadata = {
        "format": FORMAT,
        "version": str(FORMAT_VERSION),
        "metric": metric,
        "count": str(len(store)),
        **{name: str(size) for name, size in zip(("M", "K", "d"), codebook.shape, strict=True)},
        "next_id": str(store.next_id),
    }
    if isinstance(store.ids, range):
        metadata["first_id"] = str(store.ids.start)
    else:
        tensors["ids"] = store.ids.array
    if store.labels is not None:
        tensors["labels"] = store.labels.array
    if store.paths is not None:
        tensors["paths"], tensors["path_ends"] = store.paths.utf8.array, store.paths.ends.array
    if model is not None:
        metadata["model"] = json.dumps(model)

    # Wide types first: then every tensor is aligned in the file, and in memory when it is mapped.
    names = sorted(tensors, key=lambda name: (-tensors[name].itemsize, name))
    tensors = {name: _little_endian(tensors[name]) for name in names}
    contents = {name: np.ascontiguousarray(tensor).reshape(-1).view(np.uint8) for name, tensor in tensors.items()}
    metadata["sha256"] = json.dumps({name: hashlib.sha256(content).hexdigest() for name, content in contents.items()})
    with replacing(path) as temporary, open(temporary, "wb") as file:
        file.write(_header(tensors, metadata))
        for content in contents.values():
            file.write(content)


def read(path, verify):
    """Read an index; see PQIndex.load.

    Returns:
        (codebook, metric, model, store).
    """
    path = Path(path)
    with open(path, "rb") as file:
        try:
            return _read(file, os.fstat(file.fileno()).st_size, str(path), verify)
        except _Wrong as wrong:
            raise ValueError(f"Invalid index file {str(path)!r}. {wrong}") from wrong.__cause__


class _Wrong(Exception):
    def __init__(self, expected, received):
        super().__init__(f"Expected {expected}. Received: {received}")


def _read(file, file_size, path, verify):
    entries, metadata, begin = _read_header(file, file_size)
    metric, model, (M, K, d, count, next_id) = _described(metadata)
    _check_tensors(entries, M, K, d, count, has_ids="first_id" not in metadata)
    checksums = _json(metadata["sha256"], "one sha256 for each tensor")
    if not isinstance(checksums, dict) or set(checksums) != set(entries):
        raise _Wrong("one sha256 for each tensor", metadata["sha256"][:200])

    def load(name):
        return _loaded(file, begin, entries[name], name, checksums[name])

    try:
        codebook = arguments.checked_codebook(load("codebook"))
    except ValueError as error:
        raise _Wrong("a codebook of an index", error) from error
    if verify:
        arrays = {name: load(name) for name in entries if name != "codebook"}
    else:
        whole = np.memmap(file, np.uint8, "r").view(np.ndarray)
        arrays = {name: _mapped(whole, begin, entry) for name, entry in entries.items() if name != "codebook"}
    rows = {name: Rows.of(array) for name, array in arrays.items()}
    ids = rows["ids"] if "ids" in rows else range(int(metadata["first_id"]), int(metadata["first_id"]) + count)
    paths = Texts(rows["paths"], rows["path_ends"]) if "paths" in rows else None
    unchecked = None if verify else path
    store = Store(M, K, rows["codes"], ids, next_id, rows.get("labels"), paths, unchecked)
    if isinstance(ids, range) and (ids.start < -(2**63) or -1 in ids or ids.stop > next_id):
        raise _Wrong(f"ids from -2**63 on, below next_id={next_id}, none of them -1", f"{count} from {ids.start} on")
    if verify:
        _check_values(store)
    return codebook, metric, model, store


def _header(tensors, metadata):
    """The bytes before the tensors."""
    header, at = {"__metadata__": {**metadata, "header_sha256": _ZEROS.decode()}}, 0
    for name, tensor in tensors.items():
        dtype = next(key for key, value in _DTYPES.items() if np.dtype(value) == tensor.dtype)
        header[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [at, at + tensor.nbytes]}
        at += tensor.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    blank = struct.pack("<Q", len(text)) + text
    return blank.replace(_DIGEST_KEY + _ZEROS, _DIGEST_KEY + hashlib.sha256(blank).hexdigest().encode())


def _read_header(file, file_size):
    """(entries, metadata, begin): tensor -> (dtype, shape, offset, size); str -> str; where the tensors begin."""
    prefix = file.read(8)
    length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else None
    if length is None or length > min(file_size - 8, _LARGEST_HEADER):
        raise _Wrong(
            f"a safetensors file with a header of at most {_LARGEST_HEADER} bytes",
            f"{file_size} bytes" if length is None else f"{file_size} bytes, of which {length} claim to be the header",
        )
    text = file.read(length)
    header = _json(text, "a safetensors header")
    metadata = header.pop("__metadata__", None) if isinstance(header, dict) else None
    if not isinstance(metadata, dict) or metadata.get("format") != FORMAT:
        raise _Wrong("an index written by gpq-tf", "a safetensors file of something else")
    if metadata.get("version") != str(FORMAT_VERSION):
        # First of all: what follows may be different in another version.
        raise _Wrong(f"format version {FORMAT_VERSION}", f"version {str(metadata.get('version'))[:20]!r}")
    _check_digest(prefix + text)
    optional = {"first_id", "model"}
    if not _TEXTS <= set(metadata) <= _TEXTS | optional or not all(isinstance(v, str) for v in metadata.values()):
        raise _Wrong(f"text for {', '.join(sorted(_TEXTS))}", str(sorted(metadata))[:400])
    return _entries(header, file_size - 8 - length), metadata, 8 + length


def _check_digest(head):
    before, key, after = head.partition(_DIGEST_KEY)
    blank = before + key + _ZEROS + after[64:]
    if not key or hashlib.sha256(blank).hexdigest().encode() != after[:64]:
        raise _Wrong("the header that was saved", "a header with another sha256")


def _entries(header, data_size):
    """The tensors of a header, which must fill the file exactly."""
    entries, at = {}, 0
    for name, entry in header.items():
        if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
            raise _Wrong(f"dtype, shape and data_offsets of {name[:40]!r}", str(entry)[:200])
        dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not isinstance(dtype, str) or dtype not in _DTYPES or not _are_sizes(shape) or not _are_sizes(offsets):
            raise _Wrong(f"a type, a shape and offsets of {name[:40]!r}", str(entry)[:200])
        size = math.prod(shape) * np.dtype(_DTYPES[dtype]).itemsize
        if offsets != [at, at + size]:
            raise _Wrong(f"{size} bytes of {name[:40]!r} from {at} on", f"data_offsets {str(offsets)[:200]}")
        entries[name] = (dtype, tuple(shape), at, size)
        at += size
    if at != data_size:
        raise _Wrong(f"{at} bytes of tensors, as the header says", f"{data_size} bytes")
    return entries


def _are_sizes(values):
    return isinstance(values, list) and len(values) <= 3 and all(type(v) is int and 0 <= v < 2**63 for v in values)


def _described(metadata):
    """(metric, model, (M, K, d, count, next_id)) of the metadata."""
    numbers = {name: metadata[name] for name in ("M", "K", "d", "count", "next_id", "first_id") if name in metadata}
    for name, text in numbers.items():
        if len(text) > 20 or not text.isascii() or not text.removeprefix("-").isdigit():
            raise _Wrong(f"a number for {name}", repr(text[:40]))
        numbers[name] = int(text)
    sizes = [numbers[name] for name in ("M", "K", "d", "count", "next_id")]
    if not (
        min(sizes) >= 0
        and sizes[4] <= 2**63
        and 1 <= sizes[0] <= arguments.LARGEST_M
        and 2 <= sizes[1] <= arguments.LARGEST_K
    ):
        raise _Wrong("the sizes of an index", f"M, K, d, count, next_id = {', '.join(map(str, sizes))}")
    try:
        metric = arguments.checked_metric(metadata["metric"])
        model = _json(metadata["model"], "a model") if "model" in metadata else None
        return metric, arguments.checked_model(model), sizes
    except ValueError as error:
        raise _Wrong("metric and model of an index", str(error)[:400]) from error


def _check_tensors(entries, M, K, d, count, has_ids):
    """Names, types and shapes."""
    expected = {
        "codebook": [("F32", (M, K, d))],
        "codes": [("U8" if packed_type(K).itemsize == 1 else "U16", (count, packed_width(M, K)))],
    }
    if has_ids:
        expected["ids"] = [("I64", (count,))]
    if "labels" in entries and count:
        expected["labels"] = [("I32", (count,)), ("U8", (count, *entries["labels"][1][1:2]))]
    if ("paths" in entries or "path_ends" in entries) and count:
        expected["path_ends"] = [("I64", (count,))]
        expected["paths"] = [("U8", entries.get("paths", (0, (0,)))[1][:1])]
    if set(entries) != set(expected):
        raise _Wrong(f"tensors {', '.join(sorted(expected))}", str(sorted(entries))[:400])
    for name, ways in expected.items():
        if entries[name][:2] not in ways or (name == "labels" and 0 in entries[name][1]):
            dtype, shape = ways[-1]
            raise _Wrong(f"{name} of type {dtype} and shape {shape}", f"{entries[name][0]} of shape {entries[name][1]}")


def _loaded(file, begin, entry, name, checksum):
    """A tensor in memory, its sha256 compared."""
    dtype, shape, offset, size = entry
    content, digest = np.empty(size, np.uint8), hashlib.sha256()
    file.seek(begin + offset)
    for at in range(0, size, _CHUNK_BYTES):
        chunk = content[at : at + _CHUNK_BYTES]
        if file.readinto(chunk) != len(chunk):
            raise _Wrong(f"{size} bytes of {name}", "fewer; the file became shorter while it was read")
        digest.update(chunk)
    if digest.hexdigest() != checksum:
        raise _Wrong(f"{name} as saved", "bytes with another sha256")
    return content.view(_DTYPES[dtype]).reshape(shape)


def _mapped(whole, begin, entry):
    """A tensor in the mapped file."""
    dtype, shape, offset, size = entry
    return whole[begin + offset : begin + offset + size].view(_DTYPES[dtype]).reshape(shape)


def _check_values(store):
    """What a checksum does not tell: that whoever wrote the file wrote an index."""
    row = wrong_row(store.packed.array, store.M, store.K)
    if row is not None:
        raise _Wrong(f"codes below K={store.K}", f"{store.packed.array[row].tolist()} (packed) in row {row}")
    if not isinstance(store.ids, range):
        ids, next_id = store.ids.array, store.next_id
        repeated = arguments.first_repeated(ids)
        if repeated is not None:
            raise _Wrong("distinct ids", f"{repeated} twice")
        if len(ids) and ((ids == -1).any() or int(ids.max()) >= next_id):
            raise _Wrong(f"ids below next_id={next_id}, none of them -1", f"{ids.min()} to {ids.max()}")
    if store.labels is not None and store.labels.array.ndim == 2 and store.labels.array.max() > 1:
        raise _Wrong("multi-hot labels of 0 and 1", store.labels.array.max())
    if store.paths is not None:
        ends = store.paths.ends.array
        if ends[0] < 0 or (ends[1:] < ends[:-1]).any() or ends[-1] != len(store.paths.utf8):
            raise _Wrong(f"path_ends that ascend to {len(store.paths.utf8)}", "others")


def _json(text, what):
    try:
        # Python's decoder takes more than JSON (NaN, for one); nothing below takes what it makes of it.
        return json.loads(text if isinstance(text, str) else text.decode())
    except (ValueError, RecursionError) as error:
        raise _Wrong(f"{what} in JSON", str(error)[:200]) from error


def _little_endian(array):
    return array.astype(array.dtype.newbyteorder("<"), copy=False)
