"""SPQ's two recipes against plain loops and against what kornia recorded, and the distribution of what is drawn."""

import colorsys
import functools
import itertools
import math

import keras
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from keras import ops
from scipy import stats

from gpq_tf.augment import RECIPES, apply_views, draw_views, generator
from gpq_tf.augment.blur import blur, radius_for
from gpq_tf.augment.color import LUMA, STEPS, gray, jitter, to_hsv, to_rgb
from gpq_tf.augment.crop import crop_and_flip, draw_boxes
from gpq_tf.ops import compiled

import golden
from gradients import random_cases

VERSIONS = {"0.5.10": "spq2021", "0.9.0": "simclr"}
EPSILON = {"spq2021": 1e-6, "simclr": 1e-8}
STEP_NAMES = ("brightness", "contrast", "saturation", "hue")
MASKS = ("flips", "jittered", "grayed", "blurred")
# Both sides compute in float32, in another order.
ROUNDING = 1e-6
# The original multiplies each place by a rounded (length - 1) / (size - 1), which puts it up to 2e-6 of a pixel off,
# once downwards and once across, and neighbours differ by up to 1. (With that rounding recomputed, a NumPy resize meets
# its record to 1.2e-7.) Jitter stretches the difference by up to 1.4.
RESIZING = 3e-6

both_recipes = pytest.mark.parametrize("recipe", RECIPES)
both_versions = pytest.mark.parametrize("version", VERSIONS)


# --- plain references, float64, one image


def plain_crop_and_flip(image, box, flip):
    size, (top, left, height, width) = image.shape[:2], (int(side) for side in box)
    part = image[top : top + height, left : left + width]
    out = np.empty_like(image)
    for y, x in np.ndindex(size):
        row = y * (height - 1) / max(size[0] - 1, 1)
        column = x * (width - 1) / max(size[1] - 1, 1)
        up, left = int(row), int(column)
        down, right = min(up + 1, height - 1), min(left + 1, width - 1)
        above = part[up, left] + (column - left) * (part[up, right] - part[up, left])
        below = part[down, left] + (column - left) * (part[down, right] - part[down, left])
        out[y, size[1] - 1 - x if flip else x] = above + (row - up) * (below - above)
    return out


def plain_hsv(image, change):
    """Every pixel to HSV, changed, and back; by the standard library."""
    out = np.empty_like(image)
    for place in np.ndindex(image.shape[:2]):
        out[place] = colorsys.hsv_to_rgb(*change(*colorsys.rgb_to_hsv(*image[place])))
    return out


def plain_gray(image):
    return image @ np.array([0.299, 0.587, 0.114])


def plain_step(name, image, factor, recipe):
    epsilon = EPSILON[recipe]
    if name == "hue":
        return plain_hsv(image, lambda h, s, v: ((h + factor) % 1, s * v / (v + epsilon), v))
    if recipe == "spq2021":
        changed = {
            "brightness": lambda: image + factor - 1,
            "contrast": lambda: image * factor,
            "saturation": lambda: plain_hsv(image, lambda h, s, v: (h, min(s * v / (v + epsilon) * factor, 1), v)),
        }[name]()
    else:
        other = {
            "brightness": lambda: 0.0,
            "contrast": lambda: plain_gray(image).mean(),
            "saturation": lambda: plain_gray(image)[..., None],
        }[name]()
        changed = factor * image + (1 - factor) * other
    return np.clip(changed, 0, 1)


def plain_blur(image, sigmas, radius):
    """With the whole two-dimensional kernel, on an image whose border is mirrored."""
    places = np.arange(-radius, radius + 1)
    down, across = (np.exp(-(places**2) / (2 * float(sigma) ** 2)) for sigma in sigmas)
    kernel = np.outer(down, across)[..., None]
    kernel /= kernel.sum()
    padded = np.pad(image, ((radius, radius), (radius, radius), (0, 0)), mode="reflect")
    out = np.empty_like(image)
    for y, x in np.ndindex(image.shape[:2]):
        out[y, x] = (padded[y : y + 2 * radius + 1, x : x + 2 * radius + 1] * kernel).sum(axis=(0, 1))
    return out


