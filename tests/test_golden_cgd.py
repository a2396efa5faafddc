"""CGD's descriptors and losses, and their gradients, against the numbers recorded from MXNet's operators.

Feature maps, weights and labels are read from the file, never known here: other inputs under the same names must do.
"""

import re

import numpy as np
import pytest
from keras import ops

from gpq_tf import losses
from gpq_tf.descriptors import gem, mac, spoc
from gpq_tf.heads.cgd import CGDHead
from gpq_tf.ops import l2_normalize_added

from golden import CGD, load, needs_golden, worst
from gradients import value_and_gradients

pytestmark = needs_golden

LETTER = {"SPoC": "S", "MAC": "M", "GeM": "G"}
VALUE, GRADIENT = 2e-6, 5e-6


@pytest.fixture(scope="module")
def recorded():
    return load("descriptors.npz", CGD)


def prefixes(recorded, pattern):
    found = sorted({key.partition("/")[0] for key in recorded if re.fullmatch(pattern, key.partition("/")[0])})
    assert found
    return found


def pooling(prefix, floor):
    """(function of features and p, p, name of the weight) of a recorded descriptor, such as "GeM_p1.5"."""
    name, _, p = prefix.partition("_p")
    if name == "GeM":
        return (lambda features, p: gem(features, p, floor)), [float(p)], name
    # p is no argument of the others: nothing depends on it
    return (lambda features, p: (spoc if name == "SPoC" else mac)(features)), [1.0], name


def assert_gradients(recorded, prefix, gradients):
    """gradients: dict of the recorded name's end -> array; what is not recorded is not compared."""
    compared = [name for name in gradients if f"{prefix}{name}" in recorded]
    assert compared
    for name in compared:
        assert worst(gradients[name], recorded[f"{prefix}{name}"]) < GRADIENT, name


def assert_slope(slope, recorded_slope, function, p, cotangent):
    """The gradient with respect to p, one number, a sum of terms that cancel: of .3 in magnitudes .0008 may remain.

    Its error in float32, recorded or ours, is one of the terms'. `function` of p is float64 NumPy.
    """
    step = 1e-5
    terms = (function(p + step) - function(p - step)) / (2 * step) * cotangent
    assert abs(slope[0] - recorded_slope[0]) < 1e-6 * np.abs(terms).sum()
    assert abs(slope[0] - terms.sum()) < 1e-6 * np.abs(terms).sum()


def plain_branch(recorded, name, p):
    """A branch in float64."""
    x = recorded["feat_nhwc"].astype("float64")
    pooled = {
        "SPoC": lambda: x.mean(axis=(1, 2)),
        "MAC": lambda: x.max(axis=(1, 2)),
        "GeM": lambda: plain_gem(recorded, p),
    }[name]()
    return plain_unit(recorded, pooled @ recorded[f"fc_weight_{name}"].T.astype("float64"))


def plain_gem(recorded, p):
    x = np.maximum(recorded["feat_nhwc"].astype("float64"), recorded["gem_eps"])
    return (x**p).mean(axis=(1, 2)) ** (1 / p)


def plain_unit(recorded, x):
    return x / np.sqrt((x**2).sum(axis=1, keepdims=True) + recorded["l2_eps"])


def test_pooled_features_and_their_gradients(recorded):
    for prefix in prefixes(recorded, "SPoC|MAC|GeM_p.*"):
        pool, p, _ = pooling(prefix, float(recorded["gem_eps"]))
        pooled, (to_map, to_p) = value_and_gradients(pool, [recorded["feat_nhwc"], p], recorded["pool_cot"])
        assert worst(pooled, recorded[f"{prefix}/pooled"]) < VALUE
        gradients = {"gfeat_nhwc": to_map, "gfeat_nchw": to_map.transpose(0, 3, 1, 2)}
        assert_gradients(recorded, f"{prefix}/pooled_", gradients)
        if prefix.startswith("GeM"):
            slope = recorded[f"{prefix}/pooled_gp"]
            assert_slope(to_p, slope, lambda p: plain_gem(recorded, p), p[0], recorded["pool_cot"])
        if f"{prefix}/pooling_op" in recorded:
            assert worst(pooled, recorded[f"{prefix}/pooling_op"]) < VALUE


def test_mxnets_lp_pooling_is_gem_times_a_root_of_the_number_of_places(recorded):
    n_places = np.prod(recorded["feat_nhwc"].shape[1:3])
    assert worst(gem(recorded["feat_nhwc"], 3.0) * n_places ** (1 / 3), recorded["lp3_pooling_op"]) < VALUE


