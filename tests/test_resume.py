"""Stops of every kind: a run that goes on ends with the same bits, and the model on disk is always a whole one."""

import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import h5py
import numpy as np
import pytest
from conftest import ROOT, TINY, draw_classes, run_process
from PIL import Image

import model
import train
import utils

pytestmark = pytest.mark.slow
SHORT = (
    "--image-size 75 --head-epochs 2 --rounds 2 --round-epochs 1 --batch-size 8 --float32".split()
)


@pytest.fixture(scope="module")
def command(tmp_path_factory, weights_file):
    """Return the arguments of a short run on a small set of drawn pictures."""
    data = draw_classes(tmp_path_factory.mktemp("set") / "data", {"a": 10, "b": 10, "c": 10})
    return [str(data), "m", *SHORT, "--weights", str(weights_file)]


@pytest.fixture(scope="module")
def whole_run(command, tmp_path_factory):
    """Run without a stop; --resume finds nothing to go on with. Returns (folder, stdout, seconds)."""
    folder, clock = tmp_path_factory.mktemp("undisturbed"), time.monotonic()
    done = run_process(ROOT / "train.py", folder, *command, "--resume")
    assert done.returncode == 0, done.stderr
    return folder, done.stdout, time.monotonic() - clock


@pytest.fixture(scope="module")
def undisturbed(whole_run):
    return whole_run[0]


def numbers(prefix):
    """Return the bytes of all arrays in a model file, with the labels that it says it has."""
    found = []
    with h5py.File(f"{prefix}.h5") as file:
        file["model_weights"].visititems(
            lambda name, item: (
                found.append((name, item[()].tobytes())) if isinstance(item, h5py.Dataset) else None
            )
        )
        return found, json.loads(file.attrs["kit"])["labels"]


def same_result(one, other, prefix="m"):
    """Compare all that two runs left, save dates and seconds."""
    assert numbers(one / prefix) == numbers(other / prefix)
    names = [
        sorted(p.name for p in folder.iterdir() if p.name != "data") for folder in (one, other)
    ]
    assert names[0] == names[1]
    for name in names[0]:
        if name.startswith("0") or name in [
            f"{prefix}{end}" for end in (".json", "-labels.json", "-mistakes.csv", "-review.csv")
        ]:
            assert (one / name).read_bytes() == (other / name).read_bytes(), name
    tables = [
        (folder / f"{prefix}-history.csv").read_text().splitlines() for folder in (one, other)
    ]
    rows = [[line.rpartition(",")[0] for line in table] for table in tables]
    assert rows[0] == rows[1]


