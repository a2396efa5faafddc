# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Train codes for images
#
# Three methods, one function: GPQ learns codes from few labels and many unlabelled images, SPQ from none, CGD
# descriptors from class labels. On Colab choose a runtime with a GPU, put gpq-tf's folder on the machine (`git clone`,
# or upload it) and install it with `%pip install -q ./gpq-tf`.

# %%
import json
from pathlib import Path

import matplotlib.pyplot as plt
from tqdm.auto import tqdm

from gpq_tf import data, heads, load_model, retrieval, settings, trainer

# %% [markdown]
# `SMALL` makes everything short enough for a laptop without a GPU: the embedded sample of CIFAR-10 and a sixteenth of
# the channels, which learn little. Set it to `False` on a GPU: tensorflow-datasets then fetches CIFAR-10 (170 MB).

# %%
SMALL = True
LARGE = ["--download=True", "--precision=mixed_float16"]
TINY = ["--dataset=cifar10_sample", "--width_multiplier=0.0625"]


def train(*given):
    """Train with the settings of config.py, given as on the command line of train.py; returns (path, images)."""
    chosen = settings.resolve(given, "no config.py")
    images = data.load_for(chosen, heads.recipe(chosen.head).PROTOCOL)
    print(images.source)
    _, path = trainer.train(chosen, images, report=print, progress=tqdm)
    return path, images


# %% [markdown]
# ## GPQ
#
# An epoch is ten steps of 500 labelled and 500 unlabelled images, in the published setting; 300 of them were published.

# %%
own = [*TINY, "--total_epochs=2", "--batch_size=100"] if SMALL else [*LARGE, "--total_epochs=20"]
path, images = train("--model_save_path=models_gpq", *own)
print(f"mAP {retrieval.evaluate(load_model(path), images)['mAP']:.4f}")

# %%
log = [json.loads(line) for line in Path("models_gpq/gpq_48bits.log.jsonl").read_text().splitlines()]
steps = [entry for entry in log if entry["event"] == "step"]
for name in ("hash", "cls", "ent"):
    plt.plot([entry["step"] for entry in steps], [entry[name] for entry in steps], label=name)
plt.xlabel("step")
plt.ylabel("loss")
plt.legend()
plt.show()

# %% [markdown]
# ## SPQ
#
# Without labels: two views of every image are to find each other, one by its descriptor, the other by its code. The
# published training takes thousands of epochs.

# %%
own = [*TINY, "--total_epochs=1", "--eval_epoch=1"] if SMALL else [*LARGE, "--total_epochs=10", "--eval_epoch=5"]
path, images = train("--head=spq", "--model_save_path=models_spq", *own)

# %% [markdown]
# ## CGD
#
# SPoC, MAC and GeM descriptors side by side, learned from class labels and measured on classes that were never seen.
# This sample is tiny; with CUB-200-2011 give `--dataset=cub200`, `--data_dir=CUB_200_2011` and leave out the sizes.

# %%
own = ["--dataset=cgd_sample", "--image_size=32", "--width_multiplier=0.125", "--n_dim=96", "--init=None"]
path, images = train(
    "--head=cgd", "--model_save_path=models_cgd", *own, "--batch_size=64", f"--total_epochs={2 if SMALL else 40}"
)
