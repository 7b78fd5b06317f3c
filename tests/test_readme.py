"""The README never lies: its options exist and are all there, its commands and its snippet run as they stand."""

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

import docs_pictures
import numpy as np
import pytest
import sample_faces
import tagged_photos
from conftest import ROOT, SCRIPTS, draw_classes, rows, run_here, run_process
from photos_library import make_library
from PIL import Image
from test_front_door import changed_cv2
from test_whole_way import draw_album

import imaging  # noqa: F401 - so that Pillow writes HEIC
import regions

README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)\n```$", README, re.M | re.S)  # (language, text)
COMMANDS = [text for kind, text in BLOCKS if not kind and re.search("^python ", text, re.M)]
SHELL = [text for kind, text in BLOCKS if kind == "sh"]
# A line break inside backquotes is a space, as Markdown has it.
INLINE = [re.sub(r"\s+", " ", text) for text in re.findall(r"(?<!`)`(python\s[^`]*)`(?!`)", README)]
OPTION = r"(?<![\w-])--[a-z][a-z0-9-]+"
on_unix = pytest.mark.skipif(os.name == "nt", reason="needs a Unix system")


def find_shown():
    """Return {block of commands: lines that the README shows below it}."""
    shown, commands = {}, None
    for kind, text in BLOCKS:
        if kind == "text":
            shown.setdefault(commands, []).extend(text.splitlines())
        elif kind == "sh" or re.search("^python ", text, re.M):
            commands = text
    return shown


SHOWN = find_shown()


def assert_shown(block, printed):
    """Assert that a block printed the lines that the README shows below it; `…` is anything."""
    lines = [" ".join(line.split()) for line in printed.splitlines()]
    for shown in SHOWN.get(block, []):
        parts = " ".join(shown.split()).split("…")
        pattern = re.compile(".+".join(map(re.escape, parts)))
        assert any(pattern.fullmatch(line) for line in lines), f"not printed: {shown}\n{printed}"


def test_below_every_block_of_commands_stands_what_it_prints():
    commands = [text for kind, text in BLOCKS if not kind and re.search("^python ", text, re.M)]
    first = next(text for text in SHELL if ".venv/bin/python train.py" in text)
    assert set(SHOWN) == {*commands, first}


def read_header(script):
    """Return the PEP 723 header of a script, as a dict."""
    text = (ROOT / script).read_text(encoding="utf-8")
    (header,) = re.findall(r"\A# /// script\n(.*?)^# ///$", text, re.M | re.S)
    return tomllib.loads(re.sub("^# ?", "", header, flags=re.M))


@pytest.mark.parametrize("script", [*SCRIPTS, "tests/sample_faces.py"])
def test_uv_gets_the_packages_of_requirements_txt(script):
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    header = read_header(script)
    assert header["dependencies"] == [line.partition("#")[0].strip() for line in lines]
    assert header["requires-python"] == ">=3.11,<3.14"  # utils.py refuses others


def test_both_ways_to_start_run_the_same_commands():
    with_uv, with_python = SHELL[:2]
    lines = [line.replace("uv run ", ".venv/bin/python ") for line in with_uv.splitlines()]
    assert lines == with_python.splitlines()[2:]


def test_every_option_is_in_the_readme_and_every_option_in_it_exists(tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "1000")  # no option is divided between two lines
    known = set()
    for script in SCRIPTS:
        done = run_here(script, tmp_path, "--help")
        assert done.returncode == 0 and f"python {script} " in " ".join(done.stdout.split())
        known |= set(re.findall(OPTION, done.stdout)) - {"--help"}
    named = set(re.findall(OPTION, README)) - {"--people", "--clip", "--quiet", "--help"}
    assert named == known


def test_every_file_that_the_table_names_is_made(scratch_run):
    table = README.partition("## What comes out")[2].partition("**Reading")[0]
    names = set(re.findall(r"`([\w.-]+\.\w+)`", table)) - {"001.png"}  # this run has one round
    assert len(names) >= 8
    assert {name for name in names if not (scratch_run[0] / name).exists()} == set()