def start(command, folder, *more):
    return subprocess.Popen([sys.executable, str(ROOT / "train.py"), *command, *more], cwd=folder, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # fmt: skip


def wait_for(process, text):
    """Read the process's output up to a line that begins with `text`."""
    for line in process.stdout:
        if line.startswith(text):
            return
    raise AssertionError(process.stderr.read())


EARLY = [pytest.param(line, marks=pytest.mark.long) for line in ("round 0:", "round 1:")]


@pytest.mark.parametrize("line", [*EARLY, "best:"])
def test_a_killed_run_goes_on_to_the_same_bits(command, undisturbed, tmp_path, line):
    process = start(command, tmp_path)
    wait_for(process, line)
    process.kill()
    process.wait()
    done = run_process(ROOT / "train.py", tmp_path, *command, "--resume")
    assert done.returncode == 0, done.stderr
    same_result(undisturbed, tmp_path)


@pytest.mark.long
def test_from_scratch_too(tmp_path):
    draw_classes(tmp_path / "data", {"a": 10, "b": 10, "c": 10})
    command = [str(tmp_path / "data"), "m", *TINY, "--weights", "none", "--rounds", "2"]
    folders = tmp_path / "whole", tmp_path / "killed"
    for folder in folders:
        folder.mkdir()
    assert run_process(ROOT / "train.py", folders[0], *command).returncode == 0
    process = start(command, folders[1])
    wait_for(process, "round 1:")
    process.kill()
    process.wait()
    assert run_process(ROOT / "train.py", folders[1], *command, "--resume").returncode == 0
    same_result(*folders)


@pytest.fixture(scope="module")
def interrupted(command, tmp_path_factory):
    """Stop a run by Ctrl-C in its last round, after another one was begun beside it.

    Returns (its folder, with its data, exit code, stderr, what the other one said).
    """
    folder = tmp_path_factory.mktemp("interrupted")
    shutil.copytree(command[0], folder / "data")
    process = start(["data", *command[1:]], folder)
    wait_for(process, "images:")
    second = run_process(ROOT / "train.py", folder, "data", *command[1:])
    wait_for(process, "round 1:")
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    return folder, process.returncode, errors, second


def test_two_runs_do_not_work_at_one_model(interrupted):
    second = interrupted[3]
    assert second.returncode == 1 and "another run is at work" in second.stderr


def test_ctrl_c_keeps_the_best_round_and_says_how_to_go_on(
    interrupted, command, undisturbed, tmp_path
):
    folder, code, errors, _ = interrupted
    assert code == 130, errors
    assert "--resume" in errors and "Traceback" not in errors
    assert model.load_model(folder / "m")[1]["labels"] == ["a", "b", "c"]
    copy = shutil.copytree(folder, tmp_path / "copy")
    done = run_process(ROOT / "train.py", copy, "data", *command[1:], "--resume")
    assert done.returncode == 0 and not re.search(
        "^(nothing to resume|round 0)", done.stdout, re.M
    ), done
    same_result(undisturbed, copy)


def test_nothing_to_resume_is_said(whole_run):
    folder, output, _ = whole_run
    assert output.startswith("nothing to resume")
    assert not list(folder.glob("m-resume*")) and not list(folder.glob("*.lock"))


@pytest.fixture(scope="module")
def stopped(interrupted):
    return interrupted[0]


def add_picture(folder):
    Image.new("RGB", (80, 80), "teal").save(folder / "data" / "a" / "new.png")


def add_class(folder):
    (folder / "data" / "d").mkdir()
    for n in range(4):
        Image.new("RGB", (80, 80), (n * 9, 0, 99)).save(folder / "data" / "d" / f"{n}.png")


@pytest.mark.parametrize(
    ("change", "options", "reason"),
    [(add_picture, [], "data has changed.*new.png"), (add_class, [], "data has changed.*d/0.png"),
     (None, ["--image-size", "80"], "other image size"), (None, ["--seed", "2"], "other seed"),
     (None, ["--rounds", "5"], "other rounds"), (None, ["--weights", "none"], "other --weights .*SHA-256")],
)  # fmt: skip
def test_another_run_is_not_gone_on_with(stopped, command, tmp_path, change, options, reason):
    shutil.copytree(stopped, tmp_path / "copy")
    if change:
        change(tmp_path / "copy")
    before = numbers(tmp_path / "copy" / "m")
    done = run_process(
        ROOT / "train.py", tmp_path / "copy", "data", *command[1:], "--resume", *options
    )
    assert done.returncode == 1 and re.search(
        rf"^error: --resume: .*{reason}", done.stderr, re.M
    ), done.stderr
    assert numbers(tmp_path / "copy" / "m") == before


def test_a_model_that_was_moved_away_is_saved_again(stopped, command, undisturbed, tmp_path):
    """The numbers of the last whole round are there, so that round is the best one known."""
    copy = shutil.copytree(stopped, tmp_path / "copy")
    for path in model.model_paths(copy / "m"):
        path.unlink()
    done = run_process(ROOT / "train.py", copy, "data", *command[1:], "--resume")
    assert done.returncode == 0, done.stderr
    assert "warning: m.h5: the best round is gone" in done.stderr
    scored = re.findall(r"^round (\d): .*\((\d+)/6\)", done.stdout, re.M)
    assert [number for number, _ in scored][-2:] == ["1", "2"]
    best = re.search(r"^best: round \d, .*\((\d+)/6\)", done.stdout, re.M)[1]
    assert best == max(count for _, count in scored)
    model.load_model(copy / "m")


def test_only_our_own_unfinished_files_are_removed(tmp_path):
    others = [
        ".m-report-unfinished-12345678.h5",
        ".m-resume-unfinished-x.h5",
        ".n-unfinished-1.h5",
        ".m-unfinished-1.jpg",
    ]
    ours = [
        ".m-unfinished-12345678.h5",
        ".m-report-unfinished-x.png",
        ".m-resume-unfinished-x.npz",
        ".m-review-unfinished-x.csv",
    ]
    for name in [*others, *ours]:
        (tmp_path / name).touch()
    train.remove_unfinished(tmp_path / "m")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(others)


def small_run(folder):
    """Save a state of a model of three numbers. Returns (its Run, what is trained)."""
    keras = model.import_keras()
    top = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    top.compile(optimizer=keras.optimizers.AdamW(), loss="mse")
    top.optimizer.build(top.trainable_variables)
    settings = SimpleNamespace(number_format="float32", source="none")
    pixels = SimpleNamespace(rows=np.zeros((1, 75, 75, 3), "uint8"))
    data = SimpleNamespace(pictures=[], pixels=pixels, labels=["a", "b"], validation=np.arange(3))
    args = train.parse_arguments(["data", str(folder / "m")])
    recipe = train.FINE_TUNING
    run = train.Run(args, recipe, data, SimpleNamespace(settings=settings), {}, {})
    trained = train.Trained(None, top, None)
    state = {"round": 1, "stale": 0, "best": {"round": 1, "right": 3, "loss": 0.5}}
    train.save_state(run, state | {"history": [{"round": 1}]}, train.variables_of(trained))
    for path in model.model_paths(args.model):
        path.touch()
    return run, trained


def test_a_state_comes_back(tmp_path, monkeypatch):
    run, trained = small_run(tmp_path)
    monkeypatch.setattr(train, "build_trained", lambda run, head: trained)
    variables = train.variables_of(trained)
    state, before = train.read_state(run.args), [v.numpy() for v in variables]
    for variable in variables:
        variable.assign(variable + 1)
    assert train.restore_trained(run, state) is trained
    for variable, number in zip(variables, before, strict=True):
        assert np.array_equal(variable, number)
    train.check_state(run.args, state, run.recipe, run.data)
    assert state["best"] == {"round": 1, "right": 3, "loss": 0.5}


def test_other_views_are_not_gone_on_with(monkeypatch, tmp_path):
    """They would differ if a constant in the script has changed meanwhile."""
    run, _ = small_run(tmp_path)
    state = train.read_state(run.args)
    monkeypatch.setattr(train, "HEAVY", train.HEAVY._replace(shift=0.3))
    with pytest.raises(utils.UserError, match="--resume: the interrupted run had other views"):
        train.check_state(run.args, state, run.recipe, run.data)


def spoil_state(path, kind):
    with np.load(path) as file:
        arrays = dict(file)
    if kind == "cut":
        os.truncate(path, path.stat().st_size // 2)
    elif kind == "text":
        path.write_text("[1, 2")
    elif kind == "bit":
        data = bytearray(path.read_bytes())
        data[data.index(arrays["v0"].tobytes())] ^= 1
        path.write_bytes(data)
    else:
        array = {"pickle": np.array([{"x": 1}], dtype=object), "shape": np.zeros(9)}.get(kind)
        np.savez(path, **{k: v for k, v in arrays.items() if k != "v0"})
        if array is not None:
            np.savez(path, **arrays | {"v0": array})


@pytest.mark.parametrize("kind", ["cut", "text", "bit", "pickle", "shape", "missing"])
def test_a_damaged_state_is_one_line(tmp_path, kind, monkeypatch):
    run, trained = small_run(tmp_path)
    monkeypatch.setattr(train, "build_trained", lambda run, head: trained)
    spoil_state(tmp_path / "m-resume.npz", kind)
    with pytest.raises(utils.UserError, match=r"m-resume\.npz: damaged.*train without --resume"):
        train.restore_trained(run, train.read_state(run.args))


def old_model(folder, labels=("x", "y", "z")):
    """Put an older, untrained model of other classes, but the same number of them, in place."""
    import keras

    keras.utils.clear_session()
    info = {"labels": list(labels), "image_size": 75, "threshold": 0.5, "round": 0}
    model.save_model(model.build_network(3, 75), info, folder / "m")
    return numbers(folder / "m")


def check_whole(folder, allowed):
    """The three files are one of the allowed models, or the reader says that they do not belong together."""
    try:
        _, info = model.load_model(folder / "m")
    except utils.UserError as error:
        assert "does not belong" in str(error)
        return False
    found = numbers(folder / "m")
    assert found[1] == info["labels"] == json.loads((folder / "m-labels.json").read_text())
    assert found in allowed or found[1] == ["a", "b", "c"]
    return True


def kill_at_random(command, whole_run, tmp_path, count, seed):
    undisturbed, _, longest = whole_run
    rng, whole = random.Random(seed), numbers(undisturbed / "m")
    for n in range(count):
        folder = tmp_path / str(n)
        folder.mkdir()
        old = old_model(folder)
        process = start(command, folder)
        time.sleep(rng.uniform(0, longest))
        process.kill()
        process.communicate()
        check_whole(folder, [old, whole])
        done = run_process(ROOT / "train.py", folder, *command, "--resume")
        assert done.returncode == 0, done.stderr
        same_result(undisturbed, folder)


def test_a_kill_at_a_random_moment(command, whole_run, tmp_path):
    kill_at_random(command, whole_run, tmp_path, 1, seed=os.getpid())


@pytest.mark.long
def test_thirty_kills_at_random_moments(command, whole_run, tmp_path):
    kill_at_random(command, whole_run, tmp_path, 30, seed=1)


COUNTER = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <sys/types.h>
#include <unistd.h>
static long left = -1, seen = 0;
void die_after(long n) { left = n; seen = 0; }
long seen_so_far(void) { return seen; }
static void step(void) { seen++; if (left >= 0 && left-- == 0) kill(getpid(), SIGKILL); }
#define NEXT(name) ((typeof(&name)) dlsym(RTLD_NEXT, #name))
ssize_t write(int f, const void *b, size_t n) { step(); return NEXT(write)(f, b, n); }
ssize_t pwrite(int f, const void *b, size_t n, off_t o) { step(); return NEXT(pwrite)(f, b, n, o); }
ssize_t pwrite64(int f, const void *b, size_t n, off64_t o) { step(); return NEXT(pwrite64)(f, b, n, o); }
int fsync(int f) { step(); return NEXT(fsync)(f); }
int ftruncate(int f, off_t n) { step(); return NEXT(ftruncate)(f, n); }
int ftruncate64(int f, off64_t n) { step(); return NEXT(ftruncate64)(f, n); }
int rename(const char *a, const char *b) { step(); return NEXT(rename)(a, b); }
int renameat(int x, const char *a, int y, const char *b) { step(); return NEXT(renameat)(x, a, y, b); }
int unlink(const char *a) { step(); return NEXT(unlink)(a); }
#define OPEN(name) int name(const char *p, int flags, ...) { va_list v; va_start(v, flags); \
    mode_t m = va_arg(v, mode_t); va_end(v); step(); return NEXT(name)(p, flags, m); }
OPEN(open) OPEN(open64)
"""

SAVER = """
import ctypes, json, os, sys
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
import h5py, keras, numpy as np
import model, utils
lib = ctypes.CDLL(None)
folder, labels, value = sys.argv[1], json.loads(sys.argv[2]), float(sys.argv[3])
inputs = keras.Input((4,), name="pixels")
hidden = keras.layers.Dense(300, name="hidden")(inputs)
network = keras.Model(inputs, keras.layers.Dense(3, activation="softmax", name="probabilities")(hidden))
network.set_weights([np.full(w.shape, value, "float32") for w in network.get_weights()])
info = {"labels": labels, "image_size": 75, "threshold": 0.5}
def save():
    model.save_model(network, info, os.path.join(folder, "m"))
save()  # whatever is imported or opened once only
for k in map(int, sys.argv[4:]):
    child = os.fork()
    if child == 0:
        os.chdir(folder)
        folder = str(k)
        lib.die_after(ctypes.c_long(k))
        save()
        lib.die_after(ctypes.c_long(-1))
        os._exit(0)
    _, status = os.waitpid(child, 0)
    print(k, status, flush=True)
"""


@pytest.mark.skipif(
    not shutil.which("gcc") or not sys.platform.startswith("linux"), reason="needs gcc on Linux"
)
def test_ending_at_every_write_of_a_save_leaves_the_old_or_the_new_model(tmp_path):
    (tmp_path / "count.c").write_text(COUNTER)
    library = tmp_path / "count.so"
    subprocess.run(
        ["gcc", "-shared", "-fPIC", "-O1", "-o", library, tmp_path / "count.c", "-ldl"], check=True
    )
    environment = os.environ | {"LD_PRELOAD": str(library), "PYTHONPATH": str(ROOT)}

    def save(folder, labels, value, *steps):
        command = [
            sys.executable,
            "-c",
            SAVER,
            str(folder),
            json.dumps(labels),
            str(value),
            *map(str, steps),
        ]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return [tuple(map(int, line.split())) for line in done.stdout.splitlines()]

    folder = tmp_path / "models"
    folder.mkdir()
    save(folder, ["x", "y", "z"], 1)
    old, steps = numbers(folder / "m"), range(120)
    for k in steps:
        (folder / str(k)).mkdir()
        for path in folder.glob("m*.*"):
            shutil.copy(path, folder / str(k))
    results = dict(save(folder, ["a", "b", "c"], 2, *steps))
    new = numbers(folder / "m")
    killed = [k for k in steps if results[k] == signal.SIGKILL]
    finished = [k for k in steps if results[k] == 0]
    assert len(killed) > 20 and finished and max(killed) < min(finished)
    outcomes = {"old": 0, "new": 0, "mixed": 0}
    for k in steps:
        outcomes[state_of(folder / str(k), old, new)] += 1
        if k in finished:
            assert state_of(folder / str(k), old, new) == "new"
    assert outcomes["old"] > 10 and outcomes["mixed"] <= 12, outcomes  # only between the renames


def state_of(folder, old, new):
    """Say which model the three files are, by the reader's own rule: the sums in the attribute."""
    with h5py.File(folder / "m.h5") as file:
        sums = json.loads(file.attrs["kit"])["sha256"]
    texts = [(folder / name).read_bytes() for name in ("m.json", "m-labels.json")]
    if [hashlib.sha256(text).hexdigest() for text in texts] != [sums["json"], sums["labels"]]:
        return "mixed"
    found = numbers(folder / "m")
    assert found in (old, new)
    return "old" if found == old else "new"


def limited(limit, value):
    """Return a function for the child: set a limit of its own."""
    import resource

    return lambda: resource.setrlimit(getattr(resource, limit), (value, value))


@pytest.mark.parametrize("size", [10_000, 5_000_000], ids=["while reading", "while saving"])
def test_a_full_disk_is_one_line_and_the_last_model_stays(command, tmp_path, size):
    old = old_model(tmp_path)
    done = subprocess.run([sys.executable, str(ROOT / "train.py"), *command], cwd=tmp_path, capture_output=True,
                          text=True, preexec_fn=limited("RLIMIT_FSIZE", size))  # fmt: skip
    assert done.returncode == 1, done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: ") and "Traceback" not in done.stderr
    check_whole(tmp_path, [old])
    assert numbers(tmp_path / "m") == old
    assert not [p.name for p in tmp_path.iterdir() if p.name.startswith(".")]
