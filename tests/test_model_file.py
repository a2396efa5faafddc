"""Model files: what is written comes back, and what is damaged, foreign or hostile is refused by name."""

import hashlib
import json
import time
import zipfile

import h5py
import keras
import numpy as np
import pytest

from gpq_tf import load_model, model_file
from gpq_tf.backbones import resnet, vgg
from gpq_tf.network import RetrievalModel

SIZES = {"n_book": 2, "bn_word": 2, "len_code": 3, "n_classes": 3, "width_multiplier": 1 / 64}
IMAGES = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3), np.uint8)


def tiny(**changes):
    model = RetrievalModel(**{**SIZES, **changes})
    rng = np.random.default_rng(1)
    model.set_weights([w + 0.3 * rng.random(w.shape).astype("float32") for w in model.get_weights()])
    return model


@pytest.fixture(scope="module")
def model():
    model = tiny(seed=5)
    model.record = {"epoch": 3, "settings": {"alpha": 20.0}, "note": "ä"}
    return model


@pytest.fixture(scope="module")
def whole(model, tmp_path_factory):
    """A file that loads."""
    path = tmp_path_factory.mktemp("whole") / "model.keras"
    model.save(path)
    return path


@pytest.fixture
def path(tmp_path):
    return tmp_path / "damaged.keras"


