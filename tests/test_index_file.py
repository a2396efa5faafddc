"""An index on disk: equal when it comes back, mapped at once, refused when anything about the file is wrong."""

import hashlib
import json
import os
import pickle
import signal
import struct
import subprocess
import sys
import time

import numpy as np
import pytest
import safetensors

from gpq_tf.index import METRICS, PQIndex, store
from gpq_tf.index import file as index_file

MODEL = {"name": "models/gpq_48bits_300.keras", "sha256": hashlib.sha256(b"model").hexdigest()}
LIMITED = "import resource; resource.setrlimit(resource.RLIMIT_AS, (2**30, 2**30));"


def full_index(K=10, M=5, metric="l2", n=40, seed=0):
    """Codes with explicit ids, labels, paths and a model."""
    rng = np.random.default_rng(seed)
    index = PQIndex(rng.standard_normal((M, K, 3)), metric, MODEL)
    index.add(
        rng.integers(0, K, (n, M)), rng.permutation(n) * 7 - 20, rng.integers(0, 9, n), [f"{i}.png" for i in range(n)]
    )
    return index


def assert_equal(first, second):
    for name in ("metric", "model"):
        assert getattr(first, name) == getattr(second, name)
    for name in ("codebook", "codes", "ids", "labels"):
        np.testing.assert_array_equal(getattr(first, name), getattr(second, name), strict=True)
    assert (first.paths is None) == (second.paths is None)
    assert list(first.paths or []) == list(second.paths or [])
    queries = np.random.default_rng(0).standard_normal((2, first.M * first.d))
    for one, other in zip(first.search(queries, 50), second.search(queries, 50), strict=True):
        np.testing.assert_array_equal(one, other)


def parts(path):
    """(header, data) of a safetensors file."""
    content = path.read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def write_forged(path, header, data):
    """A file whose header has the right checksum, whatever it says."""
    header["__metadata__"]["header_sha256"] = "0" * 64
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    head = struct.pack("<Q", len(text)) + text
    path.write_bytes(head.replace(b"0" * 64, hashlib.sha256(head).hexdigest().encode()) + data)


def write_tensors(path, tensors, **metadata):
    """A file as a careless writer would make it: all checksums right, values of `tensors` and `metadata` replaced."""
    header, data = parts(path)
    content, new = header["__metadata__"], {"__metadata__": header["__metadata__"]}
    arrays = {name: data[slice(*entry["data_offsets"])] for name, entry in header.items() if name != "__metadata__"}
    joined, sums = b"", {}
    for name, old in arrays.items():
        value = tensors[name].tobytes() if name in tensors else old
        shape = list(tensors[name].shape) if name in tensors else header[name]["shape"]
        new[name] = {**header[name], "shape": shape, "data_offsets": [len(joined), len(joined) + len(value)]}
        sums[name] = hashlib.sha256(value).hexdigest()
        joined += value
    content.update(metadata, sha256=json.dumps(sums))
    write_forged(path, new, joined)


@pytest.fixture
def saved(tmp_path):
    full_index().save(tmp_path / "index.safetensors")
    return tmp_path / "index.safetensors"


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(("M", "K"), [(12, 16), (5, 10), (3, 17), (8, 256), (2, 300)])
def test_what_comes_back_is_equal(tmp_path, metric, M, K, verify):
    index = full_index(K, M, metric)
    index.save(tmp_path / "a")
    assert_equal(PQIndex.load(tmp_path / "a", verify), index)


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("n", [0, 1, 30])
def test_ids_that_count_take_no_room(tmp_path, n, verify):
    path = str(tmp_path / "new folder" / "a.safetensors")
    index = PQIndex(np.arange(48.0).reshape(12, 2, 2))
    index.add(np.ones((n + 3, 12), int))
    index.remove([0, 1, 2])
    index.save(path)
    loaded = PQIndex.load(path, verify)
    assert_equal(loaded, index)
    assert loaded.model is loaded.labels is loaded.paths is None
    loaded.add([[0] * 12])
    assert loaded.ids[-1] == n + 3
    with safetensors.safe_open(path, "np") as file:
        assert set(file.keys()) == {"codebook", "codes"}
        assert file.get_tensor("codes").shape == (n, 6)
        assert file.metadata()["count"] == str(n)


