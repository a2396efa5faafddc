"""What the scripts share on the command line: checked numbers, and errors in one line."""

import argparse
import sys


def positive(text):
    """An argument that is an integer of 1 or more."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected an integer of 1 or more, received {text!r}")
    return value


def run(main):
    """Call `main`; what is wrong with arguments or files is told in one line, with exit status 2."""
    try:
        main()
    except (ValueError, OSError) as error:
        print("error: " + " ".join(str(error).split()), file=sys.stderr)
        sys.exit(2)