def test_files_and_pictures_that_the_readme_points_to_are_in_the_repository():
    names = re.findall(r"\]\(([\w./-]+)\)", README)
    for name in [*names, "LICENSE", "requirements.txt", "benchmarks/README.md"]:
        assert (ROOT / name).is_file(), name
    pictures = {ROOT / name for name in re.findall(r"!\[[^\]]*\]\(([\w./-]+)\)", README)}
    assert pictures == {path for path in (ROOT / "docs").iterdir() if path.suffix != ".md"}
    assert sum(path.stat().st_size for path in pictures) < 400_000


def test_the_commands_that_made_the_pictures_stand_in_docs():
    text = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    for words in (docs_pictures.SAMPLE, docs_pictures.TRAIN, docs_pictures.TAG):
        assert f".py {words}\n" in text


# ---------------------------------------------------------------- the snippet


def draw_bad_photographs(folder):
    """Write what photographs are like at their worst."""
    coarse = np.random.default_rng(0).integers(0, 255, (12, 16, 3)).astype("uint8")
    large = Image.fromarray(coarse).resize((4000, 3000), Image.Resampling.BICUBIC)
    turned = Image.Exif()
    turned[0x0112] = 6
    folder.mkdir(parents=True)
    large.save(folder / "twelve.jpg")
    large.resize((1600, 1200)).save(folder / "turned.jpg", exif=turned)
    large.resize((900, 700)).convert("CMYK").save(folder / "cmyk.jpg")
    large.resize((801, 600)).save(folder / "phone.heic")
    large.resize((300, 211)).convert("L").save(folder / "grey.png")


@pytest.mark.slow
def test_the_snippet_gives_the_probabilities_of_evaluate(drawn_model, tmp_path, monkeypatch):
    import keras

    (code,) = [text for kind, text in BLOCKS if kind == "python" and "load_model" in text]
    assert len(code.splitlines()) <= 12 and "utils" not in code
    for name in ("model.h5", "model.json", "model-labels.json"):
        shutil.copy(drawn_model / name, tmp_path)
    draw_bad_photographs(tmp_path / "set" / "Ann")
    assert run_here("train.py", tmp_path, "set", "model", "--evaluate").returncode == 0
    with open(tmp_path / "model-evaluate.csv", encoding="utf-8") as file:
        expected = {row["file"]: float(row["probability"]) for row in csv.DictReader(file)}
    monkeypatch.chdir(tmp_path)
    load_once = functools.cache(keras.models.load_model)
    monkeypatch.setattr(keras.models, "load_model", load_once)
    for name, probability in expected.items():
        printed = []
        exec(code.replace("photo.jpg", f"set/{name}"), {"print": printed.append})
        assert printed[0].max() == pytest.approx(probability, abs=0.001), name


# ---------------------------------------------------------------- the commands


def test_no_block_with_a_command_is_left_out():
    """What is run: all blocks with a line that begins with `python`, and those marked as `sh`."""
    assert len(COMMANDS) >= 5 and len(SHELL) >= 2
    words = r"^\s*(\$|\.venv|python|pip|export|set|apt|apt-get|brew|source|cd|mkdir|mv|cp|rm|rmdir|\.)\s"
    known = ("python", "text")
    others = [text for kind, text in BLOCKS if kind not in known and text not in COMMANDS + SHELL]
    assert not [line for text in others for line in text.splitlines() if re.match(words, line)]


@pytest.mark.slow
def test_the_lines_that_set_up_the_environment(tmp_path):
    """The commands themselves, but nothing is downloaded: the packages must be those of this environment."""
    shutil.copy(ROOT / "requirements.txt", tmp_path)
    for line in "\n".join(SHELL).splitlines():
        program, *words = shlex.split(line)
        if program == "python3":
            command, cwd = [*words, "--without-pip"], tmp_path
        elif program == ".venv/bin/pip":
            command, cwd = ["-m", "pip", *words, "--dry-run", "--no-index"], tmp_path
        elif words[:2] == ["-m", "pytest"]:
            command, cwd = [*words, "--collect-only"], ROOT
        elif program == "uv":  # the same programs
            continue
        else:  # run by test_the_first_command_on_a_drawn_set
            assert (ROOT / words[0]).is_file() and program == ".venv/bin/python", line
            continue
        done = subprocess.run([sys.executable, *command], cwd=cwd, capture_output=True, text=True)
        if "No matching distribution" in done.stderr:
            pytest.skip(done.stderr.splitlines()[-1])
        assert done.returncode == 0, (line, done.stderr, done.stdout[-500:])
    assert (tmp_path / ".venv" / "pyvenv.cfg").is_file()


