# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Search images by codes of six bytes
#
# A network turns every image into a short code, and an index of such codes is searched in milliseconds. Everything here
# runs on a CPU, with the weights and the images that come with the package: 10,800 images of CIFAR-10 to search among,
# 200 to search with.
#
# On Colab, put gpq-tf's folder on the machine first (`git clone`, or upload it), and install it with
# `%pip install -q ./gpq-tf`.

# %%
import matplotlib.pyplot as plt

import gpq_tf
from gpq_tf import data, metrics, retrieval, visualize

model = gpq_tf.load_model("gpq-cifar10-48bits")
sample = data.load("cifar10_sample")
print(sample.source)

# %% [markdown]
# ## Encode and search
#
# The codebook has 12 books of 16 codewords, so a code is 12 times 4 bits. Queries are not quantized: each is compared
# with the codewords, and the distances to all codes are sums of the entries of that table (asymmetric distance).

# %%
index = gpq_tf.PQIndex(model.codebook, model.search_metric)
index.add(model.encode(sample.gallery_images))
print(f"{len(index):,} codes of {retrieval.bytes_a_code(model)} bytes")

queries = model.embed(sample.query_images)
distances, ids = index.search(queries, k=10)
print(ids[0], distances[0].round(3))

# %% [markdown]
# ## Look at an answer
#
# A green frame marks an answer of the query's class, a red one any other.

# %%
answers = retrieval.answers(7, {"index": index, "queries": queries}, sample)
visualize.ranked_list("ranked_list.png", **answers, class_names=sample.class_names)
plt.figure(figsize=(12, 5))
plt.imshow(plt.imread("ranked_list.png"))
plt.axis("off")
plt.show()

# %% [markdown]
# ## How good is it?
#
# Mean average precision over all ranks, as the papers measure it: equal distances keep the order of the gallery.

# %%
score = metrics.mean_average_precision(queries, sample.query_labels, index, sample.gallery_labels)
print(f"mAP {score:.4f}")
right = sample.gallery_labels[ids] == sample.query_labels[:, None]
print(f"of the first ten answers {right.mean():.1%} are of the query's class")
usage = metrics.codebook_usage(index.codes, index.K)
print("codewords in use, book by book:", usage["used"].tolist())

# %% [markdown]
# ## Keep the index
#
# One file, with checksums; it opens again with `PQIndex.load`.

# %%
index.save("gallery.safetensors")
again = gpq_tf.PQIndex.load("gallery.safetensors")
print((again.search(queries, k=10)[1] == ids).all())

# %% [markdown]
# ## Your own images
#
# `model.encode` takes uint8 arrays (N, H, W, 3) of the size that the network was trained on, here 32x32.
# `python Demo.py --query_image=photo.jpg` resizes a photo and shows the ten images nearest to it, and
# `python train.py --dataset=image_folders --data_dir=photos` trains on your own images, a folder a class.
# [train.ipynb](train.ipynb) trains all three methods.
