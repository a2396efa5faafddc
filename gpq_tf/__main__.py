"""The commands: `python -m gpq_tf COMMAND`, also installed as `gpq-tf`."""

import contextlib
import os
import sys
import tempfile
import traceback

from gpq_tf.stopping import LostWorker, Stopped

USAGE = """usage: gpq-tf COMMAND [arguments] [--setting=value ...]

  demo                     print the mAP of a model on CIFAR-10, save ranked-list pictures; with --query_image=PHOTO
                           show the ten images nearest to any image file
  train                    train a model, save it every 20 epochs; --head=cgd trains CGD on CUB-200-2011 or the like
  spq                      train SPQ, with the arguments of the original's main_SPQ.py: gpq-tf spq --help
  convert SRC DST          weights of the originals (TF1 checkpoint prefix, ImageNet_pretrained.mat, SPQ's .pth, prefix
                           of CGD's) to a .keras file; a model of the head spq to a .pth that the original loads
  evaluate MODEL [IMAGES]  print the mAP of a model on CIFAR-10 (IMAGES: the folder of its python version), of a CGD
                           model Recall@k on CUB-200-2011 (IMAGES: the folder that its archive unpacks to)
  cgd --pretrained-model=PREFIX ...   print Recall@k of a CGD model, with the original's arguments; cgd --help
  quantize MODEL OUT ...   give a CGD model a codebook, fitted to the descriptors of images; quantize --help

Settings come from config.py in the current folder, then from --setting=value. --debug shows tracebacks.
--dataset=image_folders --data_dir=DIR takes your own images, a folder a class, in place of CIFAR-10.
"""


