"""Write Tiny ImageNet at 32 x 32 as image folders that CGD trains on: the classes that a smaller set trains on, only.

    python benchmarks/tinyimagenet_folders.py SOURCE.npz SET FOLDER
    python train.py --head=cgd --dataset=image_folders --data_dir=FOLDER --image_size=64 ...

SOURCE packs JPEG files (see gpq_tf/data/jpegs.py, and wnids). SET is the smaller set, in the original's layout, cut
from Tiny ImageNet too, so that its files are named after their class (images/001.reel/n04067472_219.JPEG). FOLDER/train
gets all training images of the classes in SET's train.txt, FOLDER/test the validation images of those in its test.txt:
what is learned from FOLDER has not seen a class that SET is measured on.
"""

import argparse
from pathlib import Path

import numpy as np


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("source")
    parser.add_argument("data_dir")
    parser.add_argument("folder", type=Path)
    options = parser.parse_args(arguments)

    from gpq_tf.data import jpegs, metric_learning

    with np.load(options.source) as stored:
        wnids = [str(name) for name in stored["wnids"]]
    lists = metric_learning.load("image_lists", options.data_dir)
    for part, split, listed in zip(("train", "test"), ("train", "val"), lists, strict=True):
        chosen = {wnids.index(Path(file).name.partition("_")[0]) for file in listed.files}
        packed, offsets, labels, _ = jpegs.read_packed(options.source, split)
        for label in chosen:
            (options.folder / part / wnids[label]).mkdir(parents=True, exist_ok=True)
        written = [i for i, label in enumerate(labels) if label in chosen]
        for i in written:
            path = options.folder / part / wnids[labels[i]] / f"{i}.jpeg"
            path.write_bytes(packed[offsets[i] : offsets[i + 1]].tobytes())
        print(f"{options.folder / part}: {len(written):,} images of {len(chosen)} classes")


if __name__ == "__main__":
    main()
