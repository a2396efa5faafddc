"""CGD's head as a layer: its combinations, its auxiliary classifier, what it keeps and what it refuses."""

import keras
import numpy as np
import pytest
from keras import ops

from gpq_tf import descriptors, losses
from gpq_tf.heads.cgd import CGDHead
from gpq_tf.ops import compiled

from golden import worst
from gradients import value_and_gradients

POOLS = {"S": descriptors.spoc, "M": descriptors.mac, "G": lambda features: descriptors.gem(features, 3.0)}


def features(seed=0, n=3, channels=8):
    values = np.random.default_rng(seed).normal(size=(n, 4, 5, channels))
    return np.maximum(values, 0).astype("float32")


def built(*args, channels=8, **kwargs):
    head = CGDHead(*args, **kwargs, name="head")
    head.build((None, None, None, channels))
    return head


def unit(rows):
    rows = np.asarray(rows, "float64")
    return rows / np.sqrt((rows**2).sum(axis=1, keepdims=True) + 1e-10)


@pytest.mark.parametrize("letters", ["S", "M", "G", "SM", "MG", "SG", "SMG", "GS", "GMS"])
@pytest.mark.parametrize("combination", ["concat", "sum"])
def test_every_combination_is_its_branches_in_order(letters, combination):
    head = built(letters, n_dim=12, combination=combination)
    parts = [unit(np.asarray(POOLS[x](features())) @ head.dense[x].kernel.numpy()) for x in letters]
    combined = np.hstack(parts) if combination == "concat" else sum(parts)
    out = head(features())
    assert ops.dtype(out) == "float32"
    assert worst(out, unit(combined)) < 2e-6
    np.testing.assert_allclose(np.linalg.norm(out, axis=1), 1, rtol=1e-6)


def test_variables_have_the_names_of_the_converter():
    head = built("SMG", n_dim=12, learn_p=True, n_classes=3, use_bias=True)
    layers = ("fc_S", "fc_M", "fc_G", "classifier")
    expected = {f"head/{layer}/{name}" for layer in layers for name in ("kernel", "bias")} | {"head/gem_p"}
    assert {variable.path for variable in head.variables} == expected


def test_a_branch_begins_alike_whatever_it_is_combined_with():
    alone, together = built("G", n_dim=4, seed=5), built("SMG", n_dim=12, seed=5)
    np.testing.assert_array_equal(alone.dense["G"].kernel.numpy(), together.dense["G"].kernel.numpy())
    kernels = [dense.kernel.numpy() for dense in together.dense.values()]
    assert not np.array_equal(kernels[0], kernels[1])
    assert not np.array_equal(kernels[0], built("SMG", n_dim=12, seed=6).dense["S"].kernel.numpy())


def test_the_power_is_learnt_or_fixed():
    assert "gem_p" in [variable.name for variable in built("MG", 4, learn_p=True).trainable_variables]
    for head in (built("MG", 4), built("SM", 4, learn_p=True)):
        assert "gem_p" not in [variable.name for variable in head.variables]
    fixed, learnt = (built("G", 4, gem_p=2.0, learn_p=learn_p) for learn_p in (False, True))
    np.testing.assert_allclose(fixed(features()), learnt(features()), atol=1e-6)
    learnt.gem_p.assign(7.0)
    assert worst(learnt(features()), fixed(features())) > 1e-3


@pytest.mark.parametrize("place", ["pooled", "dense", "normalized"])
def test_the_classifier_takes_the_first_descriptor(place):
    head = built("MG", n_dim=6, n_classes=5, classifier_place=place)
    head.classifier.bias.assign(np.arange(5.0))
    pooled = np.asarray(descriptors.mac(features()))
    dense = pooled @ head.dense["M"].kernel.numpy()
    taken = {"pooled": pooled, "dense": dense, "normalized": unit(dense)}[place]
    logits = head.first_descriptor_logits(features())
    assert worst(logits, taken @ head.classifier.kernel.numpy() + np.arange(5)) < 2e-6
    without = built("MG", n_dim=6)
    with pytest.raises(ValueError, match=r"Expected a classifier \(n_classes above 0\)\. Received: n_classes=0"):
        without.first_descriptor_logits(features())


def test_converted_checkpoints_may_lack_layers():
    x = features()
    bare = built("SM", n_dim=0, n_classes=2, classifier_place="dense")
    assert worst(bare(x), unit(np.hstack([unit(POOLS["S"](x)), unit(POOLS["M"](x))]))) < 2e-6
    assert bare.first_descriptor_logits(x).shape == (3, 2)
    once = built("SM", n_dim=0, normalize_branches=False)
    assert worst(once(x), unit(np.hstack([POOLS["S"](x), POOLS["M"](x)]))) < 2e-6
    uncombined = built("SM", n_dim=0, normalize_combined=False)
    np.testing.assert_allclose(np.linalg.norm(uncombined(x), axis=1), np.sqrt(2), rtol=1e-6)
    biased = built("S", n_dim=3, use_bias=True)
    biased.dense["S"].bias.assign([1.0, 2.0, 3.0])
    expected = np.asarray(POOLS["S"](x)) @ biased.dense["S"].kernel.numpy() + [1, 2, 3]
    assert worst(biased(x), unit(expected)) < 2e-6


