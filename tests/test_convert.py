import re
import subprocess
import sys

import keras
import numpy as np
import pytest
import scipy.io

from gpq_tf import convert, load_model, metrics, retrieval
from gpq_tf.__main__ import main
from gpq_tf.convert import gpq_names, mat, tensor_bundle, tf_checkpoint

import golden
import gpq_files

FEATURES = 3e-6  # golden's README: what float32 programs agree to, relative to the largest magnitude
LINE = re.compile(r"(used    |ignored ) (\S+) (\([\d, ]*\))(?: -> | *: )(.+)")
IMAGES = np.random.default_rng(0).integers(0, 256, (5, 32, 32, 3), np.uint8)


@pytest.fixture
def prefix(tmp_path):
    """A small checkpoint of the demo's kind, with two books by D / 12."""
    gpq_files.write_checkpoint(tmp_path / "20.ckpt", gpq_files.checkpoint_arrays())
    return tmp_path / "20.ckpt"


def named(lines):
    """dict of name -> (word, shape as text, what follows) of the lines about variables; each name once."""
    found = [LINE.fullmatch(line) for line in lines]
    found = [match.groups() for match in found if match]
    assert len({name for _, name, _, _ in found}) == len(found)
    return {name: (word.strip(), shape, rest) for word, name, shape, rest in found}


def weights_of(model):
    return [keras.ops.convert_to_numpy(weight) for weight in model.weights]


def all_equal(first, second):
    return all(np.array_equal(a, b) for a, b in zip(weights_of(first), weights_of(second), strict=True))


# --- what goes where


@pytest.mark.parametrize("adam", [False, True])
def test_every_variable_is_used_or_ignored_by_name(tmp_path, adam):
    arrays = gpq_files.checkpoint_arrays(adam)
    gpq_files.write_checkpoint(tmp_path / "20.ckpt", arrays)
    model, lines = convert.convert(tmp_path / "20.ckpt", n_book=3)
    found = named(lines)
    assert len(lines) == 1 + len(arrays) and set(found) == set(arrays)
    used = {name for name in found if found[name][0] == "used"}
    assert len(model.weights) == 84
    assert len(used) == 84 + (2 * 44 + 1 if adam else 0)  # two slots for each of 44 trained variables, and the step
    assert len({found[name][2] for name in used if "Adam" not in name}) == 84 + adam  # each to another place
    assert set(arrays) - used == {"is_training"} | ({"beta1_power"} if adam else set())
    for name, (_, shape, _) in found.items():
        assert shape == str(np.shape(arrays[name]))


def test_values_arrive(prefix):
    arrays = gpq_files.checkpoint_arrays()
    model, _ = convert.convert(prefix, n_book=3)
    layers = zip(gpq_files.SCOPES, model.backbone.convolutions, model.backbone.normalizations, strict=True)
    for (conv, norm), convolution, normalization in layers:
        scope = f"Fixed_VGG/{norm}"
        for name in ("kernel", "bias"):
            assert np.array_equal(getattr(convolution, name), arrays[f"Fixed_VGG/{conv}/{name}"])
        for name in ("gamma", "beta", "moving_mean", "moving_variance"):
            assert np.array_equal(getattr(normalization, name), arrays[f"{scope}/{name}"])
        for name in ("biased", "local_step"):
            assert np.array_equal(getattr(normalization, name), arrays[f"{scope}/{scope}/moving_mean/{name}"])
    assert np.array_equal(model.head.projection.kernel, arrays["Fixed_VGG/dense/kernel"])
    assert np.array_equal(model.head.projection.bias, arrays["Fixed_VGG/dense/bias"])
    assert np.array_equal(model.head.prototypes, arrays["C"])
    codebook = keras.ops.convert_to_numpy(model.head.quantizer.codebook)
    for book in range(gpq_files.N_BOOK):
        for word in range(gpq_files.N_WORD):
            own = arrays["Z"][word, book * gpq_files.LEN_CODE : (book + 1) * gpq_files.LEN_CODE]
            assert np.array_equal(codebook[book, word], own)
    assert model.architecture == {
        "head": "gpq",
        "n_book": 3,
        "bn_word": 2,
        "len_code": 8,
        "n_classes": 5,
        "width_multiplier": 1 / 64,
        "legacy": False,
        "seed": 0,
    }


