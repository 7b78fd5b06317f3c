"""Tag faces in front of a camera, or in a film, a stream, a picture or a folder of pictures; or collect them.

    python webcam.py model
    python webcam.py model --source party.mp4 --output tagged.mp4
    python webcam.py model --source rtsp://192.168.1.20/live
    python webcam.py --save-faces people/Ann

`model` is the prefix that train.py was given. Keys: q or Esc ends, s saves a snapshot, space pauses.
"""

import imaging
import model
import report
import utils  # before all else: it says in one line which Python and packages are needed

# isort: split
import argparse
import collections
import contextlib
import datetime
import functools
import hashlib
import io
import itertools
import os
import shlex
import subprocess
import sys
import threading
import time
import urllib.parse
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

# OpenCV reads these when it is imported: no chatter, and cameras on Windows that open at once.
os.environ.setdefault("OPENCV_LOG_LEVEL", "SILENT")
os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")
os.environ.setdefault("QT_LOGGING_RULES", "*=false")
os.environ.setdefault("OPENCV_VIDEOIO_MSMF_ENABLE_HW_TRANSFORMS", "0")
try:
    import cv2
except ImportError as error:
    sys.exit(f"error: {utils.missing(error)}")
if not hasattr(cv2, "CascadeClassifier"):
    sys.exit(
        f'error: OpenCV {cv2.__version__} has no face detector: run `pip install "opencv-python<5"`'
    )

# ---------------------------------------------------------------- settings

CASCADE = "haarcascade_frontalface_default.xml"
FACTOR = 1.2  # step of the face detector's sizes
NEW_NEIGHBOURS = 6  # overlapping finds that begin a track
OLD_NEIGHBOURS = 2  # finds that keep a track going
SCAN_EVERY = 10  # frames between searches of the whole picture while a face is followed
FEW_TRACKS = 6  # with more, searching around each costs more than searching the whole picture
DETECT_FACE = (
    60  # larger pictures are reduced until the smallest face looked for has this many pixels
)
HOLD = 8  # frames that a face may be hidden before its track ends
CALM = 0.75  # overlap of a face that hardly moves: its box becomes the mean of old and new, so that it does not jump
OVERLAP = 0.25  # of two boxes: intersection over union from which on they are one face

CLASSIFY_EVERY = 8  # frames between two classifications of a track
MEMORY = 5  # classifications that the running mean remembers
MAX_BATCH = 8  # faces classified at once; on a camera the others wait for the next frame

FILMS = {".mp4": "mp4v", ".avi": "MJPG"}  # endings of --output and their codecs
PICTURES = (".png", ".jpg", ".jpeg")
LIVE = ("camera", "stream")
PAUSES = (1, 2, 4)  # seconds before a lost camera or stream is tried again
EMPTY = 2.0  # seconds for which a camera may give no frame, at its start above all
CAMERAS = 5  # numbers tried where the wanted camera does not open
SILENCE = 0.5  # seconds without a frame after which the window is served all the same
LONGEST = 60.0  # seconds that a frame of a film is shown; what is longer is a clock that jumps
LIVE_FPS = 30  # of the film that --output makes of a camera or stream
NO_PICTURE = {
    "camera": "no picture comes from it: is it connected, used by another program, or forbidden to this one by the "
    "system's privacy settings? Else give another --source",
    "stream": "no picture comes from there: check address, user and password",
}
TITLE = "webcam"
WINDOW = (1280, 800)  # largest size in which the window opens

KEPT_A_SECOND = 5  # crops kept of each track
SMALL = 75  # pixels: the smallest network takes so many
BLURRED = 50.0  # variance of the Laplacian of a face at FACE_SIDE pixels: sharp ones have 90 or more, and 25 is left
# of them after a blur of 1.5 pixels (the 14 films of benchmarks/README.md)
FACE_SIDE = 64
SIMILAR = 2.5  # mean difference of grey levels at LOOK_SIDE pixels
LOOK_SIDE = 32
FLASH = 0.2  # seconds that a box lights up when its face was kept


@dataclass
class Track:
    """One face followed from frame to frame."""

    number: int
    box: tuple  # x, y, width, height in pixels of the source
    seen: int  # frame in which it was found last
    mean: np.ndarray | None = None  # running mean of its probabilities, (classes,)
    count: int = 0  # classifications so far
    classified: int = -(10**9)  # frame of the last one
    moment: float = 0.0  # and its time
    label: str = ""
    probability: float = float("nan")
    kept: float = -(10.0**9)  # time of the crop kept last
    look: np.ndarray | None = None  # how it looked, small and grey
    place: tuple = ()  # and its box


@dataclass
class State:
    """What the functions below share while they handle one source."""

    args: argparse.Namespace
    kind: str  # of the source: camera, stream, folder, picture or film

    # detector and model
    cascade: object = None  # OpenCV's, None with --whole-picture
    model: object = None  # Keras's, None with --save-faces alone
    side: int = 0  # of the network's input, pixels
    labels: list = field(default_factory=list)  # class names in output order
    threshold: float = 0.0

    # --save-faces
    folders: dict = field(default_factory=dict)  # {label: name of its folder}
    run: str = ""  # name of the folder for what belongs together

    # the frame at hand
    picture: tuple | None = None  # (path, bytes) of the file, None in films and on cameras
    shape: tuple = ()
    smallest: int = 0  # face looked for, pixels
    tracks: list = field(default_factory=list)
    following: int = 0  # number of the next track
    number: int = (
        -1
    )  # of the frame handled before, which is not the last one where a camera is too fast
    scanned: int = 0  # frame in which the whole picture was last searched

    # what is shown and written
    window: bool = False
    paused: bool = False
    shown: collections.deque = field(
        default_factory=lambda: collections.deque(maxlen=30)
    )  # times of the last frames
    first: float = 0.0  # time of the first one
    write: object = None  # function that writes a drawn picture to --output
    fps: float = LIVE_FPS  # of the film written

    # a camera or stream, shared by the threads that read, tag and show it
    newest: tuple = (-1, 0.0, None)  # number, seconds since the first frame, frame
    start: float = 0.0  # time of the first frame
    ended: bool = False  # nothing newer will come
    stop: threading.Event = field(default_factory=threading.Event)  # it is to end

    # what the summary tells
    counts: collections.Counter = field(
        default_factory=collections.Counter
    )  # of frames, lines, crops
    times: dict = field(
        default_factory=lambda: collections.defaultdict(lambda: collections.deque(maxlen=10**5))
    )
    spare: collections.deque = field(
        default_factory=lambda: collections.deque(maxlen=4)
    )  # as `smaller_face` has it


