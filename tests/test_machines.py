"""One model trained by several processes, as on several machines (here: on loopback)."""

import importlib.util
import re
import socket
import time

import pytest
from conftest import ROOT, draw_classes, error_line, run_process, start, train_here

needs_jax = pytest.mark.skipif(
    importlib.util.find_spec("jax") is None, reason="needs `pip install jax`"
)
RECIPE = "--image-size 75 --unfreeze 1 --head-epochs 2 --round-epochs 1 --views 2"
RECIPE += " --no-heavy-augmentation"

# The command itself, which in addition tells what its process ended with.
TELLING = """
import hashlib, sys
sys.path.insert(0, {root!r})
import features, train, utils
train_top = train.train_top
def train_and_tell(run, trained, number):
    rows, top = train_top(run, trained, number), trained.top
    weights = hashlib.sha256(b"".join(w.tobytes() for w in top.get_weights())).hexdigest()
    devices = len(top.weights[0].value.sharding.device_set)
    print("weights", weights, len(run.views[features.MIRRORED + 1].rows), devices, file=sys.stderr)
    return rows
train.train_top = train_and_tell
if __name__ == "__main__":
    utils.run(train.main)
"""


def settings(count, number, port):
    names = {"JOB_ADDRESSES": f"127.0.0.1:{port}", "NUM_PROCESSES": count, "PROCESS_ID": number}
    prefixed = {f"KERAS_DISTRIBUTION_{name}": str(value) for name, value in names.items()}
    return {"KERAS_BACKEND": "jax"} | prefixed


@pytest.fixture
def folder(tmp_path):
    """Draw a set of three classes, and write the command that tells. Returns the folder."""
    draw_classes(tmp_path / "data", {"red": 24, "green": 24, "blue": 24})
    (tmp_path / "telling.py").write_text(TELLING.format(root=str(ROOT)))
    return tmp_path


def start_several(count, script, folder, *recipe):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = ["data", "model", *RECIPE.split(), *recipe]
    return [start(script, folder, *words, **settings(count, n, port)) for n in range(count)]


def wait_until(happened, processes):
    end = time.monotonic() + 400
    while not happened():
        assert time.monotonic() < end and all(process.poll() is None for process in processes)
        time.sleep(0.5)


def accuracy(output):
    return float(re.search(r"^best: round \d+, validation accuracy (\S+)", output, re.M)[1])


@needs_jax
@pytest.mark.long
@pytest.mark.parametrize("count", [2, 4])
def test_processes_train_one_model_and_the_first_one_writes_it(folder, weights_file, count):
    (folder / "data" / "red" / "broken.png").write_bytes(b"no picture")
    recipe = ["--rounds", 1, "--weights", weights_file]
    processes = start_several(count, folder / "telling.py", folder, *recipe)
    outputs, errors = zip(*[process.communicate() for process in processes])
    assert [process.returncode for process in processes] == [0] * count, errors
    told = [re.search(r"^weights (\S+) (\d+) (\d+)$", text, re.M).groups() for text in errors]
    weights, sizes, devices = zip(*told)
    assert len(set(weights)) == 1 and set(devices) == {str(count)}
    assert sum(map(int, sizes)) == 57, "each keeps views of its share only"
    assert "images: 57 train, 15 validation, 3 classes, 1 skipped" in outputs[0]
    assert not any(outputs[1:])
    assert not re.search("Gloo|Traceback", "".join(outputs + errors))
    assert accuracy(outputs[0]) >= 0.9
    ends = ".h5 .json -labels.json -history.csv -mistakes.csv -report.png -review.csv".split()
    names = {"000.png", "001.png", "data", "telling.py", *(f"model{end}" for end in ends)}
    assert {path.name for path in folder.iterdir()} == names
    alone = train_here(folder, "data", "alone", *RECIPE.split(), *recipe)
    assert "000.png: not a picture of this model" in error_line(alone)


@needs_jax
@pytest.mark.long
@pytest.mark.parametrize("victim", [0, 1])
def test_when_one_is_killed_all_end_and_the_last_model_is_whole_and_goes_on(
    folder, weights_file, victim
):
    recipe = ["--rounds", 50, "--patience", 0, "--weights", weights_file]
    processes = start_several(2, ROOT / "train.py", folder, *recipe)
    wait_until((folder / "model-resume.npz").exists, processes)
    processes[victim].kill()
    _, errors = processes[1 - victim].communicate(timeout=150)
    assert processes[1 - victim].returncode == 1
    assert errors.splitlines()[-1].startswith("error: another process of this run has ended")
    processes[victim].communicate(timeout=150)
    before = (folder / "model-resume.npz").read_bytes()
    scored = run_process(ROOT / "train.py", folder, "data", "model", "--evaluate")
    assert scored.returncode == 0, scored.stderr
    processes = start_several(2, ROOT / "train.py", folder, *recipe, "--resume")
    wait_until(lambda: (folder / "model-resume.npz").read_bytes() != before, processes)
    for process in processes:
        process.kill()
    for process in processes:
        process.communicate()


@needs_jax
@pytest.mark.long
def test_a_run_that_was_killed_before_its_last_scores_goes_on(folder, weights_file):
    program = f"import os, sys; sys.path.insert(0, {str(ROOT)!r}); import train, utils\n"
    program += "train.finish_run = lambda *_: os._exit(9)\n"
    program += 'if __name__ == "__main__":\n    utils.run(train.main)\n'
    (folder / "dying.py").write_text(program)
    recipe = ["--rounds", 1, "--weights", weights_file]
    for script, code in ((folder / "dying.py", 1), (ROOT / "train.py", 0)):
        processes = start_several(2, script, folder, *recipe, *["--resume"] * (code == 0))
        outputs, errors = zip(*[process.communicate() for process in processes])
        assert [process.returncode for process in processes] == [code, code], errors
    assert accuracy(outputs[0]) >= 0.9


@needs_jax
@pytest.mark.long
def test_several_devices_of_one_machine_train_as_one(folder, weights_file):
    devices = {"KERAS_BACKEND": "jax", "XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    recipe = [*RECIPE.split(), "--rounds", 1, "--weights", weights_file, "--batch-size", 15]
    done = run_process(folder / "telling.py", folder, "data", "model", *recipe, **devices)
    assert done.returncode == 0, done.stderr
    assert re.search(r"^weights \S+ \d+ 2$", done.stderr, re.M), "both have what is trained"
    assert accuracy(done.stdout) >= 0.9


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"KERAS_BACKEND": "tensorflow"}, "several processes need JAX"),
        ({"KERAS_DISTRIBUTION_PROCESS_ID": "x"}, "set all three"),
        ({"KERAS_DISTRIBUTION_JOB_ADDRESSES": ""}, "set all three"),
    ],
)
def test_what_cannot_be_one_run_is_told_in_one_line(tmp_path, monkeypatch, change, words):
    for name, value in (settings(2, 0, 1) | change).items():
        monkeypatch.setenv(name, value)
    done = train_here(tmp_path, "data", "model")
    assert words in error_line(done) and len(done.stderr.splitlines()) == 1
