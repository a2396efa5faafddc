import re

import numpy as np
import pytest

from gpq_tf.convert import pth, spq_names
from tests import golden

TABLE = spq_names.entries(1 / 64, size=12, n_word=4)
SHAPES = {entry.name: entry.shape for entry in TABLE}
PATHS = {entry.name: entry.path for entry in TABLE}


def arrays(seed=0):
    rng = np.random.default_rng(seed)
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in SHAPES.items()}


@golden.needs_golden
@pytest.mark.parametrize(("file", "width"), [("state_dict.txt", 1 / 8), ("full_width_state_dict.txt", 1.0)])
def test_the_table_is_the_list_of_the_original(file, width):
    rows = [row.split("\t") for row in (golden.SPQ / "narrow" / file).read_text().splitlines() if row[0] != "#"]
    assert len(rows) == 125
    assert [(entry.name, str(entry.shape)) for entry in spq_names.entries(width)] == [tuple(row[:2]) for row in rows]


@golden.needs_golden
def test_what_the_original_trains_is_all_converted():
    text = (golden.SPQ / "narrow" / "full_width_state_dict.txt").read_text()
    trained = re.search(r"^# parameters in net.parameters\(\) order: (.*)$", text, re.M)[1].split()
    statistics = [name for name in PATHS if ".running_" in name]
    converted = [name for name, path in PATHS.items() if path]
    assert len(trained) == 65 and len(statistics) == 2 * 20
    assert converted == [name for name in PATHS if name in {*trained, *statistics}]
    assert all(name.endswith(".num_batches_tracked") for name in set(PATHS) - set(converted))
    assert sum(np.prod(entry.shape) for entry in spq_names.entries() if entry.name in trained) == 11_499_200


def test_every_path_is_another():
    paths = [path for path in PATHS.values() if path]
    assert len(set(paths)) == len(paths) == 105
    assert [path for path in paths if not path.startswith("backbone/")] == [
        "quantizer/codebook",
        "head/projection/kernel",
        "head/projection/bias",
    ]
    assert PATHS["0.layer3.0.shortcut.1.running_var"] == "backbone/layer3_0/shortcut_norm/moving_variance"
    assert PATHS["0.layer4.1.bn2.bias"] == "backbone/layer4_1/norm2/beta"
    assert PATHS["0.fc_out.weight"] == "backbone/fc_out/kernel"


def test_values_go_to_kerass_axes():
    given = arrays()
    found = spq_names.to_keras(given, n_book=3)
    kernel = given["0.layer2.0.shortcut.0.weight"]  # out, in, height, width
    assert found["backbone/layer2_0/shortcut_conv/kernel"].shape == (1, 1, 1, 2)
    stem = found["backbone/conv1/kernel"]
    for o, i, h, w in np.ndindex(given["0.conv1.weight"].shape):
        assert stem[h, w, i, o] == given["0.conv1.weight"][o, i, h, w]
    assert found["backbone/layer2_0/shortcut_conv/kernel"][0, 0, 0, 1] == kernel[1, 0, 0, 0]
    projection = found["head/projection/kernel"]  # (F, D)
    assert projection.shape == (8, 12) and projection[7, 2] == given["1.fc.weight"][2, 7]
    codebook = found["quantizer/codebook"]
    for m, k, d in np.ndindex(3, 4, 4):
        assert codebook[m, k, d] == given["1.C"][k, 4 * m + d]
    assert (found["backbone/norm1/moving_variance"] == given["0.bn1.running_var"]).all()
    assert (found["backbone/norm1/gamma"] == given["0.bn1.weight"]).all()
    assert all(values.flags.c_contiguous for values in found.values())


