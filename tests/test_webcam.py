"""webcam.py as its users run it: films, pictures, folders, streams, windows, and what goes wrong with each."""

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
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import sample_faces
from conftest import ROOT, rows, run_process, tag
from PIL import Image

import report
import webcam

HEADER = "frame time track x y w h label probability".split()


def new_state(kind="film", **fields):
    """Make webcam.py's state without detector and model."""
    args = dict(
        model=None,
        source="0",
        output=None,
        min_face=None,
        context=2.0,
        whole_picture=False,
        save_faces=None,
    )
    return webcam.State(SimpleNamespace(**args), kind, **fields)


def box(row):
    return tuple(int(row[key]) for key in "xywh")


def read_film(path):
    """Return the frames of a film, uint8 BGR."""
    film, frames = cv2.VideoCapture(str(path)), []
    while (read := film.read())[0]:
        frames.append(read[1])
    return frames


# ---------------------------------------------------------------- films


def test_drawn_people_are_found_and_named(drawn_model, tagged):
    truth = json.loads((drawn_model / "film.json").read_text(encoding="utf-8"))
    lines, right, found = rows(tagged.stdout), 0, 0
    assert list(lines[0]) == HEADER
    for row in lines:
        faces = truth[int(row["frame"])]
        best = max(faces, key=lambda face: webcam.overlap(box(row), [face[key] for key in "xywh"]))
        right += best["name"] == row["label"]
    for number, faces in enumerate(truth):
        boxes = [box(row) for row in lines if int(row["frame"]) == number]
        found += all(
            any(webcam.overlap([f[k] for k in "xywh"], b) >= 0.5 for b in boxes) for f in faces
        )
    assert found >= 0.9 * len(truth)
    assert right >= 0.95 * len(lines)
    assert all(
        re.fullmatch(r"\d+\.\d{6}", row[key]) for row in lines for key in ("time", "probability")
    )
    assert float(lines[-1]["time"]) == pytest.approx((len(truth) - 1) / sample_faces.FPS, abs=0.01)


