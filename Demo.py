"""Print the mAP of a model on CIFAR-10 and save ranked-list pictures.

Settings: config.py, or on the command line, such as `python Demo.py --n_pictures=3 --data_dir=./cifar10`.
"""

import sys

from gpq_tf.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["demo", *sys.argv[1:]]))