def members_of(path):
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def write_members(path, members, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(name, content)


def forged(path, source, description=(), **replaced):
    """`source` with other members or entries of its description, and checksums that fit them."""
    members = {**members_of(source), **replaced}
    own = json.loads(members.pop("gpq_tf.json"))
    own["sha256"] = {name: hashlib.sha256(content).hexdigest() for name, content in members.items()}
    members["gpq_tf.json"] = json.dumps({**own, **dict(description)}).encode()
    write_members(path, members)


def check_refusal(path, words=""):
    """Loading fails with one ValueError that begins with the file's name; returns the message."""
    with pytest.raises(ValueError) as caught:
        load_model(path)
    message = str(caught.value)
    assert message.startswith(f"Invalid model file {str(path)!r}. Expected "), message
    assert words in message
    assert "\n" not in message
    return message


def same_weights(first, second):
    return all(np.array_equal(a, b) for a, b in zip(first.get_weights(), second.get_weights(), strict=True))


# --- what is written comes back


def test_everything_comes_back(model, whole):
    loaded = load_model(whole)
    assert same_weights(loaded, model)
    assert loaded.architecture == model.architecture == {**SIZES, "head": "gpq", "legacy": False, "seed": 5}
    assert loaded.record == model.record
    file = model_file.read(whole)
    assert (file.architecture, file.record) == (model.architecture, model.record)


def test_float16_rounds_matrices_and_halves_the_file(tmp_path):
    model = tiny(width_multiplier=1 / 8)
    for dtype in ("float32", "float16"):
        model.save(tmp_path / f"{dtype}.keras", weights_dtype=dtype)
    sizes = [(tmp_path / f"{dtype}.keras").stat().st_size for dtype in ("float16", "float32")]
    assert sizes[0] < 0.7 * sizes[1]  # 84 arrays of a small network: names and vectors do not shrink
    loaded = load_model(tmp_path / "float16.keras")
    for ours, original in zip(loaded.get_weights(), model.get_weights(), strict=True):
        assert ours.dtype == np.float32
        expected = original.astype("float16").astype("float32") if original.ndim > 1 else original
        np.testing.assert_array_equal(ours, expected)
    loaded.save(tmp_path / "again.keras", weights_dtype="float16")  # rounding twice is rounding once
    assert same_weights(load_model(tmp_path / "again.keras"), loaded)


def test_equal_models_make_equal_files(tmp_path, model, whole):
    time.sleep(2.1)  # more than the resolution of the dates in a zip file
    model.save(tmp_path / "again.keras")
    assert (tmp_path / "again.keras").read_bytes() == whole.read_bytes()
    load_model(whole).save(tmp_path / "loaded.keras")
    assert (tmp_path / "loaded.keras").read_bytes() == whole.read_bytes()


def test_the_file_is_an_ordinary_keras_archive(whole):
    with zipfile.ZipFile(whole) as archive:
        infos = {info.filename: info for info in archive.infolist()}
    assert set(infos) == {"config.json", "metadata.json", "model.weights.h5", "gpq_tf.json"}
    assert {info.compress_type for info in infos.values()} == {zipfile.ZIP_STORED}


def test_saving_refuses_other_names_types_and_files(tmp_path, model, whole):
    before = whole.read_bytes()
    cases = [
        (
            {"filepath": tmp_path / "model.h5"},
            f"Invalid filepath. Expected a name that ends in .keras. Received: '{tmp_path}/model.h5'",
        ),
        (
            {"filepath": tmp_path / "a.keras", "weights_dtype": "int8"},
            'Invalid weights_dtype. Expected "float32" or "float16". Received: weights_dtype=\'int8\'',
        ),
        (
            {"filepath": whole, "overwrite": False},
            f"Invalid filepath. Expected a new name, since overwrite is False. Received: '{whole}'",
        ),
    ]
    for arguments, message in cases:
        with pytest.raises(ValueError) as caught:
            model.save(**arguments)
        assert str(caught.value) == message
    assert list(tmp_path.iterdir()) == []
    assert whole.read_bytes() == before


# --- atomic


@pytest.mark.parametrize("failing", ["keras", "half precision", "zip", "record"])
def test_a_failing_save_leaves_the_old_file_and_nothing_else(path, model, whole, monkeypatch, failing):
    path.write_bytes(whole.read_bytes())

    def fail(*_, **__):
        raise RuntimeError("no space left")

    if failing == "keras":
        monkeypatch.setattr(keras.Model, "save", fail)
    elif failing == "half precision":
        monkeypatch.setattr(model_file, "_in_half_precision", fail)
    elif failing == "zip":
        monkeypatch.setattr(zipfile.ZipFile, "writestr", fail)
    else:
        monkeypatch.setattr(model, "record", {"not": {"JSON"}})
    with pytest.raises((RuntimeError, TypeError)):
        model.save(path, weights_dtype="float16")
    monkeypatch.undo()
    assert path.read_bytes() == whole.read_bytes()
    assert [file.name for file in path.parent.iterdir()] == [path.name]


# --- damage


def test_every_flipped_bit_is_refused_or_without_effect(path, model, whole):
    """Without effect are only dates, versions and attributes in the zip file's own structures."""
    content, rng = whole.read_bytes(), np.random.default_rng(2)
    n_harmless = 0
    for place in [*rng.integers(0, len(content), 200), *rng.integers(len(content) - 800, len(content), 100)]:
        damaged = bytearray(content)
        damaged[place] ^= 1 << rng.integers(8)
        path.write_bytes(damaged)
        try:
            loaded = load_model(path)
        except ValueError as error:
            assert str(error).startswith(f"Invalid model file {str(path)!r}. Expected ")
        else:
            n_harmless += 1
            assert same_weights(loaded, model)
            assert (loaded.architecture, loaded.record) == (model.architecture, model.record)
    assert n_harmless < 100


def test_every_truncation_is_refused(path, whole):
    content = whole.read_bytes()
    for length in [0, 1, 21, 22, *range(30, len(content), len(content) // 60), len(content) - 1]:
        path.write_bytes(content[:length])
        check_refusal(path, "a whole .keras archive")


def test_what_is_appended_does_not_come_in(path, model, whole):
    path.write_bytes(b"before" + whole.read_bytes())
    assert same_weights(load_model(path), model)
    path.write_bytes(whole.read_bytes() + whole.read_bytes()[:-1])
    check_refusal(path)


def test_a_folder_and_an_absent_file_are_refused(tmp_path):
    (tmp_path / "folder.keras").mkdir()
    for name in ("folder.keras", "absent.keras"):
        with pytest.raises(ValueError, match=f"Invalid model. .* Received: '{tmp_path}/{name}'"):
            load_model(tmp_path / name)
        with pytest.raises(ValueError, match=f"Invalid model file '{tmp_path}/{name}'. Expected a whole .keras"):
            model_file.read(tmp_path / name)


def test_other_archives_are_refused(path, model):
    keras.Model.save(model, path)
    check_refusal(path, "a model written by gpq-tf; it holds no gpq_tf.json")
    write_members(path, {})
    check_refusal(path, "a model written by gpq-tf; it holds no gpq_tf.json")
    path.write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(1000))
    check_refusal(path, "a whole .keras archive; File is not a zip file")


@pytest.mark.parametrize("name", ["config.json", "metadata.json", "model.weights.h5", "gpq_tf.json"])
def test_a_missing_a_changed_and_an_added_member_are_refused(path, whole, name):
    members = members_of(whole)
    write_members(path, {other: content for other, content in members.items() if other != name})
    check_refusal(path)
    write_members(path, {**members, name: members[name][:-1] + bytes([members[name][-1] ^ 1])})
    check_refusal(path)
    write_members(path, {**members, f"{name}.py": b""})
    check_refusal(path, "the members that its description lists")


@pytest.mark.parametrize("compression", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_compressed_members_are_refused(path, whole, compression):
    write_members(path, members_of(whole), compression)
    check_refusal(path, "more than it has")
    path.write_bytes(bytes(10**6) + path.read_bytes())  # so that the members claim no more than the file has
    check_refusal(path, "a whole .keras archive; its members are compressed")


def test_a_member_that_claims_more_than_the_file_has_is_refused(path, whole):
    content = bytearray(whole.read_bytes())
    entry = content.rindex(b"PK\x01\x02")  # the last member's entry in the central directory
    content[entry + 24 : entry + 28] = (2**31).to_bytes(4, "little")
    path.write_bytes(content)
    check_refusal(path, "a whole .keras archive; its members claim ")


# --- descriptions with right checksums


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"format": "another"}, "a model written by gpq-tf; gpq_tf.json says otherwise"),
        ({"version": 2}, "format version 1; it has 2"),
        ({"version": None}, "format version 1; it has None"),
        ({"sha256": []}, "the members that its description lists"),
        ({"sha256": {}}, "the members that its description lists"),
        ({"architecture": None}, "a description of the network with the name of its head"),
        ({"architecture": {}}, "a description of the network with the name of its head"),
        ({"architecture": {"head": "gpq"}}, "a description of the network: bn_word, head, "),
    ],
)
def test_other_descriptions_are_refused(path, whole, change, words):
    forged(path, whole, change)
    check_refusal(path, words)


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"{", b"\xff", b"[" * 100_000, b'{"version": ' + b"9" * 5000 + b"}", b"null", b"NaN"]
)
def test_a_description_that_is_none_is_refused(path, whole, content):
    write_members(path, {**members_of(whole), "gpq_tf.json": content})
    check_refusal(path, "gpq_tf.json")


