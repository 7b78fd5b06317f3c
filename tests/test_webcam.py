"""webcam.py as its users run it: films, pictures, folders, streams, windows, what goes wrong."""

import collections
import contextlib
import csv
import functools
import http.server
import io
import itertools
import json
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import textwrap
import threading
import time
from fractions import Fraction
from types import SimpleNamespace

import av
import cv2
import numpy as np
import pytest
import sample_faces
from conftest import (
    ROOT,
    error_line,
    on_terminal,
    rows,
    run_here,
    run_process,
    serve,
    start,
    train_here,
)
from PIL import Image

import films
import report
import sources
import tracker
import webcam

WEBCAM = ROOT / "webcam.py"
FACE = "x y w h label probability best".split()
FILM = ["frame", "time", "track", *FACE]
COLLECT = ("--save-faces", "faces", "--source")
IMAGE = np.zeros((48, 64, 3), "uint8")
PART = b"--frame\r\nContent-Type: image/jpeg\r\n\r\n"
on_linux = pytest.mark.skipif(sys.platform != "linux", reason="other systems allow no such names")


def box(row):
    return tuple(int(row[key]) for key in "xywh")


def read_film(path):
    """Return the frames of a plain film, uint8 BGR, as OpenCV reads them."""
    film, frames = cv2.VideoCapture(str(path)), []
    while (read := film.read())[0]:
        frames.append(read[1])
    return frames


def make_film(path, images, times=None, codec="libx264", rate=25, sar=1, pixels=None,
              role="default", sound=False, **options):  # fmt: skip
    """Write BGR or RGBA images as a film, at these times in seconds if given; sound: silence."""
    index_first = {"movflags": "faststart"} if path.suffix == ".mp4" else {}  # to be served
    kind = {"apng": "apng"}.get(codec, "mp4" if path.suffix == ".m4a" else None)
    with av.open(str(path), "w", format=kind, options=index_first) as film:
        stream = film.add_stream(codec, rate=rate, options=options)
        stream.height, stream.width = images[0].shape[:2]
        stream.pix_fmt = pixels or ("yuvj420p" if codec == "mjpeg" else "yuv420p")
        stream.disposition = av.stream.Disposition[role]
        stream.codec_context.time_base = Fraction(1, 1000) if times else 1 / Fraction(rate)
        stream.codec_context.sample_aspect_ratio = sar
        voice = sound and film.add_stream("aac", rate=44_100)
        for n, image in enumerate(images):
            frame = av.VideoFrame.from_ndarray(image, "rgba" if image.shape[2] == 4 else "bgr24")
            frame.time_base = stream.codec_context.time_base
            frame.pts = round(times[n] * 1000) if times else n
            film.mux(stream.encode(frame))
        film.mux(stream.encode(None))
        if sound:
            silence = av.AudioFrame.from_ndarray(np.zeros((1, 1024), "float32"), "fltp", "mono")
            silence.sample_rate = 44_100
            film.mux(voice.encode(silence) + voice.encode(None))
    return path


def frames_of(path):
    """Return [(timestamp, BGR image)] that webcam.py makes of a film."""
    film = films.Film(str(path), path.name)
    return [
        (timestamp, cv2.cvtColor(image, cv2.COLOR_RGB2BGR)) for timestamp, image in film.frames()
    ]


def difference(one, other):
    """Return the mean difference of two pictures of one size, grey levels."""
    return np.abs(np.asarray(one, int) - np.asarray(other, int)).mean()


@pytest.fixture(scope="session")
def frames(film):
    return read_film(film)


@pytest.fixture(scope="session")
def two(frames):
    return Image.fromarray(frames[0][..., ::-1])


# ---------------------------------------------------------------- films


def share_named(lines, truth):
    """Return the share of the drawn faces that have a line with their name where they are."""
    boxes = {(int(row["frame"]), row["label"]): box(row) for row in lines}
    named = []
    for number, faces in enumerate(truth):
        for face in faces:
            found = boxes.get((number, face["name"]), (0, 0, 0, 0))
            named.append(tracker.iou(found, [face[key] for key in "xywh"]) >= 0.5)
    return np.mean(named)


def test_drawn_people_are_found_and_named(drawn_model, tagged):
    truth = json.loads((drawn_model / "film.json").read_text(encoding="utf-8"))
    lines = rows(tagged.stdout)
    assert list(lines[0]) == FILM
    for row in lines:
        assert row["label"] in (row["best"], "unknown")
        assert all(re.fullmatch(r"\d+\.\d{6}", row[key]) for key in ("time", "probability"))
    assert share_named(lines, truth) >= 0.95 and len(lines) <= 1.02 * sum(map(len, truth))
    assert float(lines[-1]["time"]) == pytest.approx((len(truth) - 1) / sample_faces.FPS, abs=0.01)
    summary = r"150 frames, [\d.]+ a second shown, \d+ classifications; median detection [\d.]+ "
    summary += r"ms; median classification [\d.]+ ms; median label age [\d.]+ s"
    assert re.search(summary, tagged.stderr)


def test_the_written_film_is_whole_and_shows_the_tags(drawn_model, tagged):
    before, after = (read_film(drawn_model / name) for name in ("film.mp4", "tagged.mp4"))
    assert len(after) == len(before) and after[0].shape == before[0].shape
    x, y, w, _ = box(rows(tagged.stdout)[0])
    edge = slice(y, y + 4), x + w // 2
    assert np.abs(after[0][edge].astype(int) - before[0][edge]).max() > 40


@pytest.mark.parametrize(
    ("name", "codec"),
    [("old.mpg", "mpeg2video"), ("camcorder.mp4", "libx264"), ("phone.avi", "mpeg4")],
)
def test_interlaced_films(tmp_path, frames, name, codec):
    path = make_film(tmp_path / name, frames[:12], codec=codec, flags="+ilme+ildct", g="6")
    assert next(av.open(str(path)).decode(video=0)).interlaced_frame
    got = frames_of(path)
    assert len(got) == 12
    assert max(difference(image, frame) for (_, image), frame in zip(got, frames)) < 6


