"""PQIndex: a searchable collection of product-quantization codes, in memory and on disk."""

from gpq_tf.index.arguments import METRICS
from gpq_tf.index.pq_index import PQIndex
from gpq_tf.index.snapshot import Snapshot, distance_table, stable_argsort

__all__ = ["METRICS", "PQIndex", "Snapshot", "distance_table", "stable_argsort"]
