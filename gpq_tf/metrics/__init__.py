"""How good a ranking is, and how well the codes use their codebook.

What each measures:

    average_precision        of answers that are ranked already
    mean_average_precision   of an index: (Q, D) queries against N codes, as GPQ and SPQ publish
    precision_at_k           of an index, at chosen ranks
    precision_recall_curve   of an index, at all or chosen ranks; its recall is the share of the relevant codes found
    recall_at_k              of embeddings among themselves, as CGD publishes: the share of queries with a hit
    codebook_usage           how many codewords occur, and how evenly
"""

from gpq_tf.metrics.ap import average_precision, mean_average_precision
from gpq_tf.metrics.curve import precision_at_k, precision_recall_curve
from gpq_tf.metrics.recall import recall_at_k
from gpq_tf.metrics.usage import codebook_usage

__all__ = [
    "average_precision",
    "codebook_usage",
    "mean_average_precision",
    "precision_at_k",
    "precision_recall_curve",
    "recall_at_k",
]
