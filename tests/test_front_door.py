"""The front door: a machine that lacks something, paths and terminals of all kinds."""

import ast
import contextlib
import ctypes
import hashlib
import http.server
import json
import os
import re
import shlex
import shutil
import subprocess
import sys

import pytest
import sample_faces
from conftest import (
    ROOT,
    SCRIPTS,
    TINY,
    draw_classes,
    error_line,
    limit,
    limited,
    on_terminal,
    rows,
    run_process,
    serve,
    texture,
)
from photos_library import make_library
from PIL import Image

README = (ROOT / "README.md").read_text(encoding="utf-8")
on_linux = pytest.mark.skipif(sys.platform != "linux", reason="sets limits that only Linux has")
on_unix = pytest.mark.skipif(os.name == "nt", reason="needs a Unix system")


def instead_of(folder, module, code):
    """Make `import module` run some code. Returns what to add to the environment."""
    folder.mkdir(exist_ok=True)
    (folder / f"{module}.py").write_text(code)
    return {"PYTHONPATH": str(folder)}


def without_privileges():
    """Let permissions bind the superuser too: drop CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH."""
    for capability in (1, 2):
        ctypes.CDLL(None).prctl(24, capability, 0, 0, 0)


def on_one_core():
    os.sched_setaffinity(0, list(os.sched_getaffinity(0))[:1])


@pytest.fixture
def face(tmp_path):
    sample_faces.draw_set(tmp_path / "drawn", 1, 1)
    return next((tmp_path / "drawn").rglob("*.jpg"))


@pytest.fixture
def library(tmp_path):
    """Draw a Photos library of two people whose names a terminal may not be able to show."""
    tan = Image.new("RGB", (200, 200), "tan")
    photos = [(tan, [(name, (100, 100, 80))]) for name in ("王", "Zoë")]
    return make_library(tmp_path / "Photos Library.photoslibrary", 10, photos)


INSTALL = "pip install -r requirements.txt"
NO_LIBRARY = "libGL.so.1: cannot open shared object file: No such file or directory"
TRAIN = "train.py data model --weights none --image-size 75"
COLLECT = "webcam.py --save-faces faces --source data/a/000.png --no-display"


@pytest.mark.parametrize(
    ("module", "problem", "command", "remedy"),
    [
        ("pillow_heif", "No module named 'pillow_heif'", "collect_apple_photos.py --help", INSTALL),
        ("tqdm", "No module named 'tqdm'", TRAIN, INSTALL),
        ("numpy", "No module named 'numpy'", TRAIN, INSTALL),
        ("PIL", "No module named 'PIL'", COLLECT, INSTALL),
        ("keras", "No module named 'keras'", TRAIN, INSTALL),
        ("tensorflow", "No module named 'tensorflow'", TRAIN, INSTALL),
        ("cv2", "No module named 'cv2'", TRAIN, INSTALL),
        ("cv2", NO_LIBRARY, COLLECT, "apt-get install libgl1"),
    ],
)
def test_what_is_missing_is_told(make_classes, tmp_path, module, problem, command, remedy):
    make_classes(a=4, b=4)
    broken = instead_of(tmp_path / "broken", module, f'raise ImportError("{problem}")')
    script, *arguments = command.split()
    done = run_process(ROOT / script, tmp_path, *arguments, **broken)
    line = error_line(done)
    assert problem in line and remedy in line
    assert sum(not error.startswith("warning: ") for error in done.stderr.splitlines()) == 1


OTHER = """
import runpy, sys
sys.version_info = (3, {minor}, 0)
sys.argv = ["{script}", "--help"]
runpy.run_path("{path}", run_name="__main__")
"""


@pytest.mark.parametrize("minor", [10, 14])
def test_a_python_that_is_too_old_or_too_new(tmp_path, minor):
    for script in SCRIPTS:
        program = OTHER.format(minor=minor, script=script, path=ROOT / script)
        done = run_process("-c", tmp_path, program, PYTHONPATH=str(ROOT))
        assert error_line(done).startswith(f"error: this is Python 3.{minor}: install Python 3.11")
        assert done.stdout == "" and len(done.stderr.splitlines()) == 1
        for path in (ROOT / script, ROOT / "utils.py"):  # must be read before it can say so
            ast.parse(path.read_text(encoding="utf-8"), feature_version=(3, 8))


def test_the_collectors_work_where_there_is_no_tensorflow(tmp_path, library, face):
    """On Intel Macs, say: with the packages that the README names for them."""
    (command,) = re.findall(r"`pip install (numpy [^`]*)`", README)
    absent = {"tensorflow", "keras", "jax", "h5py"}
    assert not absent & set(command.split())
    for module in absent:
        more = instead_of(tmp_path / "absent", module, "raise ImportError(__name__)")
    done = run_process(ROOT / "collect_apple_photos.py", tmp_path, library, "people", **more)
    assert done.returncode == 0 and "2 faces: 2 named" in done.stdout, done.stderr
    words = ["--save-faces", "people/Ann", "--source", face, "--no-display"]
    done = run_process(ROOT / "webcam.py", tmp_path, *words, **more)
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "people" / "Ann").iterdir())) == 1


