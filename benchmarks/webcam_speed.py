"""Compare webcam.py with the loop of 2016: speed from a film, detection, and life from a source of 30 frames a second.

    python benchmarks/webcam_speed.py
    python benchmarks/webcam_speed.py film.mp4 --image-size 224

Without a film it draws one. The network has random weights: speed does not depend on them. Where a film has its
true boxes beside it (film.json, as tests/sample_faces.py writes), faces are counted against these, else against what
the detector of 2016 is sure of. With a display the paced source is shown in a window, as it would be used.
"""

import argparse
import contextlib
import io
import itertools
import json
import tempfile
import time
from pathlib import Path

import cv2
import numpy as np
from common import model, utils  # first: it finds the folders of the two below

# isort: split
import sample_faces

import webcam

SURE = (
    15  # finds: every box with so many lay on a head in the films that the settings were chosen on
)
SECONDS = 20  # of the paced source


def parse_arguments():
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("films", nargs="*", type=Path, help="films (default: a drawn one)")
    parser.add_argument("--image-size", type=int, default=224, help="side of the network's input")
    parser.add_argument("--frames", type=int, default=150, help="frames of each film")
    return parser.parse_args()


def read_film(path, most):
    """Return the first frames of a film, a list of uint8 BGR arrays."""
    capture, frames = cv2.VideoCapture(str(path)), []
    while len(frames) < most and (read := capture.read())[0]:
        frames.append(read[1])
    return frames


def detect_2016(cascade, frame):
    """Search a frame as the tool of 2016 did. Returns [(box, finds)] and the seconds it took."""
    start = time.perf_counter()
    boxes, counts = cascade.detectMultiScale2(
        cv2.cvtColor(frame, cv2.COLOR_BGR2GRAY), 1.1, 3, minSize=(30, 30)
    )
    return [
        (tuple(map(int, box)), int(n)) for box, n in zip(boxes, counts)
    ], time.perf_counter() - start


def loop_2016(network, side, cascade, frames):
    """As in 2016: detect at full size, one `predict` a face. Returns boxes, seconds, seconds of detection."""
    found, searching, start = [], 0.0, time.perf_counter()
    for frame in frames:
        hits, seconds = detect_2016(cascade, frame)
        searching += seconds
        for (x, y, w, h), _ in hits:
            face = cv2.resize(frame[y : y + h, x : x + w], (side, side)).astype("float32")
            network.predict(face[None], verbose=0)
        found.append(hits)
    return found, time.perf_counter() - start, searching


def new_tagger(network, side, kind):
    """Return webcam.py's tagger and viewer, with our network."""
    args = webcam.parse_arguments(["model"])
    args.whole_picture, args.no_display = False, kind == "film"
    tagger = webcam.Tagger(args, webcam.Source(kind, "0"))
    labeller = tagger.labeller
    labeller.network, labeller.side, labeller.threshold = network, side, 0.0
    labeller.labels = [f"person {n}" for n in range(5)]
    tagger.start()
    viewer = None
    if kind == "camera":
        viewer = webcam.Viewer(args, labeller, tagger.statistics)
        viewer.write = lambda image, timestamp: None
    return tagger, viewer


def our_loop(network, side, frames):
    """Handle frames as webcam.py does. Returns the boxes of each frame, seconds, and the tagger."""
    (tagger, _), found, start = new_tagger(network, side, "film"), [], time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()):
        for number, frame in enumerate(frames):
            tagger.handle(webcam.Frame(number, number / 30, frame))
            found.append([track.box for track in tagger.tracks])
    return found, time.perf_counter() - start, tagger


def kept(truth, found):
    """Return (faces, how many of them have a box that overlaps by 0.5 or more)."""
    hits = [
        any(webcam.iou(face, box) >= 0.5 for box in boxes)
        for faces, boxes in zip(truth, found)
        for face in faces
    ]
    return len(hits), sum(hits)


def paced_images(frames):
    """Yield the frames of a film as a camera does: 30 a second, round and round, late ones lost."""
    number, start = 0, time.monotonic()
    while number < SECONDS * 30:
        time.sleep(max(0.0, start + number / 30 - time.monotonic()))
        yield frames[number % len(frames)].copy()
        number = max(number + 1, int((time.monotonic() - start) * 30))


