"""SPQ's head: descriptor and codebook, and the loss that trains them without labels (ICCV 2021)."""

import functools

import keras
from keras import ops

from gpq_tf import augment, losses
from gpq_tf.backbones import resnet
from gpq_tf.heads import arguments
from gpq_tf.ops import compiled
from gpq_tf.optimizers import ConstantThenCosine, TorchAdam
from gpq_tf.quantizer import ProductQuantizer

ARGUMENTS = arguments.with_codebook(8, 4, 16)
PROTOCOL = "train_test"
SMALLEST_SIDE = 1
descriptor_size = arguments.codebook_size
preprocess = resnet.preprocess

# What is drawn, each from its own random stream: the order of an epoch's images, and the two views of a step's.
_ORDER, _FIRST_VIEW, _SECOND_VIEW = 3, 4, 5
_RATE, _L2, _CONSTANT_EPOCHS = 3e-4, 1e-5, 10


@keras.saving.register_keras_serializable("gpq_tf")
class SPQHead(keras.layers.Layer):
    """From features to descriptors (B, D) and codes (B, M), D = n_book * len_code.

    Args:
        n_book, n_word, len_code: int M, K, d.
        seed: int, of the initial values.

    Shapes:
        input: float (B, F), the backbone's features.
        output: float32 (B, D), the descriptor, which the search uses as it is.
    """

    head_name = "spq"
    # How descriptors are compared with codewords: PQIndex's name for it.
    search_metric = "l2"

    def __init__(self, n_book, n_word, len_code, seed=0, **kwargs):
        super().__init__(**kwargs)
        self.seed = seed
        self.projection = keras.layers.Dense(
            n_book * len_code,
            kernel_initializer=keras.initializers.GlorotUniform(seed + 1),
            dtype=self.dtype_policy,
            name="projection",
        )
        self.quantizer = ProductQuantizer(n_book, n_word, len_code, seed + 2, metric="l2", name="quantizer")

    def build(self, input_shape):
        limit = input_shape[-1] ** -0.5  # PyTorch's default for a bias depends on the inputs
        self.projection.bias_initializer = keras.initializers.RandomUniform(-limit, limit, seed=self.seed + 3)
        self.projection.build(input_shape)

    def call(self, features):
        # Distances and losses are taken in float32 in every precision.
        return ops.cast(self.projection(features), "float32")

    def embed(self, descriptors):
        """Raw descriptors -> descriptors as the search uses them: the same."""
        return descriptors

    def encode(self, descriptors):
        """Descriptors float (B, D) -> codes int32 (B, M), compiled by XLA."""
        return self.quantizer.encode(descriptors)

    def search_codebook(self):
        """The codebook as the search uses it, numpy float32 (M, K, d)."""
        return ops.convert_to_numpy(self.quantizer.codebook)

    def losses_of(self, first, second, alpha, temperature):
        """The training loss (ICCV 2021, section 3.2).

        Args:
            first, second: float (B, D), descriptors of two views of the same images.
            alpha: float, scale of the soft assignment.
            temperature: float, of the contrast.

        Returns:
            dict with one float scalar, loss.
        """
        quantized = [self.quantizer(descriptors, alpha=alpha) for descriptors in (first, second)]
        return {"loss": losses.cross_quantized_contrastive(first, second, *quantized, temperature)}

    def get_config(self):
        sizes = {name: getattr(self.quantizer, name) for name in ("n_book", "n_word", "len_code")}
        return {**super().get_config(), **sizes, "seed": self.seed}


def build(architecture, dtype):
    """Backbone and head of a network, built.

    Args:
        architecture: dict, see `heads.complete`.
        dtype: dtype policy.

    Returns:
        (ResNet, SPQHead).
    """
    width, seed = architecture["width_multiplier"], architecture["seed"]
    backbone = resnet.ResNet(width, seed, dtype=dtype, name="backbone")
    sizes = (architecture["n_book"], 2 ** architecture["bn_word"], architecture["len_code"])
    head = SPQHead(*sizes, seed + 100, dtype=dtype, name="head")
    # A model that loads weights must have its variables, whatever image sizes it will see.
    backbone.build((None, None, None, 3))
    head.build((None, resnet.feature_size(width)))
    return backbone, head


