"""What the benchmarks share: the machine in one line, a table, timed runs of commands, the split, two yardsticks."""

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

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import model  # noqa: E402
import train  # noqa: E402
import utils  # noqa: E402


def machine():
    """Return processor, cores and versions as one line."""
    name = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(
            (line.partition(":")[2].strip() for line in lines if line.startswith("model name")),
            name,
        )
    parts = [name, f"{utils.cores()} cores", f"Python {platform.python_version()}"]
    for package in ("keras", "tensorflow", "jax", "numpy", "pillow", "opencv-python"):
        with contextlib.suppress(PackageNotFoundError):
            parts.append(f"{package} {version(package)}")
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA")
    return ", ".join(parts + [f"ONEDNN_MAX_CPU_ISA={limit}"] * bool(limit))


def spread(values, digits=2):
    """Return median, smallest and largest as text."""
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


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

Outcome = collections.namedtuple(
    "Outcome", "lines seconds peak"
)  # [(seconds, line of stdout)], all, MB


def train_py(data_dir, *options):
    """Return the command that runs train.py in a process of its own, prefix `m` in the current folder."""
    return [sys.executable, str(ROOT / "train.py"), str(data_dir), "m", *map(str, options)]


def absolute(options):
    """Return options whose paths hold in any folder."""
    return [os.path.abspath(option) if os.path.exists(option) else option for option in options]


def run_command(command, folder=None, field="RssAnon", **more):
    """Run a command to its end, start-up included. Returns an Outcome; ends the benchmark if the command fails.

    field: which line of /proc/PID/status is watched, summed over the process and its children (Linux; else 0).
    """
    start, peaks = time.monotonic(), [0.0]
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            command,
            cwd=folder,
            stdout=subprocess.PIPE,
            stderr=errors,
            encoding="utf-8",
            errors="replace",
            **more,
        )

        def watch():
            """Note the memory until the process has ended."""
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
    """Return a field of /proc/PID/status in MB, summed over the process and its children; 0 when it has ended."""
    try:
        status, tasks = Path(f"/proc/{pid}/status").read_text(), Path(f"/proc/{pid}/task").iterdir()
        children = [child for task in tasks for child in (task / "children").read_text().split()]
    except OSError:
        return 0.0
    own = sum(
        int(line.split()[1]) * 1024 / 1e6
        for line in status.splitlines()
        if line.startswith(f"{field}:")
    )
    return own + sum(memory(child, field) for child in children)


def accuracies(outcome):
    """Return [(seconds, validation accuracy)] from the lines of train.py, or others that print `epoch N: …` like it."""
    found = [
        (s, re.match(r"(?:round|epoch) \d+: validation accuracy (\S+)", line))
        for s, line in outcome.lines
    ]
    return [(seconds, float(match[1])) for seconds, match in found if match]


def time_to(curve, target):
    """Return after how many seconds a curve [(seconds, accuracy)] first has the target, None if never."""
    return next((seconds for seconds, accuracy in curve if accuracy >= target), None)


def reached(times):
    """Return median and spread of times as text, or in how many runs the goal was never reached (None)."""
    missed = times.count(None)
    return f"not reached in {missed} of {len(times)}" if missed else spread(times, 1)


# ---------------------------------------------------------------- pictures


def train_arguments(data_dir, folder, *options):
    """Return what train.py makes of a command line, prefix `m` in `folder`."""
    return train.parse_arguments([str(data_dir), str(Path(folder) / "m"), *map(str, options)])


def read_split(data_dir, folder, *options):
    """Read and divide a folder as train.py does. Returns (its Data, uint8 pixels of the pictures)."""
    args = train_arguments(data_dir, folder, *options)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        data = train.read_data(args, args.image_size or 224)
    return data, data.pixels.rows[[picture.row for picture in data.pictures]]


def divide(data_dir, folder, *options):
    """Link the pictures into folder/train/<class>/ and folder/validation/<class>/, divided as train.py does it."""
    data = train.read_data(train_arguments(data_dir, folder, "--dry-run", *options), 75)
    paths, labels = (
        [picture.path for picture in data.pictures],
        [picture.label for picture in data.pictures],
    )
    for part, indices in (("train", data.train), ("validation", data.validation)):
        link_classes(paths, labels, indices, Path(folder, part))