# ---------------------------------------------------------------- arguments


def parse_arguments():
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description="Tag faces live, in films, streams and pictures; or collect them as a training set. "
        "Keys: q or Esc ends, s saves a snapshot, space pauses.",
        epilog="example: python webcam.py model --source party.mp4 --output tagged.mp4",
    )
    option = parser.add_argument
    option(
        "model", nargs="?", help="prefix of a trained model (default: none, with --save-faces only)"
    )
    option("--source", default="0", metavar="S",
           help="camera number, film, stream address, picture or folder of them (default: %(default)s)")  # fmt: skip
    option("--output", type=Path, metavar="FILE",
           help="write what is shown: .mp4 or .avi; .png or .jpg; a folder for a folder (default: none)")  # fmt: skip
    option("--no-display", action="store_true", help="open no window (default: off)")
    option("--threshold", type=utils.number(float, 0, 1), metavar="P",
           help="a less probable face is unknown; 0: everybody gets a name (default: the model's own)")  # fmt: skip
    option("--min-face", type=utils.number(int, 24, 10**5), metavar="PX",
           help="smallest face looked for (default: an eighth of the picture's height, at least 40)")  # fmt: skip
    option("--context", type=utils.number(float, 0.5, 10), default=2.0, metavar="F",
           help="side of the square given to the model, in face boxes (default: %(default)s)")  # fmt: skip
    option(
        "--whole-picture",
        action="store_true",
        help="classify whole pictures, look for no faces (default: off)",
    )
    option("--save-faces", type=Path, metavar="DIR",
           help="keep the crops: in DIR/<label>/ with a model, in DIR/ without (default: none)")  # fmt: skip
    args = parser.parse_args()
    if not (args.model or args.save_faces):
        parser.error("give the prefix of a model, or --save-faces DIR")
    return args


def source_kind(source):
    """Say what a source is: camera, stream, folder, picture or film. Raises UserError if there is nothing."""
    path = Path(source)
    if not source:  # an unset variable of a shell; as a path it would be the current folder
        raise utils.UserError("--source is empty: give a camera number, file, folder or address")
    if source.isascii() and source.isdigit() and len(source) < 6:
        return "camera"
    if "://" in source:
        with contextlib.suppress(ValueError):
            if (
                utils.is_utf8(source) and urllib.parse.urlsplit(source).hostname
            ):  # else OpenCV ends the process
                return "stream"
        shown = (
            f"{utils.escape(source.partition('://')[0])}://…"  # what follows may hold a password
        )
        raise utils.UserError(
            f"--source {shown}: no address: give one like rtsp://192.168.1.20/live"
        )
    if path.is_dir():
        return "folder"
    if not path.is_file() or path.stat().st_size == 0:
        what = "is empty" if path.is_file() else "no such file"
        raise utils.UserError(
            f"--source {utils.escape(source)}: {what}: give a camera number, file or address"
        )
    try:
        _, image = imaging.read_picture(path)
        with imaging.picture_errors():
            return "film" if image.format == "GIF" and image.is_animated else "picture"
    except imaging.RefusedError as reason:  # FFmpeg would read some of these
        raise utils.UserError(
            f"--source {utils.escape(source)}: {reason}: give another one"
        ) from None
    except imaging.PictureError:
        return "film"


def check_output(option, path, source, kind):
    """Raise UserError before any work where --output or --save-faces cannot be; warn where a file is replaced."""
    inside = kind not in LIVE and utils.is_inside(path, Path(source))
    endings = PICTURES if kind == "picture" else tuple(FILMS)
    folder = option == "--save-faces" or kind == "folder"
    if folder:
        problems = {
            "is a file: give a folder": path.exists() and not path.is_dir(),
            "lies in the source: choose a folder outside it": inside and kind == "folder",
        }
    else:
        wrong = f"cannot hold what a {kind} gives: choose a name with {' or '.join(endings)}"
        problems = {
            wrong: path.suffix.lower() not in endings,
            "is a folder: give a file": path.is_dir(),
            "no such folder: make it first": not path.parent.is_dir(),
            "is the source itself: choose another name": inside,
        }
    for problem, found in problems.items():
        if found:
            raise utils.UserError(f"{option} {utils.escape(path)}: {problem}")
    if path.suffix.lower() in FILMS:
        opencv_name(path)
    if option == "--output" and path.exists():
        utils.warn(
            f"{utils.escape(path)}: {'files of the same names in it are' if folder else 'is'} replaced"
        )


def prepare(args, kind):
    """Load detector and, but for a camera, the model. Returns the State that the functions below share."""
    state = State(args, kind, run=run_name(args.source, kind))
    if not args.whole_picture:
        state.cascade = load_cascade()
    if args.model and kind == "camera":  # shown while the rest is loaded
        model.check_model(args.model)
    elif args.model:
        load_network(state)
    return state


