"""train.py for real: short runs on small pictures, the files they leave, and what plain Keras makes of them."""

import argparse
import csv
import json
import re
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
from conftest import ROOT, TINY, draw_classes, run_process
from PIL import Image

import model
import report
import train
import utils

PLAIN_KERAS = """
import json, os, sys
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
import keras, numpy as np
pixels, actual = np.load("pixels.npy"), np.load("actual.npy")
one = keras.models.load_model("model.h5", compile=False)
two = keras.models.model_from_json(open("model.json").read())
two.load_weights("model.h5")
print(json.dumps([int((m.predict(pixels, verbose=0).argmax(1) == actual).sum()) for m in (one, two)]))
"""


def accuracy_counts(output, start):
    """Return [(right, total)] of the lines that begin with `start`."""
    return [tuple(map(int, m)) for m in re.findall(rf"^{start}.*\((\d+)/(\d+)\)", output, re.M)]


def test_the_lines_that_programs_read(scratch_run):
    _, done = scratch_run
    lines = done.stdout.splitlines()
    assert lines[0] == "images: 33 train, 9 validation, 3 classes, 0 skipped"
    number = r"\d+\.\d+"
    assert any(
        re.fullmatch(r"round 0: validation accuracy \d\.\d{4} \(\d+/9\)", line) for line in lines
    )
    epoch = rf"round 1 epoch 1: loss {number}, accuracy {number}, val_loss {number}, val_accuracy {number}, \d+ s"
    assert any(re.fullmatch(epoch, line) for line in lines)
    best = r"best: round \d, validation accuracy (\d\.\d{4}) \(\d/9\), 95% interval \d\.\d{4} to \d\.\d{4}"
    assert re.fullmatch(best, lines[-1])
    assert "oneDNN" not in done.stderr and "WARNING" not in done.stderr


def test_the_best_line_is_the_best_round(scratch_run):
    rounds, best = (accuracy_counts(scratch_run[1].stdout, start) for start in ("round", "best"))
    assert len(rounds) == 3 and max(rounds) == best[0]


def test_the_files(scratch_run):
    folder, _ = scratch_run
    names = {path.name for path in folder.iterdir()}
    assert names == {"data", "000.png", "001.png", "002.png", "model.h5", "model.json", "model-labels.json",
                     "model-history.csv", "model-report.png", "model-mistakes.csv"}  # fmt: skip
    assert json.loads((folder / "model-labels.json").read_text()) == ["grün", "red", "unknown"]
    for name in ("000.png", "002.png"):
        with Image.open(folder / name) as image:
            assert image.info["Software"] == f"{utils.KIT}: model" and max(image.size) <= 4096
    with open(folder / "model-history.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [(row["round"], row["epoch"]) for row in rows] == [
        ("0", "1"),
        ("0", "2"),
        ("1", "1"),
        ("2", "1"),
    ]
    assert [bool(row["plain_accuracy"]) for row in rows] == [False, True, True, True]
    with h5py.File(folder / "model.h5") as file:
        info = json.loads(file.attrs[model.METADATA_ATTRIBUTE])
    assert (
        info["labels"] == ["grün", "red", "unknown"]
        and info["image_size"] == 75
        and info["seed"] == 1337
    )
    assert 0 <= info["threshold"] <= 1 and info["weights"] == "none" and len(info["interval"]) == 2


def test_plain_keras_reproduces_the_accuracy_both_ways(scratch_run):
    folder, done = scratch_run
    args = argparse.Namespace(
        cache_dir=None,
        data_dir=folder / "data", model=str(folder / "model"), dry_run=False, group_by_folder=False,
        validation_split=0.2, seed=1337, class_weight=False, process=0, processes=1)  # fmt: skip
    data = train.read_data(args, 75)
    np.save(folder / "pixels.npy", data.store.rows[[data.pictures[i].row for i in data.validation]])
    np.save(folder / "actual.npy", data.targets[data.validation])
    plain = run_process("-c", folder, PLAIN_KERAS)
    (folder / "pixels.npy").unlink(), (folder / "actual.npy").unlink()
    assert plain.returncode == 0, plain.stderr
    right = accuracy_counts(done.stdout, "best")[0][0]
    assert json.loads(plain.stdout) == [right, right]


