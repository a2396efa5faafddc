"""Recall@k of a CGD model's descriptors in float32, and of product-quantized ones of 32, 64 and 128 bytes.

    python benchmarks/cgd_quantized.py MODEL --data-dir=DIR [--train-txt=... --test-txt=... --bbox-txt=...]
        [--trained MODEL ...] [--bytes 32 64 128] [--methods kmeans opq]

Images are read as `gpq-tf cgd` reads them and takes the same arguments. Codebooks of 256 codewords are fitted to the
descriptors of the training images, as `gpq-tf quantize` does; each test image then searches, by its float32 descriptor,
the codes of all others. --trained adds models that were trained end to end with a codebook (train.py --head=cgd
--n_book=...), each measured by its own descriptors and codes. "Error" is the mean squared distance of descriptors from
what their codes stand for, as a share of their variance. Prints a markdown table and writes it with the figures to
benchmarks/results/cgd_quantized.json.
"""

import os
import time
from pathlib import Path

import command

from gpq_tf import cgd_command

HERE = Path(__file__).parent
KS = (1, 2, 4, 8)
HEADER = "| codes | bytes | " + " | ".join(f"R@{k}" for k in KS) + " | error |"


def main(arguments=None):
    parser = cgd_command.parser_of_images("cgd_quantized", __doc__.split("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--bytes", type=int, nargs="*", default=[32, 64, 128])
    parser.add_argument("--methods", nargs="*", default=["kmeans", "opq"])
    parser.add_argument("--trained", nargs="*", default=[])
    parser.add_argument("--out", default=HERE / "results" / "cgd_quantized.json")
    options = parser.parse_args(arguments)
    cgd_command.check_sizes(parser, options)
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

    train, test = cgd_command.read_lists(options, print)
    rows = [*fitted(options, train, test), *(row for path in options.trained for row in trained(path, options, test))]
    table = markdown(rows)
    print(table)
    from gpq_tf.files import write_json

    result = {
        "command": "python benchmarks/cgd_quantized.py MODEL --data-dir=DIR",
        "model": Path(options.model).name,
        "images": {
            "train": len(train.files),
            "test": len(test.files),
            "size": [options.image_width, options.image_height],
        },
        "rows": rows,
        "markdown": table.splitlines(),
    }
    write_json(options.out, result)


def fitted(options, train, test):
    """Yield the row of a model's descriptors, and one for each method and number of bytes."""
    from gpq_tf import codebooks

    model = cgd_command.load(options.model, options, print)
    to_fit, descriptors = (cgd_command.embed(model, images, options, without_progress) for images in (train, test))
    yield row_of_descriptors("float32", descriptors, test.labels)
    for n_book in options.bytes:
        if descriptors.shape[1] % n_book:
            print(f"{n_book} bytes left out: {n_book} books do not divide {descriptors.shape[1]} values", flush=True)
            continue
        for method in options.methods:
            start = time.perf_counter()
            codebook, rotation = codebooks.fit(to_fit, n_book, 256, method)
            seconds = round(time.perf_counter() - start, 1)
            quantized = codebooks.with_codebook(model, codebook, rotation, codebooks.turned(to_fit, rotation))
            turned = codebooks.turned(descriptors, rotation)
            yield {**row_of_codes(method, quantized, turned, test.labels), "fitting_s": seconds}


def trained(path, options, test):
    """The rows of a model that has a codebook: its descriptors, its codes."""
    model = cgd_command.load(path, options, print)
    descriptors = cgd_command.embed(model, test, options, without_progress)
    name = f"end to end ({model.architecture['n_book']} books)"
    yield row_of_descriptors(f"{name}, float32", descriptors, test.labels)
    yield row_of_codes(name, model, descriptors, test.labels)


def row_of_descriptors(name, descriptors, labels):
    from gpq_tf.metrics import recall_at_k

    return shown({"codes": name, "bytes": descriptors[0].nbytes, "recalls": recall_at_k(descriptors, labels, KS)})


def row_of_codes(name, model, descriptors, labels):
    from gpq_tf import codebooks, retrieval

    codes = retrieval.codes_of(model, descriptors)
    return shown(
        {
            "codes": name,
            "bytes": retrieval.bytes_a_code(model),
            "recalls": retrieval.recall_of_codes(model, descriptors, codes, labels, KS),
            "error_of_variance": round(codebooks.variance_lost(model, descriptors), 4),
        }
    )


def shown(row):
    print(row, flush=True)
    return row


def without_progress(batches, what, total):
    return batches


def markdown(rows):
    """A table; recalls with four digits, as `gpq-tf cgd` prints them."""
    lines = [HEADER, "| --- " * (len(KS) + 3) + "|"]
    for row in rows:
        recalls = " | ".join(f"{row['recalls'][k]:.4f}".removeprefix("0") for k in KS)
        lines.append(f"| {row['codes']} | {row['bytes']:,} | {recalls} | {row.get('error_of_variance', '')} |")
    return "\n".join(lines)


if __name__ == "__main__":
    command.run(main)