def load_network(state):
    """Load the model. A camera is shown meanwhile, and tagged from then on."""
    network, info = model.load_model(state.args.model)
    state.labels, state.side = info["labels"], info["image_size"]
    state.threshold = info["threshold"] if state.args.threshold is None else state.args.threshold
    state.folders = utils.folder_names([*state.labels, "unknown"])
    for n in (1, 2) if state.kind in LIVE else ():  # ready for one face and for several
        model.predict(network, np.zeros((n, state.side, state.side, 3), "uint8"), n)
    state.model = network


def opencv_name(path):
    """Return a path as OpenCV may have it: absolute, for ffmpeg takes some names for protocols. Raises UserError."""
    name = str(Path(path).resolve())
    if not utils.is_utf8(name):  # OpenCV ends the process on such a name
        raise utils.UserError(f"{utils.escape(name)}: OpenCV cannot open such a name: rename it")
    return name


def load_cascade():
    """Load the face detector from the current folder, else from beside this script. Raises UserError."""
    # relative where it can be: on Windows, OpenCV reads no XML file below a folder whose name is not ASCII
    name = CASCADE if Path(CASCADE).is_file() else opencv_name(Path(__file__).with_name(CASCADE))
    cascade = cv2.CascadeClassifier()
    with contextlib.suppress(cv2.error, SystemError):
        cascade.load(name)
    if cascade.empty():
        raise utils.UserError(f"{utils.escape(name)}: missing or damaged: copy it from the kit")
    return cascade


# ---------------------------------------------------------------- frame → boxes → tracks


def shrink(frame, smallest):
    """Return the grey picture to search, uint8 (h, w), and its scale: faces of `smallest` px get DETECT_FACE px."""
    scale = min(1.0, DETECT_FACE / smallest)
    if scale < 1:
        size = [max(1, round(n * scale)) for n in frame.shape[1::-1]]
        frame = cv2.resize(frame, size, interpolation=cv2.INTER_AREA)
    return cv2.cvtColor(frame, cv2.COLOR_BGR2GRAY), scale


def find(cascade, grey, scale, smallest, largest=0):
    """Find faces of `smallest` to `largest` (0: any) source pixels in a grey picture.

    Returns [(box in source pixels, overlapping finds)]; the finds say how sure the cascade is.
    """
    if min(grey.shape) < 24:
        return []
    least, most = ((round(side * scale),) * 2 for side in (smallest, largest))
    boxes, counts = cascade.detectMultiScale2(
        grey, FACTOR, OLD_NEIGHBOURS, minSize=least, maxSize=most
    )
    return [(tuple(round(v / scale) for v in box), int(count)) for box, count in zip(boxes, counts)]


def find_twice(cascade, grey, scale, smallest):
    """Find faces as `find` does; the finds are the mean of those in a picture and in its mirror image.

    A picture is seen only once, and what is no face is seldom taken for one both ways round: of 448 flowers 7
    instead of 11 show a "face", at the same recall (0.937 and 0.934 of the heads in single frames of 14 films).
    """
    width, turned = round(grey.shape[1] / scale), find(cascade, cv2.flip(grey, 1), scale, smallest)
    back = [((width - x - w, y, w, h), count) for (x, y, w, h), count in turned]
    return [
        (
            box,
            (count + max((n for other, n in back if overlap(box, other) > OVERLAP), default=0)) / 2,
        )
        for box, count in find(cascade, grey, scale, smallest)
    ]


def look_around(cascade, grey, scale, box):
    """Search the surroundings of a known box (source pixels) for faces of about its size, as `find` does."""
    x, y, w, h = (v * scale for v in box)
    left, top = max(0, round(x - w / 2)), max(0, round(y - h / 2))
    part = grey[top : round(y + 1.5 * h), left : round(x + 1.5 * w)]
    hits = find(cascade, part, scale, 0.75 * box[2], 1.35 * box[2])
    return [
        ((x + round(left / scale), y + round(top / scale), w, h), count)
        for (x, y, w, h), count in hits
    ]


def overlap(a, b):
    """Return intersection over union of two boxes (x, y, w, h)."""
    wide = min(a[0] + a[2], b[0] + b[2]) - max(a[0], b[0])
    high = min(a[1] + a[3], b[1] + b[3]) - max(a[1], b[1])
    both = max(0, wide) * max(0, high)
    return both / (a[2] * a[3] + b[2] * b[3] - both)


def search(state, frame, number):
    """Find the faces of a frame, uint8 BGR (h, w, 3): now all over the picture, now only around the tracks.

    Returns what `find` does, no face twice.
    """
    grey, scale = shrink(frame, state.smallest)
    if number - state.scanned >= SCAN_EVERY or not 0 < len(state.tracks) <= FEW_TRACKS:
        hits = (find_twice if state.picture else find)(state.cascade, grey, scale, state.smallest)
        state.scanned = number
    else:
        hits = [
            hit
            for track in state.tracks
            for hit in look_around(state.cascade, grey, scale, track.box)
        ]
    found = []
    for box, count in sorted(
        hits, key=lambda hit: (-hit[1], hit[0])
    ):  # the surest first, and always the same one
        if all(
            overlap(box, other) < OVERLAP for other, _ in found
        ):  # else the same face, in another size or search
            found.append((box, count))
    return found


def follow(state, frame, number):
    """Link the faces of a frame to the tracks. Replaces state.tracks.

    Tracks end that were not found for HOLD frames; on a slow machine, which sees few of them, in two frames on end.
    """
    found = search(state, frame, number)
    for t, b in link([track.box for track in state.tracks], [box for box, _ in found]).items():
        track, box = state.tracks[t], found[b][0]
        calm = overlap(box, track.box) > CALM
        track.box = tuple(round((a + b) / 2) for a, b in zip(box, track.box)) if calm else box
        track.seen = number
    tracks = [
        t for t in state.tracks if number - t.seen <= (LIVE_FPS if t.seen == state.number else HOLD)
    ]
    for box, count in sorted(found):
        if count >= NEW_NEIGHBOURS and all(overlap(box, track.box) < OVERLAP for track in tracks):
            tracks.append(Track(state.following, box, number))
            state.following += 1
    state.tracks = tracks


