"""Augmentation on the device. What is drawn is a pure function of (seed, step), made by NumPy on the host.

    generator                               the random numbers of one training step
    draw_flip_and_crop, flip_and_crop       GPQ: a mirror image and a shift by at most four pixels
    crop.draw_boxes, .crop_and_flip         a part of the image stretched to its size, mirrored or not: in SPQ's
                                            recipes, and GPQ's with crop_area
    draw_views, apply_views                 SPQ: crop, mirror image, colours, grey, blur, in one of two RECIPES
    window.draw_crop_and_flip, .crop_and_flip   CGD: a window of a larger image, and a mirror image

Every recipe is a pair: a function that draws small arrays of fixed shapes, and one that computes with them. The second
compiles once and then serves all steps; `gpq_tf.ops.compiled` makes it 4 times as fast.

Keras and keras-cv have layers for much of this. They draw for themselves, from a state that counts calls, so that no
step could be drawn again without those before it; and their maths is seldom a recipe's:

    RandomBrightness       adds, as "spq2021" (one line here); "simclr" multiplies
    RandomContrast         about each channel's mean; the recipes: about the mean grey, and about zero
    RandomSaturation       in HSV, as "spq2021"; "simclr" blends with grey
    RandomHue              in HSV, as both
    RandomColorJitter      these four on every image, always in the same order; the recipes draw which images and order
    RandomGrayscale        weights .2989, .587, .114; the recipes: .299, .587, .114
    RandomGaussianBlur     zeros beyond the border, and Keras draws one pair of widths for the whole batch; the recipes
                           mirror the border, and "simclr" draws a width for each image
    RandomCropAndResize    keras-cv: one try, cut to the image, fractions of pixels, a uniform aspect ratio; the
                           recipes: ten tries, whole pixels, a log-uniform ratio
    RandomFlip             draws for itself; the resizing mirrors at no cost

What Keras has without drawing is used: the conversions between RGB and HSV (keras.ops.image), as in its RandomHue.
"""

from gpq_tf.augment.draws import generator
from gpq_tf.augment.flip_crop import draw_flip_and_crop, flip_and_crop
from gpq_tf.augment.views import RECIPES, apply_views, draw_views

__all__ = ["RECIPES", "apply_views", "draw_flip_and_crop", "draw_views", "flip_and_crop", "generator"]
