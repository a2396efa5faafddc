import io
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from gpq_tf import data as gpq_data
from gpq_tf.data import cifar10, jpegs, pickles, protocol, similarity
from tests import cifar10_files, golden

SOURCE = golden.SHARED / "data" / "cifar10_jpeg.npz"
needs_source = pytest.mark.skipif(not SOURCE.is_file(), reason="the whole CIFAR-10 is not there")

IMAGES = cifar10_files.numbered_images(600)
LABELS = np.random.default_rng(1).permutation(600) % 10
ROLES = ("labelled_index", "gallery_index", "query_index")


@pytest.fixture(autouse=True)
def nothing_prepared(tmp_path, monkeypatch):
    """No data of this machine's user is found."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("TFDS_DATA_DIR", raising=False)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "cifar10").mkdir()
    cifar10_files.write_folder(tmp_path / "cifar10", IMAGES, LABELS)
    return tmp_path / "cifar10"


def check(data, images=IMAGES, labels=LABELS):
    """`data` is a split of `images` in their order."""
    assert sorted(np.concatenate([getattr(data, role) for role in ROLES])) == list(range(len(images)))
    for role in ("labelled", "gallery", "query"):
        index = getattr(data, f"{role}_index")
        assert (getattr(data, f"{role}_images") == images[index]).all()
        assert (getattr(data, f"{role}_labels") == labels[index]).all()
    assert data.class_names == cifar10_files.CLASS_NAMES


@golden.needs_golden
@pytest.mark.parametrize(("legacy", "suffix"), [(True, ""), (False, "_stable_order")])
def test_splits_the_files_of_the_original_as_recorded(legacy, suffix):
    recorded = golden.load("data.npz")
    data = gpq_data.load("cifar10", golden.GPQ / "tiny_cifar10", legacy=legacy)
    for role, name in (("labelled", "source"), ("gallery", "target"), ("query", "query")):
        index = recorded[f"{name}_index{suffix}"]
        images = getattr(data, f"{role}_images")
        # red and green of the first pixel: the running number
        assert (images[:, 0, 0, 0].astype(int) * 256 + images[:, 0, 0, 1]).tolist() == index.tolist()
        assert getattr(data, f"{role}_labels").tolist() == recorded["labels"][index].tolist()


@pytest.mark.parametrize("dataset", ["cifar10", "cifar10_folder"])
def test_reads_the_originals_layout(folder, dataset):
    data = gpq_data.load(dataset, str(folder))
    check(data)
    assert data.source == f"CIFAR-10, 600 images from {folder} (original layout)"


@pytest.mark.parametrize("dataset", ["cifar10", "cifar10_folder"])
def test_reads_the_folder_that_the_archive_unpacks_to(folder, tmp_path, dataset):
    (tmp_path / "data").mkdir()
    unpacked = folder.rename(tmp_path / "data" / "cifar-10-batches-py")
    data = gpq_data.load(dataset, tmp_path / "data")
    check(data)
    assert data.source == f"CIFAR-10, 600 images from {unpacked} (original layout)"
    (unpacked / "test_batch").unlink()
    with pytest.raises(ValueError, match=rf"{unpacked}\. Expected the files of .* Missing: test_batch$"):
        gpq_data.load(dataset, tmp_path / "data")


@pytest.mark.parametrize("dataset", ["cifar10", "cifar10_folder"])
def test_the_files_of_the_folder_itself_come_first(folder, dataset):
    (folder / "cifar-10-batches-py").mkdir()
    check(gpq_data.load(dataset, folder))
    (folder / "data_batch_3").unlink()
    with pytest.raises(ValueError, match=r"Missing: data_batch_3$"):
        gpq_data.load(dataset, folder)


@pytest.mark.parametrize("dataset", ["cifar10", "cifar10_folder"])
def test_an_incomplete_folder_never_turns_into_the_sample(folder, dataset):
    (folder / "data_batch_3").unlink()
    (folder / "batches.meta").unlink()
    with pytest.raises(ValueError, match=r"cifar10. Expected the files of .* Missing: data_batch_3, batches.meta$"):
        gpq_data.load(dataset, folder)


def test_a_damaged_file_of_the_folder_is_named(folder):
    (folder / "test_batch").write_bytes((folder / "test_batch").read_bytes()[:-20])
    with pytest.raises(ValueError, match=r"test_batch\. Expected a file of CIFAR-10's python version"):
        gpq_data.load("cifar10", folder)


def test_without_files_the_sample_says_how_to_get_the_whole(tmp_path):
    data = gpq_data.load(data_dir=tmp_path / "none")
    assert data.source == (
        "embedded CIFAR-10 sample, 12,000 of 60,000 images; for all of them put the python version's files "
        f"(data_batch_1 ...) into {tmp_path / 'none'} or add --download=True"
    )
    assert np.bincount(data.query_labels).tolist() == [20] * 10
    assert np.bincount(data.gallery_labels).tolist() == [1080] * 10
    assert np.bincount(data.labelled_labels).tolist() == [100] * 10
    assert data.class_names == cifar10_files.CLASS_NAMES
    assert len(np.unique(data.gallery_images.reshape(10800, -1), axis=0)) > 10700


def test_the_sample_has_one_split():
    default, legacy = (gpq_data.load("cifar10_sample", legacy=legacy) for legacy in (False, True))
    for role in ROLES:
        assert (getattr(default, role) == getattr(legacy, role)).all()


def check_train_test(data):
    """The last sixth, the test batch, are the queries, in the files' order."""
    check(data)
    assert data.gallery_index.tolist() == list(range(500))
    assert data.query_index.tolist() == list(range(500, 600))
    assert data.unlabelled_images is data.gallery_images