def test_a_description_of_many_megabytes_is_refused(path, whole):
    write_members(path, {**members_of(whole), "gpq_tf.json": b" " * (5 * 2**20)})
    check_refusal(path, "at most 4194304 bytes of gpq_tf.json; it has 5242880")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"n_book": 0}, "Invalid n_book. Expected an integer from 1 to 256. Received: n_book=0"),
        ({"n_book": 2.0}, "Received: n_book=2.0"),
        ({"bn_word": 10**30}, "Invalid bn_word"),
        ({"len_code": [3]}, "Invalid len_code"),
        ({"width_multiplier": float("nan")}, "Invalid width_multiplier"),
        ({"width_multiplier": float("inf")}, "Invalid width_multiplier"),
        ({"width_multiplier": "1"}, "Invalid width_multiplier"),
        ({"legacy": "yes"}, "Invalid legacy"),
        ({"head": "os.system"}, "Invalid head. Expected one of gpq"),
        ({"head": ["gpq"]}, "with the name of its head"),
        ({"head": "spq"}, "a description of the network: "),
        ({"dtype": "float64"}, "a description of the network: "),
        ({"trainable": False}, "a description of the network: "),
    ],
)
def test_other_architectures_are_refused(path, model, whole, change, words):
    forged(path, whole, {"architecture": {**model.architecture, **change}})
    check_refusal(path, words)


@pytest.mark.parametrize(
    "change",
    [
        {"n_book": 256, "len_code": 4096, "bn_word": 16},  # a codebook of 256 GiB
        {"n_classes": 100_000},
        {"width_multiplier": 8.0},
        {"width_multiplier": 1.0},
        {"n_book": 3},
        {"bn_word": 3},
    ],
)
@pytest.mark.parametrize("weights_dtype", ["float32", "float16"])
def test_sizes_that_the_weights_do_not_bear_out_are_refused_before_memory_is_taken(
    path, model, whole, monkeypatch, change, weights_dtype
):
    forged(path, whole, {"architecture": {**model.architecture, **change}, "weights_dtype": weights_dtype})
    if change in ({"n_book": 3}, {"bn_word": 3}):
        check_refusal(path, "weights")  # as large as HDF5's own structures: found when the arrays are compared
        return
    monkeypatch.setattr(vgg, "VGG", None)  # nothing is built
    check_refusal(path, "weights for the network it describes, ")


