"""The same tests with Keras on JAX, in processes of their own."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

# What they are about, the tests, and how many of them pass at least, where the golden numbers are not there too.
GROUPS = {
    "gpq": (
        "test_golden_gpq.py",
        "test_convert.py::test_pooled_features_are_the_originals",
        "test_heads_gpq.py",
        "test_losses.py",
        "test_vgg.py::test_mixed_precision_computes_in_16_bits_with_weights_in_32",
        "test_vgg.py::test_training_moves_every_statistic",
    ),
    "spq": ("test_golden_spq.py", "test_augment.py", "test_batch_norm.py", "test_convolution.py"),
    "cgd": (
        "test_golden_cgd.py",
        "test_descriptors.py",
        "test_losses_metric.py",
        "test_resnet.py::test_training_is_the_definition_and_keeps_every_batchs_statistics_in_turn",
        "test_quantizer.py",
        "test_ops.py",
        "test_index_exact.py",
    ),
    "models": (
        "test_network.py::test_descriptors_are_float32_with_unit_sub_vectors_and_differ",
        "test_network.py::test_codes_are_the_nearest_codewords_of_the_descriptors",
        "test_network.py::test_encoding_of_a_codeword_finds_it_also_at_the_end_of_a_large_book",
        "test_network.py::test_legacy_searches_with_raw_descriptors_and_codewords",
        "test_network.py::test_spq_searches_with_descriptors_and_codewords_as_they_are",
        "test_network.py::test_weights_trained_after_the_first_call_are_used",
        "test_network.py::test_calling_the_model_gives_what_embed_gives",
        "test_network.py::test_a_saved_model_gives_the_same_bits",
        "test_accumulation.py",
        "test_model_file.py::test_everything_comes_back",
        "test_model_file.py::test_float16_rounds_matrices_and_halves_the_file",
    ),
    "steps": (
        # The full width takes a minute and a half; KERAS_BACKEND=jax pytest tests/test_golden_step.py runs it.
        "test_golden_step.py::test_narrow_gradients_of_every_variable",
        "test_golden_step.py::test_narrow_two_steps_of_every_variable_and_slot",
        "test_optimizers.py::test_the_decay_is_a_part_of_the_gradient",
    ),
}
FEWEST = {"gpq": 45, "spq": 80, "cgd": 100, "models": 9, "steps": 3}


@pytest.mark.slow
@pytest.mark.parametrize("group", GROUPS)
def test_the_mathematics_is_the_same_on_jax(group):
    environment = {**os.environ, "KERAS_BACKEND": "jax", "JAX_PLATFORMS": "cpu"}
    # Nearly all of the time goes into compiling what then runs once: without LLVM's optimisations it is half.
    environment["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_backend_optimization_level=0"
    command = [sys.executable, "-m", "pytest", "-q", "-n0", "-p", "no:cacheprovider", *GROUPS[group]]
    options = {"cwd": Path(__file__).parent, "env": environment, "text": True, "stdout": subprocess.PIPE}
    run = subprocess.run(command, stderr=subprocess.STDOUT, **options)
    assert run.returncode == 0, run.stdout[-5000:]
    assert int(re.search(r"(\d+) passed", run.stdout)[1]) >= FEWEST[group]