@pytest.mark.parametrize("suffix", ["", ".index", ".data-00000-of-00001", ".meta"])
def test_any_file_of_a_checkpoint_names_it(prefix, suffix):
    assert convert.is_source(f"{prefix}{suffix}")
    assert tf_checkpoint.find(f"{prefix}{suffix}") == str(prefix)


def test_shards_convert_as_one_file_does(tmp_path, prefix):
    import tensorflow as tf

    names = sorted(gpq_files.checkpoint_arrays())
    parts = [str(tmp_path / "part_0"), str(tmp_path / "part_1")]
    for part, own in zip(parts, (names[:40], names[40:]), strict=True):
        gpq_files.write_checkpoint(part, {name: gpq_files.checkpoint_arrays()[name] for name in own})
    tf.raw_ops.MergeV2Checkpoints(checkpoint_prefixes=parts, destination_prefix=str(tmp_path / "shards"))
    assert all_equal(convert.convert(tmp_path / "shards")[0], convert.convert(prefix)[0])


def test_a_model_survives_saving(tmp_path, prefix):
    model, _ = convert.convert(prefix, legacy=True)
    model.save(tmp_path / "model.keras")
    again = load_model(tmp_path / "model.keras")
    assert again.architecture == model.architecture and again.architecture["legacy"]
    assert all_equal(model, again)
    assert np.array_equal(model.embed(IMAGES), again.embed(IMAGES))


@pytest.mark.parametrize("do_compression", [False, True])
def test_the_backbone_of_a_mat_file(tmp_path, do_compression):
    arrays = gpq_files.backbone_arrays()
    extra = {"note": np.arange(6.0).reshape(2, 3)}
    gpq_files.write_mat(tmp_path / "backbone.mat", {**arrays, **extra}, do_compression)
    model, lines = convert.convert(tmp_path / "backbone", architecture={"n_book": 4, "seed": 3})
    found = named(lines)
    assert lines[0].startswith("n_book = 4 (the setting; the file has no head), n_word = 16, len_code = 12, width")
    assert lines[-1] == "initialised  head (dense layer, Z, C) from seed 3: the file holds none of them"
    assert len(lines) == 43 and set(found) == {*arrays, "note"}
    assert found["note"] == ("ignored", "(2, 3)", "no variable of GPQ's backbone")
    for name, (variable, _) in gpq_names.backbone_targets(model.backbone).items():
        assert np.array_equal(variable, arrays[name])
    for normalization in model.backbone.normalizations:
        assert not np.any(normalization.moving_mean) and np.all(keras.ops.equal(normalization.moving_variance, 1.0))


def test_the_head_that_a_mat_file_lacks_comes_from_the_seed(tmp_path):
    gpq_files.write_mat(tmp_path / "backbone.mat", gpq_files.backbone_arrays())
    models = [mat.convert(tmp_path / "backbone.mat", architecture={"seed": seed})[0] for seed in (1, 1, 2)]
    assert all_equal(models[0], models[1])
    heads = [[keras.ops.convert_to_numpy(weight) for weight in model.head.weights] for model in models]
    assert sum(np.array_equal(a, b) for a, b in zip(heads[0], heads[2], strict=True)) == 1  # the bias, zero
    for first, other in zip(models[0].backbone.weights, models[2].backbone.weights, strict=True):
        assert np.array_equal(first, other)


def test_n_book_of_a_mat_file_can_be_given(tmp_path):
    gpq_files.write_mat(tmp_path / "backbone.mat", gpq_files.backbone_arrays())
    model, lines = convert.convert(tmp_path / "backbone.mat", n_book=5, architecture={"n_book": 4})
    assert model.architecture["n_book"] == 5 and lines[0].startswith("n_book = 5 (as given)")
    with pytest.raises(ValueError, match=r"Invalid n_book. Expected an integer from 1 to 256. Received: n_book=0"):
        convert.convert(tmp_path / "backbone.mat", n_book=0)


# --- the number of books