def test_a_record_that_is_no_dict_is_as_none(path, model, whole):
    forged(path, whole, {"record": ["a"]})
    loaded = load_model(path)
    assert loaded.record == {}
    assert same_weights(loaded, model)


# --- models of SPQ

SPQ = {"head": "spq", "n_book": 2, "bn_word": 2, "len_code": 3, "width_multiplier": 1 / 64}


@pytest.fixture(scope="module")
def spq_model():
    """Every array is another; the statistics stay positive."""
    model = RetrievalModel(**SPQ, seed=5)
    rng = np.random.default_rng(1)
    model.set_weights([w + 0.3 * rng.random(w.shape).astype("float32") for w in model.get_weights()])
    model.record = {"epoch": 3}
    return model


@pytest.fixture(scope="module")
def spq_whole(spq_model, tmp_path_factory):
    path = tmp_path_factory.mktemp("spq") / "model.keras"
    spq_model.save(path)
    return path


def test_spq_comes_back(spq_model, spq_whole):
    loaded = load_model(spq_whole)
    assert same_weights(loaded, spq_model)
    assert loaded.architecture == spq_model.architecture == {**SPQ, "legacy": False, "seed": 5}
    assert (loaded.head_name, loaded.search_metric, loaded.record) == ("spq", "l2", {"epoch": 3})
    np.testing.assert_array_equal(loaded.embed(IMAGES), spq_model.embed(IMAGES))
    assert load_model(spq_whole, legacy=True).architecture["legacy"] is True


def test_spq_in_float16(tmp_path, spq_model):
    spq_model.save(tmp_path / "half.keras", weights_dtype="float16")
    loaded = load_model(tmp_path / "half.keras")
    for ours, original in zip(loaded.get_weights(), spq_model.get_weights(), strict=True):
        expected = original.astype("float16").astype("float32") if original.ndim > 1 else original
        np.testing.assert_array_equal(ours, expected)
    assert np.abs(loaded.embed(IMAGES) - spq_model.embed(IMAGES)).max() > 0


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"n_classes": 3}, "a description of the network: bn_word, head, "),
        ({"head": "gpq"}, "a description of the network: bn_word, head, "),
        ({"head": "gpq", "n_classes": 3}, "weights"),
        ({"n_book": 3}, "weights"),
        ({"n_book": True}, "Invalid n_book. Expected an integer from 1 to 256. Received: n_book=True"),
    ],
)
def test_spq_mixed_with_another_architecture_is_refused(path, spq_model, spq_whole, change, words):
    forged(path, spq_whole, {"architecture": {**spq_model.architecture, **change}})
    check_refusal(path, words)


@pytest.mark.parametrize(
    "change", [{"n_book": 256, "len_code": 4096, "bn_word": 16}, {"width_multiplier": 8.0}, {"width_multiplier": 1.0}]
)
@pytest.mark.parametrize("weights_dtype", ["float32", "float16"])
def test_sizes_of_spq_are_held_against_the_weights(path, spq_model, spq_whole, monkeypatch, change, weights_dtype):
    architecture = {**spq_model.architecture, **change}
    forged(path, spq_whole, {"architecture": architecture, "weights_dtype": weights_dtype})
    monkeypatch.setattr(resnet, "ResNet", None)  # nothing is built
    check_refusal(path, "weights for the network it describes, ")


# --- weights with right checksums


def weights_file(folder, whole, change):
    """The bytes of the weights after `change(h5py.File)`."""
    copy = folder / "weights.h5"
    copy.write_bytes(members_of(whole)["model.weights.h5"])
    with h5py.File(copy, "r+") as file:
        change(file)
    return copy.read_bytes()


KERNEL = "backbone/convolutions/conv2d/vars/0"


def replace_kernel(make):
    def change(file):
        values = file[KERNEL][()]
        del file[KERNEL]
        make(file, values)

    return change


def external_link(file, values):
    file[KERNEL] = h5py.ExternalLink("secret.h5", "/kernel")


def soft_link(file, values):
    file[KERNEL] = h5py.SoftLink("/backbone/convolutions/conv2d_1/vars/0")


