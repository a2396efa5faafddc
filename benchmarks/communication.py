"""What the devices of a distributed step send one another, counted from the networks; no step is taken.

    python benchmarks/communication.py

For the published sizes of the three heads: bytes of the gradients that are added up, of the descriptors that are
gathered, and of the batch statistics that are averaged, per device and step; how many messages; and what follows for a
number of devices from their bandwidth and latency: an all-reduce of b bytes among n devices in a ring sends
2 b (n - 1) / n through each, in 2 (n - 1) rounds (in a tree 2 log2(n)). Writes benchmarks/results/communication.json.
"""

import os
from pathlib import Path

RESULT = Path(__file__).parent / "results" / "communication.json"
# passes of a step through the network, and float32 values that are gathered for each image of the batch
PUBLISHED = {
    "gpq": {"settings": ["--head=gpq"], "passes": 2, "gathered": lambda D, C: 2 * D + 1},
    "spq": {"settings": ["--head=spq"], "passes": 2, "gathered": lambda D, C: 2 * D},
    "cgd": {"settings": ["--head=cgd", "--n_CLASSES=100"], "passes": 1, "gathered": lambda D, C: D + C + 1},
}
# Eight GPUs of one machine (NVLink) and 64 of eight machines (400 Gbit/s a GPU), as their makers state them.
CLUSTERS = {"8": {"bytes_per_s": 450e9, "latency_s": 5e-6}, "64": {"bytes_per_s": 50e9, "latency_s": 10e-6}}


def main():
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    from gpq_tf import heads, settings
    from gpq_tf.backbones.batch_norm import BatchNormalization
    from gpq_tf.files import write_json
    from gpq_tf.network import RetrievalModel

    report = {"command": "python benchmarks/communication.py", "clusters": CLUSTERS, "heads": {}}
    for name, about in PUBLISHED.items():
        chosen = settings.resolve(about["settings"], "no config.py")
        model = RetrievalModel(**heads.architecture_of(chosen))
        norms = [layer for layer in model._flatten_layers() if isinstance(layer, BatchNormalization)]
        size = heads.recipe(name).descriptor_size(model.architecture)
        gradients = 4 * sum(int(variable.numpy().size) for variable in model.trainable_variables)
        gathered = 4 * chosen.batch_size * about["gathered"](size, model.architecture.get("n_classes", 0))
        # forwards the mean and then the variance, backwards two sums in one message
        statistics = 4 * 4 * about["passes"] * sum(int(norm.gamma.shape[0]) for norm in norms)
        found = {
            "batch": chosen.batch_size,
            "gradient_MB": round(gradients / 1e6, 2),
            "gathered_MB": round(gathered / 1e6, 3),
            "statistics_MB": round(statistics / 1e6, 3),
            "statistics_messages": 3 * about["passes"] * len(norms),
        }
        for n, cluster in CLUSTERS.items():
            ring = 2 * (int(n) - 1) / int(n) * (gradients + statistics) + gathered
            rounds = 2 * (int(n) - 1) * (found["statistics_messages"] + 1)
            found[f"ms_among_{n}"] = {
                "gradients": round(1e3 * 2 * (int(n) - 1) / int(n) * gradients / cluster["bytes_per_s"], 3),
                "all_bytes": round(1e3 * ring / cluster["bytes_per_s"], 3),
                "latency_of_rings": round(1e3 * rounds * cluster["latency_s"], 1),
                "latency_of_trees": round(
                    1e3 * 2 * (int(n) - 1).bit_length() * (found["statistics_messages"] + 1) * cluster["latency_s"], 1
                ),
            }
        report["heads"][name] = found
        print(name, found)
    write_json(RESULT, report)


if __name__ == "__main__":
    main()