def test_any_safetensors_reader_opens_it(saved):
    index = full_index()
    with safetensors.safe_open(saved, "np") as file:
        np.testing.assert_array_equal(file.get_tensor("codebook"), index.codebook)
        np.testing.assert_array_equal(file.get_tensor("ids"), index.ids)
        np.testing.assert_array_equal(file.get_tensor("codes")[:, 0] & 15, index.codes[:, 0])
        np.testing.assert_array_equal(file.get_tensor("codes")[:, 2], index.codes[:, 4])
        np.testing.assert_array_equal(file.get_tensor("labels"), index.labels)
        ends = file.get_tensor("path_ends")
        assert file.get_tensor("paths").tobytes()[ends[0] : ends[1]].decode() == "1.png"
        assert json.loads(file.metadata()["model"]) == MODEL


def test_equal_indexes_make_equal_files(tmp_path, saved):
    PQIndex.load(saved).save(tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == saved.read_bytes()


def test_multi_hot_labels_come_back(tmp_path):
    index = PQIndex(np.zeros((1, 2, 1)))
    index.add([[0], [1]], labels=[[1, 0, 1], [0, 0, 0]])
    index.save(tmp_path / "a")
    assert_equal(PQIndex.load(tmp_path / "a"), index)


def test_a_mapped_index_grows_and_shrinks_and_its_file_stays(saved):
    content, index = saved.read_bytes(), full_index()
    mapped = PQIndex.load(saved, verify=False)
    for changed in (index, mapped):
        changed.add(np.ones((3, 5), int), ids=[1000, -7, 999], labels=[1, 2, 3], paths=["x", "y", "z"])
        changed.remove([-20, -7])
        changed.add([[2] * 5], labels=[1], paths=["w"])
    assert_equal(mapped, index)
    with pytest.raises(ValueError, match="which is in the index"):
        mapped.add([[1] * 5], ids=[-13], labels=[1], paths=["x"])
    assert saved.read_bytes() == content
    mapped.save(saved)  # over the file that it was mapped from
    assert_equal(PQIndex.load(saved), index)


def test_a_mapped_file_may_be_replaced(saved):
    mapped = PQIndex.load(saved, verify=False)
    full_index(seed=1).save(saved)
    assert_equal(mapped, full_index())
    assert_equal(PQIndex.load(saved), full_index(seed=1))


def test_every_changed_bit_is_refused(saved):
    content = saved.read_bytes()
    with open(saved, "r+b", buffering=0) as file:
        for at, byte in enumerate(content):
            os.pwrite(file.fileno(), bytes([byte ^ 1 << at % 8]), at)
            with pytest.raises(ValueError, match=r"^Invalid index file '.*index.safetensors'. Expected .*. Received: "):
                PQIndex.load(saved)
            os.pwrite(file.fileno(), bytes([byte]), at)
    assert_equal(PQIndex.load(saved), full_index())


def test_every_cut_and_every_extension_is_refused(saved):
    content = saved.read_bytes()
    for damaged in (*(content[:at] for at in range(0, len(content), 3)), content[:-1], content + b"\0"):
        saved.write_bytes(damaged)
        for verify in (True, False):
            with pytest.raises(ValueError, match=r"^Invalid index file '.*index.safetensors'. Expected .*. Received: "):
                PQIndex.load(saved, verify)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": "2"}, "Expected format version 1. Received: version '2'"),
        ({"format": "pt"}, "Expected an index written by gpq-tf. Received: a safetensors file of something else"),
        ({"metric": "cosine"}, "Expected metric and model of an index. Received: Invalid metric. Expected one of"),
        ({"model": "{}"}, "Expected metric and model of an index. Received: Invalid model. Expected None or"),
        ({"model": "{"}, "Expected a model in JSON. Received: "),
        ({"count": "41"}, "Expected codes of type U8 and shape (41, 3). Received: U8 of shape (40, 3)"),
        ({"count": "9" * 19}, "Expected codes of type U8 and shape (9999999999999999999, 3). Received: U8 of shape"),
        ({"count": "1e9"}, "Expected a number for count. Received: '1e9'"),
        ({"count": "\u0664\u0660"}, "Expected a number for count. Received: "),
        ({"K": "16"}, "Expected codebook of type F32 and shape (5, 16, 3). Received: F32 of shape (5, 10, 3)"),
        ({"K": "1"}, "Expected the sizes of an index. Received: M, K, d, count, next_id = 5, 1, 3, 40, 254"),
        ({"M": "257"}, "Expected the sizes of an index. Received: M, K, d, count, next_id = 257, 10, 3, 40, 254"),
        ({"next_id": "3"}, "Expected ids below next_id=3, none of them -1. Received: -20 to 253"),
        ({"first_id": "0"}, "Expected tensors codebook, codes, labels, path_ends, paths. Received: ['codeb"),
        ({"sha256": "[]"}, "Expected one sha256 for each tensor. Received: []"),
        ({"sha256": "{}"}, "Expected one sha256 for each tensor. Received: {}"),
        ({"extra": "1"}, "Expected text for K, M, count, d, format, header_sha256, metric, next_id, sha256, version."),
        ({"count": 40}, "Expected text for K, M, count, d, format, header_sha256, metric, next_id, sha256, version."),
    ],
)  # fmt: skip
def test_metadata_that_cannot_be_is_refused(saved, change, message):
    header, data = parts(saved)
    header["__metadata__"].update(change)
    write_forged(saved, header, data)
    with pytest.raises(ValueError) as error:
        PQIndex.load(saved)
    assert str(error.value).startswith(f"Invalid index file {str(saved)!r}. {message}")


