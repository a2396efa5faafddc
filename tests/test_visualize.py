"""The ranked-list picture, read back pixel by pixel."""

import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from gpq_tf.visualize import IRRELEVANT, RELEVANT, UNKNOWN, ranked_list

SIDE = 208  # pixels of a result with its frame
FRAME = 8


def solid(grey, shape=(32, 32)):
    return np.full((*shape, 3), grey, np.uint8)


def draw(path, n, relevant=None, shape=(32, 32), **more):
    """A query of grey 100 and n results of grey 10, 20, ..; returns the picture as uint8 (H, W, 3)."""
    images = [solid(10 * (i + 1), shape) for i in range(n)]
    relevant = [i % 3 == 0 for i in range(n)] if relevant is None else relevant
    ranked_list(path, solid(200, shape), 1, images, [i % 2 for i in range(n)], relevant, **more)
    return np.asarray(Image.open(path).convert("RGB"))


def colour_at(picture, colour):
    return (picture == colour).all(axis=2)


def corners(picture, grey, side):
    """Top left and bottom right of the square of this grey, checked to be whole."""
    rows, columns = np.nonzero(colour_at(picture, (grey, grey, grey)))
    top, bottom, left, right = rows.min(), rows.max(), columns.min(), columns.max()
    assert (bottom - top + 1, right - left + 1) == (side, side)
    return top, left, bottom, right


@pytest.mark.parametrize("n", [1, 4, 5, 6, 10, 13])
def test_frames_have_the_colour_of_relevance_and_stand_in_order(tmp_path, n):
    relevant = np.random.default_rng(n).random(n) < 0.5
    picture = draw(tmp_path / "list.png", n, relevant)
    places = []
    for i in range(min(n, 10)):
        top, left, bottom, right = corners(picture, 10 * (i + 1), SIDE - 2 * FRAME)
        expected, other = (RELEVANT, IRRELEVANT) if relevant[i] else (IRRELEVANT, RELEVANT)
        tile = picture[top - FRAME : bottom + FRAME + 1, left - FRAME : right + FRAME + 1]
        frame = np.ones((SIDE, SIDE), bool)
        frame[FRAME:-FRAME, FRAME:-FRAME] = False
        assert colour_at(tile, expected)[frame].all()
        assert not colour_at(tile, other).any()
        places.append((top, left))
    assert places == sorted(places)
    n_green = colour_at(picture, RELEVANT).sum()
    n_red = colour_at(picture, IRRELEVANT).sum()
    area = SIDE**2 - (SIDE - 2 * FRAME) ** 2
    assert (n_green, n_red) == (area * relevant[:10].sum(), area * (~relevant[:10]).sum())


def test_frames_are_grey_where_relevance_is_unknown(tmp_path):
    images = [solid(10 * (i + 1)) for i in range(3)]
    ranked_list(tmp_path / "list.png", solid(200, (300, 400)), "photo.jpg", images, [0, 1, 0], None, ["cat", "dog"])
    picture = np.asarray(Image.open(tmp_path / "list.png").convert("RGB"))
    assert not colour_at(picture, RELEVANT).any() and not colour_at(picture, IRRELEVANT).any()
    for grey in (10, 20, 30):
        top, left, bottom, right = corners(picture, grey, SIDE - 2 * FRAME)
        assert colour_at(picture[top - FRAME : bottom + FRAME + 1, left - FRAME : left], UNKNOWN).all()
        assert colour_at(picture[bottom + 1 : bottom + FRAME + 1, left : right + 1], UNKNOWN).all()


def test_the_query_is_large_and_left(tmp_path):
    picture = draw(tmp_path / "list.png", 10)
    _, query_left, _, query_right = corners(picture, 200, 512)
    _, left, _, _ = corners(picture, 10, SIDE - 2 * FRAME)
    assert query_left < query_right < left


