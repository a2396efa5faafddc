"""The model as users call it: batches, sizes, codes, legacy, errors, and that it uses its weights as they are."""

import hashlib

import keras
import numpy as np
import pytest
from keras import ops

from gpq_tf import load_model, network
from gpq_tf.backbones import vgg
from gpq_tf.index import PQIndex
from gpq_tf.network import BATCH_SIZE, RetrievalModel, find_model
from gpq_tf.quantizer import decode, hard_assign

from golden import worst

on_tensorflow = pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="TensorFlow only")

# A convolution adds up in another order for other numbers of images, on both backends: the last place differs.
OTHER_BATCH = 1e-6


def tiny(**changes):
    return RetrievalModel(**{"n_book": 3, "len_code": 4, "width_multiplier": 1 / 64, **changes})


def random_images(n, height=8, width=8, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (n, height, width, 3), np.uint8)


def shuffled_weights(model, seed):
    """Other weights for a model, under which its outputs are of ordinary size."""
    rng = np.random.default_rng(seed)
    return [ops.convert_to_numpy(w) + 0.3 * rng.random(w.shape).astype("float32") for w in model.weights]


@pytest.fixture(scope="module")
def model():
    model = tiny()
    model.set_weights(shuffled_weights(model, 1))
    return model


def is_unit(descriptors, n_book=3):
    lengths = np.linalg.norm(descriptors.reshape(len(descriptors), n_book, -1), axis=-1)
    return np.abs(lengths - 1).max() < 1e-5


# --- embed and encode


def test_descriptors_are_float32_with_unit_sub_vectors_and_differ(model):
    descriptors = model.embed(random_images(20))
    assert (descriptors.shape, descriptors.dtype) == ((20, 12), np.float32)
    assert isinstance(descriptors, np.ndarray)
    assert is_unit(descriptors)
    assert len(np.unique(descriptors, axis=0)) == 20


def test_codes_are_the_nearest_codewords_of_the_descriptors(model):
    images = random_images(20)
    codes = model.encode(images)
    np.testing.assert_array_equal(codes, np.asarray(hard_assign(model.embed(images), model.codebook)))
    assert len(np.unique(codes)) > 2


@pytest.mark.parametrize(
    "part",
    [slice(0), slice(1), slice(BATCH_SIZE), slice(BATCH_SIZE + 1), slice(-BATCH_SIZE - 1, None), slice(-3, None)],
    ids=["none", "one", "a batch", "a batch and one", "a batch and one, from the end", "the last three"],
)
def test_what_else_is_embedded_plays_no_part(model, part):
    images = random_images(2 * BATCH_SIZE + 3)
    all_descriptors, all_codes = model.embed(images), model.encode(images)
    descriptors, codes = model.embed(images[part]), model.encode(images[part])
    assert (descriptors.shape, codes.dtype) == (all_descriptors[part].shape, np.uint8)
    np.testing.assert_allclose(descriptors, all_descriptors[part], rtol=0, atol=OTHER_BATCH)
    np.testing.assert_array_equal(codes, all_codes[part])


def test_equal_batches_give_equal_bits(model):
    images = random_images(2 * BATCH_SIZE)
    descriptors = model.embed(images)
    swapped = model.embed(np.concatenate([images[BATCH_SIZE:], images[:BATCH_SIZE]]))
    np.testing.assert_array_equal(swapped[:BATCH_SIZE], descriptors[BATCH_SIZE:])
    np.testing.assert_array_equal(swapped[BATCH_SIZE:], descriptors[:BATCH_SIZE])


@pytest.mark.parametrize("size", [(8, 8), (9, 31), (40, 8)])
def test_images_of_any_size_from_eight_pixels(model, size):
    images = random_images(3, *size)
    assert is_unit(model.embed(images))
    assert model.encode(images).shape == (3, 3)


def test_images_need_not_lie_in_one_piece_of_memory(model):
    images = random_images(12)
    np.testing.assert_array_equal(model.embed(images[::-2, :, ::-1]), model.embed(images[::-2, :, ::-1].copy()))


