"""Stops of every kind: a run goes on to the same bits, and the model is always whole."""

import contextlib
import json
import os
import random
import re
import shutil
import signal
import time

import h5py
import numpy as np
import pytest
import tiny_network
from conftest import (
    ROOT,
    TINY,
    draw_classes,
    error_line,
    limit,
    limited,
    run_process,
    start,
    train_here,
)
from PIL import Image

import features
import model
import train
import utils

pytestmark = pytest.mark.slow
NETWORK = ROOT / "tests" / "tiny_network.py"
RECIPE = [*TINY, "--rounds", "3", "--float32"]


@pytest.fixture(scope="module")
def command(tmp_path_factory, tiny_weights):
    """Return the arguments of a run of three rounds on a small set of drawn pictures."""
    data = draw_classes(tmp_path_factory.mktemp("set") / "data", {"a": 10, "b": 10, "c": 10})
    return [str(data), "m", *RECIPE, "--weights", str(tiny_weights)]


@pytest.fixture(scope="module")
def whole_run(command, tmp_path_factory):
    """Run without a stop. Returns (folder, stdout, seconds from the first line to the end)."""
    folder = tmp_path_factory.mktemp("undisturbed")
    process = start(NETWORK, folder, "train.py", *command, "--resume")
    output, clock = process.stdout.readline(), time.monotonic()
    output += process.stdout.read()
    assert process.wait() == 0, process.stderr.read()
    return folder, output, time.monotonic() - clock


def wait_for(process, text):
    for line in process.stdout:
        if line.startswith(text):
            return
    raise AssertionError(process.stderr.read())


def numbers(prefix):
    """Return the bytes of all arrays in a model file, with the labels that it says it has."""
    found = []

    def note(name, item):
        if isinstance(item, h5py.Dataset):
            found.append((name, item[()].tobytes()))

    with h5py.File(f"{prefix}.h5") as file:
        file["model_weights"].visititems(note)
        return found, json.loads(file.attrs["kit"])["labels"]


def check_same_result(one, other):
    """Compare all that two runs left, save dates and seconds."""
    assert numbers(one / "m") == numbers(other / "m")
    names, more = ({p.name for p in folder.iterdir()} - {"data"} for folder in (one, other))
    assert names == more
    same = {"m.json", "m-labels.json", "m-mistakes.csv", "m-review.csv"}
    for name in names & same | {name for name in names if name.startswith("0")}:
        assert (one / name).read_bytes() == (other / name).read_bytes(), name
    tables = [(folder / "m-history.csv").read_text() for folder in (one, other)]
    one_rows, other_rows = (re.sub(r",[^,]*$", "", table, flags=re.M) for table in tables)
    assert one_rows == other_rows


def resume(folder, command, *more):
    """Go on with a run in this process, over the tiny network. Returns what it printed."""
    model.import_keras().utils.clear_session()  # layers get the names of a fresh process
    with tiny_network.installed():
        done = train_here(folder, *command, "--resume", *more)
    assert done.returncode == 0, done.stderr
    return done


@pytest.mark.long
def test_a_killed_run_from_scratch_goes_on_to_the_same_bits(tmp_path):
    data = draw_classes(tmp_path / "data", {"a": 10, "b": 10, "c": 10})
    command = [ROOT / "train.py", tmp_path / "whole", data, "m", *TINY, "--weights", "none"]
    command += ["--rounds", "2"]
    (tmp_path / "whole").mkdir()
    assert run_process(*command).returncode == 0
    command[1] = tmp_path / "killed"
    command[1].mkdir()
    process = start(*command)
    wait_for(process, "round 1:")
    process.kill()
    process.communicate()
    done = run_process(*command, "--resume")
    assert done.returncode == 0, done.stderr
    check_same_result(tmp_path / "whole", tmp_path / "killed")


def test_nothing_to_resume_is_said(whole_run):
    folder, output, _ = whole_run
    assert output.startswith("nothing to resume")
    assert not list(folder.glob("m-resume*")) and not list(folder.glob("*.lock"))


@pytest.fixture(scope="module")
def stopped(command, tmp_path_factory):
    """Stop a run by Ctrl-C in its second round. Returns its folder, which holds its data too."""
    folder = tmp_path_factory.mktemp("interrupted")
    shutil.copytree(command[0], folder / "data")
    process = start(NETWORK, folder, "train.py", "data", *command[1:])
    wait_for(process, "round 1:")
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "--resume" in errors and "Traceback" not in errors
    return folder


@pytest.fixture
def copy(stopped, tmp_path):
    """Return a copy of the interrupted run's folder, where train_here runs."""
    return shutil.copytree(stopped, tmp_path, dirs_exist_ok=True)


def test_a_run_stopped_by_ctrl_c_goes_on_to_the_same_bits(command, whole_run, copy, tiny):
    assert model.load_model(copy / "m")[1]["labels"] == ["a", "b", "c"]
    output = resume(copy, ["data", *command[1:]]).stdout
    assert not re.search("^(nothing|round 0)", output, re.M)
    check_same_result(whole_run[0], copy)


