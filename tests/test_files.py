"""A file is replaced whole or not at all."""

import json
import os
import stat
import subprocess
import sys
import time

import pytest

from gpq_tf.files import ABANDONED, remove_abandoned, replacing, write_json


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_new_file_appears_at_the_end_and_alone(tmp_path):
    path = tmp_path / "made" / "on" / "the way" / "model.keras"
    with replacing(path) as temporary:
        assert temporary.parent == path.parent
        assert temporary.suffix == ".keras"
        temporary.write_bytes(b"new")
        assert not path.exists()
    assert path.read_bytes() == b"new"
    assert names(path.parent) == ["model.keras"]


def test_an_old_file_stands_until_the_new_one_is_whole(tmp_path):
    path = tmp_path / "a.json"
    path.write_bytes(b"old")
    with replacing(str(path)) as temporary:
        temporary.write_bytes(b"new, and longer")
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new, and longer"


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("existed", [True, False])
def test_an_exception_leaves_everything_as_it_was(tmp_path, error, existed):
    path = tmp_path / "a.json"
    if existed:
        path.write_bytes(b"old")
    with pytest.raises(error), replacing(path) as temporary:
        temporary.write_bytes(b"half")
        raise error
    assert names(tmp_path) == (["a.json"] if existed else [])
    assert not existed or path.read_bytes() == b"old"


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_disk_that_fails_leaves_everything_as_it_was(tmp_path, monkeypatch, call):
    path = tmp_path / "a.json"
    path.write_bytes(b"old")

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(OSError, match="No space left"), replacing(path) as temporary:
        temporary.write_bytes(b"new")
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["a.json"]


def test_the_content_is_on_disk_before_the_name_and_the_name_before_it_returns(tmp_path, monkeypatch):
    path, happened, fsync, replace = tmp_path / "a.json", [], os.fsync, os.replace

    def recording_fsync(handle):
        happened.append("folder" if stat.S_ISDIR(os.fstat(handle).st_mode) else f"{os.fstat(handle).st_size} bytes")
        fsync(handle)

    monkeypatch.setattr(os, "fsync", recording_fsync)
    monkeypatch.setattr(os, "replace", lambda *paths: (happened.append("rename"), replace(*paths)))
    with replacing(path) as temporary:
        temporary.write_bytes(b"12345")
    assert happened == ["5 bytes", "rename", "folder"]


def test_a_process_that_dies_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.json"
    path.write_bytes(b"old")
    program = (
        "import os, sys\n"
        "from gpq_tf.files import replacing\n"
        "with replacing(sys.argv[1]) as temporary:\n"
        "    temporary.write_bytes(b'half')\n"
        "    os._exit(7)\n"
    )
    assert subprocess.run([sys.executable, "-c", program, path], check=False).returncode == 7
    assert path.read_bytes() == b"old"
    assert not [name for name in names(tmp_path) if not name.startswith(".") and name != "a.json"]


@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_others_may_read_what_the_mask_lets_them(tmp_path, mask):
    before = os.umask(mask)
    try:
        write_json(tmp_path / "a.json", {})
        assert os.umask(mask) == mask
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a.json").stat().st_mode) == 0o666 & ~mask


def test_json_is_readable_by_eye_and_by_machine(tmp_path):
    value = {"name": "é", "list": [1, 2.5, None, True]}
    write_json(tmp_path / "a.json", value)
    text = (tmp_path / "a.json").read_text()
    assert json.loads(text) == value
    assert text.endswith("}\n")
    assert text.count("\n") > 5


def test_what_json_cannot_hold_leaves_the_old_file(tmp_path):
    write_json(tmp_path / "a.json", [1])
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", {"a": object()})
    assert json.loads((tmp_path / "a.json").read_text()) == [1]
    assert names(tmp_path) == ["a.json"]


def test_a_folder_that_cannot_be_made_is_an_oserror(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError), replacing(tmp_path / "file" / "a.json"):
        raise AssertionError("not reached")


def test_what_killed_processes_left_goes_and_nothing_else(tmp_path):
    """A process is killed while it writes; what it left goes an hour later, what others write now stays."""
    program = (
        "import os, signal; from gpq_tf.files import replacing\n"
        f"with replacing({str(tmp_path / 'gpq_48bits_20.keras')!r}) as path:\n"
        "    path.write_bytes(b'half'); os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert subprocess.run([sys.executable, "-c", program]).returncode == -9
    (left,) = names(tmp_path)
    remove_abandoned(tmp_path / "gpq_48bits")
    assert names(tmp_path) == [left]
    others = [".gpq_48bits_notes.txt", ".spq_32bits_1.0123456789abcdef.keras", "gpq_48bits_1.0123456789abcdef.keras"]
    for name in others:
        (tmp_path / name).touch()
    with replacing(tmp_path / "gpq_48bits_40.keras") as busy:
        for name in (left, *others):
            os.utime(tmp_path / name, (time.time() - 2 * ABANDONED,) * 2)
        remove_abandoned(tmp_path / "gpq_48bits")
        assert names(tmp_path) == sorted([*others, busy.name])
