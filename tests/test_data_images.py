"""Reading image files against the original's record, TensorFlow's decoder and plain loops."""

import io
import re
import threading
import time
import warnings

import numpy as np
import pytest
from PIL import Image

from gpq_tf.data import images
from gpq_tf.data.resize import resize
from tests import golden
from tests.image_files import encoded, picture, write

FOLDER = golden.CGD / "dataset"


@golden.needs_golden
def test_the_originals_path_to_the_bit():
    """Decoded, cut and resized: whatever the golden file has of its images."""
    recorded = golden.load("dataset.npz", golden.CGD)
    files = [FOLDER / path for path in recorded["test_paths"]]
    boxes = recorded["test_bbox_int_xywh"]
    for i, file in enumerate(files):
        pixels = images.decode(file.read_bytes(), str(file))
        np.testing.assert_array_equal(pixels, recorded[f"decoded/{i}"])
        np.testing.assert_array_equal(images.crop(pixels, boxes[i], str(file)), recorded[f"crop/{i}"])
    n_resized = 0
    for key, expected in recorded.items():
        found = re.fullmatch(r"resized/(\d+)/w(\d+)_h(\d+)", key)
        if found:
            i, width, height = map(int, found.groups())
            read = images.read_images(files[i : i + 1], boxes[i : i + 1], height, width)
            np.testing.assert_array_equal(read, expected[None], err_msg=key)
            n_resized += 1
    assert n_resized >= len(files)


@golden.needs_golden
def test_the_originals_jpegs_to_the_bit_and_not_turned():
    recorded = golden.load("dataset.npz", golden.CGD)
    names = {key.partition("/")[2] for key in recorded if key.startswith("jpeg/")}
    assert names
    for name in names:
        (file,) = FOLDER.rglob(f"{name}.jpg")
        np.testing.assert_array_equal(images.decode(file.read_bytes(), name), recorded[f"jpeg/{name}"])


@pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:2", "4:2:0", None])
@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("quality", [10, 75, 100])
def test_jpegs_are_decoded_with_accurate_integers(subsampling, progressive, quality):
    """TensorFlow's decoder does what the original's does only if told to; here Pillow is compared with it."""
    import tensorflow as tf

    for height, width in ((40, 60), (17, 31), (1, 1), (2, 50)):
        options = {"quality": quality, "progressive": progressive}
        options |= {"mode": "L"} if subsampling is None else {"subsampling": subsampling}
        content = encoded(picture(quality, height, width), ".jpg", **options)
        expected = tf.io.decode_jpeg(content, channels=3, dct_method="INTEGER_ACCURATE").numpy()
        np.testing.assert_array_equal(images.decode(content, "a.jpg"), expected)


def test_exif_does_not_turn_the_picture():
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: turn a quarter
    turned, plain = encoded(picture(0), ".jpg", exif=exif), encoded(picture(0), ".jpg")
    assert b"Exif" in turned
    np.testing.assert_array_equal(images.decode(turned, "a"), images.decode(plain, "a"))


@pytest.mark.parametrize("suffix", [".png", ".bmp", ".tif", ".ppm"])
def test_lossless_formats_give_their_pixels(suffix):
    np.testing.assert_array_equal(images.decode(encoded(picture(1), suffix), "a"), picture(1))


def test_alpha_is_dropped_and_grey_is_repeated():
    pixels = picture(2)
    see_through = np.dstack([pixels, pixels[..., 1]])
    np.testing.assert_array_equal(images.decode(encoded(see_through), "a"), pixels)
    grey = pixels[..., 0]
    three = np.stack([grey] * 3, axis=2)
    for content in (
        encoded(grey),
        encoded(np.dstack([grey, pixels[..., 1]])),
        encoded(grey, transparency=int(grey[0, 0])),
    ):
        np.testing.assert_array_equal(images.decode(content, "a"), three)
    bits = (grey > 100).astype(np.uint8) * 255
    np.testing.assert_array_equal(images.decode(encoded(bits, mode="1"), "a")[..., 2], bits)


