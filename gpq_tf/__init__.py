"""Image search with compact learned codes: GPQ, SPQ and CGD on TensorFlow 2 and Keras 3."""

import importlib

__version__ = "0.1.0"

# Importing this package costs nothing: TensorFlow, Keras and Faiss are imported when a name is first used.
_LAZY_NAMES = {"load_model": "network", "PQIndex": "index"}
_LAZY_MODULES = ("losses", "metrics", "quantizer")

__all__ = ["PQIndex", "__version__", "load_model", "losses", "metrics", "quantizer"]


def __getattr__(name):
    if name in _LAZY_NAMES:
        return getattr(importlib.import_module(f"gpq_tf.{_LAZY_NAMES[name]}"), name)
    if name in _LAZY_MODULES:
        return importlib.import_module(f"gpq_tf.{name}")
    raise AttributeError(f"module 'gpq_tf' has no attribute {name!r}")


def __dir__():
    return sorted([*globals(), *__all__])