@pytest.mark.parametrize("method", ["embed", "encode"])
def test_progress_wraps_the_batches(model, method):
    seen = []

    def progress(batches):
        seen.append(len(batches))
        return batches

    images = random_images(BATCH_SIZE + 1)
    np.testing.assert_array_equal(getattr(model, method)(images, progress), getattr(model, method)(images))
    assert seen == [2]


@pytest.mark.parametrize("method", ["embed", "encode"])
@pytest.mark.parametrize(
    ("images", "received"),
    [
        (np.zeros((2, 8, 8, 3), "float32"), "float32 (2, 8, 8, 3)"),
        (np.zeros((2, 8, 8, 3), "int64"), "int64 (2, 8, 8, 3)"),
        (np.zeros((2, 8, 8, 1), "uint8"), "uint8 (2, 8, 8, 1)"),
        (np.zeros((2, 3, 8, 8), "uint8"), "uint8 (2, 3, 8, 8)"),
        (np.zeros((8, 8, 3), "uint8"), "uint8 (8, 8, 3)"),
        (np.zeros((2, 7, 8, 3), "uint8"), "uint8 (2, 7, 8, 3)"),
        (np.zeros((2, 8, 7, 3), "uint8"), "uint8 (2, 8, 7, 3)"),
        ([np.zeros((8, 8, 3), "uint8")], "list"),
        (None, "NoneType"),
    ],
)
def test_other_images_are_refused(model, method, images, received):
    with pytest.raises(ValueError) as caught:
        getattr(model, method)(images)
    expected = "Invalid images. Expected uint8 (N, H, W, 3) with H and W at least 8. Received: "
    assert str(caught.value) == expected + received


@pytest.mark.parametrize(("bn_word", "dtype"), [(1, "uint8"), (8, "uint8"), (9, "uint16")])
def test_codes_take_the_smallest_type(bn_word, dtype):
    model = tiny(bn_word=bn_word)
    codes = model.encode(random_images(4))
    assert codes.dtype == dtype
    assert codes.max() < 2**bn_word
    assert model.codebook.shape == (3, 2**bn_word, 4)


def test_encoding_of_a_codeword_finds_it_also_at_the_end_of_a_large_book():
    model = tiny(bn_word=9)
    codes = np.array([[511, 256, 255]])
    descriptors = np.asarray(decode(codes, model.codebook))
    np.testing.assert_array_equal(np.asarray(model.head.encode(descriptors)), codes)


# --- legacy, names, sizes


def test_legacy_searches_with_raw_descriptors_and_codewords(model):
    legacy = tiny(legacy=True)
    legacy.set_weights(model.get_weights())
    images = random_images(5)
    raw, unit = legacy.embed(images), model.embed(images)
    assert not is_unit(raw)
    lengths = np.linalg.norm(raw.reshape(5, 3, 4), axis=-1, keepdims=True)
    assert worst(raw.reshape(5, 3, 4) / lengths, unit.reshape(5, 3, 4)) < 1e-6
    np.testing.assert_array_equal(legacy.codebook, ops.convert_to_numpy(model.head.quantizer.codebook))
    assert is_unit(model.codebook.reshape(48, 4), n_book=1)
    assert not is_unit(legacy.codebook.reshape(48, 4), n_book=1)
    np.testing.assert_array_equal(legacy.encode(images), model.encode(images))


def test_the_head_is_named(model):
    assert model.head_name == "gpq"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_book": 0}, "Invalid n_book. Expected an integer from 1 to 256. Received: n_book=0"),
        ({"n_book": 3.0}, "Invalid n_book. Expected an integer from 1 to 256. Received: n_book=3.0"),
        ({"n_book": True}, "Invalid n_book. Expected an integer from 1 to 256. Received: n_book=True"),
        ({"bn_word": 17}, "Invalid bn_word. Expected an integer from 1 to 16. Received: bn_word=17"),
        ({"len_code": "4"}, "Invalid len_code. Expected an integer from 1 to 4096. Received: len_code='4'"),
        ({"seed": -1}, "Invalid seed. Expected an integer from 0 to 4294967295. Received: seed=-1"),
        ({"n_classes": None}, "Invalid n_classes. Expected an integer from 1 to 100000. Received: n_classes=None"),
        (
            {"width_multiplier": float("nan")},
            "Invalid width_multiplier. Expected a number above 0, at most 8. Received: width_multiplier=nan",
        ),
        (
            {"width_multiplier": 0},
            "Invalid width_multiplier. Expected a number above 0, at most 8. Received: width_multiplier=0",
        ),
        ({"legacy": 1}, "Invalid legacy. Expected True or False. Received: legacy=1"),
        ({"head": "vgg"}, "Invalid head. Expected one of gpq, spq, cgd. Received: head='vgg'"),
    ],
)
def test_sizes_out_of_range_are_refused(changes, message):
    with pytest.raises(ValueError) as caught:
        tiny(**changes)
    assert str(caught.value) == message


