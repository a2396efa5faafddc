"""The step of every head: XLA compiles the whole of it, once, and it computes the same."""

import keras
import numpy as np
import pytest

from gpq_tf import heads
from gpq_tf import settings as settings_module
from gpq_tf.network import RetrievalModel
from gpq_tf.train_step import all_finite, make_step

from small_data import SMALL, small_set

N_STEP = 4


def losses_of_steps(head, jit):
    """(losses of each step, how often the step was traced)"""
    # Adam makes whole steps of gradients that are nothing but rounding; cgd's from scratch are long.
    slow = ["--learning_rate=1e-5"] if head == "cgd" else []
    chosen = settings_module.resolve([f"--head={head}", *SMALL[head], *slow], "no config.py")
    recipe = heads.recipe(head)
    model, data, traces = RetrievalModel(**heads.architecture_of(chosen)), small_set(head), []

    def compare(described):
        traces.append(set(described))
        return recipe.compare(model, described, chosen)

    step = make_step(
        model,
        compare,
        recipe.optimizer(chosen, 10),
        jit,
        describe=lambda batch: recipe.describe(model, batch, chosen),
    )
    found = [step(recipe.draw_batch(data, chosen, number)) for number in range(N_STEP)]
    return [{name: float(value) for name, value in losses.items()} for losses in found], len(traces)


@pytest.mark.slow
@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="jit_compile is TensorFlow's; on JAX all is XLA")
@pytest.mark.parametrize("head", ["gpq", "spq", "cgd"])
def test_the_whole_step_compiles_once_and_computes_the_same(head):
    plain, n_plain = losses_of_steps(head, jit=False)
    compiled, n_compiled = losses_of_steps(head, jit=True)
    assert (n_plain, n_compiled) == (1, 1)
    for step, (ours, theirs) in enumerate(zip(compiled, plain, strict=True)):
        assert ours == pytest.approx(theirs, rel=1e-4 if step == 0 else 2e-2, abs=1e-3), step
    assert plain[0] != plain[-1]


def test_one_value_that_is_not_finite_is_found_wherever_it_is():
    tensors = [np.ones((2, 3)), np.array(4.0)]
    assert all_finite(tensors)
    for value in (np.nan, np.inf, -np.inf):
        assert not all_finite([tensors[0], np.array(value)])
        spoilt = tensors[0].copy()
        spoilt[1, 2] = value
        assert not all_finite([spoilt, tensors[1]])