@pytest.mark.parametrize(("name", "codec"), [("cut.avi", "mjpeg"), ("cut.mkv", "libx264")])
def test_a_film_that_breaks_off(tmp_path, frames, capsys, name, codec):
    path = make_film(tmp_path / name, frames, codec=codec)
    os.truncate(path, path.stat().st_size // 2)
    assert 10 < len(frames_of(path)) < 40
    assert f"{name}: broke off after" in capsys.readouterr().err


MATRICES = {  # of a film's track header, and what a player does
    (1, 0, 0, 1): lambda image: image,
    (0, 1, -1, 0): lambda image: np.rot90(image, -1),
    (-1, 0, 0, -1): lambda image: image[::-1, ::-1],
    (0, -1, 1, 0): np.rot90,
    (-1, 0, 0, 1): lambda image: image[:, ::-1],
    (1, 0, 0, -1): lambda image: image[::-1],
    (0, 1, 1, 0): lambda image: image.transpose(1, 0, 2),
    (0, -1, -1, 0): lambda image: np.rot90(image, 2).transpose(1, 0, 2),
}


@pytest.mark.parametrize("matrix", MATRICES)
def test_all_eight_orientations(tmp_path, frames, matrix):
    path = make_film(tmp_path / "phone.mp4", frames[:2])
    header, numbers = (
        struct.pack(">9i", *(n << 16 for n in (a, b, 0, c, d, 0, 0, 0, 0x4000)))
        for a, b, c, d in ((1, 0, 0, 1), matrix)
    )
    data, place = path.read_bytes(), path.read_bytes().index(b"tkhd")
    path.write_bytes(data[:place] + data[place:].replace(header, numbers, 1))
    expected = MATRICES[matrix](frames[0])
    got = frames_of(path)[0][1]
    assert got.shape == expected.shape and difference(got, expected) < 6


@pytest.mark.parametrize("sar", [Fraction(2), Fraction(64, 45), Fraction(8, 9)])
def test_pixels_that_are_not_square(tmp_path, frames, sar):
    squeezed = cv2.resize(frames[0], (round(640 / sar) // 2 * 2, 480))
    image = frames_of(make_film(tmp_path / "dvd.mp4", [squeezed] * 2, sar=sar))[0][1]
    assert image.shape[0] == 480 and abs(image.shape[1] - 640) <= 2
    assert difference(cv2.resize(image, (640, 480)), frames[0]) < 8


@pytest.mark.parametrize("name", "camera.mjpeg moves%d.png moves.gif mix.film".split())
def test_pictures_in_a_row_are_films(tmp_path, tag_here, frames, name):
    """A network camera's are separated, and may change their size. `%d` stands for itself."""
    pictures, buffer = [Image.fromarray(frame[..., ::-1]) for frame in frames[:12]], io.BytesIO()
    Image.fromarray(IMAGE).save(tmp_path / "moves0.png")
    if name.startswith("moves"):
        pictures[0].save(tmp_path / name, save_all=True, append_images=pictures[1:], duration=50)
    else:
        is_mixed = name == "mix.film"
        for n, picture in enumerate(pictures):
            buffer.write(PART * is_mixed)
            picture.resize((320, 240) if is_mixed and n > 5 else (640, 480)).save(buffer, "JPEG")
            buffer.write(b"\r\n" * is_mixed)
        (tmp_path / name).write_bytes(buffer.getvalue())
    done = tag_here(*COLLECT, name, "--output", "out.avi")
    assert {int(row["frame"]) for row in rows(done.stdout)} == set(range(12)), done.stderr
    assert {frame.shape for frame in read_film(tmp_path / "out.avi")} == {(480, 640, 3)}


def test_a_pause_stops_the_clock_of_a_film(monkeypatch):
    """Afterwards every frame is shown for as long as before: the film does not catch up."""
    now = [0.0]
    monkeypatch.setattr(webcam.time, "monotonic", lambda: now[0])
    clock, left = sources.PlaybackClock(), []
    for n in range(40):
        left.append(clock.seconds_until(n / 25))
        now[0] += 60 if n == 20 else left[-1]
    assert left[1:21] == pytest.approx([1 / 25] * 20)
    assert left[21] == pytest.approx(0) and left[22:] == pytest.approx([1 / 25] * 18)


CALL = [*np.arange(20) / 25, *(1 + np.arange(10) * 0.2)]  # quick for a while, then slow
PHONE_RATE = Fraction(11698324, 100000)


@pytest.mark.parametrize("output", ["out.mp4", "out.avi"])
@pytest.mark.parametrize(
    ("name", "options", "times"),
    [
        ("call.mkv", {"times": CALL}, CALL),
        ("phone.mp4", {"rate": PHONE_RATE}, np.arange(30) / float(PHONE_RATE)),
        ("raw.h264", {}, np.arange(30) / 25),  # has no times
    ],
)
def test_frames_keep_their_times(tmp_path, tag_here, frames, output, name, options, times):
    make_film(tmp_path / name, frames[:30], **options)
    done = tag_here(*COLLECT, name, "--output", output, "--whole-picture")
    got = [float(row["time"]) for row in rows(done.stdout)]
    assert got == pytest.approx(times, abs=0.002), done.stderr
    written = [timestamp for timestamp, _ in frames_of(tmp_path / output)]
    assert written == pytest.approx(times, abs=0.04)


@on_linux
def test_a_film_whose_name_is_not_utf8(tmp_path, tag_here, film):
    shutil.copy(film, os.fsencode(tmp_path) + b"/x\xff.mp4")
    output = os.fsdecode(b"y\xff.mp4")
    done = tag_here(*COLLECT, os.fsdecode(b"x\xff.mp4"), "--output", output)
    assert done.returncode == 0 and len(rows(done.stdout)) == 100, done.stderr
    assert (tmp_path / output).stat().st_size > 1000


def test_a_film_without_a_window_shows_how_far_it_is(tmp_path, film):
    command = [sys.executable, str(WEBCAM), *COLLECT, str(film), "--no-display"]
    code, told = on_terminal(command, tmp_path)
    assert code == 0 and re.search(rb"frames: +\d+%\|.*[1-9]\d?/50", told), told
    shown = [line.rpartition("\r")[2] for line in told.decode().replace("\r\n", "\n").split("\n")]
    lines = [line for line in shown if re.fullmatch(r"\d+\t[\d.]+(\t\d+){5}\t\t\t", line)]
    assert len(lines) == 100, shown[:5]


def test_a_damaged_frame_does_not_end_the_film(tmp_path, frames):
    path = make_film(tmp_path / "damaged.avi", frames[:9], codec="mjpeg")
    data = path.read_bytes()
    place = data.index(b"\xff\xd8\xff", len(data) // 2)
    path.write_bytes(data[:place] + bytes(2000) + data[place + 2000 :])
    times = [timestamp for timestamp, _ in frames_of(path)]
    assert len(times) == 8 and times[-1] == pytest.approx(8 / 25)


HDR = {"smpte2084": (0.38, 0.58), "arib-std-b67": (0.38, 0.75)}  # signals of a grey card, of white


@pytest.mark.parametrize("transfer", HDR)
def test_hdr_is_shown_as_sdr(tmp_path, transfer):
    """As ITU-R BT.2408 has it."""
    image = np.repeat(np.rint(np.array(HDR[transfer]) * 255), 32).astype("uint8")
    image = np.broadcast_to(image[:, None], (48, 64, 3)).copy()
    path = make_film(tmp_path / "hdr.mp4", [image] * 2, **{"x264-params": f"transfer={transfer}"})
    got = frames_of(path)[0][1]
    assert got[24, 10] == pytest.approx(255 * (26 / 203) ** (1 / 2.2), abs=9)  # 8 bits
    assert got[24, 50].min() > 235


@pytest.mark.parametrize(
    ("name", "codec", "pixels", "alpha", "left"),
    [
        ("moves.png", "apng", "rgba", 255, 255),
        ("moves.mov", "qtrle", "argb", 255, 255),
        ("screen.avi", "rawvideo", "bgra", 0, 0),  # which leaves its alpha empty: not transparent
    ],
)
def test_what_is_transparent_is_on_white(tmp_path, name, codec, pixels, alpha, left):
    image = np.zeros((48, 64, 4), "uint8")
    image[:, 32:] = 200, 50, 20, alpha
    got = frames_of(make_film(tmp_path / name, [image] * 2, codec=codec, pixels=pixels))[0][1]
    assert got[20, 10].tolist() == [left] * 3 and got[20, 50].tolist() == [20, 50, 200]


# ---------------------------------------------------------------- pictures and folders


def test_a_folder_of_films_and_photos(tmp_path, tag_here, film, frames, two):
    folder, shown = tmp_path / "holiday", tmp_path / "shown"
    (folder / "day 1").mkdir(parents=True)
    shutil.copy(film, folder / "day 1" / "beach.mp4")
    make_film(folder / "boat.mov", frames[:10], sound=True)
    make_film(folder / "kite.mov", frames[:10], sound=True)
    make_film(folder / "camcorder.mpg", frames[:12], codec="mpeg2video").rename(folder / "M01.MOD")
    two.save(folder / "two.PNG")
    two.save(folder / "moves.webp", save_all=True, append_images=[two.rotate(5)])
    (folder / "broken.mkv").write_bytes(b"no film" * 99)
    unknown = make_film(folder / "codec.mp4", frames[:5])
    unknown.write_bytes(unknown.read_bytes().replace(b"avc1", b"zzz1"))
    os.mkfifo(folder / "pipe.mp4")
    for name in ("1.AAE", "1.JPG.json", "2.JPG.json"):
        (folder / name).write_text("{}")
    done = tag_here(*COLLECT, "holiday", "--output", "shown")
    lines = rows(done.stdout)
    assert done.returncode == 0 and list(lines[0]) == ["file", *FILM], done.stderr
    films_of = {"day 1/beach.mp4": 100, "boat.mov": 20, "kite.mov": 20, "M01.MOD": 24}
    faces = collections.Counter(row["file"] for row in lines)
    assert faces == films_of | {"two.PNG": 2, "moves.webp": 2}
    for reason in (
        "broken.mkv: skipped: no frame can be read",
        "codec.mp4: skipped: there is no film in it, or none of a known codec",
        "pipe.mp4: skipped: not a file",
        "--output shown: the sound of a film is not written",
        "holiday…: 3 files are no pictures: 2 .json, 1 .aae",
    ):
        assert reason in done.stderr
    assert done.stderr.count("warning: ") == 5
    runs = {re.sub("-.*", "", path.name) for path in (tmp_path / "faces").iterdir()}
    assert runs == {"beach", "boat", "kite", "M01"}
    written = {path.relative_to(shown).as_posix() for path in shown.rglob("*.*")}
    names = {"boat.mov.mp4", "kite.mov.mp4", "M01.MOD.mp4", "two.PNG", "moves.webp.jpg"}
    assert written == names | {"day 1/beach.mp4"}
    assert len(read_film(shown / "boat.mov.mp4")) == 10


def test_training_crops_get_the_probabilities_that_evaluation_gives(drawn_model, tag_here):
    done = train_here(drawn_model, "people", "model", "--evaluate")
    assert done.returncode == 0, done.stderr
    with open(drawn_model / "model-evaluate.csv", encoding="utf-8", newline="") as file:
        table = {row["file"]: row for row in csv.DictReader(file)}
    source = "--source", drawn_model / "people"
    done = tag_here(drawn_model / "model", *source, "--whole-picture", "--threshold", 0)
    got = rows(done.stdout)
    assert len(got) == 200 == len(table)
    for row in got:  # another batch size differs in the last bits
        expected = table[row["file"]]
        assert row["label"] == expected["predicted"]
        assert float(row["probability"]) == pytest.approx(float(expected["probability"]), abs=2e-6)


def test_a_folder_with_broken_files_and_names_of_all_kinds(tmp_path, tag_here, two):
    source = tmp_path / "photos"
    (source / "été").mkdir(parents=True)
    two.save(source / "été" / "王 & co.webp")
    two.save(source / "phone.heic")
    two.save(source / "phone.heic.jpg")
    sideways = Image.Exif()
    sideways[274] = 6
    two.transpose(Image.Transpose.ROTATE_90).save(source / "turned.jpg", exif=sideways)
    (source / "cut.jpg").write_bytes((source / "turned.jpg").read_bytes()[:3000])
    (source / "empty.png").write_bytes(b"")
    (source / ".hidden.jpg").write_bytes(b"no picture")
    done = tag_here(*COLLECT, "photos", "--output", "shown")
    assert done.returncode == 0, done.stderr
    lines = rows(done.stdout)
    assert list(lines[0]) == ["file", "face", *FACE]
    names = ["phone.heic", "phone.heic.jpg", "turned.jpg", "été/王 & co.webp"]
    faces = sorted((row["file"], row["face"]) for row in lines)
    assert faces == [(name, face) for name in names for face in "01"]
    assert len(re.findall("^warning: .*(cut.jpg|empty.png): skipped: ", done.stderr, re.M)) == 2
    assert re.search(r"^4 photos: 8 faces; [\d.]+ a second$", done.stderr, re.M)
    shown = tmp_path / "shown"
    written = sorted(path.relative_to(shown).as_posix() for path in shown.rglob("*.*"))
    assert re.fullmatch(r"phone-[0-9a-f]{8}\.heic\.jpg", written.pop(0))  # another has its name
    assert written == ["phone.heic.jpg", "turned.jpg", "été/王 & co.webp.jpg"]
    assert Image.open(shown / "turned.jpg").size == two.size


def test_what_phones_hang_behind_a_photo_is_not_a_film(tmp_path, tag_here, two):
    """The depths of a portrait, for one: smaller JPEGs after the first."""
    with open(tmp_path / "portrait.jpg", "wb") as file:
        for size in (two.size, (64, 48), (64, 48), (64, 48)):
            two.resize(size).save(file, "JPEG")
    done = tag_here(*COLLECT, "portrait.jpg", "--output", "tagged.jpg")
    assert [row["file"] for row in rows(done.stdout)] == ["portrait.jpg"] * 2, done.stderr
    assert Image.open(tmp_path / "tagged.jpg").size == two.size


def test_faces_that_are_too_small_are_told_with_the_option_that_finds_them(tmp_path, tag_here, two):
    far = Image.new("RGB", (1280, 960), (200, 200, 200))
    far.paste(two.resize((320, 240)), (400, 300))
    (tmp_path / "mixed").mkdir()
    far.save(tmp_path / "mixed" / "far.png")
    Image.new("RGB", (60, 60)).save(tmp_path / "mixed" / "last.png")  # smaller ones are sought
    done = tag_here(*COLLECT, "mixed")
    assert rows(done.stdout) == []
    advice = "no face of 120 px or larger was found; the smallest there has "
    option = re.search(rf"tagged: {advice}\d+ px: --min-face (\d+) would", done.stderr)
    assert option, done.stderr
    assert rows(tag_here(*COLLECT, "mixed/far.png", "--min-face", option[1]).stdout)


def test_a_picture_with_sixty_faces(drawn_model, tmp_path, tag_here):
    crowd = Image.new("RGB", (1600, 960))
    for n, path in enumerate(sorted((drawn_model / "people").glob("*/*.jpg"))[::3][:60]):
        crowd.paste(Image.open(path), (n % 10 * 160, n // 10 * 160))
    crowd.save(tmp_path / "crowd.png")
    words = ("--source", "crowd.png", "--min-face", 60, "--output", "tagged.png")
    done = tag_here(drawn_model / "model", *words)
    lines = rows(done.stdout)
    assert 50 <= len(lines) <= 70, done.stderr
    names = [row["label"] for row in lines if row["label"] != "unknown"]
    assert len(names) == len(set(names)) > 0, "the same name twice"
    assert {row["best"] for row in lines if row["label"] == "unknown"} >= {"Ann"}
    assert Image.open(tmp_path / "tagged.png").size == crowd.size


# ---------------------------------------------------------------- what the model says


def test_a_model_of_things_is_given_whole_pictures(drawn_model, tmp_path, tag_here):
    """It says that few of the pictures that it was trained on are crops of faces."""
    import h5py

    for path in drawn_model.glob("model*.[hj]*"):
        shutil.copy(path, tmp_path)
    with h5py.File(tmp_path / "model.h5", "a") as file:
        info = json.loads(file.attrs["kit"])
        file.attrs["kit"] = json.dumps(info | {"face_crops": 0.1})
    (tmp_path / "photos").mkdir()
    for name in ("Ann", "Ben"):
        shutil.copy(drawn_model / "people" / name / "000.jpg", tmp_path / "photos" / f"{name}.jpg")
    done = tag_here("model", "--source", "photos")
    lines = [(row["file"], row["face"], row["w"]) for row in rows(done.stdout)]
    assert lines == [("Ann.jpg", "0", "160"), ("Ben.jpg", "0", "160")], done.stderr
    assert re.search(r"^2 photos: .*; [\d.]+ a second$", done.stderr, re.M)
    assert "frames" not in done.stderr
    faces = rows(tag_here("model.h5", "--source", "photos", "--faces").stdout)
    assert faces and all(int(row["w"]) < 160 for row in faces)


@pytest.mark.parametrize(
    ("threshold", "means", "expected"),
    [
        (0.5, [(0.9, 0.1, 0.0), (0.6, 0.4, 0.0)], ["Ann", "unknown"]),  # the surer keeps the name
        (0.5, [(0.4, 0.35, 0.25)], ["unknown"]),
        (0.5, [(0.1, 0.1, 0.8), (0.0, 0.3, 0.7)], ["unknown", "unknown"]),
        (0.5, [(0.6, 0.4, 0.0), (0.9, 0.1, 0.0), (0.1, 0.9, 0.0)], ["unknown", "Ann", "Ben"]),
        (0.0, [(0.9, 0.1, 0.0), (0.4, 0.35, 0.25)], ["Ann", "Ann"]),  # the closed world
    ],
)
def test_names(threshold, means, expected):
    labels = ["Ann", "Ben", "unknown"]
    tracks = [tracker.Track(0, (0, 0, 9, 9), 0, 0, mean=np.array(mean)) for mean in means]
    webcam.assign_labels(tracks, labels, threshold)
    assert [track.label for track in tracks] == expected
    assert [track.best for track in tracks] == [labels[np.argmax(mean)] for mean in means]
    assert [track.probability for track in tracks] == [max(mean) for mean in means]


@pytest.mark.parametrize("name", ["Mihály Köles", "Ελένη", "王", "Иван"])
def test_every_script_is_drawn(name):
    from matplotlib import ft2font

    if not set(map(ord, name)) <= set(ft2font.FT2Font(report.font_file(name)).get_charmap()):
        pytest.skip(f"no font on this machine has {name}")
    drawn = []
    for text in (name, "\U000f0000" * len(name)):  # a character that no font has
        image = Image.new("RGB", (400, 60))
        webcam.draw_label(image, 5, 5, 30, "#000000", text)
        drawn.append(np.asarray(image))
    assert not np.array_equal(*drawn) and drawn[0].max() > 200


# ---------------------------------------------------------------- tracks


def test_two_tracks_never_share_one_face(frames):
    """Where people cross, one of them is hidden: only one track goes on."""
    image = cv2.cvtColor(frames[0][:, :300], cv2.COLOR_BGR2RGB)  # one person
    follower = tracker.Tracker(min_face=60)
    x, y, w, h = follower.update(sources.Frame(0, 0.0, image))[0].box
    boxes = [(x + shift, y, w, h) for shift in (w // 5, -w // 5)]
    follower.tracks = [tracker.Track(n, box, 0.0, 0.0) for n, box in enumerate(boxes)]
    both = follower.update(sources.Frame(1, 0.04, image))  # looks around both of them
    assert sorted(track.seen for track in both) == [0.0, 0.04]
    late = tracker.MAX_MISSED + 0.05
    follower.update(sources.Frame(8, late - 0.04, image))
    assert [track.seen for track in follower.update(sources.Frame(9, late, image))] == [late]


@pytest.mark.parametrize(
    ("step", "faces", "expected"),
    [  # frames of a film of 30 a second from one handled to the next; whether the face is found
        (1, "xx.........", "xxxxxxxxxxx"),
        (1, "xx" + 10 * ".", 11 * "x" + "."),  # hidden for 0.3 s
        (9, "xx.x..", "xxxxx."),  # a slow machine may miss it once
        (20, "xx...", "xx..."),  # no ghosts
    ],
)
def test_a_track_lives_for_seconds_however_many_frames_come(step, faces, expected):
    follower, shown = tracker.Tracker(), ""
    for n, face in enumerate(faces):
        follower.update_tracks([((10, 10, 50, 50), 9)] * (face == "x"), n * step / 30)
        shown += "x" if [track.id for track in follower.tracks] == [0] else "."
    assert shown == expected


# ---------------------------------------------------------------- events


def events(capsys, *moments):
    """Return (event, time, label, seconds) for (timestamp, {id: (label, agreeing)})."""
    writer, tracks = webcam.EventWriter(), {}
    for timestamp, people in moments:
        for n, (label, agreeing) in people.items():
            track = tracks.setdefault(n, tracker.Track(n, (0, 0, 9, 9), timestamp, timestamp))
            track.seen, track.label, track.agreeing = timestamp, label, agreeing
        writer.write(sources.Frame(0, timestamp, IMAGE), [tracks[n] for n in people])
    writer.close()
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    return [(line["event"], line["time"], line["label"], line["seconds"]) for line in lines]


def test_somebody_comes_is_lost_for_a_moment_and_leaves(capsys):
    first = [(0.0, {0: ("Ann", 1)}), (0.6, {0: ("Ann", 3)})]
    later = [(1.0, {}), (2.0, {1: ("Ann", 3)}), (9.0, {2: ("Ben", 2)})]
    got = events(capsys, *first, *later)
    assert got == [("appeared", 0.6, "Ann", 0.6), ("left", 2.0, "Ann", 2.0)]


def test_who_was_taken_for_a_stranger_lost_before_was_not_there_longer(capsys):
    first = [(0.0, {0: ("unknown", 3)}), (1.0, {}), (2.0, {1: ("unknown", 3)})]
    got = events(capsys, *first, (4.0, {1: ("Ann", 3)}))
    assert got[:2] == [("appeared", 0.0, "unknown", 0.0), ("left", 4.0, "unknown", 4.0)]
    assert got[2:] == [("appeared", 4.0, "Ann", 2.0), ("left", 4.0, "Ann", 2.0)]


def test_two_strangers_are_two_and_a_new_name_is_news(capsys):
    before, after = {0: ("unknown", 3), 1: ("unknown", 4)}, {0: ("Ann", 3), 1: ("unknown", 5)}
    got = [event[:3] for event in events(capsys, (1.0, before), (2.0, after))]
    assert got[:2] == [("appeared", 1.0, "unknown")] * 2
    assert got[2:4] == [("left", 2.0, "unknown"), ("appeared", 2.0, "Ann")]
    assert got[4:] == [("left", 2.0, "unknown"), ("left", 2.0, "Ann")]


# ---------------------------------------------------------------- cameras, streams, windows


def test_dropped_frames_are_no_loss(monkeypatch):
    monkeypatch.setattr(sources, "READ_TIMEOUT", 0.1)
    answers = iter([False, False, True, False, True, True])
    capture = SimpleNamespace(read=lambda: (next(answers, False), IMAGE))
    capture.isOpened, capture.release = lambda: True, lambda: None
    assert len(list(sources.camera_images(capture))) == 3


@pytest.mark.parametrize("moments", [[0.0], [0.01], [0.0, 0.5, 1.0], [0.0, 0.01, 3600.0]])
def test_the_film_of_a_camera_runs_as_fast_as_the_camera_did(tmp_path, moments):
    for name in ("out.avi", "out.mp4"):
        with webcam.open_output(tmp_path / name, webcam.LIVE_FPS) as write:
            for moment in moments:
                write(Image.fromarray(IMAGE), moment)
        last = min(moments[-1], 0.01 + films.MAX_FRAME_GAP)
        assert frames_of(tmp_path / name)[-1][0] == pytest.approx(last, abs=0.04)


@pytest.mark.skipif(sys.platform == "win32", reason="needs a limit on the size of files")
@pytest.mark.parametrize("name", ["out.mp4", "out.avi"])
def test_a_full_disk_while_a_film_is_written_is_one_line(tmp_path, name):
    lines = f"""
        import sys
        sys.path.insert(0, {str(ROOT)!r})
        import numpy, pathlib, resource, films, utils
        from PIL import Image
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        def main():
            film = films.write_film(pathlib.Path({name!r}), 25)
            next(film)
            noise = numpy.random.default_rng(0).integers(0, 255, (240, 320, 3))
            for n in range(99):
                film.send((Image.fromarray(noise.astype("uint8")), n / 25))
            film.close()
        utils.run(main)
    """
    command = [sys.executable, "-c", textwrap.dedent(lines)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, encoding="utf-8")
    assert re.match(
        f"error: --output {name}: could not be written .*free some space", error_line(done)
    )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("label", "whole", "expected"),
    [("Ann", True, "Ann 51%"), ("unknown", True, "Ann? 51%"), ("unknown", False, "unknown")],
)
def test_captions(label, whole, expected):
    track = tracker.Track(0, (0, 0, 9, 9), 0, 0, label=label, best="Ann", probability=0.512)
    assert webcam.caption(track, whole) == expected


def live_parts(monkeypatch, images, *arguments):
    """Return what `tag_live` takes, for a camera that gives these images; of whole pictures."""
    args = webcam.parse_arguments([*COLLECT, "0", "--no-display", *arguments])
    args.save_faces = args.context = None
    source = sources.Source("camera", "0")
    monkeypatch.setattr(sources, "open_live", lambda *_: (iter(images), False))
    tagger = webcam.Tagger(args, source)
    return source, tagger, webcam.Viewer(tagger)


def test_nothing_is_printed_or_saved_after_the_end(monkeypatch):
    """The frame at hand is finished, and no other is begun, before the summary is made."""
    begun, finished = [], []

    def slow(frame):
        begun.append(frame)
        time.sleep(0.3)
        finished.append(frame)

    def interrupted(*_):
        if begun:  # Ctrl-C as soon as a frame is being handled
            raise KeyboardInterrupt

    source, tagger, viewer = live_parts(monkeypatch, itertools.repeat(IMAGE))
    tagger.handle, viewer.show = slow, interrupted
    with pytest.raises(KeyboardInterrupt):
        webcam.tag_live(source, tagger, viewer)
    assert len(begun) == len(finished) == 1
    time.sleep(0.4)
    assert len(begun) == len(finished) == 1


def test_a_camera_is_shown_while_its_model_is_loaded(monkeypatch):
    """And what is wrong with the model is told then."""
    source, tagger, viewer = live_parts(monkeypatch, itertools.repeat(IMAGE), "friends")

    def load(prefix):
        end = time.monotonic() + 20
        while viewer.count < 3 and time.monotonic() < end:
            time.sleep(0.01)
        raise webcam.utils.UserError(f"{prefix}: {viewer.count >= 3}")

    monkeypatch.setattr(webcam.model, "load_model", load)
    with pytest.raises(webcam.utils.UserError, match="friends: True"):
        webcam.tag_live(source, tagger, viewer)


def test_cameras_that_do_open_are_named_where_the_wanted_one_does_not(tag_here, film, monkeypatch):
    opened, real = {1: str(film), 3: str(film)}, cv2.VideoCapture
    monkeypatch.setattr(cv2, "VideoCapture", lambda number, *_: real(opened.get(number, "")))
    line = error_line(tag_here("--save-faces", "faces"))
    assert re.fullmatch(r"error: camera 0: .*\b1\b.*\b3\b.*", line), line


def test_a_lost_camera_is_tried_three_times(monkeypatch, capsys):
    monkeypatch.setattr(sources, "RECONNECT_DELAYS", (0.01, 0.02, 0.03))
    images = iter([[IMAGE] * 3, [], [IMAGE, IMAGE], [], [], []])
    monkeypatch.setattr(sources, "open_live", lambda *_: (next(images), False))
    got, lost = [], "camera 0: lost, and 3 tries did not bring it back"
    with pytest.raises(webcam.utils.UserError, match=lost):
        source = sources.Source("camera", "0", "camera 0")
        for frame in sources.live_frames(source, threading.Event()):
            got.append(frame.index)
    assert got == [0, 1, 2, 3, 4]
    assert capsys.readouterr().err.count("lost: trying again") == 2 + 3


class Stream(http.server.SimpleHTTPRequestHandler):
    """Serves files, and at /live JPEG pictures for ever, 25 a second, as a network camera does."""

    def do_GET(self):
        if not self.path.startswith("/live"):
            return super().do_GET()
        self.send_response(200)
        self.send_header("Content-Type", "multipart/x-mixed-replace; boundary=frame")
        self.end_headers()
        with contextlib.suppress(OSError):
            while not self.server.ended.wait(0.04):
                self.wfile.write(PART + self.server.jpeg + b"\r\n")

    def log_message(self, *_):
        pass


@pytest.mark.slow
@pytest.mark.parametrize("stop", ["a reader that leaves", "a terminal that is closed"])
def test_an_earlier_film_is_replaced_by_a_whole_one_only(tmp_path, film, stop):
    (tmp_path / "out.mp4").write_bytes(b"earlier")
    process = start(WEBCAM, tmp_path, *COLLECT, film, "--output", "out.mp4", "--no-display")
    for _ in range(20):
        process.stdout.readline()
    if stop == "a reader that leaves":
        process.stdout.close()
        assert process.wait(60) == 1
        assert "nobody reads what is printed" in process.stderr.read()
        assert (tmp_path / "out.mp4").read_bytes() == b"earlier"
    else:
        process.send_signal(signal.SIGHUP)
        process.communicate(timeout=60)
        assert process.returncode == 130
        assert len(read_film(tmp_path / "out.mp4")) > 5
    assert {path.name for path in tmp_path.iterdir()} == {"out.mp4", "faces"}


@pytest.mark.slow
def test_a_stream_that_dies_comes_back_and_is_ended_by_ctrl_c(tmp_path, two):
    """The frame at hand is finished: all lines are whole, and so is the film."""
    buffer = io.BytesIO()
    two.save(buffer, "JPEG")
    with serve(Stream, jpeg=buffer.getvalue()) as server:
        port = server.server_port
        address = f"http://me:secret@127.0.0.1:{port}/live?key=secret"
        process = start(WEBCAM, tmp_path, *COLLECT, address, "--output", "out.avi", "--no-display")
        lines = [process.stdout.readline() for _ in range(10)]
    before = process.stderr.readline()
    with serve(Stream, port, jpeg=buffer.getvalue()):
        lines += [process.stdout.readline() for _ in range(200)]
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=20)
    assert before == "warning: stream 127.0.0.1: lost: trying again in 1 s\n"
    assert process.returncode == 130 and "Traceback" not in errors
    assert lines[0].split() == FILM
    assert all(line.count("\t") == 9 for line in lines + output.splitlines()), lines
    assert re.search(r"^\d+ frames, ", errors, re.M)
    assert "secret" not in before + errors + " ".join(os.listdir(tmp_path / "faces"))
    assert re.fullmatch(r"stream-127\.0\.0\.1-\d{8}-\d{6}", os.listdir(tmp_path / "faces")[0])
    assert len(read_film(tmp_path / "out.avi")) > 10


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "codec"), [("a.avi", "mjpeg"), ("a.mp4", "libx264"), ("a.ts", "libx264")]
)
def test_a_served_film_plays_once_and_as_fast_as_it_is(tmp_path, tag_here, frames, name, codec):
    make_film(tmp_path / name, frames, codec=codec)
    with serve(functools.partial(Stream, directory=tmp_path)) as server:
        done = tag_here(*COLLECT, f"http://127.0.0.1:{server.server_port}/{name}")
    assert done.returncode == 0 and "lost" not in done.stderr, done.stderr
    moments = {float(row["time"]) for row in rows(done.stdout)}
    assert len(moments) > 5 and 0.8 * 2 < max(moments) < 2 * 2, moments


def test_a_device_is_a_camera_and_an_address_without_a_host_is_here():
    camera, stream = map(sources.find_source, ("/dev/video2", "udp://@:5600"))
    assert (camera.kind, camera.name) == ("camera", "2")
    assert (stream.kind, stream.title) == ("stream", "stream here")


@pytest.fixture
def screen():
    if not (shutil.which("Xvfb") and shutil.which("xdotool")):
        pytest.skip("needs Xvfb, xdotool")
    read, write = os.pipe()
    command = ["Xvfb", "-displayfd", str(write), "-screen", "0", "1280x900x24"]
    process = subprocess.Popen(command, pass_fds=[write], stderr=subprocess.DEVNULL)
    yield ":" + os.read(read, 20).decode().strip()
    process.terminate()
    process.wait()


CLOSE = """
import ctypes, struct
x = ctypes.CDLL("libX11.so.6")
x.XOpenDisplay.restype = pointer = ctypes.c_void_p
x.XInternAtom.restype = ctypes.c_ulong
display = pointer(x.XOpenDisplay(None))
atoms = [x.XInternAtom(display, name, 0) for name in (b"WM_PROTOCOLS", b"WM_DELETE_WINDOW")]
event = struct.pack("iLiPLLi5l", 33, 0, 0, 0, {window}, atoms[0], 32, atoms[1], 0, 0, 0, 0)
x.XSendEvent(display, ctypes.c_ulong({window}), 0, ctypes.c_long(0), event.ljust(192))
x.XSync(display, 0)
"""  # what a window manager does when a window's cross is clicked


def press_until(window, key, done, **shown):
    """Press a key till something is done: without a window manager one is lost now and then."""
    for _ in range(20):
        subprocess.run(["xdotool", "windowfocus", window, "key", key], **shown)
        for _ in range(10):
            if done():
                return
            time.sleep(0.1)
    raise AssertionError(f"{key} did nothing")


@pytest.mark.parametrize("how", ["q", "Escape", "close"])
def test_a_window_and_its_keys(tmp_path, two, screen, how):
    two.save(tmp_path / "two.png")
    process = start(WEBCAM, tmp_path, *COLLECT, "two.png", DISPLAY=screen)
    shown = {"env": os.environ | {"DISPLAY": screen}, "timeout": 30, "check": False}
    find = ["xdotool", "search", "--sync", "--name", f"^{webcam.TITLE}$"]
    window = subprocess.run(find, capture_output=True, text=True, **shown).stdout.split()[0]
    press_until(window, "s", lambda: list(tmp_path.glob("snapshot-*.png")), **shown)
    assert process.poll() is None
    arrows = ["Left", "Right"] * 5  # whose codes end as those of Q and S do
    subprocess.run(["xdotool", "windowfocus", window, "key", *arrows], **shown)
    time.sleep(0.5)
    assert process.poll() is None
    if how == "close":
        subprocess.run([sys.executable, "-c", CLOSE.format(window=window)], **shown)
    else:
        press_until(window, how, lambda: process.poll() is not None, **shown)
    errors = process.communicate(timeout=30)[1]
    assert process.returncode == 0, errors
    corner = (480, 0, 640, 40)  # where the window, and it alone, tells how many are kept
    for path in tmp_path.glob("snapshot-*.png"):
        snapshot = Image.open(path)
        assert snapshot.size == two.size and difference(snapshot, two) > 0
        assert difference(snapshot.crop(corner), two.crop(corner)) == 0


# ---------------------------------------------------------------- mistakes


@pytest.fixture(scope="session")
def mistaken(tmp_path_factory, film):
    """A folder of what people give by mistake."""
    folder = tmp_path_factory.mktemp("mistakes")
    shutil.copy(film, folder / "film.mp4")
    os.link(folder / "film.mp4", folder / "twin.mp4")
    (folder / "empty.mp4").touch()
    for name in ("notes.txt", "art.bin"):
        (folder / name).write_text("Ann, Ben and Cleo\n" * 300)
    song = {"codec": "mjpeg", "role": "attached_pic", "sound": True}
    make_film(folder / "song.m4a", [IMAGE], **song)  # with a cover
    Image.new("1", (19000, 19000)).save(folder / "huge.png")  # beyond Pillow's own limit, too
    (folder / "nothing").mkdir()
    (folder / "photos").mkdir()
    return folder


MISTAKES = """
2 | | give the prefix of a model, or --save-faces DIR
2 | model --threshold 1.5 | 1.5 is not between 0 and 1
2 | model --output= | argument --output: is empty: give a path
2 | model a.mp4 b.mp4 | unrecognized arguments: a.mp4 b.mp4 (--source takes one film
1 | model --source film.mp4 | error: model.json: no such file
1 | photos/ --source film.mp4 | error: photos: is a folder: give the prefix of a model, photos/model
1 | FACES --source missing.mp4 | error: --source missing.mp4: no such file
1 | FACES --source empty.mp4 | error: --source empty.mp4: no frame can be read
1 | FACES --source notes.txt | error: --source notes.txt: there is no film in it
1 | FACES --source art.bin | error: --source art.bin: no frame can be read
1 | FACES --source song.m4a | error: --source song.m4a: there is no film in it
1 | FACES --source huge.png | error: --source huge.png: larger than 178,956,970 pixels
1 | FACES --source nothing | error: --source nothing: no picture or film in it can be read
1 | FACES --source photos --events | error: --events: there is no film in the source
1 | FACES --source 97 | error: camera 97: no picture comes from it
1 | FACES --source rtsp://127.0.0.1:9/\udcff | error: stream 127.0.0.1: no picture comes from it
1 | FACES --source rtsp:///secret | error: --source rtsp://…: no address: give one
1 | FACES --source rtsp://me:secret@[::1/live | error: --source rtsp://…: no address: give one
2 | FACES --by-name --source rtsp://me:secret@10.0.0.1/live | error: stream 10.0.0.1: --by-name
1 | --save-faces notes.txt --source film.mp4 | error: --save-faces notes.txt: is a file
1 | FACES --source photos --output tagged.mp4 | error: --output tagged.mp4: is a file, or named
1 | --save-faces photos/x --source photos | error: --save-faces photos/x: is or lies in the source
1 | FACES --source film.mp4 --output film.mp4 | error: --output film.mp4: is or lies in the source
1 | FACES --source film.mp4 --output twin.mp4 | error: --output twin.mp4: is or lies in the source
1 | FACES --source film.mp4 --output out.gif | error: --output out.gif: wrong ending
1 | FACES --source film.mp4 --output no/out.mp4 | error: --output no/out.mp4: is a folder, or lies
"""


@pytest.mark.parametrize("mistake", MISTAKES.strip().splitlines())
def test_mistakes_are_told_in_one_line(mistaken, tag_here, tmp_path, mistake):
    code, arguments, message = (part.strip() for part in mistake.split("|"))
    for path in mistaken.iterdir():
        os.symlink(path, tmp_path / path.name)
    before = sorted(tmp_path.iterdir())
    done = tag_here(*arguments.replace("FACES", "--save-faces faces").split())
    assert done.returncode == int(code)
    assert message in done.stderr.splitlines()[-1]
    assert code == "2" or len(done.stderr.splitlines()) == 1, done.stderr
    assert "secret" not in done.stderr
    assert sorted(tmp_path.iterdir()) == before


def test_originals_are_not_replaced_by_tagged_copies(tag_here, tmp_path, two):
    """par/sub/sub/x.png would become par/sub/x.png, which is an original, too."""
    (tmp_path / "par" / "sub" / "sub").mkdir(parents=True)
    two.save(tmp_path / "par" / "sub" / "sub" / "x.png")
    done = tag_here(*COLLECT, "par/sub", "--output", "par")
    assert "--output par: holds the source" in error_line(done)
    assert [path.name for path in tmp_path.rglob("*.*")] == ["x.png"]


@pytest.mark.parametrize("missing", ["CascadeClassifier", "cascade file", "half a file", "nothing"])
def test_what_is_missing_is_told_with_the_remedy(tmp_path, film, missing):
    """In a folder whose name has OpenCV itself end the process."""
    folder = tmp_path / (os.fsdecode(b"\xff") if sys.platform == "linux" else "kit")
    folder.mkdir()
    for script in ROOT.glob("*.py"):
        shutil.copy(script, folder / script.name)
    remedy, cascade = "copy it from the kit", webcam.imaging.CASCADE
    if missing == "CascadeClassifier":
        (folder / "cv2.py").write_text("__version__ = '5.0.0'")
        remedy = 'pip install "opencv-python<5"'
    elif missing != "cascade file":
        text = (ROOT / cascade).read_text()
        (folder / cascade).write_text(text if missing == "nothing" else text[:100_000])
    done = run_process(folder / "webcam.py", tmp_path, *COLLECT, film, "--no-display")
    if missing == "nothing":
        assert done.returncode == 0, done.stderr
    else:
        assert done.returncode == 1 and len(done.stderr.splitlines()) == 1
        assert remedy in done.stderr


def test_a_film_trimmed_without_loss_is_whole(tmp_path, frames, capsys):
    whole = make_film(tmp_path / "whole.mp4", frames, g="10", bf="0")
    with av.open(str(whole)) as film, av.open(str(tmp_path / "trimmed.mp4"), "w") as trimmed:
        stream = trimmed.add_stream_from_template(film.streams.video[0])
        for packet in film.demux(video=0):
            if packet.dts is not None:  # the first seven frames come before the start
                packet.pts -= round(0.28 / packet.time_base)
                packet.dts -= round(0.28 / packet.time_base)
                packet.stream = stream
                trimmed.mux(packet)
    assert len(frames_of(tmp_path / "trimmed.mp4")) == 43
    assert capsys.readouterr().err == ""


def test_of_several_tracks_the_default_film_is_shown(tmp_path, tag_here, frames):
    """The others: a larger film, and subtitles that last longer."""
    pictures = {"forced": cv2.resize(frames[0], (1280, 960)), "default": frames[0]}
    with av.open(str(tmp_path / "talk.mkv"), "w") as film:
        streams = []
        for role, image in pictures.items():
            stream = film.add_stream("mpeg4", rate=25)
            stream.height, stream.width = image.shape[:2]
            stream.disposition = av.stream.Disposition[role]
            streams.append(stream)
        texts = film.add_mux_stream("subrip")
        for stream, image in zip(streams, pictures.values()):
            film.mux(stream.encode(av.VideoFrame.from_ndarray(image, "bgr24")))
            film.mux(stream.encode(None))
        text = av.Packet(b"The end")
        text.stream, text.time_base, text.duration = texts, Fraction(1, 1000), 1000
        text.pts = text.dts = 29_000
        film.mux(text)
    assert av.open(str(tmp_path / "talk.mkv")).duration == 30_000_000
    done = tag_here(*COLLECT, "talk.mkv", "--output", "shown.mp4")
    assert [row["frame"] for row in rows(done.stdout)] == ["0", "0"], done.stderr
    (image,) = read_film(tmp_path / "shown.mp4")
    assert image.shape == (480, 640, 3)


@on_linux
def test_pictures_of_long_names_that_begin_alike_are_all_written(tmp_path, tag_here, two):
    (tmp_path / "photos").mkdir()
    for end in ("1.jpg", "2.jpg", "1.webp", "2.webp"):
        name = "Screenshot of the family meeting in the garden of ".ljust(250 - len(end), "x") + end
        two.save(tmp_path / "photos" / name)
    done = tag_here(*COLLECT, "photos", "--output", "shown")
    assert done.returncode == 0 and len(list((tmp_path / "shown").iterdir())) == 4, done.stderr


def test_a_face_that_loses_its_name_to_a_surer_one_is_no_news_at_once():
    tracks = [tracker.Track(n, (0, 0, 9, 9), 0, 0) for n in range(2)]
    tracks[0].mean, tracks[0].label, tracks[0].agreeing = np.array((0.8, 0.2)), "Ann", 5
    tracks[1].mean = np.array((0.9, 0.1))
    webcam.assign_labels(tracks, ["Ann", "Ben"], 0.5)
    assert [track.label for track in tracks] == ["unknown", "Ann"]
    assert [track.agreeing for track in tracks] == [0, 0]


def test_boxes_are_matched_so_that_the_overlaps_are_largest():
    old = [(0, 0, 100, 100), (60, 0, 100, 100)]
    new = [(55, 0, 100, 100), (-10, 0, 100, 100), (400, 0, 50, 50)]
    assert tracker.match_boxes(old, new) == {0: 1, 1: 0}
    assert tracker.match_boxes(old, []) == tracker.match_boxes([], old) == {}
    assert tracker.iou((0, 0, 10, 10), (5, 0, 10, 10)) == pytest.approx(1 / 3)


def test_a_window_that_takes_too_long_is_none(monkeypatch, capsys):
    def run(command, **_):
        raise subprocess.TimeoutExpired(command, 60)

    monkeypatch.setattr(subprocess, "run", run)
    assert not webcam.can_open_window()
    assert capsys.readouterr().err.startswith("warning: no window can be opened")


def test_what_is_no_film_is_told_before_the_model_is_loaded(
    drawn_model, tmp_path, monkeypatch, tiny
):
    (tmp_path / "notes.txt").write_text("milk, bread\n" * 99)
    monkeypatch.setattr(webcam.model, "load_model", None)
    source = tmp_path / "notes.txt"
    done = run_here("webcam.py", drawn_model, "model", "--source", source, "--no-display")
    assert done.returncode == 1 and "there is no film in it" in done.stderr


def test_a_gif_that_breaks_off_in_its_second_frame(tmp_path, tag_here):
    noise = np.random.default_rng(0).integers(0, 255, (3, 80, 80, 3)).astype("uint8")
    first, *others = map(Image.fromarray, noise)
    first.save(tmp_path / "whole.gif", save_all=True, append_images=others, duration=50)
    data = (tmp_path / "whole.gif").read_bytes()
    second = data.index(b"!\xf9\x04", len(data) // 4)
    for end in (12, 60, 500):
        (tmp_path / "cut.gif").write_bytes(data[: second + end])
        done = tag_here("--save-faces", "faces", "--source", "cut.gif", "--whole-picture")
        assert done.returncode == 0 and len(rows(done.stdout)) in (1, 2), done.stderr


def test_a_frame_that_repeats_the_last_one_does_not_end_the_film(tmp_path, frames):
    """Theora and others say so with a packet of no bytes."""
    whole = make_film(tmp_path / "whole.nut", frames[:9], codec="mpeg4")
    with av.open(str(whole)) as film, av.open(str(tmp_path / "still.nut"), "w") as still:
        stream = still.add_stream_from_template(film.streams.video[0])
        for n, packet in enumerate(film.demux(video=0)):
            if packet.dts is not None:
                copy = av.Packet(b"" if n in (0, 4) else bytes(packet))
                copy.pts, copy.dts, copy.time_base = packet.pts, packet.dts, packet.time_base
                copy.is_keyframe, copy.stream = packet.is_keyframe, stream
                still.mux(copy)
    times = [timestamp for timestamp, _ in frames_of(tmp_path / "still.nut")]
    assert len(times) >= 4 and times[-1] == pytest.approx(0.28)
