"""The front door: a machine that lacks something, names of all kinds, and the README's commands run as they stand."""

import contextlib
import ctypes
import hashlib
import http.server
import importlib.util
import json
import os
import re
import shlex
import shutil
import socket
import ssl
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import sample_faces
from conftest import FAST, ROOT, draw_classes, rows, run_process
from photos_library import make_library
from PIL import Image
from test_readme import assert_shown
from test_whole_way import draw_album

README = (ROOT / "README.md").read_text(encoding="utf-8")
SCRIPTS = ("train.py", "webcam.py", "collect_apple_photos.py")

on_linux = pytest.mark.skipif(sys.platform != "linux", reason="sets limits that only Linux has")
on_unix = pytest.mark.skipif(os.name == "nt", reason="needs a Unix system")
needs_jax = pytest.mark.skipif(
    importlib.util.find_spec("jax") is None, reason="needs `pip install jax`"
)

# train.py itself, with other constants.
CHANGED = """
import sys
sys.path.insert(0, {root!r})
import train, model, utils
{change}
if __name__ == "__main__":
    utils.run(train.main)
"""

# OpenCV itself, with something changed.
CHANGED_CV2 = """
import sys
from pathlib import Path
sys.path.remove(str(Path(__file__).parent))
del sys.modules["cv2"]
import cv2
{change}
"""


def told(done):
    """Return the last line on stderr, having checked that it is the one line about an expected failure."""
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    lines = done.stderr.splitlines()
    assert [line for line in lines if line.startswith("error: ")] == lines[-1:], done.stderr
    return lines[-1]


def changed_train(path, change):
    """Write train.py with a change to `path`."""
    path.write_text(CHANGED.format(root=str(ROOT), change=change), encoding="utf-8")
    return path


def instead_of(folder, module, code):
    """Make `import module` run some code. Returns what to add to the environment."""
    folder.mkdir(exist_ok=True)
    (folder / f"{module}.py").write_text(code, encoding="utf-8")
    return {"PYTHONPATH": str(folder)}


def limited(cwd, steps, script, *arguments, **environment):
    """Run a script in a process that first takes the given steps, which limit it."""
    command = [sys.executable, str(ROOT / script), *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, encoding="utf-8", env=os.environ | environment,
                          preexec_fn=lambda: [step() for step in steps])  # fmt: skip


def without_privileges():
    """Let permissions of files bind the superuser too: drop CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH."""
    for capability in (1, 2):
        ctypes.CDLL(None).prctl(24, capability, 0, 0, 0)


def on_one_core():
    os.sched_setaffinity(0, list(os.sched_getaffinity(0))[:1])


def in_one_gigabyte():
    import resource

    resource.setrlimit(resource.RLIMIT_DATA, (2**30, 2**30))


@pytest.fixture
def face(tmp_path):
    """Draw a picture of one person."""
    sample_faces.draw_set(tmp_path / "drawn", 1, 1)
    return next((tmp_path / "drawn").rglob("*.jpg"))


@pytest.fixture
def library(tmp_path):
    """Draw a Photos library of two people whose names a terminal may not be able to show."""
    photos = [
        (Image.new("RGB", (200, 200), "tan"), [(name, (100, 100, 80))]) for name in ("王", "Zoë")
    ]
    return make_library(tmp_path / "Photos Library.photoslibrary", 10, photos)


# ---------------------------------------------------------------- what a machine lacks


INSTALL = "pip install -r requirements.txt"
NO_LIBRARY = "libGL.so.1: cannot open shared object file: No such file or directory"
TRAIN = ("train.py", "data", "model", "--weights", "none", "--image-size", "75")
COLLECT = ("webcam.py", "--save-faces", "faces", "--source", "data/a/000.png", "--no-display")


