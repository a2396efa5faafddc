"""Why training ends before its time: Ctrl-C or SIGTERM, after a save, or another worker that is gone."""

import contextlib
import signal
import threading

NAMES = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}


class Stopped(Exception):
    """A run was stopped by a signal, and saved.

    Attributes:
        signal: int, its number; a command's exit status is 128 more, as shells have it.
    """

    def __init__(self, message, number):
        super().__init__(message)
        self.signal = int(number)


class LostWorker(ConnectionError):
    """Another worker is gone, so that a step cannot end."""


@contextlib.contextmanager
def ending_at_once():
    """Within it Ctrl-C ends the process as the system does it, also where a library waits for others.

    TensorFlow waits for other workers without returning to Python, so that no handler of Python's would run. It takes
    SIGTERM for itself and does nothing about it while it waits; afterwards that is given back.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = _not_ignored()
    for number in before:
        signal.signal(number, signal.SIG_DFL)
    try:
        yield
    finally:
        _restore(before)


class Request:
    """The signal that has come, or None."""

    signal = None


@contextlib.contextmanager
def on_request():
    """Within it the first SIGINT or SIGTERM is noted; a second one acts as ever. Clusters send SIGTERM beforehand.

    A signal that the process was started to ignore stays ignored. Only a process's main thread may handle signals; in
    another nothing is noted.

    Yields:
        Request.
    """
    request = Request()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return

    def note(number, frame):
        request.signal = number
        _restore(before)

    before = _not_ignored()
    for number in before:
        signal.signal(number, note)
    try:
        yield request
    finally:
        _restore(before)


def _not_ignored():
    """dict of number -> handler, of the signals that the process was not started to ignore."""
    return {number: handler for number in NAMES if (handler := signal.getsignal(number)) != signal.SIG_IGN}


def _restore(handlers):
    for number, handler in handlers.items():
        signal.signal(number, handler)