def test_spqs_split_of_the_originals_layout(folder):
    check_train_test(gpq_data.load("cifar10", folder, split="train_test"))


def test_spqs_split_of_tensorflow_datasets(tmp_path):
    store(tmp_path)
    check_train_test(gpq_data.load("cifar10", tmp_path, split="train_test"))


def test_spqs_split_of_the_sample_is_the_whole_sets_in_small():
    data = gpq_data.load("cifar10_sample", split="train_test")
    with np.load(cifar10.__file__.replace("cifar10.py", "cifar10_sample.npz")) as stored:
        place = stored["sample_index"].astype(int)  # in the whole set, where the first 50,000 are training images
    assert place[data.query_index].min() >= 50_000
    assert place[data.gallery_index].max() < 50_000
    assert len(data.query_index) + len(data.gallery_index) == 12_000
    assert len(data.query_index) > 1_000
    assert np.bincount(data.query_labels, minlength=10).min() > 100
    assert data.source.startswith("embedded CIFAR-10 sample, 12,000 of 60,000 images")


def test_legacy_plays_no_part_in_spqs_split(folder):
    check_train_test(gpq_data.load("cifar10", folder, legacy=True, split="train_test"))


def test_refuses_unknown_splits(folder):
    with pytest.raises(ValueError) as caught:
        gpq_data.load("cifar10", folder, split="test")
    assert str(caught.value) == "Invalid split. Expected one of gpq, train_test. Received: split='test'"


def test_refuses_unknown_names():
    names = "cifar10, cifar10_folder, cifar10_tfds, cifar10_sample"
    with pytest.raises(ValueError, match=f"Invalid dataset. Expected one of {names}. Received: dataset='cifar'"):
        gpq_data.load("cifar")


def test_asking_for_an_absent_source_says_how_to_get_it(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"Missing: data_batch_1, data_batch_2, .*, test_batch, batches\.meta"):
        gpq_data.load("cifar10_folder", tmp_path)
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "elsewhere"))
    places = f"{tmp_path}, {tmp_path}/elsewhere, {tmp_path}/home/tensorflow_datasets"
    with pytest.raises(ValueError, match=rf"one of {places}\. Found none\. Add --download=True to fetch it into"):
        gpq_data.load("cifar10_tfds", tmp_path)


def test_tensorflow_datasets_is_not_imported_for_nothing():
    heavy = "{'tensorflow_datasets', 'tensorflow'}"
    code = f"import sys, gpq_tf.data; gpq_tf.data.load(); print({heavy} & set(sys.modules))"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed == "set()\n"