def test_the_seed_decides_the_initial_values():
    first, again, other = (tiny(seed=seed).get_weights() for seed in (1, 1, 2))
    for a, b in zip(first, again, strict=True):
        np.testing.assert_array_equal(a, b)
    assert sum((a != b).any() for a, b in zip(first, other, strict=True)) == 10 + 3  # kernels, codebook, prototypes


# --- SPQ


@pytest.fixture(scope="module")
def spq():
    model = RetrievalModel("spq", n_book=3, len_code=4, width_multiplier=1 / 64, seed=1)
    model.set_weights(shuffled_weights(model, 1))
    return model


def test_spq_searches_with_descriptors_and_codewords_as_they_are(spq):
    images, gallery = random_images(6), random_images(40, seed=1)
    queries, codes = spq.embed(images), spq.encode(gallery)
    raw = spq.describe(spq.preprocess(images))
    assert (queries.dtype, codes.dtype, spq.head_name, spq.search_metric) == (np.float32, np.uint8, "spq", "l2")
    assert worst(queries, ops.convert_to_numpy(raw)) < OTHER_BATCH
    np.testing.assert_array_equal(spq.codebook, ops.convert_to_numpy(spq.head.quantizer.codebook))
    np.testing.assert_array_equal(codes, np.asarray(hard_assign(spq.embed(gallery), spq.codebook, "l2")))

    index = PQIndex(spq.codebook, spq.search_metric)
    index.add(codes)
    distances, ids = index.search(queries, 40)
    for row, query in enumerate(queries.astype("float64").reshape(6, 3, 4)):
        expected = [np.linalg.norm(query - spq.codebook[np.arange(3), code], axis=-1).sum() for code in codes]
        assert worst(distances[row], np.sort(expected)) < 3e-6
        assert worst(np.take(expected, ids[row]), np.sort(expected)) < 3e-6