def plain_view(image, draws, b, recipe):
    image = plain_crop_and_flip(image.astype("float64"), draws["boxes"][b], draws["flips"][b])
    if draws["jittered"][b]:
        for step in draws["jitter_order"]:
            image = plain_step(STEP_NAMES[step], image, float(draws["jitter_factors"][b, step]), recipe)
    if draws["grayed"][b]:
        image = np.repeat(plain_gray(image)[..., None], 3, axis=2)
    if draws["blurred"][b]:
        tenth = int(0.1 * min(image.shape[:2]))
        image = plain_blur(image, draws["blur_sigmas"][b], tenth // 2)
    return image


def random_images(rng, n, height, width):
    """With what is awkward: grey pixels, black ones, channels that are 0 or 1, or equal."""
    images = rng.random((n, height, width, 3))
    kind = rng.integers(0, 6, (n, height, width, 1))
    images = np.where(kind == 0, images[..., :1], images)
    images = np.where(kind == 1, np.round(images), images)
    images = np.where(kind == 2, images[..., [0, 1, 1]], images)
    images = np.where(kind == 3, images * (rng.random(kind.shape) < 0.5), images)
    return images.astype("float32")


def close(found, expected, tolerance=ROUNDING):
    np.testing.assert_allclose(np.asarray(found), expected, rtol=0, atol=tolerance)


def quickest(function):
    """For a few calls: as it is on TensorFlow; JAX compiles the whole sooner than each operation for itself."""
    return compiled(function) if keras.backend.backend() == "jax" else function


# --- every operation on random images


@random_cases
@given(st.integers(1, 3), st.integers(1, 9), st.integers(1, 9), st.integers(0, 2**32 - 1))
def test_crop_and_flip_is_slice_and_interpolate(n, height, width, seed):
    rng = np.random.default_rng(seed)
    images = random_images(rng, n, height, width)
    sides = rng.integers(1, [height + 1, width + 1], (n, 2))
    boxes = np.concatenate([rng.integers(0, [height, width] - sides + 1), sides], axis=1).astype("int32")
    flips = rng.random(n) < 0.5
    expected = [plain_crop_and_flip(*case) for case in zip(images.astype("float64"), boxes, flips, strict=True)]
    close(quickest(crop_and_flip)(images, boxes, flips), expected, 3e-7)


def test_the_whole_box_is_the_image():
    images = random_images(np.random.default_rng(0), 2, 32, 24)
    boxes = np.array([[0, 0, 32, 24]] * 2, "int32")
    found = np.asarray(quickest(crop_and_flip)(images, boxes, np.array([False, True])))
    np.testing.assert_array_equal(found, [images[0], images[1, :, ::-1]])


@both_recipes
@pytest.mark.parametrize("name", STEP_NAMES)
def test_every_step_is_the_plain_one(name, recipe):
    rng = np.random.default_rng(0)
    images = random_images(rng, 6, 7, 5)
    low, high = (-0.1, 0.1) if name == "hue" else (0.6, 1.4)
    factors = np.concatenate([[low, high], rng.uniform(low, high, 4)]).astype("float32")
    step = STEPS[recipe][STEP_NAMES.index(name)]
    found = np.asarray(quickest(step)(images, factors[:, None, None, None]))
    expected = [
        plain_step(name, image.astype("float64"), float(f), recipe) for image, f in zip(images, factors, strict=True)
    ]
    close(found, expected)
    # what the rounding of a hue may exceed the range by is cut off by the steps that could do harm
    assert found.min() >= -1e-7
    assert found.max() <= 1 + 1e-7


@both_recipes
def test_factors_of_one_and_a_turn_of_zero_change_nothing(recipe):
    images = random_images(np.random.default_rng(1), 3, 8, 8)
    unchanged = np.array([[1, 1, 1, 0]] * 3, "float32")
    found = quickest(functools.partial(jitter, steps=STEPS[recipe]))(images, unchanged, np.arange(4, dtype="int32"))
    close(found, images, ROUNDING + 2 * EPSILON[recipe])


def test_jitter_keeps_every_order():
    """Each step appends its digit: x -> 10 x + number."""
    steps = [lambda x, factor, number=number: 10 * x + factor * number for number in range(4)]
    apply = compiled(lambda x, factors, order: jitter(x, factors, order, steps))
    for order in ([0, 1, 2, 3], [3, 1, 0, 2], [2, 3, 1, 0], [1, 0, 3, 2]):
        found = np.asarray(
            apply(np.zeros((1, 1, 1, 3), "float32"), np.ones((1, 4), "float32"), np.array(order, "int32"))
        )
        assert found.ravel().tolist() == [int("".join(map(str, order)))] * 3


def test_gray_is_the_weighted_mean():
    images = random_images(np.random.default_rng(2), 2, 5, 4)
    close(gray(images)[..., 0], images.astype("float64") @ np.array(LUMA), 2e-7)


@random_cases
@given(st.integers(1, 3), st.integers(4, 9), st.integers(4, 9), st.integers(0, 3), st.integers(0, 2**32 - 1))
def test_blur_is_a_convolution(n, height, width, radius, seed):
    rng = np.random.default_rng(seed)
    images = random_images(rng, n, height, width)
    sigmas = rng.uniform(0.1, 2.0, (n, 2)).astype("float32")
    expected = [plain_blur(image, s, radius) for image, s in zip(images.astype("float64"), sigmas, strict=True)]
    close(quickest(functools.partial(blur, radius=radius))(images, sigmas), expected)


@both_recipes
@random_cases
@given(st.integers(1, 3), st.sampled_from([(1, 1), (1, 6), (9, 2), (20, 23), (41, 40)]), st.integers(0, 2**32 - 1))
def test_views_are_the_steps_in_turn(recipe, n, image_size, seed):
    rng = np.random.default_rng(seed)
    images = random_images(rng, n, *image_size)
    draws = draw_views(rng, n, image_size, recipe)
    expected = [plain_view(image, draws, b, recipe) for b, image in enumerate(images)]
    close(quickest(functools.partial(apply_views, recipe=recipe))(images, draws), expected, 2 * ROUNDING)


# --- apply_views


@functools.cache
def views(recipe):
    return compiled(functools.partial(apply_views, recipe=recipe))


def batch(recipe, n=6, image_size=(32, 32), seed=0):
    rng = generator(seed, 0, 0)
    return random_images(rng, n, *image_size), draw_views(rng, n, image_size, recipe)


@both_recipes
def test_compiled_and_not_compiled_agree(recipe):
    images, draws = batch(recipe)
    plain = np.asarray(apply_views(images, draws, recipe))  # operation by operation
    close(views(recipe)(images, draws), plain)
    close(compiled(functools.partial(apply_views, recipe=recipe), jit=False)(images, draws), plain)


@both_recipes
def test_it_compiles_once_for_all_steps(recipe):
    compilations = []

    def counted(images, draws):
        compilations.append(1)
        return apply_views(images, draws, recipe)

    apply, images = compiled(counted), ops.convert_to_tensor(batch(recipe)[0])
    results = [np.asarray(apply(images, draw_views(generator(0, step, 0), 6, (32, 32), recipe))) for step in range(4)]
    assert len(compilations) == 1
    assert len({result.tobytes() for result in results}) == 4


@both_recipes
def test_no_image_depends_on_the_others(recipe):
    images, draws = batch(recipe, n=4)
    apply = quickest(functools.partial(apply_views, recipe=recipe))
    together = np.asarray(apply(images, draws))
    for b in (0, 3):
        own = {name: drawn if name == "jitter_order" else drawn[b : b + 1] for name, drawn in draws.items()}
        close(apply(images[b : b + 1], own)[0], together[b])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_views_are_float32(dtype):
    images, draws = batch("simclr")
    found = apply_views(ops.cast(images, dtype), draws, "simclr")
    assert keras.backend.standardize_dtype(found.dtype) == "float32"


@both_recipes
def test_views_stay_in_range(recipe):
    for seed in range(20):
        found = np.asarray(views(recipe)(*batch(recipe, seed=seed)))
        assert found.min() >= -1e-6
        assert found.max() <= 1 + 1e-6


def message(function, *arguments):
    with pytest.raises(ValueError) as error:
        function(*arguments)
    return str(error.value)


def test_mistakes_are_named():
    images, draws = batch("simclr", n=2)
    rng = generator(0, 0, 0)
    no_recipe = "Invalid recipe. Expected one of simclr, spq2021. Received: recipe='moco'"
    assert message(draw_views, rng, 2, (32, 32), "moco") == no_recipe
    assert message(apply_views, images, draws, "moco") == no_recipe
    assert (
        message(draw_views, rng, 0, (32, 32), "simclr")
        == "Invalid size. Expected at least one image and one pixel. Received: size=0, image_size=(32, 32)"
    )
    assert (
        message(draw_views, rng, 2, [32, 0], "simclr")
        == "Invalid size. Expected at least one image and one pixel. Received: size=2, image_size=(32, 0)"
    )
    expected = "Invalid images. Expected floating point (B, H, W, 3). Received: "
    assert message(apply_views, images.astype("uint8"), draws, "simclr") == expected + "uint8, shape (2, 32, 32, 3)"
    assert message(apply_views, images[0], draws, "simclr") == expected + "float32, shape (32, 32, 3)"
    assert message(apply_views, images[..., :1], draws, "simclr") == expected + "float32, shape (2, 32, 32, 1)"
    one = {name: drawn[:1] for name, drawn in draws.items()}
    assert message(apply_views, images, one, "simclr") == (
        "Invalid draws. Expected those of 2 images. Received: those of 1"
    )


# --- what is drawn


@both_recipes
def test_shapes_and_dtypes_never_change(recipe):
    def form(draws):
        return {name: (drawn.shape, drawn.dtype.name) for name, drawn in draws.items()}

    for size in (1, 50):
        forms = [form(draw_views(generator(0, step, 0), size, (32, 40), recipe)) for step in range(5)]
        assert forms == 5 * [
            {
                "boxes": ((size, 4), "int32"),
                "jitter_order": ((4,), "int32"),
                "jitter_factors": ((size, 4), "float32"),
                "blur_sigmas": ((size, 2), "float32"),
                **dict.fromkeys(MASKS, ((size,), "bool")),
            }
        ]


@both_recipes
def test_draws_are_a_function_of_seed_step_and_stream(recipe):
    def draw(*place):
        draws = draw_views(generator(*place), 9, (32, 32), recipe)
        return b"".join(draws[name].tobytes() for name in sorted(draws))

    places = [(seed, step, stream) for seed in (0, 2**32 - 1) for step in (0, 1, 10**6) for stream in (1, 2)]
    drawn = {place: draw(*place) for place in places}
    assert len(set(drawn.values())) == len(places)
    for place in reversed(places):  # whatever was drawn in between
        assert draw(*place) == drawn[place]


@random_cases
@given(st.integers(1, 4), st.integers(1, 50), st.integers(1, 50), st.booleans(), st.integers(0, 2**32 - 1))
def test_boxes_are_the_first_that_fit(n, height, width, smaller, seed):
    found = draw_boxes(np.random.default_rng(seed), n, (height, width), smaller)
    rng = np.random.default_rng(seed)
    areas = rng.uniform(0.08, 1.0, (n, 10)) * height * width
    aspects = np.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3), (n, 10)))
    for box, *tries in zip(found, areas, aspects, strict=True):
        sides = [(round(math.sqrt(a / r)), round(math.sqrt(a * r))) for a, r in zip(*tries, strict=True)]
        fitting = [(h, w) for h, w in sides if 1 <= h <= height - smaller and 1 <= w <= width - smaller]
        if fitting:
            assert tuple(box[2:]) == fitting[0]
        assert (box >= [0, 0, 1, 1]).all()
        assert (box[:2] + box[2:] <= [height, width]).all()