@pytest.mark.parametrize(("module", "problem", "command", "remedy"), [
    *[("pillow_heif", "No module named 'pillow_heif'", (script, "--help"), INSTALL) for script in SCRIPTS],
    ("tqdm", "No module named 'tqdm'", TRAIN, INSTALL),
    ("keras", "No module named 'keras'", TRAIN, INSTALL),
    ("tensorflow", "No module named 'tensorflow'", TRAIN, INSTALL),
    ("cv2", "No module named 'cv2'", COLLECT, INSTALL),
    ("cv2", NO_LIBRARY, COLLECT, "apt-get install libgl1"),
    ("cv2", NO_LIBRARY, TRAIN, "apt-get install libgl1"),
])  # fmt: skip
def test_a_package_or_a_library_that_is_missing(
    make_classes, tmp_path, module, problem, command, remedy
):
    make_classes(a=4, b=4)
    broken = instead_of(tmp_path / "broken", module, f'raise ImportError("{problem}")')
    script, *arguments = command
    done = run_process(ROOT / script, tmp_path, *arguments, **broken)
    line = told(done)
    assert problem in line and remedy in line
    assert sum(not error.startswith("warning: ") for error in done.stderr.splitlines()) == 1


@pytest.mark.parametrize("name", ["3.6", "3.8", "3.9", "3.10", "3.14"])
def test_a_python_that_is_too_old_or_too_new(tmp_path, name):
    versions = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"), "versions")
    found = [*versions.glob(f"{name}.*/bin/python"), shutil.which(f"python{name}")]
    ask = "import sys; print('%d.%d' % sys.version_info[:2])"
    found = [
        p
        for p in found
        if p and subprocess.run([p, "-c", ask], capture_output=True).stdout.decode()[:-1] == name
    ]
    if not found:
        pytest.skip(f"there is no Python {name} here")
    for script in SCRIPTS:
        done = subprocess.run(
            [found[0], ROOT / script, "--help"], cwd=tmp_path, capture_output=True, encoding="utf-8"
        )
        assert told(done).startswith(f"error: this is Python {name}: install Python 3.11")
        assert done.stdout == "" and len(done.stderr.splitlines()) == 1


def test_the_collectors_work_where_there_is_no_tensorflow(tmp_path, library, face):
    """On Intel Macs, say: with the packages that the README names for them."""
    (command,) = re.findall(r"`pip install (numpy [^`]*)`", README)
    absent = {"tensorflow", "keras", "jax", "h5py"}
    assert not absent & set(command.split())
    for module in absent:
        environment = instead_of(
            tmp_path / "absent", module, f"raise ImportError('No module named {module}')"
        )
    done = run_process(ROOT / "collect_apple_photos.py", tmp_path, library, "people", **environment)
    assert done.returncode == 0 and "2 faces: 2 named" in done.stdout, done.stderr
    done = run_process(ROOT / "webcam.py", tmp_path, "--save-faces", "people/Ann", "--source", face, "--no-display",
                       **environment)  # fmt: skip
    assert done.returncode == 0 and len(list((tmp_path / "people" / "Ann").iterdir())) == 1, (
        done.stderr
    )


def test_opencv_without_windows_is_a_warning(tmp_path, face):
    """As with opencv-python-headless."""
    change = "def namedWindow(*_):\n    raise cv2.error('not implemented: rebuild with GTK')\ncv2.namedWindow = namedWindow"
    headless = instead_of(tmp_path / "headless", "cv2", CHANGED_CV2.format(change=change))
    done = run_process(
        ROOT / "webcam.py", tmp_path, "--save-faces", "faces", "--source", face, **headless
    )
    assert done.returncode == 0 and len(list((tmp_path / "faces").iterdir())) == 1, done.stderr
    assert done.stderr.startswith("warning: no window can be opened")


def test_cameras_that_do_open_are_named_where_the_wanted_one_does_not(tmp_path):
    sample_faces.draw_clip(tmp_path / "film.mp4", seconds=1)
    film = str(tmp_path / "film.mp4")
    change = f"real = cv2.VideoCapture\ncv2.VideoCapture = lambda n, *_: real({film!r} if n in (1, 3) else '')"
    cameras = instead_of(tmp_path / "cameras", "cv2", CHANGED_CV2.format(change=change))
    done = run_process(
        ROOT / "webcam.py", tmp_path, "--save-faces", "faces", "--no-display", **cameras
    )
    line = told(done)
    assert line.startswith("error: camera 0: ")
    assert re.search(r"\b1\b.*\b3\b", line.removeprefix("error: camera 0: ")), line


