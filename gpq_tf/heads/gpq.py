"""GPQ's head: descriptor, codebook and class prototypes, and the losses that train them (CVPR 2020)."""

import functools

import keras
import numpy as np
from keras import ops

from gpq_tf import augment, losses
from gpq_tf.augment import crop
from gpq_tf.backbones import vgg
from gpq_tf.heads import arguments
from gpq_tf.ops import compiled, join_books, l2_normalize, normalize_books, reverse_gradient, split_books
from gpq_tf.quantizer import ProductQuantizer, soft_assign

ARGUMENTS = {**arguments.with_codebook(12, 4, 12), "n_classes": arguments.integer(10, 1, 100_000)}
PROTOCOL = "gpq"
# The network halves height and width three times.
SMALLEST_SIDE = 8
descriptor_size = arguments.codebook_size
preprocess = vgg.preprocess

_RATE = 2e-4
# What a training step draws, each from its own random stream.
_LABELLED, _UNLABELLED, _BOXES = 1, 2, 3


@keras.saving.register_keras_serializable("gpq_tf")
class GPQHead(keras.layers.Layer):
    """From pooled features to descriptors (B, D) and codes (B, M), D = n_book * len_code.

    Args:
        n_book, n_word, len_code: int M, K, d.
        n_classes: int C, number of class prototypes.
        legacy: bool, search with descriptors and codewords as they are, not scaled to unit length book by book:
            what the original does, although its codes come from normalised codewords.
        seed: int, of the initial values.

    Shapes:
        input: float (B, F), the backbone's features.
        output: float32 (B, D), the raw descriptor.
    """

    head_name = "gpq"
    # How descriptors are compared with codewords: PQIndex's name for it.
    search_metric = "inner_product"

    def __init__(self, n_book, n_word, len_code, n_classes, legacy=False, seed=0, **kwargs):
        super().__init__(**kwargs)
        self.n_classes, self.legacy, self.seed = n_classes, legacy, seed
        initializer = keras.initializers.GlorotUniform
        self.projection = keras.layers.Dense(
            n_book * len_code,
            kernel_initializer=initializer(seed + 1),
            dtype=self.dtype_policy,
            name="projection",
        )
        self.quantizer = ProductQuantizer(n_book, n_word, len_code, seed + 2, name="quantizer")
        self.prototypes = self.add_weight(
            name="prototypes",
            shape=(n_classes, n_book * len_code),
            initializer=initializer(seed + 3),
            dtype="float32",
            autocast=False,
        )
        # XLA for this part also where the whole step is not compiled; inside a compiled step it dissolves.
        self._soft_assign = compiled(soft_assign)

    def build(self, input_shape):
        self.projection.build(input_shape)

    def call(self, features):
        # Distances and losses are taken in float32 in every precision.
        return ops.cast(self.projection(features), "float32")

    def embed(self, descriptors):
        """Raw descriptors -> descriptors as the search uses them: unit sub-vectors, raw with legacy."""
        return descriptors if self.legacy else normalize_books(descriptors, self.quantizer.n_book)

    def encode(self, descriptors):
        """Descriptors float (B, D) -> codes int32 (B, M), compiled by XLA."""
        return self.quantizer.encode(descriptors)

    def search_codebook(self):
        """The codebook as the search uses it, numpy float32 (M, K, d): unit codewords, raw with legacy."""
        codebook = self.quantizer.codebook
        return ops.convert_to_numpy(codebook if self.legacy else l2_normalize(codebook.value))

    def pulled_codebook(self, alpha):
        """The codebook that training assigns images to: each codeword pulled towards the prototypes it lies near.

        The search does not pull them, neither ours nor the original's.

        Args:
            alpha: float, scale of the soft assignment.

        Returns:
            float (M, K, d), unit codewords: each is softly assigned to the C prototypes of its book.
        """
        n_book = self.quantizer.n_book
        prototypes = normalize_books(self.prototypes, n_book)
        codewords = join_books(ops.transpose(self.quantizer.codebook, (1, 0, 2)))
        return as_codebook(self._soft_assign(codewords, as_codebook(prototypes, n_book), alpha), n_book)

    def losses_of(self, raw_labelled, labels, raw_unlabelled, alpha, beta, lam_1, lam_2):
        """The training losses (CVPR 2020, equation 10: N-PQ + lam_1 * entropy + lam_2 * classification).

        Args:
            raw_labelled: float (B, D), raw descriptors of labelled images.
            labels: int (B,).
            raw_unlabelled: float (B', D), raw descriptors of unlabelled images.
            alpha: float, scale of the soft assignment.
            beta: float, scale of features and prototypes in the classifier and the entropy.
            lam_1: float, weight of the entropy loss.
            lam_2: float, weight of the classification loss.

        Returns:
            dict of float scalars: loss (the sum to minimise), hash, cls, ent.
        """
        n_book = self.quantizer.n_book
        onehot = ops.one_hot(labels, self.n_classes)
        same_class = ops.matmul(onehot, ops.transpose(onehot))
        label_similarity = same_class / ops.sum(same_class, axis=1, keepdims=True)

        prototypes = normalize_books(self.prototypes, n_book)
        labelled = normalize_books(raw_labelled, n_book)
        unlabelled = normalize_books(reverse_gradient(raw_unlabelled), n_book)
        quantized = self._soft_assign(labelled, self.pulled_codebook(alpha), alpha)

        logits = losses.mean_book_similarity(beta * labelled, beta * prototypes, n_book)
        hash_loss = losses.n_pair_product_quantization(label_similarity, labelled, quantized, n_book)
        class_loss = losses.classification(onehot, logits)
        entropy_loss = losses.subspace_entropy(beta * unlabelled, beta * prototypes, n_book)
        total = hash_loss + lam_1 * entropy_loss + lam_2 * class_loss
        return {"loss": total, "hash": hash_loss, "cls": class_loss, "ent": entropy_loss}

    def get_config(self):
        sizes = {name: getattr(self.quantizer, name) for name in ("n_book", "n_word", "len_code")}
        own = {"n_classes": self.n_classes, "legacy": self.legacy, "seed": self.seed}
        return {**super().get_config(), **sizes, **own}