def test_a_header_with_another_checksum_is_refused(saved):
    content = saved.read_bytes()
    saved.write_bytes(content.replace(b'"metric":"l2"', b'"metric":"l3"'))
    for verify in (True, False):
        with pytest.raises(ValueError, match=r"Expected the header that was saved\. Received: a header with another"):
            PQIndex.load(saved, verify)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("codes", {"shape": [120]}, "Expected codes of type U8 and shape (40, 3). Received: U8 of shape (120,)"),
        ("codes", {"dtype": "U16", "shape": [20, 3]}, "Expected codes of type U8 and shape (40, 3). Received: U16"),
        ("codes", {"dtype": "F64"}, "Expected a type, a shape and offsets of 'codes'. Received: {'dtype': 'F64'"),
        ("codes", {"dtype": ["U8"]}, "Expected a type, a shape and offsets of 'codes'. Received: {'dtype': ['U8']"),
        ("codes", {"shape": [-40, -3]}, "Expected a type, a shape and offsets of 'codes'. Received: "),
        ("codes", {"shape": [True, 120]}, "Expected a type, a shape and offsets of 'codes'. Received: "),
        ("codes", {"shape": [2**62, 2**62]}, f"Expected {2**124} bytes of 'codes' from "),
        ("codes", {"shape": [2**33, 3]}, f"Expected {3 * 2**33} bytes of 'codes' from "),
        ("codes", {"data_offsets": [0, 120]}, "Expected 120 bytes of 'codes' from "),
        ("codes", {"more": 1}, "Expected dtype, shape and data_offsets of 'codes'. Received: "),
        ("labels", {"shape": [160], "dtype": "U8"}, "Expected labels of type U8 and shape (40,). Received: U8 of"),
        ("ids", {"shape": [80], "dtype": "I32"}, "Expected ids of type I64 and shape (40,). Received: I32 of shape"),
        ("path_ends", {"shape": [40, 1]}, "Expected path_ends of type I64 and shape (40,). Received: I64 of shape"),
        ("other", {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}, "Expected 0 bytes of 'other' from "),
    ],
)  # fmt: skip
@pytest.mark.parametrize("verify", [True, False])
def test_tensors_that_cannot_be_are_refused(saved, name, change, message, verify):
    header, data = parts(saved)
    header[name] = {**header.get(name, {}), **change}
    write_forged(saved, header, data)
    with pytest.raises(ValueError) as error:
        PQIndex.load(saved, verify)
    assert str(error.value).startswith(f"Invalid index file {str(saved)!r}. {message}")


def test_a_gigantic_tensor_at_the_end_is_refused_before_memory_is_taken(saved):
    header, data = parts(saved)
    last = list(header)[-1]
    begin = header[last]["data_offsets"][0]
    header[last].update(shape=[2**40], data_offsets=[begin, begin + 2**40])
    write_forged(saved, header, data)
    program = f"{LIMITED} from gpq_tf.index import PQIndex; PQIndex.load({str(saved)!r})"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    expected = f"bytes of tensors, as the header says. Received: {len(data)} bytes"
    assert result.stderr.strip().endswith(expected)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "Expected a safetensors file with a header of at most 1048576 bytes. Received: 0 bytes"),
        (b"1234567", "Expected a safetensors file with a header of at most 1048576 bytes. Received: 7 bytes"),
        (struct.pack("<Q", 2**40) + b"{}", f"Received: 10 bytes, of which {2**40} claim to be the header"),
        (struct.pack("<Q", 2**63) + b"{}", f"Received: 10 bytes, of which {2**63} claim to be the header"),
        (struct.pack("<Q", 2) + b"[]", "Expected an index written by gpq-tf. Received: a safetensors file"),
        (struct.pack("<Q", 2) + b"{]", "Expected a safetensors header in JSON. Received: Expecting property name"),
        (struct.pack("<Q", 2) + b"\xff\xff", "Expected a safetensors header in JSON. Received: 'utf-8' codec can't"),
        (struct.pack("<Q", 100_000) + b"[" * 100_000, "Expected a safetensors header in JSON. Received: maximum rec"),
        (struct.pack("<Q", 20_000) + b"1" * 20_000, "Expected a safetensors header in JSON. Received: Exceeds the lim"),
        (b"\x80\x04\x95pickle\x94.", "Expected a safetensors file with a header of at most 1048576 bytes. Received"),
    ],
)  # fmt: skip
def test_other_files_are_refused(tmp_path, content, message):
    path = tmp_path / "a"
    path.write_bytes(content)
    with pytest.raises(ValueError) as error:
        PQIndex.load(path)
    assert message in str(error.value)
    assert str(error.value).startswith(f"Invalid index file {str(path)!r}. ")