@on_linux
@pytest.mark.parametrize(
    "command",
    [
        "train.py data model --weights none",
        "collect_apple_photos.py 'Photos Library.photoslibrary' people",
        "webcam.py --no-display --source drawn/Ann/000.jpg --save-faces faces",
        "webcam.py --no-display --source drawn/Ann/000.jpg --save-faces elsewhere --output out.png",
    ],
)
def test_a_folder_that_may_not_be_written(tmp_path, make_classes, library, face, command):
    make_classes(a=4, b=4)
    (tmp_path / "elsewhere").mkdir()
    before = set(tmp_path.rglob("*"))
    tmp_path.chmod(0o555)
    try:
        line = error_line(limited(tmp_path, [without_privileges], *shlex.split(command)))
    finally:
        tmp_path.chmod(0o755)
    assert "Permission denied: check the permissions or choose another folder" in line
    assert not re.search(r"/tmp\w{8}: ", line), "names a file that nobody knows"
    assert {path.parent.name for path in set(tmp_path.rglob("*")) - before} <= {"elsewhere"}


@pytest.mark.slow
@on_linux
def test_a_path_of_all_kinds_a_data_folder_that_is_read_only_and_one_core(tmp_path):
    folder = tmp_path / "Mes photos (été) 王 & co"
    data = draw_classes(folder / "mes données", {"王": 8, "l'été": 8})
    Image.new("RGB", (80, 80)).save(data / "王" / "mine.png")
    for path in [*data.rglob("*"), data]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    (data / "王" / "mine.png").chmod(0)
    shutil.copytree(data / "王", data / "王" / "listed only").chmod(0o444)
    tiny = ([on_one_core, without_privileges], "tests/tiny_network.py")
    words = [*TINY, "--weights", "none", "--rounds", "0"]
    done = limited(folder, *tiny, "train.py", "mes données", "mon modèle", *words)
    assert done.returncode == 0 and "best: round 0" in done.stdout, done.stderr
    (command,) = re.findall(r"^ +python (webcam\.py .*)", done.stderr, re.M)
    assert command == "webcam.py 'mon modèle' --source FOLDER_OF_PHOTOS"  # these are no faces
    assert "王/mine.png: skipped: Permission denied" in done.stderr
    assert "listed only/mine.png: skipped: Permission denied" in done.stderr
    assert "A class `unknown`" in done.stderr and "--threshold" not in done.stderr
    (closed,) = re.findall(r"closed world[^`]*without that folder[^`]*`(--threshold 0)`", README)
    assert sorted(json.loads((folder / "mon modèle-labels.json").read_text())) == ["l'été", "王"]
    words = ["--whole-picture", *closed.split(), "--no-display", "--output", "tagués"]
    done = limited(folder, *tiny, "webcam.py", "mon modèle", "--source", "mes données", *words)
    labels = [row["label"] for row in rows(done.stdout)]
    assert done.returncode == 0, done.stderr
    assert len(labels) == 16 and set(labels) <= {"王", "l'été"}
    assert Image.open(folder / "tagués" / "王" / "000.png").size == (80, 80)


@pytest.mark.slow
@on_linux
def test_faces_are_collected_and_folders_read_in_one_gigabyte(tmp_path):
    photo = texture(0, (4000, 3000))
    album = [(photo, [("Ann", (2000, 1500, 300))])] * 2
    library = make_library(tmp_path / "L.photoslibrary", 10, album)
    for n in range(4):  # PNG is decoded in full
        (tmp_path / "data" / "ab"[n % 2]).mkdir(parents=True, exist_ok=True)
        photo.rotate(90 * n).save(tmp_path / "data" / "ab"[n % 2] / f"{n}.png", compress_level=1)
    for command, expected in (
        (["collect_apple_photos.py", library, "people"], "2 faces: 2 named"),
        (["train.py", "data", "model", "--dry-run"], "images: 2 train, 2 validation"),
        (["webcam.py", "--save-faces", "faces", "--source", "data", "--no-display"], ""),
    ):
        done = limited(tmp_path, [limit("RLIMIT_DATA", 2**30)], *command)
        assert done.returncode == 0 and expected in done.stdout, done.stderr


# Asks for weights at one address after the other, waiting for two seconds at most.
ONE_BY_ONE = """
import json, sys
import features, model, train, utils
features.DOWNLOAD_SECONDS = 2
args = train.parse_arguments(["data", "model", "--weights", "imagenet"])
for address, md5 in json.loads(sys.argv[1]):
    model.BASE = model.BASE._replace(address=address, md5=md5)
    try:
        print("had", features.find_weights(args)[0])
    except utils.UserError as error:
        print(error)
"""
UNAVAILABLE = {"cut": "retrieval incomplete", "wrong": "hash does not match", "missing": "404"}
UNAVAILABLE |= {"stalls": "timed out", "refused": "refused"}


