"""Every op and loss of GPQ, value and gradient, against what the original program recorded (golden gpq/ops.npz).

Tolerances are those of golden's README: outputs 3e-6, gradients 2e-5 of the array's largest magnitude; saturated rows,
whose gradients are below 1e-6, are compared absolutely.
"""

import keras
import numpy as np
import pytest
from keras import ops

from gpq_tf import losses, quantizer
from gpq_tf.heads.gpq import GPQHead, as_codebook
from gpq_tf.ops import normalize_books, reverse_gradient

import golden
from gradients import value_and_gradients

pytestmark = golden.needs_golden

CONFIGURATIONS = {"b12_k16_d12": (12, 16, 12), "b4_k16_d12": (4, 16, 12), "b8_k256_d8": (8, 256, 8)}
CASES = ("n7/plain", "n7/degen", "n32/plain")
OUTPUT, GRADIENT, ABSOLUTE = 3e-6, 2e-5, 1e-6


@pytest.fixture(scope="module")
def recorded():
    return golden.load("ops.npz")


def check(actual, expected, tolerance, absolute=ABSOLUTE * GRADIENT):
    """Relative to the largest magnitude; absolute where everything is tiny."""
    difference = np.abs(np.asarray(actual, np.float64) - expected)
    assert np.shape(actual) == np.shape(expected)
    assert np.isfinite(np.asarray(actual)).all()
    assert difference.max() <= max(tolerance * np.abs(expected).max(), absolute)


def check_rows(actual, expected, tolerance):
    """As `check`, but row by row: rows of a degenerate batch differ by ten orders of magnitude."""
    assert np.shape(actual) == np.shape(expected)
    scale = np.abs(expected).max(axis=-1)
    difference = np.abs(np.asarray(actual, np.float64) - expected).max(axis=-1)
    # golden's README: plain gradients agree to 4e-5 of the row's largest magnitude
    assert (difference <= np.maximum(2 * tolerance * scale, ABSOLUTE)).all()


def parametrize(cases=CASES):
    pairs = [(name, case) for name in CONFIGURATIONS for case in cases]
    return pytest.mark.parametrize(("name", "case"), pairs, ids=["/".join(pair) for pair in pairs])


def check_recorded(recorded, prefix, function, inputs, cotangent, gradients):
    value, found = value_and_gradients(function, inputs, cotangent)
    check(value, recorded[f"{prefix}/out"], OUTPUT)
    # A saturated row (1e4 times the others) adds its rounding, 1e4 * 1e-8, to the gradient of what all rows share.
    absolute = {"absolute": ABSOLUTE} if "/degen/" in prefix else {}
    for key, gradient in zip(gradients, found, strict=True):
        check(gradient, recorded[f"{prefix}/{key}"], GRADIENT, **absolute)
        check_rows(gradient, recorded[f"{prefix}/{key}"], GRADIENT)


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_prototypes_are_normalised_and_attract_the_codebook(recorded, name):
    n_book = CONFIGURATIONS[name][0]
    prefix = f"{name}/intra_norm_C"
    check_recorded(
        recorded,
        prefix,
        lambda x: normalize_books(x, n_book),
        [recorded[f"{prefix}/in_x"]],
        recorded[f"{prefix}/cot"],
        ["grad_x"],
    )
    prefix = f"{name}/soft_assignment_proto"
    check_recorded(
        recorded,
        prefix,
        lambda z, x: quantizer.soft_assign(x, as_codebook(z, n_book), 20.0),
        [recorded[f"{prefix}/in_z"], recorded[f"{prefix}/in_x"]],
        recorded[f"{prefix}/cot"],
        ["grad_z", "grad_x"],
    )


@parametrize()
def test_intra_normalisation(recorded, name, case):
    n_book, root = CONFIGURATIONS[name][0], f"{name}/{case}"
    inputs = [recorded[f"{root}/x"]]
    check_recorded(
        recorded,
        f"{root}/intra_norm",
        lambda x: normalize_books(x, n_book),
        inputs,
        recorded[f"{root}/cot_BD"],
        ["grad_x"],
    )


@parametrize()
def test_soft_assignment(recorded, name, case):
    n_book, root = CONFIGURATIONS[name][0], f"{name}/{case}"
    check_recorded(
        recorded,
        f"{root}/soft_assignment",
        lambda z, x: quantizer.soft_assign(x, as_codebook(z, n_book), 20.0),
        [recorded[f"{name}/Z_raw"], recorded[f"{root}/x"]],
        recorded[f"{root}/cot_BD"],
        ["grad_z", "grad_x"],
    )


@parametrize()
def test_n_pair_product_quantization(recorded, name, case):
    n_book, root = CONFIGURATIONS[name][0], f"{name}/{case}"
    similarity = recorded[f"{root}/label_Mat"]
    check_recorded(
        recorded,
        f"{root}/n_pq_loss",
        lambda x, q: losses.n_pair_product_quantization(similarity, x, q, n_book),
        [recorded[f"{root}/x"], recorded[f"{root}/q"]],
        recorded[f"{root}/n_pq_loss/cot"],
        ["grad_x", "grad_q"],
    )


@parametrize()
def test_classification(recorded, name, case):
    root = f"{name}/{case}"
    onehot = recorded[f"{root}/label_onehot"]
    check_recorded(
        recorded,
        f"{root}/cls_loss",
        lambda logits: losses.classification(onehot, logits),
        [recorded[f"{root}/logits"]],
        recorded[f"{root}/cls_loss/cot"],
        ["grad_logits"],
    )