def main(arguments=None):
    """Run a command.

    Args:
        arguments: sequence of str, or None for those of the process.

    Returns:
        int, the exit status: 0, 2 for a bad argument or file, 1 for a fault of the program, 130 when interrupted, 143
        when terminated (SIGTERM), 75 when training has lost another worker and can be started again.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    # A command with many arguments of its own explains them itself.
    asks = {"-h", "--help"} & set(arguments) and arguments[0] not in HELPFUL
    if not arguments or arguments[0] == "help" or asks:
        print(USAGE, end="")
        return 0 if arguments else 2
    command, *rest = arguments
    try:
        if command not in COMMANDS:
            raise ValueError(f"Invalid command. Expected one of {', '.join(COMMANDS)}. Received: {command!r}")
        COMMANDS[command](rest)
        return 0
    except KeyboardInterrupt:
        return _failed("interrupted", 130, debug)
    except Stopped as stopped:
        return _failed(str(stopped), 128 + stopped.signal, debug)
    except LostWorker as error:
        return _failed(str(error), 75, debug)
    except (ValueError, OSError, ArithmeticError) as error:
        return _failed(str(error) or type(error).__name__, 2, debug)
    except Exception as error:
        return _failed(f"{type(error).__name__}: {error}; --debug shows where", 1, debug)


def demo(arguments):
    settings = _settings(arguments)
    _import_tensorflow_quietly()
    from gpq_tf import demo

    demo.run(settings, _report, _batches)


def train(arguments):
    _train(_settings(arguments))


def spq(arguments):
    from gpq_tf import spq_command

    if {"-h", "--help"} & set(arguments):
        print(spq_command.usage(), end="")
        return
    settings, devices = spq_command.read(arguments)
    # The backend looks at it once, when it is imported.
    os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0") if devices is None else devices
    _train(settings, spq_command.headline)


def _train(settings, headline=None):
    _import_tensorflow_quietly()
    from gpq_tf import data, heads, starting, strategies, trainer
    from gpq_tf import settings as settings_module

    is_last = settings.resume == starting.LAST
    if settings.resume:
        settings = starting.settings_of_resumed(settings, _report)
    if line := strategies.waits_for(settings):
        _report(line)
    strategy = strategies.from_settings(settings)  # before anything uses TensorFlow
    report = _report if strategies.is_chief(strategy) else _nothing
    if headline:
        report(headline(settings))
    images = data.load_for(settings, heads.recipe(settings.head).PROTOCOL)
    settings = trainer.settings_of_data(settings, images)
    report(settings_module.describe(settings))
    report(images.source)
    try:
        _, path = trainer.train(settings, images, report, _bar, strategy)
    except starting.Finished:
        if not is_last:
            raise
        path = settings.resume  # whoever starts a command until it is done need not know that it is
    report(f"done: {path}")


def convert(arguments):
    (source, target), options = _positional(arguments, "SRC", "DST")
    settings = _settings(options)
    if not target.endswith((".keras", ".pth")):
        raise ValueError(f"Invalid DST. Expected a name that ends in .keras or .pth. Received: {target!r}")
    _import_tensorflow_quietly()
    from gpq_tf import convert, heads
    from gpq_tf import settings as settings_module
    from gpq_tf.convert import spq_checkpoint
    from gpq_tf.network import load_model

    if target.endswith(".pth"):
        lines = spq_checkpoint.write(load_model(source), target)
    else:
        n_book = settings.n_book if "n_book" in settings.given else None
        model, lines = convert.convert(source, n_book, settings.legacy, heads.architecture_of(settings))
        settings_module.check_fixed(settings, heads.fixed_by(model.architecture), source)
        model.record = {"converted_from": os.path.basename(source), "legacy": settings.legacy}
        model.save(target)
    for line in lines:
        _report(line)
    _report(f"saved {target}")


def evaluate(arguments):
    (model, *folder), options = _positional(arguments, "MODEL", "[IMAGES]")
    images = [f"--data_dir={folder[0]}"] if folder else []
    settings = _settings([*options, f"--model_load_path={model}", *images])
    _import_tensorflow_quietly()
    from gpq_tf import demo

    demo.run(settings, _report, _batches, pictures=False)


def cgd(arguments):
    from gpq_tf import cgd_command

    options = cgd_command.parse(arguments)
    cgd_command.hide_other_gpus(options)
    _import_tensorflow_quietly()
    cgd_command.run(options, _report, _batches)


def quantize(arguments):
    from gpq_tf import cgd_command, quantize_command

    options = quantize_command.parse(arguments)
    cgd_command.hide_other_gpus(options)
    _import_tensorflow_quietly()
    quantize_command.run(options, _report, _batches)


COMMANDS = {
    "demo": demo,
    "train": train,
    "spq": spq,
    "cgd": cgd,
    "quantize": quantize,
    "convert": convert,
    "evaluate": evaluate,
}
HELPFUL = ("spq", "cgd", "quantize")


def _settings(arguments):
    from gpq_tf import settings

    return settings.resolve(arguments)


def _positional(arguments, *names):
    """Split arguments into the positional ones, one for each of `names` ([...] may be left out), and the --options."""
    values = [argument for argument in arguments if not argument.startswith("--")]
    needed = sum(not name.startswith("[") for name in names)
    if not needed <= len(values) <= len(names):
        raise ValueError(f"Invalid arguments. Expected {' '.join(names)}. Received: {' '.join(values) or 'none'}")
    return values, [argument for argument in arguments if argument.startswith("--")]


def _report(line):
    print(line, flush=True)


def _nothing(line):
    """Instead of `_report`, in workers that leave it to another."""


def _batches(batches, what, total=None):
    from tqdm import tqdm

    return tqdm(batches, desc=what, total=total, unit="batch", disable=None, leave=False)


def _bar(total, unit):
    from tqdm import tqdm

    return tqdm(total=total, unit=unit, disable=None, dynamic_ncols=True)


def _import_tensorflow_quietly():
    """Import the backend without its start-up lines, which its C++ part writes past Python to descriptor 2."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    with tempfile.TemporaryFile() as noise:
        sys.stderr.flush()
        standard_error = os.dup(2)
        os.dup2(noise.fileno(), 2)
        try:
            import keras

            # Keras imports TensorFlow later where it can, whatever the backend.
            with contextlib.suppress(ImportError):
                import tensorflow as tf

                if keras.backend.backend() == "tensorflow":
                    tf.config.list_physical_devices()  # looks for GPUs, and complains of none
        except BaseException:
            noise.seek(0)
            with contextlib.suppress(OSError):
                os.write(standard_error, noise.read())
            raise
        finally:
            os.dup2(standard_error, 2)
            os.close(standard_error)


def _failed(message, status, debug):
    if debug:
        traceback.print_exc()
    print("error: " + " ".join(message.split()), file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
