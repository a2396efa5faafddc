"""The demo beyond GPQ on CIFAR-10: SPQ, a user's own folders, any image file as a query."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gpq_tf import __main__ as commands
from gpq_tf import demo, load_model, retrieval
from gpq_tf.data import images, loading, resize
from gpq_tf.network import RetrievalModel
from tests.image_files import exif_jpeg, picture

from small_data import coloured_folders, coloured_images

pytestmark = pytest.mark.usefixtures("uncompiled")

NARROW = 1 / 32


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("TFDS_DATA_DIR", raising=False)
    return tmp_path


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("own")
    coloured_folders(root, {"train": 38, "test": 4})
    return root


def run(*arguments):
    return commands.main([str(argument) for argument in arguments])


def save(head, path="model.keras", **record):
    model = RetrievalModel(head=head, width_multiplier=NARROW)
    model.record = record
    model.save(path)
    return model


def test_the_models_own_head_decides(here, capsys):
    """Of the head and of all that depends on it: split, ranks, number of books."""
    from cifar10_files import write_folder

    write_folder(here, *coloured_images(600))
    save("spq")
    assert run("evaluate", "model.keras", here) == 0
    printed = capsys.readouterr().out
    assert "gallery 500, queries 100, 32 bits a code (8 books of 16 codewords)\n" in printed
    for line in ("head = spq", "n_DB = 1000", "n_book = 8", "alpha = 5.0"):
        assert f"\n{line}\n" in printed
    assert run("evaluate", "model.keras", here, "--n_DB=50") == 0
    printed = capsys.readouterr().out
    assert "(8 books of 16 codewords), mAP@50\n" in printed
    data = loading.load_for(_settings(data_dir=here), "train_test")
    expected = retrieval.evaluate(load_model("model.keras"), data, 50)["mAP"]
    assert re.search(r"^mAP: (.*)$", printed, re.MULTILINE)[1] == f"{expected:.4f}"


def _settings(**given):
    from gpq_tf import settings

    return settings.resolve([f"--{name}={value}" for name, value in given.items()], "no_such_config.py")


def test_spq_draws_ranked_lists(here, capsys):
    save("spq")
    Path("data").mkdir()
    coloured_folders(here / "data", {"": 8})
    given = ["--dataset=image_folders", "--data_dir=data", "--image_size=64", "--n_pictures=2"]
    assert run("demo", "--model_load_path=model.keras", "--head=spq", *given) == 0
    assert "24 images of 3 classes from data" in capsys.readouterr().out
    assert len(list(here.glob("retrieval_result_*.png"))) == 2
    assert json.loads(Path("retrieval_result.json").read_text())["settings"]["head"] == "spq"


@pytest.mark.parametrize(("asked", "own"), [("spq", "gpq"), ("gpq", "spq")])
def test_another_head_than_the_models_is_refused(here, capsys, asked, own):
    save(own)
    status = run("demo", "--model_load_path=model.keras", f"--head={asked}")
    message = f"error: Invalid head. Expected {own}, which the model model.keras has. Received: head={asked}"
    # gpq is the default, but given all the same
    assert (status, capsys.readouterr().err.startswith(message)) == (2, True)


def test_images_have_the_size_that_the_model_was_trained_on(here, folders, capsys, monkeypatch):
    monkeypatch.setattr(
        retrieval, "evaluate", lambda model, data, *_: {"mAP": len(data.query_images[0]), "seconds": {}}
    )
    save("spq", settings={"image_size": 24})
    given = ["--model_load_path=model.keras", "--dataset=image_folders", f"--data_dir={folders}", "--n_pictures=0"]
    assert run("demo", *given) == 0
    printed = capsys.readouterr().out
    assert "\nimage_size = 24\n" in printed and "mAP: 24.0" in printed
    assert run("demo", *given, "--image_size=40") == 0
    assert "mAP: 40.0" in capsys.readouterr().out
    save("spq", settings={"image_size": "large"})
    assert run("demo", *given) == 2
    assert "Invalid image_size (model.keras). Expected an integer" in capsys.readouterr().err


@pytest.mark.parametrize("head", ["gpq", "spq"])
def test_training_on_own_folders_end_to_end(here, folders, capsys, head):
    """64 pixels, classes of the data; then the model finds its own training images again."""
    given = ["--dataset=image_folders", f"--data_dir={folders}", "--image_size=64"]
    narrow = ["--width_multiplier=0.03125", "--batch_size=2", "--total_epochs=1", "--n_book=2"]
    if head == "spq":
        narrow[1] = "--batch_size=30"
    assert run("train", f"--head={head}", *given, *narrow) == 0
    printed = capsys.readouterr().out
    assert "\nn_CLASSES = 3\n" in printed and "126 images of 3 classes from " in printed
    path = f"models/{head}_8bits_1.keras"
    model = load_model(path)
    assert model.record["settings"]["image_size"] == 64 and model.record["class_names"] == ["amber", "blue", "green"]
    assert run("evaluate", path, folders, "--dataset=image_folders") == 0
    printed = capsys.readouterr().out
    assert re.search(r"^mAP: 0\.\d{4}$|^mAP: 1\.0000$", printed, re.MULTILINE)
    assert ("gallery 114, queries 12" if head == "spq" else "gallery 120, queries 3") in printed
    assert run("train", f"--head={head}", *given, *narrow, "--n_CLASSES=4") == 2
    assert "Invalid n_CLASSES. Expected the data's, 3. Received: n_CLASSES=4" in capsys.readouterr().err


@pytest.mark.parametrize("head", ["gpq", "spq"])
def test_the_nearest_to_an_image_file(here, folders, capsys, head):
    """Against distances summed in a loop, of every image in the folders; each is named by its file."""
    data = loading.load_folders(folders, 40, {"gpq": "gpq", "spq": "train_test"}[head])
    model = RetrievalModel(head=head, width_multiplier=NARROW)
    # Codewords from among the descriptors: an untrained model gives all images one code.
    words = model.embed(data.gallery_images[::7][:16]).reshape(16, len(model.codebook), -1)
    model.head.quantizer.codebook.assign(words.transpose(1, 0, 2))
    model.save("model.keras")
    given = ["--dataset=image_folders", f"--data_dir={folders}", "--image_size=40", "--model_load_path=model.keras"]
    photo = folders / "train" / "blue" / "003.png"
    assert run("demo", *given, f"--query_image={photo}") == 0
    printed = capsys.readouterr().out
    assert "mAP:" not in printed and "saved retrieval_result_003.png" in printed
    pattern = r"^ ?(\d+)\. distance ([\d.]+), class (\w+), (.*)$"
    found = [(int(r), float(d), c, Path(f)) for r, d, c, f in re.findall(pattern, printed, re.MULTILINE)]
    files = sorted(folders.glob("*/*/*.*"))
    everything = np.stack([images.read_image(file, None, 40, 40, "fast", upright=True) for file in files])
    codes, books = model.encode(everything), model.codebook.astype(float)
    pixels = images.read_image(photo, None, 40, 40, "fast", upright=True)
    parts = model.embed(pixels[None])[0].astype(float).reshape(len(books), -1)
    distances = {}
    for file, code in zip(files, codes, strict=True):
        words = [books[m, code[m]] for m in range(len(books))]
        if head == "spq":
            distances[file] = sum(np.linalg.norm(part - word) for part, word in zip(parts, words, strict=True))
        else:
            distances[file] = len(books) - sum(part @ word for part, word in zip(parts, words, strict=True))
    assert len(distances) == 126 and len(set(distances.values())) > 10
    assert [rank for rank, *_ in found] == list(range(1, 11))
    for _, distance, name, file in found:
        assert distance == pytest.approx(distances[file], abs=1e-4)
        assert name == file.parent.name
    assert [distance for _, distance, *_ in found] == pytest.approx(sorted(distances.values())[:10], abs=1e-4)
    saved = json.loads(Path("retrieval_result.json").read_text())
    assert [answer["file"] for answer in saved["answers"]] == [str(file) for *_, file in found]
    assert saved["settings"]["query_image"] == str(photo)
    assert Image.open("retrieval_result_003.png").size[0] > 1000


def test_photos_of_every_kind_are_queries(here):
    """The same picture in several formats, turned by EXIF, with an alpha channel: the same pixels."""
    pixels = picture(5, 90, 120)
    Image.fromarray(pixels).save("a.png")
    Image.fromarray(pixels).save("a.webp", lossless=True)
    Image.fromarray(pixels).save("a.tiff")
    exif = Image.Exif()
    exif[0x0112] = 8  # to be turned by a quarter, counterclockwise
    Image.fromarray(np.rot90(pixels, -1)).save("turned.png", exif=exif)
    Image.fromarray(np.dstack([pixels, np.full((90, 120), 255, np.uint8)])).save("alpha.png")
    for name in ("a.png", "a.webp", "a.tiff", "turned.png", "alpha.png"):
        shown, taken = demo.read_photo(name, 40)
        np.testing.assert_array_equal(shown, pixels)
        np.testing.assert_array_equal(taken, images.smooth_resize(pixels, 40, 40))
        np.testing.assert_array_equal(demo.read_photo(name, 40, "opencv")[1], resize.resize(pixels, 40, 40))


def test_a_gallery_of_fewer_than_ten(here, capsys):
    save("spq")
    coloured_folders(here / "own", {"train": 2, "test": 1})
    Path("photo.jpg").write_bytes(exif_jpeg(picture(5, 90, 120), 6))
    given = ["demo", "--dataset=image_folders", "--data_dir=own", "--model_load_path=model.keras"]
    assert run(*given, "--query_image=photo.jpg") == 0
    assert capsys.readouterr().out.count(". distance ") == 9
    assert Path("retrieval_result_photo.png").is_file()


def test_evaluate_goes_on_to_measure(here, folders, capsys):
    save("spq")
    given = ["--dataset=image_folders", f"--data_dir={folders}", "--query_image=absent.jpg"]
    before = sorted(here.iterdir())
    assert run("evaluate", "model.keras", *given) == 0
    assert "mAP: " in capsys.readouterr().out
    assert sorted(here.iterdir()) == before


def test_a_photo_of_the_originals_lists_is_read_as_they_are(here, capsys):
    """Which the original does not turn as EXIF asks: a photo that is in the gallery finds itself."""
    lines = {"train": ["id class path"], "test": ["id class path"]}
    for number in range(6):
        Path(f"{number}.jpg").write_bytes(exif_jpeg(picture(number, 40, 60), 6 if number == 4 else 1))
        lines["train" if number < 2 else "test"].append(f"{number} {number} {number}.jpg")
    Path("meta").mkdir()
    for name, of_list in lines.items():
        Path("meta", f"{name}.txt").write_text("\n".join(of_list) + "\n")
    given = ["--head=cgd", "--dataset=image_lists", "--data_dir=.", "--boxes=False", "--query_image=4.jpg"]
    assert run("demo", *given, "--model_load_path=cgd-tinyimagenet-32bytes", "--image_size=64") == 0
    first = re.search(r"^ 1\. squared distance ([\d.e-]+), class \w+, (.*)$", capsys.readouterr().out, re.MULTILINE)
    assert Path(first[2]).name == "4.jpg" and float(first[1]) < 1e-9