@on_linux
@pytest.mark.parametrize("command", [
    ("train.py", "data", "model", "--weights", "none"),
    ("collect_apple_photos.py", "Photos Library.photoslibrary", "people"),
    ("webcam.py", "--save-faces", "faces", "--source", "FACE", "--no-display"),
    ("webcam.py", "--save-faces", "elsewhere", "--source", "FACE", "--no-display", "--output", "tagged.png"),
    ("tests/sample_faces.py", "people"),
])  # fmt: skip
def test_a_folder_that_may_not_be_written(tmp_path, make_classes, library, face, command):
    make_classes(a=4, b=4)
    (tmp_path / "elsewhere").mkdir()
    before = sorted(tmp_path.rglob("*"))
    tmp_path.chmod(0o555)
    try:
        script, *arguments = (str(face) if word == "FACE" else word for word in command)
        line = told(limited(tmp_path, [without_privileges], script, *arguments))
    finally:
        tmp_path.chmod(0o755)
    assert "Permission denied: check the permissions or choose another folder" in line
    assert not re.search(r"/tmp\w{8}: ", line), "names a file that nobody knows"
    assert [
        path for path in sorted(tmp_path.rglob("*")) if path.parent.name != "elsewhere"
    ] == before


@pytest.mark.slow
@on_linux
def test_a_path_of_all_kinds_a_data_folder_that_is_read_only_and_one_core(tmp_path, weights_file):
    folder = tmp_path / "Mes photos (été) 王 & co"
    data = draw_classes(folder / "mes données", {"王": 8, "l'été": 8})
    for path in [*data.rglob("*"), data]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    limits = [on_one_core, without_privileges]
    done = limited(
        folder, limits, "train.py", "mes données", "mon modèle", *FAST, "--weights", weights_file
    )
    assert done.returncode == 0 and "best: round 0" in done.stdout, done.stderr
    (command,) = re.findall(r"^ +python (webcam\.py .*)", done.stderr, re.M)
    assert command == "webcam.py 'mon modèle' --source FOLDER_OF_PHOTOS"  # these are no faces
    assert "A class `unknown`" in done.stderr and "--threshold" not in done.stderr
    (closed,) = re.findall(r"closed world[^`]*without that folder[^`]*`(--threshold 0)`", README)
    assert sorted(json.loads((folder / "mon modèle-labels.json").read_text())) == ["l'été", "王"]
    done = limited(folder, limits, "webcam.py", "mon modèle", "--source", "mes données", "--whole-picture",
                   *closed.split(), "--no-display", "--output", "tagués")  # fmt: skip
    labels = [row["label"] for row in rows(done.stdout)]
    assert done.returncode == 0 and len(labels) == 16 and set(labels) <= {"王", "l'été"}, (
        done.stderr
    )
    assert Image.open(folder / "tagués" / "王" / "000.png").size == (80, 80)