def test_of_sixteen_bits_the_upper_eight_are_kept():
    deep = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    expected = (deep // 256).astype(np.uint8)[..., None].repeat(3, axis=2)
    np.testing.assert_array_equal(images.decode(encoded(deep), "a"), expected)


def test_palettes_are_looked_up_in_silence():
    content = encoded(picture(3), mode="P", transparency=bytes(range(256)))
    palette = Image.open(io.BytesIO(content))
    colours = np.reshape(palette.getpalette(), (-1, 3))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = images.decode(content, "a")
    np.testing.assert_array_equal(found, colours[np.asarray(palette)])


def test_four_inks_mix_as_in_the_original():
    """OpenCV: channel = paper - floor(ink * paper / 256), where paper = 255 - black."""
    content = encoded(picture(4, 9, 8), ".jpg", mode="CMYK", quality=95)
    inks = np.asarray(Image.open(io.BytesIO(content))).tolist()
    found = images.decode(content, "a")
    assert found.shape == (9, 8, 3)
    for (y, x, c), value in np.ndenumerate(found):
        paper = 255 - inks[y][x][3]
        assert value == paper - inks[y][x][c] * paper // 256


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "its format is not known"),
        (b"no image", "its format is not known"),
        (encoded(picture(0), ".jpg")[:700], "truncated"),
        (encoded(picture(0))[:700], "truncated"),
        (encoded(np.zeros((4, 4), np.float32), ".tif"), "its pixels are floats, whose range is not known"),
    ],
)
def test_what_is_no_image_is_named(tmp_path, content, message):
    path = tmp_path / "bird.jpg"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"^{re.escape(str(path))}: expected an image: .*{message}"):
        images.read_images([write(tmp_path / "fine.png", picture(0)), path], None, 8, 8)


def test_flipped_bytes_are_refused_or_decoded():
    rng = np.random.default_rng(0)
    for whole in (encoded(picture(0), ".jpg"), encoded(picture(0)), encoded(picture(0), ".gif", mode="P")):
        for place in rng.integers(0, len(whole), 100):
            changed = bytearray(whole)
            changed[place] ^= 1 << rng.integers(8)
            try:
                found = images.decode(bytes(changed), "bird")
            except ValueError as error:
                assert str(error).startswith("bird: expected an image: ")
            else:
                assert found.dtype == np.uint8 and found.ndim == 3 and found.shape[2] == 3


def test_an_absent_file_is_an_oserror_that_names_it(tmp_path):
    with pytest.raises(OSError, match=r"absent\.jpg"):
        images.read_images([tmp_path / "absent.jpg"], None, 8, 8)


@pytest.mark.parametrize(
    ("box", "columns", "rows"),
    [
        ((0, 0, 60, 40), slice(0, 60), slice(0, 40)),
        ((10, 5, 500, 500), slice(10, 60), slice(5, 40)),
        ((59, 39, 1, 1), slice(59, 60), slice(39, 40)),
        ((3, 4, 5, 600), slice(3, 8), slice(4, 40)),
    ],
)
def test_a_box_is_cut_and_clipped(box, columns, rows):
    np.testing.assert_array_equal(images.crop(picture(0), box, "a"), picture(0)[rows, columns])


