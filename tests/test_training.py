"""train.py for real: short runs on small pictures, the files they leave, and what plain Keras makes of them."""

import csv
import json
import re
from types import SimpleNamespace

import h5py
import numpy as np
import pytest
from conftest import FAST, ROOT, TINY, draw_classes, run_process
from PIL import Image

import model
import train
import utils


def accuracy_counts(output, start):
    """Return [(right, total)] of the lines that begin with `start`."""
    return [tuple(map(int, m)) for m in re.findall(rf"^{start}.*\((\d+)/(\d+)\)", output, re.M)]


def test_the_lines_that_programs_read(scratch_run):
    _, done = scratch_run
    lines = done.stdout.splitlines()
    assert lines[0] == "images: 34 train, 9 validation, 3 classes, 0 skipped"
    number = r"\d+\.\d+"
    assert any(
        re.fullmatch(r"round 0: validation accuracy \d\.\d{4} \(\d+/9\)", line) for line in lines
    )
    figures = rf"loss {number}, accuracy {number}, val_loss {number}, val_accuracy {number}, \d+ s"
    epoch = rf"round 0 epoch 1: {figures}"
    assert any(re.fullmatch(epoch, line) for line in lines)
    best = r"best: round \d, validation accuracy (\d\.\d{4}) \(\d/9\), 95% interval \d\.\d{4} to \d\.\d{4}"
    assert re.fullmatch(best, lines[-2])
    shares = (
        r"strangers: threshold 0\.\d{3}: \d\.\d\d of friends correct, \d\.\d\d of strangers unknown"
    )
    assert re.fullmatch(shares, lines[-1])
    assert "oneDNN" not in done.stderr and "WARNING" not in done.stderr


def test_the_best_line_is_the_best_round(scratch_run):
    rounds, best = (accuracy_counts(scratch_run[1].stdout, start) for start in ("round", "best"))
    assert len(rounds) == 1 and max(rounds) == best[0]


