"""Where training begins: from initial values, from the weights of another model, or where a saved run ended."""

from pathlib import Path

from gpq_tf import convert, heads, model_file, training_state
from gpq_tf import settings as settings_module
from gpq_tf.convert import keras_resnet, mat
from gpq_tf.network import RetrievalModel, find_model, load_model
from gpq_tf.saves import find_last

# settings.resume: the newest save of the run.
LAST = "last"


class Finished(ValueError):
    """The run that is to go on has all its steps behind it."""


def settings_of_start(settings):
    """The settings with what init = "imagenet" means here, and why it is nothing, where it is.

    It means a file of Keras's ResNet50: the one that ImageNet_pretrained_path names if it was given, else what Keras
    has downloaded before or, with `download`, can download now, else ImageNet_pretrained_path with ".h5". Without all
    of them, and for another width than 1, training starts from scratch.

    Args:
        settings: gpq_tf.settings.Settings.

    Returns:
        (settings, str): gpq_tf.settings.Settings whose init is a path or None; "" or what to add to the line that tells
        where training starts.

    Raises:
        ValueError: if ImageNet_pretrained_path was given and there is no such file.
    """
    if settings.init != "imagenet" or settings.head != "cgd" or settings.resume:
        return settings, ""
    file, why = _imagenet_file(settings)
    return settings.completed({"init": file and str(file)}), why


def _imagenet_file(settings):
    """(Path or None, str): see `settings_of_start`."""
    local = keras_resnet.find(settings.ImageNet_pretrained_path)
    if "ImageNet_pretrained_path" in settings.given:
        if local is None:
            raise ValueError(
                "Invalid ImageNet_pretrained_path. Expected a .h5 file with head=cgd. "
                f"Received: {settings.ImageNet_pretrained_path}, no such file"
            )
        return local, ""
    if settings.width_multiplier != 1 or settings.backbone != "resnet_v1":
        return None, ": ImageNet weights are for width_multiplier=1 and backbone=resnet_v1"
    kept, why = keras_resnet.kept_by_keras(), "--download=True fetches them"
    if kept.is_file():
        return kept, ""
    if settings.download:
        try:
            return keras_resnet.download(), ""
        except OSError as error:
            why = str(error)
    if local:
        return local, ""
    return None, f": no ImageNet weights in {kept} nor {settings.ImageNet_pretrained_path}.h5; {why}"


def initial_model(settings):
    """The model that training starts from, and a line that says which.

    --init if given, else (for gpq) ImageNet_pretrained.mat if present, else drawn from the seed.

    Args:
        settings: gpq_tf.settings.Settings.

    Returns:
        (RetrievalModel, str).

    Raises:
        ValueError: if the file is damaged, or its backbone has another width, or a file that was asked for is absent.
    """
    architecture = heads.architecture_of(settings)
    if settings.init is not None and not (settings.head == "cgd" and keras_resnet.find(settings.init)):
        n_book = settings.n_book if "n_book" in settings.given else None
        other, _ = convert.load(settings.init, n_book)
        model = RetrievalModel(**_as_converted(architecture, other), dtype=settings.precision)
        return model, _copy_from(settings.init, other, model)
    model = RetrievalModel(**architecture, dtype=settings.precision)
    if settings.init is not None:
        keras_resnet.load_backbone(model.backbone, settings.init)
        return model, f"starting from {settings.init} (backbone; head from seed {settings.seed})"
    mat_file = mat.find(settings.ImageNet_pretrained_path)
    if mat_file is not None and settings.head == "gpq":
        mat.load_backbone(model.backbone, mat_file)
        return model, f"starting from {mat_file} (backbone; head from seed {settings.seed})"
    if settings.given & {"ImagNet_pretrained_path", "ImageNet_pretrained_path"}:
        expected = "a .mat file" if settings.head == "gpq" else f"none with head={settings.head}: --init takes models"
        raise ValueError(
            f"Invalid ImageNet_pretrained_path. Expected {expected}. Received: {settings.ImageNet_pretrained_path}"
            f"{'' if mat_file else ', no such file'}"
        )
    return model, f"starting from scratch (seed {settings.seed})"


def _as_converted(architecture, other):
    """The architecture, laid out as a converted checkpoint's where no settings describe that (`heads.cgd`)."""
    if "layout" not in architecture or other.head_name != "cgd" or "backbone" in heads.fixed_by(other.architecture):
        return architecture
    own = ("layout", "use_bias", "gem_floor", "l2_epsilon", "normalize_branches", "normalize_combined")
    return architecture | {name: other.architecture[name] for name in (*own, "classifier_place")}


