"""webcam.py --save-faces: what is kept of films, streams and pictures, and how it trains."""

import io
import os
import re
import shlex
import shutil

import cv2
import pytest
import sample_faces
from conftest import ROOT, cut_square, rows, run_process
from PIL import Image, ImageFilter
from test_webcam import difference, make_film, read_film


def crops(folder):
    return sorted(folder.rglob("*.jpg"))


def check_crop(path):
    """Assert that a file is a square JPEG of quality 95, not subsampled, without metadata."""
    image = Image.open(path)
    assert image.format == "JPEG" and image.width == image.height and not image.getexif()
    assert [layer[1:3] for layer in image.layer] == [(1, 1)] * 3
    reference = io.BytesIO()
    image.save(reference, "JPEG", quality=95)
    assert image.quantization == Image.open(reference).quantization


def test_crops_of_a_film(tmp_path, tag_here, film):
    collect = "--save-faces", "people/Ann", "--source", film
    done = tag_here(*collect)
    (folder,) = (tmp_path / "people" / "Ann").iterdir()
    assert re.fullmatch(r"film-[0-9a-f]{8}", folder.name)
    kept = crops(folder)
    assert 6 <= len(kept) <= 2 * 2 * 5 + 2  # two tracks, two seconds, five a second
    lines = {(row["frame"], row["track"]): row for row in rows(done.stdout)}
    frames = read_film(film)
    for path in kept:  # the square that the model would get, at the film's own resolution
        check_crop(path)
        frame, track, _ = path.stem.split("-")
        x, y, w, h = (int(lines[str(int(frame)), track][key]) for key in "xywh")
        place = x + w / 2, y + h / 2, w
        expected = cut_square(frames[int(frame)][..., ::-1], place, 2.0)
        assert difference(Image.open(path), expected) < 4
    summary, advice = done.stderr.splitlines()[-2:]
    assert summary.startswith(f"people/Ann: {len(kept)} saved, ") and "too similar" in summary
    assert advice.endswith("then python train.py people model --group-by-folder")
    before = {path: path.read_bytes() for path in kept}
    assert tag_here(*collect, "--context", 1.5).returncode == 0
    assert all(path.read_bytes() == data for path, data in before.items())  # nothing overwritten
    assert len(crops(folder)) > len(kept)


def test_a_still_film_gives_one_crop_and_a_blurred_one_none(tmp_path, tag_here, film):
    frame = read_film(film)[0]
    for name, picture in (("still", frame), ("blurred", cv2.GaussianBlur(frame, (0, 0), 5))):
        make_film(tmp_path / f"{name}.mp4", [picture] * 30)
        tag_here("--save-faces", name, "--source", f"{name}.mp4")
    assert len(crops(tmp_path / "still")) == 2  # one of each person
    assert len(crops(tmp_path / "blurred")) == 0


def test_only_faces_that_are_alone_are_kept_from_photos(tmp_path, tag_here, film):
    """Of photos of one face, two, none, a blurred one, a broken file, and a turned one."""
    two = Image.fromarray(read_film(film)[0][..., ::-1])
    one, folder = two.crop((0, 0, 300, 480)), tmp_path / "photos"
    (folder / "2019").mkdir(parents=True)
    two.save(folder / "two.png")
    one.save(folder / "2019" / "one.png")
    one.filter(ImageFilter.GaussianBlur(5)).save(folder / "blurred.png")
    Image.new("RGB", (400, 400), "#88aacc").save(folder / "sky.png")
    (folder / "broken.jpg").write_bytes(b"\xff\xd8\xff no jpeg")
    exif = Image.Exif()
    exif[274], exif[271] = 8, "a phone"
    one.transpose(Image.Transpose.ROTATE_270).save(folder / "phone.jpg", exif=exif, quality=95)
    done = tag_here("--save-faces", "people/Ann", "--source", "photos")
    assert done.returncode == 0, done.stderr
    kept = crops(tmp_path / "people" / "Ann")
    assert [path.name.partition("-")[0] for path in kept] == ["blurred", "one", "phone"]
    assert {path.parent for path in kept} == {tmp_path / "people" / "Ann"}  # no level of its own
    for path in kept:
        check_crop(path)
    assert difference(*(Image.open(path).resize((64, 64)) for path in kept[1:])) < 12  # upright
    assert "1 with several faces" in done.stderr and "1 without a face" in done.stderr
    assert "broken.jpg: skipped" in done.stderr


