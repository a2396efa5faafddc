"""SPQ's augmentation: crop, mirror image, colour jitter, grey, blur; as SimCLR has them, or as SPQ was trained.

"simclr" is what the paper names: SimCLR's recipe (ICML 2020, appendix A) at half its strength of colours, computed as
kornia 0.9 does. "spq2021" is what the published program did with the kornia 0.5.10 that it asks for: brightness is
added, contrast multiplies, saturation scales in HSV, and all blurring is horizontal, because the range of widths
(.1, 2) was taken for the widths downwards and across.
"""

import keras
import numpy as np
from keras import ops

from gpq_tf.augment.blur import blur, radius_for
from gpq_tf.augment.color import STEPS, gray, jitter
from gpq_tf.augment.crop import crop_and_flip, draw_boxes

RECIPES = tuple(STEPS)
# How likely each is, for every image.
FLIP, JITTER, GRAY, BLUR = 0.5, 0.8, 0.2, 0.5
# Factors of brightness, contrast and saturation are 1 +- .4; hue is shifted by up to a tenth of a turn.
STRENGTH = np.array([0.4, 0.4, 0.4, 0.1])
UNCHANGED = np.array([1.0, 1.0, 1.0, 0.0])
SIGMA = (0.1, 2.0)


def draw_views(rng, size, image_size, recipe):
    """Draw what `apply_views` does to each image of a batch, and the one order of the jitter for the batch.

    Args:
        rng: numpy.random.Generator.
        size: int B.
        image_size: (H, W), int.
        recipe: str, one of `RECIPES`.

    Returns:
        dict of numpy arrays, always of these shapes and dtypes, so that a compiled `apply_views` serves every step:
        boxes int32 (B, 4), top, left, height and width of the crop in pixels;
        flips, jittered, grayed, blurred bool (B,), what is done to which image;
        jitter_order int32 (4,), a permutation of 0 brightness, 1 contrast, 2 saturation, 3 hue;
        jitter_factors float32 (B, 4), in that numbering, hue in turns;
        blur_sigmas float32 (B, 2), downwards and across, in pixels.

    Raises:
        ValueError: if there is no such recipe, or a size is not positive.

    Example:
        >>> draws = draw_views(np.random.default_rng(0), 256, (32, 32), "simclr")
        >>> draws["boxes"].shape, sorted(draws["jitter_order"].tolist())
        ((256, 4), [0, 1, 2, 3])
    """
    _check_recipe(recipe)
    if size < 1 or min(image_size) < 1:
        raise ValueError(
            f"Invalid size. Expected at least one image and one pixel. "
            f"Received: size={size}, image_size={tuple(image_size)}"
        )
    boxes = draw_boxes(rng, size, image_size, smaller=recipe == "spq2021")
    flips, jittered, grayed, blurred = rng.random((4, size)) < np.array([[FLIP], [JITTER], [GRAY], [BLUR]])
    sigmas = rng.uniform(*SIGMA, (size, 1)).repeat(2, axis=1) if recipe == "simclr" else np.tile(SIGMA, (size, 1))
    return {
        "boxes": boxes,
        "flips": flips,
        "jittered": jittered,
        "jitter_order": rng.permutation(4).astype("int32"),
        "jitter_factors": (UNCHANGED + rng.uniform(-STRENGTH, STRENGTH, (size, 4))).astype("float32"),
        "grayed": grayed,
        "blurred": blurred,
        "blur_sigmas": sigmas.astype("float32"),
    }


def apply_views(images, draws, recipe):
    """Turn images into views of them, as drawn.

    Args:
        images: float (B, H, W, 3), in 0..1.
        draws: dict of `draw_views` for B images of (H, W).
        recipe: str, the one that was drawn for.

    Returns:
        float32 (B, H, W, 3), in 0..1 up to rounding.

    Raises:
        ValueError: if there is no such recipe, the images are not as above, or the draws are for another number of
            images.

    Example:
        >>> draws = draw_views(np.random.default_rng(0), 2, (32, 32), "simclr")
        >>> apply_views(np.zeros((2, 32, 32, 3), "float32"), draws, "simclr").shape == (2, 32, 32, 3)
        True
    """
    _check_recipe(recipe)
    _check_images(images, draws)
    images = crop_and_flip(ops.cast(images, "float32"), draws["boxes"], draws["flips"])
    jittered = jitter(images, draws["jitter_factors"], draws["jitter_order"], STEPS[recipe])
    images = _where(draws["jittered"], jittered, images)
    images = _where(draws["grayed"], gray(images), images)
    blurred = blur(images, draws["blur_sigmas"], radius_for(images.shape[1:3]))
    return _where(draws["blurred"], blurred, images)


def _where(chosen, changed, images):
    return ops.where(chosen[:, None, None, None], changed, images)


def _check_recipe(recipe):
    if recipe not in RECIPES:
        raise ValueError(f"Invalid recipe. Expected one of {', '.join(RECIPES)}. Received: recipe={recipe!r}")


def _check_images(images, draws):
    dtype = keras.backend.standardize_dtype(images.dtype)
    if not keras.backend.is_float_dtype(dtype) or len(images.shape) != 4 or images.shape[-1] != 3:
        raise ValueError(
            f"Invalid images. Expected floating point (B, H, W, 3). Received: {dtype}, shape {tuple(images.shape)}"
        )
    n_image, n_drawn = images.shape[0], draws["boxes"].shape[0]
    if None not in (n_image, n_drawn) and n_image != n_drawn:  # one drawing would quietly serve all images
        raise ValueError(f"Invalid draws. Expected those of {n_image} images. Received: those of {n_drawn}")