@pytest.mark.parametrize(
    ("name", "given", "n_book", "why"),
    [  # D = 24, K = 4: two bits a book
        ("20.ckpt", None, 2, "(D / 12 for D = 24; give --n_book if it is another)"),
        ("20.ckpt", 3, 3, "(as given)"),
        ("6bits", None, 3, "(the 6 bits in the file's name)"),
        ("6bits_example.ckpt", None, 3, "(the 6 bits in the file's name)"),
        ("gpq_8-bit_v2.ckpt", None, 4, "(the 8 bits in the file's name)"),
        ("6bits.ckpt", 3, 3, "(as given)"),
        ("6bits.ckpt", 4, 4, "(as given; the file's name says 6 bits)"),
        # not a multiple of 2, 5 books that do not divide 24, none
        (
            "7bits.ckpt",
            None,
            2,
            "(D / 12 for D = 24; the 7 bits in the file's name do not fit 2 bits a book and D = 24;",
        ),
        ("10bits.ckpt", None, 2, "(D / 12 for D = 24; the 10 bits in the file's name do not fit 2 bits a book and D"),
        ("0bits.ckpt", None, 2, "(D / 12 for D = 24; the 0 bits in the file's name do not fit 2 bits a book and D"),
        ("48bits_folder/20.ckpt", None, 2, "(D / 12 for D = 24; give"),
    ],
)
def test_n_book(tmp_path, name, given, n_book, why):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    gpq_files.write_checkpoint(tmp_path / name, gpq_files.checkpoint_arrays())
    model, lines = convert.convert(tmp_path / name, n_book=given)
    assert model.architecture["n_book"] == n_book
    assert lines[0].startswith(f"n_book = {n_book} {why}")


@pytest.mark.parametrize("n_book", [0, -1, 7, 48, 2.0, True, "3"])
def test_an_n_book_that_does_not_fit_is_refused(prefix, n_book):
    message = f"Invalid n_book. Expected a positive integer dividing D=24. Received: n_book={n_book!r}"
    with pytest.raises(ValueError, match=re.escape(message)):
        convert.convert(prefix, n_book=n_book)


def test_n_book_must_be_given_where_nothing_says_it(tmp_path):
    arrays = gpq_files.checkpoint_arrays()
    for name in ("Z", "C", "Fixed_VGG/dense/kernel", "Fixed_VGG/dense/bias"):
        arrays[name] = arrays[name][..., :10]
    gpq_files.write_checkpoint(tmp_path / "7bits.ckpt", arrays)
    message = r"given, since '7bits.ckpt' does not say it and D=10 is no multiple of 12. Received: None; the 7 bits"
    with pytest.raises(ValueError, match=message):
        convert.convert(tmp_path / "7bits.ckpt")
    assert convert.convert(tmp_path / "7bits.ckpt", n_book=5)[0].architecture["len_code"] == 2


# --- wrong files


def without(*names):
    return {name: values for name, values in gpq_files.checkpoint_arrays().items() if name not in names}


def altered(name, function):
    arrays = gpq_files.checkpoint_arrays()
    return {**arrays, name: function(arrays[name])}