def test_a_missing_file_and_a_folder_are_oserrors(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing"):
        PQIndex.load(tmp_path / "nothing")
    with pytest.raises(IsADirectoryError):
        PQIndex.load(tmp_path)
    with pytest.raises(IsADirectoryError):
        full_index().save(tmp_path)


def changed(array, where, value):
    array = array.copy()
    array[where] = value
    return array


ZEROS = np.zeros((40, 3), np.uint8)
IDS = full_index().ids
ENDS = full_index().paths.ends.array


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"codes": changed(ZEROS, (7, 1), 0xA0)}, "Expected codes below K=10. Received: [0, 160, 0] (packed) in row 7"),
        ({"codes": changed(ZEROS, (8, 2), 0x10)}, "Expected codes below K=10. Received: [0, 0, 16] (packed) in row 8"),
        ({"ids": changed(IDS, 3, IDS[9])}, f"Expected distinct ids. Received: {IDS[9]} twice"),
        ({"ids": changed(IDS, 3, -1)}, "Expected ids below next_id=254, none of them -1. Received: -20 to 253"),
        ({"codebook": np.full((5, 10, 3), np.nan, np.float32)}, "Expected a codebook of an index. Received: Invalid"),
        ({"path_ends": changed(ENDS, 4, 10**6)}, f"Expected path_ends that ascend to {ENDS[-1]}. Received: others"),
        ({"path_ends": changed(ENDS, 0, -3)}, f"Expected path_ends that ascend to {ENDS[-1]}. Received: others"),
        ({"path_ends": ENDS - 1}, f"Expected path_ends that ascend to {ENDS[-1]}. Received: others"),
    ],
)  # fmt: skip
def test_values_that_no_index_holds_are_refused_although_the_checksums_are_right(saved, tensors, message):
    write_tensors(saved, tensors)
    with pytest.raises(ValueError) as error:
        PQIndex.load(saved)
    assert str(error.value).startswith(f"Invalid index file {str(saved)!r}. {message}")


@pytest.mark.parametrize(("first", "next_id"), [("-3", "9"), ("8", "9"), ("-9999999999999999999", "0")])
def test_consecutive_ids_that_cannot_be_are_refused(tmp_path, first, next_id):
    index = PQIndex(np.zeros((1, 2, 1)))
    index.add([[0]] * 4)
    index.save(tmp_path / "a")
    write_tensors(tmp_path / "a", {}, first_id=first, next_id=next_id)
    for verify in (True, False):
        with pytest.raises(ValueError, match=rf"Expected ids from .* next_id={next_id}, .*Received: 4 from {first} on"):
            PQIndex.load(tmp_path / "a", verify)


def test_multi_hot_labels_of_other_values_are_refused(tmp_path):
    index = PQIndex(np.zeros((1, 2, 1)))
    index.add([[0]], labels=[[1, 0]])
    index.save(tmp_path / "a")
    write_tensors(tmp_path / "a", {"labels": np.array([[1, 2]], np.uint8)})
    with pytest.raises(ValueError, match=r"Expected multi-hot labels of 0 and 1\. Received: 2$"):
        PQIndex.load(tmp_path / "a")