def test_two_runs_do_not_work_at_one_model(copy, command):
    with utils.file_lock(copy / "m.lock"):
        done = train_here(copy, "data", *command[1:], "--resume")
    assert "another run is at work" in error_line(done)


def change_data(folder):
    Image.new("RGB", (80, 80), "teal").save(folder / "data" / "a" / "new.png")


def change_views(folder):
    features.HEAVY = features.HEAVY._replace(shift=0.3)  # as in an edited script


def change_levels(folder):
    levels = model.BASE.levels | {"learned": {"mixed2": 3, "mixed3": 1}}
    model.BASE = model.BASE._replace(levels=levels)


@pytest.mark.parametrize(
    ("change", "options", "reason"),
    [
        (change_data, "", "data has changed.*new.png"),
        (change_views, "", "other views"),
        (change_levels, "", "other network"),
        (None, "--image-size 80", "other image size"),
        (None, "--seed 2", "other seed"),
        (None, "--rounds 5", "other rounds"),
        (None, "--weights none", "other --weights .*SHA-256"),
    ],
)
def test_another_run_is_not_gone_on_with(copy, command, tiny, monkeypatch, change, options, reason):
    monkeypatch.setattr(features, "HEAVY", features.HEAVY)
    monkeypatch.setattr(model, "BASE", model.BASE)
    if change:
        change(copy)
    before = numbers(copy / "m")
    done = train_here(copy, "data", *command[1:], "--resume", *options.split())
    assert re.search(f"^error: --resume: .*{reason}", error_line(done)), done.stderr
    assert numbers(copy / "m") == before