def link(source, target):
    """Give a file a second name, or copy it where the file system allows none."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copy(source, target)


def link_classes(paths, labels, indices, folder):
    """Link some of the pictures into folder/<class>/, named by their numbers."""
    for i in indices:
        link(paths[i], folder / labels[i] / f"{i:06d}{paths[i].suffix.lower()}")


def held_out_accuracy(part, folder):
    """Score the model `m` in `folder` on the pictures in folder/<part>/ with --evaluate. Returns the accuracy."""
    lines = run_command(train_py(part, "--evaluate"), folder).lines
    return float(
        next(line for _, line in lines if line.startswith("evaluate: accuracy")).split()[2]
    )


def read_folder(folder, side):
    """Decode the pictures below folder/<class>/ as train.py does.

    Returns uint8 (n, side, side, 3), labels (n,), paths (n,); what gives no picture is left out.
    """
    files = train.find_files(Path(folder))
    pictures = utils.ordered_parallel_map(lambda item: train.read_picture(item[0], side)[0], files)
    found = [
        (picture, label, path)
        for picture, (path, label) in zip(pictures, files)
        if picture is not None
    ]
    pixels, labels, paths = zip(*found)
    return np.stack(pixels), np.array(labels), paths


def random_weights(path):
    """Save the random weights of InceptionV3 without its top: speed and memory do not depend on what it learned."""
    keras = model.import_keras()
    keras.applications.InceptionV3(
        weights=None, include_top=False, input_shape=(75, 75, 3)
    ).save_weights(path)


# ---------------------------------------------------------------- yardsticks


def thumbnails(pixels):
    """Return uint8 squares as the 16 x 16 thumbnails whose distances the yardsticks take, float32 (n, 768)."""
    small = [
        np.asarray(Image.fromarray(square).resize((16, 16), Image.Resampling.BOX))
        for square in pixels
    ]
    return np.stack(small).reshape(len(small), -1).astype("float32")


def nearest_neighbour(pixels, targets, fit, held):
    """Return the accuracy of the nearest neighbour on 16 x 16 thumbnails of uint8 squares.

    targets: class numbers (n,). fit, held: indices of the pictures to compare with, and of those to score.
    """
    small = thumbnails(pixels)
    distance = (
        (small[held] ** 2).sum(1)[:, None]
        - 2 * small[held] @ small[fit].T
        + (small[fit] ** 2).sum(1)
    )
    return float((targets[fit][distance.argmin(1)] == targets[held]).mean())


def pooled_features(weights, layer, pixels):
    """Return average-pooled features of a layer of the frozen network for uint8 squares, float64 (n, channels)."""
    keras = model.import_keras()
    base = keras.applications.InceptionV3(
        weights=str(weights), include_top=False, input_shape=pixels.shape[1:]
    )
    pooled = keras.layers.GlobalAveragePooling2D()(base.get_layer(layer).output)
    inputs = keras.Input(pixels.shape[1:])
    scaled = keras.layers.Rescaling(1 / 127.5, offset=-1)(inputs)
    network = model.compiled(keras.Model(inputs, keras.Model(base.input, pooled)(scaled)))
    return model.predict(network, pixels, 64).astype("float64")


def ridge_readout(features, targets, fit, held):
    """Return the accuracy of a ridge regression on features (n, channels), its strength chosen within `fit`."""
    mean, scale = features[fit].mean(0), features[fit].std(0) + 1e-6
    features = np.c_[(features - mean) / scale, np.ones(len(features))]
    hot = np.eye(targets.max() + 1)[targets] - 1 / (targets.max() + 1)

    def accuracy(use, test, strength):
        """Fit on some of the pictures and score others."""
        gram = features[use] @ features[use].T + strength * np.eye(len(use))
        weights = features[use].T @ np.linalg.solve(gram, hot[use])
        return float(((features[test] @ weights).argmax(1) == targets[test]).mean())

    inner = np.random.default_rng(0).permutation(fit)
    part = len(inner) * 3 // 4
    best = max((accuracy(inner[:part], inner[part:], s), s) for s in 10.0 ** np.arange(1, 6))
    return accuracy(fit, held, best[1])