def test_evaluate_scores_every_picture_and_touches_nothing_else(scratch_run):
    folder, _ = scratch_run
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    done = run_process(
        ROOT / "train.py", folder, "data", "model", "--evaluate", "--min-accuracy", "0.999999"
    )
    right, total = accuracy_counts(done.stdout, "evaluate")[0]
    assert total == 42 and done.returncode == (0 if right == 42 else 3)
    new = {path for path in folder.rglob("*") if path not in before}
    assert {path.name for path in new} == {
        "evaluate.png",
        "model-evaluate.csv",
        "model-evaluate-report.png",
    }
    assert all(
        path.stat().st_mtime_ns == time for path, time in before.items() if not path.is_dir()
    )
    with open(folder / "model-evaluate.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 42 and sum(row["actual"] == row["predicted"] for row in rows) == right
    assert all(re.fullmatch(r"[01]\.\d{6}", row["probability"]) for row in rows)
    assert rows[0]["file"] == "grün/000.png"
    for path in new:
        path.unlink()


@pytest.mark.slow
def test_classes_that_the_model_does_not_know(scratch_run, tmp_path):
    folder, _ = scratch_run
    data = draw_classes(tmp_path / "other", {"red": 3, "stranger": 3})
    done = run_process(ROOT / "train.py", tmp_path, data, folder / "model", "--evaluate")
    assert (
        done.returncode == 0 and "(" in done.stdout
    )  # they count as `unknown`, a class of this model
    with open(folder / "model-evaluate.csv", encoding="utf-8") as file:
        assert {row["actual"] for row in csv.DictReader(file)} == {"red", "unknown"}
    (folder / "model-evaluate.csv").unlink(), (folder / "model-evaluate-report.png").unlink()


def test_a_strangers_picture_of_the_name_is_not_overwritten(run_script, make_classes, tmp_path):
    Image.new("RGB", (10, 10)).save(tmp_path / "001.png")
    done = run_script("train.py", make_classes(a=6, b=6), "model", *TINY)
    assert done.returncode == 1 and done.stderr.splitlines()[-1].startswith(
        "error: 001.png: not a picture of this"
    )
    assert list(tmp_path.glob("model*")) == []


def arguments(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, words)])


def run_here(monkeypatch, folder, *words):
    """Run train.py's main in this process, which has Keras loaded already."""
    monkeypatch.chdir(folder)
    arguments(monkeypatch, *words)
    return train.main()


PRETRAINED = (
    "--image-size 75 --head-epochs 2 --rounds 1 --round-epochs 1 --views 1 --batch-size 16".split()
)


@pytest.fixture
def small(tmp_path):
    return draw_classes(tmp_path / "data", {"a": 10, "b": 10})


@pytest.mark.slow
def test_fine_tuning_changes_the_top_blocks_only_and_no_moving_average(
    monkeypatch, tmp_path, small, weights_file
):
    run_here(monkeypatch, tmp_path, small, "m", *PRETRAINED, "--weights", weights_file, "--float32")
    network, info = model.load_model(tmp_path / "m")
    fresh = model.build_network(2, 75)
    train.load_base(fresh, weights_file)
    below = True
    changed = {True: 0, False: 0}
    for old, new in zip(fresh.layers, network.layers):
        same = all(np.array_equal(x, y) for x, y in zip(old.get_weights(), new.get_weights()))
        changed[below] += not same
        if "moving" in str([w.path for w in new.weights]):
            assert same, "batch normalisation is frozen whole"
        below = below and new.name != "mixed8"
    assert changed[True] == 0
    assert changed[False] > 5 or info["round"] == 0
    assert info["number_format"] == "float32" and weights_file.name in info["weights"]
    ours = [
        f"m{end}"
        for end in (".h5", ".json", "-history.csv", "-labels.json", "-mistakes.csv", "-report.png")
    ]
    left = sorted(
        path.name for path in tmp_path.iterdir()
    )  # without --cache-dir nothing of the cache
    assert left == sorted(["000.png", "001.png", "data", *ours])


