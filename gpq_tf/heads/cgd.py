"""CGD's head: global descriptors combined to one, and the losses that train it (arXiv 1903.10663)."""

import functools

import keras
from keras import ops

from gpq_tf import augment, losses
from gpq_tf.augment import window
from gpq_tf.backbones import layouts, resnet_v1
from gpq_tf.centred_quantizer import CentredQuantizer
from gpq_tf.data import sampling
from gpq_tf.descriptors import gem, mac, spoc
from gpq_tf.heads import arguments
from gpq_tf.ops import compiled, l2_normalize_added

LETTERS = "SMG"
COMBINATIONS = ("concat", "sum")
CLASSIFIER_PLACES = ("pooled", "dense", "normalized")
# Of CGDHead, and `layout`, which describes the backbone (gpq_tf.backbones.layouts).
ARGUMENTS = {
    "layout": arguments.Argument(resnet_v1.RESNET50, layouts.is_layout, "a description of a backbone"),
    "descriptors": arguments.Argument("SMG", lambda value: _are_letters(value), "distinct letters of S, M and G"),
    "n_dim": arguments.integer(1536, 0, 2**20),
    "combination": arguments.choice("concat", COMBINATIONS),
    "gem_p": arguments.number(3.0, 1000),
    "learn_p": arguments.boolean(False),
    "n_classes": arguments.integer(0, 0, 1_000_000),
    "use_bias": arguments.boolean(False),
    "gem_floor": arguments.number(1e-6, 1, above_0=False),
    "l2_epsilon": arguments.number(1e-10, 1, above_0=False),
    "normalize_branches": arguments.boolean(True),
    "normalize_combined": arguments.boolean(True),
    "classifier_place": arguments.choice("pooled", CLASSIFIER_PLACES),
    "n_book": arguments.integer(0, 0, 256),
    "bn_word": arguments.integer(8, 1, 16),
    "rotated": arguments.boolean(False),
}
PROTOCOL = "unseen_classes"
SMALLEST_SIDE = 1
# Arguments of the network that settings have under the same name.
_SETTINGS = ("descriptors", "n_dim", "combination", "gem_p", "learn_p", "n_book", "bn_word")
preprocess = resnet_v1.preprocess

# What a training step draws, from a random stream of its own.
_BATCH = 6
# The first rate, and the 15ths of a run after which it falls to a tenth. From weights: the paper's rate, and what its
# authors did with CUB-200-2011 (github.com/naver/cgd/issues/3), 400 and 800 of 1,500 steps. From scratch, which the
# paper does not do, a network would stop learning there: ours.
_RATE, _DROPS = 1e-4, (4, 8)
_RATE_FROM_SCRATCH, _DROPS_FROM_SCRATCH = 3e-3, (9, 12)


