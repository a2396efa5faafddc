"""Cut the embedded sample of CGD out of a set in the original's layout (images, meta/train.txt, test.txt, bbox.txt).

    python benchmarks/make_cgd_sample.py SET

Takes the first images of the first classes of either list, as they are: gpq_tf/data/cgd_sample.csv and .jpegs.
"""

import argparse
import csv
from pathlib import Path

N_CLASSES = 24
N_IMAGES = 16  # of a class


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("data_dir")
    options = parser.parse_args(arguments)

    from gpq_tf.data import cgd_sample, metric_learning
    from gpq_tf.files import replacing

    content, rows = bytearray(), []
    lists = metric_learning.load("image_lists", options.data_dir)
    for part, listed in zip(cgd_sample.PARTS, lists, strict=True):
        for label in range(N_CLASSES):
            for i in (listed.labels == label).nonzero()[0][:N_IMAGES]:
                image = Path(listed.files[i]).read_bytes()
                # Both lists number their classes from 1 in their folders' names.
                name = listed.class_names[label].partition(".")[2]
                rows.append((part, name, len(content), len(image), *listed.boxes[i].tolist()))
                content += image
    with replacing(cgd_sample.PACKED) as temporary:
        temporary.write_bytes(content)
    with replacing(cgd_sample.LISTED) as temporary, open(temporary, "w", encoding="utf-8", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows((cgd_sample.COLUMNS, *rows))
    print(f"{len(rows)} images, {len(content):,} bytes")


if __name__ == "__main__":
    main()