@pytest.mark.parametrize("n_book", [1, 2, 3, 12])
def test_values_go_back_to_the_same_bits(n_book):
    given = arrays()
    found = spq_names.to_names(spq_names.to_keras(given, n_book))
    assert list(found) == list(given)
    for name, values in found.items():
        if PATHS[name]:
            assert values.dtype == np.float32 and (values == given[name]).all(), name
        else:
            assert (values.dtype, values.shape, int(values)) == (np.int64, (), 0), name


@golden.needs_golden
def test_the_checkpoint_of_the_original_goes_there_and_back(tmp_path):
    given = pth.read(golden.SPQ / "narrow" / "32_0.1667_checkpoint.pth")
    sizes = spq_names.sizes_of("32_0.1667_checkpoint.pth", {name: values.shape for name, values in given.items()})
    assert sizes == (0.125, 128, 16)
    pth.write(tmp_path / "back.pth", spq_names.to_names(spq_names.to_keras(given, n_book=8)))
    back = pth.read(tmp_path / "back.pth")
    assert list(back) == list(given)
    for name, values in given.items():
        assert back[name].dtype == values.dtype and back[name].shape == values.shape
        assert (back[name] == values).all() or name.endswith("num_batches_tracked")


@pytest.mark.parametrize("width", [1 / 64, 1 / 8, 0.25, 0.3, 1.0, 2.0])
@pytest.mark.parametrize(("size", "n_word"), [(128, 16), (12, 4), (48, 256), (1, 2)])
def test_sizes_are_read_off_the_shapes(width, size, n_word):
    shapes = {entry.name: entry.shape for entry in spq_names.entries(width, size, n_word) if entry.path}
    found, *others = spq_names.sizes_of("x.pth", shapes)
    assert others == [size, n_word]
    assert spq_names.entries(found, size, n_word) == spq_names.entries(width, size, n_word)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"0.fc_out.weight": None},
            r"Expected SPQ's tensors, 0.fc_out.weight \(512, 512\) and 1.C \(K, M \* d\) among them. ",
        ),
        ({"1.C": None}, r"Received: 124 tensors, 0.conv1.weight, 0.bn1.weight, 0.bn1.bias, ...$"),
        ({"1.C": (4, 12, 1)}, "Expected SPQ's tensors"),
        ({"1.C": (3, 12)}, r"Expected 1.C \(K, M \* d\), K a power of two. Received: \(3, 12\)$"),
        ({"1.C": (1, 12)}, r"Expected 1.C \(K, M \* d\), K a power of two. Received: \(1, 12\)$"),
        ({"1.C": (4, 0)}, r"Expected 1.C \(K, M \* d\), K a power of two. Received: \(4, 0\)$"),
        (
            {"1.C": (4, 16)},
            r"Expected 1.fc.weight \(16, 8\), SPQ's network at 0.015625 of its width. Received: \(12, 8\)$",
        ),
        (
            {"0.fc_out.weight": (16, 16)},
            r"Expected 0.conv1.weight \(2, 3, 3, 3\), SPQ's network at 0.03125 of its width. ",
        ),
        (
            {"0.fc_out.weight": (0, 0)},
            r"Expected 0.layer2.0.conv1.weight \(1, 1, 3, 3\), SPQ's network at 0 of its width",
        ),
        ({"0.bn1.running_var": None}, r"Expected 0.bn1.running_var \(1,\), .*Received: no such tensor$"),
        (
            {"0.layer1.0.conv2.weight": (1, 1, 1, 1)},
            r"Expected 0.layer1.0.conv2.weight \(1, 1, 3, 3\), .*\(1, 1, 1, 1\)$",
        ),
    ],
)
def test_refuses_other_networks(changes, message):
    shapes = {name: changes.get(name, shape) for name, shape in SHAPES.items()}
    with pytest.raises(ValueError, match=r"^Invalid file 'x.pth'. .*" + message):
        spq_names.sizes_of("x.pth", {name: shape for name, shape in shapes.items() if shape is not None})


def test_refuses_a_file_without_tensors():
    with pytest.raises(ValueError, match=r"Received: 0 tensors$"):
        spq_names.sizes_of("x.pth", {})


