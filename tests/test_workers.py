"""Several worker processes as a user starts them: one is killed or terminated, and all go on from the last save."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import keras
import numpy as np
import pytest

from gpq_tf import load_model

from small_data import coloured_folders

ROOT = Path(__file__).resolve().parents[1]
GIVEN = {
    "head": "spq",
    "dataset": "image_folders",
    "image_size": 32,
    "batch_size": 12,
    "width_multiplier": 1 / 16,
    "total_epochs": 8,
    "save_term": 1,
    "eval_epoch": 4,
    "resume": "last",
}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="strategies are TensorFlow's"),
]


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    coloured_folders(folder, {"": 24}, side=32)
    return folder


def free_addresses(n):
    listeners = [socket.create_server(("127.0.0.1", 0)) for _ in range(n)]
    addresses = [f"127.0.0.1:{listener.getsockname()[1]}" for listener in listeners]
    for listener in listeners:
        listener.close()
    return addresses


def start(photos, folder, config=None, **more):
    given = {**GIVEN, "data_dir": photos, "model_save_path": folder / "models", **more}
    command = [sys.executable, "-m", "gpq_tf", "train", *(f"--{name}={value}" for name, value in given.items())]
    environment = {name: value for name, value in os.environ.items() if name != "TF_CONFIG"}
    environment |= {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "-1"}
    if config:
        environment["TF_CONFIG"] = json.dumps(config)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=folder, env=environment, **pipes)


def start_all(photos, folder, n=2):
    cluster = {"worker": free_addresses(n)}
    configs = [{"cluster": cluster, "task": {"type": "worker", "index": index}} for index in range(n)]
    return [start(photos, folder, config, strategy="multiworker") for config in configs]


def ended(process, seconds=300):
    """(status, stdout, last line of stderr)"""
    output, errors = process.communicate(timeout=seconds)
    return process.returncode, output, errors.strip().rpartition("\n")[2]


def wait_for(path, processes):
    deadline = time.time() + 300
    while not path.exists():
        for process in processes:
            assert process.poll() is None, process.communicate()
        assert time.time() < deadline
        time.sleep(0.05)


def weights(path):
    return {weight.path: keras.ops.convert_to_numpy(weight) for weight in load_model(path).weights}


def test_a_killed_worker_stops_all_and_they_go_on_to_the_same_bits(tmp_path, photos):
    left_alone, killed = tmp_path / "left_alone", tmp_path / "killed"
    for folder in (left_alone, killed):
        folder.mkdir()
    assert [ended(process)[0] for process in start_all(photos, left_alone)] == [0, 0]

    processes = start_all(photos, killed)
    wait_for(killed / "models" / "spq_32bits_2.keras", processes)
    processes[1].kill()
    status, output, last_line = ended(processes[0])
    assert status == 75, (output, last_line)
    assert "Lost another worker" in last_line
    assert "--resume=last" in last_line
    assert ended(processes[1])[0] == -signal.SIGKILL

    processes = start_all(photos, killed)
    results = [ended(process) for process in processes]
    assert [status for status, *_ in results] == [0, 0], results
    assert "resuming" in results[0][1]
    assert re.fullmatch(r"waiting for 2 workers: .*\n", results[1][1])  # for all else the first worker speaks
    expected, found = (weights(folder / "models" / "spq_32bits_8.keras") for folder in (left_alone, killed))
    for name in expected:
        np.testing.assert_array_equal(found[name], expected[name], err_msg=name)


def test_a_terminated_worker_stops_all_after_a_save(tmp_path, photos):
    processes = start_all(photos, tmp_path)
    wait_for(tmp_path / "models" / "spq_32bits_1.keras", processes)
    processes[1].send_signal(signal.SIGTERM)
    results = [ended(process) for process in processes]
    assert [status for status, *_ in results] == [143, 143], results
    assert "saved by the first worker" in results[1][2]
    assert "stopped with another worker after step" in results[0][2]


def test_workers_that_begin_with_different_steps_are_refused(tmp_path, photos):
    """The second looks for the saves where there are none."""
    assert ended(start(photos, tmp_path, total_epochs=1))[0] == 0
    (tmp_path / "elsewhere").mkdir()
    cluster = {"worker": free_addresses(2)}
    processes = [
        start(photos, folder, {"cluster": cluster, "task": {"type": "worker", "index": index}}, strategy="multiworker")
        for index, folder in enumerate((tmp_path, tmp_path / "elsewhere"))
    ]
    for status, _, last_line in map(ended, processes):
        assert status == 2
        assert "Invalid resume. Expected all workers to go on from the same step." in last_line


def test_workers_with_other_settings_are_refused(tmp_path, photos):
    cluster = {"worker": free_addresses(2)}
    processes = [
        start(
            photos,
            tmp_path,
            {"cluster": cluster, "task": {"type": "worker", "index": index}},
            strategy="multiworker",
            seed=index,
        )
        for index in range(2)
    ]
    for status, _, last_line in map(ended, processes):
        assert status == 2
        assert "Invalid settings. Expected the same on all workers." in last_line
    assert not list(tmp_path.rglob("*.keras"))