def build(architecture, dtype):
    """Backbone and head of a network, built.

    Args:
        architecture: dict, see `heads.complete`.
        dtype: dtype policy.

    Returns:
        (VGG, GPQHead).
    """
    width, seed = architecture["width_multiplier"], architecture["seed"]
    backbone = vgg.VGG(width, seed, dtype=dtype, name="backbone")
    sizes = (architecture["n_book"], 2 ** architecture["bn_word"], architecture["len_code"], architecture["n_classes"])
    head = GPQHead(*sizes, architecture["legacy"], seed + 100, dtype=dtype, name="head")
    # A model that loads weights must have its variables, whatever image sizes it will see.
    backbone.build((None, None, None, 3))
    head.build((None, vgg.feature_size(width)))
    return backbone, head


def architecture_of(settings):
    """The arguments of the network that settings describe, a dict; `settings_of` goes the other way."""
    return {**arguments.codebook_of(settings), "n_classes": settings.n_CLASSES}


def settings_of(architecture):
    """The settings that a network fixes, a dict."""
    return {**arguments.codebook_settings(architecture), "n_CLASSES": architecture["n_classes"]}


def kernel_size(architecture):
    """Number of values in all kernels, codebook and prototypes included."""
    width = descriptor_size(architecture)
    rows = 2 ** architecture["bn_word"] + architecture["n_classes"] + vgg.feature_size(architecture["width_multiplier"])
    return vgg.kernel_size(architecture["width_multiplier"]) + width * rows


def as_codebook(words, n_book):
    """Rows (K, M * d) -> books (M, K, d)."""
    return ops.transpose(split_books(words, n_book), (1, 0, 2))


def file_stem(settings):
    """Beginning of the names of saved models, such as "gpq_48bits"."""
    return f"gpq_{settings.n_bits}bits"


def steps_per_epoch(data, settings):
    """Steps of one pass over the labelled images: 10 for CIFAR-10's 5,000 in batches of 500.

    Raises:
        ValueError: if a batch is larger than the number of labelled or of unlabelled images.
    """
    available = min(len(data.labelled_labels), len(data.unlabelled_images))
    if settings.batch_size > available:
        raise ValueError(
            f"Invalid batch_size. Expected at most {available}, the number of labelled (or unlabelled) images. "
            f"Received: batch_size={settings.batch_size}"
        )
    return len(data.labelled_labels) // settings.batch_size


