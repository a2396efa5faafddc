"""The same tests with Keras on JAX, in processes of their own."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

# Processes side by side, of about equal length: compiling, which is most of the time, keeps one processor busy.
GROUPS = (
    (
        "test_golden_gpq.py",
        "test_convert.py::test_features_codes_and_codebook_are_the_originals",
        "test_convert.py::test_pooled_features_are_the_originals",
        "test_convert.py::test_retrieval_is_the_originals",
        "test_losses.py",
        "test_augment.py",
        "test_batch_norm.py",
        "test_golden_spq.py",
    ),
    (
        "test_accumulation.py",
        "test_ops.py",
        "test_quantizer.py",
        "test_index_exact.py",
        "test_convolution.py",
        "test_vgg.py",
        "test_network.py",
        "test_optimizers.py::test_the_decay_is_a_part_of_the_gradient",
        "test_resnet.py::test_training_is_the_definition_and_keeps_every_batchs_statistics_in_turn",
        "test_model_file.py::test_everything_comes_back",
        "test_model_file.py::test_float16_rounds_matrices_and_halves_the_file",
        "test_golden_step.py",
        "test_heads_gpq.py",
        "test_golden_cgd.py",
        "test_descriptors.py",
        "test_losses_metric.py",
    ),
)
# About 340 with the golden numbers, 215 without.
FEWEST = 195


@pytest.mark.slow
def test_the_mathematics_is_the_same_on_jax():
    environment = {**os.environ, "KERAS_BACKEND": "jax", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    options = {"cwd": Path(__file__).parent, "env": environment, "text": True, "stdout": subprocess.PIPE}
    runs = [subprocess.Popen([*command, *group], stderr=subprocess.STDOUT, **options) for group in GROUPS]
    n_passed = 0
    for run, (output, _) in [(run, run.communicate()) for run in runs]:
        assert run.returncode == 0, output[-5000:]
        n_passed += int(re.search(r"(\d+) passed", output)[1])
    assert n_passed > FEWEST
