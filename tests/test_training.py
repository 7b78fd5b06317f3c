"""train.py for real: short runs on small pictures, and what plain Keras makes of the files."""

import csv
import inspect
import itertools
import json
import os
import re
import shutil
import timeit
from types import SimpleNamespace

import h5py
import numpy as np
import pytest
import tiny_network
from conftest import TINY, draw_classes, error_line, train_here
from PIL import Image

import dataset
import features
import model
import report
import train


def accuracy_counts(output, start):
    """Return [(right, total)] of the lines that begin with `start`."""
    return [tuple(map(int, m)) for m in re.findall(rf"^{start}.*\((\d+)/(\d+)\)", output, re.M)]


def read_table(path):
    with open(path, encoding="utf-8") as file:
        return list(csv.DictReader(file))


SHARE, NUMBER = r"\d\.\d{4}", r"\d+\.\d+"
LINES = (
    r"round 0: validation accuracy {share} \(\d+/9\)",
    r"round 0 epoch 1: loss {n}, accuracy {n}, val_loss {n}, val_accuracy {n}, \d+ s",
    r"best: round \d, validation accuracy {share} \(\d/9\), 95% interval {share} to {share}",
    r"strangers: threshold 0\.\d{{3}}: \d\.\d\d of friends correct, \d\.\d\d of strangers unknown",
)


def test_the_lines_that_programs_read(scratch_run):
    _, done = scratch_run
    lines = done.stdout.splitlines()
    assert lines[0] == "images: 34 train, 9 validation, 3 classes, 0 skipped"
    for pattern in LINES:
        whole = pattern.format(share=SHARE, n=NUMBER)
        assert any(re.fullmatch(whole, line) for line in lines), whole
    assert [line.partition(":")[0] for line in lines[-2:]] == ["best", "strangers"]
    assert accuracy_counts(done.stdout, "round 0") == accuracy_counts(done.stdout, "best")
    assert "oneDNN" not in done.stderr and "WARNING" not in done.stderr


def test_without_a_connection_auto_says_what_is_lost_and_goes_on(scratch_run):
    errors = scratch_run[1].stderr.splitlines()
    lines = [line for line in errors if "ImageNet" in line or "from scratch" in line]
    assert len(lines) >= 4 and all(line.startswith("warning: ") for line in lines)


def test_the_files(scratch_run, tiny):
    folder, _ = scratch_run
    ends = ".h5 .json -labels.json -history.csv -report.png -mistakes.csv -review.csv -review.png"
    names = {path.name for path in folder.iterdir()}
    assert names == {"data", "000.png", *(f"model{end}" for end in ends.split())}
    assert json.loads((folder / "model-labels.json").read_text()) == ["grün", "red", "unknown"]
    with Image.open(folder / "000.png") as image:
        assert image.info["Software"] == f"{report.KIT}: model" and max(image.size) <= 4096
    history = read_table(folder / "model-history.csv")
    epochs = [(row["round"], row["epoch"], bool(row["plain_accuracy"])) for row in history]
    assert epochs == [("0", "1", False), ("0", "2", True)]
    info = model.read_info(folder / "model")
    expected = {"labels": ["grün", "red", "unknown"], "image_size": 75, "seed": 1337}
    assert info | expected | {"weights": "none"} == info
    assert 0 <= info["threshold"] <= 1 and len(info["interval"]) == 2
    assert info["strangers"].keys() == {"friends", "unknown"}


def test_a_wrong_label_is_found(scratch_run):
    folder, done = scratch_run
    found = {row["file"]: row for row in read_table(folder / "model-review.csv")}
    row = found["red/wrong.png"]
    assert (row["label"], row["suggested"], row["why"]) == ("red", "grün", "label")
    assert re.search(r"\d+ labels? deserves? a look: model-review.png", done.stderr)


def test_plain_keras_reproduces_the_accuracy_both_ways(scratch_run):
    import keras

    folder, done = scratch_run
    words = [str(folder / "data"), str(folder / "model")]
    data = dataset.read_data(train.parse_arguments(words), 75)
    pixels = data.pixels.rows[[data.pictures[i].row for i in data.validation]]
    whole = keras.models.load_model(folder / "model.h5", compile=False)
    parts = keras.models.model_from_json((folder / "model.json").read_text())
    parts.load_weights(folder / "model.h5")
    for network in (whole, parts):
        right = network.predict(pixels, verbose=0).argmax(1) == data.targets[data.validation]
        assert accuracy_counts(done.stdout, "best") == [(right.sum(), 9)]