class Downloads(http.server.BaseHTTPRequestHandler):
    """Answers well or badly, as the first folder of the address says."""

    def do_GET(self):
        kind, data = self.path.split("/")[1], self.server.data
        self.server.asked.append(kind)
        if kind == "missing":
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        with contextlib.suppress(OSError):
            self.wfile.write(data if kind in ("good", "wrong") else data[: len(data) // 2])
        if kind == "stalls":
            self.server.ended.wait(60)

    def log_message(self, *_):
        pass


@pytest.mark.slow
def test_weights_that_can_and_cannot_be_downloaded(tmp_path):
    """A good download mends half a file; later no network is needed."""
    kept = tmp_path / "keras" / "models" / "notop.h5"
    kept.parent.mkdir(parents=True)
    kept.write_bytes(bytes(1000))  # of a run that was killed
    environment = {"PYTHONPATH": str(ROOT), "KERAS_HOME": str(tmp_path / "keras"), "no_proxy": "*"}
    with serve(Downloads, data=bytes(10**6), asked=[]) as server:
        place = f"http://127.0.0.1:{server.server_port}"
        places = dict.fromkeys(UNAVAILABLE, place) | {"refused": "http://127.0.0.1:9"}
        wanted = [(f"{places[kind]}/{kind}/{kind}.h5", "0" * 32) for kind in UNAVAILABLE]
        wanted += [(f"{place}/good/notop.h5", hashlib.md5(server.data).hexdigest())] * 2
        done = run_process("-c", tmp_path, ONE_BY_ONE, json.dumps(wanted), **environment)
    lines = [line for line in done.stdout.splitlines() if line.startswith(("had", "--weights"))]
    assert len(lines) == len(wanted), done.stderr
    for line, (address, _), reason in zip(lines, wanted, UNAVAILABLE.values()):
        assert line.startswith("--weights imagenet: cannot be downloaded (") and reason in line
        name = address.rpartition("/")[2]
        assert line.endswith(f"get {address} by hand and give it with --weights {name}")
    assert lines[-2:] == [f"had {kept}"] * 2 and kept.read_bytes() == server.data
    assert server.asked.count("good") == 1


def test_what_leaves_the_process_is_utf_8_whatever_the_locale(tmp_path, library):
    windows = {"PYTHONIOENCODING": "cp1252"}
    done = run_process(ROOT / "collect_apple_photos.py", tmp_path, library, "people", **windows)
    assert done.returncode == 0 and "     1  王\n" in done.stdout and "     1  Zoë\n" in done.stdout
    draw_classes(tmp_path / "data", {"王": 4, "Zoë": 4})
    done = run_process(ROOT / "train.py", tmp_path, "data", "model", "--dry-run", **windows)
    assert done.returncode == 0
    assert "warning: 王: only 4" in done.stderr and "warning: Zoë: only 4" in done.stderr


@on_unix
@pytest.mark.parametrize("closed", [">&-", ">&- 2>&-", "| head -c 1"])
def test_a_closed_output_is_no_mistake(make_classes, tmp_path, closed):
    make_classes(a=4, b=4)
    command = shlex.join([sys.executable, str(ROOT / "train.py"), "data", "m", "--dry-run"])
    options = {"shell": True, "capture_output": True, "text": True}
    done = subprocess.run(f"{command} {closed}", cwd=tmp_path, **options)
    assert done.returncode == 0 and "Traceback" not in done.stderr


@on_unix
@pytest.mark.parametrize(("encoding", "shown"), [("cp1252", b"Zo\xeb"), ("ascii", b"Zo\\xeb")])
def test_a_terminal_that_lacks_a_character_gets_an_escape(tmp_path, library, encoding, shown):
    def run(script, *words):
        command = [sys.executable, ROOT / script, *words]
        code, text = on_terminal(command, tmp_path, PYTHONIOENCODING=encoding)
        assert code == 0, text
        return text

    text = run("collect_apple_photos.py", library, "people")
    assert b"     1  \\u738b\r\n" in text and b"     1  " + shown in text
    draw_classes(tmp_path / "data", {"王": 4, "Zoë": 4})
    text = run("train.py", "data", "model", "--dry-run")
    assert b"warning: \\u738b: only 4 pictures" in text and b"warning: " + shown in text
    for script in SCRIPTS if encoding == "ascii" else ():
        run(script, "--help")


HEAVY = """
import importlib, sys
script, *heavy = sys.argv[1:]
sys.argv[1:] = ["--help"]
try:
    importlib.import_module(script).main()
finally:
    print(sorted({*heavy} & {*sys.modules}))
"""


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_loads_nothing_heavy(tmp_path, script):
    words = [script.removesuffix(".py"), *"tensorflow keras jax av scipy matplotlib".split()]
    done = run_process("-c", tmp_path, HEAVY, *words, PYTHONPATH=str(ROOT))
    assert done.stdout.startswith("usage: ") and done.stdout.splitlines()[-1] == "[]", done.stderr