def test_branches_and_their_gradients(recorded):
    l2_epsilon = float(recorded["l2_eps"])
    for prefix in prefixes(recorded, "SPoC|MAC|GeM_p.*"):
        pool, p, name = pooling(prefix, float(recorded["gem_eps"]))
        inputs = [recorded["feat_nhwc"], recorded[f"fc_weight_{name}"], p]

        def reduced(features, weight, p, pool=pool):
            return ops.matmul(pool(features, p), ops.transpose(weight))

        def branch(*inputs, reduced=reduced):
            return l2_normalize_added(reduced(*inputs), l2_epsilon)

        unit, (to_map, to_weight, to_p) = value_and_gradients(branch, inputs, recorded["branch_cot"])
        assert worst(reduced(*inputs[:2], np.float32(p[0])), recorded[f"{prefix}/fc"]) < VALUE
        assert worst(unit, recorded[f"{prefix}/l2"]) < VALUE
        gradients = {"gfeat_nchw": to_map.transpose(0, 3, 1, 2), "gweight": to_weight}
        assert_gradients(recorded, f"{prefix}/l2_", gradients)
        if name == "GeM":
            slope = recorded[f"{prefix}/l2_gp"]
            assert_slope(to_p, slope, lambda p: plain_branch(recorded, "GeM", p), p[0], recorded["branch_cot"])


def test_combined_descriptors_and_their_gradients(recorded):
    for prefix in prefixes(recorded, "combined_[SMG]+"):
        letters = prefix.partition("_")[2]
        names = [next(name for name in LETTER if LETTER[name] == letter) for letter in letters]
        weights = [recorded[f"fc_weight_{name}"].T for name in names]
        head = CGDHead(
            letters,
            n_dim=sum(weight.shape[1] for weight in weights),
            learn_p=True,
            gem_floor=float(recorded["gem_eps"]),
            l2_epsilon=float(recorded["l2_eps"]),
        )
        head.build(recorded["feat_nhwc"].shape)
        for letter, weight in zip(letters, weights, strict=True):
            head.dense[letter].kernel.assign(weight)
        variables = head.trainable_variables

        def combined(features, *values, head=head, variables=variables):
            return head.stateless_call([*values], [], features)[0]

        values = [variable.numpy() for variable in variables]
        assert worst(head(recorded["feat_nhwc"]), recorded[f"{prefix}/out"]) < VALUE
        out, (to_map, *to_values) = value_and_gradients(
            combined, [recorded["feat_nhwc"], *values], recorded[f"{prefix}/cot"]
        )
        assert worst(out, recorded[f"{prefix}/out"]) < VALUE
        gradients = {"gfeat_nhwc": to_map, "gfeat_nchw": to_map.transpose(0, 3, 1, 2)}
        slope = None
        for variable, gradient in zip(variables, to_values, strict=True):
            if variable.path.endswith("gem_p"):
                slope = gradient.reshape(1)
            else:
                name = next(name for name in names if f"fc_{LETTER[name]}/" in variable.path)
                gradients[f"gweight_{name}"] = gradient.T
        assert_gradients(recorded, f"{prefix}/", gradients)
        assert len(gradients) == 2 + len(letters)
        if "G" in letters:

            def plain(p, names=names):
                return plain_unit(recorded, np.hstack([plain_branch(recorded, name, p) for name in names]))

            assert_slope(slope, recorded[f"{prefix}/gp"], plain, 3.0, recorded[f"{prefix}/cot"])


def test_a_checkpoints_head_makes_its_embeddings_of_its_feature_map():
    recorded, weights = load("params/output.npz", CGD), load("params/values.npz", CGD)
    feature_map = recorded["internal/featmap_output"].transpose(0, 2, 3, 1)
    head = CGDHead("SMG", n_dim=recorded["embedding"].shape[1], learn_p=False)
    head.build(feature_map.shape)
    for name, letter in LETTER.items():
        head.dense[letter].kernel.assign(weights[f"arg:fc_{name.lower()}_weight"].T)
    assert worst(head(feature_map), recorded["embedding"]) < VALUE
    for name, pool in {"spoc": spoc, "mac": mac, "_powerscalar1": lambda x: gem(x, 3.0)}.items():
        assert worst(pool(feature_map), recorded[f"internal/{name}_output"]) < VALUE


@pytest.mark.parametrize(("distance", "squared"), [("euclidean", False), ("squared", True)])
def test_triplets_and_their_gradients(recorded, distance, squared):
    margin = float(recorded["triplet_margin"])
    for prefix in prefixes(recorded, "triplet_(?!margin).*"):
        embeddings, labels = recorded[f"{prefix}/embeddings"], recorded[f"{prefix}/labels"]

        def of(name, prefix=prefix):
            return recorded[f"{prefix}/{distance}_{name}"]

        def loss(embeddings, labels=labels):
            return losses.batch_hard_triplet(embeddings, labels, margin, squared)

        value, (to_embeddings,) = value_and_gradients(loss, [embeddings], 1.0)
        assert abs(value - of("loss")[0]) < 1e-6
        assert worst(to_embeddings, of("grad")) < GRADIENT
        hinges = np.asarray(losses.batch_hard_hinges(embeddings, labels, margin, squared))
        assert worst(hinges, of("per_anchor")) < VALUE
        assert (hinges > 0).mean() == pytest.approx(float(of("fraction_active")), abs=1e-6)

        positive, negative, positive_index, negative_index = losses.hardest_pairs(embeddings, labels, squared)
        assert worst(positive, of("hardest_positive_distance")) < VALUE
        assert worst(negative, of("hardest_negative_distance")) < VALUE
        np.testing.assert_array_equal(negative_index, of("hardest_negative_index"))
        has_positive = (labels[:, None] == labels).sum(axis=1) > 1
        np.testing.assert_array_equal(
            np.asarray(positive_index)[has_positive], of("hardest_positive_index")[has_positive]
        )
        logged = CGDHead("S", n_dim=2).losses_of(embeddings, labels, margin=margin, squared=squared)
        assert abs(float(logged["rank"]) - of("loss")[0]) < 1e-6
        assert float(logged["active"]) == pytest.approx(float(of("fraction_active")), abs=1e-6)