def test_evaluate_scores_every_picture_and_touches_nothing_else(scratch_run, tiny):
    folder, _ = scratch_run
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    words = ("data", "model", "--evaluate", "--min-accuracy", "0.999999")
    done = train_here(folder, *words)
    right, total = accuracy_counts(done.stdout, "evaluate")[0]
    assert total == 43 and done.returncode == (0 if right == 43 else 3)
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())
    table = read_table(folder / "model-evaluate.csv")
    assert len(table) == 43 and sum(row["actual"] == row["predicted"] for row in table) == right
    assert all(re.fullmatch(r"[01]\.\d{6}", row["probability"]) for row in table)
    assert table[0]["file"] == "grün/000.png"
    new = {path for path in folder.rglob("*") if path.is_file()} - before.keys()
    names = {"evaluate.png", "model-evaluate.csv", "model-evaluate-report.png"}
    assert {path.name for path in new} == names
    for path in new:
        path.unlink()


NOTED = ((train, "run_rounds"), (train, "trained_candidates"), (model, "save_model"))
NOTED += ((model, "trainable_part"), (features, "compute_features"))


def noting(function, calls):
    """Return a function that also notes (arguments, weights of a network among them, result)."""

    def call(*some, **more):
        networks = [one for one in some if hasattr(one, "get_weights")]
        weights = networks[0].get_weights() if networks else []
        result = function(*some, **more)
        result = list(result) if inspect.isgenerator(result) else result
        calls.append((some, weights, result))
        return result

    return call


def run_noting(folder, *words):
    """Run train.py in this process. Returns what it printed, and what it made on the way."""
    calls = {name: [] for _, name in NOTED}
    with pytest.MonkeyPatch.context() as patch:
        for module, name in NOTED:
            patch.setattr(module, name, noting(getattr(module, name), calls[name]))
        done = train_here(folder, *words)
    assert done.returncode == 0, done.stderr
    done.run = calls["run_rounds"][0][0][0]
    done.saved = []  # (kernel of the last layer, info)
    for (network, info, _), weights, _ in calls["save_model"]:
        paths = [weight.path for weight in network.weights]
        done.saved.append((weights[paths.index("probabilities/kernel")], info))
    done.computed = sum(len(some[1]) for some, *_ in calls["compute_features"])
    if calls["trainable_part"]:
        (done.twin, *_), done.before, _ = calls["trainable_part"][0]
        scored = calls["trained_candidates"]
        done.candidates = scored[-1][-1] if scored else []  # the last ones
    return done


@pytest.fixture(scope="module")
def tuned(tmp_path_factory, tiny_weights):
    """Fine-tune once, with a kept cache. Returns (folder, command, what was noted)."""
    folder = tmp_path_factory.mktemp("tuned")
    draw_classes(folder / "data", {"a": 10, "b": 10, "unknown": 10})
    command = ["data", "m", *TINY, "--weights", tiny_weights, "--float32", "--cache-dir", "kept"]
    with tiny_network.installed():
        return folder, command, run_noting(folder, *command)


@pytest.fixture
def small(tmp_path):
    return draw_classes(tmp_path / "data", {"a": 10, "b": 10})


def pixels_of(run, indices):
    return run.data.pixels.rows[[run.data.pictures[i].row for i in indices]]


def test_fine_tuning_changes_the_top_blocks_only_and_no_moving_average(tuned):
    seen, changed = tuned[2], set()
    for weight, before in zip(seen.twin.weights, seen.before):
        if not np.array_equal(weight, before):
            changed.add(weight.path)
    last = [layer.name for layer in seen.twin.layers if layer.name.startswith("conv2d")][-2:]
    convolutions = {path.partition("/")[0] for path in changed if "conv2d" in path}
    assert convolutions == set(last) and not any("moving" in path for path in changed)


def assert_candidates(seen, count):
    """Assert that there were so many, and that their networks answer what was scored."""
    pixels = pixels_of(seen.run, seen.run.data.validation)
    assert len(seen.candidates) == count
    for candidate in seen.candidates:
        network = candidate.network
        model.set_readout(network, *candidate.numbers)
        answers = model.predict(network, pixels, 16)
        assert answers == pytest.approx(candidate.probabilities, abs=2e-3)
        assert answers.std() > 0.01


@pytest.mark.parametrize("words", [("--unfreeze", 3), ("--weights", "none")])
def test_where_every_level_is_trained_no_readout_of_before_is_mixed_in(
    tiny, tmp_path, small, tiny_weights, words
):
    seen = run_noting(tmp_path, small, "m", *TINY, "--weights", tiny_weights, "--float32", *words)
    assert_candidates(seen, 1)


