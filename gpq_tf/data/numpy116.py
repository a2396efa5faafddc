"""The order that numpy 1.16's default `argsort` gives to equal values.

That sort is an introsort and not stable. Which CIFAR-10 images the original GPQ labelled, and which it took
for queries, follows from how it moves equal labels; newer versions of numpy move them otherwise, and
differently from one processor to the next. So the order is recomputed here, step by step.
"""

SMALL = 15  # a range of at most SMALL + 1 values is insertion-sorted


def argsort(values):
    """Indices that sort `values`, with ties where numpy 1.16 leaves them.

    Introsort (Musser, 1997): quicksort on the median of three; ranges of at most 16 are insertion-sorted, and
    one reached through more than 2 floor(log2 n) partitions is heap-sorted.

    Args:
        values: sequence of n integers.

    Returns:
        list of n int.

    Example:
        >>> order = argsort([1, 0] * 10)
        >>> order[:5], argsort([2, 0, 1])
        ([9, 17, 15, 13, 11], [1, 2, 0])
    """
    values = list(values)
    order = list(range(len(values)))
    waiting = [(0, len(order) - 1, 2 * (len(order).bit_length() - 1))]
    while waiting:
        first, last, depth = waiting.pop()
        if depth < 0:
            order[first : last + 1] = heapsort(values, order[first : last + 1])
            continue
        while last - first > SMALL:
            middle = _partition(values, order, first, last)
            depth -= 1
            # The larger side waits, the smaller goes on; the depth is looked at again only when a side is
            # taken up.
            if middle - first < last - middle:
                waiting.append((middle + 1, last, depth))
                last = middle - 1
            else:
                waiting.append((first, middle - 1, depth))
                first = middle + 1
        # Insertion sort is stable, and so its result is that of any stable sort.
        order[first : last + 1] = sorted(order[first : last + 1], key=values.__getitem__)
    return order


def heapsort(values, indices):
    """The list `indices` in the order in which numpy's heapsort leaves `values[index]`."""
    heap = list(indices)
    for root in reversed(range(len(heap) // 2)):
        _sift_down(values, heap, root, heap[root], len(heap))
    for size in reversed(range(1, len(heap))):
        item, heap[size] = heap[size], heap[0]
        _sift_down(values, heap, 0, item, size)
    return heap


def _partition(values, order, first, last):
    """Partition order[first..last] around the median of its ends and middle; return its final place."""
    middle = first + (last - first) // 2
    for low, high in ((first, middle), (middle, last), (first, middle)):
        if values[order[high]] < values[order[low]]:
            order[low], order[high] = order[high], order[low]
    pivot = values[order[middle]]
    order[middle], order[last - 1] = order[last - 1], order[middle]
    left, right = first, last - 1
    while True:
        # Both scans stop at values equal to the pivot: this is what carries equal labels across.
        left += 1
        while values[order[left]] < pivot:
            left += 1
        right -= 1
        while pivot < values[order[right]]:
            right -= 1
        if left >= right:
            break
        order[left], order[right] = order[right], order[left]
    order[left], order[last - 1] = order[last - 1], order[left]
    return left


def _sift_down(values, heap, node, item, size):
    """Put `item` into the hole at `node` of the max-heap heap[:size], moving larger children up."""
    while (child := 2 * node + 1) < size:
        if child + 1 < size and values[heap[child]] < values[heap[child + 1]]:
            child += 1
        if values[item] >= values[heap[child]]:
            break
        heap[node] = heap[child]
        node = child
    heap[node] = item
