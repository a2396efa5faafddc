"""Time the original SPQ program: training steps, encoding, augmentation, retrieval. Python 3.11 with PyTorch 2.13 only.

    python3.11 original_spq.py CHECKOUT N_STEPS BATCH N_IMAGES PROBLEM N_QUERIES

CHECKOUT is a copy of the original's repository, PROBLEM an .npz of spq_speed.py: what is retrieved. The original's
network, quantisation, loss, augmentation and retrieval run as they are, on the CPU; only what its training function
keeps inside (the head that joins them, and the loop) is written anew here. Its data loader needs torchvision, which is
replaced by the conversion alone, of a whole batch at once. The last line printed is a JSON object; spq_speed.py reads
it.
"""

import contextlib
import json
import os
import sys
import time
import types
import warnings

REPEATS = 2


def main():
    checkout, problem = sys.argv[1], sys.argv[5]
    n_steps, batch, n_images, n_queries = (int(sys.argv[position]) for position in (2, 3, 4, 6))
    sys.path.insert(0, checkout)
    warnings.simplefilter("ignore")
    torchvision = types.ModuleType("torchvision")
    torchvision.transforms = types.ModuleType("torchvision.transforms")
    sys.modules |= {"torchvision": torchvision, "torchvision.transforms": torchvision.transforms}
    import torch

    torch.manual_seed(0)
    result = {"torch": torch.__version__}
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):  # its progress bars
        result |= measure_steps(n_steps, batch, n_images)
        result |= measure_retrieval(problem, n_queries)
    print(json.dumps(result))


def make_head():
    import torch
    import utils

    class Head(torch.nn.Module):
        """The descriptor, 8 books of 16 dimensions, and its soft assignment to 16 codewords."""

        def __init__(self):
            super().__init__()
            self.projection = torch.nn.Linear(512, 128)
            self.codewords = torch.nn.Parameter(torch.empty(16, 128))
            for weight in (self.projection.weight, self.codewords):
                torch.nn.init.xavier_uniform_(weight)

        def forward(self, features):
            descriptors = self.projection(features)
            return descriptors, utils.Soft_Quantization(descriptors, self.codewords, 8, 5.0)

    return Head()


def measure_steps(n_steps, batch, n_images):
    """Seconds of steps, of making a batch, of its two augmentations, and of encoding an image."""
    import kornia.augmentation as kornia
    import main_SPQ
    import numpy as np
    import Retrieval
    import torch

    import models

    head = make_head()
    network = torch.nn.Sequential(models.ResNet_Baseline(models.BasicBlock, [2, 2, 2, 2]), head)
    augmentation = torch.nn.Sequential(
        kornia.RandomResizedCrop(size=(32, 32)),
        kornia.RandomHorizontalFlip(p=0.5),
        kornia.ColorJitter(brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1, p=0.8),
        kornia.RandomGrayscale(p=0.2),
        kornia.RandomGaussianBlur((3, 3), (0.1, 2.0), p=0.5),
    )
    loss_of = main_SPQ.CQCLoss(torch.device("cpu"), batch, 0.5)
    optimizer = torch.optim.Adam(network.parameters(), lr=3e-4, weight_decay=1e-5)
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (max(5000, n_images), 32, 32, 3), "uint8")

    def tensor(chosen):
        return torch.from_numpy(np.ascontiguousarray(images[chosen].transpose(0, 3, 1, 2))).float() / 255

    found = {"draw_s": [], "step_s": [], "augment_s": [], "encode_s": []}
    for _ in range(n_steps):
        start = time.perf_counter()
        inputs = tensor(rng.permutation(len(images))[:batch])
        drawn = time.perf_counter()
        first, second = augmentation(inputs), augmentation(inputs)
        augmented = time.perf_counter()
        optimizer.zero_grad()
        (x_first, z_first), (x_second, z_second) = network(first), network(second)
        loss = loss_of(x_first, x_second, z_first, z_second)
        loss.backward()
        optimizer.step()
        loss.item()
        found["step_s"].append(time.perf_counter() - start)
        found["augment_s"].append(augmented - drawn)
        found["draw_s"].append(drawn - start)
    network.eval()
    with torch.no_grad():
        for _ in range(REPEATS):
            start = time.perf_counter()
            for at in range(0, n_images, batch):
                descriptors, _ = network(tensor(slice(at, min(at + batch, n_images))))
                Retrieval.Indexing(head.codewords, 8, descriptors)
            found["encode_s"].append((time.perf_counter() - start) / n_images)
    return found


def measure_retrieval(problem, n_queries):
    """Seconds a query: of distances and order alone, and of the figure with them; and that figure."""
    import numpy as np
    import Retrieval
    import torch

    arrays = np.load(problem)
    n_book, n_word, length = arrays["codebook"].shape
    codewords = torch.from_numpy(arrays["codebook"].transpose(1, 0, 2).reshape(n_word, n_book * length).copy())
    codes, queries = torch.from_numpy(arrays["codes"].astype("int32")), torch.from_numpy(arrays["queries"][:n_queries])
    labels = [torch.eye(10)[torch.from_numpy(arrays[f"{whose}_labels"])] for whose in ("gallery", "query")]
    start = time.perf_counter()
    for query in queries:
        torch.argsort(Retrieval.pqDist_one(codewords, n_book, codes, query))
    ranked = time.perf_counter()
    figure = Retrieval.Evaluate_mAP(
        codewords, n_book, codes, queries, labels[0], labels[1][:n_queries], torch.device("cpu"), 1000
    )
    scored = time.perf_counter()
    return {
        "search_s": (ranked - start) / n_queries,
        "evaluate_s": (scored - ranked) / n_queries,
        "mAP": float(figure),
    }


if __name__ == "__main__":
    main()
