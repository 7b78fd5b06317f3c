"""One model trained by several processes, each a command of its own, as on several machines (here: on loopback)."""

import importlib.util
import json
import os
import re
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
from conftest import ROOT, draw_classes, run_process

pytestmark = pytest.mark.slow
needs_jax = pytest.mark.skipif(
    importlib.util.find_spec("jax") is None, reason="needs `pip install jax`"
)
RECIPE = "--image-size 75 --unfreeze 1 --head-epochs 2 --round-epochs 1 --views 2 --no-heavy-augmentation".split()

# The command itself, which in addition tells what its process ended with.
TELLING = """
import hashlib, os, sys
sys.path.insert(0, {root!r})
import train, utils
train_top = train.train_top
def train_and_tell(run, trained, number):
    rows, top = train_top(run, trained, number), trained.top
    weights = hashlib.sha256(b"".join(w.tobytes() for w in top.get_weights())).hexdigest()
    devices = len(top.weights[0].value.sharding.device_set)
    print("weights", weights, len(run.views[train.FIRST_RANDOM].rows), devices, file=sys.stderr)
    return rows
train.train_top = train_and_tell
if __name__ == "__main__":
    utils.run(train.main)
"""


def settings(count, number, port):
    """Return the environment of one of `count` processes."""
    names = {
        "JOB_ADDRESSES": f"127.0.0.1:{port}",
        "NUM_PROCESSES": str(count),
        "PROCESS_ID": str(number),
    }
    return {"KERAS_BACKEND": "jax"} | {
        f"KERAS_DISTRIBUTION_{name}": value for name, value in names.items()
    }


def start(count, script, cwd, *arguments):
    """Start the same command as `count` processes. Returns them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, str(script), *map(str, arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "encoding": "utf-8"}
    return [
        subprocess.Popen(command, cwd=cwd, env=os.environ | settings(count, n, port), **pipes)
        for n in range(count)
    ]


def together(folder, count, *recipe):
    """Train with several processes. Returns [(exit code, stdout, stderr)]."""
    (folder / "telling.py").write_text(TELLING.format(root=str(ROOT)))
    processes = start(count, folder / "telling.py", folder, "data", "model", *recipe)
    outputs = [process.communicate() for process in processes]
    return [(process.returncode, *output) for process, output in zip(processes, outputs)]


def last_round(folder):
    with np.load(folder / "model-resume.npz") as file:
        return json.loads(file["facts"].tobytes())["round"]


def accuracy(output):
    return float(re.search(r"^best: round \d+, validation accuracy (\S+)", output, re.M)[1])


@needs_jax
@pytest.mark.long
@pytest.mark.parametrize("count", [2, 4])
def test_processes_train_one_model_and_the_first_one_writes_it(tmp_path, weights_file, count):
    recipe = [*RECIPE, "--rounds", 1, "--weights", weights_file]
    data = draw_classes(tmp_path / "data", {"red": 24, "green": 24, "blue": 24})
    (data / "red" / "broken.png").write_bytes(b"no picture")
    done = together(tmp_path, count, *recipe)
    assert [code for code, _, _ in done] == [0] * count, done
    told = [
        re.search(r"^weights (\S+) (\d+) (\d+)$", errors, re.M).groups() for _, _, errors in done
    ]
    assert len({weights for weights, _, _ in told}) == 1
    assert sum(int(rows) for _, rows, _ in told) == 57, "each keeps views of its share only"
    assert all(int(devices) == count for _, _, devices in told)
    assert "images: 57 train, 15 validation, 3 classes, 1 skipped" in done[0][1]
    assert not any(output for _, output, _ in done[1:])
    assert not any(
        word in text for _, *texts in done for text in texts for word in ("Gloo", "Traceback")
    )
    assert accuracy(done[0][1]) >= 0.9
    assert sorted(path.name for path in tmp_path.iterdir() if path.suffix != ".py") == sorted(
        "000.png 001.png data model.h5 model.json model-labels.json model-history.csv model-mistakes.csv "
        "model-report.png model-review.csv".split()
    )
    alone = run_process(ROOT / "train.py", tmp_path, "data", "alone", *recipe)
    assert alone.returncode == 1 and "000.png: not a picture of this model" in alone.stderr


@needs_jax
@pytest.mark.long
@pytest.mark.parametrize("victim", [0, 1])
def test_when_one_is_killed_all_end_and_the_last_model_is_whole_and_goes_on(
    tmp_path, weights_file, victim
):
    draw_classes(tmp_path / "data", {"red": 24, "green": 24, "blue": 24})
    recipe = [*RECIPE, "--rounds", 50, "--patience", 0, "--weights", weights_file]
    processes = start(2, ROOT / "train.py", tmp_path, "data", "model", *recipe)
    end = time.monotonic() + 400
    while not (tmp_path / "model-resume.npz").exists():
        assert time.monotonic() < end and all(process.poll() is None for process in processes)
        time.sleep(0.5)
    processes[victim].kill()
    _, errors = processes[1 - victim].communicate(timeout=150)
    assert processes[1 - victim].returncode == 1
    assert errors.splitlines()[-1].startswith("error: another process of this run has ended")
    processes[victim].communicate(timeout=150)
    before = last_round(tmp_path)
    scored = run_process(ROOT / "train.py", tmp_path, "data", "model", "--evaluate")
    assert scored.returncode == 0, scored.stderr
    end = time.monotonic() + 400
    processes = start(2, ROOT / "train.py", tmp_path, "data", "model", *recipe, "--resume")
    while last_round(tmp_path) == before:
        assert time.monotonic() < end and all(process.poll() is None for process in processes)
        time.sleep(0.5)
    for process in processes:
        process.kill()
    for process in processes:
        process.communicate()
    assert (
        np.loadtxt(tmp_path / "model-history.csv", delimiter=",", skiprows=1, usecols=0)[-1]
        > before
    )


@needs_jax
@pytest.mark.long
def test_several_devices_of_one_machine_train_as_one(tmp_path, weights_file):
    draw_classes(tmp_path / "data", {"red": 24, "green": 24, "blue": 24})
    devices = {"KERAS_BACKEND": "jax", "XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    recipe = [*RECIPE, "--rounds", 1, "--weights", weights_file, "--batch-size", 15]
    (tmp_path / "telling.py").write_text(TELLING.format(root=str(ROOT)))
    done = run_process(tmp_path / "telling.py", tmp_path, "data", "model", *recipe, **devices)
    assert done.returncode == 0, done.stderr
    assert re.search(r"^weights \S+ \d+ 2$", done.stderr, re.M), (
        "both have the weights that are trained"
    )
    assert accuracy(done.stdout) >= 0.9


@pytest.mark.parametrize(
    "change, words",
    [
        ({"KERAS_BACKEND": "tensorflow"}, "several processes need JAX"),
        ({"KERAS_DISTRIBUTION_PROCESS_ID": "2"}, "set all three"),
        ({"KERAS_DISTRIBUTION_PROCESS_ID": "x"}, "set all three"),
        ({"KERAS_DISTRIBUTION_JOB_ADDRESSES": ""}, "set all three"),
    ],
)
def test_what_cannot_be_one_run_is_told_in_one_line(tmp_path, change, words):
    done = run_process(ROOT / "train.py", tmp_path, "data", "model", **(settings(2, 0, 1) | change))
    assert done.returncode == 1 and done.stderr.startswith("error: ") and words in done.stderr
    assert len(done.stderr.splitlines()) == 1