def test_floor_and_epsilon_are_the_heads_own():
    zeros = np.zeros((1, 2, 2, 4), "float32")
    head = built("G", n_dim=0, gem_floor=1e-3, l2_epsilon=12e-6, normalize_combined=False)
    np.testing.assert_allclose(head(zeros), 1e-3 / np.sqrt(4e-6 + 12e-6), rtol=1e-5)


def test_the_loss_is_rank_and_auxiliary_added():
    head, labels = built("SMG", n_dim=6, n_classes=2, learn_p=True), np.array([0, 0, 1, 1])
    x = features(n=4)
    embeddings, logits = head(x), head.first_descriptor_logits(x)
    both = head.losses_of(embeddings, labels, logits, margin=0.2, temperature=0.7, smoothing=0.3)
    assert float(both["rank"]) == pytest.approx(float(losses.batch_hard_triplet(embeddings, labels, 0.2)))
    assert float(both["aux"]) == pytest.approx(float(losses.classification_smoothed(labels, logits, 0.7, 0.3)))
    assert float(both["loss"]) == pytest.approx(float(both["rank"]) + float(both["aux"]))
    alone = head.losses_of(embeddings, labels)
    assert float(alone["loss"]) == float(alone["rank"]) > 0 == float(alone["aux"])
    squared = head.losses_of(embeddings, labels, squared=True)
    assert float(squared["rank"]) == pytest.approx(float(losses.batch_hard_triplet(embeddings, labels, squared=True)))
    apart = head.losses_of(np.eye(4, dtype="float32")[[0, 0, 1, 2]], np.array([0, 0, 1, 2]))
    assert float(apart["active"]) == 0


def test_a_compiled_step_has_the_same_loss():
    head, labels = built("SMG", n_dim=6, n_classes=2, learn_p=True), np.array([0, 0, 1, 1])

    def loss(x):
        return head.losses_of(head(x), labels, head.first_descriptor_logits(x))["loss"]

    x = features(n=4)
    assert float(compiled(loss)(ops.convert_to_tensor(x))) == pytest.approx(float(loss(x)), rel=1e-5)


def test_the_classifiers_gradient_reaches_the_map_but_no_dense_layer():
    head = built("SMG", n_dim=6, n_classes=2, learn_p=True)
    variables = head.trainable_variables

    def aux(x, *values):
        with keras.StatelessScope(state_mapping=list(zip(variables, values, strict=True))):
            logits = head.first_descriptor_logits(x)
        return losses.classification_smoothed([0, 1, 1], logits)

    _, (to_map, *to_values) = value_and_gradients(aux, [features(), *(v.numpy() for v in variables)], 1.0)
    assert np.abs(to_map).min(axis=(1, 2)).max() > 0  # of S: every place of the map
    reached = {variable.path for variable, g in zip(variables, to_values, strict=True) if np.abs(g).max() > 0}
    assert reached == {"head/classifier/kernel", "head/classifier/bias"}


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_sixteen_bits_differ_by_their_rounding_only(policy):
    exact, short = (built("SMG", n_dim=12, n_classes=2, learn_p=True, dtype=dtype) for dtype in ("float32", policy))
    x = features()
    for one, other in ((exact(x), short(x)), (exact.first_descriptor_logits(x), short.first_descriptor_logits(x))):
        assert ops.dtype(other) == "float32"
        assert 0 < worst(other, one) < 0.02
    assert ops.dtype(short.gem_p) == "float32"


def test_the_head_comes_back_from_its_configuration():
    given = {
        "descriptors": "GM",
        "n_dim": 6,
        "combination": "sum",
        "gem_p": 2.5,
        "learn_p": True,
        "n_classes": 3,
        "seed": 9,
        "use_bias": True,
        "gem_floor": 1e-4,
        "l2_epsilon": 1e-8,
        "normalize_branches": False,
        "normalize_combined": False,
        "classifier_place": "dense",
        "n_book": 3,
        "n_word": 4,
        "rotated": True,
    }
    head = built(**given)
    config = head.get_config()
    assert {name: config[name] for name in given} == given
    again = CGDHead.from_config(config)
    np.testing.assert_array_equal(again(features()), head(features()))


def test_the_search_uses_the_descriptor_as_it_is():
    head = built("S", n_dim=4)
    out = head(features())
    assert head.embed(out) is out
    assert (head.head_name, head.search_metric) == ("cgd", "squared_l2")