def test_spq_is_deterministic(spq):
    """The same seed, weights and images: the same bits, in another model too."""
    first, second, other = (
        RetrievalModel("spq", n_book=3, len_code=4, width_multiplier=1 / 64, seed=seed) for seed in (4, 4, 5)
    )
    for ours, theirs in zip(first.get_weights(), second.get_weights(), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    # kernels, the bias of either dense layer, the codebook
    changed = [(a != b).any() for a, b in zip(first.get_weights(), other.get_weights(), strict=True)]
    assert sum(changed) == 20 + 2 + 2 + 1
    second.set_weights(spq.get_weights())
    images = random_images(30)
    np.testing.assert_array_equal(spq.embed(images), spq.embed(images))
    np.testing.assert_array_equal(second.embed(images), spq.embed(images))
    np.testing.assert_array_equal(second.encode(images), spq.encode(images))


@pytest.mark.parametrize("size", [(1, 1), (7, 2), (9, 31)])
def test_spq_takes_images_of_any_size(spq, size):
    images = random_images(3, *size)
    assert np.isfinite(spq.embed(images)).all()
    assert spq.encode(images).shape == (3, 3)


def test_spq_refuses_no_pixels_and_classes(spq):
    with pytest.raises(ValueError) as caught:
        spq.embed(np.zeros((2, 0, 8, 3), "uint8"))
    assert str(caught.value) == (
        "Invalid images. Expected uint8 (N, H, W, 3) with H and W at least 1. Received: uint8 (2, 0, 8, 3)"
    )
    with pytest.raises(ValueError) as caught:
        RetrievalModel("spq", n_classes=10)
    assert str(caught.value) == (
        "Invalid argument. Expected one of n_book, bn_word, len_code, width_multiplier, legacy, seed for spq. "
        "Received: n_classes"
    )


@on_tensorflow  # JAX's seeds end at 2^32 - 1, and layers add their number to it
def test_spq_takes_the_largest_seed():
    assert RetrievalModel("spq", n_book=1, len_code=1, width_multiplier=1 / 64, seed=2**32 - 1).codebook.any()


# --- weights that change


def test_weights_set_after_the_first_call_are_used():
    model, images = tiny(), random_images(5)
    results = []
    for seed in (1, 2):
        model.set_weights(shuffled_weights(model, seed))
        fresh = tiny()
        fresh.set_weights(model.get_weights())
        results.append(model.embed(images))
        np.testing.assert_array_equal(results[-1], fresh.embed(images))
        np.testing.assert_array_equal(model.encode(images), fresh.encode(images))
        np.testing.assert_array_equal(model.codebook, fresh.codebook)
    assert np.abs(results[0] - results[1]).max() > 0.01


@pytest.mark.filterwarnings("ignore:Gradients do not exist")  # of what this loss does not use
def test_weights_trained_after_the_first_call_are_used():
    from gpq_tf.train_step import make_step

    model, images = tiny(), random_images(6)
    before = model.embed(images), model.head_name, ops.convert_to_numpy(model.head.projection.kernel)

    def losses_of(batch):
        descriptors = model.describe(vgg.preprocess(batch["images"]), training=True)
        return {"loss": ops.mean(ops.square(descriptors - 0.5))}

    step = make_step(model, losses_of, keras.optimizers.SGD(0.5))
    losses = [float(step({"images": images})["loss"]) for _ in range(5)]
    assert losses[-1] < losses[0]
    assert (ops.convert_to_numpy(model.head.projection.kernel) != before[2]).any()
    fresh = tiny()
    fresh.set_weights(model.get_weights())
    np.testing.assert_array_equal(model.embed(images), fresh.embed(images))
    assert np.abs(model.embed(images) - before[0]).max() > 1e-3


@on_tensorflow
@pytest.mark.parametrize("precision", ["float32", "mixed_bfloat16"])
def test_a_frozen_model_keeps_its_weights(precision):
    model = RetrievalModel(n_book=2, len_code=3, width_multiplier=1 / 64, dtype=precision)
    images = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3), "uint8")
    embeddings, codes = model.embed(images), model.encode(images)
    model.freeze()
    # Constants may be multiplied in another order.
    tolerance = 1e-6 if precision == "float32" else 0.02
    assert worst(model.embed(images), embeddings) < tolerance
    assert model.encode(images).dtype == codes.dtype
    for weight in model.weights:
        weight.assign(ops.ones_like(weight))
    assert worst(model.embed(images), embeddings) < tolerance
    assert worst(model(images), embeddings) > 0.1  # itself it has other weights now


def test_calling_the_model_gives_what_embed_gives(model):
    images = random_images(5)
    assert worst(model(images), model.embed(images)) < OTHER_BATCH


# --- loading


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("saved") / "model.keras"
    model.record = {"epoch": 3}
    model.save(path)
    return path


def test_a_saved_model_gives_the_same_bits(model, saved):
    loaded, images = load_model(saved), random_images(7)
    np.testing.assert_array_equal(loaded.embed(images), model.embed(images))
    np.testing.assert_array_equal(loaded.encode(images), model.encode(images))
    assert loaded.architecture == model.architecture
    assert loaded.record == {"epoch": 3}


def test_keras_itself_can_load_it(model, saved):
    loaded, images = keras.saving.load_model(saved), random_images(7)
    assert type(loaded) is RetrievalModel
    np.testing.assert_array_equal(loaded.embed(images), model.embed(images))


@pytest.mark.parametrize("stored", [True, False])
def test_legacy_is_what_the_file_says_unless_asked(tmp_path, model, stored):
    own = tiny(legacy=stored)
    own.set_weights(model.get_weights())
    own.save(tmp_path / "own.keras")
    for asked, expected in ((None, stored), (True, True), (False, False)):
        loaded = load_model(tmp_path / "own.keras", legacy=asked)
        assert loaded.architecture["legacy"] is expected
        assert is_unit(loaded.embed(random_images(3))) is not expected


