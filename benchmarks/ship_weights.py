"""Turn a trained model into shipped weights: 16 bits, a name, a card.

    python benchmarks/ship_weights.py models/gpq_48bits_300.keras gpq-cifar10-48bits --data_dir=./cifar10

Writes gpq_tf/weights/NAME.keras and its line of gpq_tf/weights/SHA256SUMS, and prints what models/README.md says of it:
size, sha256, and the mAP on the embedded sample and on the whole of CIFAR-10, of the 32-bit model and of the 16-bit
one, by the protocol of the model's head; of a CGD model Recall@k, on its sample and on --data_dir, a set in the
original's layout.

A GPQ model can be shipped with other codewords than the learned ones, which its descriptors have left behind:
--codebook=pulled, those that training assigned images to, each pulled towards the prototypes near it; or
--codebook=kmeans, fitted by Faiss to the descriptors of the unlabelled images. benchmarks/gpq_scoring.py tells what
either is worth.
"""

import argparse
import hashlib
import os
import re
from pathlib import Path

import command

WEIGHTS = Path(__file__).resolve().parents[1] / "gpq_tf" / "weights"
CIFAR10 = ("cifar10_sample", "cifar10_folder")
SETS = {"gpq": CIFAR10, "spq": CIFAR10, "cgd": ("cgd_sample", "image_lists")}


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model")
    parser.add_argument("name")
    parser.add_argument("--data_dir", default="./cifar10")
    parser.add_argument("--replace", action="store_true", help="NAME is shipped already: put this one in its place")
    parser.add_argument("--no_scores", action="store_true", help="write the file alone")
    parser.add_argument("--codebook", choices=("learned", "pulled", "kmeans"), default="learned")
    options = parser.parse_args(arguments)
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

    from gpq_tf import codebooks, data, load_model

    if not re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", options.name):
        parser.error(f"expected a NAME of small letters, digits and hyphens, received {options.name!r}")
    target = WEIGHTS / f"{options.name}.keras"
    if target.exists() and not options.replace:
        parser.error(f"{options.name} is shipped already; --replace puts another in its place")
    model = load_model(options.model)
    if model.head_name != "gpq" and options.codebook != "learned":
        parser.error(f"--codebook={options.codebook} is for models of the head gpq, received one of {model.head_name}")
    # What it is measured on is read first: where it is missing, nothing is written.
    measured_on = () if options.no_scores else SETS[model.head_name]
    sets = {name: images_for(model, name, options.data_dir) for name in measured_on}
    # The folder that it was trained in means nothing to who loads it.
    model.record["settings"] = {
        name: Path(value).name if name in ("resume", "init") and value else value
        for name, value in model.record["settings"].items()
        if not name.endswith(("_path", "_dir"))
    }
    model.record["origin"] = re.sub(r"\S+/", "", model.record["origin"])
    model.record["source"] = model.record["source"].split(" from ")[0]
    if options.codebook == "pulled":
        model.head.quantizer.codebook.assign(model.head.pulled_codebook(model.record["settings"]["alpha"]))
        model.record["codebook"] = "pulled towards the prototypes, as in training"
    if options.codebook == "kmeans":
        unlabelled = data.load("cifar10_folder", options.data_dir).unlabelled_images
        n_book, n_word, _ = model.codebook.shape
        model.head.quantizer.codebook.assign(codebooks.fit(model.embed(unlabelled), n_book, n_word)[0])
        model.record["codebook"] = f"k-means of the descriptors of {len(unlabelled):,} unlabelled images"
    model.save(target, weights_dtype="float16")
    write_sums()
    content = target.read_bytes()
    print(f"{target.name}: {len(content):,} bytes, sha256 {hashlib.sha256(content).hexdigest()}")
    for name, images in sets.items():
        for what, path in (("32 bits, as trained", options.model), ("16 bits, as shipped", target)):
            print(f"{name}, {what}: {scores(load_model(path), images)}", flush=True)


def images_for(model, dataset, data_dir):
    """What the model is measured on, by the protocol of its head."""
    from gpq_tf import data, heads, settings
    from gpq_tf.data import metric_learning

    if model.head_name == "cgd":
        size = model.record["settings"]["image_size"]
        given = ["--head=cgd", f"--dataset={dataset}", f"--data_dir={data_dir}", f"--image_size={size}"]
        return metric_learning.load_test_for(settings.resolve(given, "no config.py"))[0]
    return data.load(dataset, data_dir, split=heads.recipe(model.head_name).PROTOCOL)


def scores(model, images):
    """What the protocol of the model's head measures, as text."""
    from gpq_tf import recall, retrieval, settings

    if model.head_name == "cgd":
        found = recall.evaluate(model, images)["scores"]
        return ", ".join(f"{name} {value:.4f}" for name, value in found.items())
    top_n = settings.defaults_of(model.head_name)["n_DB"]
    return f"mAP {retrieval.evaluate(model, images, top_n)['mAP']:.4f}"


def write_sums():
    """Write the checksums of all shipped files, in the form of sha256sum."""
    sums = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(WEIGHTS.glob("*.keras"))}
    (WEIGHTS / "SHA256SUMS").write_text("".join(f"{checksum}  {name}\n" for name, checksum in sums.items()))


if __name__ == "__main__":
    command.run(main)
