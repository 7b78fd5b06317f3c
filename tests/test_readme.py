"""The README never lies: its options exist and are all there, its commands run as they stand."""

import csv
import functools
import importlib.util
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import tomllib
from types import SimpleNamespace

import docs_pictures
import numpy as np
import pytest
import sample_faces
import tagged_photos
from conftest import ROOT, SCRIPTS, draw_classes, run_here, texture
from photos_library import make_library
from PIL import Image
from test_whole_way import draw_album

import imaging  # noqa: F401 - so that Pillow writes HEIC
import regions

README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)\n```$", README, re.M | re.S)  # (language, text)
COMMANDS = [text for kind, text in BLOCKS if not kind and re.search("^python ", text, re.M)]
SHELL = [text for kind, text in BLOCKS if kind == "sh"]
FIRST = next(text for text in SHELL if ".venv/bin/python train.py" in text)
SEVERAL = next(text for text in COMMANDS if "export " in text)  # machines
# A line break inside backquotes is a space, as Markdown has it.
INLINE = [re.sub(r"\s+", " ", text) for text in re.findall(r"(?<!`)`(python\s[^`]*)`(?!`)", README)]
OPTION = r"(?<![\w-])--[a-z][a-z0-9-]+"
TRAINS = r"train\.py \w+ \w+(?: --group-by-folder)?$"
on_unix = pytest.mark.skipif(os.name == "nt", reason="needs a Unix system")


SHOWN, block = {}, None  # {block of commands: lines that the README shows below it}
for kind, text in BLOCKS:
    if kind == "text":
        SHOWN.setdefault(block, []).extend(text.splitlines())
    elif text in COMMANDS + SHELL:
        block = text


def assert_shown(block, printed):
    """Assert that a block printed the lines that the README shows below it; `…` is anything."""
    lines = [" ".join(line.split()) for line in printed.splitlines()]
    for shown in SHOWN.get(block, []):
        parts = " ".join(shown.split()).split("…")
        pattern = re.compile(".+".join(map(re.escape, parts)))
        assert any(pattern.fullmatch(line) for line in lines), f"not printed: {shown}\n{printed}"


def test_below_every_block_of_commands_stands_what_it_prints():
    assert set(SHOWN) == {*COMMANDS, FIRST}


@pytest.mark.parametrize("script", [*SCRIPTS, "tests/sample_faces.py"])
def test_uv_gets_the_packages_of_requirements_txt(script):
    text = (ROOT / script).read_text(encoding="utf-8")
    (header,) = re.findall(r"\A# /// script\n(.*?)^# ///$", text, re.M | re.S)
    header = tomllib.loads(re.sub("^# ?", "", header, flags=re.M))
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    assert header["dependencies"] == [line.partition("#")[0].strip() for line in lines]
    assert header["requires-python"] == ">=3.11,<3.14"  # utils.py refuses others


def test_all_ways_to_start_run_the_same_commands():
    """And `.ci/run` sets up the environment by the README's own lines."""
    install, packages, *commands = FIRST.splitlines()
    assert SHELL[0].replace("uv run ", ".venv/bin/python ").splitlines() == commands
    assert SHELL[-1].splitlines()[:-1] == [install, f"{packages} pytest jax"]


def test_every_option_has_a_default_and_is_in_the_readme_where_all_exist(tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "1000")  # no option is divided between two lines
    known = set()
    for script in SCRIPTS:
        done = run_here(script, tmp_path, "--help")
        assert done.returncode == 0 and f"python {script} " in " ".join(done.stdout.split())
        lines = re.findall(r"^  --.*", re.sub(r"\n {5,}", " ", done.stdout), re.M)
        assert len(lines) >= 6 and all("(default: " in line for line in lines)
        known |= set(re.findall(OPTION, done.stdout)) - {"--help"}
    named = set(re.findall(OPTION, README)) - {"--people", "--clip", "--quiet", "--help"}
    assert named == known


def test_every_file_that_the_table_names_is_made(scratch_run):
    table = README.partition("## What comes out")[2].partition("**Reading")[0]
    names = set(re.findall(r"`([\w.-]+\.\w+)`", table)) - {"001.png"}  # this run has one round
    assert len(names) >= 8
    assert {name for name in names if not (scratch_run[0] / name).exists()} == set()


def test_files_and_pictures_that_the_readme_points_to_are_in_the_repository():
    for name in re.findall(r"\]\(([\w./-]+)\)", README):
        assert (ROOT / name).is_file(), name
    pictures = {ROOT / name for name in re.findall(r"!\[[^\]]*\]\(([\w./-]+)\)", README)}
    assert pictures == {path for path in (ROOT / "docs").iterdir() if path.suffix != ".md"}
    assert sum(path.stat().st_size for path in pictures) < 400_000