def tagged_photos_of_people(folder):
    """Draw photos of three people, whose names a photo program has written into them."""
    sample_faces.draw_set(folder.parent / "drawn", 3, 12)
    folder.mkdir()
    for number, path in enumerate(sorted((folder.parent / "drawn").rglob("*.jpg"))):
        photo, face = Image.new("RGB", (320, 240), "tan"), Image.open(path)
        photo.paste(face, (100, 40))
        box = (180, 120, face.width / 2 / regions.HAAR_BOX)
        photo_path, turn = folder / f"{number}.jpg", 1 + number % 8
        tagged_photos.tag_photo(photo_path, photo, [(path.parent.name, box)], orientation=turn)


@pytest.mark.slow
def test_three_commands_lead_from_photos_with_names_to_a_tagged_film(tmp_path):
    tagged_photos_of_people(tmp_path / "photos")
    sample_faces.draw_clip(tmp_path / "party.mp4", seconds=1)
    (block,) = [text for text in SHOWN if "--by-name" in text]
    (collect, train, tag), printed = block.splitlines(), ""
    train += " --weights none --image-size 75 --head-epochs 1 --rounds 0"
    for line in (collect, train, tag + " --no-display"):
        script, *words = line.split()[1:]
        done = run_process(ROOT / script, tmp_path, *words)
        assert done.returncode == 0, done.stderr
        printed += done.stdout + done.stderr
    assert_shown(block, printed)
    assert {row["label"] for row in rows(done.stdout)} >= {"Ann", "Ben"}
    assert (tmp_path / "tagged.mp4").stat().st_size > 1000


@pytest.mark.long
def test_the_first_command_on_a_drawn_set(tmp_path):
    """All of the first block but the installation, in an empty folder."""
    block = next(text for text in SHELL if ".venv/bin/python train.py" in text)
    printed = ""
    for line in block.splitlines()[2:]:
        line = line.replace(".venv/bin/python ", f"{sys.executable} {ROOT}/")
        done = subprocess.run(line, shell=True, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        printed += done.stdout + done.stderr
    assert_shown(block, printed)
    for name in ("model.h5", "000.png", "model-report.png", "tagged.mp4", "tags.tsv"):
        assert (tmp_path / name).stat().st_size > 1000


# A script over the tiny network.
STUB = """
import sys
sys.path[:0] = [{root!r}, {tests!r}]
import tiny_network
if __name__ == "__main__":
    tiny_network.run({name!r})
"""
PLAYED = """
real = cv2.VideoCapture
cv2.VideoCapture = lambda source, *more: real({film!r} if isinstance(source, int) else source)
"""


@pytest.fixture
def clone(tmp_path, tiny_weights, film):
    """Make a folder in which the README's commands run as they stand. Returns it and a function.

    The function starts lines of shell. `python` is this one, the network is tiny, and its weights
    are kept as if they had been downloaded; cameras and streams play a film; no display is there.
    """
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    (tmp_path / "bin" / "python").chmod(0o755)
    (tmp_path / "collect_apple_photos.py").symlink_to(ROOT / "collect_apple_photos.py")
    for name in ("train.py", "webcam.py"):
        stub = STUB.format(root=str(ROOT), tests=str(ROOT / "tests"), name=name)
        (tmp_path / name).write_text(stub)
    kept = tmp_path / "keras" / "models"
    kept.mkdir(parents=True)
    shutil.copy(tiny_weights, kept / "tiny_notop.h5")
    hidden = ("DISPLAY", "WAYLAND_DISPLAY")
    environment = {key: value for key, value in os.environ.items() if key not in hidden}
    environment |= changed_cv2(tmp_path / "played", PLAYED.format(film=str(film)))
    environment |= {"HOME": str(tmp_path), "KERAS_HOME": str(kept.parent)}
    environment["PATH"] = f"{tmp_path / 'bin'}{os.pathsep}{environment['PATH']}"
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "encoding": "utf-8"}

    def start(lines):
        lines = re.sub(r"rtsp://\S+", film.as_uri(), lines)
        return subprocess.Popen(["sh", "-e", "-c", lines], cwd=tmp_path, env=environment, **pipes)

    return tmp_path, start