def test_the_auxiliary_loss_and_its_gradients(recorded):
    temperature, epsilon = float(recorded["aux/temperature"]), float(recorded["aux/epsilon"])
    labels, n_classes = recorded["aux/labels"], int(recorded["aux/num_classes"])
    inputs = [recorded[f"aux/{name}"] for name in ("in", "weight", "bias")]

    def logits_of(x, weight, bias):
        return ops.matmul(x, ops.transpose(weight)) + bias

    assert worst(logits_of(*inputs), recorded["aux/logits_before_temperature"]) < VALUE
    smoothings = {
        "eps_over_K": epsilon,
        "eps_over_Kminus1": epsilon * n_classes / (n_classes - 1),
        "no_smoothing": 0.0,
    }
    for name, smoothing in smoothings.items():

        def loss(*inputs, smoothing=smoothing):
            return losses.classification_smoothed(labels, logits_of(*inputs), temperature, smoothing)

        value, gradients = value_and_gradients(loss, inputs, 1.0)
        assert abs(value / recorded[f"aux/{name}_loss"][0] - 1) < 1e-6
        for gradient, end in zip(gradients, ("gin", "gweight", "gbias"), strict=True):
            assert worst(gradient, recorded[f"aux/{name}_{end}"]) < GRADIENT
        logits = recorded["aux/logits_before_temperature"]
        each = [
            float(losses.classification_smoothed(labels[i : i + 1], logits[i : i + 1], temperature, smoothing))
            for i in range(len(labels))
        ]
        assert worst(each, recorded[f"aux/{name}_per_sample"]) < VALUE


def test_mxnets_own_smoothing_spreads_over_the_other_classes(recorded):
    temperature, epsilon = float(recorded["aux/temperature"]), float(recorded["aux/epsilon"])
    labels, n_classes = recorded["aux/labels"], int(recorded["aux/num_classes"])
    scaled = recorded["aux/logits_before_temperature"] / temperature

    def loss(scaled):
        smoothing = epsilon * n_classes / (n_classes - 1)
        return losses.classification_smoothed(labels, scaled, 1.0, smoothing)

    _, (gradient,) = value_and_gradients(loss, [scaled], 1.0)
    assert worst(gradient, recorded["aux/SoftmaxOutput_smooth_alpha_grad_wrt_scaled_logits"]) < GRADIENT
    assert worst(ops.softmax(scaled), recorded["aux/SoftmaxOutput_smooth_alpha_prob"]) < VALUE


def test_the_first_maximum_takes_the_gradient_as_through_mxnets_pooling(recorded):
    tied = np.array([2, 2, 1, 2], "float32").reshape(1, 2, 2, 1)
    _, (to_map,) = value_and_gradients(mac, [tied], 1.0)
    np.testing.assert_array_equal(to_map.ravel(), recorded["ties/global_maxpool_grad_of_2_2_1_2"])
    # MXNet's nd.max is another matter: every tied place has the whole gradient.
    np.testing.assert_array_equal(recorded["ties/max_axis_grad_of_2_2_1_2"], [1, 1, 0, 1])


def test_vectors_of_hardly_any_length(recorded):
    epsilon = float(recorded["l2_eps"])
    zeros = np.zeros_like(recorded["ties/l2norm_zero_out"])

    def normalize(x):
        return l2_normalize_added(x, epsilon)

    out, (gradient,) = value_and_gradients(normalize, [zeros], np.ones_like(zeros))
    np.testing.assert_array_equal(out, recorded["ties/l2norm_zero_out"])
    assert worst(gradient, recorded["ties/l2norm_zero_grad"]) < VALUE
    assert worst(normalize(recorded["ties/l2norm_tiny_in"]), recorded["ties/l2norm_tiny_out"]) < VALUE


def test_gem_of_a_channel_of_zeros(recorded):
    shape = recorded["ties/gem_zero_channel_gfeat"].transpose(0, 2, 3, 1).shape
    out, (to_map, to_p) = value_and_gradients(
        lambda x, p: gem(x, p, float(recorded["gem_eps"])), [np.zeros(shape), [3.0]], 1.0
    )
    assert worst(out, recorded["ties/gem_zero_channel_out"]) < VALUE
    np.testing.assert_array_equal(to_map, recorded["ties/gem_zero_channel_gfeat"].transpose(0, 2, 3, 1))
    # Zero in exact arithmetic; MXNet's own rounding is in the recorded number.
    assert abs(to_p[0] - recorded["ties/gem_zero_channel_gp"][0]) < 1e-11