def test_pixels_are_sharp_squares(tmp_path):
    image = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    image[0, 0] = image[-1, -1] = (1, 2, 3)  # found again by this colour
    ranked_list(tmp_path / "list.png", solid(200), "query", [image], ["result"], [True])
    picture = np.asarray(Image.open(tmp_path / "list.png").convert("RGB"))
    rows, columns = np.nonzero(colour_at(picture, (1, 2, 3)))
    drawn = picture[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
    np.testing.assert_array_equal(drawn, image.repeat(6, axis=0).repeat(6, axis=1))


@pytest.mark.parametrize("shape", [(16, 32), (40, 20), (300, 500), (1, 1)])
def test_other_sizes_keep_their_proportions(tmp_path, shape):
    picture = draw(tmp_path / "list.png", 3, shape=shape)
    rows, columns = np.nonzero(colour_at(picture, (20, 20, 20)))
    height, width = np.ptp(rows) + 1, np.ptp(columns) + 1
    assert max(height, width) == pytest.approx(SIDE - 2 * FRAME, abs=2)
    assert height / width == pytest.approx(shape[0] / shape[1], rel=0.03)


def test_without_results_the_query_stands_alone(tmp_path):
    picture = draw(tmp_path / "list.png", 0)
    corners(picture, 200, 512)
    assert picture.shape[1] < 700


def test_names_and_title_change_the_text_alone(tmp_path):
    numbers = draw(tmp_path / "numbers.png", 4)
    names = draw(tmp_path / "names.png", 4, class_names=["cat", "dog"])
    assert numbers.shape == names.shape
    differing = (numbers != names).any(axis=2)
    assert differing.any()
    captions = np.ones(differing.shape, bool)
    for grey, side in ((200, 512), (10, 192), (20, 192), (30, 192), (40, 192)):
        top, left, bottom, right = corners(names, grey, side)
        captions[top:bottom, left:right] = False
    assert not differing[~captions].any()
    titled = draw(tmp_path / "titled.png", 4, title="Query 7, $48 bits")  # a dollar starts no formula
    assert titled.shape[0] > names.shape[0]
    for grey, side in ((200, 512), (10, 192), (40, 192)):
        place, moved = corners(names, grey, side), corners(titled, grey, side)
        assert np.subtract(moved, place).tolist() == [titled.shape[0] - names.shape[0], 0] * 2
    assert (titled[48 : 48 + 60] < 128).any()  # the title's ink, where there was margin before


def test_a_long_name_ends_before_the_next_tile(tmp_path):
    ranked_list(
        tmp_path / "long.png",
        solid(200),
        "q",
        [solid(10), solid(20)],
        ["a name that is far too long to stand under a tile", ""],
        [True, True],
    )
    picture = np.asarray(Image.open(tmp_path / "long.png").convert("L"))
    _, left, bottom, _ = corners(picture[..., None].repeat(3, 2), 20, 192)
    below_second = picture[bottom + FRAME + 40 : bottom + FRAME + 76, left - FRAME : left + 192]
    assert (below_second == 255).all()
    assert picture[bottom + FRAME + 40 : bottom + FRAME + 76, : left - FRAME].min() < 255


def test_pyplot_is_not_used(tmp_path):
    program = (
        "import sys, numpy, gpq_tf.visualize\n"
        "assert 'matplotlib' not in sys.modules\n"
        "image = numpy.zeros((4, 4, 3), 'uint8')\n"
        "gpq_tf.visualize.ranked_list(sys.argv[1], image, 0, [image], [0], [True])\n"
        "assert 'matplotlib.figure' in sys.modules and 'matplotlib.pyplot' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", program, tmp_path / "list.png"], check=True)
    assert (tmp_path / "list.png").is_file()


def test_refusals_leave_no_file(tmp_path):
    good = {"query_image": solid(1), "query_class": 0, "result_images": [solid(2)], "result_classes": [0]}
    for change, path, message in [
        (
            {"query_image": np.zeros((4, 4, 3))},
            "a.png",
            "Invalid query_image. Expected uint8 of shape (H, W, 3).",
        ),
        (
            {"result_images": [np.zeros((4, 4), np.uint8)]},
            "a.png",
            "Invalid result_images[0]. Expected uint8",
        ),
        ({"result_classes": [0, 1]}, "a.png", "Received: 1, 2 and 1"),
        ({"class_names": []}, "a.png", "Invalid class. Expected one of 0 class names. Received: 0"),
        ({}, "a.jpg", "Invalid path. Expected a name ending in .png."),
    ]:
        with pytest.raises(ValueError) as error:
            ranked_list(tmp_path / path, relevant=[True], **good | change)
        assert message in str(error.value)
    assert list(tmp_path.iterdir()) == []
