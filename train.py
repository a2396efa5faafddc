"""Train a model on CIFAR-10 (with --head=cgd on CUB-200-2011); it is saved in ./models every 20 epochs.

Settings: config.py, or on the command line, such as `python train.py --width_multiplier=0.25`.
"""

import sys

from gpq_tf.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