def bring_what_is_needed(block, folder, request):
    """Draw what the commands of a block take for granted; a model comes from scratch_run."""
    if "Photos Library.photoslibrary" in block:
        make_library(folder / "Pictures/Photos Library.photoslibrary", 10, draw_album(2, 21))
    elif train := re.search(r"train\.py (\w+) \w+(.*)", block):
        classes = {"pets": {"cat": 30, "dog": 30}, "held_out": {"red": 4, "grün": 4}}
        draw_classes(folder / train[1], classes.get(train[1], {"a": 12, "b": 12}))
    if "photos_to_name" in block:  # a cat and a dog, as draw_classes draws them
        (folder / "photos_to_name").mkdir()
        for n, colour in enumerate([(230, 60, 40), (40, 200, 80)], 1):
            pixels = np.random.default_rng(n).normal(colour, 30, (240, 320, 3)).clip(0, 255)
            photo = Image.fromarray(pixels.astype("uint8"))
            photo.save(folder / "photos_to_name" / f"IMG_000{n}.jpg", quality=95)
    for name in re.findall(r"--source (\w+\.mp4)", block):
        shutil.copy(request.getfixturevalue("film"), folder / name)
    for name in set(re.findall(r"--source (photos\w*)", block)) - {"photos_to_name"}:
        sample_faces.draw_set(folder / name, 2, 2)
    if re.search(r"webcam\.py model|--evaluate", block) and not trained_in(block):
        for path in request.getfixturevalue("scratch_run")[0].glob("model*"):
            shutil.copy(path, folder)


def trained_in(block):
    return re.findall(r"train\.py \w+ \w+(?: --group-by-folder)?$", block, re.M)


@pytest.mark.slow
@on_unix
@pytest.mark.parametrize(
    "block",
    [b for b in COMMANDS + INLINE if "export " not in b and "--by-name" not in b],
    ids=lambda block: block[:40],
)
def test_the_commands_of_a_block(clone, request, block):
    folder, start = clone
    bring_what_is_needed(block, folder, request)
    process = start(block)
    output, errors = process.communicate()
    assert process.returncode == 0, errors
    assert "from scratch" not in errors and "Traceback" not in errors
    headers = re.findall(r"^(?:frame\ttime\ttrack|file\tface|file\tframe)\t", output, re.M)
    assert len(headers) == len(re.findall(r"webcam\.py(?!.*>)", block))
    assert output.count("best: ") == len(trained_in(block))
    assert output.count("evaluate: ") == block.count("--evaluate")
    assert len(re.findall(r"^\d+ faces: ", output, re.M)) == block.count("collect_apple_photos.py")
    for name in re.findall(r"--output (\S+)|--save-faces (\S+)", block):
        path = folder / "".join(name)
        assert list(path.rglob("*.jpg")) if path.is_dir() else path.stat().st_size > 1000, path
    written = [
        (folder / name).read_text(encoding="utf-8") for name in re.findall(r"> (\S+)", block)
    ]
    assert_shown(block, "\n".join([output, errors, *written]))


@on_unix
@pytest.mark.skipif(importlib.util.find_spec("jax") is None, reason="needs `pip install jax`")
@pytest.mark.long
def test_the_commands_for_several_machines(clone, request):
    folder, start = clone
    (block,) = [block for block in COMMANDS if "export " in block]
    bring_what_is_needed(block, folder, request)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    block, count = re.subn(r"(ADDRESSES=).*", rf"\g<1>{address}", block)
    assert count == 1
    processes = [start(re.sub(r"(PROCESS_ID=)0", rf"\g<1>{n}", block)) for n in range(2)]
    outputs = [process.communicate() for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert ["best: round" in output for output, _ in outputs] == [True, False]


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