def test_the_written_film_is_whole_and_shows_the_tags(drawn_model, tagged):
    before, after = read_film(drawn_model / "film.mp4"), read_film(drawn_model / "tagged.mp4")
    assert len(after) == len(before) and after[0].shape == before[0].shape
    x, y, w, _ = box(rows(tagged.stdout)[0])
    assert (
        np.abs(after[0][y : y + 4, x + w // 2].astype(int) - before[0][y : y + 4, x + w // 2]).max()
        > 40
    )
    assert [p.name for p in drawn_model.glob(".tagged*")] == []


def test_the_summary_tells_speed_and_ages(tagged):
    assert re.search(r"150 frames, [\d.]+ a second shown, \d+ classifications; median detection [\d.]+ ms; "
                     r"median classification [\d.]+ ms; median label age [\d.]+ s", tagged.stderr)  # fmt: skip


def test_a_film_that_changes_its_size(tmp_path, film):
    data = b""
    for n, frame in enumerate(read_film(film)[:20]):
        image, buffer = Image.fromarray(frame[..., ::-1]), io.BytesIO()
        image.resize((320, 240) if n > 9 else (640, 480)).save(buffer, "JPEG", quality=95)
        data += b"--frame\r\nContent-Type: image/jpeg\r\n\r\n" + buffer.getvalue() + b"\r\n"
    (tmp_path / "changes.film").write_bytes(data)  # as network cameras give it
    done = tag(tmp_path, "--save-faces", "faces", "--source", "changes.film", "--output", "out.avi")
    assert done.returncode == 0, done.stderr
    assert {int(row["frame"]) for row in rows(done.stdout)} >= set(range(20))
    assert {frame.shape for frame in read_film(tmp_path / "out.avi")} == {(480, 640, 3)}


def test_frames_of_8k(tmp_path, film):
    writer = cv2.VideoWriter(
        str(tmp_path / "8k.avi"), cv2.VideoWriter.fourcc(*"MJPG"), 25, (7680, 4320)
    )
    for frame in read_film(film)[:2]:
        writer.write(cv2.resize(frame, (7680, 4320)))
    writer.release()
    done = tag(tmp_path, "--save-faces", "faces", "--source", "8k.avi")
    assert len(rows(done.stdout)) == 4, done.stderr
    assert min(int(row["w"]) for row in rows(done.stdout)) > 7680 / 16


def test_a_pause_stops_the_clock_of_a_film(monkeypatch, film):
    """Afterwards every frame is shown for as long as before: the film does not hurry to catch up."""
    now, left = [0.0], []

    def present(state, frame, moment, seconds):
        left.append(seconds)
        now[0] += (
            60 if len(left) == 20 else max(0.0, seconds)
        )  # the user pauses at the twentieth frame

    monkeypatch.setattr(webcam, "handle", lambda state, *_: state.counts.update(["frames"]))
    monkeypatch.setattr(webcam, "present", present)
    monkeypatch.setattr(webcam, "time", SimpleNamespace(monotonic=lambda: now[0]))
    state = new_state(window=True)
    state.args.source = str(film)
    webcam.tag_film(state)
    assert len(left) == 2 * sample_faces.FPS
    assert left[1:20] + left[21:] == pytest.approx(
        [1 / sample_faces.FPS] * (len(left) - 2), abs=0.002
    )


def test_a_film_of_an_odd_rate_and_without_times_can_be_written(monkeypatch, tmp_path, film):
    """Phones film with 116.98324 frames a second, which MPEG-4 has no room for; raw streams tell no times."""

    real = cv2.VideoCapture

    def odd(*arguments):
        capture = real(*arguments)

        def get(what):
            told = capture.get(what)
            return {
                cv2.CAP_PROP_FPS: 116.98324,
                cv2.CAP_PROP_POS_MSEC: told if told < 500 else 0.0,
            }.get(what, told)

        return SimpleNamespace(read=capture.read, get=get, isOpened=capture.isOpened)

    moments, state = [], new_state()
    state.args.source, state.args.output = str(film), tmp_path / "out.mp4"
    monkeypatch.setattr(webcam, "handle", lambda state, _, number, moment: moments.append(moment))
    monkeypatch.setattr(webcam.cv2, "VideoCapture", odd)
    state.counts["frames"] = 1
    with webcam.film_output(state):
        webcam.tag_film(state)
    monkeypatch.undo()
    assert len(moments) == len(read_film(tmp_path / "out.mp4")) == 2 * sample_faces.FPS
    assert moments[0] == 0 and min(np.diff(moments)) > 0


@pytest.mark.skipif(sys.platform != "linux", reason="other systems allow no such names")
def test_a_film_whose_name_is_not_utf8_is_one_line(tmp_path, film):
    shutil.copy(film, os.fsencode(tmp_path) + b"/x\xff.mp4")
    done = tag(tmp_path, "--save-faces", "faces", "--source", os.fsdecode(b"x\xff.mp4"))
    assert done.returncode == 1 and re.search(
        r"^error: .*OpenCV cannot open such a name", done.stderr, re.M
    )


def test_a_film_without_a_window_shows_how_far_it_is(tmp_path, film):
    termios = pytest.importorskip("termios", reason="needs a pseudo-terminal")
    terminal, end = os.openpty()
    termios.tcsetwinsize(end, (24, 80))
    command = [
        sys.executable,
        str(ROOT / "webcam.py"),
        "--save-faces",
        "faces",
        "--source",
        str(film),
        "--no-display",
    ]
    process, told = subprocess.Popen(command, cwd=tmp_path, stdout=end, stderr=end), b""
    os.close(end)
    with contextlib.suppress(OSError):  # how a terminal says that nobody writes to it any more
        while part := os.read(terminal, 10_000):
            told += part
    os.close(terminal)
    assert process.wait() == 0 and re.search(rb"frames: +\d+%\|.*\d/50 ", told), told
    shown = [line.rpartition("\r")[2] for line in told.decode().replace("\r\n", "\n").split("\n")]
    assert (
        len([line for line in shown if re.fullmatch(r"\d+\t[\d.]+(\t\d+){5}\t\t", line)]) == 100
    ), shown[:5]


@pytest.mark.skipif(sys.platform != "linux", reason="other systems count otherwise")
def test_pictures_of_long_names_that_begin_alike_are_all_written(tmp_path, film):
    (tmp_path / "photos").mkdir()
    for end in ("1.jpg", "2.jpg", "1.webp", "2.webp"):
        name = (
            "Screenshot of the family meeting in the garden of " + "x" * (250 - 50 - len(end)) + end
        )
        Image.fromarray(read_film(film)[0][..., ::-1]).save(tmp_path / "photos" / name)
    done = tag(tmp_path, "--save-faces", "faces", "--source", "photos", "--output", "shown")
    assert done.returncode == 0 and len(list((tmp_path / "shown").iterdir())) == 4, done.stderr


def test_faces_that_are_too_small_are_told_with_the_option_that_finds_them(tmp_path, film):
    shrunk = np.zeros((960, 1280, 3), "uint8") + np.uint8(200)
    shrunk[300:540, 400:720] = cv2.resize(read_film(film)[0], (320, 240))
    Image.fromarray(shrunk[..., ::-1]).save(tmp_path / "far.png")
    done = tag(tmp_path, "--save-faces", "faces", "--source", "far.png")
    assert rows(done.stdout) == []
    (tmp_path / "mixed").mkdir()
    shutil.copy(tmp_path / "far.png", tmp_path / "mixed")
    Image.new("RGB", (60, 60)).save(
        tmp_path / "mixed" / "last.png"
    )  # in which smaller faces are looked for
    mixed = tag(tmp_path, "--save-faces", "faces", "--source", "mixed")
    assert "no face of 120 px or larger was found; the smallest there has" in mixed.stderr
    option = re.search(
        r"nothing was tagged.*the smallest there has \d+ px: --min-face (\d+) would", done.stderr
    )
    assert option, done.stderr
    assert rows(
        tag(
            tmp_path, "--save-faces", "faces", "--source", "far.png", "--min-face", option[1]
        ).stdout
    )


@pytest.mark.slow
def test_ctrl_c_keeps_a_film_that_plays(tmp_path, film):
    long = tmp_path / "long.avi"
    frames = read_film(film)
    writer = cv2.VideoWriter(str(long), cv2.VideoWriter.fourcc(*"MJPG"), 25, (640, 480))
    for _ in range(40):
        for frame in frames:
            writer.write(frame)
    writer.release()
    command = [sys.executable, str(ROOT / "webcam.py"), "--save-faces", "faces", "--source", "long.avi",
               "--output", "out.mp4", "--no-display"]  # fmt: skip
    process = subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    for _ in range(50):
        process.stdout.readline()
    process.send_signal(signal.SIGINT)
    errors = process.communicate(timeout=30)[1]
    assert process.returncode == 130 and "Traceback" not in errors
    assert 20 <= len(read_film(tmp_path / "out.mp4")) < 2000
    assert sorted(p.name for p in tmp_path.iterdir()) == ["faces", "long.avi", "out.mp4"]


# ---------------------------------------------------------------- pictures


@pytest.mark.slow
def test_training_crops_get_the_probabilities_that_evaluation_gives(drawn_model):
    done = run_process(ROOT / "train.py", drawn_model, "people", "model", "--evaluate")
    assert done.returncode == 0, done.stderr
    with open(drawn_model / "model-evaluate.csv", encoding="utf-8", newline="") as file:
        expected = {
            row["file"]: (row["predicted"], row["probability"]) for row in csv.DictReader(file)
        }
    done = tag(drawn_model, "model", "--source", "people", "--whole-picture", "--threshold", 0)
    got = {row["file"]: (row["label"], row["probability"]) for row in rows(done.stdout)}
    assert got == expected and len(got) == 200


def test_a_folder_with_broken_files_and_names_of_all_kinds(tmp_path, film):
    frame = Image.fromarray(read_film(film)[0][..., ::-1])
    source = tmp_path / "photos"
    (source / "été").mkdir(parents=True)
    frame.save(source / "été" / "王 & co.webp")
    frame.save(source / "phone.heic")
    sideways = Image.Exif()
    sideways[274] = 6
    frame.transpose(Image.Transpose.ROTATE_90).save(source / "turned.jpg", exif=sideways)
    (source / "cut.jpg").write_bytes((source / "turned.jpg").read_bytes()[:3000])
    (source / "empty.png").write_bytes(b"")
    (source / ".hidden.jpg").write_bytes(b"no picture")
    done = tag(tmp_path, "--save-faces", "faces", "--source", "photos", "--output", "shown")
    assert done.returncode == 0, done.stderr
    lines = rows(done.stdout)
    assert list(lines[0]) == ["file", *HEADER]
    assert sorted(row["file"] for row in lines) == sorted(
        2 * ["phone.heic", "turned.jpg", "été/王 & co.webp"]
    )
    assert len(re.findall("^warning: .*(cut.jpg|empty.png): skipped: ", done.stderr, re.M)) == 2
    written = sorted(
        p.relative_to(tmp_path / "shown").as_posix() for p in (tmp_path / "shown").rglob("*.*")
    )
    assert written == ["phone.heic.jpg", "turned.jpg", "été/王 & co.webp.jpg"]
    assert Image.open(tmp_path / "shown" / "turned.jpg").size == frame.size


@pytest.mark.slow
def test_a_picture_with_sixty_faces(drawn_model, tmp_path):
    tiles = [
        Image.open(path) for path in sorted((drawn_model / "people").glob("*/*.jpg"))[::3][:60]
    ]
    crowd = Image.new("RGB", (1600, 960))
    for n, tile in enumerate(tiles):
        crowd.paste(tile, (n % 10 * 160, n // 10 * 160))
    crowd.save(tmp_path / "crowd.png")
    done = tag(
        tmp_path,
        drawn_model / "model",
        "--source",
        "crowd.png",
        "--min-face",
        60,
        "--output",
        "tagged.png",
    )
    lines = rows(done.stdout)
    assert 50 <= len(lines) <= 70, done.stderr
    names = [row["label"] for row in lines if row["label"] != "unknown"]
    assert len(names) == len(set(names)) > 0, "the same name twice"
    everybody = rows(
        tag(
            tmp_path,
            drawn_model / "model",
            "--source",
            "crowd.png",
            "--min-face",
            60,
            "--threshold",
            0,
        ).stdout
    )
    assert "unknown" not in {row["label"] for row in everybody}
    assert Image.open(tmp_path / "tagged.png").size == crowd.size


# ---------------------------------------------------------------- names


def tracks(*means):
    return [
        webcam.Track(n, (0, 0, 9, 9), 0, np.array(mean, "float32")) for n, mean in enumerate(means)
    ]


@pytest.mark.parametrize(("threshold", "means", "expected"), [
    (0.5, [(0.9, 0.1, 0.0), (0.6, 0.4, 0.0)], ["Ann", "unknown"]),  # the more probable keeps the name
    (0.5, [(0.6, 0.4, 0.0), (0.9, 0.1, 0.0)], ["unknown", "Ann"]),
    (0.5, [(0.4, 0.35, 0.25)], ["unknown"]),
    (0.5, [(0.1, 0.1, 0.8), (0.0, 0.3, 0.7)], ["unknown", "unknown"]),
    (0.5, [(0.9, 0.1, 0.0), (0.1, 0.9, 0.0)], ["Ann", "Ben"]),
    (0.0, [(0.9, 0.1, 0.0), (0.4, 0.35, 0.25)], ["Ann", "Ann"]),  # the closed world
])  # fmt: skip
def test_names(threshold, means, expected):
    state = new_state(labels=["Ann", "Ben", "unknown"], threshold=threshold, tracks=tracks(*means))
    webcam.name_tracks(state)
    assert [track.label for track in state.tracks] == expected
    assert [track.probability for track in state.tracks] == [
        pytest.approx(max(mean)) for mean in means
    ]


def test_of_equally_sure_boxes_of_one_face_it_is_always_the_same(monkeypatch):
    hits, found = [((10, 10, 50, 50), 7), ((14, 12, 48, 48), 7)], []
    for order in (hits, hits[::-1]):
        monkeypatch.setattr(webcam, "find", lambda *_, order=order: order)
        state = new_state(smallest=40, tracks=[], scanned=-99)
        found.append(webcam.search(state, np.zeros((90, 90, 3), "uint8"), 0))
    assert found[0] == found[1] == [hits[0]]


def test_two_tracks_never_share_one_face(film):
    """Where people cross, one of them is hidden: only one track goes on."""
    frame = read_film(film)[0][:, :300]  # one person
    state = new_state(cascade=webcam.load_cascade(), smallest=60)
    webcam.follow(state, frame, 0)
    x, y, w, h = state.tracks[0].box
    state.tracks = [
        webcam.Track(n, (x + shift, y, w, h), 0) for n, shift in enumerate((w // 5, -w // 5))
    ]
    webcam.follow(state, frame, 1)  # looks around both of them
    assert sorted(track.seen for track in state.tracks) == [0, 1]
    webcam.follow(state, frame, webcam.HOLD + 1)
    assert [track.seen for track in state.tracks] == [webcam.HOLD + 1]


def test_boxes_are_linked_so_that_the_overlaps_are_largest():
    old = [(0, 0, 100, 100), (60, 0, 100, 100)]
    assert webcam.link(old, [(55, 0, 100, 100), (-10, 0, 100, 100), (400, 0, 50, 50)]) == {
        0: 1,
        1: 0,
    }
    assert webcam.link(old, []) == webcam.link([], old) == {}
    assert webcam.overlap((0, 0, 10, 10), (5, 0, 10, 10)) == pytest.approx(1 / 3)


@pytest.mark.parametrize("name", ["Mihály Köles", "Ελένη", "王", "Иван"])
def test_every_script_is_drawn(name):
    from matplotlib import ft2font

    if not set(map(ord, name)) <= set(ft2font.FT2Font(report.font_file(name)).get_charmap()):
        pytest.skip(f"no font on this machine has {name}")
    drawn = []
    for text in (name, "\U000f0000" * len(name)):  # a character that no font has
        image = Image.new("RGB", (400, 60))
        webcam.plate(image, 5, 5, 30, "#000000", text)
        drawn.append(np.asarray(image))
    assert not np.array_equal(*drawn) and drawn[0].max() > 200


# ---------------------------------------------------------------- cameras, streams, windows


class Camera:
    """A camera that gives a frame for each True, and fails for each False."""

    def __init__(self, answers):
        self.answers = iter(answers)

    def read(self):
        good = next(self.answers, False)
        return good, np.zeros((4, 4, 3), "uint8") if good else None

    def get(self, _):
        return 0.0

    def isOpened(self):
        return True

    def release(self):
        pass


def test_dropped_frames_are_no_loss_and_a_lost_camera_is_tried_three_times(monkeypatch, capsys):
    monkeypatch.setattr(webcam, "PAUSES", (0.01, 0.02, 0.03))
    monkeypatch.setattr(webcam, "EMPTY", 0.1)
    again = iter([Camera([]), Camera([True, False, True]), Camera([]), Camera([]), Camera([])])
    monkeypatch.setattr(webcam, "open_live", lambda state: next(again))
    state = new_state("camera")
    with pytest.raises(
        webcam.utils.UserError, match="camera 0: lost, and 3 tries did not bring it back"
    ):
        webcam.read_live(state, Camera([False, False, True, False, True, True]))
    assert state.newest[0] == 5 - 1 and state.ended
    assert capsys.readouterr().err.count("lost: trying again") == 2 + 3


def test_on_a_slow_machine_a_face_may_be_missed_once(monkeypatch):
    """It sees every ninth frame of a camera, so a face that is missed once was last seen 18 frames ago."""
    faces = iter(
        [[((10, 10, 50, 50), 9)], [((10, 10, 50, 50), 9)], [], [((10, 10, 50, 50), 9)], [], []]
    )
    monkeypatch.setattr(webcam, "search", lambda *_: next(faces))
    state, seen = new_state("camera"), []
    for number in range(0, 54, 9):
        webcam.handle(state, np.zeros((100, 100, 3), "uint8"), number, number / 30)
        seen.append([track.number for track in state.tracks])
    assert seen == [[0], [0], [0], [0], [0], []]


def test_nothing_is_printed_or_saved_after_the_end(monkeypatch):
    """The frame at hand is finished, and no other is begun, before the summary is made."""
    begun, finished = [], []

    def slow(state, frame, number, moment):
        begun.append(number)
        time.sleep(1)
        finished.append(number)

    def interrupted(*_):
        if begun:  # Ctrl-C as soon as a frame is being handled
            raise KeyboardInterrupt

    monkeypatch.setattr(webcam, "handle", slow)
    monkeypatch.setattr(webcam, "present", interrupted)
    monkeypatch.setattr(webcam, "open_live", lambda state: Camera(itertools.repeat(True)))
    with pytest.raises(KeyboardInterrupt):
        webcam.tag_live(new_state("camera"))
    assert begun == finished and len(begun) == 1
    time.sleep(1.2)
    assert begun == finished and len(begun) == 1


def test_a_camera_is_shown_while_its_model_is_loaded(monkeypatch):
    """And what is wrong with the model is told then."""
    state = new_state("camera")
    state.args.model = "friends"

    def load(prefix):
        end = time.monotonic() + 20
        while state.counts["shown"] < 3 and time.monotonic() < end:
            time.sleep(0.01)
        raise webcam.utils.UserError(f"{prefix}: {state.counts['shown'] >= 3}")

    monkeypatch.setattr(webcam.utils, "load_model", load)
    monkeypatch.setattr(webcam, "open_live", lambda state: Camera(itertools.repeat(True)))
    with pytest.raises(webcam.utils.UserError, match="friends: True"):
        webcam.tag_live(state)


def test_the_film_of_a_camera_runs_as_fast_as_the_camera_did(tmp_path):
    state = new_state("camera")
    state.args.output = tmp_path / "out.avi"
    for moments in ([0.0], [0.01], [0.0, 0.5, 1.0]):
        state.counts.clear()
        with webcam.film_output(state):
            for moment in moments:
                webcam.present(state, np.zeros((48, 64, 3), "uint8"), moment)
        assert len(read_film(state.args.output)) == 1 + int(moments[-1] * webcam.LIVE_FPS)


class Stream(http.server.BaseHTTPRequestHandler):
    """Gives JPEG pictures for ever, 25 a second, as a network camera does."""

    def do_GET(self):
        self.send_response(200)
        self.send_header("Content-Type", "multipart/x-mixed-replace; boundary=frame")
        self.end_headers()
        try:
            while self.server.running:
                self.wfile.write(
                    b"--frame\r\nContent-Type: image/jpeg\r\n\r\n" + self.server.jpeg + b"\r\n"
                )
                time.sleep(0.04)
        except OSError:
            pass

    def log_message(self, *_):
        pass


def serve(port, frame):
    """Start a network camera; returns a function that stops it, and its port."""
    buffer = io.BytesIO()
    Image.fromarray(frame[..., ::-1]).save(buffer, "JPEG")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", port), Stream)
    server.running, server.jpeg, server.daemon_threads = True, buffer.getvalue(), True
    threading.Thread(target=server.serve_forever, daemon=True).start()

    def stop():
        server.running = False
        server.shutdown()
        server.server_close()

    return stop, server.server_port


@pytest.mark.slow
def test_a_stream_that_dies_and_comes_back_and_dies(tmp_path, film):
    frame = read_film(film)[0]
    stop, port = serve(0, frame)
    command = [sys.executable, str(ROOT / "webcam.py"), "--save-faces", "faces", "--output", "out.avi", "--no-display",
               "--source", f"http://me:secret@127.0.0.1:{port}/live?key=secret"]  # fmt: skip
    process = subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    for _ in range(10):
        process.stdout.readline()
    stop()
    before = process.stderr.readline()
    stop, _ = serve(port, frame)
    for _ in range(200):
        last = process.stdout.readline()
    stop()
    errors = process.communicate(timeout=60)[1]
    assert before == "warning: stream 127.0.0.1: lost: trying again in 1 s\n"
    assert process.returncode == 1 and "Traceback" not in errors
    assert errors.count("lost: trying again") >= 3 and errors.splitlines()[-1].startswith(
        "error: stream 127.0.0.1: lost"
    )
    assert "secret" not in before + errors + " ".join(os.listdir(tmp_path / "faces"))
    assert re.fullmatch(r"stream-127\.0\.0\.1-\d{8}-\d{6}", os.listdir(tmp_path / "faces")[0])
    assert len(read_film(tmp_path / "out.avi")) > 10 and last


@pytest.mark.slow
def test_a_served_film_plays_once_and_as_fast_as_it_is(tmp_path, film):
    frames = read_film(film)
    out = cv2.VideoWriter(
        str(tmp_path / "served.avi"), cv2.VideoWriter.fourcc(*"MJPG"), 25, frames[0].shape[1::-1]
    )
    for frame in frames:
        out.write(frame)
    out.release()
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=tmp_path)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    done = tag(
        tmp_path,
        "--save-faces",
        "faces",
        "--source",
        f"http://127.0.0.1:{server.server_port}/served.avi",
    )
    server.shutdown()
    server.server_close()
    assert done.returncode == 0, done.stderr
    moments = {float(row["time"]) for row in rows(done.stdout)}
    assert len(moments) > 5 and 0.8 * len(frames) / 25 < max(moments) < 2 * len(frames) / 25, (
        moments
    )


needs_screen = pytest.mark.skipif(
    not (shutil.which("Xvfb") and shutil.which("xdotool")), reason="needs Xvfb, xdotool"
)


@pytest.fixture
def screen():
    """Start a virtual screen; returns its name."""
    read, write = os.pipe()
    process = subprocess.Popen(["Xvfb", "-displayfd", str(write), "-screen", "0", "1280x900x24"], pass_fds=[write],
                               stderr=subprocess.DEVNULL)  # fmt: skip
    yield ":" + os.read(read, 20).decode().strip()
    process.terminate()
    process.wait()


def close_window(window, display):
    """Do what a window manager does when its cross is clicked: send WM_DELETE_WINDOW."""
    code = f"""
import ctypes
class Event(ctypes.Structure):
    _fields_ = [("type", ctypes.c_int), ("serial", ctypes.c_ulong), ("send", ctypes.c_int),
                ("display", ctypes.c_void_p), ("window", ctypes.c_ulong), ("atom", ctypes.c_ulong),
                ("format", ctypes.c_int), ("data", ctypes.c_long * 17)]
x = ctypes.CDLL("libX11.so.6")
x.XOpenDisplay.restype, x.XInternAtom.restype, pointer = ctypes.c_void_p, ctypes.c_ulong, ctypes.c_void_p
display = pointer(x.XOpenDisplay(None))
event = Event(type=33, window={window}, atom=x.XInternAtom(display, b"WM_PROTOCOLS", 0), format=32)
event.data[0] = x.XInternAtom(display, b"WM_DELETE_WINDOW", 0)
x.XSendEvent(display, ctypes.c_ulong({window}), 0, ctypes.c_long(0), ctypes.byref(event))
x.XSync(display, 0)
"""
    subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"DISPLAY": display}, check=True, timeout=30
    )


@needs_screen
@pytest.mark.parametrize("how", ["q", "Escape", "close"])
def test_a_window_and_its_keys(tmp_path, film, screen, how):
    environment = os.environ | {"DISPLAY": screen}
    Image.fromarray(read_film(film)[0][..., ::-1]).save(tmp_path / "two.png")
    command = [
        sys.executable,
        str(ROOT / "webcam.py"),
        "--save-faces",
        "faces",
        "--source",
        "two.png",
    ]
    process = subprocess.Popen(
        command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True
    )
    window = subprocess.run(["xdotool", "search", "--sync", "--name", f"^{webcam.TITLE}$"], env=environment,
                            capture_output=True, text=True, timeout=30).stdout.split()[0]  # fmt: skip

    def press_until(key, done):  # without a window manager a key is lost now and then
        for _ in range(20):
            subprocess.run(
                ["xdotool", "windowfocus", window, "key", key],
                env=environment,
                timeout=30,
                check=False,
            )
            for _ in range(10):
                if done():
                    return
                time.sleep(0.1)
        raise AssertionError(f"{key} did nothing")

    press_until("s", lambda: list(tmp_path.glob("snapshot-*.png")))
    assert process.poll() is None
    for arrow in ("Left", "Right") * 5:  # whose codes end as those of Q and S do
        subprocess.run(
            ["xdotool", "windowfocus", window, "key", arrow],
            env=environment,
            timeout=30,
            check=False,
        )
    time.sleep(0.5)
    assert process.poll() is None
    if how == "close":
        close_window(window, screen)
    else:
        press_until(how, lambda: process.poll() is not None)
    errors = process.communicate(timeout=30)[1]
    assert process.returncode == 0, errors
    assert {Image.open(path).size for path in tmp_path.glob("snapshot-*.png")} == {(640, 480)}


# ---------------------------------------------------------------- mistakes


@pytest.mark.parametrize(("arguments", "code", "message"), [
    ("", 2, "give the prefix of a model, or --save-faces DIR"),
    ("model --threshold 1.5", 2, "1.5 is not between 0 and 1"),
    ("model --min-face 3", 2, "3 is not between 24"),
    ("model --context 0", 2, "0 is not between"),
    ("model --source film.mp4", 1, "error: model.json: no such file"),
    ("model --source 97", 1, "error: model.json: no such file"),
    ("--save-faces faces --source missing.mp4", 1, "error: --source missing.mp4: no such file"),
    ("--save-faces faces --source empty.mp4", 1, "error: --source empty.mp4: is empty"),
    ("--save-faces faces --source notes.txt", 1, "error: --source notes.txt: no frame can be read"),
    ("--save-faces faces --source huge.png", 1, "error: --source huge.png: larger than 178,956,970 pixels"),
    ("--save-faces faces --source nothing", 1, "error: --source nothing: no picture in it can be read"),
    ("--save-faces faces --source 97", 1, "error: camera 97: no picture comes from it"),
    ("--save-faces faces --source http://127.0.0.1:9/live", 1, "error: stream 127.0.0.1: no picture comes from there"),
    ("--save-faces faces --source rtsp://me:secret@:554/live", 1, "error: --source rtsp://…: no address: give one"),
    ("--save-faces faces --source rtsp://127.0.0.1:9/\udcff", 1, "error: --source rtsp://…: no address: give one"),
    ("--save-faces notes.txt --source film.mp4", 1, "error: --save-faces notes.txt: is a file"),
    ("--save-faces photos/faces --source photos", 1, "error: --save-faces photos/faces: lies in the source"),
    ("--save-faces faces --source film.mp4 --output film.mp4", 1, "error: --output film.mp4: is the source itself"),
    ("--save-faces faces --source film.mp4 --output twin.mp4", 1, "error: --output twin.mp4: is the source itself"),
    ("--save-faces faces --source film.mp4 --output out.gif", 1, "error: --output out.gif: cannot hold"),
    ("--save-faces faces --source film.mp4 --output no/out.mp4", 1, "error: --output no/out.mp4: no such folder"),
])  # fmt: skip
def test_mistakes_are_told_in_one_line(tmp_path, film, arguments, code, message):
    shutil.copy(film, tmp_path / "film.mp4")
    os.link(tmp_path / "film.mp4", tmp_path / "twin.mp4")
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "notes.txt").write_text("no film")
    Image.new("1", (19000, 19000)).save(tmp_path / "huge.png")  # beyond Pillow's own limit, too
    (tmp_path / "nothing").mkdir()
    (tmp_path / "photos").mkdir()
    done = tag(tmp_path, *arguments.split())
    assert done.returncode == code
    assert message in done.stderr.splitlines()[-1]
    assert code == 2 or len(done.stderr.splitlines()) == 1
    assert (
        not (tmp_path / "out.gif").exists()
        and (tmp_path / "film.mp4").read_bytes() == film.read_bytes()
    )


def test_a_window_that_takes_too_long_is_none(monkeypatch, capsys):
    def run(command, **_):
        raise subprocess.TimeoutExpired(command, 60)

    state = new_state()
    state.args.no_display = False
    monkeypatch.setattr(subprocess, "run", run)
    webcam.open_window(state)
    assert not state.window and capsys.readouterr().err.startswith(
        "warning: no window can be opened"
    )


def test_without_a_display_it_goes_on(tmp_path, film):
    bare = {
        key: value for key, value in os.environ.items() if key not in ("DISPLAY", "WAYLAND_DISPLAY")
    }
    command = [
        sys.executable,
        str(ROOT / "webcam.py"),
        "--save-faces",
        "faces",
        "--source",
        str(film),
    ]
    done = subprocess.run(command, cwd=tmp_path, env=bare, capture_output=True, text=True)
    assert done.returncode == 0 and rows(done.stdout)
    assert done.stderr.startswith("warning: no window can be opened")


@pytest.mark.parametrize("missing", ["module", "CascadeClassifier", "cascade file"])
def test_what_is_missing_is_told_with_the_remedy(tmp_path, film, missing):
    for name in ("webcam.py", "utils.py"):
        shutil.copy(ROOT / name, tmp_path / name)
    if missing == "module":
        (tmp_path / "cv2.py").write_text("raise ImportError('No module named cv2')")
    elif missing == "CascadeClassifier":
        (tmp_path / "cv2.py").write_text("__version__ = '5.0.0'")
    done = run_process(
        tmp_path / "webcam.py", tmp_path, "--save-faces", "faces", "--source", film, "--no-display"
    )
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1
    remedy = {"module": "pip install -r", "CascadeClassifier": 'pip install "opencv-python<5"'}
    assert remedy.get(missing, "haarcascade_frontalface_default.xml: missing") in done.stderr