def paced(network, side, frames):
    """Tag a paced source as a camera is tagged, and print what its user would see."""
    tagger, viewer = new_tagger(network, side, "camera")
    tagger.args.model = None  # it is loaded already
    images = paced_images(frames)

    def end():  # all that comes after the end is nothing
        viewer.stop.set()
        yield from ()

    webcam.Live.open = lambda live: itertools.chain(images, end())
    with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(utils.UserError):
        webcam.tag_live(tagger.source, tagger, viewer)
    rate = viewer.count / (viewer.latest[-1] - viewer.first)
    counts, ages = tagger.statistics.counts, tagger.statistics.times["label age"]
    median, most = np.percentile(ages, [50, 95])
    utils.print_line(
        f"  paced, 30 a second, {'window' if viewer.window else 'drawn, no window'}: {rate:.1f} "
        f"shown a second, {counts['frames']} of {viewer.count} frames handled, "
        f"{counts['classifications']} classifications, "
        f"label age median {median:.2f} s, 95th percentile {most:.2f} s"
    )


def compare(path, frames, network, side):
    """Run both loops over the same frames and print speed, detection time and recall."""
    cascade = webcam.load_cascade()
    loop_2016(network, side, cascade, frames[:2])  # warm both up
    our_loop(network, side, frames[:2])
    old, old_seconds, old_search = loop_2016(network, side, cascade, frames)
    new, new_seconds, tagger = our_loop(network, side, frames)
    search = sum(tagger.statistics.times["detection"]) / 1000
    old_boxes = [[box for box, _ in hits] for hits in old]
    truth_path = path.with_suffix(".json")
    truth = [[box for box, count in hits if count >= SURE] for hits in old]
    if truth_path.is_file():
        faces = json.loads(truth_path.read_text(encoding="utf-8"))[: len(frames)]
        truth = [[(f["x"], f["y"], f["w"], f["h"]) for f in frame] for frame in faces]
    large = [[face for face in faces if face[2] >= tagger.tracker.smallest] for faces in truth]
    theirs = [
        [f for f in faces if kept([[f]], [boxes])[1]] for faces, boxes in zip(large, old_boxes)
    ]
    (total, by_old), (_, by_new), (found, still) = (
        kept(large, old_boxes),
        kept(large, new),
        kept(theirs, new),
    )
    n = len(frames)
    utils.print_line(
        f"{path.name}: {n} frames of {frames[0].shape[1]}x{frames[0].shape[0]}, network of {side} px"
    )
    utils.print_line(
        f"  2016: {n / old_seconds:6.1f} frames a second, detection {1000 * old_search / n:6.2f} ms a frame"
    )
    utils.print_line(
        f"  ours: {n / new_seconds:6.1f} frames a second, detection {1000 * search / n:6.2f} ms a frame"
    )
    utils.print_line(
        f"  {old_seconds / new_seconds:.1f} times as many frames; detection takes {search / old_search:.1%} of the time"
    )
    utils.print_line(
        f"  {total} faces of {tagger.tracker.smallest} px or more: 2016 finds {by_old}, ours {by_new}; of those that 2016 finds "
        f"ours keeps {still / max(1, found):.1%}; boxes: 2016 {sum(map(len, old_boxes))}, ours {sum(map(len, new))}"
    )


def main():
    """Compare the loops on each film."""
    args = parse_arguments()
    network = model.compiled(model.build_network(5, args.image_size))
    for n in (1, 2):
        model.predict(network, np.zeros((n, args.image_size, args.image_size, 3), "uint8"), n)
    with tempfile.TemporaryDirectory() as folder:
        if not args.films:
            args.films = [Path(folder, "drawn.mp4")]
            sample_faces.draw_clip(args.films[0])
        for path in args.films:
            frames = read_film(path, args.frames)
            compare(path, frames, network, args.image_size)
        paced(network, args.image_size, frames)


if __name__ == "__main__":
    utils.run(main)
