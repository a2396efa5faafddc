"""Soft and hard assignment and decoding against plain float64 loops, ties, and that XLA compiles them."""

import keras
import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from keras import ops

from gpq_tf import quantizer
from gpq_tf.convert.gpq_names import books_of
from gpq_tf.heads.gpq import GPQHead
from gpq_tf.ops import compiled
from gpq_tf.quantizer import ProductQuantizer, decode, hard_assign, soft_assign, soft_assign_l2

import golden
from golden import worst
from gradients import numerical_gradients, random_cases, value_and_gradients

SIZES = st.integers(1, 5)
WORDS = st.integers(2, 9)
SEEDS = st.integers(0, 2**32 - 1)
needs_tensorflow = pytest.mark.skipif(
    keras.backend.backend() != "tensorflow", reason="asks tf.function what it compiled; jax.jit is always XLA"
)


def normals(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype("float32")


def unit_words(seed, n_book, n_word, d):
    words = normals(seed, n_book, n_word, d)
    return words / np.linalg.norm(words, axis=-1, keepdims=True)


def plain_soft_assign(x, codebook, alpha):
    n_book, n_word, d = codebook.shape
    out = np.zeros_like(x)
    for b in range(len(x)):
        for j in range(n_book):
            part = slice(j * d, (j + 1) * d)
            scores = np.array([alpha * np.dot(x[b, part], codebook[j, k]) for k in range(n_word)])
            weights = np.exp(scores - scores.max())
            z = sum(w * word for w, word in zip(weights / weights.sum(), codebook[j], strict=True))
            out[b, part] = z / np.sqrt(max(np.dot(z, z), 1e-12))
    return out


def plain_soft_assign_l2(x, codebook, alpha):
    n_book, n_word, d = codebook.shape
    out = np.zeros_like(x)
    for b in range(len(x)):
        for j in range(n_book):
            part = slice(j * d, (j + 1) * d)
            scores = np.array([-alpha * np.sum((x[b, part] - codebook[j, k]) ** 2) for k in range(n_word)])
            weights = np.exp(scores - scores.max())
            out[b, part] = sum(w * word for w, word in zip(weights / weights.sum(), codebook[j], strict=True))
    return out


def plain_scores(x, codebook, metric):
    """(B, M, K) float64: cosine times ||x||, or minus half the squared distance plus half of ||x||^2."""
    n_book, n_word, d = codebook.shape
    out = np.zeros((len(x), n_book, n_word))
    for b, j, k in np.ndindex(out.shape):
        sub_vector, word = x[b, j * d : (j + 1) * d].astype("float64"), codebook[j, k].astype("float64")
        if metric == "cosine":
            out[b, j, k] = np.dot(sub_vector, word) / np.sqrt(max(np.dot(word, word), 1e-12))
        else:
            out[b, j, k] = (np.dot(sub_vector, sub_vector) - np.sum((sub_vector - word) ** 2)) / 2
    return out


# --- soft assignment


@random_cases
@given(SIZES, SIZES, WORDS, SIZES, st.floats(0.1, 40))
def test_soft_assignment_is_the_loop(n, n_book, n_word, d, alpha):
    x, codebook = normals(0, n, n_book * d), normals(1, n_book, n_word, d)
    expected = plain_soft_assign(x.astype("float64"), codebook.astype("float64"), alpha)
    # softmax turns an error of alpha * |score| * 6e-8 in the exponent into a relative one
    assert worst(soft_assign(x, codebook, alpha), expected) < 1e-4


def test_gradients_of_soft_assignment():
    inputs, cotangent = [normals(2, 2, 6), normals(3, 2, 4, 3)], normals(4, 2, 6)
    _, found = value_and_gradients(lambda x, c: soft_assign(x, c, 3.0), inputs, cotangent)
    expected = numerical_gradients(lambda x, c: plain_soft_assign(x, c, 3.0), inputs, cotangent)
    for ours, theirs in zip(found, expected, strict=True):
        assert worst(ours, theirs) < 1e-5


def test_soft_assignment_becomes_hard_as_alpha_grows():
    x, codebook = normals(5, 20, 12), unit_words(6, 3, 8, 4)
    hard = np.asarray(decode(hard_assign(x, codebook), codebook))
    distances = [np.abs(np.asarray(soft_assign(x, codebook, alpha)) - hard).max() for alpha in (1, 100, 1e6)]
    assert distances[0] > distances[1] > distances[2]
    assert distances[2] < 1e-6


def test_soft_assignment_becomes_the_mean_codeword_as_alpha_vanishes():
    x, codebook = normals(7, 3, 12), normals(8, 3, 8, 4)
    mean = codebook.mean(axis=1)
    expected = (mean / np.linalg.norm(mean, axis=-1, keepdims=True)).reshape(1, 12).repeat(3, axis=0)
    assert worst(soft_assign(x, codebook, 1e-9), expected) < 1e-5


def test_the_order_of_codewords_plays_no_part_and_books_are_independent():
    x, codebook = normals(9, 4, 12), normals(10, 3, 8, 4)
    found = np.asarray(soft_assign(x, codebook, 20.0))
    assert worst(soft_assign(x, codebook[:, ::-1], 20.0), found) < 1e-5
    other = codebook.copy()
    other[1] = normals(11, 8, 4)
    changed = np.abs(np.asarray(soft_assign(x, other, 20.0)) - found).reshape(4, 3, 4).max(axis=(0, 2))
    assert changed[1] > 0.1
    assert max(changed[0], changed[2]) < 1e-6


def test_soft_assignment_of_huge_and_of_zero_descriptors_is_finite_and_unit():
    codebook = unit_words(12, 3, 8, 4)
    for x in (np.zeros((2, 12), "float32"), 1e4 * normals(13, 2, 12)):
        lengths = np.linalg.norm(np.asarray(soft_assign(x, codebook, 20.0)).reshape(2, 3, 4), axis=-1)
        np.testing.assert_allclose(lengths, 1, atol=1e-6)


# --- soft assignment by distance


@random_cases
@given(SIZES, SIZES, WORDS, SIZES, st.floats(0.1, 40))
def test_soft_assignment_by_distance_is_the_loop(n, n_book, n_word, d, alpha):
    x, codebook = normals(21, n, n_book * d), normals(22, n_book, n_word, d)
    expected = plain_soft_assign_l2(x.astype("float64"), codebook.astype("float64"), alpha)
    # softmax turns an error of alpha * |score| * 6e-8 in the exponent into a relative one
    assert worst(soft_assign_l2(x, codebook, alpha), expected) < 1e-4


def test_gradients_of_soft_assignment_by_distance():
    inputs, cotangent = [normals(23, 2, 6), normals(24, 2, 4, 3)], normals(25, 2, 6)
    _, found = value_and_gradients(lambda x, c: soft_assign_l2(x, c, 3.0), inputs, cotangent)
    expected = numerical_gradients(lambda x, c: plain_soft_assign_l2(x, c, 3.0), inputs, cotangent)
    for ours, theirs in zip(found, expected, strict=True):
        assert worst(ours, theirs) < 1e-5


def test_soft_assignment_by_distance_becomes_hard_as_alpha_grows():
    """The nearest codeword, of whatever length: those of other directions and other lengths are in the book."""
    x, codebook = normals(26, 20, 12), 2 * normals(27, 3, 8, 4)
    hard = np.asarray(decode(hard_assign(x, codebook, "l2"), codebook))
    distances = [np.abs(np.asarray(soft_assign_l2(x, codebook, alpha)) - hard).max() for alpha in (1, 30, 1e6)]
    assert distances[0] > distances[1] > distances[2]
    assert distances[2] < 1e-6  # a processor may divide by multiplying, and make a weight of 1 smaller by 6e-8
    assert (np.asarray(decode(hard_assign(x, codebook), codebook)) != hard).any()


def test_soft_assignment_by_distance_becomes_the_mean_codeword_as_alpha_vanishes():
    x, codebook = normals(28, 3, 12), normals(29, 3, 8, 4)
    expected = codebook.mean(axis=1).reshape(1, 12).repeat(3, axis=0)
    assert worst(soft_assign_l2(x, codebook, 1e-9), expected) < 1e-6


def test_distance_moves_with_both_and_lies_within_the_book():
    """x + v among codewords + v gives z + v; far away, the nearest codeword alone."""
    x, codebook, v = normals(30, 4, 12), normals(31, 3, 8, 4), normals(32, 3, 1, 4)
    found = np.asarray(soft_assign_l2(x, codebook, 5.0))
    moved = soft_assign_l2(x + v.reshape(12), codebook + v, 5.0)
    assert worst(moved, found + v.reshape(12)) < 1e-5
    far = np.asarray(soft_assign_l2(1e4 * x, codebook, 5.0))
    assert worst(far, decode(hard_assign(1e4 * x, codebook, "l2"), codebook)) < 2e-7


# --- hard assignment


@random_cases
@given(SIZES, SIZES, WORDS, SIZES, st.sampled_from(["cosine", "l2"]), SEEDS)
def test_hard_assignment_is_the_loop(n, n_book, n_word, d, metric, seed):
    x, codebook = normals(seed, n, n_book * d), normals([seed, 1], n_book, n_word, d)
    codes = np.asarray(hard_assign(x, codebook, metric))
    assert codes.shape == (n, n_book)
    assert keras.backend.standardize_dtype(codes.dtype) == "int32"
    scores = plain_scores(x, codebook, metric)
    chosen = np.take_along_axis(scores, codes[..., None], axis=-1)[..., 0]
    np.testing.assert_allclose(chosen, scores.max(axis=-1), rtol=0, atol=1e-4)
    ranked = np.sort(scores, axis=-1)
    clear = ranked[..., -1] - ranked[..., -2] > 1e-4
    np.testing.assert_array_equal(codes[clear], scores.argmax(axis=-1)[clear])


@pytest.mark.parametrize("metric", ["cosine", "l2"])
@pytest.mark.parametrize("jit", [True, pytest.param(False, marks=needs_tensorflow)])
def test_of_equal_codewords_the_first_wins(metric, jit):
    """Also where a matrix product and a square root treat the last columns differently from the others."""
    assign = compiled(lambda x, codebook: hard_assign(x, codebook, metric)) if jit else hard_assign
    options = {} if jit else {"metric": metric}
    sizes = [(31, 5, 250), (33, 7, 250), (100, 5, 250), (17, 7, 3), (5, 1, 3), (64, 257, 9)]
    for n_word, d, n in sizes:
        half = normals([n_word, d], 3, (n_word + 1) // 2, d)
        codebook = np.concatenate([half, half], axis=1)[:, :n_word]
        x = normals(14, n, 3 * d)
        codes = np.asarray(assign(x, codebook, **options))
        assert codes.max() < half.shape[1], (n_word, d, n)
        expected = plain_scores(x[:5], half, metric).argmax(axis=-1)
        np.testing.assert_array_equal(codes[:5], expected)


def test_ties_between_different_codewords_go_to_the_lowest_index():
    codebook = np.array([[[-1, 0], [0, 1], [1, 0], [0, 1], [1, 0]]], "float32")
    x = np.array([[1, 1], [-1, 1], [0, 0], [1, -1]], "float32")
    for metric in ("cosine", "l2"):
        assert np.asarray(hard_assign(x, codebook, metric))[:, 0].tolist() == [1, 0, 0, 2]


def test_the_scale_decides_for_l2_only():
    codebook = np.array([[[10, 0], [0.7, 0.7]]], "float32")
    x = np.array([[1, 0.1]], "float32")
    for scale in (1e-6, 1.0, 1e6):
        assert int(hard_assign(np.float32(scale) * x, codebook)[0, 0]) == 0
    assert int(hard_assign(x, codebook, "l2")[0, 0]) == 1
    assert int(hard_assign(10 * x, codebook, "l2")[0, 0]) == 0


def test_one_huge_codeword_hides_no_difference_between_the_others():
    codebook = np.array([[[1e5, 0], [0, 1], [0, 1.01], [0, 1.02]]], "float32")
    x = np.array([[0, 1.021]], "float32")
    assert int(hard_assign(x, codebook, "l2")[0, 0]) == 3


def test_descriptors_that_are_not_finite_get_codes_within_the_book():
    x = np.array([[np.nan, 1.0], [np.inf, 0.0], [-np.inf, np.inf]], "float32")
    for metric in ("cosine", "l2"):
        codes = np.asarray(hard_assign(x, normals(15, 1, 4, 2), metric))
        assert codes.min() >= 0
        assert codes.max() <= 3


@golden.needs_golden
@pytest.mark.parametrize("name", ["b12_k16_d12", "b8_k64_d8"])
def test_codes_are_those_of_the_original(name):
    recorded = golden.load("retrieval.npz")
    codebook = books_of(recorded[f"{name}/Z"], recorded[f"{name}/codes"].shape[1])
    gallery = recorded[f"{name}/gallery"]
    np.testing.assert_array_equal(np.asarray(hard_assign(gallery, codebook)), recorded[f"{name}/codes"])
    codebook[:, -1] = codebook[:, 0]
    np.testing.assert_array_equal(np.asarray(hard_assign(gallery, codebook)), recorded[f"{name}/codes_Zdup"])


# --- decoding


@random_cases
@given(SIZES, SIZES, WORDS, SIZES, st.sampled_from(["uint8", "uint16", "int32", "int64"]))
def test_decoding_is_the_loop(n, n_book, n_word, d, dtype):
    codebook = normals(16, n_book, n_word, d)
    codes = np.random.default_rng(17).integers(0, n_word, (n, n_book)).astype(dtype)
    expected = np.array([np.concatenate([codebook[j, codes[b, j]] for j in range(n_book)]) for b in range(n)])
    np.testing.assert_array_equal(np.asarray(decode(codes, codebook)), expected)


def test_decoding_counts_beyond_the_codes_own_type():
    """4 books of 256 words have 1,024 rows, more than uint8 codes can count."""
    codebook = normals(18, 4, 256, 2)
    codes = np.full((1, 4), 255, "uint8")
    np.testing.assert_array_equal(np.asarray(decode(codes, codebook)), codebook[:, 255].reshape(1, 8))


@random_cases
@given(SIZES, SIZES, st.integers(2, 70), st.integers(2, 7), st.sampled_from(["cosine", "l2"]), SEEDS)
def test_codes_survive_decoding_and_encoding(n, n_book, n_word, d, metric, seed):
    codebook = unit_words(seed, n_book, n_word, d)
    cosines = np.einsum("mid,mjd->mij", codebook, codebook)[:, ~np.eye(n_word, dtype=bool)]
    assume(cosines.max() < 1 - 1e-4)  # words that float32 tells apart
    codes = np.random.default_rng(seed).integers(0, n_word, (n, n_book))
    again = np.asarray(hard_assign(decode(codes, codebook), codebook, metric))
    np.testing.assert_array_equal(again, codes)


# --- errors


def test_what_does_not_fit_is_refused():
    x, codebook = np.zeros((5, 12), "float32"), np.zeros((3, 16, 5), "float32")
    sizes = "Invalid x. Expected (B, 15) for a codebook of 3 books with codewords of length 5. Received: shape (5, 12)"
    cases = [
        (lambda: soft_assign(x, codebook, 20.0), sizes),
        (lambda: soft_assign_l2(x, codebook, 5.0), sizes),
        (lambda: hard_assign(x, codebook), sizes),
        (
            lambda: hard_assign(x, np.zeros((3, 16, 4), "float32"), "dot"),
            'Invalid metric. Expected "cosine" or "l2". Received: metric=\'dot\'',
        ),
        (
            lambda: decode(np.zeros((5, 4), "uint8"), codebook),
            "Invalid codes. Expected (B, 3), one column per book. Received: shape (5, 4)",
        ),
        (
            lambda: ProductQuantizer(3, 16, 4, metric="squared_l2"),
            'Invalid metric. Expected "cosine" or "l2". Received: metric=\'squared_l2\'',
        ),
        (
            lambda: ProductQuantizer(3, 0, 4),
            "Invalid n_word. Expected a positive integer. Received: n_word=0",
        ),
        (
            lambda: ProductQuantizer(2.0, 16, 4),
            "Invalid n_book. Expected a positive integer. Received: n_book=2.0",
        ),
    ]
    for call, message in cases:
        with pytest.raises(ValueError) as caught:
            call()
        assert str(caught.value) == message


# --- the layer


@pytest.fixture(scope="module")
def layer():
    return ProductQuantizer(n_book=12, n_word=16, len_code=12, seed=3)


def test_the_layer_gives_what_the_functions_give(layer):
    x, codebook = unit_words(19, 50, 12, 12).reshape(50, 144), ops.convert_to_numpy(layer.codebook)
    codes = np.asarray(layer.encode(x))
    np.testing.assert_array_equal(codes, np.asarray(hard_assign(x, codebook)))
    np.testing.assert_array_equal(np.asarray(layer.decode(codes)), np.asarray(decode(codes, codebook)))
    # the compiled exponential differs from the plain one in the last place
    assert worst(layer(x, alpha=20.0), np.asarray(soft_assign(x, codebook, 20.0))) < 1e-6


def test_the_layer_by_distance_gives_what_the_functions_give():
    layer = ProductQuantizer(n_book=3, n_word=8, len_code=4, seed=3, metric="l2")
    x, codebook = normals(33, 50, 12), normals(34, 3, 8, 4)
    layer.codebook.assign(codebook)
    codes = np.asarray(layer.encode(x))
    np.testing.assert_array_equal(codes, np.asarray(hard_assign(x, codebook, "l2")))
    assert (codes != np.asarray(hard_assign(x, codebook))).any()
    assert worst(layer(x, alpha=5.0), np.asarray(soft_assign_l2(x, codebook, 5.0))) < 1e-6
    again = ProductQuantizer.from_config(layer.get_config())
    assert again.metric == "l2"
    assert ProductQuantizer(3, 8, 4).metric == "cosine"


@needs_tensorflow
def test_xla_compiles_assignment_and_decoding(layer):
    x, codes = ops.ones((5, 144)), ops.zeros((5, 12), "int32")
    codebook = layer.codebook.value
    calls = {
        "_hard_assign": (x, codebook),
        "_soft_assign": (x, codebook, 20.0),
        "_decode": (codes, codebook),
    }
    for name, arguments in calls.items():
        function = getattr(layer, name)
        program = function.experimental_get_compiler_ir(*arguments)(stage="hlo")
        assert program.startswith("HloModule"), name
        attributes = function.get_concrete_function(*arguments).function_def.attr
        assert attributes["_XlaMustCompile"].b, name


@needs_tensorflow
def test_the_head_quantizes_under_xla():
    """Codes, and both soft assignments of a training step, also where the step as a whole is not compiled."""
    import tensorflow as tf

    head = GPQHead(n_book=3, n_word=4, len_code=4, n_classes=2)
    head.build((None, 7))

    def losses(x):
        return head.losses_of(x, np.array([0, 1, 0], "int32"), x, alpha=20.0, beta=4.0, lam_1=0.1, lam_2=0.1)["loss"]

    for function, n_compiled in ((head.encode, 1), (losses, 2)):
        graph = tf.function(function).get_concrete_function(tf.ones((3, 12))).graph
        inner = [node for node in graph.as_graph_def().node if node.op.endswith("PartitionedCall")]
        assert [node.attr["_XlaMustCompile"].b for node in inner] == [True] * n_compiled


def test_the_layer_trains_its_codebook_and_uses_its_present_value():
    layer = ProductQuantizer(n_book=2, n_word=4, len_code=3)
    x = normals(20, 5, 6)
    before = np.asarray(layer(x)), np.asarray(layer.encode(x)), np.asarray(layer.decode(np.ones((5, 2), "int32")))
    layer.codebook.assign(-layer.codebook.value)
    after = np.asarray(layer(x)), np.asarray(layer.encode(x)), np.asarray(layer.decode(np.ones((5, 2), "int32")))
    for old, new in zip(before, after, strict=True):
        assert (old != new).any()
    assert layer.trainable_variables == [layer.codebook]


def test_initial_codewords_are_glorot_uniform_and_a_function_of_the_seed():
    first, again, other = (ops.convert_to_numpy(ProductQuantizer(12, 16, 12, seed=seed).codebook) for seed in (7, 7, 8))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()
    limit = (6 / (16 + 144)) ** 0.5
    assert 0.99 * limit < np.abs(first).max() <= limit
    # uniform: variance limit^2 / 3; the mean of 2,304 squares is known to 2 %
    assert np.mean(first**2) == pytest.approx(limit**2 / 3, rel=0.08)


def test_the_codebook_stays_float32_in_mixed_precision():
    layer = ProductQuantizer(2, 4, 3, dtype="mixed_bfloat16")
    assert keras.backend.standardize_dtype(layer.codebook.dtype) == "float32"
    assert keras.backend.standardize_dtype(layer.codebook.value.dtype) == "float32"


def test_the_layer_survives_its_config(layer):
    again = ProductQuantizer.from_config(layer.get_config())
    assert again.get_config() == layer.get_config()
    np.testing.assert_array_equal(ops.convert_to_numpy(again.codebook), ops.convert_to_numpy(layer.codebook))


def test_the_module_names_what_others_rely_on():
    assert quantizer.soft_assign is soft_assign
    assert {"soft_assign", "hard_assign", "decode", "ProductQuantizer"} <= set(vars(quantizer))