@pytest.mark.parametrize("count", ["num_batches_tracked", "other"])
def test_what_is_not_converted_needs_not_be_there(count):
    shapes = {name: shape for name, shape in SHAPES.items() if PATHS[name]}
    assert spq_names.sizes_of("x.pth", {**shapes, f"0.bn1.{count}": (3,)}) == (1 / 64, 12, 4)


def test_why_ignored():
    assert spq_names.why_ignored("0.bn1.num_batches_tracked").startswith(
        "a count of training steps, which nothing reads"
    )
    assert spq_names.why_ignored("2.weight") == "no tensor of SPQ's network"


@pytest.mark.parametrize(
    ("name", "given", "n_word", "n_book", "why"),
    [
        ("32_0.1667_checkpoint.pth", None, 16, 8, "the 32 bits = int(M * sqrt(16)) in the file's name"),
        ("16_1.0000_checkpoint.pth", None, 16, 4, "the 16 bits = int(M * sqrt(16)) in the file's name"),
        ("16_0.7000_checkpoint (1).pth", None, 4, 8, "the 16 bits = int(M * sqrt(4)) in the file's name"),
        # what the original writes for 8 books of other sizes
        ("22_0.7000_checkpoint.pth", None, 8, 8, "the 22 bits = int(M * sqrt(8)) in the file's name"),
        ("45_0.7000_checkpoint.pth", None, 32, 8, "the 45 bits = int(M * sqrt(32)) in the file's name"),
        ("64_0.7000_checkpoint.pth", None, 64, 8, "the 64 bits = int(M * sqrt(64)) in the file's name"),
        ("128_0.7000_checkpoint.pth", None, 256, 8, "the 128 bits = int(M * sqrt(256)) in the file's name"),
        # names of our own say true bits
        ("spq_48bits.pth", None, 64, 8, "the 48 bits in the file's name"),
        ("spq_32-bit.pth", None, 16, 8, "the 32 bits in the file's name"),
        ("best.pth", None, 16, 8, "D / 16 for D = 128; give --n_book if it is another"),
        (
            "33_0.1667_checkpoint.pth",
            None,
            16,
            8,
            "D / 16 for D = 128; the 33 bits = int(M * sqrt(16)) in the file's name do not fit K = 16 and D = 128; "
            "give --n_book if it is another",
        ),
        (
            "12_0.1667_checkpoint.pth",  # three books, which do not divide 128
            None,
            16,
            8,
            "D / 16 for D = 128; the 12 bits = int(M * sqrt(16)) in the file's name do not fit K = 16 and D = 128; "
            "give --n_book if it is another",
        ),
        ("32_0.1667_checkpoint.pth", 8, 16, 8, "as given"),
        ("32_0.1667_checkpoint.pth", 4, 16, 4, "as given; the file's name says 32 bits = int(M * sqrt(16))"),
        ("best.pth", np.int64(2), 16, 2, "as given"),
    ],
)
def test_n_book(name, given, n_word, n_book, why):
    assert spq_names.choose_n_book(name, given, n_word, 128) == (n_book, why)


@pytest.mark.parametrize("n_book", [0, -8, 7, 256, 8.0, True, "8"])
def test_an_n_book_that_does_not_fit_is_refused(n_book):
    message = f"Invalid n_book. Expected a positive integer dividing D=128. Received: n_book={n_book!r}"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        spq_names.choose_n_book("32_0.1667_checkpoint.pth", n_book, 16, 128)


def test_n_book_must_be_given_where_nothing_says_it():
    message = (
        r"^Invalid n_book. Expected it to be given, since 'a.pth' does not say it and D=100 is no multiple of 16. "
    )
    with pytest.raises(ValueError, match=message + "Received: None$"):
        spq_names.choose_n_book("a.pth", None, 16, 100)
