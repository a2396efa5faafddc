"""Curves and pictures of a training run for TensorBoard, an optional package."""

import importlib.util
import io
import time
from pathlib import Path

from gpq_tf import visualize


def check_installed():
    """Refuse before anything is computed.

    Raises:
        ValueError: if TensorBoard is not installed.
    """
    if importlib.util.find_spec("tensorboard") is None:
        raise ValueError(
            "Invalid tensorboard. Expected the package tensorboard, which `pip install 'gpq-tf[tensorboard]'` brings. "
            "Received: tensorboard=True without it"
        )


class Curves:
    """Writes one run's events into a folder of its own; `tensorboard --logdir` of a folder above shows them.

    Nothing but tensorboard's own writer is used, so this works on every backend.

    Args:
        folder: str or Path; a sub-folder named after the time is made in it.

    Raises:
        ValueError: if TensorBoard is not installed.
        OSError: if the folder cannot be made.
    """

    def __init__(self, folder):
        check_installed()
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._folder = Path(folder, time.strftime("%Y%m%d-%H%M%S"))
        self._folder.mkdir(parents=True, exist_ok=True)
        self._writer = EventFileWriter(str(self._folder))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._writer.close()

    def scalars(self, step, values):
        """Add a point to some curves.

        Args:
            step: int, optimisation steps taken.
            values: dict of curve's name -> float.
        """
        from tensorboard.compat.proto.summary_pb2 import Summary

        self._add(step, [Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()])

    def usage(self, step, usage):
        """Add what `metrics.codebook_usage` returned: two curves a book, and the means."""
        values = {}
        for name, by_book in usage.items():
            values[f"codebook/{name}"] = float(by_book.mean())
            values |= {f"codebook_{name}/book_{book + 1:02d}": float(value) for book, value in enumerate(by_book)}
        self.scalars(step, values)

    def ranked_list(self, step, **what):
        """Add a ranked-list picture; `what` are the arguments of `visualize.ranked_list` after the path."""
        from PIL import Image
        from tensorboard.compat.proto.summary_pb2 import Summary

        png = io.BytesIO()
        visualize.ranked_list(png, **what)
        width, height = Image.open(png).size
        picture = Summary.Image(width=width, height=height, colorspace=3, encoded_image_string=png.getvalue())
        self._add(step, [Summary.Value(tag="ranked_list", image=picture)])
        self._writer.flush()

    def _add(self, step, values):
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        self._writer.add_event(Event(wall_time=time.time(), step=step, summary=Summary(value=values)))