class Largest:
    """A generator whose real numbers are the largest: areas of the whole image, upright or lying."""

    def __init__(self, ratio):
        self.numbers = iter([1.0, math.log(ratio)])

    def uniform(self, low, high, size):
        return np.full(size, next(self.numbers))

    def integers(self, low, high, dtype):
        return np.zeros_like(high, dtype)


@pytest.mark.parametrize("ratio", [3 / 4, 4 / 3])
@pytest.mark.parametrize(
    ("image_size", "simclr", "spq2021"),
    [
        # no box of the whole area fits into a square if it is not square itself
        ((32, 32), (32, 32), (24, 32)),
        ((30, 32), (30, 32), (24, 32)),
        # longer than 3 to 4: as long as 3 to 4 allows. kornia 0.5.10 looks at one of the two sides only
        ((10, 100), (10, 13), (10, 13)),
        ((100, 10), (13, 10), (8, 10)),
        ((1, 9), (1, 1), (1, 1)),
        ((9, 1), (1, 1), (1, 1)),
    ],
)
def test_boxes_where_none_fitted(ratio, image_size, simclr, spq2021):
    for smaller, sides in ((False, simclr), (True, spq2021)):
        assert draw_boxes(Largest(ratio), 2, image_size, smaller)[:, 2:].tolist() == 2 * [list(sides)]


