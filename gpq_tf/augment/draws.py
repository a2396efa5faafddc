"""Where random numbers come from."""

import numpy as np


def generator(seed, step, stream):
    """The random generator of one training step: any step can be drawn again without the steps before it.

    Args:
        seed: int >= 0, of the run.
        step: int >= 0.
        stream: int >= 0, tells apart what is drawn for different purposes in one step.

    Returns:
        numpy.random.Generator.

    Example:
        >>> int(generator(0, 7, 1).integers(1000)) == int(generator(0, 7, 1).integers(1000))
        True
    """
    return np.random.default_rng([seed, step, stream])