@pytest.mark.parametrize(
    "box", [(60, 0, 5, 5), (0, 40, 5, 5), (-1, 0, 5, 5), (0, -1, 5, 5), (1, 1, 0, 5), (1, 1, 5, -2)]
)
def test_a_box_outside_is_refused_with_the_files_name(tmp_path, box):
    path = write(tmp_path / "bird.png", picture(0))
    x, y, width, height = box
    message = (
        f"{path}: expected a box that begins inside the image of 60x40 pixels. "
        f"Found: x={x} y={y} width={width} height={height}"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        images.read_images([path], np.array([box]), 8, 8)


@pytest.fixture
def corpus(tmp_path):
    """(files, boxes, the pictures they hold) of 23 sizes."""
    pictures = [picture(i, 20 + i, 50 - i) for i in range(23)]
    files = [write(tmp_path / f"{i}.png", pixels) for i, pixels in enumerate(pictures)]
    boxes = np.array([(i, 2, 10 + i, 9) for i in range(23)])
    return files, boxes, pictures


@pytest.mark.parametrize("n_threads", [None, 1, 5])
@pytest.mark.parametrize("batch_size", [1, 4, 23, 100])
def test_batches_come_in_order(corpus, batch_size, n_threads):
    files, boxes, pictures = corpus
    batches = list(images.image_batches(files, boxes, 8, 6, batch_size, n_threads=n_threads))
    assert [len(batch) for batch in batches[:-1]] == [batch_size] * (len(batches) - 1)
    expected = [resize(pixels[2:11, i : i + 10 + i], 8, 6) for i, pixels in enumerate(pictures)]
    np.testing.assert_array_equal(np.concatenate(batches), expected)
    np.testing.assert_array_equal(images.read_images(files, boxes, 8, 6, n_threads=n_threads), expected)


def test_more_than_a_batch_becomes_one_array(corpus):
    files, _, pictures = corpus
    found = images.read_images(files * 6, None, 5, 7)
    np.testing.assert_array_equal(found, [resize(pixels, 5, 7) for pixels in pictures] * 6)


def test_only_two_batches_are_read_ahead(corpus, monkeypatch):
    files, _, _ = corpus
    read, lock, really_read = [], threading.Lock(), images.read_image

    def note(file, *arguments):
        with lock:
            read.append(file)
        return really_read(file, *arguments)

    monkeypatch.setattr(images, "read_image", note)
    batches = images.image_batches(files, None, 4, 4, 5)
    for n_used in range(1, 5):
        next(batches)
        time.sleep(0.02)
        assert len(read) <= (n_used + 1) * 5
    batches.close()
    assert sorted(read, key=files.index) == files[: len(read)]


def test_no_files_give_no_batches():
    assert list(images.image_batches([], None, 8, 8, 4)) == []
    assert images.read_images([], np.zeros((0, 4), int), 8, 9).shape == (0, 8, 9, 3)


def test_a_part_of_a_file_is_read_in_place(tmp_path):
    contents = [encoded(picture(i)) for i in range(3)]
    packed = tmp_path / "packed"
    packed.write_bytes(b"head" + b"".join(contents))
    ends = 4 + np.cumsum([0] + [len(content) for content in contents])
    parts = [images.FilePart(str(packed), int(ends[i]), len(contents[i])) for i in range(3)]
    found = images.read_images(parts, None, 40, 60)
    np.testing.assert_array_equal(found, [picture(i) for i in range(3)])
    wrong = images.FilePart(str(packed), 1, 20)
    with pytest.raises(ValueError, match=rf"^{re.escape(str(packed))}, bytes 1 to 21: expected an image"):
        images.read_images([wrong], None, 4, 4)


def test_fast_averages_what_it_shrinks(tmp_path):
    """Black and white pixels in turn: the original sees single ones, Pillow's filter their mean."""
    board = (np.indices((256, 256)).sum(axis=0) % 2 * 255).astype(np.uint8)[..., None].repeat(3, axis=2)
    path = write(tmp_path / "board.png", board)
    fast = images.read_images([path], None, 16, 16, "fast")[0]
    assert np.abs(fast.astype(int) - 127).max() <= 3


def test_fast_is_pillows_bilinear_filter(corpus):
    files, boxes, pictures = corpus
    found = images.read_images(files, boxes, 8, 6, "fast")
    for i, (x, y, width, height) in enumerate(boxes):
        box = Image.fromarray(pictures[i]).crop((x, y, min(x + width, 50 - i), y + height))
        np.testing.assert_array_equal(found[i], box.resize((6, 8), Image.Resampling.BILINEAR))


@pytest.mark.parametrize(("box", "decoded"), [(None, (100, 150, 3)), ((0, 0, 500, 400), (400, 600, 3))])
def test_fast_decodes_a_large_jpeg_no_larger_than_needed(tmp_path, monkeypatch, box, decoded):
    path = write(tmp_path / "large.jpg", picture(0, 400, 600))
    shapes, really_decode = [], images.decode

    def note(*arguments):
        shapes.append(really_decode(*arguments).shape)
        return really_decode(*arguments)

    monkeypatch.setattr(images, "decode", note)
    assert images.read_image(path, box, 64, 64, "fast").shape == (64, 64, 3)
    images.read_image(path, box, 64, 64)
    assert shapes == [decoded, (400, 600, 3)]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"resize": "nearest"}, r"Invalid resize\. Expected one of opencv, fast\. Received: resize='nearest'"),
        ({"height": 0}, r"Invalid height\. Expected a positive integer\. Received: height=0"),
        ({"width": -3}, r"Invalid width\. Expected a positive integer\. Received: width=-3"),
        ({"batch_size": 0}, r"Invalid batch_size\. Expected a positive integer\. Received: batch_size=0"),
        ({"n_threads": 0}, r"Invalid n_threads\. Expected a positive integer\. Received: n_threads=0"),
        ({"boxes": [(0, 0, 1, 1)]}, r"Invalid boxes\. Expected one for each of 2 files\. Received: 1"),
    ],
)
def test_refuses_wrong_arguments_at_once(changed, message):
    arguments = {"files": ["a.jpg", "b.jpg"], "boxes": None, "height": 8, "width": 8, "batch_size": 4, **changed}
    with pytest.raises(ValueError, match=f"^{message}$"):
        images.image_batches(**arguments)
