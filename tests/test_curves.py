"""What TensorBoard gets to see, read back by TensorBoard's own reader."""

import importlib.util
import io

import numpy as np
import pytest
from PIL import Image

from gpq_tf import curves, load_model, measures, metrics, retrieval, trainer, visualize
from gpq_tf import settings as settings_module

from small_data import coloured_data

accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")


def read_back(folder):
    (run,) = folder.iterdir()
    return accumulator.EventAccumulator(str(run), size_guidance={"images": 0, "scalars": 0}).Reload()


def test_what_is_written_is_read(tmp_path):
    cat = np.full((32, 32, 3), 90, np.uint8)
    what = {
        "query_image": cat,
        "query_class": "cat",
        "result_images": [cat, cat],
        "result_classes": ["cat", "dog"],
        "relevant": [True, False],
    }
    with curves.Curves(tmp_path / "board") as board:
        board.scalars(3, {"loss": 1.5, "lr": 0.25})
        board.scalars(4, {"loss": 0.5})
        board.usage(4, {"used": np.array([3, 1]), "entropy": np.array([1.5, 0.0])})
        board.ranked_list(4, **what)
    events = read_back(tmp_path / "board")
    assert [(point.step, point.value) for point in events.Scalars("loss")] == [(3, 1.5), (4, 0.5)]
    assert [(point.step, point.value) for point in events.Scalars("lr")] == [(3, 0.25)]
    found = {tag: events.Scalars(tag)[0].value for tag in events.Tags()["scalars"] if tag.startswith("codebook")}
    assert found == {
        "codebook/used": 2,
        "codebook/entropy": 0.75,
        "codebook_used/book_01": 3,
        "codebook_used/book_02": 1,
        "codebook_entropy/book_01": 1.5,
        "codebook_entropy/book_02": 0,
    }
    (picture,) = events.Images("ranked_list")
    visualize.ranked_list(tmp_path / "list.png", **what)
    drawn = np.asarray(Image.open(tmp_path / "list.png"))
    assert (picture.step, picture.height, picture.width) == (4, *drawn.shape[:2])
    assert (np.asarray(Image.open(io.BytesIO(picture.encoded_image_string))) == drawn).all()


@pytest.mark.usefixtures("uncompiled")
def test_training_shows_its_course(tmp_path):
    data = coloured_data()
    given = {
        "model_save_path": tmp_path,
        "width_multiplier": 1 / 16,
        "batch_size": 50,
        "total_epochs": 3,
        "save_term": 2,
        "tensorboard": True,
    }
    chosen = settings_module.resolve([f"--{name}={value}" for name, value in given.items()], "no_such_config.py")
    _, path = trainer.train(chosen, data)
    events = read_back(tmp_path / "tensorboard" / "gpq_48bits")
    for name in ("loss", "hash", "cls", "ent", "lr", "images_per_second"):
        assert [point.step for point in events.Scalars(name)] == [1, 2, 3, 4, 5, 6]
    # 2 steps an epoch, saves after the second and the last
    assert [picture.step for picture in events.Images("ranked_list")] == [4, 6]
    found = retrieval.evaluate(load_model(path), measures.subset(data))
    assert [point.step for point in events.Scalars("mAP_of_subset")] == [4, 6]
    assert events.Scalars("mAP_of_subset")[-1].value == pytest.approx(found["mAP"], abs=1e-6)
    usage = metrics.codebook_usage(found["index"].codes, 16)
    for book in range(12):
        assert events.Scalars(f"codebook_used/book_{book + 1:02d}")[-1].value == usage["used"][book]
        last = events.Scalars(f"codebook_entropy/book_{book + 1:02d}")[-1]
        assert last.value == pytest.approx(usage["entropy"][book], abs=1e-6)


def test_without_the_package_it_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    chosen = settings_module.resolve([f"--model_save_path={tmp_path / 'models'}", "--tensorboard"], "no_such_config.py")
    with pytest.raises(ValueError, match=r"pip install 'gpq-tf\[tensorboard\]'"):
        trainer.train(chosen, coloured_data())
    assert not (tmp_path / "models").exists()