@pytest.mark.parametrize(
    ("gained", "lost", "is_better"),
    [(0, 0, False), (1, 0, False), (2, 0, True), (3, 1, False), (4, 1, True), (1, 4, False)],
)
def test_what_was_trained_is_not_used_by_luck(gained, lost, is_better):
    actual = np.arange(20) % 2
    before, after = actual.copy(), actual.copy()
    before[:gained], after[10 : 10 + lost] = 1 - actual[:gained], 1 - actual[10 : 10 + lost]
    plain, trained = (train.Candidate(None, None, np.eye(2)[x], 0.0) for x in (before, after))
    assert train.is_clearly_better(trained, plain, actual) == is_better


def test_what_is_scored_is_what_the_network_answers(tuned, tiny):
    folder, _, seen = tuned
    assert_candidates(seen, len(train.TRAINED_SHARES))
    network, info = model.load_model(folder / "m")
    kernel = network.get_layer("probabilities").get_weights()[0]
    assert np.array_equal(kernel, seen.saved[-1][0])
    assert info["weights"].startswith("tiny.weights.h5, SHA-256 ")


def test_a_kept_cache_saves_the_frozen_pass(tuned, tiny):
    folder, command, seen = tuned
    # pictures as they are, mirrored ones, and an augmented view of validation
    assert len(list(folder.glob("kept/*"))) == 3 and seen.computed == 30 + 24 + 6
    assert (folder / "kept").stat().st_mode & 0o777 == 0o700
    again = run_noting(folder, *command)
    lines = [re.sub(r"\d+ s$", "", text, flags=re.M) for text in (seen.stdout, again.stdout)]
    assert again.computed == 0 and lines[0] == lines[1]
    Image.new("RGB", (80, 80), "navy").save(folder / "data" / "a" / "new.png")
    assert 1 <= run_noting(folder, *command).computed <= 4  # the new one, and what it has moved
    (folder / "data" / "a" / "new.png").unlink()


def test_a_kept_cache_is_of_one_random_network(tiny, tmp_path, small):
    """From scratch, another seed is another network."""
    words = [small, "m", *TINY, "--weights", "none", "--rounds", 0, "--cache-dir", "kept"]
    first, same, other = (run_noting(tmp_path, *words, "--seed", seed) for seed in (1, 1, 2))
    assert first.computed == other.computed == 20 and same.computed == 0


def test_a_kept_cache_stays_as_large_as_it_may(tmp_path):
    names = [f"{kind * 16}-0.features" for kind in "abc"]
    for day, name in enumerate(("mine.features", *names)):
        (tmp_path / name).write_bytes(bytes(1000))
        os.utime(tmp_path / name, (day, day))
    words = ["data", "m", "--cache-dir", str(tmp_path), "--cache-gb"]
    features.trim_cache(train.parse_arguments([*words, "2e-6"]))
    assert {path.name for path in tmp_path.iterdir()} == {*names[1:], "mine.features"}


@pytest.mark.slow
def test_a_gpu_does_what_the_cores_do(tiny, tmp_path, small, tiny_weights, monkeypatch):
    """Views are made on it then, in larger batches."""
    words = [small, "m", *TINY, "--weights", tiny_weights, "--float32", "--views", 3]
    (tmp_path / "cores").mkdir()
    outputs = [run_noting(tmp_path / "cores", *words)]
    monkeypatch.setattr(features, "on_device", lambda: True)
    outputs.append(run_noting(tmp_path, *words))
    for line in ("best", "round 1"):
        assert len({str(accuracy_counts(seen.stdout, line)) for seen in outputs}) == 1
    one, two = ([c.probabilities for c in seen.candidates] for seen in outputs)
    assert np.allclose(one, two, atol=0.05)
    assert [features.inference_batch(side) for side in (75, 224, 299, 1024)] == [256, 256, 128, 16]


@pytest.mark.parametrize(
    ("wrong", "loo", "is_over"), [(1, 1, True), (5, 1, False), (1, 0.8, False)]
)
def test_from_scratch_no_training_follows_what_is_good_enough(wrong, loo, is_over):
    """Where a class is one film, leave-one-out alone would say too much."""
    run = train.Run(
        args=(),
        recipe={"rounds": 5, "patience": 1},
        data=SimpleNamespace(validation=range(20)),
        networks=SimpleNamespace(cut=None),
        views={},
        gathered={},
        readouts={},
    )
    best = {"round": 0, "score": [wrong, 0.1], "loo": loo}
    assert train.is_finished(run, {"round": 0, "rounds_without_gain": 0, "best": best}) == is_over


