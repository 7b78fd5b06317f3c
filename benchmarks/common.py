"""What the benchmarks share: the machine, tables, timed commands, the split and two yardsticks."""

import argparse
import collections
import contextlib
import io
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import dataset  # noqa: E402
import model  # noqa: E402
import train  # noqa: E402
import utils  # noqa: E402


def make_parser(text):
    """Return an argument parser that shows a script's docstring as it is."""
    kind = argparse.RawDescriptionHelpFormatter
    return argparse.ArgumentParser(description=text, formatter_class=kind)


def print_machine(conditions):
    """Print processor, cores and versions in one line, and under what conditions runs were made."""
    name, facts = platform.processor() or platform.machine(), Path("/proc/cpuinfo")
    if facts.exists() and (found := re.search(r"model name\s*: (.*)", facts.read_text())):
        name = found[1]
    parts = [name, f"{utils.cores()} cores", f"Python {platform.python_version()}"]
    for package in ("keras", "tensorflow", "jax", "numpy", "pillow", "opencv-python"):
        with contextlib.suppress(PackageNotFoundError):
            parts.append(f"{package} {version(package)}")
    if limit := os.environ.get("ONEDNN_MAX_CPU_ISA"):
        parts.append(f"ONEDNN_MAX_CPU_ISA={limit}")
    print(", ".join(parts), conditions, sep="\n")


def spread(values, digits=2):
    """Return median, smallest and largest as text."""
    middle, low, high = statistics.median(values), min(values), max(values)
    return f"{middle:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def print_table(header, rows):
    """Print a Markdown table."""
    for row in (header, ["---"] * len(header), *rows):
        print("| " + " | ".join(map(str, row)) + " |", flush=True)


def save_figure(figure, path, dpi):
    """Save a matplotlib figure as PNG in few colours, so that the file stays small."""
    picture = io.BytesIO()
    figure.savefig(picture, dpi=dpi)
    Image.open(picture).convert("RGB").quantize(64).save(path, optimize=True)


# ---------------------------------------------------------------- commands

# lines: [(seconds, line of stdout)]; seconds: of the whole run; peak: memory in MB
Outcome = collections.namedtuple("Outcome", "lines seconds peak")


def train_py(data_dir, *options):
    """Return the command that runs train.py, prefix `m` in the current folder."""
    return [sys.executable, str(ROOT / "train.py"), str(data_dir), "m", *map(str, options)]


def absolute(options):
    """Return options whose paths hold in any folder."""
    return [os.path.abspath(option) if os.path.exists(option) else option for option in options]


def run_command(command, folder=None, field="RssAnon", **more):
    """Run a command to its end, start-up included. Returns an Outcome.

    field: which line of /proc/PID/status is watched. Ends the benchmark if the command fails.
    """
    start, peaks = time.monotonic(), [0.0]
    with tempfile.TemporaryFile("w+") as errors:
        pipes = {"stdout": subprocess.PIPE, "stderr": errors}
        text = {"encoding": "utf-8", "errors": "replace"}
        process = subprocess.Popen(command, cwd=folder, **pipes, **text, **more)

        def watch():
            """Thread: note how much memory the process takes."""
            while process.poll() is None:
                peaks.append(memory(process.pid, field))
                time.sleep(0.05)

        watcher = threading.Thread(target=watch)
        watcher.start()
        lines = [(time.monotonic() - start, line.rstrip()) for line in process.stdout]
        process.wait()
        seconds = time.monotonic() - start
        watcher.join()
        if process.returncode:
            errors.seek(0)
            sys.exit(f"failed: {' '.join(map(str, command))}\n{errors.read()[-2000:]}")
    return Outcome(lines, seconds, max(peaks))