def drawn(recipe, n_step, n=1000, image_size=(32, 32)):
    """n images in each of n_step steps, end to end; jitter_order (n_step, 4)."""
    steps = [draw_views(generator(1, step, 1), n, image_size, recipe) for step in range(n_step)]
    joined = {name: np.concatenate([draws[name] for draws in steps]) for name in steps[0] if name != "jitter_order"}
    return {**joined, "jitter_order": np.stack([draws["jitter_order"] for draws in steps])}


@both_recipes
def test_marginals_are_the_recipes(recipe):
    """p-values of seeded draws of 100,000 images; a probability of .49 for .5 gives p < 1e-9."""
    draws = drawn(recipe, 100)
    n = len(draws["flips"])
    outcomes = sum(draws[mask] * 2**i for i, mask in enumerate(MASKS))
    odds = [np.array([1 - p, p]) for p in (0.5, 0.8, 0.2, 0.5)]
    expected = functools.reduce(lambda joint, each: np.outer(each, joint).ravel(), odds, np.ones(1))
    assert stats.chisquare(np.bincount(outcomes, minlength=16), n * expected).pvalue > 1e-3

    for column, half_width in enumerate((0.4, 0.4, 0.4, 0.1)):
        uniform = stats.uniform(*((1 if column < 3 else 0) - half_width, 2 * half_width))
        assert stats.kstest(draws["jitter_factors"][:, column], uniform.cdf).pvalue > 1e-3
    assert np.abs(np.corrcoef(draws["jitter_factors"].T) - np.eye(4)).max() < 5 / np.sqrt(n)

    if recipe == "simclr":
        assert stats.kstest(draws["blur_sigmas"][:, 0], stats.uniform(0.1, 1.9).cdf).pvalue > 1e-3
        np.testing.assert_array_equal(draws["blur_sigmas"][:, 0], draws["blur_sigmas"][:, 1])
    else:
        assert set(map(tuple, draws["blur_sigmas"].tolist())) == {(np.float32(0.1), np.float32(2))}

    top, left, height, width = draws["boxes"].T
    assert (height.max() == 32) == (width.max() == 32) == (recipe == "simclr")
    for corner, side in ((top, height), (left, width)):  # uniform over the places there are
        for length in (12, 20, 28):
            assert stats.chisquare(np.bincount(corner[side == length], minlength=33 - length)).pvalue > 1e-3


