"""What a JAX step spends its time on, by XLA's profiler: how long the processor was busy, and with which operations."""

import collections
import contextlib
import re
import tempfile
import time
from pathlib import Path

# Kinds of operations, by what their name (XLA's or, on a GPU, the kernel's) contains; the first that fits.
KINDS = {
    "convolutions and matrix products": r"conv|gemm|gemv|dot|matmul|xmma|cutlass|cudnn|nvjet|fprop|dgrad|wgrad|bprop",
    "copies and layout": r"memcpy|memset|copy|transpose|nchw|nhwc",
    "pooling": r"reduce.window|select.and.scatter",
    "sums (batch statistics, their gradients, losses)": r"reduce",
    "element by element": r"fusion|loop|add|multiply|select|convert|maximum|broadcast|concatenate|pad|slice|gather",
}
STEPS = 5
N_LARGEST = 30


def profile(step, batch):
    """Take a few steps under the profiler.

    Args:
        step: callable(batch) -> dict of scalar arrays, compiled.
        batch: dict of arrays.

    Returns:
        dict: busy, the share of the time of these steps in which the device computed (None where the profiler tells
        no device from the host, as on a CPU); kinds, the share of each kind in the time of all operations; largest,
        the same of single operations, those that take longest.
    """
    import jax

    with tempfile.TemporaryDirectory() as folder:
        options = jax.profiler.ProfileOptions()
        options.python_tracer_level, options.host_tracer_level = 0, 1
        jax.profiler.start_trace(folder, profiler_options=options)
        start = time.perf_counter()
        for _ in range(STEPS):
            for value in step(batch).values():
                float(value)
        seconds = time.perf_counter() - start
        jax.profiler.stop_trace()
        (file,) = Path(folder).rglob("*.xplane.pb")
        planes = list(jax.profiler.ProfileData.from_file(str(file)).planes)
    on_device = [plane for plane in planes if plane.name.startswith("/device:")]
    events = [event for plane in on_device or planes for event in _operations(plane, bool(on_device))]
    shares = collections.Counter()
    for name, _, duration in events:
        shares[name] += duration
    total = sum(shares.values()) or 1.0
    kinds = collections.Counter()
    for name, duration in shares.items():
        kinds[_kind(name)] += duration / total
    return {
        "busy": round(_covered(events) / (seconds * 1e9), 4) if on_device else None,
        "kinds": {name: round(share, 3) for name, share in kinds.most_common()},
        "largest": {name[:100]: round(duration / total, 4) for name, duration in shares.most_common(N_LARGEST)},
    }


def _operations(plane, is_device):
    """(name, start, duration in ns) of each kernel of a device, or of each XLA operation on the host."""
    for line in plane.lines:
        if is_device and not line.name.startswith("Stream"):
            continue  # lines derived from those of the streams
        for event in line.events:
            stats = {}
            with contextlib.suppress(Exception):  # some values are of kinds that cannot be read
                stats = dict(event.stats)
            operation = re.sub(r"[.\d]+$", "", str(stats.get("hlo_op", "")))
            if is_device:
                yield f"{operation} {event.name}".strip(), event.start_ns, event.duration_ns
            elif operation:
                yield operation, event.start_ns, event.duration_ns


def _covered(events):
    """Nanoseconds in which at least one operation was under way."""
    covered, end = 0.0, 0.0
    for _, start, duration in sorted(events, key=lambda event: event[1]):
        covered += max(0.0, start + duration - max(start, end))
        end = max(end, start + duration)
    return covered


def _kind(name):
    return next((kind for kind, pattern in KINDS.items() if re.search(pattern, name, re.IGNORECASE)), "all else")