@pytest.mark.parametrize("kind", ["cut", "text", "bit", "pickle", "shape"])
def test_a_damaged_state_is_one_line(copy, command, tiny, kind):
    path = copy / "m-resume.npz"
    with np.load(path) as file:
        arrays = dict(file)
    data = bytearray(path.read_bytes())
    data[data.index(arrays["v0"].tobytes())] ^= 1
    others = {"shape": np.zeros(9), "pickle": np.array([{"x": 1}], dtype=object)}
    if kind in others:
        np.savez(path, **arrays | {"v0": others[kind]})
    else:
        path.write_bytes({"cut": data[: len(data) // 2], "text": b"[1, 2", "bit": data}[kind])
    line = error_line(train_here(copy, "data", *command[1:], "--resume"))
    assert re.search(r"m-resume\.npz: damaged.*train without --resume", line)


@pytest.mark.parametrize("names", [("m.h5", "m.json", "m-labels.json"), ("m.json",)])
def test_a_model_that_was_moved_away_is_saved_again(copy, command, tiny, names):
    """The numbers of the last whole round are there, so that round is the best one known."""
    for name in names:
        (copy / name).unlink()
    done = train_here(copy, "data", *command[1:], "--resume")
    assert done.returncode == 0, done.stderr
    assert "warning: m.h5: the best round is gone" in done.stderr
    counts = dict(re.findall(r"^(round \d|best): .*\((\d+)/6\)", done.stdout, re.M))
    assert counts.pop("best") == max(counts.values()) and "round 3" in counts
    model.load_model(copy / "m")


def test_a_model_that_knows_all_pictures_is_not_scored_on_them(
    tmp_path, command, tiny, monkeypatch
):
    """The run was killed when it had saved that model, and goes on. The pictures are noise."""
    rng = np.random.default_rng(0)
    for path in (tmp_path / "data" / name / f"{n}.png" for name in "ab" for n in range(15)):
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (80, 80, 3), "uint8")).save(path)
    fit_all = train.fit_all

    def fit_and_keep_state(*arguments):
        fit_all(*arguments)
        shutil.copy(tmp_path / "m-resume.npz", tmp_path / "kept.npz")

    monkeypatch.setattr(train, "fit_all", fit_and_keep_state)
    words = ["data", *command[1:], "--rounds", 0, "--fit-all"]
    whole = train_here(tmp_path, *words)
    (tmp_path / "kept.npz").rename(tmp_path / "m-resume.npz")
    again = train_here(tmp_path, *words, "--resume")
    best = [re.search("^best: .*", done.stdout, re.M)[0] for done in (whole, again)]
    assert best[0] == best[1] and "fit-all: " in again.stdout
    assert again.returncode == 0 and model.read_info(tmp_path / "m")["fit_all"]


@pytest.mark.parametrize("name", ["m-report.png", "m-labels.json", "m-resume.npz"])
def test_a_users_own_files_are_not_replaced(tmp_path, command, tiny, name):
    (tmp_path / name).write_text("mine")
    line = error_line(train_here(tmp_path, *command))
    assert f"{name}: not of such a model: move it away" in line
    assert (tmp_path / name).read_text() == "mine"


def test_only_our_own_unfinished_files_are_removed(tmp_path, command, tiny):
    ours = ".m-unfinished-1.h5 .m-report-unfinished-x.png .m-resume-unfinished-x.npz".split()
    others = [".m-report-unfinished-1.h5", ".n-unfinished-1.h5", ".m-unfinished-1.jpg"]
    for name in [*others, *ours]:
        (tmp_path / name).touch()
    train_here(tmp_path, *command, "--cache-gb", "0.000001")  # ends before the first round
    assert {p.name for p in tmp_path.iterdir() if p.name.startswith(".")} == set(others)


@pytest.fixture(scope="module")
def old_model(tmp_path_factory):
    """Save an untrained model of other classes, but the same number of them. Returns its folder."""
    model.import_keras().utils.clear_session()  # layers have the names that train.py gives them
    folder = tmp_path_factory.mktemp("old")
    info = {"labels": ["x", "y", "z"], "image_size": 75, "threshold": 0.5, "round": 0}
    with tiny_network.installed():
        model.save_model(model.build_network(3, 75), info, folder / "m")
    return folder


@pytest.mark.parametrize("count", [1, pytest.param(30, marks=pytest.mark.long)])
def test_a_kill_at_a_random_moment(command, whole_run, old_model, tmp_path, tiny, count):
    undisturbed, _, longest = whole_run
    rng = random.Random(os.getpid())
    for n in range(count):
        folder = shutil.copytree(old_model, tmp_path / str(n))
        process = start(NETWORK, folder, "train.py", *command)
        wait_for(process, "images:")
        time.sleep(rng.uniform(0, longest))
        process.kill()
        process.communicate()
        try:
            labels = model.load_model(folder / "m")[1]["labels"]
            assert labels == numbers(folder / "m")[1]
            assert labels in (["x", "y", "z"], ["a", "b", "c"])
        except utils.UserError as error:
            assert "does not belong" in str(error) or "not the class names" in str(error)
        resume(folder, command)
        check_same_result(undisturbed, folder)


@pytest.mark.parametrize("number", range(4))
def test_dying_at_the_nth_rename_of_a_save_leaves_the_old_or_the_new_model(
    old_model, tmp_path, tiny, monkeypatch, number
):
    model.import_keras().utils.clear_session()  # layers have the names that they have there
    folder, network = shutil.copytree(old_model, tmp_path / "m"), model.build_network(3, 75)
    network.set_weights([np.full(w.shape, 2, "float32") for w in network.get_weights()])
    rename, left = os.replace, ["rename"] * number

    def replace(*paths):
        if not left:
            raise KeyboardInterrupt
        left.pop()
        rename(*paths)

    monkeypatch.setattr(os, "replace", replace)
    info = {"labels": ["a", "b", "c"], "image_size": 75, "threshold": 0.5, "round": 1}
    with contextlib.suppress(KeyboardInterrupt):
        model.save_model(network, info, folder / "m")
    if number == 2:  # new labels, old numbers
        with pytest.raises(utils.UserError, match="copy all three files"):
            model.load_model(folder / "m")
    else:
        loaded, info = model.load_model(folder / "m")
        assert info["labels"] == list("abc" if number == 3 else "xyz")
        assert all((w == 2).all() for w in loaded.get_weights()) == (number == 3)


@pytest.mark.parametrize("size", [10_000, 200_000], ids=["while reading", "while saving"])
def test_a_full_disk_is_one_line_and_the_last_model_stays(old_model, tmp_path, size):
    folder = shutil.copytree(old_model, tmp_path / "models")
    data = draw_classes(tmp_path / "data", {"a": 3, "b": 3})  # 100 kB of pixels
    words = ["train.py", data, "m", *TINY, "--weights", "none", "--rounds", "0"]
    done = limited(folder, [limit("RLIMIT_FSIZE", size)], "tests/tiny_network.py", *words)
    expected = f"error: {folder}: File too large" if size == 10_000 else "m.h5"
    assert expected in error_line(done)
    assert numbers(folder / "m") == numbers(old_model / "m")
    assert {path.name for path in folder.iterdir()} <= {"m.h5", "m.json", "m-labels.json"}


@pytest.mark.parametrize("error", [RuntimeError("cancelled"), KeyboardInterrupt()])
def test_a_stop_says_how_to_go_on_whatever_the_library_makes_of_it(
    tmp_path, monkeypatch, capsys, error
):
    data = draw_classes(tmp_path / "data", {"a": 3, "b": 3})
    args = train.parse_arguments([str(data), str(tmp_path / "m")])

    def train_until_stopped(_):
        utils.interrupted.set()
        raise error

    monkeypatch.setattr(train, "train", train_until_stopped)
    with pytest.raises(SystemExit) as end:
        utils.run(lambda: train.train_alone(args))
    assert end.value.code == 130
    assert capsys.readouterr().err.splitlines() == ["no whole round is saved yet", "stopped"]