@both_recipes
def test_every_order_is_equally_likely(recipe):
    orders = drawn(recipe, 4800, n=1)["jitter_order"]
    assert (np.sort(orders, axis=1) == np.arange(4)).all()
    counts = np.unique(orders, axis=0, return_counts=True)[1]
    assert len(counts) == 24
    assert stats.chisquare(counts).pvalue > 1e-3


def test_the_blur_has_an_odd_kernel_at_any_size():
    for size in range(1, 600):
        taps, tenth = 2 * radius_for((size, size)) + 1, int(0.1 * size)
        assert taps == (tenth if tenth % 2 else tenth + 1)
        assert radius_for((size, 2 * size)) == radius_for((2 * size, size)) == taps // 2 < size


# --- what kornia recorded: deterministic cases


def recorded_unit(version):
    recorded = golden.load(f"augment_unit_kornia_{version}.npz", golden.SPQ)
    images = recorded["images"].astype("float32") / np.float32(255)
    return recorded, images, VERSIONS[version]


def cases(recorded, prefix):
    """Keys of cases such as "hue/0.05" and the part behind the last slash or underscore; there must be some."""
    found = [(name, name.removeprefix(prefix)) for name in recorded if name.startswith(prefix)]
    assert found
    return found


def nhwc(images):
    return np.moveaxis(images, 1, -1)


@golden.needs_golden
@both_versions
@pytest.mark.parametrize("name", STEP_NAMES)
def test_steps_are_kornias(version, name):
    recorded, images, recipe = recorded_unit(version)
    step = quickest(STEPS[recipe][STEP_NAMES.index(name)])
    for key, factor in cases(recorded, f"{name}/"):
        factors = np.full((len(images), 1, 1, 1), factor, "float32")
        close(step(images, factors), nhwc(recorded[key]))


@golden.needs_golden
@both_versions
def test_conversions_are_kornias(version):
    recorded, images, recipe = recorded_unit(version)
    close(gray(images) + np.zeros(3, "float32"), nhwc(recorded["grayscale"]))
    hsv = to_hsv(images, EPSILON[recipe])
    close(to_rgb(*hsv), nhwc(recorded["hsv_roundtrip"]))
    hue, *others = np.split(nhwc(recorded["hsv"]), 3, axis=-1)
    for found, expected in zip(hsv[1:], others, strict=True):
        close(found, expected)
    # in radians there, with a rounding error of up to 2.4e-7; on a circle
    turned = np.abs(np.asarray(hsv[0]) - hue / (2 * np.pi))
    assert np.minimum(turned, 1 - turned).max() < ROUNDING


@golden.needs_golden
@both_versions
def test_crops_and_flips_are_kornias(version):
    recorded, images, _ = recorded_unit(version)
    n, height, width, _ = images.shape
    whole = np.array([[0, 0, height, width]] * n, "int32")
    flipped = quickest(crop_and_flip)(images, whole, np.ones(n, bool))
    np.testing.assert_array_equal(np.asarray(flipped), nhwc(recorded["hflip"]))
    boxes = {name: box for name, box in recorded.items() if name.endswith("_boxes_xywh")}
    assert boxes
    for name, box in boxes.items():
        found = quickest(crop_and_flip)(images, box[:, [1, 0, 3, 2]], np.zeros(n, bool))
        close(found, nhwc(recorded[name.removesuffix("_boxes_xywh")]), RESIZING)


