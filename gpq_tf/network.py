"""RetrievalModel: preprocessing, backbone and head in one Keras model that takes uint8 images."""

from pathlib import Path

import keras
import numpy as np
from keras import ops

from gpq_tf import heads, model_file
from gpq_tf.data import lazy
from gpq_tf.ops import compiled_call, frozen_call
from gpq_tf.settings import PRECISIONS

# Images encoded at a time; large enough to keep a processor busy, small enough for its memory.
BATCH_SIZE = 500


@keras.saving.register_keras_serializable("gpq_tf")
class RetrievalModel(keras.Model):
    """From uint8 images to descriptors and compact codes.

    Args:
        head: str, "gpq", "spq" or "cgd". What else there is depends on it; of the first two:
        n_book: int M, codebooks; 12 for gpq, 8 for spq.
        bn_word: int, bits a book, 4; K = 2 ** bn_word codewords.
        len_code: int d, length of a codeword, 12 for gpq, 16 for spq; D = M * d.
        n_classes: int C, class prototypes (gpq only, used in training only), 10.
        width_multiplier: float, scales every channel count of the backbone, 1.

        Those of cgd are `layout`, see gpq_tf.backbones.resnet_v1, and those of gpq_tf.heads.cgd.CGDHead. And of all:
        legacy: bool, behave as the original does where it is at fault (docs/legacy.md), False.
        seed: int, of the initial values, 0.

    Shapes:
        input: uint8 (B, H, W, 3), H and W at least 8 (gpq).
        output: float32 (B, D), what `embed` returns.

    Raises:
        ValueError: if an argument is unknown or out of range, or Keras is configured for channels_first.

    Example:
        >>> model = RetrievalModel(n_book=3, len_code=4, width_multiplier=1 / 64)
        >>> images = np.zeros((2, 32, 32, 3), "uint8")
        >>> model.embed(images).shape, model.encode(images).shape, model.codebook.shape
        ((2, 12), (2, 3), (3, 16, 4))
    """

    def __init__(self, head="gpq", *, dtype=None, **arguments):
        if keras.config.image_data_format() != "channels_last":
            raise ValueError(
                "Invalid image_data_format. Expected channels_last, since images are (N, H, W, 3). "
                f"Received: {keras.config.image_data_format()}, from Keras's configuration file"
            )
        architecture = heads.complete(head, arguments)
        # A name without a number behind it, which the file would hold: equal models make equal files.
        super().__init__(name="retrieval_model", dtype=dtype)
        self.architecture = architecture
        self.record = {}
        self.source = None
        self.training_state = None
        self._recipe = heads.recipe(head)
        self.backbone, self.head = self._recipe.build(architecture, self.dtype_policy)
        self.built = True
        self._describe = compiled_call(self, self._describe_images)
        self._embed = compiled_call(self, self.call)

    @property
    def head_name(self):
        """str, "gpq", "spq" or "cgd"."""
        return self.head.head_name

    @property
    def search_metric(self):
        """str, the metric of a PQIndex for this model: "inner_product" (gpq), "l2" (spq), "squared_l2" (cgd)."""
        return self.head.search_metric

    @property
    def codebook(self):
        """numpy float32 (M, K, d), as the search uses it: gpq's codewords have unit length, but for legacy.

        Raises:
            ValueError: if the model has no codebook (cgd with n_book=0).
        """
        self._check_codebook()
        return self.head.search_codebook()

    def preprocess(self, images):
        """uint8 images (B, H, W, 3) -> float32 (B, H, W, 3), as the backbone takes them. A tensor operation."""
        return self._recipe.preprocess(images)

    def describe(self, preprocessed, training=False):
        """Preprocessed images, float (B, H, W, 3) -> raw descriptors, float32 (B, D). A tensor operation."""
        return self.head(self.backbone(preprocessed, training=training))

    def call(self, images, training=False):
        return self.head.embed(self.describe(self.preprocess(images), training=training))

    def embed(self, images, progress=None):
        """Descriptors as the search uses them.

        Args:
            images: uint8 (N, H, W, 3), any H and W (for gpq of at least 8); never resized.
            progress: callable that wraps the iterable of batches, such as tqdm.tqdm, or None.

        Returns:
            numpy float32 (N, D); gpq: sub-vectors of unit length (raw with legacy), cgd: of unit length.

        Raises:
            ValueError: if `images` has another shape or dtype.
        """
        width = self._recipe.descriptor_size(self.architecture)
        return self._in_batches(self._embed, images, progress, width, "float32")

    def encode(self, images, progress=None):
        """Codes of images: the nearest codeword of every book.

        Args:
            images: uint8 (N, H, W, 3), any H and W (for gpq of at least 8); never resized.
            progress: callable that wraps the iterable of batches, such as tqdm.tqdm, or None.

        Returns:
            numpy (N, M) in the smallest unsigned type that holds K - 1.

        Raises:
            ValueError: if `images` has another shape or dtype, or the model has no codebook (cgd with n_book=0).
        """
        self._check_codebook()
        dtype = np.min_scalar_type(2 ** self.architecture["bn_word"] - 1)
        n_book = self.architecture["n_book"]
        return self._in_batches(lambda batch: self.head.encode(self._describe(batch)), images, progress, n_book, dtype)

    def freeze(self):
        """Embed and encode with the present weights from now on: faster for one image or a few at a time.

        Not for large batches, in which it is slower (`ops.frozen_call`), nor for a model that is trained any further:
        later changes of its weights do not reach `embed` and `encode`. On TensorFlow only; elsewhere nothing changes.
        """
        if keras.backend.backend() != "tensorflow":
            return
        self._describe = frozen_call(self, self._describe_images)
        self._embed = frozen_call(self, self.call)

    def _describe_images(self, images):
        return self.describe(self.preprocess(images))

    def _check_codebook(self):
        if not self.architecture["n_book"]:
            raise ValueError(
                f"Invalid model. Expected one with a codebook. Received: {self.head_name} without one; "
                "`gpq-tf quantize` fits one to its descriptors"
            )

    def _in_batches(self, function, images, progress, width, dtype):
        _check_images(images, self._recipe.SMALLEST_SIDE)
        out = np.empty((len(images), width), dtype)
        starts = range(0, len(images), BATCH_SIZE)

        def batch_from(start):
            return np.asarray(images[start : start + BATCH_SIZE])

        # What has to be made is made while the batch before is computed.
        batches = (lazy.ahead if isinstance(images, lazy.LazyImages) else map)(batch_from, starts)
        for start in progress(starts) if progress else starts:
            batch = next(batches)
            size = len(batch)
            if size < BATCH_SIZE < len(images):
                # Filled up, so that the compiled function sees one shape only.
                batch = np.concatenate([batch, np.repeat(batch[-1:], BATCH_SIZE - size, axis=0)])
            out[start : start + size] = ops.convert_to_numpy(function(batch))[:size]
        return out

    def save(self, filepath, overwrite=True, weights_dtype="float32"):
        """Write the model as one checksummed .keras file, atomically.

        With it go `record`, a dict about its making, and `training_state` (see gpq_tf.training_state) where it is not
        None: train.py sets both. A loaded model has the record, but not the state.

        Args:
            filepath: str or Path ending in .keras.
            overwrite: bool, False to refuse to replace a file.
            weights_dtype: "float32", or "float16" for half the size: kernels and codebook are rounded to 16 bits,
                vectors stay.

        Raises:
            ValueError: if the name does not end in .keras, or the file exists and `overwrite` is False.
        """
        model_file.write(self, filepath, overwrite, weights_dtype)

    def get_config(self):
        return dict(self.architecture)

    @classmethod
    def from_config(cls, config):
        return cls(**config)