def with_nan(values):
    return np.where(values == values.max(), np.nan, values).astype(values.dtype)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        (without("Z"), r"Expected Z \(K, M \* d\), K a power of two. Received: no such array"),
        (without("C"), r"Expected C \(C, M \* d\). Received: no such array"),
        (without("Fixed_VGG/dense/bias"), "Expected the variable Fixed_VGG/dense/bias. Received: no such array"),
        (without("Fixed_VGG/batch2/gamma"), "Expected the variable Fixed_VGG/batch2/gamma. Received: no such array"),
        (without("Fixed_VGG/conv2d_4/kernel"), r"Expected Fixed_VGG/conv2d_4/kernel \(3, 3, 2, 4\)"),
        (
            without("Fixed_VGG/conv2d_9/kernel"),
            r"Expected GPQ's variables, Fixed_VGG/conv2d_9/kernel \(3, 3, 512, 512\)",
        ),
        ({"w": np.ones(3, np.float32)}, "Received: 1 variables, w"),
        (altered("Z", lambda z: z[:3]), "Expected Z of a power of two rows. Received: 3"),
        (altered("Z", lambda z: z[:1]), "Expected Z of a power of two rows. Received: 1"),
        (altered("Z", lambda z: z[0]), r"Expected Z \(K, M \* d\), K a power of two. Received: \(24,\)"),
        (altered("Z", lambda z: z.astype("S9")), r"Expected Z \(K, M \* d\), .* Received: no such array"),
        (altered("Z", lambda z: np.repeat(z, 2**15, axis=0)), r"sizes that a model can have\. Invalid bn_word"),
        (altered("Z", lambda z: z[:, :12]), r"Expected Fixed_VGG/dense/kernel \(12, 12\). Received: \(12, 24\)"),
        (altered("C", lambda c: c[:, :12]), r"Expected C \(5, 24\). Received: \(5, 12\)"),
        (altered("C", lambda c: c[0, 0]), r"Expected C \(C, M \* d\). Received: \(\)"),
        (altered("Fixed_VGG/dense/kernel", lambda k: k[1:]), r"kernel \(12, 24\). Received: \(11, 24\)"),
        (altered("Fixed_VGG/batch1/moving_mean", lambda m: m[:1]), r"moving_mean \(2,\). Received: \(1,\)"),
        (
            altered("Fixed_VGG/conv2d_3/kernel", lambda k: k[..., :1]),
            r"conv2d_3/kernel \(3, 3, 2, 2\), GPQ's network at",
        ),
        (altered("C", with_nan), "Expected finite weights below 1e6 in C. Received: nan"),
        (
            altered("Fixed_VGG/batch0/beta", lambda b: b + np.inf),
            "Expected finite weights below 1e6 in .* Received: inf",
        ),
        (altered("Fixed_VGG/batch0/beta", lambda b: b - 2e6), "Expected finite weights below 1e6 in .* Received: [12]"),
        (altered("C", lambda c: c.astype(np.int32)), "Expected floats in C. Received: int32"),
        (altered("Z", lambda z: z > 0), "Expected floats in Z. Received: bool"),
    ],
)
def test_refuses_checkpoints_of_other_sizes_and_values(tmp_path, arrays, message):
    prefix = tmp_path / "20.ckpt"
    gpq_files.write_checkpoint(prefix, arrays)
    with pytest.raises(ValueError, match=message) as error:
        convert.convert(prefix)
    assert repr(str(prefix)) in str(error.value) and "\n" not in str(error.value)


def write_objects(folder):
    import tensorflow as tf

    tf.train.Checkpoint(w=tf.Variable([1.0])).write(str(folder / "source"))


def write_damaged(suffix, change):
    def write(folder):
        gpq_files.write_checkpoint(folder / "source", gpq_files.checkpoint_arrays())
        path = folder / f"source.{suffix}"
        content = change(path.read_bytes())
        path.unlink()
        if content is not None:
            path.write_bytes(content)

    return write


def write_anothers_index(folder):
    gpq_files.write_checkpoint(folder / "other", gpq_files.checkpoint_arrays(seed=1))
    gpq_files.write_checkpoint(folder / "source", gpq_files.checkpoint_arrays())
    (folder / "other.index").rename(folder / "source.index")


def write_prefix_folder(folder):
    (folder / "source").mkdir()


def write_mat_of(change, compressed=False):
    def write(folder):
        arrays = change(gpq_files.backbone_arrays())
        gpq_files.write_mat(folder / "source.mat", arrays, compressed)

    return write


def flip(place):
    return lambda content: content[:place] + bytes([content[place] ^ 0x40]) + content[place + 1 :]


def write_hdf5(folder):
    (folder / "source.mat").write_bytes(b"MATLAB 7.3 MAT-file, Platform".ljust(512) + b"\x89HDF\r\n\x1a\n")


def write(name, content):
    return lambda folder: (folder / name).write_bytes(content)