def test_a_mapped_index_refuses_wrong_codes_when_it_comes_to_them(saved):
    write_tensors(saved, {"codes": np.full((40, 3), 0xFF, np.uint8)})
    mapped = PQIndex.load(saved, verify=False)
    changes = (
        lambda: mapped.search(np.zeros((1, 15)), 1),
        lambda: mapped.search(np.zeros((1, 15)), 1, n_probe=1),
        lambda: mapped.add(np.zeros((1, 5), int), [7000], [1], ["x"]),
        lambda: mapped.remove(mapped.ids[:1]),
        lambda: mapped.codes,
    )
    expected = r"index.safetensors'. Expected codes below K=10. Received: \[255, 255, 255\] \(packed\) in row 0$"
    for change in (*changes, *changes):
        with pytest.raises(ValueError, match=expected):
            change()
    assert len(mapped) == 40


@pytest.mark.parametrize("K", [10, 16, 300])
def test_a_mapped_index_looks_at_its_codes_once(tmp_path, monkeypatch, K):
    full_index(K).save(tmp_path / "a")
    mapped, looked_at, wrong_row = PQIndex.load(tmp_path / "a", verify=False), [], store.wrong_row
    monkeypatch.setattr(store, "wrong_row", lambda rows, M, K: looked_at.append(len(rows)) or wrong_row(rows, M, K))
    for _ in range(3):
        mapped.search(np.zeros((1, 15)), 3)
        assert mapped.codes.shape == (40, 5)
        mapped.snapshot()
    for index in (pickle.loads(pickle.dumps(mapped)), mapped):
        index.add(np.zeros((2, 5), int), [7000, 7001], [1, 2], ["x", "y"])
        index.search(np.zeros((1, 15)), 3)
        index.remove([7001])
        index.search(np.zeros((1, 15)), 3)
    assert looked_at == [40]


def test_changes_of_a_mapped_index_look_at_its_codes_once(saved, monkeypatch):
    looked_at, wrong_row = [], store.wrong_row
    monkeypatch.setattr(store, "wrong_row", lambda rows, M, K: looked_at.append(len(rows)) or wrong_row(rows, M, K))
    for change in (lambda i: i.add(np.zeros((2, 5), int), [-7, -8], [1, 2], ["x", "y"]), lambda i: i.remove([1])):
        mapped = PQIndex.load(saved, verify=False)
        looked_at.clear()
        change(mapped)
        mapped.search(np.zeros((1, 15)), 3)
        mapped.remove(mapped.ids[:1])
        mapped.search(np.zeros((1, 15)), 3)
        assert looked_at == [40]


def test_mapping_does_not_read_the_codes(tmp_path, monkeypatch):
    index = PQIndex(np.zeros((8, 256, 1)))
    index.add(np.zeros((2_000_000, 8), np.uint8), np.arange(2_000_000)[::-1])
    index.save(tmp_path / "a")
    read = []
    hash_of = hashlib.sha256
    monkeypatch.setattr(index_file.hashlib, "sha256", lambda *content: read.append(content) or hash_of(*content))
    start = time.perf_counter()
    mapped = PQIndex.load(tmp_path / "a", verify=False)
    assert time.perf_counter() - start < 0.1  # a millisecond, in truth
    assert len(read) == 2  # header and codebook
    assert len(mapped) == 2_000_000
    assert mapped.positions([3]).tolist() == [1_999_996]


def test_a_failing_disk_leaves_the_old_file(saved, monkeypatch):
    content = saved.read_bytes()

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space left"):
        full_index(seed=1).save(saved)
    assert saved.read_bytes() == content
    assert os.listdir(saved.parent) == [saved.name]


SAVE_FOREVER = """
import itertools, sys
import numpy as np
from gpq_tf.index import PQIndex

for version in itertools.count(1):
    index = PQIndex(np.full((8, 256, 1), version), "l2")
    index.add(np.full((20_000 + version, 8), version % 256), labels=np.full(20_000 + version, version))
    index.save(sys.argv[1])
    if version == 1:
        print("ready", flush=True)
"""


def test_a_killed_save_leaves_a_whole_file(tmp_path):
    path, rng, versions = tmp_path / "a.safetensors", np.random.default_rng(0), set()
    for _ in range(12):
        with subprocess.Popen([sys.executable, "-c", SAVE_FOREVER, path], stdout=subprocess.PIPE) as process:
            assert process.stdout.readline() == b"ready\n"
            time.sleep(rng.uniform(0, 0.1))
            process.send_signal(signal.SIGKILL)
        index = PQIndex.load(path)
        version = int(index.codebook[0, 0, 0])
        assert len(index) == 20_000 + version
        assert (index.labels == version).all()
        assert (index.codes == version % 256).all()
        versions.add(version)
    assert len(versions) > 1
