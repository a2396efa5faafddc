"""Fixtures that several modules use."""

import keras
import pytest


@pytest.fixture
def uncompiled():
    """TensorFlow computes operation by operation: tracing takes longer than a few narrow steps."""
    if keras.backend.backend() != "tensorflow":
        yield
        return
    import tensorflow as tf

    tf.config.run_functions_eagerly(True)
    yield
    tf.config.run_functions_eagerly(False)
