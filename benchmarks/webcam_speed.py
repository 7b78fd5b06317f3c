"""Compare webcam.py with the loop of 2016 on films; then play one as a camera of 30 a second.

    python benchmarks/webcam_speed.py
    python benchmarks/webcam_speed.py film.mp4 --image-size 224

Without a film it draws one. The network has random weights: speed does not depend on them. Where a
film has its true boxes beside it (film.json, as tests/sample_faces.py writes), faces are counted
against these, else against what the detector of 2016 is sure of. With a display the camera is
shown in a window, as it would be used.
"""

import contextlib
import io
import itertools
import json
import tempfile
import time
from pathlib import Path

import common
import cv2
import numpy as np
import sample_faces
from common import model, utils

import films
import imaging
import sources
import tracker
import webcam

SURE = 15  # neighbors: every box with so many lay on a head in the films looked at
FRAMES = 150  # of each film
SECONDS = 20  # of the camera


def loop_2016(network, side, frames):
    """Detect at full size, and call `predict` for each face, as in 2016.

    Returns [(box, neighbors)] of each frame, seconds in all, seconds of detection.
    """
    found, searching, start = [], 0.0, time.perf_counter()
    cascade = imaging.load_cascade()
    for frame in frames:
        begin, grey = time.perf_counter(), cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY)
        boxes, neighbors = cascade.detectMultiScale2(grey, 1.1, 3, minSize=(30, 30))
        searching += time.perf_counter() - begin
        found.append([(tuple(map(int, box)), int(n)) for box, n in zip(boxes, neighbors)])
        for x, y, w, h in boxes:
            face = cv2.resize(frame[y : y + h, x : x + w], (side, side)).astype("float32")
            network.predict(face[None], verbose=0)
    return found, time.perf_counter() - start, searching


def new_tagger(network, side, kind):
    """Return webcam.py's tagger with our network, for a source of this kind."""
    args = webcam.parse_arguments(["model"])
    args.threshold = 0.0
    tagger = webcam.Tagger(args, sources.Source(kind, "0"))
    labels = [f"person {n}" for n in range(5)]
    tagger.labeller.network = network
    tagger.labeller.info = {"labels": labels, "image_size": side}
    return tagger


def our_loop(network, side, frames):
    """Handle frames as webcam.py does. Returns the boxes of each frame, seconds, the tagger."""
    tagger, found, start = new_tagger(network, side, "film"), [], time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()), tagger.session(Path()):
        for number, frame in enumerate(frames):
            tagger.handle(sources.Frame(number, number / 30, frame))
            found.append([track.box for track in tagger.tracker.tracks])
    return found, time.perf_counter() - start, tagger


def count_found(truth, found):
    """Return how many of the true faces have a box that overlaps by 0.5 or more."""
    return sum(any(tracker.iou(face, box) >= 0.5 for box in boxes)
               for faces, boxes in zip(truth, found) for face in faces)  # fmt: skip


def compare(path, frames, network, side):
    """Run both loops over the same frames and print speed, detection time and faces found."""
    loop_2016(network, side, frames[:2])  # warm both up
    our_loop(network, side, frames[:2])
    old, old_seconds, old_search = loop_2016(network, side, frames)
    new, new_seconds, tagger = our_loop(network, side, frames)
    search = sum(tagger.times["detection"]) / 1000
    truth = [[box for box, neighbors in hits if neighbors >= SURE] for hits in old]
    if path.with_suffix(".json").is_file():
        faces = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        truth = [[[face[key] for key in "xywh"] for face in some] for some in faces[: len(frames)]]
    least, n, rows = tagger.tracker.smallest, len(frames), []
    truth = [[face for face in faces if face[2] >= least] for faces in truth]
    old = "2016", [[box for box, _ in hits] for hits in old], old_seconds, old_search
    for name, found, seconds, searching in (old, ("ours", new, new_seconds, search)):
        speed = f"{n / seconds:.1f}", f"{1000 * searching / n:.2f}"
        rows.append([name, *speed, count_found(truth, found), sum(map(len, found))])
    faces = f"of {sum(map(len, truth))} faces of {least} px"
    names = [path.name, "frames/s", "ms of detection a frame", faces, "boxes"]
    common.print_table(names, rows)
    times, part = old_seconds / new_seconds, search / old_search
    print(f"{times:.1f} times as many frames; detection takes {part:.1%} of the time")


def camera_images(frames, stop):
    """Yield frames as a camera does: 30 a second, round and round, late ones lost; then stop."""
    number, start = 0, time.monotonic()
    while number < SECONDS * 30:
        time.sleep(max(0.0, start + number / 30 - time.monotonic()))
        yield frames[number % len(frames)].copy()
        number = max(number + 1, int((time.monotonic() - start) * 30))
    stop.set()


def play_camera(network, side, frames):
    """Tag a camera, and print what its user would see."""
    tagger = new_tagger(network, side, "camera")
    viewer = webcam.Viewer(tagger)
    # so that frames are drawn without a window, too
    webcam.open_output = lambda path, rate: contextlib.nullcontext(lambda image, timestamp: None)
    sources.open_live = lambda source: (camera_images(frames, viewer.stop), False)
    with contextlib.redirect_stdout(io.StringIO()):
        webcam.tag_live(tagger.source, tagger, viewer)
    rate = viewer.count / (viewer.latest[-1] - viewer.first)
    counts, ages = tagger.counts, tagger.times["label age"]
    median, most = np.percentile(ages, [50, 95])
    print(f"camera of 30 a second, {'in a window' if viewer.window else 'drawn, no window'}:")
    print(f"{rate:.1f} shown a second, {counts['frames']} of {viewer.count} frames handled")
    print(f"age of labels: median {median:.2f} s, 95th percentile {most:.2f} s")


def main():
    """Compare the loops on each film, and play the last one as a camera."""
    parser = common.make_parser(__doc__)
    parser.add_argument("films", nargs="*", type=Path, help="(default: a drawn one)")
    parser.add_argument("--image-size", type=int, default=224, help="side of the network's input")
    args = parser.parse_args()
    network, side = model.compiled(model.build_network(5, args.image_size)), args.image_size
    for n in (1, 2):
        model.predict(network, np.zeros((n, side, side, 3), "uint8"), n)
    common.print_machine(f"{side} px, n = 1")
    with tempfile.TemporaryDirectory() as folder:
        if not args.films:
            args.films = [Path(folder, "drawn.mp4")]
            sample_faces.draw_clip(args.films[0])
        for path in args.films:
            film = films.Film(str(path), path.name)
            frames = [image for _, image in itertools.islice(film.frames(), FRAMES)]
            compare(path, frames, network, side)
        play_camera(network, side, frames)


if __name__ == "__main__":
    utils.run(main)
