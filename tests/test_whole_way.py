"""The whole way, as a newcomer goes it: faces collected, a model trained, the same people tagged in a film."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import sample_faces
from conftest import ROOT, run_process
from photos_library import make_library


def draw_album(people, pictures):
    """Return photos for `make_library`: one person on each, with the box that Photos would have."""
    photos = []
    for n in range(pictures):
        for index in range(people):
            rng = np.random.default_rng([n, index])
            room = sample_faces.draw_room(rng, 320, 320)
            pose = sample_faces.random_pose(rng, 160, 160, float(rng.uniform(85, 110)))
            figure = (index, pose, rng.choice(sample_faces.SHIRTS))
            image = sample_faces.draw_scene(room, sample_faces.light(rng, 320, 320), 0, [figure])
            box = sample_faces.face_box(pose)
            side = (
                box["w"] / 1.12
            )  # a Haar box is larger than that of Photos, and lies a little higher
            center = (box["x"] + box["w"] / 2, box["y"] + box["h"] / 2 + 0.09 * side)
            photos.append((image, [(sample_faces.person(index).name, (*center, side))]))
    return photos


def share_of_right_names(folder, truth_file):
    """Tag the film and return the share of lines whose name is that of the drawn face under the box."""
    done = run_process(ROOT / "webcam.py", folder, "model", "--source", "film.mp4", "--no-display")
    assert done.returncode == 0, done.stderr
    truth = json.loads(Path(truth_file).read_text(encoding="utf-8"))
    lines = list(csv.DictReader(done.stdout.splitlines(), delimiter="\t"))
    assert len(lines) > len(truth)  # two people, nearly always both found
    right = 0
    for line in lines:
        x, y = float(line["x"]) + float(line["w"]) / 2, float(line["y"]) + float(line["h"]) / 2
        faces = truth[int(line["frame"])]
        under = [f["name"] for f in faces if 0 < x - f["x"] < f["w"] and 0 < y - f["y"] < f["h"]]
        right += under == [line["label"]]
    return right / len(lines)


@pytest.mark.long
@pytest.mark.parametrize("generation", [1, 2, 10])
def test_from_a_photos_library_to_names_in_a_film(tmp_path, generation):
    make_library(tmp_path / "Drawn.photoslibrary", generation, draw_album(4, 40))
    done = run_process(ROOT / "collect_apple_photos.py", tmp_path, "Drawn.photoslibrary", "people")
    assert done.returncode == 0 and "160 faces: 160 named (4 persons)" in done.stdout, done.stderr
    words = ["people", "model", "--weights", "none", "--image-size", "75"]
    done = run_process(ROOT / "train.py", tmp_path, *words)
    assert done.returncode == 0, done.stderr
    sample_faces.draw_clip(tmp_path / "film.mp4")
    assert share_of_right_names(tmp_path, tmp_path / "film.json") >= 0.95