LONGER = [pytest.param(n, marks=pytest.mark.long) for n in (0, 3)]


@pytest.mark.slow
@pytest.mark.parametrize("unfreeze", [2, *LONGER])
def test_what_was_scored_is_what_the_saved_network_answers(
    monkeypatch, tmp_path, small, weights_file, unfreeze
):
    seen, choose = [], train.choose_last_layer

    def noted(run, fits):
        seen.append((run, choose(run, fits)))
        return seen[-1][1]

    monkeypatch.setattr(train, "choose_last_layer", noted)
    run_here(
        monkeypatch,
        tmp_path,
        small,
        "m",
        *PRETRAINED,
        "--weights",
        weights_file,
        "--unfreeze",
        unfreeze,
    )
    network, info = model.load_model(tmp_path / "m")
    run, (_, plain, _) = seen[info["round"]]
    pixels = run.data.store.rows[[run.data.pictures[i].row for i in run.data.validation]]
    saved = model.predict(network, pixels, 16)
    assert (
        np.allclose(saved, train.soften(plain, info["temperature"]), atol=1e-3)
        and saved.std() > 0.01
    )


def test_folding_the_normalisation_changes_nothing():
    keras, rng = model.import_keras(), np.random.default_rng(0)
    network = model.build_network(2, 75)
    parts = train.cut_network(network, argparse.Namespace(unfreeze=2), False)
    for layer in parts.trunk.layers:
        if isinstance(layer, keras.layers.BatchNormalization):
            beta, mean, variance = (
                rng.uniform(*ends, layer.beta.shape) for ends in ((0, 1), (-1, 1), (0.5, 2))
            )
            layer.set_weights([beta, mean, variance])
    folded = train.fold_trunk(parts).trunk
    assert not any(isinstance(layer, keras.layers.BatchNormalization) for layer in folded.layers)
    pixels = rng.integers(0, 255, (4, 75, 75, 3)).astype("uint8")
    one, two = (model.predict(model.compiled(m), pixels, 4) for m in (parts.trunk, folded))
    assert one.std() > 0.1 and np.allclose(one, two, atol=1e-4 * np.abs(one).max())


@pytest.mark.long
def test_a_whole_network_can_be_fine_tuned(monkeypatch, tmp_path, small, weights_file, capsys):
    run_here(
        monkeypatch, tmp_path, small, "m", *PRETRAINED, "--weights", weights_file, "--unfreeze", 10
    )
    assert len(accuracy_counts(capsys.readouterr().out, "round")) == 2


@pytest.mark.slow
def test_two_runs_begun_in_one_folder_do_not_take_each_others_pictures(
    monkeypatch, tmp_path, small, weights_file
):
    draw = report.draw_confusion_matrix

    def draw_and_be_late(path, prefix, *rest):
        draw(path, prefix, *rest)
        Path("001.png").write_bytes(Path("000.png").read_bytes().replace(b": m", b": x"))

    monkeypatch.setattr(report, "draw_confusion_matrix", draw_and_be_late)
    with pytest.raises(utils.UserError, match="001\\.png: not a picture of this model"):
        run_here(monkeypatch, tmp_path, small, "m", *PRETRAINED, "--weights", weights_file)