@parametrize()
def test_subspace_entropy(recorded, name, case):
    n_book, root = CONFIGURATIONS[name][0], f"{name}/{case}"
    prefix = f"{root}/sme_loss"
    # the original's prototypes are columns
    check_recorded(
        recorded,
        prefix,
        lambda x, c: losses.subspace_entropy(x, ops.transpose(c), n_book),
        [recorded[f"{root}/x"], recorded[f"{name}/C_raw"].T],
        recorded[f"{prefix}/cot"],
        ["grad_x", "grad_centroids"],
    )


@parametrize()
def test_classifier(recorded, name, case):
    n_book, root = CONFIGURATIONS[name][0], f"{name}/{case}"
    check_recorded(
        recorded,
        f"{root}/classifier",
        lambda x, c: losses.mean_book_similarity(x, ops.transpose(c), n_book),
        [recorded[f"{root}/x"], recorded[f"{name}/C_raw"].T],
        recorded[f"{root}/cot_BC"],
        ["grad_x", "grad_prototypes"],
    )


@parametrize([case for case in CASES if case.startswith("n7")])
@pytest.mark.parametrize("scale", [1.0, 0.3])
def test_gradient_reversal(recorded, name, case, scale):
    root = f"{name}/{case}"
    check_recorded(
        recorded,
        f"{root}/flip_gradient_l{scale:g}",
        lambda x: reverse_gradient(x, scale),
        [recorded[f"{root}/x"]],
        recorded[f"{root}/cot_BD"],
        ["grad_x"],
    )


def head_with(recorded, name):
    n_book, n_word, length = CONFIGURATIONS[name]
    head = GPQHead(n_book, n_word, length, n_classes=10)
    head.build((None, n_book * length))
    head.quantizer.codebook.assign(ops.convert_to_numpy(as_codebook(recorded[f"{name}/Z_raw"], n_book)))
    head.prototypes.assign(recorded[f"{name}/C_raw"])
    return head


def to_rows(books):
    """(M, K, d) -> the original's (K, M * d)."""
    return np.asarray(books).transpose(1, 0, 2).reshape(books.shape[1], -1)


def head_losses(head, values, labels, fs, ft):
    codebook, prototypes = values
    mapping = [(head.quantizer.codebook, codebook), (head.prototypes, prototypes)]
    with keras.StatelessScope(state_mapping=mapping):
        return head.losses_of(fs, labels, ft, alpha=20.0, beta=4.0, lam_1=0.1, lam_2=0.1)


@parametrize()
def test_whole_head(recorded, name, case):
    prefix = f"{name}/{case}/head"
    head = head_with(recorded, name)
    labels = recorded[f"{name}/{case}/class"].astype("int32")
    inputs = [
        ops.convert_to_numpy(head.quantizer.codebook),
        ops.convert_to_numpy(head.prototypes),
        recorded[f"{prefix}/in_fS"],
        recorded[f"{prefix}/in_fT"],
    ]
    names = {"hash": "hash_loss", "cls": "cls_loss", "ent": "entropy_loss", "loss": "cost"}

    def all_losses(codebook, prototypes, fs, ft):
        found = head_losses(head, (codebook, prototypes), labels, fs, ft)
        return ops.stack([found[name] for name in names])

    # the gradient of the last, the sum
    found, (codebook, prototypes, fs, ft) = value_and_gradients(all_losses, inputs, [0, 0, 0, 1])
    for value, name in zip(found, names.values(), strict=True):
        check(value, recorded[f"{prefix}/{name}"], OUTPUT)
    check(to_rows(codebook), recorded[f"{prefix}/grad_Z"], GRADIENT)
    check(prototypes, recorded[f"{prefix}/grad_C"], GRADIENT)
    check_rows(fs, recorded[f"{prefix}/grad_fS"], GRADIENT)
    # golden's README: the gradient of an all-zero row of in_fT is 0 in theory, rounding noise in float32
    rows = np.abs(recorded[f"{prefix}/in_fT"]).max(axis=1) > 0
    check_rows(ft[rows], recorded[f"{prefix}/grad_fT"][rows], GRADIENT)


@parametrize([case for case in CASES if case.endswith("plain")])
def test_three_adam_steps_of_codebook_and_prototypes(recorded, name, case):
    from gpq_tf.heads import gpq
    from gpq_tf.train_step import make_step

    prefix = f"{name}/{case}/head"
    head = head_with(recorded, name)
    labels = recorded[f"{name}/{case}/class"].astype("int32")
    for weight in head.projection.weights:
        weight.trainable = False
    head.projection.trainable = False
    optimizer = gpq.optimizer()

    def losses_of(batch):
        return head.losses_of(batch["fs"], labels, batch["ft"], alpha=20.0, beta=4.0, lam_1=0.1, lam_2=0.1)

    step = make_step(head, losses_of, optimizer)
    batch = {"fs": recorded[f"{prefix}/in_fS"], "ft": recorded[f"{prefix}/in_fT"]}
    for number in (1, 2, 3):
        rate = float(ops.convert_to_numpy(optimizer.learning_rate))
        assert rate == pytest.approx(float(recorded[f"{prefix}/adam{number}_lr"]), rel=1e-6)
        found = step(batch)
        check(found["loss"], recorded[f"{prefix}/adam{number}_cost_before"], OUTPUT)
        check(ops.convert_to_numpy(head.prototypes), recorded[f"{prefix}/adam{number}_C"], GRADIENT)
    check(to_rows(ops.convert_to_numpy(head.quantizer.codebook)), recorded[f"{prefix}/adam3_Z"], GRADIENT)
