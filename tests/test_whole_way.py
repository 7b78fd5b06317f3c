"""The whole way, as a newcomer goes it: faces collected, a model trained, a film tagged."""

import numpy as np
import pytest
import sample_faces
from conftest import ROOT, rows, run_process
from photos_library import make_library
from test_webcam import share_named


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
            side = box["w"] / 1.12  # Photos' box is smaller, and lies a little lower
            center = (box["x"] + box["w"] / 2, box["y"] + box["h"] / 2 + 0.09 * side)
            photos.append((image, [(sample_faces.person(index).name, (*center, side))]))
    return photos


@pytest.mark.long
def test_from_a_photos_library_to_names_in_a_film(tmp_path):
    make_library(tmp_path / "Drawn.photoslibrary", 10, draw_album(4, 40))
    truth = sample_faces.draw_clip(tmp_path / "film.mp4")
    for command, printed in (
        ("collect_apple_photos.py Drawn.photoslibrary people", "160 faces: 160 named (4 persons)"),
        ("train.py people model --weights none --image-size 75", "best: "),
        ("webcam.py model --source film.mp4 --no-display --threshold 0", "frame\ttime"),
    ):
        script, *words = command.split()
        done = run_process(ROOT / script, tmp_path, *words)
        assert done.returncode == 0 and printed in done.stdout, done.stderr
    assert share_named(rows(done.stdout), truth) >= 0.95