@golden.needs_golden
@both_versions
def test_blurs_are_kornias(version):
    recorded, images, recipe = recorded_unit(version)
    n, radius = len(images), radius_for(images.shape[1:3])
    for name, sigma in cases(recorded, "blur/isotropic_sigma_"):
        close(blur(images, np.full((n, 2), sigma, "float32"), radius), nhwc(recorded[name]))
    if recipe == "spq2021":
        sigmas = draw_views(generator(0, 0, 0), n, images.shape[1:3], recipe)["blur_sigmas"]
        close(blur(images, sigmas, radius), nhwc(recorded["blur/as_called_sigma_0.1_2.0"]))
        response = recorded["blur/as_called_impulse_response_7x7"]
        dot = np.zeros((1, *response.shape, 1), "float32")
        dot[0, response.shape[0] // 2, response.shape[1] // 2] = 1
        close(blur(dot, sigmas[:1], radius)[0, ..., 0], response)


@golden.needs_golden
@both_versions
def test_jitters_are_kornias(version):
    recorded, images, recipe = recorded_unit(version)
    orders = [name for name in recorded if name.startswith("jitter/") and name.endswith("_order")]
    assert orders
    apply = quickest(functools.partial(jitter, steps=STEPS[recipe]))
    for name in orders:
        factors = recorded[name.replace("_order", "_factors_bcsh")].T
        found = apply(images[: len(factors)], factors, recorded[name].astype("int32"))
        close(found, nhwc(recorded[name.removesuffix("_order")]))


@golden.needs_golden
@both_versions
def test_pipelines_are_kornias(version):
    recorded, _, recipe = recorded_unit(version)
    record = {name: recorded[key] for key, name in cases(recorded, "pipeline/")}
    n = len(record["images"])
    factors = np.stack([record[f"jitter_{name}_factor"] for name in STEP_NAMES], axis=1)
    draws = draw_views(generator(0, 0, 0), n, record["images"].shape[1:3], recipe)
    draws |= {
        "boxes": record["crop_box"][:, [1, 0, 3, 2]].astype("int32"),
        "flips": record["hflip_applied"],
        "jittered": record["jitter_applied"],
        "jitter_order": record["jitter_order"].astype("int32"),
        "jitter_factors": np.where(np.isnan(factors), draws["jitter_factors"], factors),
        "grayed": record["gray_applied"],
        "blurred": record["blur_applied"],
    }
    if "blur_sigma" in record:
        sigmas = record["blur_sigma"][:, None].repeat(2, axis=1)
        draws["blur_sigmas"] = np.where(np.isnan(sigmas), draws["blur_sigmas"], sigmas)
    assert record["crop_applied"].all()
    images = record["images"].astype("float32") / np.float32(255)
    close(quickest(functools.partial(apply_views, recipe=recipe))(images, draws), nhwc(record["out"]), RESIZING)


# --- what kornia recorded: statistics of many calls

FINE = 2**16  # bins of the histograms that pixel quantiles are read from
FLOOR = {"pixel_quantiles": 2 / FINE}
GROUP = 10  # calls; the spread between groups gives the error of statistics that come without one


class Statistics:
    """What the recorded statistics of augmented images are computed from: a histogram, and a few numbers an image."""

    def __init__(self, histogram, rows):
        self.histogram, self.rows = histogram, rows

    @classmethod
    def of(cls, views, blurred):
        fine = np.clip(views * FINE, 0, FINE).astype(np.int64).reshape(-1, 3)
        brightness, spread, per_image = views.mean(axis=-1), np.ptp(views, axis=-1), (1, 2)
        dx, dy = np.abs(np.diff(brightness, axis=2)), np.abs(np.diff(brightness, axis=1))
        return cls(
            np.stack([np.bincount(channel, minlength=FINE + 1) for channel in fine.T]),
            {
                "mean": views.mean(axis=per_image),
                "std": views.std(axis=per_image),
                "square": np.square(views).mean(axis=per_image),
                "zero": (views == 0).mean(axis=per_image),
                "one": (views == 1).mean(axis=per_image),
                "spread": spread.mean(axis=per_image),
                "is_gray": spread.max(axis=per_image) < 1e-6,
                "dx": dx.mean(axis=per_image),
                "dy": dy.mean(axis=per_image),
                "length": np.hypot(dx[:, :-1], dy[:, :, :-1]).mean(axis=per_image),
                "blurred": blurred,
            },
        )

    @classmethod
    def of_all(cls, parts):
        rows = {name: np.concatenate([part.rows[name] for part in parts]).astype("float64") for name in parts[0].rows}
        return cls(sum(part.histogram for part in parts), rows)

    def summary(self, grid):
        rows, means = self.rows, {name: values.mean(axis=0) for name, values in self.rows.items()}
        shares = self.histogram.cumsum(axis=1) / self.histogram.sum(axis=1, keepdims=True)
        blurred = rows["blurred"] == 1

        def quantiles(values):
            return np.quantile(values, grid, axis=0).T

        return {
            "pixel_mean": means["mean"],
            "pixel_mean_of_square": means["square"],
            "pixel_std": np.sqrt(means["square"] - means["mean"] ** 2),
            "pixel_quantiles": np.stack([np.searchsorted(share, grid) / FINE for share in shares]),
            "fraction_pixels_exactly_0": means["zero"],
            "fraction_pixels_exactly_1": means["one"],
            "fraction_gray_samples": means["is_gray"],
            "mean_channel_spread": means["spread"],
            "image_mean_quantiles": quantiles(rows["mean"]),
            "image_mean_std": rows["mean"].std(axis=0),
            "image_std_quantiles": quantiles(rows["std"]),
            "image_std_mean": means["std"],
            **{
                f"grad_{name}_{kind}": function(rows[key])
                for name, key in (("absdx", "dx"), ("absdy", "dy"), ("magnitude", "length"))
                for kind, function in (("mean", np.mean), ("quantiles", quantiles))
            },
            **{
                f"grad_abs{key}_mean_{which}": rows[key][chosen].mean()
                for key in ("dx", "dy")
                for which, chosen in (("blurred", blurred), ("unblurred", ~blurred))
            },
        }


@functools.cache
def recorded_statistics(version):
    recorded = golden.load("augment.npz", golden.SPQ)
    prefix = f"kornia_{version}/"
    own = {name.removeprefix(prefix): values for name, values in recorded.items() if name.startswith(prefix)}
    return own | {name: values for name, values in recorded.items() if "/" not in name}


def calls(version):
    """Draws of as many calls as the record has, each for all its images."""
    recorded = recorded_statistics(version)
    images = recorded["images"]
    for call in range(int(recorded["n_samples"]) // len(images)):
        yield draw_views(generator(5, call, 1), len(images), images.shape[1:3], VERSIONS[version])


def within_errors(found, expected, error, floor=1e-6):
    """Whether a difference stays below five times its standard error (and the rounding error `floor`)."""
    found, expected = np.asarray(found), np.asarray(expected).reshape(np.shape(found))
    return (np.abs(found - expected) < 5 * np.reshape(error, np.shape(found)) + floor).all()


def augmented(version, n_call):
    """Statistics of the views of each of our first n_call calls."""
    images = recorded_statistics(version)["images"].astype("float32") / np.float32(255)
    apply, draws_of_calls = views(VERSIONS[version]), itertools.islice(calls(version), n_call)
    return [Statistics.of(np.asarray(apply(images, draws)), draws["blurred"]) for draws in draws_of_calls]


@golden.needs_golden
@both_versions
def test_means_of_views_are_kornias(version):
    """Of every statistic that is recorded with its standard error, a mean over `n_recorded` calls; ours over fewer."""
    recorded, n_call = recorded_statistics(version), 60
    n_recorded = recorded["n_samples"] / len(recorded["images"])
    found = Statistics.of_all(augmented(version, n_call)).summary(recorded["quantile_grid"])
    names = [name for name in found if f"{name}__se" in recorded]
    assert len(names) >= 10
    for name in names:
        error = recorded[f"{name}__se"] * np.sqrt(1 + n_recorded / n_call)
        assert within_errors(found[name], recorded[name], error, FLOOR.get(name, 1e-6)), name


@golden.needs_golden
@both_versions
@pytest.mark.slow
def test_statistics_of_views_are_kornias(version):
    """All of them, from as many calls; those without a standard error take it from the spread of groups of ours."""
    recorded = recorded_statistics(version)
    grid, n_call = recorded["quantile_grid"], int(recorded["n_samples"]) // len(recorded["images"])
    parts = augmented(version, n_call)
    found = Statistics.of_all(parts).summary(grid)
    groups = [Statistics.of_all(parts[i : i + GROUP]).summary(grid) for i in range(0, n_call, GROUP)]
    for name, value in found.items():
        value, expected = value, recorded[name]
        spread = np.std([group[name] for group in groups], axis=0, ddof=1)
        error = np.sqrt(2) * recorded.get(f"{name}__se", spread / np.sqrt(len(groups)))
        if name.endswith("quantiles") and name != "pixel_quantiles":
            # the smallest and the largest of all have no such error
            value, expected, error = (np.atleast_2d(x)[:, 1:-1] for x in (value, expected, error))
        assert within_errors(value, expected, error, FLOOR.get(name, 1e-6)), name


@golden.needs_golden
@both_versions
@pytest.mark.slow
def test_statistics_after_each_stage_are_kornias(version):
    recorded = recorded_statistics(version)
    images = recorded["images"].astype("float32") / np.float32(255)
    assert recorded["stage_names"].tolist() == ["crop", "hflip", "jitter", "gray", "blur"]
    apply, sums = views(VERSIONS[version]), []
    for draws in calls(version):
        row = []
        for stage in range(5):
            later = {mask: np.zeros(len(images), bool) for mask in MASKS[stage:]}
            augmented = np.asarray(apply(images, draws | later), "float64")
            row.append([augmented.mean(axis=(0, 1, 2)), np.square(augmented).mean(axis=(0, 1, 2))])
        sums.append(row)
    sums = np.array(sums)  # (calls, stages, mean and mean square, channels)
    mean, square = sums.mean(axis=0)[:, 0], sums.mean(axis=0)[:, 1]
    assert within_errors(mean, recorded["stage_mean"], np.sqrt(2) * recorded["stage_mean__se"])
    error = sums[:, :, 1].std(axis=0, ddof=1) * np.sqrt(2 / len(sums))
    assert within_errors(square, recorded["stage_std"] ** 2 + recorded["stage_mean"] ** 2, error)


def same_distribution(counts, other_counts):
    """p-value of a chi-square test that two histograms are of one distribution; rare values are put together."""
    table = np.stack([np.ravel(counts), np.ravel(other_counts)])
    rare = table.sum(axis=0) < 20
    table = np.concatenate([table[:, ~rare], table[:, rare].sum(axis=1, keepdims=True)], axis=1)
    return stats.chi2_contingency(table[:, table.sum(axis=0) > 0]).pvalue


@golden.needs_golden
@both_versions
def test_statistics_of_draws_are_kornias(version):
    recorded = recorded_statistics(version)
    steps = list(calls(version))
    joined = {name: np.concatenate([draws[name] for draws in steps]) for name in steps[0] if name != "jitter_order"}

    applied = [np.ones(len(joined["flips"])), *(joined[mask] for mask in MASKS)]
    share = np.mean(applied, axis=1)
    assert within_errors(share, recorded["applied_fraction"], np.sqrt(2) * recorded["applied_fraction__se"])

    top, left, height, width = joined["boxes"].T
    n = len(recorded["crop_h_hist"])
    joint = np.bincount(height * n + width, minlength=n * n).reshape(n, n)
    assert same_distribution(joint, recorded["crop_joint_hist_h_w"]) > 1e-5
    assert same_distribution(joint.sum(axis=1), recorded["crop_h_hist"]) > 1e-5
    assert same_distribution(joint.sum(axis=0), recorded["crop_w_hist"]) > 1e-5
    assert max(height.max(), width.max()) == np.flatnonzero(recorded["crop_h_hist"]).max()
    if "crop_box_xywh_first_5000" in recorded:
        for ours, theirs in zip((left, top), recorded["crop_box_xywh_first_5000"].T[:2], strict=True):
            assert same_distribution(*(np.bincount(corners, minlength=n) for corners in (ours, theirs))) > 1e-5

    orders = [recorded["jitter_order_permutations"].tolist().index(draws["jitter_order"].tolist()) for draws in steps]
    assert same_distribution(np.bincount(orders, minlength=24), recorded["jitter_order_counts_per_call"]) > 1e-5

    columns = {f"jitter_{name}_factor_quantiles": joined["jitter_factors"][:, i] for i, name in enumerate(STEP_NAMES)}
    if "blur_sigma_quantiles" in recorded:
        columns["blur_sigma_quantiles"] = joined["blur_sigmas"][:, 0]
    for name, values in columns.items():
        # the share of ours below each of their quantiles; they come from the half of the images or more
        below, grid = (values[:, None] < recorded[name]).mean(axis=0), recorded["quantile_grid"]
        error = np.sqrt(grid * (1 - grid) * (1 + 2) / len(values))
        assert within_errors(below, grid, error, floor=10 / len(values)), name