@pytest.mark.parametrize("precision", ["mixed_bfloat16", "mixed_float16"])
def test_precision_changes_the_arithmetic_of_the_network_alone(model, saved, precision):
    mixed, images = load_model(saved, precision=precision), random_images(7)
    assert mixed.backbone.compute_dtype == precision.removeprefix("mixed_")
    for ours, theirs in zip(mixed.get_weights(), model.get_weights(), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    found, expected = mixed.embed(images), model.embed(images)
    assert found.dtype == np.float32
    assert is_unit(found)
    assert 0 < np.abs(found - expected).max() < 0.1


@pytest.mark.parametrize("precision", ["float16", "bf16", None])
def test_another_precision_is_refused(saved, precision):
    with pytest.raises(ValueError, match=r"Invalid precision\. Expected one of float32, mixed_bf"):
        load_model(saved, precision=precision)


def test_channels_first_is_refused(monkeypatch):
    monkeypatch.setattr(keras.config, "image_data_format", lambda: "channels_first")
    with pytest.raises(ValueError, match=r"Invalid image_data_format\. Expected channels_last"):
        RetrievalModel()


def test_a_shipped_model_is_found_by_its_name(tmp_path, saved, monkeypatch):
    monkeypatch.setattr(network, "__file__", str(tmp_path / "network.py"))
    (tmp_path / "weights").mkdir()
    for name in ("b-48bits", "a-24bits"):
        (tmp_path / "weights" / f"{name}.keras").write_bytes(saved.read_bytes())
    checksum = hashlib.sha256(saved.read_bytes()).hexdigest()
    sums = tmp_path / "weights" / "SHA256SUMS"
    sums.write_text(f"{checksum}  a-24bits.keras\n{'0' * 64}  b-48bits.keras\n")
    assert find_model("a-24bits") == tmp_path / "weights" / "a-24bits.keras"
    assert load_model("a-24bits").codebook.shape == (3, 16, 4)
    sums.write_text(f"\n{checksum.upper()} *a-24bits.keras\n{'0' * 64}  b-48bits.keras\n")  # as sha256sum --binary
    assert find_model("a-24bits") == tmp_path / "weights" / "a-24bits.keras"
    with pytest.raises(ValueError, match=r"b-48bits\.keras\. Expected sha256 0{64}\. Received: .* install it"):
        load_model("b-48bits")
    for damage in (lambda: sums.write_text("garbage\n"), lambda: sums.write_bytes(b"\xff\n"), sums.unlink):
        damage()
        with pytest.raises(ValueError, match=r"^Invalid list of checksums .*SHA256SUMS\. Expected .* install it again"):
            load_model("a-24bits")
    assert find_model(str(saved)) == saved
    (tmp_path / "other.ckpt").write_bytes(b"")
    expected = "Invalid model. Expected a .keras file or one of a-24bits, b-48bits. Received: "
    for name, received in (
        ("c-12bits", "'c-12bits', which does not exist"),
        (tmp_path / "no.keras", f"'{tmp_path}/no.keras', which does not exist"),
        (tmp_path / "other.ckpt", f"'{tmp_path}/other.ckpt', which is not a .keras file"),
        (tmp_path, f"'{tmp_path}', which is not a .keras file"),
    ):
        with pytest.raises(ValueError) as caught:
            load_model(name)
        assert str(caught.value) == f"{expected}{received}; `gpq-tf convert` makes one of the original's files"


def test_every_shipped_model_loads():
    from pathlib import Path

    names = [file.stem for file in Path(network.__file__).with_name("weights").glob("*.keras")]
    for name in names:
        model = load_model(name)
        descriptors = model.embed(random_images(2, 32, 32))
        assert np.isfinite(descriptors).all() and np.abs(descriptors).max() > 0
        if model.head_name == "gpq":
            assert is_unit(descriptors, model.architecture["n_book"])
        assert model.record
    assert names
