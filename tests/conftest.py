"""Fixtures that several test files use: pictures to write, scripts to run, models trained once."""

import contextlib
import csv
import http.server
import importlib
import io
import itertools
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
SHARED = ROOT.parent / "shared"
SCRIPTS = ("train.py", "webcam.py", "collect_apple_photos.py")
# Words for tests/tiny_network.py, which trains in seconds.
TINY = "--image-size 75 --head-epochs 2 --round-epochs 1 --rounds 1 --batch-size 8".split()
# A shell starts what runs in its background with Ctrl-C ignored, nohup with a closed terminal, and
# children inherit that, but not a handler: with one here, all scripts that tests start can be
# interrupted.
signal.signal(signal.SIGINT, signal.default_int_handler)
if hasattr(signal, "SIGHUP"):  # Windows has none
    signal.signal(signal.SIGHUP, lambda *_: None)


def pytest_collection_modifyitems(items):
    """Skip, with the reason, what needs data that is not part of the project."""
    for item in items:
        if item.get_closest_marker("needs_shared") and not SHARED.is_dir():
            item.add_marker(pytest.mark.skip(reason=f"{SHARED.name}/ is not beside the project"))


def start(script, cwd, *arguments, **environment):
    command = [sys.executable, str(script), *map(str, arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "encoding": "utf-8"}
    return subprocess.Popen(command, cwd=cwd, env=os.environ | environment, **pipes)


def run_process(script, cwd, *arguments, **environment):
    process = start(script, cwd, *arguments, **environment)
    output, errors = process.communicate()
    return SimpleNamespace(returncode=process.returncode, stdout=output, stderr=errors)


def run_tiny(cwd, *arguments, **environment):
    """Run train.py over the tiny network in a process of its own."""
    script = ROOT / "tests" / "tiny_network.py"
    return run_process(script, cwd, "train.py", *arguments, **environment)


def run_here(script, folder, *words):
    """Do the same as run_process in this process, which may have Keras loaded already."""
    import utils

    module = importlib.import_module(Path(script).stem)
    if hasattr(module, "warn_once"):
        module.warn_once.cache_clear()
    streams = [io.TextIOWrapper(io.BytesIO(), "utf-8", write_through=True) for _ in range(2)]
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as end:
        patch.chdir(folder)
        patch.setattr(sys, "argv", [script, *map(str, words)])
        with contextlib.redirect_stdout(streams[0]), contextlib.redirect_stderr(streams[1]):
            utils.run(module.main)
    output, errors = (stream.buffer.getvalue().decode() for stream in streams)
    return SimpleNamespace(returncode=end.value.code, stdout=output, stderr=errors)


def train_here(folder, *words):
    return run_here("train.py", folder, *words)


def error_line(done):
    """Return the last line on stderr, checked to be the one line about an expected failure."""
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    lines = done.stderr.splitlines()
    assert [line for line in lines if line.startswith("error: ")] == lines[-1:], done.stderr
    return lines[-1]


@contextlib.contextmanager
def serve(handler, port=0, **attributes):
    """Run a web server while the block runs; gives it, with these attributes."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", port), handler)
    vars(server).update(attributes, daemon_threads=True, ended=threading.Event())
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.ended.set()
        server.shutdown()
        server.server_close()


def limit(name, size):
    """Return a step for `limited`: one of resource's limits, RLIMIT_FSIZE say."""
    import resource

    return lambda: resource.setrlimit(getattr(resource, name), (size, size))


def limited(cwd, steps, script, *arguments):
    """Run a script in a process that first takes the given steps, which limit it."""
    command = [sys.executable, str(ROOT / script), *map(str, arguments)]
    pipes = {"capture_output": True, "encoding": "utf-8"}
    return subprocess.run(command, cwd=cwd, **pipes, preexec_fn=lambda: [step() for step in steps])


def on_terminal(command, cwd, **environment):
    """Run a command on a terminal. Returns its exit code and all that it wrote, bytes."""
    termios = pytest.importorskip("termios", reason="needs a pseudo-terminal")
    ours, theirs = os.openpty()
    termios.tcsetwinsize(theirs, (24, 80))
    pipes = {"stdout": theirs, "stderr": theirs}
    process = subprocess.Popen(command, cwd=cwd, env=os.environ | environment, **pipes)
    os.close(theirs)
    text = b""
    with contextlib.suppress(OSError):  # what Linux answers when the other end is closed
        while part := os.read(ours, 4096):
            text += part
    os.close(ours)
    return process.wait(), text


def texture(seed, size=(640, 480)):
    """Return a picture that looks different everywhere, so that a crop tells where it was cut."""
    shape = size[1] // 16, size[0] // 16, 3
    small = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    return Image.fromarray(small).resize(size, Image.Resampling.BICUBIC)


def cut_square(pixels, box, context, step=1):
    """Cut the square around a box (x, y, side) out of pixels, of which each step-th is taken."""
    side, axes = round(box[2] * context), []
    for center, size in zip(box[:2], pixels.shape[1::-1]):
        start = center - side / 2
        start = min(max(start, 0), size - side) if side <= size else start
        axes.append(np.clip(np.arange(0, side, step) + round(start), 0, size - 1))
    return pixels[np.ix_(axes[1], axes[0])]


def assert_same_crop(file, picture, box, context=2.2):
    """Assert that the crop in `file` has side and centre of box x context within a pixel."""
    crop, pixels = np.asarray(Image.open(file), int), np.asarray(picture.convert("RGB"))
    side = len(crop)
    assert abs(side - box[2] * context) <= 1 and crop.shape == (side, side, 3)
    step, differences = 1 + side // 200, {}
    for dx, dy in itertools.product(range(-3, 4), repeat=2):
        other = cut_square(pixels, (box[0] + dx, box[1] + dy, side), 1, step)
        differences[dx, dy] = np.abs(crop[::step, ::step] - other).mean()
    best = min(differences, key=lambda shift: (differences[shift], max(map(abs, shift))))
    assert max(map(abs, best)) <= 1 and differences[best] < 10, (best, differences[best])


def draw_classes(folder, classes, side=80):
    """Draw {class: number of pictures}, of one colour a class, each picture different."""
    rng = np.random.default_rng(len(classes))
    for n, (name, count) in enumerate(classes.items()):
        (folder / name).mkdir(parents=True)
        for i in range(count):
            color = np.array([(230, 60, 40), (40, 200, 80), (60, 80, 220), (220, 210, 50)][n % 4])
            pixels = np.clip(color + rng.normal(0, 30, (side, side, 3)), 0, 255).astype("uint8")
            Image.fromarray(pixels).save(folder / name / f"{i:03d}.png")
    return folder


def rows(text):
    """Read the lines on stdout: a list of dicts."""
    return list(csv.DictReader(io.StringIO(text), delimiter="\t", quoting=csv.QUOTE_NONE))


@pytest.fixture
def make_classes(tmp_path):
    return lambda folder="data", **classes: draw_classes(tmp_path / folder, classes)


@pytest.fixture(scope="session")
def scratch_run(tmp_path_factory):
    """Fit the tiny network to three colours, without a connection. Returns (folder, output).

    A green picture lies among the red ones. The environment is a notebook's, with Keras's settings
    of long ago.
    """
    folder, home = (tmp_path_factory.mktemp(name) for name in ("scratch run", "no weights here"))
    draw_classes(folder / "data", {"red": 14, "grün": 14, "unknown": 14})
    green = np.random.default_rng(99).normal((40, 200, 80), 30, (80, 80, 3)).clip(0, 255)
    Image.fromarray(green.astype("uint8")).save(folder / "data" / "red" / "wrong.png")
    settings = '{"image_data_format": "channels_first", "floatx": "float16"}'
    (home / "keras.json").write_text(settings)
    environment = {"HOME": str(home), "KERAS_HOME": str(home)}
    environment |= {"https_proxy": "http://127.0.0.1:9"}
    environment |= {"MPLBACKEND": "module://matplotlib_inline.backend_inline"}
    words = "--image-size 75 --head-epochs 2 --batch-size 16 --rounds 0".split()
    done = run_tiny(folder, "data", "model", *words, **environment)
    assert done.returncode == 0, done.stderr
    return folder, done


@pytest.fixture(scope="session")
def weights_file(tmp_path_factory):
    """Save InceptionV3's random weights without its top, as Keras offers them for download."""
    import h5py
    import keras
    from keras.src.legacy.saving import legacy_h5_format

    keras.utils.set_random_seed(0)
    shape = {"include_top": False, "input_shape": (75, 75, 3)}
    network = keras.applications.InceptionV3(weights=None, **shape)
    path = tmp_path_factory.mktemp("weights") / "random_notop.h5"
    with h5py.File(path, "w") as file:
        legacy_h5_format.save_weights_to_hdf5_group(file, network)
    return path


@pytest.fixture(scope="session")
def tiny_weights(tmp_path_factory):
    import keras
    import tiny_network

    import model

    keras.utils.set_random_seed(0)
    path = tmp_path_factory.mktemp("weights") / "tiny.weights.h5"
    with tiny_network.installed():
        model.backbone_of(model.build_network(2, 75)).save_weights(path)
    return path


@pytest.fixture
def tiny():
    """Let train.py and model.py use the tiny network in this process."""
    import tiny_network

    with tiny_network.installed():
        yield


@pytest.fixture(scope="session")
def drawn_model(tmp_path_factory):
    """Draw faces and a film, and train the tiny network on the faces. Returns the folder."""
    import sample_faces

    folder = tmp_path_factory.mktemp("drawn faces")
    sample_faces.draw_set(folder / "people", 5, 40)
    sample_faces.draw_clip(folder / "film.mp4")
    recipe = "--weights none --image-size 75 --head-epochs 2 --rounds 0 --views 2".split()
    done = run_tiny(folder, "people", "model", *recipe)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="session")
def tagged(drawn_model):
    import tiny_network

    words = "model --source film.mp4 --output tagged.mp4 --no-display".split()
    with tiny_network.installed():
        done = run_here("webcam.py", drawn_model, *words)
    assert done.returncode == 0, done.stderr
    return done


@pytest.fixture
def tag_here(tmp_path, tiny):
    """Return a function that runs webcam.py without a window over the tiny network, in tmp_path."""
    return lambda *words: run_here("webcam.py", tmp_path, *words, "--no-display")


@pytest.fixture(scope="session")
def film(tmp_path_factory):
    """Draw a short film of two people; for tests that need no model."""
    import sample_faces

    path = tmp_path_factory.mktemp("film") / "film.mp4"
    sample_faces.draw_clip(path, seconds=2)
    return path