def _copy_from(source, other, model):
    """Copy backbone and, where its sizes agree, head of another model; returns a line that says what was copied."""
    _assign_all(other.backbone, model.backbone, source)
    shapes = [[tuple(weight.shape) for weight in part.head.weights] for part in (other, model)]
    if shapes[0] == shapes[1]:
        _assign_all(other.head, model.head, source)
        return f"starting from {source} (backbone and head)"
    return f"starting from {source} (backbone; the head has other sizes and comes from the seed)"


def _assign_all(source_layer, target_layer, source):
    if len(source_layer.weights) != len(target_layer.weights):
        raise ValueError(
            f"Invalid init {source!r}. Expected {len(target_layer.weights)} variables of {target_layer.name}. "
            f"Received: {len(source_layer.weights)}; is it of another head or backbone?"
        )
    for old, new in zip(source_layer.weights, target_layer.weights, strict=True):
        if tuple(old.shape) != tuple(new.shape):
            raise ValueError(
                f"Invalid init {source!r}. Expected {new.path} {tuple(new.shape)}. Received: {tuple(old.shape)}; "
                "is its width_multiplier another?"
            )
        new.assign(old)


def settings_of_resumed(settings, report=None):
    """The settings with which a run goes on: those it was saved with, then what is given now.

    A converted checkpoint knows its architecture only; the rest are the present settings. resume = "last" means the
    newest save of such a run in model_save_path; without one, a new run.

    Args:
        settings: gpq_tf.settings.Settings whose `resume` names a model with a training state.
        report: callable(str), told of damaged saves that "last" passes over, or None.

    Returns:
        gpq_tf.settings.Settings.

    Raises:
        ValueError: if there is no such model, or what is given contradicts its architecture or the length of its
            epochs.
    """
    if settings.resume == LAST:
        last = find_last(Path(settings.model_save_path) / heads.recipe(settings.head).file_stem(settings), report)
        settings = settings.completed({"resume": last and str(last)})
        if last is None:
            return settings
    _, architecture, record, *_ = model_file.read(find_model(settings.resume))
    fixed = heads.fixed_by(architecture)
    settings_module.check_fixed(settings, fixed, settings.resume)
    before = settings_module.from_dict(record["settings"], settings.resume) if "settings" in record else settings
    if "settings" in record and settings.batch_size != before.batch_size and "batch_size" in settings.given:
        # Epochs would have another number of steps: which were done, and what the rate is, could no longer be told.
        raise ValueError(
            f"Invalid batch_size. Expected {before.batch_size}, with which {settings.resume} was trained. "
            f"Received: batch_size={settings.batch_size}; --init starts a new run from it"
        )
    # On which devices is no part of a run: it may go on on others.
    given = {name: getattr(settings, name) for name in {*settings.given, "strategy"}}
    return before.completed({"legacy": architecture["legacy"], **given, **fixed}, settings.given | set(fixed))


def resumed_model(settings, optimizer, total, fingerprint):
    """The model of the run that goes on, and its optimiser's state.

    Args:
        settings: gpq_tf.settings.Settings, of `settings_of_resumed`.
        optimizer: keras.optimizers.Optimizer, which is built and filled.
        total: int, steps of the whole run.
        fingerprint: str, of the data.

    Returns:
        (RetrievalModel, str, int): the model, a line that says where it comes from, and the steps behind it.

    Raises:
        ValueError: if the file has no training state, or was trained on other data.
        Finished: if no steps are left.
    """
    model = load_model(settings.resume, settings.legacy, settings.precision)
    state = model_file.training_state(model_file.read(find_model(settings.resume)))
    if state is None:
        raise ValueError(
            f"Invalid resume {settings.resume!r}. Expected a model that train.py saved, or a converted checkpoint of "
            "training. Received: a model without the optimiser's state; --init starts a new run from it"
        )
    if model.record.get("data_sha256", fingerprint) != fingerprint:
        raise ValueError(
            f"Invalid data. Expected the images that {settings.resume} was trained on: {model.record.get('source')}. "
            "Received: others; --init starts a new run from it"
        )
    optimizer.build(model.trainable_variables)
    done = training_state.into_optimizer(state, optimizer)
    if done >= total:
        raise Finished(
            f"Invalid total_epochs. Expected more than the {done} steps that {settings.resume} has behind it. "
            f"Received: total_epochs={settings.total_epochs}, {total} steps"
        )
    return model, f"resuming {settings.resume} after step {done}", done