def external_data(file, values):
    file.create_dataset(KERNEL, values.shape, "f4", external=[("secret.bin", 0, values.nbytes)])


def virtual_data(file, values):
    layout = h5py.VirtualLayout(values.shape, "f4")
    layout[:] = h5py.VirtualSource("secret.h5", "kernel", values.shape)
    file.create_virtual_dataset(KERNEL, layout)


def compressed_data(file, values):
    file.create_dataset(KERNEL, data=values, compression="gzip")


def chunked_data(file, values):
    file.create_dataset(KERNEL, data=values, chunks=True)


def claims_a_terabyte(file, values):
    """Contiguous and never written: it takes no room in the file."""
    file.create_dataset(KERNEL, (2**38,), "f4")


def integers(file, values):
    file.create_dataset(KERNEL, data=values.astype("int32"))


def strings(file, values):
    file.create_dataset(KERNEL, data=np.full(values.shape, b"1.5"))


def references(file, values):
    file.create_dataset(KERNEL, data=np.full(values.shape, file["backbone"].ref), dtype=h5py.ref_dtype)


def a_type(file, values):
    file[KERNEL] = np.dtype("float32")


def a_group(file, values):
    file.create_group(KERNEL)


def other_shape(file, values):
    file.create_dataset(KERNEL, data=values[:, :, :, :0])


def nothing(file, values):
    pass


def a_loop(file, values):
    file[KERNEL] = file["backbone"]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (external_link, "holds a link, 0"),
        (soft_link, "holds a link, 0"),
        (external_data, "is no plain array of floats"),
        (virtual_data, "is no plain array of floats"),
        (compressed_data, "is no plain array of floats"),
        (chunked_data, "is no plain array of floats"),
        (claims_a_terabyte, "is no plain array of floats"),
        (integers, "is no plain array of floats"),
        (strings, "is no plain array of floats"),
        (references, "is no plain array of floats"),
        (a_type, "is no plain array of floats"),
        (a_group, "weights of the network it describes"),
        (other_shape, "weights of the network it describes"),
        (nothing, "weights of the network it describes"),
        (a_loop, "weights of the network it describes"),
    ],
)
def test_weights_that_are_not_plain_arrays_are_refused(path, tmp_path, whole, make, words):
    secret = np.ones((3, 3, 3, 1), "float32")
    secret.tofile(tmp_path / "secret.bin")
    with h5py.File(tmp_path / "secret.h5", "w") as file:
        file["kernel"] = secret
    weights = weights_file(tmp_path, whole, replace_kernel(make))
    forged(path, whole, **{"model.weights.h5": weights})
    check_refusal(path, words)


def test_weights_that_are_no_hdf5_are_refused(path, whole):
    size = len(members_of(whole)["model.weights.h5"])
    for content in (bytes(size), np.random.default_rng(3).bytes(size)):
        forged(path, whole, **{"model.weights.h5": content})
        check_refusal(path, "weights of the network it describes")


def test_flipped_bits_under_a_right_checksum_are_refused_or_change_numbers_only(path, whole):
    """As of a file that was damaged before it was signed: HDF5 and Keras raise all kinds, users see one."""
    weights, rng, target = members_of(whole)["model.weights.h5"], np.random.default_rng(4), tiny()
    n_refused = 0
    for _ in range(60):
        damaged = bytearray(weights)
        damaged[rng.integers(len(weights))] ^= 1 << rng.integers(8)
        forged(path, whole, **{"model.weights.h5": bytes(damaged)})
        try:
            model_file.load_weights(target, model_file.read(path))
        except ValueError as error:
            assert str(error).startswith(f"Invalid model file {str(path)!r}. Expected weights")
            n_refused += 1
    assert 8 < n_refused < 52


# --- nothing in a file is executed


def test_no_class_named_in_a_file_is_imported(path, tmp_path, model, whole, monkeypatch):
    (tmp_path / "hostile.py").write_text("raise SystemExit('imported')\nclass Model: pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    config = {"module": "hostile", "class_name": "Model", "config": {}, "registered_name": "hostile>Model"}
    forged(path, whole, **{"config.json": json.dumps(config).encode()})
    assert same_weights(load_model(path), model)
    calling = {"class_name": "function", "config": "system", "module": "os", "registered_name": "system"}
    forged(path, whole, {"architecture": {**model.architecture, "head": calling}})
    check_refusal(path, "the name of its head")
