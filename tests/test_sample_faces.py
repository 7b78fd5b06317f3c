"""The drawn people: repeatable, and found where the truth file says, framed as the tagger frames."""

import json

import numpy as np
import pytest
import sample_faces
from conftest import ROOT, error_line, run_here

import utils


def overlap(a, b):
    """Return intersection over union of two boxes (x, y, w, h)."""
    width = max(0, min(a[0] + a[2], b[0] + b[2]) - max(a[0], b[0]))
    height = max(0, min(a[1] + a[3], b[1] + b[3]) - max(a[1], b[1]))
    return width * height / (a[2] * a[3] + b[2] * b[3] - width * height)


def detect(grey):
    """Return the face boxes in a grey picture."""
    import cv2

    cascade = cv2.CascadeClassifier(str(ROOT / "haarcascade_frontalface_default.xml"))
    return cascade.detectMultiScale(grey, 1.15, 5, minSize=(60, 60))


def draw(folder, *words):
    return run_here("sample_faces.py", folder, *words)


def test_the_command_draws_the_same_set_again_and_nothing_beside_another(tmp_path):
    for name in "ab":
        assert draw(tmp_path, name, "--people", 3, "--pictures", 2).returncode == 0
    files = [utils.list_files(tmp_path / name) for name in "ab"]
    names = [path.relative_to(tmp_path / "a").as_posix() for path in files[0]]
    assert names == [f"{who}/00{n}.jpg" for who in ("Ann", "Ben", "Cleo") for n in (0, 1)]
    data = [[path.read_bytes() for path in some] for some in files]
    assert data[0] == data[1] and len(set(data[0])) == 6
    assert "002.jpg" not in error_line(draw(tmp_path, "a", "--people", 1, "--pictures", 2))


@pytest.mark.parametrize("words", ["", "x --people 0", "x --pictures no", "x --clip a.txt"])
def test_wrong_usage(tmp_path, words):
    assert draw(tmp_path, *words.split()).returncode == 2


@pytest.mark.parametrize("people", [(0, 1), (4, 5)])
def test_detector_finds_faces_where_the_truth_says(tmp_path, people):
    import cv2

    truth = sample_faces.draw_clip(tmp_path / "film.avi", people, seconds=2)
    assert json.loads((tmp_path / "film.json").read_text("utf-8")) == truth
    film, good, boxes, checked = cv2.VideoCapture(str(tmp_path / "film.avi")), 0, 0, 0
    for number, faces in enumerate(truth):
        frame = film.read()[1]
        if number % 5:
            continue
        found = detect(cv2.cvtColor(frame, cv2.COLOR_BGR2GRAY))
        truths = [tuple(face.values())[1:] for face in faces]
        good += sum(any(overlap(one, box) >= 0.5 for box in found) for one in truths)
        boxes, checked = boxes + len(found), checked + len(faces)
    assert not film.read()[0], "the film has as many frames as the truth"
    assert good >= 0.9 * checked and boxes <= 1.05 * checked


def test_training_pictures_are_framed_as_the_tagger_frames():
    ratios = []
    for index in range(6):
        picture = sample_faces.draw_person(index, np.random.default_rng(index), size=240)
        ratios += [240 / width for _, _, width, _ in detect(np.asarray(picture.convert("L")))]
    assert len(ratios) >= 5 and 1.8 <= np.median(ratios) <= 2.2