def memory(pid, field):
    """Return a field of /proc/PID/status in MB, 0 when the process has ended."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0.0
    found = re.search(rf"^{field}:\s*(\d+)", status, re.MULTILINE)
    return int(found[1]) * 1024 / 1e6 if found else 0.0


def accuracies(outcome):
    """Return [(seconds, validation accuracy)] of the rounds or epochs that were printed."""
    pattern = re.compile(r"(?:round|epoch) \d+: validation accuracy (\S+)")
    found = [(seconds, pattern.match(line)) for seconds, line in outcome.lines]
    return [(seconds, float(match[1])) for seconds, match in found if match]


def time_to(curve, target):
    """Return after how many seconds a curve [(seconds, accuracy)] has the target, None if never."""
    return next((seconds for seconds, accuracy in curve if accuracy >= target), None)


def reached(times):
    """Return median and spread of times as text, or in how many runs there was none (None)."""
    missed = times.count(None)
    return f"not reached in {missed} of {len(times)}" if missed else spread(times, 1)


# ---------------------------------------------------------------- pictures


def read_split(data_dir, folder, *options):
    """Read and divide a folder as train.py does, silently. Returns (its arguments, its Data)."""
    args = train.parse_arguments([str(data_dir), f"{folder}/m", *map(str, options)])
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        return args, dataset.read_data(args, args.image_size or 224)


def divide(data_dir, folder, *options):
    """Copy pictures into folder/train/ and folder/validation/, divided as train.py does it."""
    _, data = read_split(data_dir, folder, "--dry-run", *options)
    paths = [picture.path for picture in data.pictures]
    labels = [picture.label for picture in data.pictures]
    for part, indices in (("train", data.train), ("validation", data.validation)):
        copy_classes(paths, labels, indices, Path(folder, part))


def copy_classes(paths, labels, indices, folder):
    """Copy some of the pictures into folder/<class>/, named by their numbers."""
    for i in indices:
        target = folder / labels[i] / f"{i:06d}{paths[i].suffix.lower()}"
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(paths[i], target)


def read_folder(folder, side):
    """Decode the pictures below folder/<class>/ as train.py does.

    Returns uint8 (n, side, side, 3), labels (n,), paths (n,); what gives no picture is left out.
    """
    files = dataset.find_files(Path(folder))
    squares = utils.ordered_parallel_map(lambda file: dataset.read_square(file[0], side)[0], files)
    found = [(square, *file) for square, file in zip(squares, files) if square is not None]
    pixels, paths, labels = zip(*found)
    return np.stack(pixels), np.array(labels), paths


def read_parts(folder, side):
    """Read what `divide` made. Returns (pixels, class numbers, indices to fit, and to score)."""
    pixels, labels, _ = read_folder(f"{folder}/train", side)
    held, actual, _ = read_folder(f"{folder}/validation", side)
    targets = np.unique(np.concatenate([labels, actual]), return_inverse=True)[1]
    fit, score = np.split(np.arange(len(targets)), [len(labels)])
    return np.concatenate([pixels, held]), targets, fit, score


def train_and_score(folder, options, parts=("held",)):
    """Train on folder/fit, and let the saved model classify what is in the folders `parts`.

    Returns (what travels with the model, [(probabilities (n, classes), class numbers (n,))]); the
    number of a class that the model does not have is -1.
    """
    run_command(train_py("fit", *options), folder)
    network, info = model.load_model(Path(folder, "m"))
    numbers, found = {label: n for n, label in enumerate(info["labels"])}, []
    for part in parts:
        pixels, labels, _ = read_folder(Path(folder, part), info["image_size"])
        actual = np.array([numbers.get(label, -1) for label in labels])
        found.append((model.predict(network, pixels, 32), actual))
    return info, found


# ---------------------------------------------------------------- yardsticks


def thumbnails(pixels):
    """Return uint8 squares of any side as rows of 16 x 16 pixels, float32 (n, 768)."""
    box = Image.Resampling.BOX
    small = [np.asarray(Image.fromarray(square).resize((16, 16), box)) for square in pixels]
    return np.stack(small).reshape(len(small), -1).astype("float32")


def nearest_neighbour(rows, targets, fit, held):
    """Return the accuracy of the nearest neighbour among rows (n, numbers).

    targets: class numbers (n,). fit, held: indices of pictures to compare with, and to score.
    """
    distance = (rows[fit] ** 2).sum(1) - 2 * rows[held] @ rows[fit].T  # less what is the same
    return float((targets[fit][distance.argmin(1)] == targets[held]).mean())


def pooled_features(weights, layer, pixels):
    """Return average-pooled features of a layer of the frozen network, float64 (n, channels)."""
    keras = model.import_keras()
    builder, shape = keras.applications.InceptionV3, pixels.shape[1:]
    base = builder(weights=str(weights), include_top=False, input_shape=shape)
    pooled = keras.layers.GlobalAveragePooling2D()(base.get_layer(layer).output)
    inputs = keras.Input(shape)
    scaled = keras.layers.Rescaling(1 / 127.5, offset=-1)(inputs)
    network = model.compiled(keras.Model(inputs, keras.Model(base.input, pooled)(scaled)))
    return model.predict(network, pixels, 64).astype("float64")


def ridge_readout(features, targets, fit, held):
    """Return the accuracy of ridge regression, its strength chosen on a quarter of `fit`."""
    mean, scale = features[fit].mean(0), features[fit].std(0) + 1e-6
    features = np.c_[(features - mean) / scale, np.ones(len(features))]
    hot = np.eye(targets.max() + 1)[targets] - 1 / (targets.max() + 1)

    def accuracy(use, test, strength):
        """Return the accuracy on `test` of a fit to `use`."""
        gram = features[use] @ features[use].T + strength * np.eye(len(use))
        weights = features[use].T @ np.linalg.solve(gram, hot[use])
        return float(((features[test] @ weights).argmax(1) == targets[test]).mean())

    inner = np.random.default_rng(0).permutation(fit)
    part = len(inner) * 3 // 4
    best = max((accuracy(inner[:part], inner[part:], s), s) for s in 10.0 ** np.arange(1, 6))
    return accuracy(fit, held, best[1])