PNG = b"\x89PNG\r\n\x1a\n" + bytes(100)
DATA = "data-00000-of-00001"
NO_INDEX = (
    r"Expected the prefix of a TensorFlow 1 checkpoint .* Received: a checkpoint without its index, source\.index"
)
WRONG_SOURCES = {
    "nothing": (lambda folder: None, r"or a \.pth file\. Received: no such file"),
    "folder": (write_prefix_folder, "Received: a folder"),
    "empty": (write("source", b""), "Received: a file of another kind"),
    "text": (write("source", b"some text\n"), "Received: a file of another kind"),
    "PNG": (write("source", PNG), "Received: a file of another kind"),
    "meta alone": (write("source.meta", b"meta"), NO_INDEX),
    "data alone": (write_damaged("index", lambda content: None), NO_INDEX),
    "index alone": (write_damaged(DATA, lambda content: None), "Expected the data file .* Found: no such file"),
    "empty index": (write_damaged("index", lambda content: b""), "Found: another kind of file, or one that is cut off"),
    "PNG as index": (write_damaged("index", lambda content: PNG), "another kind of file, or one that is cut off"),
    "cut index": (write_damaged("index", lambda content: content[:-1]), "another kind of file, or one that is cut off"),
    "flipped index": (write_damaged("index", flip(99)), "Found: a block with another checksum"),
    "empty data": (write_damaged(DATA, lambda content: b""), r"Expected at least [\d,]+ bytes. Found: 0"),
    "cut data": (write_damaged(DATA, lambda content: content[:-1]), r"Expected at least [\d,]+ bytes. Found: "),
    "flipped data": (write_damaged(DATA, flip(99)), "Expected the values of .* that the index has the checksum of"),
    "another's index": (write_anothers_index, "one of the two files is damaged or belongs to another checkpoint"),
    "TensorFlow 2": (write_objects, r"TensorFlow 1's Saver wrote. Received: one of TensorFlow 2's objects"),
    "empty mat": (write("source.mat", b""), "Expected a MATLAB file of version 5"),
    "PNG as mat": (write("source.mat", PNG), "Expected a MATLAB file of version 5"),
    "HDF5 mat": (write_hdf5, r"Expected MATLAB version 5 \(save -v7\). Received: version 7.3"),
    "another's mat": (write_mat_of(lambda arrays: {"x": np.eye(2)}), "Received: 1 variables, x"),
    "mat of nothing": (write_mat_of(lambda arrays: {}), "Received: 0 variables"),
    "mat less one": (
        write_mat_of(lambda arrays: {name: values for name, values in arrays.items() if "batch1-1/beta" not in name}),
        "Expected the variable Fixed_VGG/batch1-1/beta. Received: no such array",
    ),
    "mat with other shape": (
        write_mat_of(lambda arrays: {**arrays, "Fixed_VGG/batch1/beta": np.ones(3)}),
        r"Expected Fixed_VGG/batch1/beta \(2,\). Received: \(3,\)",
    ),
    "mat with NaN": (
        write_mat_of(lambda arrays: {**arrays, "Fixed_VGG/batch1/beta": np.full(2, np.nan)}),
        "Expected finite weights below 1e6 in Fixed_VGG/batch1/beta. Received: nan",
    ),
    "mat of integers": (
        write_mat_of(lambda arrays: {**arrays, "Fixed_VGG/batch1/beta": np.ones(2, np.int16)}),
        "Expected floats in Fixed_VGG/batch1/beta. Received: int16",
    ),
    "mat with an unprintable name": (
        write_mat_of(lambda arrays: {**arrays, "a\x1b[31m": np.ones(2)}),
        r"Expected names that can be printed. Received: 'a\\x1b\[31m:0'",
    ),
}
cases = pytest.mark.parametrize(("make", "message"), WRONG_SOURCES.values(), ids=list(WRONG_SOURCES))