@pytest.mark.slow
@on_linux
def test_faces_are_collected_and_folders_read_in_one_gigabyte(tmp_path):
    coarse = Image.fromarray(np.random.default_rng(0).integers(0, 255, (12, 16, 3)).astype("uint8"))
    photo = coarse.resize((4000, 3000), Image.Resampling.BICUBIC)
    library = make_library(
        tmp_path / "L.photoslibrary", 10, [(photo, [("Ann", (2000, 1500, 300))])] * 4
    )
    done = limited(tmp_path, [in_one_gigabyte], "collect_apple_photos.py", library, "people")
    assert done.returncode == 0 and "4 faces: 4 named" in done.stdout, done.stderr
    for n in range(8):  # PNG is decoded in full
        (tmp_path / "data" / "ab"[n % 2]).mkdir(parents=True, exist_ok=True)
        photo.rotate(45 * n).save(tmp_path / "data" / "ab"[n % 2] / f"{n}.png", compress_level=1)
    done = limited(tmp_path, [in_one_gigabyte], "train.py", "data", "model", "--dry-run")
    assert done.returncode == 0 and done.stdout.startswith("images: 6 train, 2 validation"), (
        done.stderr
    )
    done = limited(
        tmp_path,
        [in_one_gigabyte],
        "webcam.py",
        "--save-faces",
        "faces",
        "--source",
        "data",
        "--no-display",
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("error", [
    "MemoryError()",
    "__import__('tensorflow').errors.ResourceExhaustedError(None, None, 'OOM when allocating a tensor')",
])  # fmt: skip
def test_too_little_memory_for_the_network_is_one_line(tmp_path, error):
    script = changed_train(
        tmp_path / "short.py", f"def train_now(args):\n    raise {error}\ntrain.train = train_now"
    )
    (tmp_path / "data").mkdir()
    line = told(run_process(script, tmp_path, "data", "model"))
    assert line.startswith("error: out of memory")


# ---------------------------------------------------------------- the weights


class Downloads(http.server.BaseHTTPRequestHandler):
    """Answers well or badly, as the first folder of the address says."""

    def do_GET(self):
        kind, data = self.path.split("/")[1], self.server.data
        self.server.asked.append(kind)
        if kind == "missing":
            self.send_error(404)
        elif kind == "silent":
            self.server.ended.wait(60)
        else:
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            with contextlib.suppress(OSError):
                self.wfile.write(data[: len(data) // 2] if kind in ("cut", "stalls") else data)
            if kind == "stalls":
                self.server.ended.wait(60)

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    """Start a server of downloads; its `data` are a megabyte that is no weights."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Downloads)
    server.data, server.asked, server.ended, server.daemon_threads = (
        bytes(10**6),
        [],
        threading.Event(),
        True,
    )
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.ended.set()
    server.shutdown()
    server.server_close()


def download(folder, address, md5, *options, data="data"):
    """Train with weights from elsewhere, waiting for two seconds at most, and a folder for Keras that is new."""
    change = (
        f"model.BASE = model.BASE._replace(address={address!r}, md5={md5!r})\n"
        "train.DOWNLOAD_SECONDS = 2"
    )
    script = changed_train(folder / "elsewhere.py", change)
    return run_process(
        script,
        folder,
        data,
        "model",
        *FAST,
        *options,
        KERAS_HOME=str(folder / "keras"),
        no_proxy="*",
    )


ONE_BY_ONE = """
import sys
sys.path.insert(0, {root!r})
import train, model, utils
train.DOWNLOAD_SECONDS = 2
for address in {addresses!r}:
    model.BASE = model.BASE._replace(address=address, md5="0" * 32)
    try:
        utils.run(train.main)
    except SystemExit as end:
        print("ended with", end.code, file=sys.stderr)
"""
UNAVAILABLE = {"cut": "retrieval incomplete", "wrong": "hash does not match", "silent": "timed out",
               "stalls": "timed out", "missing": "404", "refused": "refused"}  # fmt: skip


@pytest.mark.slow
def test_weights_that_cannot_be_downloaded(make_classes, tmp_path, server):
    make_classes(a=4, b=4)
    ports = {"refused": 9}
    addresses = [
        f"http://127.0.0.1:{ports.get(kind, server.server_port)}/{kind}/{kind}.h5"
        for kind in UNAVAILABLE
    ]
    script = tmp_path / "one_by_one.py"
    script.write_text(ONE_BY_ONE.format(root=str(ROOT), addresses=addresses), encoding="utf-8")
    done = run_process(script, tmp_path, "data", "model", *FAST, "--weights", "imagenet",
                       KERAS_HOME=str(tmp_path / "keras"), no_proxy="*")  # fmt: skip
    ends = re.findall(r"^(.*)\nended with (.*)$", done.stderr, re.M)
    assert len(ends) == len(UNAVAILABLE) and "Traceback" not in done.stderr, done.stderr
    for (line, code), address, reason in zip(ends, addresses, UNAVAILABLE.values()):
        assert (
            code == "1"
            and line.startswith("error: --weights imagenet: cannot be downloaded (")
            and reason in line
        )
        name = address.rpartition("/")[2]
        assert line.endswith(f"get {address} by hand and give it with --weights {name}")
    assert not list(tmp_path.glob("model*"))


def test_weights_from_a_server_with_a_certificate_of_its_own(make_classes, tmp_path, server):
    make_classes(a=4, b=4)
    present_a_certificate_of_its_own(server, tmp_path)
    address = f"https://localhost:{server.server_port}/certificate/notop.h5"
    assert "certificate verify failed" in told(
        download(tmp_path, address, "0" * 32, "--weights", "imagenet")
    )


def present_a_certificate_of_its_own(server, folder):
    """Make a server speak TLS with a certificate that nobody has signed."""
    if not shutil.which("openssl"):
        pytest.skip("openssl is not here to make a certificate")
    command = "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=localhost -keyout key.pem -out cert.pem"
    subprocess.run(command.split(), cwd=folder, check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "cert.pem", folder / "key.pem")
    server.socket = context.wrap_socket(server.socket, server_side=True)


@pytest.mark.slow
def test_a_good_download_mends_half_a_file_and_later_no_network_is_needed(
    make_classes, tmp_path, server, weights_file
):
    make_classes(a=4, b=4)
    server.data = weights_file.read_bytes()
    md5 = hashlib.md5(server.data).hexdigest()
    address = f"http://127.0.0.1:{server.server_port}/good/notop.h5"
    kept = tmp_path / "keras" / "models" / "notop.h5"
    kept.parent.mkdir(parents=True)
    kept.write_bytes(server.data[:1000])  # of a run that was killed
    done = download(tmp_path, address, md5)
    assert done.returncode == 0 and "best: round 0" in done.stdout, done.stderr
    assert kept.read_bytes() == server.data
    asked = len(server.asked)
    (tmp_path / "empty").mkdir()  # which is read afterwards
    done = download(tmp_path, address, md5, "--weights", "imagenet", data="empty")
    assert "fewer than two classes" in told(done) and len(server.asked) == asked > 0


# ---------------------------------------------------------------- names and terminals


def on_terminal(command, cwd, **environment):
    """Run a command on a terminal. Returns its exit code and all that it wrote, bytes."""
    import pty

    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        command, cwd=cwd, env=os.environ | environment, stdout=theirs, stderr=theirs
    )
    os.close(theirs)
    text = b""
    with contextlib.suppress(OSError):  # what Linux answers when the other end is closed
        while part := os.read(ours, 4096):
            text += part
    os.close(ours)
    return process.wait(), text


WINDOWS = {"PYTHONIOENCODING": "cp1252"}


def test_what_leaves_the_process_is_utf_8_whatever_the_locale(tmp_path, library):
    done = run_process(
        ROOT / "collect_apple_photos.py", tmp_path, library, "people", **WINDOWS
    )  # read as UTF-8
    assert done.returncode == 0 and "     1  王\n" in done.stdout and "     1  Zoë\n" in done.stdout
    draw_classes(tmp_path / "data", {"王": 4, "Zoë": 4})
    done = run_process(ROOT / "train.py", tmp_path, "data", "model", "--dry-run", **WINDOWS)
    assert (
        done.returncode == 0
        and "warning: 王: only 4 pictures" in done.stderr
        and "Zoë: only" in done.stderr
    )


@on_unix
def test_a_closed_output_is_no_mistake(tmp_path):
    draw_classes(tmp_path / "data", {"a": 4, "b": 4})
    command = (
        f"{shlex.quote(sys.executable)} {shlex.quote(str(ROOT / 'train.py'))} data m --dry-run"
    )
    for closed in (">&-", ">&- 2>&-"):
        done = subprocess.run(
            f"{command} {closed}", shell=True, cwd=tmp_path, capture_output=True, text=True
        )
        assert done.returncode == 0 and "Traceback" not in done.stderr


@on_unix
@pytest.mark.parametrize(("encoding", "shown"), [("cp1252", b"Zo\xeb"), ("ascii", b"Zo\\xeb")])
def test_a_terminal_that_lacks_a_character_gets_an_escape(tmp_path, library, encoding, shown):
    environment = WINDOWS | {"PYTHONIOENCODING": encoding}
    command = [sys.executable, ROOT / "collect_apple_photos.py", library, "people"]
    code, text = on_terminal(command, tmp_path, **environment)
    assert code == 0 and b"     1  \\u738b\r\n" in text and b"     1  " + shown in text
    draw_classes(tmp_path / "data", {"王": 4, "Zoë": 4})
    code, text = on_terminal(
        [sys.executable, ROOT / "train.py", "data", "model", "--dry-run"], tmp_path, **environment
    )
    assert (
        code == 0 and b"warning: \\u738b: only 4 pictures" in text and b"warning: " + shown in text
    )
    for script in SCRIPTS:
        assert (
            on_terminal([sys.executable, ROOT / script, "--help"], tmp_path, **environment)[0] == 0
        )


# ---------------------------------------------------------------- the README's commands


def fenced_blocks():
    """Return the README's fenced blocks as (language, text)."""
    found, lines = [], iter(README.splitlines())
    for line in lines:
        if line.startswith("```"):
            block = []
            while (inner := next(lines)) != "```":
                block.append(inner)
            found.append((line[3:], "\n".join(block)))
    return found


COMMANDS = [
    text for language, text in fenced_blocks() if not language and re.search("^python ", text, re.M)
]
SHELL = [text for language, text in fenced_blocks() if language == "sh"]


def test_no_block_with_a_command_is_left_out():
    """What is run below: all blocks with a line that begins with `python`, and those marked as `sh`."""
    assert len(COMMANDS) >= 5 and len(SHELL) >= 2
    others = [
        text
        for language, text in fenced_blocks()
        if language not in ("python", "text") and text not in COMMANDS + SHELL
    ]
    words = r"^\s*(\$|\.venv|python|pip|export|set|apt|apt-get|brew|source|cd|mkdir|mv|cp|rm|rmdir|\.)\s"
    assert [line for text in others for line in text.splitlines() if re.match(words, line)] == []


def test_the_lines_that_set_up_the_environment(tmp_path):
    """The commands themselves, but nothing is downloaded: the packages must be those of this environment."""
    shutil.copy(ROOT / "requirements.txt", tmp_path)
    for line in "\n".join(SHELL).splitlines():
        program, *words = shlex.split(line)
        if program == "python3":
            command, cwd = [sys.executable, *words, "--without-pip"], tmp_path
        elif program == ".venv/bin/pip":
            command, cwd = (
                [sys.executable, "-m", "pip", *words, "--dry-run", "--no-index"],
                tmp_path,
            )
        elif words[:2] == ["-m", "pytest"]:
            command, cwd = [sys.executable, *words, "--collect-only"], ROOT
        elif program == "uv":  # the same programs, see test_readme.py
            continue
        else:  # run by test_the_first_command_on_a_drawn_set
            assert (ROOT / words[0]).is_file() and program == ".venv/bin/python", line
            continue
        done = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
        if "No matching distribution" in done.stderr:
            pytest.skip(done.stderr.splitlines()[-1])
        assert done.returncode == 0, (line, done.stderr, done.stdout[-500:])
    assert (tmp_path / ".venv" / "pyvenv.cfg").is_file()


QUICK = """
import hashlib, pathlib
train.FINE_TUNING = dict(head_epochs=1, rounds=1, round_epochs=1, patience=1, views=1, batch_size=32)
md5 = hashlib.md5(pathlib.Path({weights!r}).read_bytes()).hexdigest()
model.BASE = model.BASE._replace(md5=md5)
"""

PLAYED = """
real = cv2.VideoCapture
def VideoCapture(source, *more):
    is_live = isinstance(source, int) or source.startswith("rtsp")
    return real({film!r}) if is_live else real(source, *more)
cv2.VideoCapture = VideoCapture
"""


@pytest.fixture
def clone(tmp_path, weights_file):
    """Make a folder in which the README's commands run as they stand. Returns a function that runs shell lines in it.

    `python` is this one, train.py has a recipe of seconds and random weights, kept as if they had been downloaded,
    cameras and streams play a film, and there is no display.
    """
    folder = tmp_path / "clone"
    (folder / "bin").mkdir(parents=True)
    (folder / "bin" / "python").write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    (folder / "bin" / "python").chmod(0o755)
    for name in ("webcam.py", "collect_apple_photos.py", "haarcascade_frontalface_default.xml"):
        (folder / name).symlink_to(ROOT / name)
    changed_train(folder / "train.py", QUICK.format(weights=str(weights_file)))
    kept = folder / "keras" / "models"
    kept.mkdir(parents=True)
    shutil.copy(weights_file, kept / "inception_v3_weights_tf_dim_ordering_tf_kernels_notop.h5")
    sample_faces.draw_clip(folder / "played.mp4", seconds=2)
    change = PLAYED.format(film=str(folder / "played.mp4"))
    environment = {
        key: value for key, value in os.environ.items() if key not in ("DISPLAY", "WAYLAND_DISPLAY")
    }
    environment |= instead_of(folder / "played", "cv2", CHANGED_CV2.format(change=change))
    environment |= {"HOME": str(folder), "KERAS_HOME": str(kept.parent)}
    environment |= {"https_proxy": "http://127.0.0.1:9", "no_proxy": "127.0.0.1"}
    environment["PATH"] = f"{folder / 'bin'}{os.pathsep}{environment['PATH']}"

    def start(lines):
        lines = re.sub(r"rtsp://\S+", (folder / "played.mp4").as_uri(), lines)
        return subprocess.Popen(["sh", "-e", "-c", lines], cwd=folder, env=environment, encoding="utf-8",
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # fmt: skip

    start.folder = folder
    return start


def bring_what_is_needed(block, folder, request):
    """Draw what the commands of a block take for granted; a model comes from the fixture that trains one."""
    train = re.search(r"train\.py (\w+) \w+(.*)", block)
    if "Photos Library.photoslibrary" in block:
        unnamed = [(image, [(None, box)]) for image, [(_, box)] in draw_album(3, 8)[2::3]]
        album = draw_album(2, 21) + unnamed
        make_library(folder / "Pictures" / "Photos Library.photoslibrary", 10, album)
    elif train and "export " not in block and train[1] == "people":
        if "people/" not in block:  # else the block makes them
            sample_faces.draw_set(folder / "people", 3, 12)
    elif train:
        classes = {"pets": {"cat": 30, "dog": 30}, "held_out": {"red": 4, "grün": 4}}
        draw_classes(folder / train[1], classes.get(train[1], {"a": 12, "b": 12}))
    for name in re.findall(r"--source (\w+\.mp4)", block):
        people = {"ann": (0,), "ben": (1,)}.get(name.partition("_")[0], (0, 1))
        sample_faces.draw_clip(folder / name, people, 2, seed=len(name))
    if "photos_to_name" in block:  # a cat and a dog, as draw_classes draws them
        (folder / "photos_to_name").mkdir()
        for n, colour in enumerate([(230, 60, 40), (40, 200, 80)], 1):
            pixels = np.random.default_rng(n).normal(colour, 30, (240, 320, 3)).clip(0, 255)
            photo = Image.fromarray(pixels.astype("uint8"))
            photo.save(folder / "photos_to_name" / f"IMG_000{n}.jpg", quality=95)
    elif photos := re.search(r"--source (photos\w*)", block):
        sample_faces.draw_set(folder / photos[1], 2, 2)
    uses, makes = re.search(r"webcam\.py model|--evaluate", block), re.search(TRAINS, block, re.M)
    if uses and not (makes and makes.start() < uses.start()):
        for path in request.getfixturevalue("scratch_run")[0].glob("model*"):
            shutil.copy(path, folder)


TRAINS = r"train\.py \w+ \w+(?: --group-by-folder)?$"


def named(block):
    """Return a block as a parameter, named by its first line; those that train, or load a model often, are long."""
    slow = re.search(TRAINS + r"|(py model[^`]*){2}", block, re.M)
    return pytest.param(
        block, id=block.split("\n")[0][:60], marks=[pytest.mark.long] if slow else []
    )


# A line break inside backquotes is a space, as Markdown has it.
INLINE = [
    re.sub(r"\s+", " ", command) for command in re.findall(r"(?<!`)`(python\s[^`]*)`(?!`)", README)
]


@pytest.mark.slow
@on_unix
@pytest.mark.parametrize(
    "block",
    [
        named(b)
        for b in COMMANDS + INLINE
        if "export " not in b and "--by-name" not in b  # the latter: see test_readme.py
    ],
)
def test_the_commands_of_a_block(clone, request, block):
    bring_what_is_needed(block, clone.folder, request)
    process = clone(block)
    output, errors = process.communicate()
    assert process.returncode == 0, errors
    assert "from scratch" not in errors and "Traceback" not in errors
    headers = re.findall(r"^(?:frame\ttime\ttrack|file\tface|file\tframe)\t", output, re.M)
    assert len(headers) == len(re.findall(r"webcam\.py(?!.*(?:>|--events|--by-name))", block))
    assert output.count("best: ") == len(re.findall(TRAINS, block, re.M))
    assert output.count("evaluate: ") == block.count("--evaluate")
    assert len(re.findall(r"^\d+ faces: ", output, re.M)) == block.count("collect_apple_photos.py")
    for name in re.findall(r"--output (\S+)|--save-faces (\S+)", block):
        path = clone.folder / "".join(name)
        assert list(path.rglob("*.jpg")) if path.is_dir() else path.stat().st_size > 1000, path
    files = re.findall(r"> (\S+)", block)
    written = [(clone.folder / name).read_text(encoding="utf-8") for name in files]
    assert_shown(block, "\n".join([output, errors, *written]))


@on_unix
@needs_jax
@pytest.mark.long
def test_the_commands_for_several_machines(clone, request):
    (commands,) = [block for block in COMMANDS if "export " in block]
    bring_what_is_needed(commands, clone.folder, request)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    block, count = re.subn(r"(ADDRESSES=).*", rf"\g<1>{address}", commands)
    assert count == 1
    processes = [clone(re.sub(r"(PROCESS_ID=)0", rf"\g<1>{n}", block)) for n in range(2)]
    outputs = [process.communicate() for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert ["best: round" in output for output, _ in outputs] == [True, False]
    assert_shown(commands, outputs[0][0])


@pytest.mark.slow
@on_unix
def test_the_lines_for_small_classes(tmp_path):
    people = draw_classes(
        tmp_path / "people", {"Ann": 10, "Ben": 10, "small_class": 4, "unknown": 6}
    )
    lines = re.findall(r"`((?:mv|rmdir) [^`]*)`", README)
    assert [line.split()[0] for line in lines] == ["mv", "rmdir"]
    (people / "unknown" / "000.png").rename(people / "unknown" / "stranger.png")
    for n, path in enumerate(sorted((people / "small_class").iterdir())):
        path.rename(path.with_name(f"small {n}.png"))
    subprocess.run("\n".join(lines), shell=True, cwd=tmp_path, check=True)
    assert not (people / "small_class").exists() and len(list((people / "unknown").iterdir())) == 10
    done = run_process(ROOT / "train.py", tmp_path, "people", "model", "--dry-run")
    assert done.returncode == 0 and "24 train, 6 validation, 3 classes" in done.stdout, done.stderr
