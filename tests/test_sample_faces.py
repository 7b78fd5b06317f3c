"""The drawn people: repeatable, told apart, and found where the truth file says."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import sample_faces
from PIL import Image

import utils

ROOT = Path(__file__).resolve().parents[1]


def digests(folder):
    """Return {path below the folder: SHA-256} of all files."""
    return {
        p.relative_to(folder): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in utils.list_files(folder)
    }


def overlap(a, b):
    """Return intersection over union of two boxes (x, y, w, h)."""
    width = max(0, min(a[0] + a[2], b[0] + b[2]) - max(a[0], b[0]))
    height = max(0, min(a[1] + a[3], b[1] + b[3]) - max(a[1], b[1]))
    return width * height / (a[2] * a[3] + b[2] * b[3] - width * height)


def detector():
    """Return a function from a grey picture to the list of face boxes."""
    import cv2

    cascade = cv2.CascadeClassifier(str(ROOT / "haarcascade_frontalface_default.xml"))
    return lambda grey: cascade.detectMultiScale(grey, 1.15, 5, minSize=(60, 60))


def run(*arguments):
    """Run the command in a process of its own."""
    return subprocess.run(
        [sys.executable, ROOT / "tests" / "sample_faces.py", *map(str, arguments)],
        capture_output=True,
        text=True,
    )


def test_command_draws_set_and_film(tmp_path):
    done = run(tmp_path / "people", "--people", 3, "--pictures", 4, "--clip", tmp_path / "film.avi")
    assert done.returncode == 0, done.stderr
    folders = sorted((tmp_path / "people").iterdir())
    assert [f.name for f in folders] == ["Ann", "Ben", "Cleo"]
    assert all(
        sorted(p.name for p in f.iterdir()) == ["000.jpg", "001.jpg", "002.jpg", "003.jpg"]
        for f in folders
    )
    assert Image.open(folders[0] / "000.jpg").size == (sample_faces.SIDE, sample_faces.SIDE)
    truth = json.loads((tmp_path / "film.json").read_text("utf-8"))
    assert len(truth) == sample_faces.SECONDS * sample_faces.FPS
    assert [[face["name"] for face in faces] for faces in (truth[0], truth[-1])] == [
        ["Ann", "Ben"]
    ] * 2


def test_same_seed_same_bytes(tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        sample_faces.draw_set(tmp_path / name, people=2, pictures=3, seed=seed)
    sample_faces.draw_set(tmp_path / "larger", people=3, pictures=4, seed=1)
    first, larger = digests(tmp_path / "a"), digests(tmp_path / "larger")
    assert first == digests(tmp_path / "b")
    assert not set(first.values()) & set(digests(tmp_path / "c").values())
    assert first.items() <= larger.items(), "a larger set begins with the smaller one"


@pytest.mark.parametrize("ending", [".avi", ".mp4"])
def test_same_seed_same_film(tmp_path, ending):
    films = [(tmp_path / name).with_suffix(ending) for name in ("a", "b")]
    truths = [sample_faces.draw_clip(film, seconds=0.4) for film in films]
    assert truths[0] == truths[1] == json.loads(films[0].with_suffix(".json").read_text("utf-8"))
    assert films[0].read_bytes() == films[1].read_bytes()


def test_another_set_in_the_folder_is_refused(tmp_path):
    sample_faces.draw_set(tmp_path, people=2, pictures=2)
    sample_faces.draw_set(tmp_path, people=2, pictures=2)
    done = run(tmp_path, "--people", 1, "--pictures", 2)
    assert done.returncode == 1 and done.stderr.startswith("error: ") and "000.jpg" in done.stderr
    assert len(utils.list_files(tmp_path)) == 4


@pytest.mark.parametrize(
    "arguments", [[], ["x", "--people", "0"], ["x", "--pictures", "no"], ["x", "--clip", "a.txt"]]
)
def test_wrong_usage(tmp_path, arguments):
    assert run(*arguments).returncode == 2


@pytest.mark.parametrize("people", [(0, 1), (2, 9), (5, 7), (4, 11)])
def test_detector_finds_faces_where_the_truth_says(tmp_path, people):
    import cv2

    truth = sample_faces.draw_clip(tmp_path / "film.avi", people, seconds=2)
    film, detect, good, boxes, checked = (
        cv2.VideoCapture(str(tmp_path / "film.avi")),
        detector(),
        0,
        0,
        0,
    )
    for number, faces in enumerate(truth):
        frame = film.read()[1]
        if number % 5:
            continue
        found = detect(cv2.cvtColor(frame, cv2.COLOR_BGR2GRAY))
        good += sum(
            any(overlap(tuple(face.values())[1:], box) >= 0.5 for box in found) for face in faces
        )
        boxes, checked = boxes + len(found), checked + len(faces)
    assert not film.read()[0], "the film has as many frames as the truth"
    assert good >= 0.9 * checked
    assert boxes <= 1.05 * checked, "hardly any box is elsewhere"


def test_faces_of_the_film_stay_apart(tmp_path):
    truth = sample_faces.draw_clip(tmp_path / "film.avi", (0, 1, 2), seconds=1.6)
    boxes = [[tuple(face.values())[1:] for face in faces] for faces in truth]
    assert all(overlap(a, b) == 0 for faces in boxes for a in faces for b in faces if a is not b)
    moved = np.ptp([faces[0][:2] for faces in boxes], axis=0)
    assert moved.max() > 5, "somebody moves"


def test_training_pictures_are_framed_as_the_tagger_frames(tmp_path):
    detect, ratios = detector(), []
    for index in range(6):
        picture = sample_faces.draw_person(index, np.random.default_rng(index), size=240)
        ratios += [240 / width for _, _, width, _ in detect(np.asarray(picture.convert("L")))]
    assert len(ratios) >= 5 and 1.8 <= np.median(ratios) <= 2.2


def test_people_differ():
    looks = [tuple(vars(sample_faces.person(index)).values())[1:6] for index in range(12)]
    shared = [
        sum(a == b for a, b in zip(one, other))
        for i, one in enumerate(looks)
        for other in looks[:i]
    ]
    assert max(shared) <= 3, "any two of the first dozen differ in two traits at least"
    names = [sample_faces.person(index).name for index in range(200)]
    assert len(set(names)) == 200 and {"Mihály", "Ελένη", "王", "Lars Olav"} < set(names)


def test_another_picture_of_the_same_person_is_nearer_than_other_people():
    def picture(index, seed):
        pose = sample_faces.random_pose(np.random.default_rng(seed), 80, 80, 80)
        plain = Image.new("RGB", (160, 160), "#cfd8d3")
        return np.asarray(sample_faces.draw_scene(plain, 1, 0, [(index, pose, "#2f6f8f")]), float)

    first, second = ([picture(index, seed) for index in range(12)] for seed in (1, 2))
    nearest = [int(np.argmin([np.abs(a - b).mean() for b in first])) for a in second]
    assert sum(nearest[index] == index for index in range(12)) >= 10
