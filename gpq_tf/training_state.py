"""The optimiser's part of a training run: what must be saved beside a model so that training can go on.

The other parts are the model's own weights and, since every draw is a function of (seed, step), the number of steps.
"""

import numpy as np
from keras import ops

STEP = "step"


def from_optimizer(optimizer, step):
    """The variables of a built optimiser as arrays, and the number of steps taken.

    Args:
        optimizer: keras.optimizers.Optimizer, built.
        step: int, steps that the run has behind it.

    Returns:
        dict of str -> numpy array; the names do not depend on how many optimisers were made before.
    """
    arrays = map(np.asarray, map(ops.convert_to_numpy, optimizer.variables))
    return {STEP: np.array(step, "int64"), **dict(zip(_names(optimizer), arrays, strict=True))}


def into_optimizer(state, optimizer):
    """Put arrays of `from_optimizer` back.

    Args:
        state: dict of str -> numpy array.
        optimizer: keras.optimizers.Optimizer of the same kind, built on the same variables.

    Returns:
        int, the number of steps taken.

    Raises:
        ValueError: if names or shapes differ.
    """
    names = _names(optimizer)
    if set(state) != {STEP, *names}:
        odd = sorted(set(state) ^ {STEP, *names})[0]
        raise ValueError(
            f"Invalid training state. Expected {len(names)} optimiser variables. Received: {odd} differs; "
            "was it saved in another precision?"
        )
    for name, variable in zip(names, optimizer.variables, strict=True):
        if tuple(np.shape(state[name])) != tuple(variable.shape):
            raise ValueError(
                f"Invalid training state. Expected {name} {tuple(variable.shape)}. Received: {np.shape(state[name])}"
            )
        variable.assign(state[name])
    return int(state[STEP])


def slot_variables(optimizer, variable):
    """Adam's (mean, mean square) of the gradient of a model variable, as Keras variables."""
    by_name = {slot.path.split("/", 1)[1]: slot for slot in optimizer.variables}
    stem = variable.path.replace("/", "_")
    return by_name[f"{stem}_momentum"], by_name[f"{stem}_velocity"]


def _names(optimizer):
    # Keras numbers its optimisers (adam, adam_1, ...): the first part of a path is not a name one can rely on.
    return [f"{i:03d}/{variable.path.split('/', 1)[1]}" for i, variable in enumerate(optimizer.variables)]
