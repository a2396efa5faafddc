import io

import numpy as np
import pytest
from PIL import Image

from gpq_tf.data import jpegs
from tests import cifar10_files


def jpeg(image, **options):
    content = io.BytesIO()
    Image.fromarray(image).save(content, **{"format": "JPEG", **options})
    return content.getvalue()


FILES = [jpeg(image) for image in cifar10_files.numbered_images(3)]


def write(folder, contents=FILES, **changed):
    arrays = {
        "val_bytes": np.frombuffer(b"".join(contents), np.uint8),
        "val_offsets": np.cumsum([0] + [len(content) for content in contents]),
        "val_labels": np.array([1, 0, 1], np.uint8),
        "class_names": np.array(["cat", "dog"]),
        **changed,
    }
    np.savez(folder / "images.npz", **{name: array for name, array in arrays.items() if array is not None})
    return folder / "images.npz"


def test_decodes_as_pillow_does(tmp_path):
    images, labels, class_names = jpegs.load_jpegs(write(tmp_path), "val")
    assert images.dtype == np.uint8 and images.shape == (3, 32, 32, 3)
    for image, content in zip(images, FILES, strict=True):
        assert (image == np.asarray(Image.open(io.BytesIO(content)))).all()
    assert labels.dtype == np.int64 and labels.tolist() == [1, 0, 1]
    assert class_names == ["cat", "dog"]


def test_read_packed_keeps_the_files(tmp_path):
    packed, offsets, _, _ = jpegs.read_packed(write(tmp_path), "val")
    assert [packed[offsets[i] : offsets[i + 1]].tobytes() for i in range(3)] == FILES


ENDS = np.cumsum([0] + [len(content) for content in FILES])


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"val_labels": None},
            "Expected an .npz with val_bytes, val_offsets, val_labels, class_names: .*val_labels",
        ),
        ({"val_bytes": np.zeros(ENDS[-1], np.int8)}, r"Expected val_bytes uint8 \(bytes,\). Found: int8"),
        ({"val_offsets": ENDS + 1}, "Expected val_offsets integers that rise from 0 to the"),
        ({"val_offsets": ENDS - 1}, "Expected val_offsets integers that rise from 0 to the"),
        ({"val_offsets": ENDS[[0, 2, 1, 3]]}, "Expected val_offsets integers that rise from 0 to the"),
        (
            {"val_offsets": np.array([0, 2**63 - 1, -(2**63), ENDS[-1]])},
            "Expected val_offsets integers that rise",
        ),
        ({"val_offsets": ENDS.astype(float)}, "Expected val_offsets integers that rise from 0 to the"),
        ({"val_offsets": ENDS[:0]}, "Expected val_offsets integers that rise from 0 to the"),
        (
            {"val_labels": np.array([0, 1])},
            r"Expected val_labels integers \(3,\) below 2. Found: int64 \(2,\)",
        ),
        (
            {"val_labels": np.array([0, 1, 2])},
            r"Expected val_labels integers \(3,\) below 2. Found: int64 \(3,\)",
        ),
        (
            {"val_labels": np.array([0, -1, 1])},
            r"Expected val_labels integers \(3,\) below 2. Found: int64 \(3,\)",
        ),
        ({"class_names": np.array(["cat", None], object)}, "Expected an .npz with .* allow_pickle=False"),
    ],
)
def test_refuses_other_arrays(tmp_path, changed, message):
    with pytest.raises(ValueError, match=message) as error:
        jpegs.load_jpegs(write(tmp_path, **changed), "val")
    assert str(tmp_path / "images.npz") in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (FILES[0][:300], ""),
        (b"", ""),
        (jpeg(np.zeros((32, 31, 3), np.uint8)), "its size is 31x32, its mode RGB"),
        (jpeg(np.zeros((32, 32), np.uint8)), "its size is 32x32, its mode L"),
        (jpeg(np.zeros((32, 32, 3), np.uint8), format="PNG"), ""),
        # the header's height and width (at the same place in every file) claim 65535 x 65535 pixels
        (FILES[0].replace(b"\x00\x20\x00\x20\x03", b"\xff\xff\xff\xff\x03"), ""),
    ],
)
def test_a_bad_image_is_named(tmp_path, content, message):
    with pytest.raises(ValueError, match=r"images\.npz: image 1 of val: expected a 32x32 RGB JPEG: " + message):
        jpegs.load_jpegs(write(tmp_path, [FILES[0], content, FILES[2]]), "val")


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 no zip", b"\x80\x02]."])
def test_refuses_files_that_are_no_npz(tmp_path, content):
    (tmp_path / "images.npz").write_bytes(content)
    with pytest.raises(ValueError, match=r"Expected an \.npz with val_bytes"):
        jpegs.load_jpegs(tmp_path / "images.npz", "val")


def test_flipped_bytes_are_refused_or_decoded(tmp_path):
    whole = write(tmp_path).read_bytes()
    rng = np.random.default_rng(0)
    for place in rng.integers(0, len(whole), 200):
        changed = bytearray(whole)
        changed[place] ^= 1 << rng.integers(8)
        (tmp_path / "changed.npz").write_bytes(changed)
        try:
            images, labels, _ = jpegs.load_jpegs(tmp_path / "changed.npz", "val")
        except ValueError as error:
            assert "changed.npz" in str(error)
        else:
            assert images.shape == (len(labels), 32, 32, 3)


def test_an_absent_file_is_an_oserror_that_names_it(tmp_path):
    with pytest.raises(OSError, match=r"absent\.npz"):
        jpegs.load_jpegs(tmp_path / "absent.npz", "val")
