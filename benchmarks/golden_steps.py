"""How far training steps at full width are from the original's recorded losses, in several arithmetics.

    python benchmarks/golden_steps.py

The golden numbers (../shared/golden) must lie beside the checkout. Three steps from the recorded start, and the losses
after them, each as a share of the recorded one; the same equations in float64 are up to 7e-5, 7e-4 and 4e-3 away from
steps 2, 3 and 4 (golden's README). Rounding is multiplied by Adam, which takes whole steps by a gradient's sign, and
what convolutions and softmax round depends on the library that the processor gets: each runs in a process of its own.
Which of them differ depends on the processor. Prints a line a step.
"""

import os
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1] / "tests"
ARITHMETICS = {
    "Eigen": {"TF_ENABLE_ONEDNN_OPTS": "0"},
    "oneDNN": {"TF_ENABLE_ONEDNN_OPTS": "1"},
    "oneDNN for SSE4": {"TF_ENABLE_ONEDNN_OPTS": "1", "ONEDNN_MAX_CPU_ISA": "SSE41"},
    "XLA": {"JIT": "1"},
}


def main():
    if "ARITHMETIC" in os.environ:
        return measure(os.environ["ARITHMETIC"], jit="JIT" in os.environ)
    for name, variables in ARITHMETICS.items():
        environment = {**os.environ, **variables, "ARITHMETIC": name, "TF_CPP_MIN_LOG_LEVEL": "3"}
        subprocess.run([sys.executable, __file__], env=environment, check=True)


def measure(name, jit):
    sys.path.insert(0, str(TESTS))
    import test_golden_step as steps

    from gpq_tf.heads import gpq

    import golden

    full = golden.load("step.npz")
    model = steps.full_width_model(full)
    step = steps.make_step(model, steps.losses_function(model), gpq.optimizer(), jit)
    for prefix in ("step1", "step2", "step3", "after3"):
        found = step(steps.batch_of(full))
        away = {key: float(found[key]) / float(full[f"{prefix}_{recorded}"]) - 1 for key, recorded in steps.LOSSES}
        print(f"{name:16s} {prefix:7s}", *(f"{key} {value:+.1e}" for key, value in away.items()), flush=True)


if __name__ == "__main__":
    main()