def architecture_of(settings):
    """The arguments of the network that settings describe, a dict; `settings_of` goes the other way."""
    return arguments.codebook_of(settings)


def settings_of(architecture):
    """The settings that a network fixes, a dict."""
    return arguments.codebook_settings(architecture)


def kernel_size(architecture):
    """Number of values in all kernels, the codebook included."""
    width = descriptor_size(architecture)
    rows = 2 ** architecture["bn_word"] + resnet.feature_size(architecture["width_multiplier"])
    return resnet.kernel_size(architecture["width_multiplier"]) + width * rows


def file_stem(settings):
    """Beginning of the names of saved models, such as "spq_32bits"."""
    return f"spq_{settings.n_bits}bits"


def steps_per_epoch(data, settings):
    """Steps of one pass over the images; what is left of the last batch is left out of the epoch, as in the original.

    Raises:
        ValueError: if a batch is larger than the number of images.
    """
    available = len(data.unlabelled_images)
    if settings.batch_size > available:
        raise ValueError(
            f"Invalid batch_size. Expected at most {available}, the number of images. "
            f"Received: batch_size={settings.batch_size}"
        )
    return available // settings.batch_size


def draw_batch(data, settings, step):
    """The images of one training step and what their two views need: a pure function of (seed, step).

    Every image comes once an epoch, in an order that is drawn for the epoch.

    Args:
        data: gpq_tf.data.RetrievalData.
        settings: gpq_tf.settings.Settings.
        step: int >= 0.

    Returns:
        dict: images uint8 (B, H, W, 3); first and second, what `augment.draw_views` draws for either view.
    """
    size = settings.batch_size
    epoch, position = divmod(step, steps_per_epoch(data, settings))
    order = augment.generator(settings.seed, epoch, _ORDER).permutation(len(data.unlabelled_images))
    images = data.unlabelled_images[order[position * size : (position + 1) * size]]
    views = (
        augment.draw_views(augment.generator(settings.seed, step, view), size, images.shape[1:3], settings.augment)
        for view in (_FIRST_VIEW, _SECOND_VIEW)
    )
    return {"images": images, **dict(zip(("first", "second"), views, strict=True))}


def is_frozen(settings, epoch):
    """Whether the batch statistics are frozen in this epoch (from 1): with legacy, after the first evaluation.

    The original's evaluation switches the network to inference and nothing switches it back.
    """
    return settings.legacy and bool(settings.eval_epoch) and epoch > settings.eval_epoch


def describe(model, batch, settings, frozen=False):
    """The descriptors of the two views of one batch of `draw_batch`, each through the network by itself.

    Each view is normalised by its own statistics and updates the moving ones, the first view first; when frozen, both
    are normalised by the moving ones, which stay.

    Returns:
        dict: first, second, float32 (B, D).
    """
    images = preprocess(batch["images"])
    views = {view: _views(settings.augment)(images, batch[view]) for view in ("first", "second")}
    return {name: model.describe(view, training=not frozen) for name, view in views.items()}


def compare(model, described, settings):
    """The contrast of what `describe` returned.

    Returns:
        dict of float scalars, see `SPQHead.losses_of`.
    """
    return model.head.losses_of(described["first"], described["second"], settings.alpha, settings.temperature)


@functools.cache
def _views(recipe):
    """`augment.apply_views` by XLA, also where the whole step is not compiled: a quarter of the time."""
    return compiled(functools.partial(augment.apply_views, recipe=recipe))


def learning_rate(settings, steps_per_epoch):
    """3e-4 for 10 epochs, then a cosine that ends at 0 with the last epoch.

    With legacy as the original, which takes the number of steps of an epoch, 195 with CIFAR-10, for the number of
    epochs: the rate is 0 after 205 epochs, and back at 3e-4 after 400. `settings.learning_rate` replaces the first
    rate, where it is given.
    """
    half_period = steps_per_epoch if settings.legacy else max(1, settings.total_epochs - _CONSTANT_EPOCHS)
    return ConstantThenCosine(settings.learning_rate or _RATE, steps_per_epoch, _CONSTANT_EPOCHS, half_period)


def optimizer(settings, steps_per_epoch):
    """Adam as the original sets it: PyTorch's, with 1e-5 times every trained value added to its gradient."""
    return TorchAdam(learning_rate(settings, steps_per_epoch), l2=_L2)