@cases
def test_refuses_wrong_files_in_one_line(tmp_path, capsys, make, message):
    make(tmp_path)
    with pytest.raises(ValueError, match=message) as error:
        convert.convert(tmp_path / "source")
    assert str(tmp_path / "source") in str(error.value) and "\n" not in str(error.value)

    target = tmp_path / "new" / "model.keras"
    target.parent.mkdir()
    capsys.readouterr()
    assert main(["convert", str(tmp_path / "source"), str(target)]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err == f"error: {error.value}\n"
    assert list(target.parent.iterdir()) == []


def test_a_sparse_mat_is_refused(tmp_path):
    import scipy.sparse

    scipy.io.savemat(tmp_path / "source.mat", {"label_Similarity": scipy.sparse.eye(3, format="csc")})
    with pytest.raises(ValueError, match=r"Expected dense arrays. Received: 'label_Similarity' is sparse"):
        convert.convert(tmp_path / "source.mat")


def test_a_flipped_bit_of_a_compressed_mat_is_refused(tmp_path):
    gpq_files.write_mat(tmp_path / "source.mat", gpq_files.backbone_arrays(), do_compression=True)
    whole = (tmp_path / "source.mat").read_bytes()
    for place in range(140, len(whole), 997):
        (tmp_path / "source.mat").write_bytes(flip(place)(whole))
        with pytest.raises(ValueError, match=r"Invalid .*source\.mat"):
            convert.convert(tmp_path / "source.mat")


# --- the command


def run(folder, *arguments):
    """`python -m gpq_tf convert ...` in a process of its own."""
    command = [sys.executable, "-m", "gpq_tf", "convert", *map(str, arguments)]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120)


def test_the_command_writes_a_model_and_a_line_per_variable(tmp_path, prefix):
    done = run(tmp_path, prefix, "made/model.keras", "--n_book=3", "--legacy")
    lines = done.stdout.splitlines()
    assert (done.returncode, done.stderr) == (0, "")
    assert lines[0].startswith("n_book = 3 (as given), n_word = 4, len_code = 8, width_multiplier = 0.015625")
    assert set(named(lines)) == set(gpq_files.checkpoint_arrays())
    assert lines[-1] == "saved made/model.keras" and len(lines) == 87
    model = load_model(tmp_path / "made" / "model.keras")
    assert model.architecture["legacy"] and model.record["converted_from"] == "20.ckpt"
    assert all_equal(model, convert.convert(prefix, n_book=3)[0])