def test_fit_all_changes_the_model_and_none_of_its_figures(tiny, tmp_path, small, tiny_weights):
    words = [small, "m", *TINY, "--weights", tiny_weights, "--rounds", 1, "--fit-all"]
    seen = run_noting(tmp_path, *words)
    assert_candidates(seen, 0)  # what was trained cannot be fitted once more
    before, told = seen.saved[-2]
    after, info = seen.saved[-1]
    assert not np.allclose(before, after, atol=1e-3 * np.abs(before).max())
    sums = {name: info[name] for name in ("sha256", "arrays_sha256")}
    assert info == told | sums | {"fit_all": True}
    network, _ = model.load_model(tmp_path / "m")
    assert np.array_equal(network.get_layer("probabilities").get_weights()[0], after)
    assert seen.stdout.splitlines()[-1].startswith("fit-all: the saved model's readout knows all")
    assert "\nbest: round" in seen.stdout and "strangers:" not in seen.stdout  # two classes
    assert "it was not trained on before --fit-all" in seen.stderr


def test_sixteen_bits_in_the_frozen_pass(tiny, monkeypatch, tmp_path, small, tiny_weights):
    monkeypatch.setattr(features, "fastest_format", lambda args: "mixed_bfloat16")
    words = [small, "m", *TINY, "--weights", tiny_weights, "--rounds", 0]
    seen = run_noting(tmp_path, *words)
    network, info = model.load_model(tmp_path / "m")
    assert info["number_format"] == "mixed_bfloat16" and network.dtype == "float32"
    assert "number format: mixed_bfloat16" in seen.stdout
    data, view = seen.run.data, features.get_view(seen.run, features.UNAUGMENTED)
    everything = np.arange(len(data.pictures))
    exact = model.predict(seen.run.networks.exact, pixels_of(seen.run, everything), 16)
    distance = np.abs(exact - view.rows["levels"][view.row_of]).max(1)
    assert distance[data.validation].max() < 1e-5 < 1e-4 < distance[data.train].min()


def test_bfloat16_is_taken_where_it_is_faster_and_works(monkeypatch):
    args = train.parse_arguments(["data", "m"])
    for ratio, expected in ((1.2, "float32"), (1.4, "mixed_bfloat16")):
        seconds = itertools.cycle((ratio, 1.0))
        monkeypatch.setattr(timeit, "timeit", lambda *_, seconds=seconds, **__: next(seconds))
        assert features.fastest_format(args) == expected
    assert features.fastest_format(train.parse_arguments(["data", "m", "--float32"])) == "float32"
    # a processor without such instructions
    monkeypatch.setattr(model.import_keras().ops, "convert_to_numpy", lambda _: 1 / 0)
    assert features.fastest_format(args) == "float32"


def test_a_cache_that_is_too_small_is_told_before_the_work(tiny, tmp_path, small, tiny_weights):
    words = [small, "m", *TINY, "--weights", tiny_weights, "--cache-gb", "0.000001"]
    done = train_here(tmp_path, *words)
    assert re.search(r"--cache-gb 1e-06.*needs .* GB.*--cache-dir", error_line(done))
    assert "round 0" not in done.stdout


@pytest.mark.slow
def test_inception_is_fine_tuned_and_scored(tmp_path, weights_file):
    """The one run of the real network; all others have a tiny one in its place."""
    data = draw_classes(tmp_path / "data", {"a": 10, "b": 10})
    words = [*TINY, "--weights", weights_file, "--views", 2]
    done = train_here(tmp_path, data, "m", *words)
    assert done.returncode == 0, done.stderr
    assert len(accuracy_counts(done.stdout, "round")) == 2
    (best,) = accuracy_counts(done.stdout, "best")
    done = train_here(tmp_path, data, "m", "--evaluate")
    ((right, total),) = accuracy_counts(done.stdout, "evaluate")
    assert total == 20 and best[0] <= right


@pytest.mark.long
def test_a_whole_network_can_be_fine_tuned(tmp_path, small, weights_file):
    done = train_here(tmp_path, small, "m", *TINY, "--weights", weights_file, "--unfreeze", 10)
    assert done.returncode == 0 and len(accuracy_counts(done.stdout, "round")) == 2


def test_views_are_made_and_cached_as_asked(tiny, tmp_path, small, tiny_weights):
    words = [small, "m", *TINY, "--weights", tiny_weights, "--views", 3, "--cache-dir", "kept"]
    assert train_here(tmp_path, *words).returncode == 0
    views = {path.stem.rpartition("-")[2] for path in tmp_path.glob("kept/*.features")}
    assert views == {"0", "1", "2", "3", "1000000"}  # the last is that of validation


def test_features_too_large_for_the_cache_are_told(tiny, tmp_path, small, tiny_weights):
    large = shutil.copy(tiny_weights, tmp_path / "large.weights.h5")
    with h5py.File(large, "a") as file:
        for layer in file["layers"].values():
            if "vars/0" in layer and layer["vars/0"].ndim == 1:  # beta, of a normalisation
                layer["vars/0"][...] = 1e6
    done = train_here(tmp_path, small, "m", *TINY, "--weights", large)
    assert "too large for 16 bits: use --float32" in error_line(done)
