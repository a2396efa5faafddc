"""Pack Tiny ImageNet's archive as the other scripts take it.

    python benchmarks/pack_tinyimagenet.py tiny-imagenet-200 tinyimagenet32_jpeg.npz
    python benchmarks/pack_tinyimagenet.py tiny-imagenet-200 tinyimagenet32_jpeg.npz --stand_in=SET

The folder is what the archive of cs231n.stanford.edu (tiny-imagenet-200.zip) unpacks to. The .npz gets all training and
validation images at 32 x 32 as JPEG files of quality 80 (see gpq_tf/data/jpegs.py; wnids beside). SET becomes a
stand-in for CUB-200-2011 in the layout of the original's lists: 60 images a class of 64 x 64 with their boxes, the
classes of one half to train on and of the other to search among.

The files behind docs/results.md were packed before this script was there, in the same form from the same images:
figures of newly packed ones differ by what another choice and another resizing are worth.
"""

import argparse
import io
from pathlib import Path

import command
import numpy as np

SIDE, QUALITY = 32, 80
PER_CLASS = 60  # images a class of the stand-in


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("--stand_in", type=Path, metavar="SET")
    options = parser.parse_args(arguments)
    if options.target.suffix != ".npz":
        parser.error(f"expected a target that ends in .npz, received {str(options.target)!r}")

    from gpq_tf.files import replacing

    wnids = (options.folder / "wnids.txt").read_text().split()
    words = dict(line.split("\t", 1) for line in (options.folder / "words.txt").read_text().splitlines())
    arrays = {"wnids": np.array(wnids), "class_names": np.array([words[wnid].split(",")[0] for wnid in wnids])}
    for split, listed in (
        ("train", training_images(options.folder, wnids)),
        ("val", validation_images(options.folder)),
    ):
        files = [small_jpeg(path) for path, _ in listed]
        arrays[f"{split}_bytes"] = np.frombuffer(b"".join(files), "uint8")
        arrays[f"{split}_offsets"] = np.cumsum([0, *map(len, files)], dtype="int64")
        arrays[f"{split}_labels"] = np.array([wnids.index(wnid) for _, wnid in listed], "uint8")
        print(f"{split}: {len(files):,} images", flush=True)
    with replacing(options.target) as temporary:
        np.savez(temporary, **arrays)
    if options.stand_in:
        write_stand_in(options.folder, options.stand_in, wnids, words)


def training_images(folder, wnids):
    """[(path, wnid)], class by class."""
    return [(path, wnid) for wnid in wnids for path in sorted((folder / "train" / wnid / "images").glob("*.JPEG"))]


def validation_images(folder):
    """[(path, wnid)], as the archive lists them."""
    lines = (folder / "val" / "val_annotations.txt").read_text().splitlines()
    return [(folder / "val" / "images" / name, wnid) for name, wnid, *_ in map(str.split, lines)]


def small_jpeg(path):
    """The image at 32 x 32 in colour, bytes of a JPEG file."""
    from PIL import Image

    file = io.BytesIO()
    Image.open(path).convert("RGB").resize((SIDE, SIDE), Image.Resampling.BOX).save(file, "JPEG", quality=QUALITY)
    return file.getvalue()


def write_stand_in(folder, target, wnids, words):
    """Lists, boxes and copies of the first images of every class, in the layout of the original's CUB-200-2011."""
    lists = {"train": ["image_id class_id path"], "test": ["image_id class_id path"]}
    boxes, number, half = [], 0, len(wnids) // 2
    for i, wnid in enumerate(wnids):
        place = Path("images", f"{i + 1:03d}.{words[wnid].split(',')[0].replace(' ', '_')}")
        (target / place).mkdir(parents=True, exist_ok=True)
        for line in (folder / "train" / wnid / f"{wnid}_boxes.txt").read_text().splitlines()[:PER_CLASS]:
            name, left, top, right, bottom = line.split()
            number += 1
            (target / place / name).write_bytes((folder / "train" / wnid / "images" / name).read_bytes())
            lists["train" if i < half else "test"].append(f"{number} {i % half} {place / name}")
            boxes.append(f"{number} {left}.0 {top}.0 {int(right) - int(left)}.0 {int(bottom) - int(top)}.0")
    (target / "meta").mkdir(exist_ok=True)
    for part, lines in (*lists.items(), ("bbox", boxes)):
        (target / "meta" / f"{part}.txt").write_text("\n".join(lines) + "\n")
    print(f"{target}: {number:,} images")


if __name__ == "__main__":
    command.run(main)