@pytest.mark.slow
def test_a_kept_cache_saves_the_frozen_pass(monkeypatch, tmp_path, small, weights_file):
    command = [small, "m", *PRETRAINED, "--rounds", "0", "--weights", weights_file, "--float32"]
    command += ["--cache-dir", tmp_path / "kept"]
    fills = []
    original = train.fill_ring
    monkeypatch.setattr(train, "write_rows", count_rows(fills, train.write_rows))
    run_here(monkeypatch, tmp_path, *command)
    first = sum(n for shape, n in fills if shape == (1, 1, 1280))
    fills.clear()
    Image.new("RGB", (80, 80), "navy").save(small / "a" / "new.png")
    run_here(monkeypatch, tmp_path, *command)
    again = sum(n for shape, n in fills if shape == (1, 1, 1280))
    assert first == 16 * 2 + 4 * 2 and again <= 6, again  # as they are, and a view; two to score
    assert train.fill_ring is original and (tmp_path / "kept").stat().st_mode & 0o777 == 0o700


def count_rows(log, write):
    """Return write_rows that notes the shape and number of the rows."""

    def counting(store, indices, values):
        log.append((store.rows.shape[1:], len(indices)))
        write(store, indices, values)

    return counting


@pytest.mark.slow
def test_with_a_device_that_changes_the_pictures_the_same_is_learned(
    monkeypatch, tmp_path, small, weights_file, capsys
):
    command = [small, "m", *PRETRAINED, "--rounds", "1", "--weights", weights_file]
    found = []
    for there in (False, True):
        monkeypatch.setattr(train, "on_device", lambda there=there: there)
        monkeypatch.setattr(train, "DEVICE_BATCH", 16)
        assert run_here(monkeypatch, tmp_path, *command) == 0
        found.append(accuracy_counts(capsys.readouterr().out, "round"))
    assert found[0] == found[1] and len(found[0]) == 2


@pytest.mark.slow
def test_features_too_large_for_the_cache_are_told(monkeypatch, tmp_path, small, weights_file):
    large = tmp_path / "large.h5"
    large.write_bytes(weights_file.read_bytes())
    with h5py.File(large, "a") as file:
        betas = []
        file.visititems(
            lambda name, item: (
                betas.append(item) if "beta" in name and hasattr(item, "shape") else None
            )
        )
        for beta in betas:
            beta[...] = 1e6
    with pytest.raises(utils.UserError, match="too large for 16-bit numbers: use --float32"):
        run_here(monkeypatch, tmp_path, small, "m", *PRETRAINED, "--weights", large)


@pytest.mark.slow
def test_a_cache_that_is_too_small_is_one_line(monkeypatch, tmp_path, small, weights_file):
    with pytest.raises(
        utils.UserError, match=r"--cache-gb 1e-06.*needs at least .* GB.*--cache-dir"
    ):
        run_here(
            monkeypatch,
            tmp_path,
            small,
            "m",
            *PRETRAINED,
            "--weights",
            weights_file,
            "--cache-gb",
            "0.000001",
        )


@pytest.mark.slow
def test_more_pictures_than_the_ring_holds(monkeypatch, tmp_path, weights_file, capsys):
    data = draw_classes(tmp_path / "many", {"a": 60, "b": 60})
    row, fixed = 1280 * 2 + 2048 * 4, 120 * 75 * 75 * 3 + 24 * (1280 * 6 + 2048 * 4)
    room = (fixed + 70 * row) / 1e9  # 70 slots for 96 pictures
    command = [
        data,
        "m",
        *PRETRAINED,
        "--rounds",
        "2",
        "--weights",
        weights_file,
        "--cache-gb",
        room,
    ]
    assert run_here(monkeypatch, tmp_path, *command) == 0
    told = capsys.readouterr()
    assert len(accuracy_counts(told.out, "round")) == 3
    assert "the last layer is fitted on 35 of 96 pictures" in told.err


@pytest.fixture(scope="module")
def loaded(weights_file):
    """Return the weights that the file of the fixture gives, those of the top left out."""
    network = model.build_network(2, 75)
    train.load_base(network, weights_file)
    return network.get_weights()[:-4]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["legacy float16", "weights.h5 float32", "weights.h5 float16"])