def draw_batch(data, settings, step):
    """The images of one training step, with what their augmentation needs: a pure function of (seed, step).

    Labelled and unlabelled images are drawn without replacement within the batch, anew at every step, as the original.

    Args:
        data: gpq_tf.data.RetrievalData.
        settings: gpq_tf.settings.Settings.
        step: int >= 0.

    Returns:
        dict of numpy arrays: images uint8 (2B, H, W, 3), labelled first; labels int32 (B,); flips bool (2B,);
        offsets int32 (2B, 2), or with settings.crop_area boxes int32 (2B, 4).
    """
    size = settings.batch_size
    rng = augment.generator(settings.seed, step, _LABELLED)
    labelled = rng.choice(len(data.labelled_labels), size, replace=False)
    draws = [augment.draw_flip_and_crop(rng, size)]
    rng = augment.generator(settings.seed, step, _UNLABELLED)
    unlabelled = rng.choice(len(data.unlabelled_images), size, replace=False)
    draws.append(augment.draw_flip_and_crop(rng, size))
    flips, offsets = (np.concatenate(parts) for parts in zip(*draws, strict=True))
    images = np.concatenate([data.labelled_images[labelled], data.unlabelled_images[unlabelled]])
    labels = data.labelled_labels[labelled].astype("int32")
    batch = {"images": images, "labels": labels, "flips": flips}
    if settings.crop_area is None:
        return {**batch, "offsets": offsets}
    rng = augment.generator(settings.seed, step, _BOXES)
    return {**batch, "boxes": crop.draw_boxes(rng, 2 * size, images.shape[1:3], least_area=settings.crop_area)}


def is_frozen(settings, epoch):
    """Whether training has stopped updating the batch statistics in this epoch: never."""
    return False


def describe(model, batch, settings, frozen=False):
    """The descriptors of one batch of `draw_batch`, in training mode.

    The labelled and the unlabelled half are normalised each by its own statistics, and each updates the moving ones,
    labelled first.

    Returns:
        dict: labelled, unlabelled, float32 (B, D), raw; labels, int (B,).
    """
    crops = "boxes" in batch
    drawn = ("boxes", "flips") if crops else ("flips", "offsets")
    images = _windows(crops)(preprocess(batch["images"]), *(batch[name] for name in drawn))
    size = batch["labels"].shape[0]
    labelled = model.describe(images[:size], training=True)
    unlabelled = model.describe(images[size:], training=True)
    return {"labelled": labelled, "unlabelled": unlabelled, "labels": batch["labels"]}


@functools.cache
def _windows(crops):
    """Crops or shifts by XLA, also where the whole step is not compiled: a quarter of the time.

    Without `preprocess`, since XLA multiplies by the deviations' reciprocals, and rounds otherwise than the original.
    """
    return compiled(crop.crop_and_flip if crops else augment.flip_and_crop)


def compare(model, described, settings):
    """The losses of what `describe` returned.

    Returns:
        dict of float scalars, see `GPQHead.losses_of`.
    """
    weights = {name: getattr(settings, name) for name in ("alpha", "beta", "lam_1", "lam_2")}
    return model.head.losses_of(described["labelled"], described["labels"], described["unlabelled"], **weights)


def learning_rate(settings=None, steps_per_epoch=None):
    """The original's schedule, a function of the step (from 0): 2e-4, times .95 after every 100 steps, in any run.

    `settings.learning_rate` replaces the first rate, where it is given.
    """
    rate = (settings and settings.learning_rate) or _RATE
    return keras.optimizers.schedules.ExponentialDecay(rate, 100, 0.95, staircase=True)


def optimizer(settings=None, steps_per_epoch=None):
    """Adam as the original sets it: beta_1 .5, epsilon 1e-8, `learning_rate`."""
    return keras.optimizers.Adam(learning_rate(settings, steps_per_epoch), beta_1=0.5, beta_2=0.999, epsilon=1e-8)
