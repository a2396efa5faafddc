"""Files: written so that a half-written one never carries the final name, and found without their suffix."""

import contextlib
import errno
import glob
import json
import os
import re
import secrets
import time
from pathlib import Path

# Seconds after which nobody writes a temporary file any more: a save takes seconds.
ABANDONED = 3600


@contextlib.contextmanager
def replacing(path):
    """Yield a temporary path in the folder of `path`; on success it becomes `path`, on failure it is removed.

    The content is on disk (fsync) before the rename, and the rename is on disk before this returns: whoever sees
    `path` sees either the old file or the whole new one, also after a power cut.

    Args:
        path: str or Path, the final name. Its folder is made when it does not exist.

    Yields:
        Path of an empty file with the same suffix, to be written and closed by the caller.

    Raises:
        OSError: if the folder cannot be made or written.

    Example:
        >>> with replacing("/tmp/gpq_tf_doctest.txt") as temporary:
        ...     _ = temporary.write_text("whole")
        >>> Path("/tmp/gpq_tf_doctest.txt").read_text()
        'whole'
    """
    path = Path(path)
    temporary = _temporary(path)
    try:
        yield temporary
        _sync(temporary)
        os.replace(temporary, path)
        _sync(path.parent)
    except OSError as error:  # the temporary name tells nobody anything, and a full disk names no file at all
        if error.filename in (None, str(temporary)):
            raise type(error)(error.errno, error.strerror or str(error), str(path)) from error
        raise
    finally:
        temporary.unlink(missing_ok=True)


def check_writable(path):
    """Raise the OSError that `replacing` would, before there is anything to write.

    Example:
        >>> check_writable("/tmp/gpq_tf_doctest.txt")
    """
    _temporary(Path(path)).unlink()


def remove_abandoned(stem):
    """Remove what killed processes left behind: temporary files of `replacing` that are an hour old.

    Args:
        stem: Path; those for names that begin so.

    Example:
        >>> remove_abandoned(Path("/tmp/no_such_folder/gpq_48bits"))
    """
    for path in stem.parent.glob(f".{glob.escape(stem.name)}*"):
        with contextlib.suppress(OSError):  # another worker may be first
            if re.search(r"\.[0-9a-f]{16}\.\w+$", path.name) and path.stat().st_mtime < time.time() - ABANDONED:
                path.unlink()


def write_json(path, value):
    """Write `value` as indented JSON, atomically (see `replacing`)."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2) + "\n")


def _temporary(path):
    """An empty file beside `path`, whose folder is made when it does not exist."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.{secrets.token_hex(8)}{path.suffix}")
    try:
        temporary.touch(exist_ok=False)  # with the permissions of any new file, unlike those of the tempfile module
    except OSError as error:
        raise type(error)(error.errno, error.strerror, str(path)) from error  # the temporary name tells nobody anything
    if path.is_dir():
        temporary.unlink()
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    return temporary


def _sync(path):
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def find_file(path, suffix):
    """The file of this suffix that `path` means, whether or not it ends in it: pathlib.Path, or None.

    Example:
        >>> find_file("no_such_file", ".h5") is None
        True
    """
    for candidate in (Path(path), Path(f"{path}{suffix}")):
        if candidate.suffix == suffix and candidate.is_file():
            return candidate
    return None
