"""PQIndex, the class: who may change an index and what a search sees of it."""

import threading

import numpy as np

from gpq_tf.index import arguments, exact, faiss_engine, file
from gpq_tf.index import ids as id_rows
from gpq_tf.index.faiss_engine import FaissEngine
from gpq_tf.index.inverted_lists import InvertedLists
from gpq_tf.index.rows import read_only
from gpq_tf.index.snapshot import Snapshot
from gpq_tf.index.store import PACKED_K, Store

# From so many codes on "auto" takes Faiss: below, the exact engine answers 100 queries in a tenth of a second or so.
_FAISS_FROM = 1_000_000
_FAISS_UP_TO = 16  # codewords; above, its scan is no faster than the exact sums (benchmarks/index_speed.py)


class PQIndex:
    """Search among codes of a learned codebook.

    A code c (M,) stands for the vector whose j-th part is the codeword codebook[j, c[j]]. A query is compared
    with it part by part, without being quantized itself (the asymmetric distance of Jegou, Douze and Schmid,
    "Product Quantization for Nearest Neighbor Search", TPAMI 2011), by one of

        "inner_product"   M - sum_j <q_j, c_j>          as GPQ ranks
        "l2"              sum_j ||q_j - c_j||           as SPQ ranks
        "squared_l2"      sum_j ||q_j - c_j||^2         the textbook's

    Per query, the M * K distances of its parts to all codewords are tabulated; the distance to a code is the
    float32 sum of its M entries, first book first. So equal codes have bit-equal distances, wherever they lie
    and however many queries come along.

    Two engines search. "exact" sums the distance to every code and is right to the last tied code. "faiss" (K up to
    256) lets Faiss scan for candidates, several times faster, and computes their distances as the exact engine does:
    at 99.9 % of the places or better the distances are those of the exact answer, and ids differ among equal distances
    only (`gpq_tf.index.faiss_engine`). It holds a second copy of the codes up to K = 16. Both look at all codes;
    `search(..., n_probe=16)` looks at a small part of them, by inverted lists over the learned codes.

    Codes take ceil(M / 2) bytes up to K = 16, M bytes up to K = 256, 2 M above. Ids take nothing while they are
    consecutive numbers, 8 bytes each otherwise. Every code has a label and a path, or none has.

    Any number of threads may search, add, remove and save at once: a search answers from all the codes that were
    there at one moment, and changes wait for one another.

    Args:
        codebook: float (M, K, d), M books (1 to 256) of K codewords (2 to 65,536) of length d, finite.
        metric: str, one of the above.
        model: what made the codes, to be kept with them: {"name": str, a name or path, "sha256": str}, or None.
        engine: "exact", "faiss", or "auto": Faiss from a million codes on for K up to 16, else exact.

    Attributes:
        codebook: float32 (M, K, d), read-only.
        metric: str.
        model: dict or None.
        engine: str, as given.

    Raises:
        ValueError: if the codebook is not three-dimensional, empty, not finite or beyond these limits, the metric
            is unknown, or the model is something else.

    Example:
        >>> codebook = np.array([[[1.0, 0.0], [0.0, 1.0]]])  # one book of two codewords in the plane
        >>> index = PQIndex(codebook)
        >>> index.add([[1], [0], [1]])
        >>> distances, ids = index.search([[0.0, 1.0]], k=4)
        >>> distances
        array([[ 0.,  0.,  1., inf]], dtype=float32)
        >>> ids
        array([[ 0,  2,  1, -1]])
    """

    def __init__(self, codebook, metric="inner_product", model=None, engine="auto"):
        self.metric = arguments.checked_metric(metric)
        self.codebook = arguments.checked_codebook(codebook)
        self.model = arguments.checked_model(model)
        self.engine = arguments.checked_engine(engine, self.K)
        self._begin(Store.empty(self.M, self.K))

    def _begin(self, store):
        self._store = store  # all there is, replaced in one assignment; whoever reads it reads it once
        self._writing = threading.Lock()
        self._runs = None  # see `ids`; belongs to the writers
        self._grouping = threading.Lock()
        self._grouped = (None, None)  # (Store, Snapshot), the last that was made
        # What searches need beside the codes, each a class with `of` and `extended`: (Store, the last that was made).
        self._built = {FaissEngine: (None, None), InvertedLists: (None, None)}
        self._building = {kind: threading.Lock() for kind in self._built}

    def __getstate__(self):
        # A lock cannot be sent to another process; the rest can be made again.
        names = ("codebook", "metric", "model", "engine", "_store")
        return {name: self.__dict__[name] for name in names}

    def __setstate__(self, state):
        self.__dict__.update(state)
        self._begin(state["_store"])

    @property
    def M(self):
        """int, number of books."""
        return self.codebook.shape[0]

    @property
    def K(self):
        """int, codewords a book."""
        return self.codebook.shape[1]

    @property
    def d(self):
        """int, length of a codeword; queries have D = M * d values."""
        return self.codebook.shape[2]

    @property
    def codes(self):
        """The living codes in insertion order: (N, M), read-only, in the smallest unsigned type for K - 1.

        Up to K = 16 this unpacks them all: N * M bytes and the time to fill them, at each use.
        """
        return self._store.codes()

    @property
    def ids(self):
        """The ids of `codes`: int64 (N,), read-only; written out (8 N bytes) where they are consecutive."""
        return read_only(id_rows.as_array(self._store.ids))

    @property
    def labels(self):
        """The labels of `codes`: read-only int32 (N,), or uint8 (N, C) of 0 and 1; None without labels."""
        labels = self._store.labels
        return None if labels is None else labels.array

    @property
    def paths(self):
        """The paths of `codes`: a sequence of N str; None without paths."""
        return self._store.paths

    def __len__(self):
        return len(self._store)

    def describe(self):
        """What the index holds, what that takes and how it searches, in four lines.

        Returns:
            str.

        Example:
            >>> index = PQIndex(np.zeros((12, 16, 4)))
            >>> index.add(np.zeros((1000, 12), int))
            >>> print(index.describe())
            1000 codes of 48 bits (M=12 books, K=16 codewords of d=4), inner_product
            bytes: codes 6000, ids 0, labels 0, paths 0, grouped for metrics 0, lists 0
            engine: exact (auto: fewer than 1000000 codes)
            lists for n_probe: none
        """
        store, (of, grouped), (_, lists) = self._store, self._grouped, self._built[InvertedLists]
        engine, why = self._engine_for(store)
        held = {
            "codes": store.packed.nbytes,
            "ids": 0 if isinstance(store.ids, range) else store.ids.nbytes,
            "labels": 0 if store.labels is None else store.labels.nbytes,
            "paths": 0 if store.paths is None else store.paths.nbytes,
            "grouped for metrics": grouped.nbytes if of is store else 0,
            "lists": 0 if lists is None else lists.nbytes,
        }
        return (
            f"{len(store)} codes of {self.M * (self.K - 1).bit_length()} bits (M={self.M} books, K={self.K} codewords "
            f"of d={self.d}), {self.metric}\n"
            f"bytes: {', '.join(f'{name} {n}' for name, n in held.items())}\n"
            f"engine: {engine} ({why})\n"
            f"lists for n_probe: {'none' if lists is None else f'{len(lists.centroids)} of {len(lists)} codes'}"
        )

    def add(self, codes, ids=None, labels=None, paths=None):
        """Append codes. Nothing is added when anything is refused.

        Adding n codes costs time proportional to n, on average: room to grow is taken in advance. Explicit ids that
        are not all above the largest ever given are looked up: the first time all ids are sorted, later n log N.

        Args:
            codes: integer (n, M) of any integer type, values in [0, K).
            ids: integer (n,), unique among the living ones, any int64 but -1 (which marks "nothing found").
                None counts on from the largest id ever given, from 0 at first.
            labels: integer (n,), the codes' classes (int32), or (n, C) of 0 and 1, multi-hot.
            paths: n str or pathlib.Path, where the codes' images lie.

        Raises:
            ValueError: if a shape or type is wrong, a code is out of range, an id is taken or repeated, or labels or
                paths are given for codes behind codes without them, or not given behind codes with them.
        """
        codes = arguments.checked_codes(codes, self.M, self.K)
        ids = None if ids is None else arguments.checked_new_ids(ids, len(codes))
        labels = None if labels is None else arguments.checked_labels(labels, len(codes))
        paths = None if paths is None else arguments.checked_paths(paths, len(codes))
        with self._writing:
            store = self._store
            if len(store):
                _check_like("labels", labels, store.labels)
                _check_like("paths", paths, store.paths)
                if labels is not None and labels.shape[1:] != store.labels.array.shape[1:]:
                    raise ValueError(
                        f"Invalid labels. Expected shape {(len(codes), *store.labels.array.shape[1:])}, as in the "
                        f"index. Received: shape {labels.shape}"
                    )
            if ids is None:
                ids = _following_ids(store.next_id, len(codes))
            else:
                self._check_free(store, ids)
            if len(codes) == 0:
                return
            runs = None if self._runs is None else id_rows.runs_with(self._runs, ids)
            self._store, self._runs = store.added(codes, ids, labels, paths), runs

    def remove(self, ids):
        """Remove codes by id, with their labels and paths; what stays keeps its order.

        This copies what stays. Nothing is removed when an id is unknown.

        Args:
            ids: integer (n,), living ids.

        Raises:
            ValueError: if an id is not in the index.
        """
        ids = arguments.checked_ids(ids)
        with self._writing:
            positions = id_rows.positions(self._store.ids, ids)
            if len(positions) == 0:
                return
            store = self._store.removed(positions)
            searched = self._runs is not None and not isinstance(store.ids, range)
            self._store, self._runs = store, id_rows.runs_without(self._runs, ids) if searched else None

    def positions(self, ids):
        """Where codes are: `index.codes[p]`, `index.labels[p]` and `index.paths[p]` for p = positions([id])[0].

        At once while ids are consecutive; otherwise all ids are gone through.

        Args:
            ids: integer (n,), living ids, as `search` returns them.

        Returns:
            intp (n,).

        Raises:
            ValueError: if an id is not in the index, as -1 never is.
        """
        return id_rows.positions(self._store.ids, arguments.checked_ids(ids))

    def search(self, queries, k, n_probe=None):
        """Find the k nearest codes of each query.

        With `n_probe` the answer is approximate. The codes lie in about sqrt(N) inverted lists, neighbours together
        (`gpq_tf.index.inverted_lists`), and only those of the n_probe lists nearest to the query are looked at: what is
        returned has its right distance, but nearer codes may be missed, most of them in other lists, and the lists may
        hold fewer than k. More lists find more and take longer; with all of them, or more, the answer is the one
        without `n_probe`.

        The first such search learns the lists, a few seconds for a million codes. They grow with `add`; after `remove`,
        and when there are four times as many codes, the next such search learns them again. They are kept in memory,
        12 bytes a code and a second copy of it, and in no file.

        Args:
            queries: float (Q, D), finite; compared as float32.
            k: int >= 1; may exceed the number of codes.
            n_probe: int >= 1, lists to look into, for K up to 256; None for all codes.

        Returns:
            distances: float32 (Q, k), lowest first, +inf past the end.
            ids: int64 (Q, k); equal distances in insertion order, -1 past the end.

        Raises:
            ValueError: if queries have another shape, or hold NaN, infinity or values whose distances
                overflow float32 (the row is named), k or n_probe is not a positive integer, or n_probe is given for
                K above 256.
        """
        queries, k = self.checked_queries(queries), arguments.checked_positive("k", k)
        store, distances, positions = self._nearest(queries, k, arguments.checked_n_probe(n_probe, self.K))
        return distances, id_rows.taken_from(store.ids, positions)

    def _nearest(self, queries, k, n_probe):
        """(store, distances, positions): the Store that was searched, and what was found in it."""
        if n_probe is not None:
            store, lists = self._up_to_date(InvertedLists)
            if n_probe < len(lists.centroids):
                return store, *lists.search(queries, k, n_probe)
        store = self._store
        if self._engine_for(store)[0] == "faiss":
            store, engine = self._up_to_date(FaissEngine)
            return store, *engine.search(queries, k)
        rows, packed = store.checked_rows(), self.K <= PACKED_K
        return store, *exact.nearest(self.codebook, self.metric, rows, packed, queries, k)

    def checked_queries(self, queries):
        """`queries` as float32 (Q, D), or ValueError, as in `search`."""
        return arguments.checked_queries(queries, self.M * self.d)

    def snapshot(self):
        """The living codes as a `Snapshot`, made when first needed after `add` or `remove`."""
        return self._snapshot_of(self._store)

    def _snapshot_of(self, store):
        with self._grouping:  # threads that search after a change wait for one grouping instead of making several
            of, snapshot = self._grouped
            if of is not store:
                snapshot = Snapshot.of(self.codebook, self.metric, store.codes())
                self._grouped = (store, snapshot)
        return snapshot

    def _engine_for(self, store):
        """The engine that searches these codes, and why."""
        if self.engine != "auto":
            return self.engine, "as asked for"
        if self.K > _FAISS_UP_TO:
            return "exact", f"auto: Faiss's scan is the faster one up to K={_FAISS_UP_TO}"
        if len(store) < _FAISS_FROM:
            return "exact", f"auto: fewer than {_FAISS_FROM} codes"
        return "faiss", f"auto: {_FAISS_FROM} codes or more"

    def _up_to_date(self, kind):
        """The Store of this moment and a `kind` of its codes, extended after `add` and made anew after `remove`."""
        with self._building[kind]:
            # Read in here: a thread that waited would otherwise ask for what is outdated, and have it built once more.
            store, (of, built) = self._store, self._built[kind]
            if of is not store:
                rows = store.checked_rows()
                grown = of is not None and of.removals == store.removals
                built = built.extended(rows) if grown else kind.of(self.codebook, self.metric, rows)
                self._built[kind] = (store, built)
        return store, built

    def to_faiss(self):
        """The same codewords, codes and ids as a Faiss index, to be searched or written by Faiss.

        Returns:
            faiss.IndexPQ, in a faiss.IndexIDMap2 unless the ids are 0 .. N - 1. For "inner_product" it answers the
            sum of inner products, largest first, where our distance is M minus that.

        Raises:
            ValueError: if the metric is "l2", which Faiss has not, or K is not a power of two.

        Example:
            >>> index = PQIndex(np.array([[[1.0], [-1.0]]]), "squared_l2")
            >>> index.add([[0], [1]])
            >>> index.to_faiss().search(np.array([[3.0]], "float32"), 1)
            (array([[4.]], dtype=float32), array([[0]]))
        """
        store = self._store
        plain = store.ids == range(len(store))
        ids = None if plain else id_rows.as_array(store.ids)
        return faiss_engine.to_faiss(self.codebook, self.metric, store.checked_rows(), ids)

    @classmethod
    def from_faiss(cls, index, model=None, engine="auto"):
        """An index of what a Faiss index holds: its centroids become the codebook.

        Args:
            index: faiss.IndexPQ, or a faiss.IndexIDMap2 around one.
            model, engine: as for `PQIndex`.

        Returns:
            PQIndex, "inner_product" or "squared_l2".

        Raises:
            ValueError: if the index is of another kind or not whole.

        Example:
            >>> index = PQIndex(np.array([[[1.0], [-1.0]]]))
            >>> index.add([[1], [0]], ids=[7, 3])
            >>> PQIndex.from_faiss(index.to_faiss()).ids
            array([7, 3])
        """
        codebook, metric, codes, ids = faiss_engine.from_faiss(index)
        taken = cls(codebook, metric, model, engine)
        taken.add(codes, ids)
        return taken

    def save(self, path):
        """Write the index to one file, whole or not at all.

        A safetensors file with checksums (`gpq_tf.index.file` describes it): codebook, metric, packed codes, ids,
        labels, paths, model. Whoever opens `path` finds the old file or the new one.

        Args:
            path: str or Path.

        Raises:
            OSError: if the file cannot be written.
        """
        file.write(path, self.codebook, self.metric, self.model, self._store)

    @classmethod
    def load(cls, path, verify=True, engine="auto"):
        """Open a saved index.

        Args:
            path: str or Path.
            verify: bool. True reads the file into memory and checks all of it. False checks the header, the sizes
                and the codebook, and maps the rest, which is read when it is searched: at once for any size. The
                first search, `add` or `remove` refuses codewords that are not in the codebook. The file is never
                changed: the first `add` or `remove` copies. Nobody may overwrite a mapped file in place (`save` does
                not, it replaces the file).
            engine: as for `PQIndex`; what Faiss needs is built anew, no file holds it.

        Returns:
            PQIndex, equal to the saved one.

        Raises:
            ValueError: if the file is not a whole, unchanged index of a known version: which file, what was
                expected and what was found.
            OSError: if the file cannot be read.

        Example:
            >>> index = PQIndex(np.zeros((2, 4, 1)))
            >>> index.add([[1, 3], [0, 2]], paths=["a.png", "b.png"])
            >>> index.save("/tmp/gpq_tf_doctest.safetensors")
            >>> list(PQIndex.load("/tmp/gpq_tf_doctest.safetensors").paths)
            ['a.png', 'b.png']
        """
        codebook, metric, model, store = file.read(path, verify)
        index = cls(codebook, metric, model, engine)
        index._store = store
        return index

    def _check_free(self, store, ids):
        """ValueError if one of `ids` is living. Ids that are all larger than any before need no looking up."""
        if len(ids) == 0 or ids.min() >= store.next_id:
            return
        if isinstance(store.ids, range):
            taken = (ids >= store.ids.start) & (ids < store.ids.stop)
        else:
            if self._runs is None:
                self._runs = id_rows.runs_of(store.ids.array)
            taken = id_rows.in_runs(self._runs, ids)
        if taken.any():
            raise ValueError(f"Invalid ids. Expected new ids. Received: {ids[taken].min()}, which is in the index")


def _check_like(name, given, held):
    """ValueError unless new codes come with labels (or paths) exactly where those in the index have them."""
    if given is None and held is not None:
        raise ValueError(f"Invalid {name}. Expected one for each code, as in the index. Received: None")
    if given is not None and held is None:
        raise ValueError(f"Invalid {name}. Expected None, since the codes in the index have no {name}. Received: some")


def _following_ids(next_id, n):
    if next_id + n > np.iinfo(np.int64).max:
        raise ValueError(f"Invalid ids. Expected explicit ids. Received: None after the id {next_id - 1}")
    return np.int64(next_id) + np.arange(n)