@keras.saving.register_keras_serializable("gpq_tf")
class CGDHead(keras.layers.Layer):
    """From feature maps to descriptors (B, D) of unit length.

    Each branch pools the map (`gpq_tf.descriptors`), reduces it by a dense layer and scales it to unit length; the
    branches are put side by side or added up, and scaled again (CGD, section 3.2). The auxiliary classifier takes the
    first branch (section 3.3). With `n_book` descriptors are product-quantized as well, which the paper does not do.

    Args:
        descriptors: str, distinct letters of S (SPoC), M (MAC) and G (GeM), in the order in which they are combined.
        n_dim: int D, or 0 for pooled features as they are, without dense layers.
        combination: "concat", branches of D / len(descriptors) values, or "sum", branches of D values.
        gem_p: float > 0, GeM's power; where it begins if it is learnt.
        learn_p: bool, whether GeM's power is learnt. The paper allows both and has it fixed at 3 in its experiments.
        n_classes: int C of the auxiliary classifier, or 0 for none.
        seed: int, of the initial values.
        use_bias: bool, whether the branches' dense layers have a bias.
        gem_floor: float >= 0, see `descriptors.gem`.
        l2_epsilon: float >= 0, see `ops.l2_normalize_added`.
        normalize_branches, normalize_combined: bool, whether lengths are made 1 before and after the combination.
        classifier_place: what of the first branch the classifier takes: "pooled" as in the paper, "dense" (behind the
            dense layer) or "normalized".
        n_book, n_word: int M, K of the codebook (M, K, D / M); 0 books for none. Its codewords begin where sub-vectors
            lie, and go where they go (`centred_quantizer`). Shorter ones would all be equally far from every
            sub-vector, and longer ones leave most of a book without a sub-vector near it.
        rotated: bool, whether descriptors are multiplied by a rotation (D, D), fixed in training, that comes with the
            codebook (Ge et al., "Optimized Product Quantization", TPAMI 2014). Inner products do not change.

    What stands between `seed` and `n_book` is the paper's by default and differs in converted checkpoints only.

    Raises:
        ValueError: naming the argument that does not fit.

    Shapes:
        input: float (B, H, W, F), the backbone's feature map.
        output: float32 (B, D), the descriptor, which the search uses as it is.

    Example:
        >>> head = CGDHead("MG", n_dim=6)
        >>> head(ops.ones((2, 7, 7, 8))).shape == (2, 6)
        True
    """

    head_name = "cgd"
    # How descriptors are compared with codewords: PQIndex's name for it. Unit vectors rank by it as by inner products,
    # and the codes of near ones better: what quantizing x to z changes is about 2 <q - x, x - z>, not <q, x - z>.
    search_metric = "squared_l2"

    def __init__(
        self,
        descriptors="SMG",
        n_dim=1536,
        combination="concat",
        gem_p=3.0,
        learn_p=False,
        n_classes=0,
        seed=0,
        *,
        use_bias=False,
        gem_floor=1e-6,
        l2_epsilon=1e-10,
        normalize_branches=True,
        normalize_combined=True,
        classifier_place="pooled",
        n_book=0,
        n_word=256,
        rotated=False,
        **kwargs,
    ):
        super().__init__(**kwargs)
        _check_letters(descriptors)
        _check_choice("combination", combination, COMBINATIONS)
        _check_choice("classifier_place", classifier_place, CLASSIFIER_PLACES)
        _check_sizes(n_dim, n_classes, n_book, parts=len(descriptors) if combination == "concat" else 1)
        if not gem_p > 0:
            raise ValueError(f"Invalid gem_p. Expected a number above 0. Received: gem_p={gem_p!r}")
        self.descriptors, self.n_dim, self.combination = descriptors, n_dim, combination
        self.first_p, self.learn_p, self.n_classes, self.seed = gem_p, learn_p, n_classes, seed
        self.use_bias, self.gem_floor, self.l2_epsilon = use_bias, gem_floor, l2_epsilon
        self.normalize_branches, self.normalize_combined = normalize_branches, normalize_combined
        self.classifier_place = classifier_place
        self.n_book, self.n_word, self.rotated = n_book, n_word, rotated
        self.quantizer = self.rotation = None
        self.gem_p = gem_p
        if learn_p and "G" in descriptors:
            self.gem_p = self.add_weight(
                name="gem_p",
                shape=(),
                initializer=keras.initializers.Constant(gem_p),
                dtype="float32",
                autocast=False,  # a power of 16 bits moves by steps of 1/512
            )
        self.dense = {}
        if n_dim:
            size = n_dim // len(descriptors) if combination == "concat" else n_dim
            self.dense = {letter: self._dense(size, f"fc_{letter}", use_bias) for letter in descriptors}
        self.classifier = self._dense(n_classes, "classifier", use_bias=True) if n_classes else None

    def _dense(self, size, name, use_bias):
        # Each letter has its own values, whatever it is combined with.
        seed = self.seed + 1 + ["fc_S", "fc_M", "fc_G", "classifier"].index(name)
        initializer = keras.initializers.GlorotUniform(seed)
        return keras.layers.Dense(
            size, use_bias=use_bias, kernel_initializer=initializer, dtype=self.dtype_policy, name=name
        )

    def build(self, input_shape):
        channels = input_shape[-1]
        for dense in self.dense.values():
            dense.build((None, channels))
        if self.classifier:
            takes_map = self.classifier_place == "pooled" or not self.dense
            self.classifier.build((None, channels if takes_map else self.dense[self.descriptors[0]].units))
        size = self.n_dim or channels * (len(self.descriptors) if self.combination == "concat" else 1)
        if self.n_book:
            self.quantizer = self._quantizer(size)
        if self.rotated:
            self.rotation = self.add_weight(
                name="rotation",
                shape=(size, size),
                initializer=keras.initializers.Identity(),
                trainable=False,
                dtype="float32",
                autocast=False,  # 16 bits do not hold a rotation
            )

    def _quantizer(self, size):
        if size % self.n_book:
            raise ValueError(
                f"Invalid n_book. Expected a positive integer dividing D={size}. Received: n_book={self.n_book}"
            )
        return CentredQuantizer(self.n_book, self.n_word, size // self.n_book, self.seed + 5, name="quantizer")

    def call(self, features):
        parts = [self._branch(letter, features)["normalized"] for letter in self.descriptors]
        combined = ops.concatenate(parts, axis=-1) if self.combination == "concat" else sum(parts)
        if self.normalize_combined:
            combined = l2_normalize_added(combined, self.l2_epsilon)
        return combined if self.rotation is None else ops.matmul(combined, self.rotation)

    def first_descriptor_logits(self, features):
        """The auxiliary classifier's logits.

        Args:
            features: float (B, H, W, F), as for the head itself.

        Returns:
            float32 (B, C).

        Raises:
            ValueError: if the head has no classifier.
        """
        if not self.classifier:
            raise ValueError("Invalid head. Expected a classifier (n_classes above 0). Received: n_classes=0")
        first = self._branch(self.descriptors[0], features)[self.classifier_place]
        return ops.cast(self.classifier(first), "float32")

    def embed(self, descriptors):
        """Descriptors as the search uses them: the same."""
        return descriptors

    def encode(self, descriptors):
        """Descriptors float (B, D) -> codes int32 (B, M), the nearest codewords, compiled by XLA."""
        return self.quantizer.encode(descriptors)

    def search_codebook(self):
        """The codebook as the search uses it, numpy float32 (M, K, d)."""
        return self.quantizer.words()

    def losses_of(
        self,
        embeddings,
        labels,
        logits=None,
        margin=0.1,
        temperature=0.5,
        smoothing=0.1,
        squared=False,
        alpha=20.0,
    ):
        """The training losses: the ranking loss and the auxiliary loss, added up (CGD, sections 3.2 and 3.3).

        With a codebook two more are added, which are ours and not the paper's. A search ranks codes by their distances
        from a query that is not quantized; so the one is the ranking loss between each descriptor x_i and the others'
        softly quantized descriptors z. The other is the share of the descriptors' variance v that quantization loses:

            mean_i max(0, max_{p != i, same class} ||x_i - z_p|| - min_{n, another class} ||x_i - z_n|| + margin)
            mean_i ||x_i - z_i||^2 / v
            z_ij = sum_k softmax_k(-alpha M/v ||x_ij - c_jk||^2) c_jk     for each book j, v = mean_i ||x_i - mean x||^2

        The gradients reach the codewords, and the network both by x_i and by z; but none flows by v, nor by the x_i of
        the second loss, which would draw the descriptors together. Without that loss, triplets that cannot be told
        apart yet are best served by codewords that are all alike. v lets alpha mean the same however close together the
        descriptors lie: v/M is the mean squared distance of sub-vectors to their mean; and the codewords c are placed
        about that mean and by that distance (`centred_quantizer`). The plain ranking loss stays, so that the
        descriptors serve without codes as well.

        Args:
            embeddings: float (B, D), the head's output.
            labels: int (B,).
            logits: float (B, C), of `first_descriptor_logits`, or None to train without the auxiliary loss.
            margin: float, of the triplets.
            temperature, smoothing: float, of the auxiliary loss.
            squared: bool, squared distances in the triplets instead of distances.
            alpha: float > 0, inverse temperature of the soft assignment; larger is closer to codes.

        Returns:
            dict of float scalars: loss (the sum to minimise), rank, aux (0 without logits), active, the share of
            images whose triplet is not yet apart by the margin; and with a codebook rank_quantized and lost, the share.
        """
        hinges = losses.batch_hard_hinges(embeddings, labels, margin, squared)
        rank, active = ops.mean(hinges), ops.mean(ops.cast(hinges > 0, "float32"))
        aux = ops.zeros(())
        if logits is not None:
            aux = losses.classification_smoothed(labels, logits, temperature, smoothing)
        found = {"loss": rank + aux, "rank": rank, "aux": aux, "active": active}
        if self.quantizer:
            quantized = self.quantizer(embeddings, alpha=alpha)
            across = ops.mean(losses.batch_hard_hinges(embeddings, labels, margin, squared, quantized))
            _, spread = self.quantizer.batch_statistics(embeddings)
            lost = ops.mean(ops.square((ops.stop_gradient(embeddings) - quantized) / spread))
            found |= {"loss": found["loss"] + across + lost, "rank_quantized": across, "lost": lost}
        return found

    def get_config(self):
        names = ("descriptors", "n_dim", "combination", "learn_p", "n_classes", "seed", "use_bias", "gem_floor")
        names = (*names, "l2_epsilon", "normalize_branches", "normalize_combined", "classifier_place")
        names = (*names, "n_book", "n_word", "rotated")
        own = {name: getattr(self, name) for name in names}
        return {**super().get_config(), **own, "gem_p": self.first_p}

    def _branch(self, letter, features):
        """What a branch computes, by the names of CLASSIFIER_PLACES; what it lacks is as what comes before it."""
        pooled = self._pool(letter, features)
        dense = ops.cast(self.dense[letter](pooled), "float32") if self.dense else pooled
        normalized = l2_normalize_added(dense, self.l2_epsilon) if self.normalize_branches else dense
        return {"pooled": pooled, "dense": dense, "normalized": normalized}

    def _pool(self, letter, features):
        if letter == "G":
            return gem(features, self.gem_p, self.gem_floor)
        return spoc(features) if letter == "S" else mac(features)


def build(architecture, dtype):
    """Backbone and head of a network, built.

    Args:
        architecture: dict, see `heads.complete`.
        dtype: dtype policy.

    Returns:
        (ResNetV1 or KerasCVResNet, CGDHead).

    Raises:
        ValueError: if the descriptors do not divide n_dim.
    """
    own = {name: value for name, value in architecture.items() if name in ARGUMENTS}
    del own["layout"]
    own["n_word"] = 2 ** own.pop("bn_word")
    backbone = layouts.build(architecture["layout"], architecture["seed"], dtype)
    head = CGDHead(**own, seed=architecture["seed"] + 100_000, dtype=dtype, name="head")
    head.build((None, None, None, layouts.feature_size(architecture["layout"])))
    return backbone, head


def descriptor_size(architecture):
    """int D."""
    n_feature, n_part = layouts.feature_size(architecture["layout"]), len(architecture["descriptors"])
    return architecture["n_dim"] or n_feature * (n_part if architecture["combination"] == "concat" else 1)


def kernel_size(architecture):
    """Number of values in all kernels."""
    n_feature, n_part = layouts.feature_size(architecture["layout"]), len(architecture["descriptors"])
    n_dense = architecture["n_dim"] * (n_part if architecture["combination"] == "sum" else 1)
    n_first = n_feature
    if architecture["classifier_place"] != "pooled" and n_dense:
        n_first = n_dense // n_part
    n_own = n_feature * n_dense + n_first * architecture["n_classes"]
    size = descriptor_size(architecture)
    if architecture["n_book"]:
        n_own += 2 ** architecture["bn_word"] * size
    if architecture["rotated"]:
        n_own += size**2
    return layouts.kernel_size(architecture["layout"]) + n_own


def architecture_of(settings):
    """The arguments of the network that settings describe, a dict; `settings_of` goes the other way."""
    own = {name: getattr(settings, name) for name in _SETTINGS}
    n_classes = settings.n_CLASSES if settings.auxiliary else 0
    return {**own, "layout": layouts.of_settings(settings), "n_classes": n_classes}


def settings_of(architecture):
    """The settings that a network fixes, a dict."""
    own = {name: architecture[name] for name in _SETTINGS if name != "bn_word" or architecture["n_book"]}
    n_classes = architecture["n_classes"]
    classified = {"auxiliary": True, "n_CLASSES": n_classes} if n_classes else {"auxiliary": False}
    # A converted network may be laid out as no setting describes it.
    return {**own, **classified, **layouts.settings_of(architecture["layout"])}


def file_stem(settings):
    """Beginning of the names of saved models, such as "cgd_1536d", with a codebook "cgd_1536d_256bits"."""
    stem = f"cgd_{descriptor_size(architecture_of(settings))}d"
    return f"{stem}_{settings.n_bits}bits" if settings.n_book else stem


def steps_per_epoch(data, settings):
    """Steps that draw as many images as there are to train on, at least one.

    Raises:
        ValueError: if there is one class only, or a batch does not consist of whole classes, or of more than there
            are.
    """
    n_images, n_class = settings.images_per_class, len(data.train.class_names)
    if n_class < 2:
        raise ValueError(
            f"Invalid training images. Expected two classes or more. Received: {', '.join(data.train.class_names)}; "
            "folders are classes but for `train` and `test`, whose folders are"
        )
    if settings.batch_size % n_images or not n_images < settings.batch_size <= n_images * n_class:
        raise ValueError(
            f"Invalid batch_size. Expected a multiple of {n_images}, the images of a class, "
            f"of 2 to {n_class} classes. Received: batch_size={settings.batch_size}"
        )
    return max(1, len(data.train) // settings.batch_size)


def draw_batch(data, settings, step):
    """The images of one training step, with what their augmentation needs: a pure function of (seed, step).

    batch_size / images_per_class classes are drawn, and images_per_class images of each (see
    `sampling.class_balanced_batch`), anew at every step. The paper has 128 images a step and does not say of how many
    classes.

    Args:
        data: gpq_tf.data.metric_learning.UnseenClasses.
        settings: gpq_tf.settings.Settings.
        step: int >= 0.

    Returns:
        dict of numpy arrays: images uint8 (B, H, W, 3), larger than the windows that are cut out of them; labels int32
        (B,); flips bool (B,); offsets int32 (B, 2).
    """
    rng = augment.generator(settings.seed, step, _BATCH)
    n_class = settings.batch_size // settings.images_per_class
    index = sampling.class_balanced_batch(data.train.labels, n_class, settings.images_per_class, rng)
    margin = data.train.side - settings.image_size
    flips, offsets = window.draw_crop_and_flip(rng, len(index), margin)
    labels = data.train.labels[index].astype("int32")
    return {"images": data.train.read(index), "labels": labels, "flips": flips, "offsets": offsets}


def is_frozen(settings, epoch):
    """Whether training has stopped updating the batch statistics in this epoch: never, as the authors say."""
    return False


def describe(model, batch, settings, frozen=False):
    """The descriptors of one batch of `draw_batch`, in training mode: of a window of each image.

    Returns:
        dict: embeddings, float32 (B, D); labels, int (B,); and with the auxiliary loss logits, float32 (B, C).
    """
    images = _windows(settings.image_size)(batch["images"], batch["flips"], batch["offsets"])
    features = model.backbone(preprocess(images), training=True)
    logits = {"logits": model.head.first_descriptor_logits(features)} if settings.auxiliary else {}
    embeddings = model.head(features)
    if model.head.quantizer:
        model.head.quantizer.watch(embeddings)
    return {"embeddings": embeddings, "labels": batch["labels"], **logits}


@functools.cache
def _windows(size):
    """Windows by XLA, also where the whole step is not compiled: a third of the time. Without `preprocess`: see gpq."""
    return compiled(lambda *drawn: window.crop_and_flip(*drawn, size, size))


def compare(model, described, settings):
    """The losses of what `describe` returned.

    Returns:
        dict of float scalars, see `CGDHead.losses_of`.
    """
    weights = {name: getattr(settings, name) for name in ("margin", "squared", "temperature", "smoothing", "alpha")}
    return model.head.losses_of(**described, **weights)


def learning_rate(settings, steps_per_epoch):
    """1e-4 with drops to a tenth after 4/15 and 8/15 of the run; from scratch 3e-3, and after 9/15 and 12/15.

    `settings.learning_rate` replaces the first rate, where it is given.
    """
    rate, drops = (_RATE_FROM_SCRATCH, _DROPS_FROM_SCRATCH) if settings.init is None else (_RATE, _DROPS)
    rate, total = settings.learning_rate or rate, settings.total_epochs * steps_per_epoch
    # Keras's schedule keeps a value until its boundary's step has been taken as well.
    boundaries = [total * drop // 15 - 1 for drop in drops]
    return keras.optimizers.schedules.PiecewiseConstantDecay(boundaries, [rate, rate / 10, rate / 100])


def optimizer(settings, steps_per_epoch):
    """Adam as the paper says, with the usual decays of its means (.9 and .999) and epsilon 1e-8."""
    return keras.optimizers.Adam(learning_rate(settings, steps_per_epoch), epsilon=1e-8)


def _are_letters(descriptors):
    is_text = isinstance(descriptors, str) and descriptors
    return bool(is_text) and set(descriptors) <= set(LETTERS) and len(set(descriptors)) == len(descriptors)


def _check_letters(descriptors):
    if not _are_letters(descriptors):
        raise ValueError(
            "Invalid descriptors. Expected distinct letters of S (SPoC), M (MAC) and G (GeM), such as 'SMG'. "
            f"Received: descriptors={descriptors!r}"
        )


def _check_choice(name, value, choices):
    if value not in choices:
        raise ValueError(f"Invalid {name}. Expected one of {', '.join(choices)}. Received: {name}={value!r}")


def _check_sizes(n_dim, n_classes, n_book, parts):
    for name, size in {"n_dim": n_dim, "n_classes": n_classes, "n_book": n_book}.items():
        if isinstance(size, bool) or not isinstance(size, int) or size < 0:
            raise ValueError(f"Invalid {name}. Expected an integer of 0 or more. Received: {name}={size!r}")
    if n_dim % parts:
        raise ValueError(
            f"Invalid n_dim. Expected a multiple of {parts}, the number of descriptors. Received: n_dim={n_dim}"
        )