def test_weights_of_every_layout(tmp_path, weights_file, loaded, kind):
    import keras

    path = weights_file
    if kind.startswith("weights"):
        network = keras.applications.InceptionV3(
            weights=weights_file, include_top=False, input_shape=(75, 75, 3)
        )
        path = tmp_path / "x.weights.h5"
        network.save_weights(path)
    if kind.endswith("16"):
        path = halved(path, tmp_path)
    network = model.build_network(2, 75)
    train.load_base(network, path)
    for one, other in zip(network.get_weights()[:-4], loaded, strict=True):
        assert np.allclose(one, other, atol=1e-3)


def halved(path, folder):
    """Copy an HDF5 file with its arrays in float16, compressed."""
    new = folder / f"half-{path.name}"
    with h5py.File(path) as old, h5py.File(new, "w") as file:
        for key, value in old.attrs.items():
            file.attrs[key] = value

        def copy(name, item):
            if isinstance(item, h5py.Dataset):
                file.create_dataset(
                    name, data=item[()].astype("float16"), compression="gzip" if item.size else None
                )
            else:
                file.require_group(name)
            for key, value in item.attrs.items():
                file[name].attrs[key] = value

        old.visititems(copy)
    return new


@pytest.mark.parametrize(
    ("make", "message"),
    [(None, "no such file"), (lambda p: p.write_bytes(b"x" * 100), "not HDF5"),
     (lambda p: h5py.File(p, "w").create_dataset("a", data=np.zeros(3, "float32")) and None, "another network")],
)  # fmt: skip
def test_wrong_weights_files_are_one_line(monkeypatch, tmp_path, small, make, message):
    path = tmp_path / "wrong.h5"
    if make:
        make(path)
    with pytest.raises(utils.UserError, match=message):
        run_here(monkeypatch, tmp_path, small, "m", *PRETRAINED, "--weights", path)


def test_without_a_connection_auto_says_what_is_lost_and_goes_on(scratch_run):
    errors = scratch_run[1].stderr.splitlines()
    lines = [line for line in errors if "ImageNet" in line or "from scratch" in line]
    assert len(lines) >= 4 and all(line.startswith("warning: ") for line in lines)


@pytest.mark.slow
def test_class_weights_and_light_views(monkeypatch, tmp_path, weights_file, capsys):
    data = draw_classes(tmp_path / "data", {"a": 6, "b": 18})
    base = [data, "m", *PRETRAINED, "--weights", weights_file, "--float32", "--unfreeze", 0]
    losses = []
    for options in ([], ["--class-weight"], ["--no-heavy-augmentation"]):
        run_here(monkeypatch, tmp_path, *base, *options)
        assert (
            len(accuracy_counts(capsys.readouterr().out, "round")) == 1
        )  # --unfreeze 0: the dense layers only
        with open(tmp_path / "m-history.csv", encoding="utf-8") as file:
            losses.append([row["loss"] for row in csv.DictReader(file)])
    assert losses[0] not in losses[1:]


def test_a_batch_on_a_device_is_smaller_for_large_pictures(monkeypatch):
    assert train.pass_batch(224) == train.PASS_BATCH
    monkeypatch.setattr(train, "on_device", lambda: True)
    assert [train.pass_batch(side) for side in (75, 224, 299, 1024)] == [256, 256, 128, 16]


def test_the_trial_of_number_formats_survives_a_machine_without_them(monkeypatch):
    args = type("Args", (), {"float32": False})
    assert train.fastest_format(args) in ("float32", "mixed_bfloat16")
    monkeypatch.setattr(model, "compiled", lambda network: 1 / 0)
    assert train.fastest_format(args) == "float32"
    assert train.fastest_format(type("Args", (), {"float32": True})) == "float32"