def test_the_command_reports_a_damaged_file_in_one_line(tmp_path):
    write_damaged(DATA, flip(99))(tmp_path)
    before = sorted(tmp_path.iterdir())
    done = run(tmp_path, "source", "model.keras")
    assert done.returncode == 2 and done.stdout == ""
    assert re.fullmatch(r"error: Invalid 'source\.data-00000-of-00001'\. Expected [^\n]+\n", done.stderr)
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["20.ckpt", "model.h5"], "Invalid DST. Expected a name that ends in .keras or .pth. Received: 'model.h5'"),
        (["20.ckpt"], "Invalid arguments. Expected SRC DST. Received: 20.ckpt"),
        (["20.ckpt", "model.keras", "--n_book=7"], "Invalid n_book. Expected a positive integer dividing D=24. "),
    ],
)
def test_the_command_reports_wrong_arguments(prefix, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(prefix.parent)
    before = sorted(prefix.parent.iterdir())
    assert main(["convert", *arguments]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.startswith(f"error: {message}") and printed.err.count("\n") == 1
    assert sorted(prefix.parent.iterdir()) == before


# --- parity with the original's files and numbers

NARROW, FULL = golden.GPQ / "narrow", golden.GPQ / "full" / "48bits_example.ckpt"
checkpoints = pytest.mark.parametrize("name", ["train", "demo"])


@pytest.fixture(scope="module")
def forward():
    return golden.load("narrow/forward.npz")


@golden.needs_golden
@checkpoints
def test_features_codes_and_codebook_are_the_originals(tmp_path, forward, name):
    model, _ = convert.convert(NARROW / f"{name}.ckpt", legacy=True)
    features = model.embed(forward["images"])
    assert golden.worst(features, forward[f"{name}/feature"]) <= FEATURES
    assert (model.encode(forward["images"]) == forward[f"{name}/codes"]).all()
    assert np.array_equal(model.codebook.transpose(1, 0, 2).reshape(16, 144), forward[f"{name}/Z"])

    model.save(tmp_path / "model.keras")
    again = load_model(tmp_path / "model.keras")
    assert np.array_equal(again.embed(forward["images"]), features)
    assert np.array_equal(again.codebook, model.codebook)


@golden.needs_golden
@checkpoints
def test_pooled_features_are_the_originals(forward, name):
    from gpq_tf.backbones import vgg

    model, _ = convert.convert(NARROW / f"{name}.ckpt")
    pooled = model.backbone(vgg.preprocess(forward["images"]))
    assert golden.worst(pooled, forward[f"{name}/pooled"]) <= FEATURES


@golden.needs_golden
@checkpoints
def test_retrieval_is_the_originals(name):
    recorded = golden.load("narrow/pq_retrieval.npz")
    model, _ = convert.convert(NARROW / f"{name}.ckpt", legacy=True)
    index = retrieval.encode_gallery(model, recorded["gallery"])
    queries = model.embed(recorded["query"])
    distances, ids = index.search(queries, k=100)
    by_gallery = np.empty_like(distances)
    np.put_along_axis(by_gallery, ids, distances, axis=1)
    assert golden.worst(by_gallery, recorded[f"{name}/dist"]) <= FEATURES
    assert (recorded[f"{name}/rank_stable"] == ids.T).all()
    for top_n in (100, 20):
        labels = recorded["class_query"], recorded["class_gallery"]
        score = metrics.mean_average_precision(queries, labels[0], index, labels[1], top_n)
        assert score == pytest.approx(float(recorded[f"{name}/mAP_top{top_n}_stable"]), abs=1e-12)


@golden.needs_golden
@pytest.mark.parametrize(
    ("path", "n_variables"), [("narrow/train", 175), ("narrow/demo", 85), ("full/48bits_example", 85)]
)
def test_every_variable_of_the_originals_checkpoints(path, n_variables):
    """Names and values as TensorFlow reads them, the state of the batch normalisations included."""
    import tensorflow as tf

    prefix = str(golden.GPQ / f"{path}.ckpt")
    reader = tf.train.load_checkpoint(prefix)
    model, lines = convert.convert(prefix)
    found = named(lines)
    shapes = reader.get_variable_to_shape_map()
    assert len(found) == n_variables and set(found) == set(shapes)
    assert len(model.weights) == 84
    assert sum(word == "used" for word, _, _ in found.values()) == {175: 84 + 89, 85: 84}[n_variables]
    for name, entry in tensor_bundle.read_index(prefix).items():
        assert np.array_equal(tensor_bundle.read(entry), reader.get_tensor(name))
    for layer, (_, norm) in zip(model.backbone.normalizations, gpq_files.SCOPES, strict=True):
        scope = f"Fixed_VGG/{norm}"
        for name in ("moving_mean", "moving_variance"):
            assert np.array_equal(getattr(layer, name), reader.get_tensor(f"{scope}/{name}"))
        for name in ("biased", "local_step"):
            assert np.array_equal(getattr(layer, name), reader.get_tensor(f"{scope}/{scope}/moving_mean/{name}"))
        assert float(layer.local_step) > 0


@golden.needs_golden
def test_the_full_width_checkpoint_tells_its_sizes():
    model, lines = convert.convert(FULL)
    assert lines[0] == (
        "n_book = 12 (the 48 bits in the file's name), n_word = 16, len_code = 12, width_multiplier = 1"
    )
    assert model.encode(IMAGES).shape == (5, 12)


@golden.needs_golden
def test_the_originals_mat_file():
    arrays = {
        name.removesuffix(":0"): np.squeeze(values)
        for name, values in scipy.io.loadmat(NARROW / "ImageNet_pretrained.mat").items()
        if not name.startswith("__")
    }
    models = []
    for _ in range(2):
        model, lines = convert.convert(NARROW / "ImageNet_pretrained", architecture={"seed": 5})
        models.append(model)
    found = named(lines)
    assert len(lines) == 42 and set(found) == set(arrays)
    assert all(word == "used" for word, _, _ in found.values())
    assert lines[-1] == "initialised  head (dense layer, Z, C) from seed 5: the file holds none of them"
    for name, (variable, _) in gpq_names.backbone_targets(models[0].backbone).items():
        assert np.array_equal(variable, arrays[name])
    assert all_equal(*models)