def link(old, new):
    """Match boxes of two frames so that the sum of overlaps is largest. Returns {index in old: index in new}."""
    from scipy.optimize import linear_sum_assignment

    if not old or not new:
        return {}
    overlaps = np.array([[overlap(a, b) for b in new] for a in old])
    return {
        int(i): int(j)
        for i, j in zip(*linear_sum_assignment(-overlaps))
        if overlaps[i, j] >= OVERLAP
    }


# ---------------------------------------------------------------- tracks → labels


def cut(state, frame, box):
    """Cut the square that the network gets around a box; the whole frame with --whole-picture. Returns RGB."""
    if not state.args.whole_picture:
        x, y, w, h = box
        side = min(
            state.args.context * w, imaging.MAX_PIXELS**0.5 - 1
        )  # larger ones could not be read again
        frame = imaging.crop_square(frame, x + w / 2, y + h / 2, side)
    return cv2.cvtColor(frame, cv2.COLOR_BGR2RGB)


def file_to_keep(state, frame, box):
    """Return the bytes that --save-faces keeps: a crop as JPEG; with --whole-picture the picture's own file."""
    if state.picture and state.args.whole_picture:
        return state.picture[1]
    file = io.BytesIO()
    imaging.save_jpeg(file, cut(state, frame, box))
    return file.getvalue()


def refresh(state, frame, number, moment):
    """Classify the tracks that are new or due, on a camera the MAX_BATCH oldest labels only; name all tracks.

    The batch is filled up to a power of two: backends that compile for each size do so seldom.
    """
    due = [t for t in state.tracks if t.seen == number and number - t.classified >= CLASSIFY_EVERY]
    if state.kind in LIVE:
        due = sorted(due, key=lambda t: t.classified)[:MAX_BATCH]
    if due:
        start = time.perf_counter()
        files = [
            file_to_keep(state, frame, track.box) for track in due
        ]  # so it gets just what training would read
        inputs = np.stack(
            [imaging.to_model_input(imaging.open_picture(data), state.side) for data in files]
        )
        least = (
            2 if state.picture else 1
        )  # a batch of one differs in the last bits from what evaluation computes
        size = max(least, min(MAX_BATCH, 1 << (len(due) - 1).bit_length()))
        for track, p in zip(due, model.predict(state.model, inputs, size)):
            track.count += 1
            track.mean = (
                p if track.count == 1 else track.mean + (p - track.mean) / min(track.count, MEMORY)
            )
            track.classified, track.moment = number, moment
        state.times["classification"].append((time.perf_counter() - start) * 1000)
        state.counts["classifications"] += len(due)
    name_tracks(state)


def name_tracks(state):
    """Give tracks their labels: below the threshold `unknown`; the same name twice only where everybody gets one."""
    taken = set()
    for track in sorted(
        (t for t in state.tracks if t.mean is not None), key=lambda t: -t.mean.max()
    ):
        label, probability = state.labels[track.mean.argmax()], float(track.mean.max())
        if probability < state.threshold or (state.threshold and label in taken):
            label = "unknown"
        taken.add(label)
        track.label, track.probability = label, probability