def store(root, version="3.0.2", with_id=True, images=IMAGES, labels=LABELS):
    """Prepare a cifar10 of tensorflow-datasets in `root`; shuffled by the hash of its keys."""
    import tensorflow_datasets as tfds

    features = {
        "image": tfds.features.Image(shape=(32, 32, 3)),
        "label": tfds.features.ClassLabel(names=cifar10_files.CLASS_NAMES),
        **({"id": tfds.features.Text()} if with_id else {}),
    }
    n_train = len(images) * 5 // 6
    parts = {"train": range(n_train), "test": range(n_train, len(images))}

    def examples(name):
        for i in parts[name]:
            key = f"{name}_{i - parts[name][0]:05d}"
            example = {"image": images[i], "label": labels[i], "id": key}
            yield key, {feature: example[feature] for feature in features}

    tfds.dataset_builders.store_as_tfds_dataset(
        name="cifar10",
        version=version,
        data_dir=root,
        features=tfds.features.FeaturesDict(features),
        split_datasets={name: list(examples(name)) for name in parts},
    )
    return root / "cifar10" / version


@pytest.mark.parametrize("place", ["data_dir", "TFDS_DATA_DIR", "home/tensorflow_datasets"])
def test_reads_tensorflow_datasets_in_the_order_of_the_original(tmp_path, monkeypatch, place):
    stored = store(tmp_path / place)
    if place == "TFDS_DATA_DIR":
        monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / place))
    data = gpq_data.load("cifar10", tmp_path / "data_dir")
    check(data)
    assert data.source == f"CIFAR-10, 600 images from {stored} (tensorflow-datasets)"


def test_takes_the_newest_prepared_version(tmp_path):
    store(tmp_path, "3.0.2", images=IMAGES[::-1])
    newest = store(tmp_path, "3.0.10")
    (tmp_path / "cifar10" / "9.9.9.incomplete").mkdir()
    data = gpq_data.load("cifar10_tfds", tmp_path)
    check(data)
    assert str(newest) in data.source


def test_the_folder_comes_first(folder):
    store(folder, images=IMAGES[::-1])
    assert "(original layout)" in gpq_data.load("cifar10", folder).source
    assert "(tensorflow-datasets)" in gpq_data.load("cifar10_tfds", folder).source


def test_says_when_ids_are_missing(tmp_path):
    store(tmp_path, with_id=False)
    with pytest.raises(ValueError, match="have no id, so the order of the original files is lost"):
        gpq_data.load("cifar10_tfds", tmp_path)


@pytest.mark.parametrize("damage", ["missing shard", "cut shard", "no json"])
def test_a_damaged_prepared_set_says_how_to_prepare_it_anew(tmp_path, damage):
    stored = store(tmp_path)
    shard = next(stored.glob("*train*"))
    if damage == "missing shard":
        shard.unlink()
    elif damage == "cut shard":
        shard.write_bytes(shard.read_bytes()[:-1000])
    else:
        (stored / "dataset_info.json").write_text("{")
    with pytest.raises(ValueError, match=r"3\.0\.2\. Expected tensorflow-datasets' cifar10: .*add --download=True"):
        gpq_data.load("cifar10_tfds", tmp_path)


def test_downloads_only_when_asked_and_into_data_dir(tmp_path, monkeypatch):
    import tensorflow_datasets as tfds

    asked = []

    class Builder:
        def __init__(self, name, data_dir):
            asked.append((name, data_dir))
            self.data_dir = str(data_dir / name / "3.0.2")

        def download_and_prepare(self):
            store(tmp_path)

    monkeypatch.setattr(tfds, "builder", Builder)
    assert "embedded" in gpq_data.load("cifar10", tmp_path).source
    assert asked == []
    check(gpq_data.load("cifar10", tmp_path, download=True))
    check(gpq_data.load("cifar10", tmp_path, download=True))  # is there now
    assert asked == [("cifar10", tmp_path)]


def test_a_download_that_fails_is_one_oserror(tmp_path, monkeypatch):
    import tensorflow_datasets as tfds

    def no_network(*_, **__):
        raise AssertionError("no route")

    monkeypatch.setattr(tfds, "builder", no_network)
    with pytest.raises(OSError, match=r"Cannot download CIFAR-10 into .*: AssertionError: no route"):
        gpq_data.load("cifar10_tfds", tmp_path, download=True)