def test_the_files(scratch_run):
    folder, _ = scratch_run
    names = {path.name for path in folder.iterdir()}
    assert names == {"data", "000.png", "model.h5", "model.json", "model-labels.json",
                     "model-history.csv", "model-report.png", "model-mistakes.csv",
                     "model-review.csv", "model-review.png"}  # fmt: skip
    assert json.loads((folder / "model-labels.json").read_text()) == ["grün", "red", "unknown"]
    with Image.open(folder / "000.png") as image:
        assert image.info["Software"] == f"{utils.KIT}: model" and max(image.size) <= 4096
    with open(folder / "model-history.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    epochs = [(row["round"], row["epoch"], bool(row["plain_accuracy"])) for row in rows]
    assert epochs == [("0", "1", False), ("0", "2", True)]
    with h5py.File(folder / "model.h5") as file:
        info = json.loads(file.attrs[model.METADATA_ATTRIBUTE])
    assert (
        info["labels"] == ["grün", "red", "unknown"]
        and info["image_size"] == 75
        and info["seed"] == 1337
    )
    assert 0 <= info["threshold"] <= 1 and info["weights"] == "none" and len(info["interval"]) == 2
    assert info["strangers"].keys() == {"friends", "unknown"}


def test_a_wrong_label_is_found(scratch_run):
    folder, done = scratch_run
    with open(folder / "model-review.csv", encoding="utf-8") as file:
        rows = {row["file"]: row for row in csv.DictReader(file)}
    row = rows["red/wrong.png"]
    assert (row["label"], row["suggested"], row["why"]) == ("red", "grün", "label")
    assert re.search(r"\d+ labels? deserves? a look: model-review.png", done.stderr)


def test_plain_keras_reproduces_the_accuracy_both_ways(scratch_run):
    import keras

    folder, done = scratch_run
    words = [str(folder / "data"), str(folder / "model")]
    data = train.read_data(train.parse_arguments(words), 75)
    pixels = data.pixels.rows[[data.pictures[i].row for i in data.validation]]
    whole = keras.models.load_model(folder / "model.h5", compile=False)
    parts = keras.models.model_from_json((folder / "model.json").read_text())
    parts.load_weights(folder / "model.h5")
    for network in (whole, parts):
        right = network.predict(pixels, verbose=0).argmax(1) == data.targets[data.validation]
        assert accuracy_counts(done.stdout, "best") == [(right.sum(), 9)]


def test_evaluate_scores_every_picture_and_touches_nothing_else(scratch_run):
    folder, _ = scratch_run
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    done = run_process(
        ROOT / "train.py", folder, "data", "model", "--evaluate", "--min-accuracy", "0.999999"
    )
    right, total = accuracy_counts(done.stdout, "evaluate")[0]
    assert total == 43 and done.returncode == (0 if right == 43 else 3)
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
    assert len(rows) == 43 and sum(row["actual"] == row["predicted"] for row in rows) == right
    assert all(re.fullmatch(r"[01]\.\d{6}", row["probability"]) for row in rows)
    assert rows[0]["file"] == "grün/000.png"
    for path in new:
        path.unlink()


@pytest.mark.slow
def test_classes_that_the_model_does_not_know(scratch_run, tmp_path):
    folder, _ = scratch_run
    data = draw_classes(tmp_path / "other", {"red": 3, "stranger": 3})
    done = run_process(ROOT / "train.py", tmp_path, data, folder / "model", "--evaluate")
    assert done.returncode == 0 and "images: 6 to evaluate, 3 classes" in done.stdout
    assert "other/stranger: no class of the model: counts as unknown" in done.stderr
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


def run_here(folder, *words):
    """Run train.py's main in this process, which has Keras loaded already. Returns what it noted.

    That is the Run, what was trained and the weights before, every Candidate, what was saved as (kernel, info), and how many pictures went
    through the frozen part.
    """
    seen = SimpleNamespace(run=None, frozen=[], trained=None, candidates=[], saved=[], computed=0)

    def keep_trained(arguments, trained):
        base = arguments[0].networks.base
        seen.trained, seen.frozen = trained, [layer.get_weights() for layer in base.layers]

    def noting(name, note):
        original = getattr(train, name)

        def noted(*arguments):
            result = original(*arguments)
            return note(arguments, result) or result

        patch.setattr(train, name, noted)

    def keep(_, candidates):
        seen.candidates = list(candidates)
        return seen.candidates

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr("sys.argv", ["train.py", *map(str, words)])
        noting("run_rounds", lambda args, _: setattr(seen, "run", args[0]))
        noting("build_trained", keep_trained)
        noting("trained_candidates", keep)
        noting("save_network", lambda args, _: seen.saved.append((args[2].copy(), args[4])))
        noting(
            "compute_features",
            lambda args, _: setattr(seen, "computed", seen.computed + len(args[1])),
        )
        assert train.main() == 0
    return seen


@pytest.fixture
def small(tmp_path):
    return draw_classes(tmp_path / "data", {"a": 10, "b": 10})


@pytest.fixture(scope="module")
def tuned(tmp_path_factory, weights_file):
    """Fine-tune once, with a kept cache. Returns (folder, command, what was noted)."""
    folder = tmp_path_factory.mktemp("tuned")
    draw_classes(folder / "data", {"a": 10, "b": 10, "c": 10})
    command = ["data", "m", *TINY, "--weights", weights_file, "--float32", "--cache-dir", "kept"]
    return folder, command, run_here(folder, *command)


@pytest.mark.slow
def test_fine_tuning_changes_the_top_blocks_only_and_no_moving_average(tuned):
    _, _, seen = tuned
    below, changed = True, {True: 0, False: 0}
    for old, new in zip(seen.frozen, seen.trained.network.layers, strict=True):
        same = all(np.array_equal(x, y) for x, y in zip(old, new.get_weights()))
        changed[below] += not same and new.name != "probabilities"
        if "moving" in str([w.path for w in new.weights]):
            assert same, "batch normalisation is frozen whole"
        below = below and new.name != "mixed8"
    assert changed[True] == 0 and changed[False] > 5


@pytest.mark.slow
def test_what_is_scored_is_what_the_network_answers(tuned):
    folder, _, seen = tuned
    run = seen.run
    pixels = run.data.pixels.rows[[run.data.pictures[i].row for i in run.data.validation]]
    assert [c.trained_share for c in seen.candidates] == list(train.TRAINED_SHARES)
    for candidate in seen.candidates:
        network = candidate.network
        network.get_layer("probabilities").set_weights([candidate.kernel, candidate.bias])
        answers = model.predict(network, pixels, 16)
        assert answers == pytest.approx(candidate.probabilities, abs=2e-3)
        assert answers.std() > 0.01
    network, info = model.load_model(folder / "m")
    kernel = network.get_layer("probabilities").get_weights()[0]
    assert np.array_equal(kernel, seen.saved[-1][0].astype("float32"))
    assert info["weights"].startswith("random_notop.h5, SHA-256 ")


@pytest.mark.slow
def test_a_kept_cache_saves_the_frozen_pass(tuned, monkeypatch):
    folder, _, seen = tuned
    # pictures as they are, mirrored ones, and an augmented view of validation
    assert len(list((folder / "kept").iterdir())) == 3 and seen.computed == 30 + 24 + 6
    assert (folder / "kept").stat().st_mode & 0o777 == 0o700
    monkeypatch.chdir(folder)
    computed, compute = [], train.compute_features
    monkeypatch.setattr(train, "compute_features", lambda run, values, *more: [
        computed.append(len(values)), compute(run, values, *more)])  # fmt: skip

    def run_again(data):
        later = seen.run._replace(views={}, data=data)
        return [train.get_view(later, view).rows for view in (0, 1, train.VALIDATION_VIEW)]

    for rows, before in zip(run_again(seen.run.data), map(seen.run.views.get, (0, 1, 10**6))):
        assert np.array_equal(rows, before.rows)
    assert computed == []
    Image.new("RGB", (80, 80), "navy").save(folder / "data" / "a" / "new.png")
    run_again(train.read_data(seen.run.args, 75))
    assert 1 <= sum(computed) <= 4  # the new one, and what it has moved
    (folder / "data" / "a" / "new.png").unlink()


@pytest.mark.slow
def test_a_device_makes_the_views_that_the_cores_make(tuned):
    run = tuned[2].run
    networks = run.networks._replace(
        settings=run.networks.settings._replace(augment=train.build_augmentation(75))
    )
    few = run.data.train[:5]  # fewer than a batch
    for view, difference in ((train.UNAUGMENTED, 0), (7, 1)):
        one = train.make_views(run, few, view).astype(int)
        two = np.asarray(train.make_views(run._replace(networks=networks), few, view))
        assert two.shape == (5, 75, 75, 3) and np.abs(one - two).mean() <= difference


@pytest.mark.slow
def test_fit_all_changes_the_model_and_none_of_its_figures(tmp_path, small, weights_file, capsys):
    seen = run_here(tmp_path, small, "m", *FAST, "--weights", weights_file, "--fit-all")
    (before, told), (after, info) = seen.saved
    assert not np.allclose(before, after, atol=1e-3 * np.abs(before).max())
    assert info.pop("fit_all") is True and info.pop("sha256") is not told
    assert info == told
    network, _ = model.load_model(tmp_path / "m")
    saved = network.get_layer("probabilities").get_weights()[0]
    assert np.array_equal(saved, after.astype("float32"))
    output = capsys.readouterr().out
    assert output.splitlines()[-1].startswith("fit-all: the saved model's readout knows all")
    assert "\nbest: round 0" in output and "strangers:" not in output  # two classes


@pytest.mark.slow
def test_sixteen_bits_in_the_frozen_pass(monkeypatch, tmp_path, small, weights_file):
    monkeypatch.setattr(train, "fastest_format", lambda args: "mixed_bfloat16")
    words = [word for word in FAST if word != "--float32"]
    seen = run_here(tmp_path, small, "m", *words, "--weights", weights_file)
    network, info = model.load_model(tmp_path / "m")
    assert info["number_format"] == "mixed_bfloat16" and network.dtype == "float32"
    data, view = seen.run.data, train.get_view(seen.run, train.UNAUGMENTED)
    pixels = data.pixels.rows[[picture.row for picture in data.pictures]]
    exact = model.predict(seen.run.networks.exact, pixels, 16)
    rounded = view.rows["levels"][view.row_of]
    distance = np.abs(exact - rounded).max(1)
    assert distance[data.validation].max() < 1e-4 < distance[data.train].min()


@pytest.mark.long
def test_a_whole_network_can_be_fine_tuned(tmp_path, small, weights_file, capsys):
    run_here(tmp_path, small, "m", *TINY, "--weights", weights_file, "--unfreeze", 10)
    assert len(accuracy_counts(capsys.readouterr().out, "round")) == 2


@pytest.mark.slow
def test_features_too_large_for_the_cache_are_told(tmp_path, small, weights_file):
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
    with pytest.raises(utils.UserError, match="too large for 16 bits: use --float32"):
        run_here(tmp_path, small, "m", *TINY, "--weights", large)


@pytest.mark.slow
def test_a_cache_that_is_too_small_is_told_before_the_work(tmp_path, small, weights_file, capsys):
    words = [small, "m", *TINY, "--weights", weights_file, "--cache-gb", "0.000001"]
    with pytest.raises(utils.UserError, match=r"--cache-gb 1e-06.*needs .* GB.*--cache-dir"):
        run_here(tmp_path, *words)
    assert "round 0" not in capsys.readouterr().out


def list_views(monkeypatch, fitting, round_number, **recipe):
    monkeypatch.setattr(train, "views_that_fit", lambda run: fitting)
    run = SimpleNamespace(recipe={"views": 2, "fresh": 1} | recipe)
    return train.list_views(run, round_number)


def test_each_round_has_the_latest_views_beside_the_pictures_themselves(monkeypatch):
    assert list_views(monkeypatch, 100, 0) == [0]
    assert list_views(monkeypatch, 100, 1) == [0, 1, 2]
    assert list_views(monkeypatch, 100, 3) == [0, 1, 2, 3, 4]
    assert list_views(monkeypatch, 3, 3) == [0, 3, 4]
    assert list_views(monkeypatch, 1, 3) == [0]
    assert list_views(monkeypatch, 100, 2, views=7, fresh=4) == list(range(12))


def test_without_a_connection_auto_says_what_is_lost_and_goes_on(scratch_run):
    errors = scratch_run[1].stderr.splitlines()
    lines = [line for line in errors if "ImageNet" in line or "from scratch" in line]
    assert len(lines) >= 4 and all(line.startswith("warning: ") for line in lines)


def test_a_batch_on_a_device_is_smaller_for_large_pictures(monkeypatch):
    assert train.inference_batch(224) == train.INFERENCE_BATCH
    monkeypatch.setattr(train, "on_device", lambda: True)
    assert [train.inference_batch(side) for side in (75, 224, 299, 1024)] == [256, 256, 128, 16]


def test_the_trial_of_number_formats_survives_a_machine_without_them(monkeypatch):
    args = SimpleNamespace(float32=False)
    assert train.fastest_format(args) in ("float32", "mixed_bfloat16")
    monkeypatch.setattr(model, "compiled", lambda network: 1 / 0)
    assert train.fastest_format(args) == "float32"
    assert train.fastest_format(SimpleNamespace(float32=True)) == "float32"
