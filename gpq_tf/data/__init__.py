"""Images and labels: where they come from, how they are read, and how GPQ's protocol splits them.

`load_for` loads what settings ask for. `cifar10.load` finds and splits CIFAR-10; `protocol` is the split; `pickles`,
`jpegs`, `matlab` and `similarity` each read one kind of file; `numpy116` recomputes the order in which the original
program met the images. `metric_learning.load` finds labelled image files (`cub`, `image_lists`, `tfds_files` know the
layouts), `images` reads them as CGD does, with OpenCV's `resize`, and `sampling` draws batches of them.
"""

from gpq_tf.data.cifar10 import load
from gpq_tf.data.loading import check_image_size, load_for
from gpq_tf.data.protocol import RetrievalData

__all__ = ["RetrievalData", "check_image_size", "load", "load_for"]
