"""`gpq-tf quantize`: fit a codebook to a CGD model's descriptors, so that it gives codes as well."""

import os

from gpq_tf import cgd_command

DESCRIPTION = """Give a CGD model a codebook, fitted to the descriptors of training images, and write it to OUT.

Its images then have codes of n_book * log2(n_word) bits beside their descriptors; `gpq-tf cgd` measures both. The test
list is not used, but read, as by `gpq-tf cgd`."""


def parser():
    """The arguments, an argparse.ArgumentParser."""
    made = cgd_command.parser_of_images("quantize", DESCRIPTION)
    add = made.add_argument
    add("model", metavar="MODEL", help="a .keras file, or prefix of -symbol.json and -0000.params")
    add("out", metavar="OUT", help="the .keras file to write")
    add("--n_book", type=int, default=32, help="books, a divisor of the descriptor's length (32)")
    add("--n_word", type=int, default=256, help="codewords of a book, a power of two (256)")
    add("--method", choices=("kmeans", "opq"), default="kmeans", help="opq rotates the descriptors first (kmeans)")
    add("--seed", type=int, default=0, help="of what k-means begins with (0)")
    return made


def parse(arguments):
    """Arguments -> argparse.Namespace, checked; ValueError where one does not fit."""
    made = parser()
    options = made.parse_args(arguments)
    cgd_command.check_sizes(made, options)
    if not options.out.endswith(".keras"):
        made.error(f"OUT: expected a name that ends in .keras, received {options.out!r}")
    if options.seed < 0:
        made.error(f"--seed: expected an integer of 0 or more, received {options.seed}")
    return options


def run(options, report, progress):
    """Fit and write.

    Args:
        options: argparse.Namespace of `parse`.
        report: callable(str), told what a user should know.
        progress: callable(iterable, what) -> iterable.

    Returns:
        RetrievalModel, what was written.

    Raises:
        ValueError, OSError: if model, lists, images or sizes are wrong. Nothing is written then.
    """
    from gpq_tf import codebooks, files, heads, retrieval

    train, _ = cgd_command.read_lists(options, report)
    model = cgd_command.load(options.model, options, report)
    # Better now than after all images have been embedded.
    size = heads.recipe("cgd").descriptor_size(model.architecture)
    codebooks.check_sizes(len(train.files), size, options.n_book, options.n_word, options.method)
    files.check_writable(options.out)
    descriptors = cgd_command.embed(model, train, options, progress)
    if options.method == "opq":
        report(f"fitting {options.n_book} books of {options.n_word} codewords and a rotation, which may take minutes")
    codebook, rotation = codebooks.fit(descriptors, options.n_book, options.n_word, options.method, options.seed)
    turned = codebooks.turned(descriptors, rotation)
    made = codebooks.with_codebook(model, codebook, rotation, turned)
    error = codebooks.variance_lost(made, turned)
    report(
        f"codes: {retrieval.bytes_a_code(made)} bytes, {options.n_book} books of {options.n_word} codewords, for "
        f"{descriptors[0].nbytes} bytes of float32; {error:.1%} of the training images' variance are lost"
    )
    fitted = {"method": options.method, "images": len(descriptors), "seed": options.seed, "error": error}
    made.record = {**made.record, "codebook": {"model": os.path.basename(options.model), **fitted}}
    made.save(options.out)
    report(f"saved {options.out}")
    return made