def test_the_commands_that_made_the_pictures_stand_in_docs():
    text = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    for words in (docs_pictures.SAMPLE, docs_pictures.TRAIN, docs_pictures.TAG):
        assert f".py {words}\n" in text


@pytest.mark.slow
def test_the_snippet_gives_the_probabilities_of_evaluate(drawn_model, tmp_path, tiny, monkeypatch):
    import keras

    (code,) = [text for kind, text in BLOCKS if kind == "python" and "load_model" in text]
    assert len(code.splitlines()) <= 14 and "utils" not in code
    for name in ("model.h5", "model.json", "model-labels.json"):
        shutil.copy(drawn_model / name, tmp_path)
    large, folder, turned = texture(0, (4000, 3000)), tmp_path / "set" / "Ann", Image.Exif()
    turned[0x0112] = 6
    folder.mkdir(parents=True)
    large.save(folder / "twelve.jpg")
    large.resize((1600, 1200)).save(folder / "turned.jpg", exif=turned)
    large.resize((900, 700)).convert("CMYK").save(folder / "cmyk.jpg")
    large.resize((801, 600)).save(folder / "phone.heic")
    large.resize((300, 211)).convert("L").save(folder / "grey.png")
    assert run_here("train.py", tmp_path, "set", "model", "--evaluate").returncode == 0
    with open(tmp_path / "model-evaluate.csv", encoding="utf-8") as file:
        expected = {row["file"]: float(row["probability"]) for row in csv.DictReader(file)}
    monkeypatch.chdir(tmp_path)
    load_once = functools.cache(keras.models.load_model)
    monkeypatch.setattr(keras.models, "load_model", load_once)
    for name, probability in expected.items():
        printed = []
        exec(code.replace("photo.jpg", f"set/{name}"), {"print": printed.append})
        assert max(printed[0].values()) == pytest.approx(probability, abs=0.001), name


def test_no_block_with_a_command_is_left_out():
    """What is run: all blocks with a line that begins with `python`, and those marked as `sh`."""
    words = r"\$|\.venv|python|pip|export|set|apt|apt-get|brew|source|cd|mkdir|mv|cp|rm|rmdir|\."
    others = {text for kind, text in BLOCKS if kind not in ("python", "text")}
    others -= {*COMMANDS, *SHELL}
    assert not [text for text in others if re.search(rf"^\s*({words})\s", text, re.M)]


@pytest.mark.long
def test_the_first_command_on_a_drawn_set(tmp_path):
    """All of the first block but the installation, in an empty folder."""
    printed = ""
    for line in FIRST.splitlines()[2:]:
        line = line.replace(".venv/bin/python ", f"{sys.executable} {ROOT}/")
        done = subprocess.run(line, shell=True, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        printed += done.stdout + done.stderr
    assert_shown(FIRST, printed)
    for name in ("model.h5", "000.png", "model-report.png", "tagged.mp4", "tags.tsv"):
        assert (tmp_path / name).stat().st_size > 1000


def draw_photos(block, folder):
    if "--by-name" in block:  # a photo program has written names into them
        (folder / "photos").mkdir()
        sample_faces.draw_set(folder / "drawn", 3, 12)
        for number, path in enumerate(sorted((folder / "drawn").rglob("*.jpg"))):
            photo, face = Image.new("RGB", (320, 240), "tan"), Image.open(path)
            photo.paste(face, (100, 40))
            named = path.parent.name, (180, 120, face.width / 2 / regions.HAAR_BOX)
            target, turn = folder / "photos" / f"{number}.jpg", 1 + number % 8
            tagged_photos.tag_photo(target, photo, [named], orientation=turn)
    elif "photos_to_name" in block:  # a cat and a dog, as draw_classes draws them
        (folder / "photos_to_name").mkdir()
        for n, colour in enumerate([(230, 60, 40), (40, 200, 80)], 1):
            pixels = np.random.default_rng(n).normal(colour, 30, (240, 320, 3)).clip(0, 255)
            photo = Image.fromarray(pixels.astype("uint8"))
            photo.save(folder / "photos_to_name" / f"IMG_000{n}.jpg", quality=95)
    elif photos := re.search(r"--source (photos\w*)", block):
        sample_faces.draw_set(folder / photos[1], 2, 2)


def draw_what_is_needed(block, folder, model_folder):
    """Draw what the commands of a block take for granted; a model is copied."""
    draw_photos(block, folder)
    train = re.search(r"train\.py (\w+) \w+", block)
    if "Photos Library.photoslibrary" in block:
        unnamed = [(image, [(None, box)]) for image, [(_, box)] in draw_album(3, 8)[2::3]]
        album = draw_album(2, 21) + unnamed
        make_library(folder / "Pictures" / "Photos Library.photoslibrary", 10, album)
    elif train and train[1] == "people":
        if not re.search("faces people", block):  # else the block makes them
            sample_faces.draw_set(folder / "people", 3, 12)
    elif train:
        classes = {"pets": {"cat": 30, "dog": 30}, "held_out": {"red": 4, "grün": 4}}
        draw_classes(folder / train[1], classes[train[1]])
    for name in re.findall(r"--source (\w+\.mp4)", block):
        people = {"ann": (0,), "ben": (1,)}.get(name.partition("_")[0], (0, 1))
        sample_faces.draw_clip(folder / name, people, 1, seed=len(name))
    uses, makes = re.search(r"webcam\.py model|--evaluate", block), re.search(TRAINS, block, re.M)
    if uses and not (makes and makes.start() < uses.start()):
        for path in model_folder.glob("model*"):
            shutil.copy(path, folder)


@pytest.fixture
def run_line(tmp_path, tiny, tiny_weights, film, monkeypatch):
    """Return a function that runs a line of shell in the test's folder, Python's in this process.

    The network is tiny, and its weights come instead of a download; cameras and streams play a
    film; no display is there.
    """
    import cv2
    import keras

    open_video = cv2.VideoCapture

    def play(source, *_):
        return open_video(str(film) if isinstance(source, int) else source)

    monkeypatch.setattr(cv2, "VideoCapture", play)
    monkeypatch.setattr(keras.utils, "get_file", lambda *_, **__: str(tiny_weights))
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)

    def run(line):
        line = re.sub(r"rtsp://\S+", film.as_uri(), line)
        words = shlex.split(line.partition(" > ")[0], comments=True)
        if words[:1] != ["python"]:
            subprocess.run(line, shell=True, cwd=tmp_path, check=True)
            return SimpleNamespace(returncode=0, stdout="", stderr="")
        return run_here(words[1], tmp_path, *map(os.path.expanduser, words[2:]))

    return run