# --- with a codebook


def quantized(seed=0, n_word=4, **kwargs):
    return built("MG", n_dim=12, n_book=3, n_word=n_word, seed=seed, **kwargs)


@pytest.mark.parametrize("size, n_book", [(48, 6), (1536, 32)])
def test_codewords_begin_where_sub_vectors_of_unit_descriptors_lie(size, n_book):
    head = built("MG", n_dim=size, n_book=n_book, channels=8)
    codebook = head.search_codebook()
    assert codebook.shape == (n_book, 256, size // n_book)
    np.testing.assert_allclose(np.square(codebook).mean(), 1 / size, rtol=0.05)
    sub_vectors = np.asarray(head(features())).reshape(-1, size // n_book)
    lengths = (np.square(v).sum(axis=-1).mean() for v in (sub_vectors, codebook.reshape(-1, size // n_book)))
    np.testing.assert_allclose(list(lengths), 1 / n_book, rtol=0.1)


def test_codewords_are_seeded_and_leave_other_values_alone():
    head, plain = quantized(), built("MG", n_dim=12)
    np.testing.assert_array_equal(head(features()), plain(features()))
    np.testing.assert_array_equal(head.search_codebook(), quantized().search_codebook())
    assert not np.array_equal(head.search_codebook(), quantized(seed=1).search_codebook())
    assert "head/quantizer/codebook" in [variable.path for variable in head.trainable_variables]


def test_codes_are_the_nearest_codewords():
    head, x = quantized(n_word=16), np.asarray(built("MG", n_dim=12)(features(n=20)))
    expected = [
        [
            int(np.argmin([np.sum((row[4 * j : 4 * j + 4].astype(float) - word) ** 2) for word in book]))
            for j, book in enumerate(head.search_codebook())
        ]
        for row in x
    ]
    np.testing.assert_array_equal(head.encode(x), expected)


def test_a_rotation_turns_descriptors_and_no_training_turns_it():
    head, plain = quantized(rotated=True), quantized()
    np.testing.assert_allclose(head(features()), plain(features()), atol=1e-7)  # it begins as none
    rotation = np.linalg.qr(np.random.default_rng(0).normal(size=(12, 12)))[0].astype("float32")
    head.rotation.assign(rotation)
    x, y = np.asarray(plain(features())), np.asarray(head(features()))
    assert worst(y, x @ rotation) < 1e-6
    assert worst(y @ y.T, x @ x.T) < 1e-6
    assert "head/rotation" not in [variable.path for variable in head.trainable_variables]
    assert "head/rotation" in [variable.path for variable in head.variables]


def plain_across(x, z, labels, margin, squared):
    """The mean over the anchors x_i of their triplets with others' z, in float64."""
    hinges = []
    for i in range(len(x)):
        of = np.square(x[i].astype(float) - z.astype(float)).sum(axis=1)
        of = of if squared else np.sqrt(of)
        positives = [of[p] for p in range(len(x)) if p != i and labels[p] == labels[i]]
        negatives = [of[n] for n in range(len(x)) if labels[n] != labels[i]]
        hinges.append(max(0.0, max(positives) - min(negatives) + margin))
    return np.mean(hinges)


@pytest.mark.parametrize("squared", [False, True])
def test_the_loss_of_codes_is_the_equation(squared):
    head, labels = quantized(), np.array([0, 0, 1, 1, 2, 2])
    x = np.asarray(head(features(n=6)))
    z = np.zeros_like(x)
    variance = np.mean([np.sum((row - x.mean(axis=0)) ** 2) for row in x.astype(float)])
    assert 0 < variance < 1
    # In training codewords lie about the batch's mean, and as far from it as its descriptors.
    books = x.mean(axis=0, dtype=float).reshape(3, 1, 4) + (variance / 12) ** 0.5 * head.quantizer.codebook.numpy()
    for i, row in enumerate(x.astype(float)):
        for j, book in enumerate(books):
            own = slice(4 * j, 4 * j + 4)
            weights = np.exp([-7.0 * 3 / variance * np.sum((row[own] - word) ** 2) for word in book])
            z[i, own] = weights @ book / weights.sum()
    found = head.losses_of(x, labels, margin=0.3, squared=squared, alpha=7.0)
    assert float(found["rank_quantized"]) == pytest.approx(plain_across(x, z, labels, 0.3, squared), rel=1e-5)
    plain = built("MG", n_dim=12).losses_of(x, labels, margin=0.3, squared=squared)
    assert float(found["rank"]) == float(plain["rank"])
    lost = np.mean([np.sum((a - b) ** 2) for a, b in zip(x.astype(float), z.astype(float), strict=True)]) / variance
    assert float(found["lost"]) == pytest.approx(lost, rel=1e-5)
    assert float(found["loss"]) == pytest.approx(float(plain["loss"]) + float(found["rank_quantized"]) + lost)
    assert not {"rank_quantized", "lost"} & set(plain)


def test_the_gradient_of_the_loss_of_codes_reaches_codewords_and_map():
    head = quantized()
    variables = head.trainable_variables

    def across(x, *values):
        with keras.StatelessScope(state_mapping=list(zip(variables, values, strict=True))):
            return head.losses_of(head(x), np.array([0, 0, 1, 1]), margin=1.0, alpha=0.1)["rank_quantized"]

    _, (to_map, *to_values) = value_and_gradients(across, [features(n=4), *(v.numpy() for v in variables)], 1.0)
    assert np.abs(to_map).max(axis=(1, 2, 3)).min() > 0  # every image's
    reached = {variable.path for variable, g in zip(variables, to_values, strict=True) if np.abs(g).max() > 0}
    assert reached == {variable.path for variable in variables}


def test_what_is_lost_moves_codewords_and_descriptors_not_towards_each_other():
    head, labels, step = quantized(), np.array([0, 0, 1, 1]), 1e-2
    x = np.asarray(head(features(n=4)))

    def lost(x, codebook):
        with keras.StatelessScope(state_mapping=[(head.quantizer.codebook, codebook)]):
            return head.losses_of(x, labels, alpha=1e4)["lost"]  # hard: a codeword does not depend on x

    codebook = head.quantizer.codebook.numpy()
    before, (to_x, to_codebook) = value_and_gradients(lost, [x, codebook], 1.0)
    assert np.abs(to_x).max() < 1e-3 < np.abs(to_codebook).max()
    after, _ = value_and_gradients(lost, [x, codebook - step * to_codebook], 1.0)
    assert after < before


def test_equal_descriptors_have_a_finite_loss_and_gradient():
    head, labels, x = quantized(), np.array([0, 0, 1, 1]), np.full((4, 12), 12**-0.5)

    def across(x):
        return head.losses_of(x, labels, margin=1.0)["rank_quantized"]

    loss, (gradient,) = value_and_gradients(across, [x], 1.0)
    assert loss == pytest.approx(1.0) and np.isfinite(gradient).all()


def test_larger_alpha_comes_closer_to_codes():
    head, labels = quantized(), np.array([0, 0, 1, 1])
    x = head(features(n=4))
    head.quantizer.centre.assign(ops.mean(x, axis=0))
    head.quantizer.spread.assign(head.quantizer.batch_statistics(x)[1])
    codes = head.encode(x)
    hard = ops.mean(losses.batch_hard_hinges(x, labels, 1.0, others=head.quantizer.decode(codes)))
    away = [
        abs(float(head.losses_of(x, labels, margin=1.0, alpha=alpha)["rank_quantized"]) - float(hard))
        for alpha in (0.01, 1e5)
    ]
    assert away[1] < 1e-3 < away[0]


def test_books_must_divide_the_descriptor():
    with pytest.raises(
        ValueError, match=r"Invalid n_book\. Expected a positive integer dividing D=12\. Received: .*=7"
    ):
        built("MG", n_dim=12, n_book=7)
    assert built("MG", n_dim=0, n_book=2, n_word=2).search_codebook().shape == (2, 2, 8)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"descriptors": "SX"}, r"Invalid descriptors\. Expected distinct letters of S \(SPoC\).*'SX'"),
        ({"descriptors": "SS"}, r"Invalid descriptors\. Expected distinct letters.*'SS'"),
        ({"descriptors": ""}, r"Invalid descriptors\. Expected distinct letters.*''"),
        ({"descriptors": ["S", "M"]}, r"Invalid descriptors\. Expected distinct letters.*\['S', 'M'\]"),
        ({"n_dim": 7}, r"Invalid n_dim\. Expected a multiple of 3, the number of descriptors\. Received: n_dim=7"),
        ({"n_dim": -3}, r"Invalid n_dim\. Expected an integer of 0 or more\. Received: n_dim=-3"),
        ({"n_dim": 6.0}, r"Invalid n_dim\. Expected an integer of 0 or more\. Received: n_dim=6\.0"),
        ({"n_classes": True}, r"Invalid n_classes\. Expected an integer of 0 or more\. Received: n_classes=True"),
        ({"combination": "mean"}, r"Invalid combination\. Expected one of concat, sum\. Received: combination='mean'"),
        ({"classifier_place": "map"}, r"Invalid classifier_place\. Expected one of pooled, dense, normalized\."),
        ({"n_book": -1}, r"Invalid n_book\. Expected an integer of 0 or more\. Received: n_book=-1"),
        ({"gem_p": 0}, r"Invalid gem_p\. Expected a number above 0\. Received: gem_p=0"),
    ],
)
def test_what_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        CGDHead(**arguments)