def test_with_a_model_the_label_decides(tmp_path, tag_here, drawn_model, tagged):
    model, film = drawn_model / "model", drawn_model / "film.mp4"
    done = tag_here(model, "--source", film, "--save-faces", "sorted")
    assert done.returncode == 0, done.stderr
    assert done.stdout == tagged.stdout  # a film gives the same lines every time
    names = {row["label"] for row in rows(done.stdout)}
    assert {"Ann", "Ben"} <= names
    for folder in (tmp_path / "sorted").iterdir():
        assert folder.name in names
        run = rf"film-[0-9a-f]{{8}}-{folder.name}"  # so folders move to other classes as they are
        assert all(re.fullmatch(run, path.name) for path in folder.iterdir())
    advice = done.stderr.splitlines()[-1]  # never to train on what the model itself sorted
    assert re.match("next: look through it, correct it, copy it into your training set", advice)
    assert advice.endswith(f"python train.py TRAINING_SET {shlex.quote(str(model))}")
    strict = tag_here(model, "--source", film, "--save-faces", "strict", "--threshold", 1)
    assert os.listdir(tmp_path / "strict") == ["unknown"]
    assert {row["label"] for row in rows(strict.stdout)} == {"unknown"}
    # of the best of five classes
    assert all(0.2 <= float(row["probability"]) <= 1 for row in rows(strict.stdout))


def test_whole_pictures_are_copied_into_the_folder_of_their_class(tmp_path, tag_here, drawn_model):
    source = tmp_path / "mixed"
    source.mkdir()
    for n, path in enumerate(sorted((drawn_model / "people").glob("*/*.jpg"))[::10]):
        shutil.copy(path, source / f"{n}.jpg")
    before = {path.name: path.read_bytes() for path in source.iterdir()}
    command = "--source", "mixed", "--save-faces", "sorted", "--whole-picture"
    done = tag_here(drawn_model / "model", *command)
    labels = {row["file"].removesuffix(".jpg"): row["label"] for row in rows(done.stdout)}
    copies = {path.name.partition("-")[0]: path for path in crops(tmp_path / "sorted")}
    assert len(copies) == len(before) == 20
    for name, path in copies.items():
        assert path.read_bytes() == before[f"{name}.jpg"]
        assert path.parent == tmp_path / "sorted" / labels[name]
    assert {path.name: path.read_bytes() for path in source.iterdir()} == before


def test_frames_of_a_film_are_kept_whole(tmp_path, tag_here, film):
    done = tag_here("--save-faces", "hands/rock", "--source", film, "--whole-picture")
    kept = crops(tmp_path / "hands" / "rock")
    assert 1 <= len(kept) <= 11, done.stderr
    assert {Image.open(path).size for path in kept} == {(640, 480)}


def test_a_saved_crop_is_what_the_tagger_saw(tmp_path, tag_here, drawn_model):
    """And of pictures every face is kept, blurred ones too."""
    source = tmp_path / "photos"
    source.mkdir()
    frames = read_film(drawn_model / "film.mp4")[::10]
    for n, frame in enumerate([*frames, cv2.GaussianBlur(frames[0], (0, 0), 3)]):
        Image.fromarray(frame[..., ::-1]).save(source / f"{n}.png")
    model = drawn_model / "model"
    done = tag_here(model, "--save-faces", "kept", "--source", "photos", "--threshold", 0)
    seen = {(row["file"][:-4], row["face"]): row for row in rows(done.stdout)}
    assert (str(len(frames)), "0") in seen
    again = rows(tag_here(model, "--source", "kept", "--whole-picture", "--threshold", 0).stdout)
    assert len(again) == len(seen) >= 25
    same = 0
    for row in again:
        first = seen[tuple(row["file"].rpartition("/")[2].split("-")[:2])]
        same += row["label"] == first["label"]
        assert abs(float(row["probability"]) - float(first["probability"])) <= 0.05
    assert same >= 0.95 * len(again)


@pytest.mark.long
def test_a_stranger_is_learned_from_the_crops_that_were_unknown(tmp_path, drawn_model):
    people = tmp_path / "people"
    shutil.copytree(drawn_model / "people", people, ignore=shutil.ignore_patterns("Ben"))
    (people / "Eva").rename(people / "unknown")
    recipe = "--weights none --image-size 75 --head-epochs 8 --rounds 1 --no-heavy-augmentation"
    train = ROOT / "train.py", tmp_path, "people", "model", *recipe.split()
    tag = ROOT / "webcam.py", tmp_path, "model", "--no-display", "--source"
    assert run_process(*train).returncode == 0
    for seed in (1, 2, 3):
        film = tmp_path / f"{seed}.mp4"
        sample_faces.draw_clip(film, (1,), seed=seed)  # Ben, who is no class yet
        run_process(*tag, film, "--save-faces", "new", "--threshold", 0.99)
    (people / "Ben").mkdir()
    for run in (tmp_path / "new" / "unknown").iterdir():
        run.rename(people / "Ben" / run.name)
    assert run_process(*train).returncode == 0
    sample_faces.draw_clip(tmp_path / "later.mp4", (1,), seed=9)
    labels = [row["label"] for row in rows(run_process(*tag, "later.mp4").stdout)]
    assert labels.count("Ben") > 0.5 * len(labels), sorted(set(labels))