@pytest.mark.slow
@on_unix
@pytest.mark.parametrize(
    "block", [b for b in COMMANDS + INLINE if b != SEVERAL], ids=lambda block: block[:60]
)
def test_the_commands_of_a_block(tmp_path, run_line, scratch_run, block):
    draw_what_is_needed(block, tmp_path, scratch_run[0])
    done = [run_line(line) for line in block.splitlines()]
    output, errors = ("".join(getattr(one, name) for one in done) for name in ("stdout", "stderr"))
    assert not any(one.returncode for one in done), errors
    assert "from scratch" not in errors and "Traceback" not in errors
    headers = re.findall(r"^(?:frame\ttime\ttrack|file\tface|file\tframe)\t", output, re.M)
    assert len(headers) == len(re.findall(r"webcam\.py(?!.*(?:--by-name|--events))", block))
    assert output.count("best: ") == len(re.findall(TRAINS, block, re.M))
    assert output.count("evaluate: ") == block.count("--evaluate")
    tables = block.count("collect_apple_photos.py") + block.count("--by-name")
    assert len(re.findall(r"^\d+ faces: ", output, re.M)) == tables
    for name in re.findall(r"--output (\S+)|--save-faces (\S+)", block):
        path = tmp_path / "".join(name)
        assert list(path.rglob("*.jpg")) if path.is_dir() else path.stat().st_size > 1000, path
    assert_shown(block, output + errors)


@on_unix
@pytest.mark.skipif(importlib.util.find_spec("jax") is None, reason="needs `pip install jax`")
@pytest.mark.long
def test_the_commands_for_several_machines(tmp_path, tiny_weights):
    sample_faces.draw_set(tmp_path / "people", 3, 12)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    script = f"{sys.executable} {ROOT}/tests/tiny_network.py"
    block = re.sub(r"(ADDRESSES=).*", rf"\g<1>{address}", SEVERAL)
    block = re.sub(r"^python (.*)", rf"{script} \g<1> --weights {tiny_weights}", block, flags=re.M)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "encoding": "utf-8"}
    commands = [re.sub(r"(PROCESS_ID=)0", rf"\g<1>{n}", block) for n in range(2)]
    processes = [subprocess.Popen(lines, shell=True, cwd=tmp_path, **pipes) for lines in commands]
    outputs = [process.communicate() for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert ["best: round" in output for output, _ in outputs] == [True, False]
    assert_shown(SEVERAL, outputs[0][0])


@on_unix
def test_the_lines_for_small_classes(tmp_path):
    classes = {"Ann": 10, "small_class": 4, "unknown": 6}
    people = draw_classes(tmp_path / "people", classes)
    lines = re.findall(r"`((?:mv|rmdir) [^`]*)`", README)
    assert [line.split()[0] for line in lines] == ["mv", "rmdir"]
    for path in (people / "small_class").iterdir():
        path.rename(path.with_name(f"small {path.name}"))
    subprocess.run("\n".join(lines), shell=True, cwd=tmp_path, check=True)
    assert sorted(path.name for path in people.iterdir()) == ["Ann", "unknown"]
    assert len(list((people / "unknown").iterdir())) == 10