def handle(state, frame, number, moment):
    """Do all that is done with a frame: find, classify, print, keep. frame: uint8 BGR (h, w, 3); moment: seconds."""
    (height, width, _), handled = frame.shape, state.counts["frames"]
    if (
        frame.shape != state.shape or state.picture
    ):  # the first frame, another picture, a film that changes its size
        state.shape, state.tracks, state.scanned = frame.shape, [], number - SCAN_EVERY
        state.smallest = state.args.min_face or max(40, height // 8)
    if state.args.whole_picture:
        state.tracks = state.tracks or [Track(0, (0, 0, width, height), number)]
        state.tracks[0].seen = number
    else:
        start = time.perf_counter()
        follow(state, frame, number)
        state.times["detection"].append((time.perf_counter() - start) * 1000)
        if not state.counts["tagged"] and handled & (handled - 1) == 0:  # frames 0, 1, 2, 4, 8…
            state.spare.append(
                (*shrink(frame, height / 20), state.smallest)
            )  # for the summary: smaller faces
    if state.model:
        refresh(state, frame, number, moment)
    for track in state.tracks:
        print_line(state, number, moment, track)
    if state.args.save_faces:
        keep_faces(state, frame, number, moment)
    state.counts["frames"] += 1
    state.number = number


COLUMNS = (
    "frame time track x y w h label probability".split()
)  # of the lines; a folder's have `file` before them


def print_line(state, number, moment, track):
    """Print one face's line, once it has a label."""
    if track.label or not state.model:
        state.counts["tagged"] += 1
        probability = f"{track.probability:.6f}" if state.model else ""
        cells = [number, f"{moment:.6f}", track.number, *track.box, track.label, probability]
        if state.kind == "folder":
            cells.insert(
                0, utils.escape(state.picture[0].relative_to(state.args.source).as_posix())
            )
        utils.print_line("\t".join(map(str, cells)))


# ---------------------------------------------------------------- --save-faces


def keep_faces(state, frame, number, moment):
    """Keep the crops worth it: of each track KEPT_A_SECOND; of a picture without a model only one that is alone."""
    if state.picture and not state.model and len(state.tracks) != 1:
        state.counts[
            "pictures with several faces" if state.tracks else "pictures without a face"
        ] += 1
        return
    for track in state.tracks:
        named = (
            track.label or not state.model
        )  # with many faces some still wait for their first label
        if named and track.seen == number and moment - track.kept >= 1 / KEPT_A_SECOND - 1e-6:
            crop = cut(state, frame, track.box)
            reason = reason_against(state, frame, track, crop)
            state.counts[reason or "saved"] += 1
            if not reason:
                track.kept, track.look, track.place = moment, look(crop), track.box
                save_crop(state, frame, number, track)


def look(crop):
    """Return how an RGB crop looks from afar: grey, (LOOK_SIDE, LOOK_SIDE), 0..255."""
    return cv2.resize(crop, (LOOK_SIDE, LOOK_SIDE), interpolation=cv2.INTER_AREA).mean(2)


def reason_against(state, frame, track, crop):
    """Return why a crop is not worth keeping, None if it is. Of pictures, a model keeps every face."""
    if state.picture and (state.model or state.args.whole_picture):
        return None
    if min(crop.shape[:2]) < SMALL:
        return "too small"
    x, y, w, h = track.box
    face = cv2.cvtColor(frame[y : y + h, x : x + w], cv2.COLOR_BGR2GRAY)
    face = cv2.resize(face, (FACE_SIDE, FACE_SIDE), interpolation=cv2.INTER_AREA)
    if cv2.Laplacian(face, cv2.CV_64F).var() < BLURRED:
        return "too blurred"
    if track.place:  # also at its old place: a box that moves by a pixel makes no new crop
        looks = [look(crop), look(cut(state, frame, track.place))]
        if min(np.abs(now - track.look).mean() for now in looks) < SIMILAR:
            return "too similar"
    return None


def save_crop(state, frame, number, track):
    """Save the crop of a track. The name ends in a hash of the content, so that no other one is ever overwritten."""
    folder, run = state.args.save_faces, state.run
    if state.model:
        folder /= state.folders[track.label]
        run = run and f"{run}-{state.folders[track.label]}"
    if run:
        folder /= utils.folder_names([run])[run]
    folder.mkdir(parents=True, exist_ok=True)
    data, stem, ending = file_to_keep(state, frame, track.box), f"{number:06d}", ".jpg"
    if state.picture:
        path = state.picture[0]
        stem = utils.folder_names([path.stem[:40]])[path.stem[:40]]
        ending = path.suffix.lower() if state.args.whole_picture else ".jpg"
    name = f"{stem}-{track.number}-{hashlib.sha256(data).hexdigest()[:10]}{ending}"
    with utils.atomic_write(folder / name) as part:
        part.write_bytes(data)


def run_name(source, kind):
    """Return the folder for the crops of one film, or of one run with a camera or stream; "" for pictures."""
    now, path = f"{datetime.datetime.now():%Y%m%d-%H%M%S}", Path(source)
    if kind == "film":
        return f"{path.stem[:40]}-{hashlib.sha256(os.fsencode(path.resolve())).hexdigest()[:8]}"
    if kind == "camera":
        return f"camera{source}-{now}"
    return f"stream-{urllib.parse.urlsplit(source).hostname}-{now}" if kind == "stream" else ""


# ---------------------------------------------------------------- drawing


def plate(image, x, y, size, colour, text, note=""):
    """Write a text and a paler note on a rounded plate at (x, y) of a PIL image, moved inside if need be."""
    large, small = (
        ImageFont.truetype(report.font_file(t), s)
        for t, s in ((text, size), (note, round(0.8 * size)))
    )
    pen, pad, height, base = (
        ImageDraw.Draw(image, "RGBA"),
        round(0.45 * size),
        round(1.5 * size),
        round(1.1 * size),
    )
    width = round(large.getlength(text) + small.getlength(note)) + pad * (3 if note else 2)
    x, y = max(0, min(x, image.width - width)), max(0, min(y, image.height - height))
    pen.rounded_rectangle((x, y, x + width - 1, y + height - 1), size // 3, colour)
    pen.text((x + pad, y + base), text, "white", large, "ls")
    pen.text((x + width - pad, y + base), note, (255, 255, 255, 200), small, "rs")


def draw(state, frame, moment):
    """Draw boxes, names, probabilities, and what the corner says, on a BGR frame. Returns an RGB PIL image."""
    image = Image.fromarray(cv2.cvtColor(frame, cv2.COLOR_BGR2RGB))
    size = max(12, round(min(image.size) / 26))
    thick = max(2, size // 7)
    for track in state.tracks:
        (colour, pale), (x, y, w, h) = (
            report.ORANGE if track.label == "unknown" else report.BLUE,
            track.box,
        )
        if not state.args.whole_picture and (track.label or not state.model):
            line, width = (pale, 2 * thick) if 0 <= moment - track.kept < FLASH else (colour, thick)
            ImageDraw.Draw(image).rounded_rectangle((x, y, x + w, y + h), w // 8, None, line, width)
        if track.label:
            above = y - round(1.75 * size)
            y = above if above >= 0 else y + h + size // 4
            plate(image, x, y, size, colour, track.label, f"{track.probability:.0%}")
    corner = ["loading the model"] if state.args.model and not state.model else []
    if len(state.shown) > 1 and not state.picture:
        corner.append(
            f"{(len(state.shown) - 1) / max(1e-6, state.shown[-1] - state.shown[0]):.0f} fps"
        )
    if state.args.save_faces:
        corner.append(f"{state.counts['saved']} kept")
    for n, text in enumerate(corner):
        plate(
            image,
            image.width,
            size // 3 + n * round(1.6 * size),
            round(0.8 * size),
            (0, 0, 0, 130),
            text,
        )
    return image


# ---------------------------------------------------------------- window and output


def open_window(state):
    """Open the window, or warn and go on without. A child process tries first: Qt ends a process without a display."""
    if state.args.no_display:
        return
    # -P: not a cv2.py of the current folder
    trial = [sys.executable, "-P", "-c", "import cv2; cv2.namedWindow('trial'); cv2.waitKey(1)"]
    with contextlib.suppress(subprocess.TimeoutExpired):
        state.window = (
            subprocess.run(trial, capture_output=True, timeout=60, check=False).returncode == 0
        )
    if state.window:
        cv2.namedWindow(TITLE, cv2.WINDOW_NORMAL | cv2.WINDOW_KEEPRATIO | cv2.WINDOW_GUI_NORMAL)
    else:
        utils.warn(
            "no window can be opened (no display, or a headless OpenCV): going on as with --no-display"
        )


def present(state, frame, moment, left=0.0):
    """Show and write one frame; left: seconds until the next. Returns True if the user wants to end."""
    now = time.monotonic()
    state.first = state.first or now
    state.shown.append(now)
    state.counts["shown"] += 1
    if state.model and not state.picture:
        state.times["label age"] += [moment - track.moment for track in state.tracks if track.label]
    if state.window or state.write:
        image = draw(state, frame, moment)
    if state.write:
        due = 1
        if state.kind in LIVE:  # the film of a camera runs as fast as the camera did
            due = int(moment * LIVE_FPS) + 1 - state.counts["written"]
            state.counts["written"] += due
        for _ in range(min(due, LIVE_FPS)):
            state.write(image)
    return state.window and show(state, image, left)


def show(state, image, left):
    """Show a picture and obey the keys pressed, for `left` seconds, and while it is paused. Returns True to end.

    A new key is one more `if` here. It may set any field of the State, `state.threshold` say: what finds, names and
    draws the faces reads them again for every frame.
    """
    if state.counts["shown"] == 1:  # else it would have 400x300 whatever the picture
        scale = min(1, WINDOW[0] / image.width, WINDOW[1] / image.height)
        cv2.resizeWindow(TITLE, round(scale * image.width), round(scale * image.height))
    cv2.imshow(TITLE, cv2.cvtColor(np.asarray(image), cv2.COLOR_RGB2BGR))
    while True:
        key, ends = wait_for_key(50 if state.paused else round(1000 * left))
        if ends or state.stop.is_set():
            return True
        if key == "s":
            save_snapshot(image)
        state.paused ^= key == " "
        if not state.paused:
            return False


def wait_for_key(milliseconds):
    """Let the window live for so long. Returns (the key pressed, a small letter, and whether it is to end)."""
    key = chr(
        cv2.waitKeyEx(max(1, milliseconds)) & 0xFFFF
    ).lower()  # the low byte of an arrow's code is a Q or S
    try:
        closed = cv2.getWindowProperty(TITLE, cv2.WND_PROP_VISIBLE) < 1
    except cv2.error:  # what Qt's part of OpenCV answers about a window that was closed
        closed = True
    return key, closed or key in ("q", "\x1b")


def save_snapshot(image):
    """Save what is shown, a PIL image, in the current folder; warn where that cannot be."""
    path = Path(f"snapshot-{datetime.datetime.now():%Y%m%d-%H%M%S-%f}.png")
    try:
        write_picture(path, image)
        print(f"snapshot: {path}", file=sys.stderr, flush=True)
    except OSError as error:
        utils.warn(f"no snapshot: {utils.advice(error)}")


def write_picture(path, image):
    """Write a PIL image as PNG or JPEG, whole or not at all."""
    with utils.atomic_write(path) as part:
        image.save(part, quality=95, subsampling=0)


@contextlib.contextmanager
def film_output(state):
    """Write what is shown to the film --output, which appears whole at the end: also after Ctrl-C and lost sources."""
    path, stop, film, size = state.args.output, None, cv2.VideoWriter(), None
    shown = f"--output {utils.escape(path)}"

    def write(image):
        """Add a PIL image to the film, whose size and rate are known with the first one."""
        nonlocal size
        if not film.isOpened():
            size, code = image.size, FILMS[path.suffix.lower()]
            if not film.open(opencv_name(part), cv2.VideoWriter.fourcc(*code), state.fps, size):
                raise utils.UserError(f"{shown}: no codec for it here: try .avi")
        film.write(
            cv2.cvtColor(np.asarray(ImageOps.pad(image, size)), cv2.COLOR_RGB2BGR)
        )  # films may change size

    with utils.atomic_write(path) as part:
        state.write = write
        try:
            yield
        except (KeyboardInterrupt, Exception) as error:  # out of memory, say
            stop = error
        film.release()
        if not cv2.VideoCapture(opencv_name(part), cv2.CAP_FFMPEG).isOpened():
            raise stop or utils.UserError(f"{shown}: could not be written: check the free space")
    if stop:
        raise stop


# ---------------------------------------------------------------- films and pictures


def tag_film(state):
    """Handle a film frame by frame, in order, nothing dropped, so that two runs print the same lines."""
    capture = cv2.VideoCapture(opencv_name(state.args.source), cv2.CAP_FFMPEG)
    rate, total = capture.get(cv2.CAP_PROP_FPS), int(capture.get(cv2.CAP_PROP_FRAME_COUNT))
    state.fps = (
        round(rate, 2 if rate > 1 else 3) if 0.05 <= rate <= 500 else 25
    )  # MPEG-4 has no room for more digits
    numbers, start, moment = itertools.count(), time.monotonic(), -1 / state.fps
    if 0 < total < 10**7 and not state.window:  # what the file says may be nonsense
        numbers = utils.progress(numbers, total, "frames")
    for number in numbers:
        good, frame = capture.read()
        if not good:
            warn_if_cut(utils.escape(state.args.source), number, total)
            break
        told = max(
            0.0, capture.get(cv2.CAP_PROP_POS_MSEC) / 1000
        )  # 0 in raw streams and at the end of some AVIs
        before, moment = moment, told if told > moment else moment + 1 / state.fps
        handle(state, frame, number, moment)
        now = time.monotonic() - moment
        start = (
            now if moment > before + LONGEST else max(start, now)
        )  # a pause stops the film's clock, too
        if present(state, frame, moment, start + moment - time.monotonic()):
            break
    if not state.counts["frames"]:
        raise utils.UserError(
            f"--source {utils.escape(state.args.source)}: no frame can be read: give another file"
        )


def warn_if_cut(name, number, total):
    """Warn where a film broke off: some count too many frames, and what the file says may be nonsense."""
    if 0 < number < 0.9 * total < 10**7:
        utils.warn(
            f"{name}: broke off after {number} of {total:.0f} frames: its end may be missing"
        )


def tag_pictures(state):
    """Handle a picture or a folder of pictures: no tracks and no running mean. Broken ones are warned about."""
    source = Path(state.args.source)
    files = utils.list_files(source) if state.kind == "folder" else [source]
    loaded = utils.ordered_parallel_map(load_picture, files, min(4, utils.cores()))
    for (data, pixels), path in zip(utils.progress(loaded, len(files), "pictures"), files):
        if data is None:
            utils.warn(f"{utils.escape(path)}: skipped: {pixels}")
            continue
        state.picture, state.following = (path, data), 0
        handle(state, pixels, state.counts["frames"], 0.0)
        state.write = (
            functools.partial(write_picture, picture_output(state, path))
            if state.args.output
            else None
        )
        state.paused = state.kind == "picture"  # a single one stays until a key says go on or end
        if present(state, pixels, 0.0):
            break
    if not state.counts["frames"]:
        raise utils.UserError(
            f"--source {utils.escape(source)}: no picture in it can be read: give another one"
        )


def load_picture(path):
    """Read a picture in full, upright. Returns (its bytes, BGR pixels), or (None, the reason) if it is none."""
    try:
        data, image = imaging.read_picture(path)
        return data, cv2.cvtColor(np.asarray(imaging.upright(image)), cv2.COLOR_RGB2BGR)
    except imaging.PictureError as reason:
        return None, str(reason)


def picture_output(state, path):
    """Return where a tagged picture goes: --output itself, or the same place below it."""
    if state.kind == "picture":
        return state.args.output
    target = state.args.output / path.relative_to(state.args.source)
    if target.suffix.lower() not in PICTURES:
        name = f"{path.name}.jpg"
        if (
            len(os.fsencode(name)) > 244 or path.with_name(name).exists()
        ):  # too long, or another picture's
            name = f"{path.stem[:40]}-{hashlib.sha256(os.fsencode(path.name)).hexdigest()[:8]}{path.suffix[:10]}.jpg"
        target = target.with_name(name)
    target.parent.mkdir(parents=True, exist_ok=True)
    return target


# ---------------------------------------------------------------- cameras and streams


def tag_live(state):
    """Tag a camera or stream: reading, tagging and showing do not wait for each other."""
    pool = ThreadPoolExecutor(2)
    capture = (
        open_live(state) if state.kind == "camera" else None
    )  # macOS asks for permission in the main thread only
    reader, worker = pool.submit(read_live, state, capture), pool.submit(work_live, state)
    try:
        for _, _, frame in newest_frames(state, lambda: keep_alive(state)):
            if present(state, frame, time.monotonic() - state.start):
                break
        else:
            wait([worker])  # the last frame counts, too
    finally:
        state.stop.set()
        wait([worker])  # it ends after the frame at hand; nothing is printed or saved after that
        wait([reader], 0.4)  # it may hang in a dead stream
        pool.shutdown(wait=False)
    worker.result()
    if reader.done():
        reader.result()


def work_live(state):
    """Thread: handle the newest frame, again and again. A camera's first frame has the model loaded."""
    try:
        for number, moment, frame in newest_frames(state):
            if (
                state.args.model and not state.model
            ):  # only now: where no camera is, this is told at once
                load_network(state)
            elif not state.paused:
                handle(state, frame, number, moment)
    except BaseException:
        state.stop.set()
        raise


def keep_alive(state):
    """Let a window be closed though no frame comes for long."""
    if (
        state.window
        and state.shown
        and time.monotonic() - state.shown[-1] > SILENCE
        and wait_for_key(5)[1]
    ):
        state.stop.set()


def newest_frames(state, meanwhile=lambda: None):
    """Yield (number, seconds, frame), each time the newest one, until the source ends. meanwhile: what else to do."""
    done = -1
    while not state.stop.is_set():
        ended, newest = state.ended, state.newest  # in this order: one more may come before the end
        if newest[0] > done:
            done = newest[0]
            yield newest
        elif ended:
            return
        else:
            time.sleep(0.005)
            meanwhile()


def read_live(state, capture):
    """Thread: keep only the newest frame, until the source is to stop or a served film ends.

    A lost source is tried again after each of PAUSES. Raises UserError where none comes (back).
    """
    source, capture, tries = state.args.source, capture or open_live(state), 0
    host = urllib.parse.urlsplit(source).hostname  # never the user, password or query
    name = f"camera {source}" if state.kind == "camera" else f"stream {utils.escape(host)}"
    try:
        while not state.stop.is_set():
            tries = 0 if read_frames(state, capture) else tries
            number, total = state.newest[0] + 1, capture.get(cv2.CAP_PROP_FRAME_COUNT)
            if state.stop.is_set():
                return
            if number and total > 0:  # a film
                warn_if_cut(name, number, total)
                return
            if not number:
                raise utils.UserError(f"{name}: {NO_PICTURE[state.kind]}{other_cameras(state)}")
            if tries == len(PAUSES):
                raise utils.UserError(
                    f"{name}: lost, and {tries} tries did not bring it back: check it and try again"
                )
            utils.warn(f"{name}: lost: trying again in {PAUSES[tries]} s")
            capture.release()
            state.stop.wait(PAUSES[tries])
            capture, tries = open_live(state), tries + 1
    finally:
        state.ended = True


def read_frames(state, capture):
    """Keep the newest frame until the source is to stop, or gives none for EMPTY seconds. Says whether any came."""
    came, last = False, time.monotonic()
    while not state.stop.is_set():
        good, frame = capture.read()
        now = time.monotonic()
        if good:
            came, last, state.start = True, now, state.start or now
            state.newest = state.newest[0] + 1, now - state.start, frame
            # a served film comes faster than it plays
            if state.kind == "stream" and capture.get(cv2.CAP_PROP_FRAME_COUNT) > 0:
                ahead = capture.get(cv2.CAP_PROP_POS_MSEC) / 1000 - (now - state.start)
                state.stop.wait(min(1.0, max(0.0, ahead)))
        elif (
            capture.isOpened()
            and now - last < EMPTY
            and not capture.get(cv2.CAP_PROP_FRAME_COUNT) > 0
        ):
            state.stop.wait(0.02)
        else:
            break
    return came


def other_cameras(state):
    """Return words that name the cameras that do open, if the source is one that does not."""
    others = range(CAMERAS) if state.kind == "camera" else ()
    found = [
        str(n) for n in others if n != int(state.args.source) and cv2.VideoCapture(n).isOpened()
    ]
    return f" ({', '.join(found)} can be opened)" if found else ""


def open_live(state):
    """Open a camera or stream. Returns a capture, which may not be open."""
    if state.kind == "camera":
        return cv2.VideoCapture(int(state.args.source))
    limits = [cv2.CAP_PROP_OPEN_TIMEOUT_MSEC, 10_000, cv2.CAP_PROP_READ_TIMEOUT_MSEC, 5_000]
    return cv2.VideoCapture(state.args.source, cv2.CAP_FFMPEG, limits)


# ---------------------------------------------------------------- the end


def summarise(state):
    """Print on stderr how it went: speed, what was kept, and what to do where nothing was found."""
    counts, times = state.counts, state.times
    rate = max(0, counts["shown"] - 1) / max(1e-6, (state.shown or [0])[-1] - state.first)
    parts = [
        f"{counts['frames']} frames, {rate:.1f} a second shown, {counts['classifications']} classifications"
    ]
    for key, unit, digits in (
        ("detection", "ms", 1),
        ("classification", "ms", 1),
        ("label age", "s", 2),
    ):
        if times[key]:
            parts.append(f"{key} {np.median(times[key]):.{digits}f} {unit}")
    lines = ["; median ".join(parts)]
    if not counts["tagged"] and not state.args.whole_picture:
        lines.append(smaller_face(state))
    if state.args.save_faces:
        reasons = [
            "too blurred",
            "too similar",
            "too small",
            *(key for key in counts if key.startswith("pictures")),
        ]
        left_out = ", ".join(f"{counts[reason]} {reason}" for reason in reasons)
        lines.append(
            f"{counts['saved']} saved in {utils.escape(state.args.save_faces)}; {left_out}"
        )
        lines.append(next_command(state))
    print(*lines, sep="\n", file=sys.stderr)


def smaller_face(state):
    """Search the spare frames for faces of any size; return what to say about the smallest one.

    These are triples: grey frame, its scale, size of the smallest face looked for in it, in pixels.
    """
    search, sides = find_twice if state.picture else find, []
    for grey, scale, smallest in state.spare:
        sure = [
            box
            for box, count in search(state.cascade, grey, scale, 24 / scale)
            if count >= NEW_NEIGHBOURS
        ]
        sides += [box[2] for box in sure if box[2] < smallest]
    text = f"nothing was tagged: no face of {max(spare[2] for spare in state.spare)} px or larger was found"
    if not sides:
        return f"{text}, and no smaller one"
    return f"{text}; the smallest there has {min(sides)} px: --min-face {max(24, int(0.9 * min(sides)))} would find it"


def next_command(state):
    """Return the command that goes on from the crops: collect another class, or train."""
    folder = state.args.save_faces
    data = folder if state.model else folder.parent
    classes = (
        [p for p in data.iterdir() if p.is_dir() and not utils.is_ignored(p.name)]
        if data.is_dir()
        else []
    )
    if not state.model and (
        len(classes) < 2 or data == Path()
    ):  # the current folder may hold anything
        whole = " --whole-picture" if state.args.whole_picture else ""
        return f"next: python webcam.py --save-faces {shlex.quote(utils.escape(data / 'ANOTHER_NAME'))}{whole}"
    names = [shlex.quote(utils.escape(name)) for name in (data, state.args.model or "model")]
    return f"next: python train.py {' '.join(names)}"


def main():
    """Read the command line, tag or collect what the source shows, and sum it up."""
    args = parse_arguments()
    kind = source_kind(args.source)
    for option, path in (("--output", args.output), ("--save-faces", args.save_faces)):
        if path:
            check_output(option, path, args.source, kind)
    state = prepare(args, kind)
    open_window(state)
    utils.print_line("\t".join(["file"] * (kind == "folder") + COLUMNS))
    tag = {"film": tag_film, "picture": tag_pictures, "folder": tag_pictures}.get(kind, tag_live)
    try:
        with (
            film_output(state)
            if args.output and tag is not tag_pictures
            else contextlib.nullcontext()
        ):
            tag(state)
    finally:
        if state.counts["frames"]:
            summarise(state)


if __name__ == "__main__":
    try:
        utils.run(main)
    except SystemExit as end:  # all is written; TensorFlow would take another second to tidy up
        sys.stdout.flush()
        os._exit(end.code)