@needs_source
def test_the_sample_is_the_whole_sets_split_in_small():
    whole = [jpegs.read_packed(SOURCE, split) for split in ("train", "test")]
    labels = np.concatenate([part[2] for part in whole])
    contents = [piece for packed, offsets, _, _ in whole for piece in np.split(packed, offsets[1:-1])]
    path = cifar10.__file__.replace("cifar10.py", "cifar10_sample.npz")
    packed, offsets, sample_labels, _ = jpegs.read_packed(path, "sample")
    with np.load(path) as stored:
        index = stored["sample_index"].astype(int)

    assert len(np.unique(index)) == 12000
    assert (labels[index] == sample_labels).all()
    for i in range(12000):
        assert (packed[offsets[i] : offsets[i + 1]] == contents[index[i]]).all()

    roles = [set(role.tolist()) for role in protocol.split_index(labels, 10)]
    sample_roles = [set(index[role].tolist()) for role in protocol.split_index(sample_labels, 10)]
    assert [len(role) for role in sample_roles] == [1000, 10800, 200]
    assert all(sample <= role for sample, role in zip(sample_roles, roles, strict=True))
    labelled_by_original = set(protocol.split_index(labels, 10, legacy=True)[0].tolist())
    assert not labelled_by_original & (sample_roles[1] | sample_roles[2])


@needs_source
def test_the_script_makes_the_embedded_sample_again(tmp_path):
    cifar10_files.script().write_sample(SOURCE, tmp_path / "sample.npz", seed=0)
    embedded = cifar10.__file__.replace("cifar10.py", "cifar10_sample.npz")
    with np.load(tmp_path / "sample.npz") as made, np.load(embedded) as stored:
        assert made.files == stored.files
        assert all((made[name] == stored[name]).all() for name in stored.files)
    assert (tmp_path / "sample.npz").stat().st_size <= 4_000_000


@needs_source
@pytest.mark.slow
@pytest.mark.parametrize("legacy", [False, True])
def test_the_whole_set_goes_through_the_originals_layout(tmp_path, legacy):
    """The script's command line, then the paper's 1,000 queries, 54,000 gallery, 5,000 labelled images."""
    arguments = ["--layout", str(tmp_path), "--similarity", str(tmp_path / "cifar10_Similarity.mat")]
    subprocess.run([sys.executable, str(cifar10_files.SCRIPT), str(SOURCE), *arguments], check=True)
    data = gpq_data.load("cifar10", tmp_path, legacy=legacy)
    assert data.source == f"CIFAR-10, 60,000 images from {tmp_path} (original layout)"
    assert np.bincount(data.query_labels).tolist() == [100] * 10
    assert np.bincount(data.gallery_labels).tolist() == [5400] * 10
    assert np.bincount(data.labelled_labels).tolist() == [500] * 10
    assert sorted(np.concatenate([getattr(data, role) for role in ROLES])) == list(range(60000))
    relevant = similarity.read_similarity(tmp_path / "cifar10_Similarity.mat", 1000, 54000)
    for q in range(0, 1000, 37):
        assert (relevant[q].toarray()[0] == (data.gallery_labels == data.query_labels[q])).all()


def test_the_layout_reads_back_what_the_packed_file_holds(tmp_path):
    arrays = {"class_names": np.array(cifar10_files.CLASS_NAMES)}
    for split, part in (("train", slice(0, 50)), ("test", slice(50, 60))):
        contents = []
        for image in IMAGES[part]:
            content = io.BytesIO()
            Image.fromarray(image).save(content, "JPEG")
            contents.append(content.getvalue())
        arrays[f"{split}_bytes"] = np.frombuffer(b"".join(contents), np.uint8)
        arrays[f"{split}_offsets"] = np.cumsum([0] + [len(content) for content in contents])
        arrays[f"{split}_labels"] = LABELS[part]
    np.savez(tmp_path / "packed.npz", **arrays)
    cifar10_files.script().write_layout(tmp_path / "packed.npz", tmp_path / "layout")

    assert sorted(path.name for path in (tmp_path / "layout").iterdir()) == sorted(cifar10.LAYOUT)
    assert pickles.load_cifar_meta(tmp_path / "layout" / "batches.meta") == cifar10_files.CLASS_NAMES
    parts = [pickles.load_cifar_batch(tmp_path / "layout" / name) for name in cifar10.BATCHES]
    images, labels = (np.concatenate(part) for part in zip(*parts, strict=True))
    assert labels.tolist() == LABELS[:60].tolist()
    packed = [jpegs.load_jpegs(tmp_path / "packed.npz", split)[0] for split in ("train", "test")]
    assert (images == np.concatenate(packed)).all()
