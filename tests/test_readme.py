"""The README never lies: its options exist and are all there, its snippet gives our probabilities, its commands run."""

import csv
import io
import re
import shutil
import subprocess
import sys
import tomllib

import docs_pictures
import numpy as np
import pytest
import sample_faces
import tagged_photos
from conftest import ROOT, rows, run_process
from PIL import Image

import imaging  # noqa: F401 - so that Pillow writes HEIC
import regions

README = (ROOT / "README.md").read_text(encoding="utf-8")
SCRIPTS = ("train.py", "webcam.py", "collect_apple_photos.py")


BLOCKS = re.findall(r"^```(\w*)\n(.*?)\n```$", README, re.M | re.S)  # (language, text)


def blocks(language):
    """Return the texts of README's fenced blocks of one language."""
    return [text for kind, text in BLOCKS if kind == language]


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
    first = next(text for text in blocks("sh") if ".venv/bin/python train.py" in text)
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
    with_uv, with_python = blocks("sh")[:2]
    lines = [line.replace("uv run ", ".venv/bin/python ") for line in with_uv.splitlines()]
    assert lines == with_python.splitlines()[2:]


def options_of(script, folder):
    done = run_process(ROOT / script, folder, "--help", COLUMNS="1000")
    assert done.returncode == 0
    return set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]+", done.stdout)) - {"--help"}


def test_every_option_is_in_the_readme_and_every_option_in_it_exists(tmp_path):
    known = set().union(*(options_of(script, tmp_path) for script in SCRIPTS))
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]+", README))
    assert named - {"--people", "--clip", "--quiet", "--help"} == known


def test_every_file_that_the_table_names_is_made(scratch_run):
    folder, _ = scratch_run
    table = README.partition("## What comes out")[2].partition("**Reading")[0]
    names = [name for name in re.findall(r"`([\w.-]+\.\w+)`", table)]
    assert len(names) >= 8
    later = {"001.png"}  # this run has no round after the first
    assert [name for name in names if not (folder / name).exists() and name not in later] == []


def test_files_and_pictures_that_the_readme_points_to_are_in_the_repository():
    for name in re.findall(r"\]\(([\w./-]+)\)", README) + [
        "LICENSE",
        "requirements.txt",
        "benchmarks/README.md",
    ]:
        assert (ROOT / name).is_file(), name
    pictures = {ROOT / name for name in re.findall(r"!\[[^\]]*\]\(([\w./-]+)\)", README)}
    assert pictures == {path for path in (ROOT / "docs").iterdir() if path.suffix != ".md"}
    assert sum(path.stat().st_size for path in pictures) < 400_000


def test_the_commands_that_made_the_pictures_stand_in_docs():
    text = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    for words in (docs_pictures.SAMPLE, docs_pictures.TRAIN, docs_pictures.TAG):
        assert f".py {words}\n" in text


def snippet_pictures():
    """Return {name: bytes}: what photographs are like at their worst."""
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 255, (12, 16, 3)).astype("uint8"))
    large = coarse.resize((4000, 3000), Image.Resampling.BICUBIC)
    turned = Image.Exif()
    turned[0x0112] = 6
    kinds = {
        "twelve.jpg": (large, "JPEG", {}),
        "turned.jpg": (large.resize((1600, 1200)), "JPEG", {"exif": turned}),
        "cmyk.jpg": (large.resize((900, 700)).convert("CMYK"), "JPEG", {}),
        "phone.heic": (large.resize((801, 600)), "HEIF", {}),
        "grey.png": (large.resize((300, 211)).convert("L"), "PNG", {}),
    }
    found = {}
    for name, (image, kind, options) in kinds.items():
        buffer = io.BytesIO()
        image.save(buffer, kind, **options)
        found[name] = buffer.getvalue()
    return found


@pytest.mark.slow
def test_the_snippet_gives_the_probabilities_of_evaluate(scratch_run, tmp_path):
    folder, _ = scratch_run
    code = next(block for block in blocks("python") if "load_model" in block) + "\n"
    assert len(code.splitlines()) <= 12 and "utils" not in code
    for name in ("model.h5", "model.json", "model-labels.json"):
        shutil.copy(folder / name, tmp_path)
    (tmp_path / "set" / "red").mkdir(parents=True)
    for name, data in snippet_pictures().items():
        (tmp_path / "set" / "red" / name).write_bytes(data)
    assert run_process(ROOT / "train.py", tmp_path, "set", "model", "--evaluate").returncode == 0
    with open(tmp_path / "model-evaluate.csv", encoding="utf-8") as file:
        expected = {row["file"]: float(row["probability"]) for row in csv.DictReader(file)}
    program = "import functools, keras, pillow_heif; pillow_heif.register_heif_opener()\n"
    program += "keras.models.load_model = functools.cache(keras.models.load_model)\n"  # five pictures, one model
    for name in expected:
        program += code.replace("photo.jpg", f"set/{name}").replace(
            "print(model.predict(", "print('P', model.predict("
        )
        program = re.sub(r"(print\('P', model.predict\(.*\))\)$", r"\1.max())", program, flags=re.M)
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True
    )
    found = [float(line.split()[-1]) for line in done.stdout.splitlines() if line.startswith("P")]
    assert found == pytest.approx(list(expected.values()), abs=0.001), done.stderr


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
    block = next(text for text in blocks("sh") if ".venv/bin/python train.py" in text)
    printed = ""
    for line in block.splitlines()[2:]:
        line = line.replace(".venv/bin/python ", f"{sys.executable} ")
        for script in (*SCRIPTS, "tests/sample_faces.py"):
            line = line.replace(f" {script}", f" {ROOT / script}")
        done = subprocess.run(line, shell=True, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        printed += done.stdout + done.stderr
    assert_shown(block, printed)
    for name in ("model.h5", "000.png", "model-report.png", "tagged.mp4", "tags.tsv"):
        assert (tmp_path / name).stat().st_size > 1000