def load_model(path_or_name, legacy=None, precision="float32"):
    """Load a model that `RetrievalModel.save` wrote, or a shipped one by its name.

    Nothing in the file is executed: it holds sizes, which are checked, and weights, whose checksum is verified.

    Args:
        path_or_name: path of a .keras file, or the name of shipped weights.
        legacy: bool, search as the original did where it is at fault; None takes what the file says.
        precision: "float32", "mixed_bfloat16" or "mixed_float16", in which the network computes. Descriptors are
            float32 in any case.

    Returns:
        RetrievalModel. `model.record` is what was saved about its making (dict), `model.source` its name and a sha256
        of architecture and weights, which a PQIndex keeps with its codes.

    Raises:
        ValueError: if there is no such file or name, the file is not a whole model, or `precision` is another.

    Example:
        >>> model = load_model("gpq-cifar10-48bits")  # doctest: +SKIP
        >>> codes = model.encode(images)  # doctest: +SKIP
    """
    if legacy not in (None, True, False):
        raise ValueError(f"Invalid legacy. Expected True, False or None. Received: legacy={legacy!r}")
    if precision not in PRECISIONS:
        raise ValueError(f"Invalid precision. Expected one of {', '.join(PRECISIONS)}. Received: {precision!r}")
    file = model_file.read(find_model(path_or_name))
    architecture = file.architecture if legacy is None else {**file.architecture, "legacy": bool(legacy)}
    model = RetrievalModel(**architecture, dtype=precision)
    model_file.load_weights(model, file)
    model.record = file.record
    model.source = {"name": str(path_or_name), "sha256": model_file.fingerprint(file, architecture)}
    return model


def in_precision(model, precision):
    """The same model, computing in another precision; `model` itself where that is its own.

    Args:
        model: RetrievalModel.
        precision: "float32", "mixed_bfloat16" or "mixed_float16".
    """
    if model.dtype_policy.name == precision:
        return model
    other = RetrievalModel(**model.architecture, dtype=precision)
    for old, new in zip(model.weights, other.weights, strict=True):
        new.assign(old)
    other.record, other.source = model.record, model.source
    return other


def find_model(path_or_name):
    """The path of a .keras file, given as a path or as the name of shipped weights.

    Raises:
        ValueError: if there is neither; the message lists the shipped names. If a shipped file is not the one that
            was shipped, by its sha256.
    """
    if not isinstance(path_or_name, str | Path):
        raise ValueError(f"Invalid model. Expected a path or a name. Received: {path_or_name!r}")
    path = Path(path_or_name)
    if path.suffix == ".keras" and path.is_file():
        return path
    shipped = {file.stem: file for file in (Path(__file__).parent / "weights").glob("*.keras")}
    if str(path_or_name) in shipped:
        model_file.check_shipped(shipped[str(path_or_name)])
        return shipped[str(path_or_name)]
    found = "is not a .keras file" if path.exists() else "does not exist"
    raise ValueError(
        f"Invalid model. Expected a .keras file or one of {', '.join(sorted(shipped)) or 'no shipped names'}. "
        f"Received: {str(path_or_name)!r}, which {found}; `gpq-tf convert` makes one of the original's files"
    )


def _check_images(images, smallest_side):
    shape, dtype = getattr(images, "shape", None), getattr(images, "dtype", None)
    if dtype != np.uint8 or shape is None or len(shape) != 4 or shape[3] != 3 or min(shape[1:3]) < smallest_side:
        raise ValueError(
            f"Invalid images. Expected uint8 (N, H, W, 3) with H and W at least {smallest_side}. "
            f"Received: {type(images).__name__ if shape is None else f'{dtype} {shape}'}"
        )
