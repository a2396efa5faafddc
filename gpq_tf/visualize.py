"""Pictures of what a search found."""

import contextlib

import numpy as np

from gpq_tf.files import replacing

RELEVANT = (34, 158, 87)  # green, red and grey, RGB: the exact colours of the frames
IRRELEVANT = (214, 58, 53)
UNKNOWN = (110, 119, 129)
_INK, _MUTED, _EMPTY = "#1f2328", "#6e7781", "#eef0f2"
_RESULTS, _COLUMNS = 10, 5
_DPI = 200
# All lengths in pixels. Inside its frame a result is 6 x 32 wide and the query 16 x 32, so that every pixel
# of a CIFAR-10 image becomes a square of the same size.
_FRAME = 8
_TILE = 6 * 32 + 2 * _FRAME
_CAPTION = 76  # two lines of text below a tile
_GAP = 36  # between tiles
_QUERY = 2 * _TILE + _CAPTION + _GAP  # as high as both rows of results
_MARGIN = 48
_TITLE = 72


def ranked_list(path, query_image, query_class, result_images, result_classes, relevant, class_names=None, title=None):
    """Draw a query and its ten best answers as a PNG.

    The query is at the left; the answers follow in two rows, best first, each with its rank and class, in a
    green frame when it is relevant, a red one when it is not, and a grey one when nobody knows. Images keep their
    proportions; small ones are enlarged without smoothing.

    Args:
        path: str or Path ending in .png, replaced atomically, or a binary file to write into.
        query_image: uint8 (H, W, 3).
        query_class: int or str.
        result_images: sequence of uint8 (H, W, 3), best first; sizes may differ. Ten are drawn, or as many as
            there are.
        result_classes: sequence of int or str, one for each result.
        relevant: sequence of bool, one for each result; or None, not known.
        class_names: sequence of str, the names of classes given as int; None writes the numbers.
        title: str above the picture, or None.

    Raises:
        ValueError: if an image is not uint8 (H, W, 3), the sequences differ in length, a class has no name,
            or `path` does not end in .png.
        OSError: if the file cannot be written.

    Example:
        >>> cat, dog = np.zeros((2, 32, 32, 3), np.uint8)
        >>> ranked_list("/tmp/gpq_tf_doctest.png", cat, "cat", [cat, dog], ["cat", "dog"], [True, False])
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    into_file = hasattr(path, "write")
    if not into_file and not str(path).lower().endswith(".png"):
        raise ValueError(f"Invalid path. Expected a name ending in .png. Received: path={str(path)!r}")
    relevant = [None] * len(result_images) if relevant is None else relevant
    if not len(result_images) == len(result_classes) == len(relevant):
        raise ValueError(
            "Invalid results. Expected as many images as classes and relevance flags. "
            f"Received: {len(result_images)}, {len(result_classes)} and {len(relevant)}"
        )
    query_image = _checked_image("query_image", query_image)
    images = [_checked_image(f"result_images[{i}]", image) for i, image in enumerate(result_images[:_RESULTS])]

    columns = min(_COLUMNS, len(images))
    top = _MARGIN + (_TITLE if title else 0)
    left = _MARGIN + _QUERY + 2 * _GAP
    width = left + columns * (_TILE + _GAP) - _GAP if columns else _MARGIN + _QUERY
    height = top + _QUERY + _CAPTION
    # The Figure is made without pyplot: nothing global is touched, no window system is looked for.
    figure = Figure(figsize=((width + _MARGIN) / _DPI, (height + _MARGIN) / _DPI), dpi=_DPI, facecolor="white")
    FigureCanvasAgg(figure)
    if title:
        _text(figure, _MARGIN, _MARGIN, width - _MARGIN, title, fontsize=11, weight="bold", color=_INK)
    _tile(figure, _MARGIN, top, _QUERY, query_image, _INK, "Query", _class_name(query_class, class_names))
    for i, image in enumerate(images):
        row, column = divmod(i, _COLUMNS)
        x, y = left + column * (_TILE + _GAP), top + row * (_TILE + _CAPTION + _GAP)
        frame = UNKNOWN if relevant[i] is None else RELEVANT if relevant[i] else IRRELEVANT
        colour = tuple(channel / 255 for channel in frame)
        _tile(figure, x, y, _TILE, image, colour, str(i + 1), _class_name(result_classes[i], class_names))
    with contextlib.nullcontext(path) if into_file else replacing(path) as target:
        figure.savefig(target, format="png", dpi=_DPI)


def _tile(figure, left, top, side, image, colour, heading, caption):
    """Draw an image in a square frame with two lines of text below; in pixels from the figure's top left."""
    for inset, fill in ((0, colour), (_FRAME, _EMPTY)):
        axes = _axes(figure, left + inset, top + inset, side - 2 * inset)
        axes.set(xticks=[], yticks=[], facecolor=fill)
        axes.spines[:].set_visible(False)
    enlarged = max(image.shape[:2]) < side
    axes.imshow(image, interpolation="nearest" if enlarged else "hanning")
    # The tile stays square: what a narrow image leaves free shows the pale ground.
    axes.set_adjustable("datalim")
    _text(figure, left, top + side + 12, side, heading, fontsize=8, weight="bold", color=_INK)
    _text(figure, left, top + side + 42, side + _GAP // 2, caption, fontsize=8, color=_MUTED)


def _axes(figure, left, top, side):
    width, height = figure.get_size_inches() * _DPI
    return figure.add_axes((left / width, 1 - (top + side) / height, side / width, side / height))


def _text(figure, left, top, room, text, **style):
    """Write one line whose end gives way to an ellipsis where it would be longer than `room` pixels."""
    width, height = figure.get_size_inches() * _DPI
    line = figure.text(left / width, 1 - top / height, text, va="top", parse_math=False, **style)
    while len(text) > 1 and line.get_window_extent().width > room:
        text = text[:-1]
        line.set_text(text.rstrip() + "…")


def _class_name(value, class_names):
    if class_names is None or isinstance(value, str):
        return str(value)
    if not 0 <= value < len(class_names):
        raise ValueError(f"Invalid class. Expected one of {len(class_names)} class names. Received: {value}")
    return str(class_names[value])


def _checked_image(name, image):
    image = np.asarray(image)
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or image.size == 0:
        raise ValueError(
            f"Invalid {name}. Expected uint8 of shape (H, W, 3). Received: {image.dtype} of shape {image.shape}"
        )
    return image
