"""Tag faces in front of a camera, or in a film, a stream, a picture or a folder of pictures; or collect them.

    python webcam.py model
    python webcam.py model --source party.mp4 --output tagged.mp4
    python webcam.py model --source rtsp://192.168.1.20/live
    python webcam.py --save-faces people/Ann

`model` is the prefix that train.py was given. Keys: q or Esc ends, s saves a snapshot, space pauses.
"""

import argparse
import collections
import contextlib
import datetime
import functools
import hashlib
import io
import os
import shlex
import subprocess
import sys
import threading
import time
import urllib.parse
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import utils  # before other packages: it says in one line which are missing

# isort: split
import numpy as np
from PIL import Image, ImageDraw, ImageFont

# ---------------------------------------------------------------- settings

CASCADE = "haarcascade_frontalface_default.xml"
FACTOR = 1.2  # step of the face detector's sizes
NEW_NEIGHBOURS = 6  # overlapping finds that begin a track
OLD_NEIGHBOURS = 2  # finds that keep a track going
SCAN_EVERY = 10  # frames between searches of the whole picture while a face is followed
FEW_TRACKS = 6  # with more, searching around each costs more than searching the whole picture
DETECT_FACE = 60  # larger pictures are reduced until the smallest face looked for has this many pixels
HOLD = 6  # frames that a face may be hidden before its track ends
DOUBT = 3 * SCAN_EVERY  # frames after which a track ends that was never again found as surely as at its beginning
CALM = 0.75  # overlap of a face that hardly moves: its box becomes the mean of old and new, so that it does not jump
OVERLAP = 0.25  # of two boxes: intersection over union from which on they are one face

CLASSIFY_EVERY = 8  # frames between two classifications of a track
MEMORY = 15  # classifications that the running mean of a face remembers
WHOLE_MEMORY = 3  # and of a whole picture, which may soon show something else
MAX_BATCH = 8  # faces classified at once; on a camera the others wait for the next frame

PAUSES = (1, 2, 4)  # seconds before a lost camera or stream is tried again
EMPTY = 2.0  # seconds for which a camera may give no frame, at its start above all
LIVE_FPS = 30  # of the film that --output makes of a camera or stream
TITLE = "webcam"
WINDOW = (1280, 800)  # largest size that the window has when it opens

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
    sure: int  # frame in which it was last found as surely as a new face must be
    mean: np.ndarray | None = None  # running mean of its probabilities, (classes,)
    count: int = 0  # classifications so far
    classified: int = -(10**9)  # frame of the last one
    moment: float = 0.0  # and its time
    label: str = ""
    probability: float = float("nan")
    kept: float = -(10.0**9)  # time of the crop kept last
    look: np.ndarray | None = None  # how it looked, small and grey
    place: tuple = ()  # and its box


# ---------------------------------------------------------------- arguments


def parse_arguments():
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description="Tag faces live, in films, streams and pictures; or collect them as a training set.",
        epilog="example: python webcam.py model --source party.mp4 --output tagged.mp4",
    )
    option = parser.add_argument
    option("model", nargs="?", help="prefix of a trained model (default: none, with --save-faces only)")
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
    option("--whole-picture", action="store_true", help="classify whole pictures, look for no faces (default: off)")
    option("--save-faces", type=Path, metavar="DIR",
           help="keep the crops: in DIR/<label>/ with a model, in DIR/ without (default: none)")  # fmt: skip
    args = parser.parse_args()
    if not (args.model or args.save_faces):
        parser.error("give the prefix of a model, or --save-faces DIR")
    return args


def source_kind(source):
    """Say what a source is: camera, stream, folder, picture or film. Raises UserError if there is nothing."""
    path = Path(source)
    if source.isascii() and source.isdigit() and len(source) < 6:
        return "camera"
    if "://" in source:
        with contextlib.suppress(ValueError):
            if urllib.parse.urlsplit(source).hostname:
                return "stream"
        raise utils.UserError(f"--source {utils.escape(source)}: no address: give one like rtsp://192.168.1.20/live")
    if path.is_dir():
        return "folder"
    if not path.is_file() or path.stat().st_size == 0:
        what = "is empty" if path.is_file() else "no such file"
        raise utils.UserError(f"--source {utils.escape(source)}: {what}: give a camera number, file or address")
    if path.suffix.lower() in (".mjpeg", ".mjpg"):  # one JPEG after another: looks like a picture
        return "film"
    try:
        image = utils.open_picture(path.read_bytes() if path.stat().st_size < 2**28 else b"")
    except utils.PictureError:
        return "film"
    return "film" if image.format == "GIF" and image.n_frames > 1 else "picture"


def check_outputs(args, kind):
    """Raise UserError before any work where --output or --save-faces cannot be; warn where a file is replaced."""
    endings = {"folder": (), "picture": (".png", ".jpg", ".jpeg")}.get(kind, (".mp4", ".avi"))
    output, folders, source = args.output, {"--save-faces": args.save_faces}, Path(args.source)
    if kind == "folder":
        folders["--output"] = output
    elif output:
        shown = f"--output {utils.escape(output)}"
        if output.suffix.lower() not in endings:
            raise utils.UserError(
                f"{shown}: cannot hold what a {kind} gives: choose a name with {' or '.join(endings)}"
            )
        if output.is_dir() or not output.parent.is_dir():
            what = "is a folder: give a file" if output.is_dir() else "no such folder: make it first"
            raise utils.UserError(f"{shown}: {what}")
        if output.exists() and source.exists() and output.samefile(source):
            raise utils.UserError(f"{shown}: is the source itself: choose another name")
    for name, folder in folders.items():
        if folder and folder.exists() and not folder.is_dir():
            raise utils.UserError(f"{name} {utils.escape(folder)}: is a file: give a folder")
        if folder and kind == "folder" and folder.resolve().is_relative_to(source.resolve()):
            raise utils.UserError(f"{name} {utils.escape(folder)}: lies in the source: choose a folder outside it")
    if output and output.exists():
        utils.warn(
            f"{utils.escape(output)}: {'files of the same names in it are' if kind == 'folder' else 'is'} replaced"
        )


def import_cv2():
    """Import OpenCV, silent, once. Returns the module; raises UserError where it cannot do what is needed."""
    for name in ("OPENCV_LOG_LEVEL=SILENT", "OPENCV_FFMPEG_LOGLEVEL=-8", "QT_LOGGING_RULES=*=false",
                 "OPENCV_VIDEOIO_MSMF_ENABLE_HW_TRANSFORMS=0"):  # fmt: skip
        os.environ.setdefault(*name.split("=", 1))
    try:
        import cv2
    except ImportError as error:
        raise utils.UserError(f"{error}: run `pip install -r requirements.txt`, or opencv-python-headless<5") from None
    if not hasattr(cv2, "CascadeClassifier"):
        raise utils.UserError(f'OpenCV {cv2.__version__} has no face detector: run `pip install "opencv-python<5"`')
    return cv2


def prepare(args, kind):
    """Load detector and model. Returns the state that the functions below share."""
    state = SimpleNamespace(
        args=args, kind=kind, model=None, labels=[], threshold=0, picture=None, shape=None, frames=0, tagged=0, fps=0,
        tracks=[], following=0, scanned=-SCAN_EVERY, spare=collections.deque(maxlen=4), window=False, write=None,
        paused=False, shown=collections.deque(maxlen=30), first=0, counts=collections.Counter(),
        started=datetime.datetime.now().strftime("%Y%m%d-%H%M%S"),
        times={name: collections.deque(maxlen=10**5) for name in ("detection", "classification", "label age")},
    )  # fmt: skip
    state.cascade = None if args.whole_picture else load_cascade()
    if args.model:
        model, info = utils.load_model(args.model)
        state.model, state.labels, state.side = utils.compiled(model), info["labels"], info["image_size"]
        state.threshold = info["threshold"] if args.threshold is None else args.threshold
        for n in (1, 2):  # graphs for one face and for several are made before the first frame
            state.model.predict_on_batch(np.zeros((n, state.side, state.side, 3), "uint8"))
    state.folders = utils.folder_names([*state.labels, "unknown"])
    return state


def load_cascade():
    """Load the face detector from the current folder, else from beside this script. Raises UserError."""
    import cv2

    paths = [path for path in (Path(CASCADE), Path(__file__).with_name(CASCADE)) if path.is_file()]
    cascade = cv2.CascadeClassifier()
    with contextlib.suppress(cv2.error, SystemError, IndexError):
        cascade.load(str(paths[0]))
    if cascade.empty():
        raise utils.UserError(f"{CASCADE}: missing or damaged: copy it from the kit to beside webcam.py")
    return cascade


# ---------------------------------------------------------------- frame → boxes → tracks


def shrink(frame, smallest):
    """Return the grey picture to search, uint8 (h, w), and its scale: faces of `smallest` px get DETECT_FACE px."""
    import cv2

    scale = min(1.0, DETECT_FACE / smallest)
    if scale < 1:
        size = [max(1, round(n * scale)) for n in frame.shape[1::-1]]
        frame = cv2.resize(frame, size, interpolation=cv2.INTER_AREA)
    return cv2.cvtColor(frame, cv2.COLOR_BGR2GRAY), scale


def find(state, grey, scale, low, high=0.0, corner=(0, 0)):
    """Find faces of `low` to `high` source pixels (0: any) in a grey picture whose corner lies at `corner` in it.

    Returns [(box in source pixels, overlapping finds)]: how sure the cascade is.
    """
    sizes = [(round(side * scale),) * 2 for side in (low, high)]
    if min(grey.shape) < 24:
        return []
    boxes, counts = state.cascade.detectMultiScale2(grey, FACTOR, OLD_NEIGHBOURS, minSize=sizes[0], maxSize=sizes[1])
    return [
        (tuple(round((float(v) + c) / scale) for v, c in zip(box, (*corner, 0, 0))), int(count))
        for box, count in zip(boxes, counts)
    ]


def find_twice(state, grey, scale):
    """Find faces as `find` does, the finds being the mean of a picture and its mirror image.

    A picture is seen only once, and what is no face is seldom taken for one both ways round.
    """
    found = find(state, grey, scale, state.smallest)
    width = round(grey.shape[1] / scale)
    mirrored = find(state, np.ascontiguousarray(grey[:, ::-1]), scale, state.smallest)
    back = [((width - x - w, y, w, h), count) for (x, y, w, h), count in mirrored]
    same = [max((count for other, count in back if overlap(box, other) > 0.4), default=0) for box, _ in found]
    return [(box, (count + more) / 2) for (box, count), more in zip(found, same)]


def look_around(state, grey, scale, box):
    """Search the surroundings of a known box (source pixels) for faces of about its size, as `find` does."""
    x, y, w, h = (v * scale for v in box)
    left, top = max(0, round(x - w / 2)), max(0, round(y - h / 2))
    part = grey[top : round(y + 1.5 * h), left : round(x + 1.5 * w)]
    return find(state, part, scale, 0.75 * box[2], 1.35 * box[2], (left, top))


def overlap(a, b):
    """Return intersection over union of two boxes (x, y, w, h)."""
    wide = min(a[0] + a[2], b[0] + b[2]) - max(a[0], b[0])
    high = min(a[1] + a[3], b[1] + b[3]) - max(a[1], b[1])
    both = max(0, wide) * max(0, high)
    return both / (a[2] * a[3] + b[2] * b[3] - both)


def follow(state, frame, number):
    """Find the faces of a frame and link them to the tracks: now all over the picture, now only around known ones.

    frame: uint8 BGR (h, w, 3). Updates state.tracks; those not found for HOLD frames end.
    """
    grey, scale = shrink(frame, state.smallest)
    scan = number - state.scanned >= SCAN_EVERY or not 0 < len(state.tracks) <= FEW_TRACKS
    if scan:
        state.scanned = number
        found = find_twice(state, grey, scale) if state.picture else find(state, grey, scale, state.smallest)
    else:
        found = [hit for track in state.tracks for hit in look_around(state, grey, scale, track.box)]
    if not state.tagged and not state.frames & (state.frames - 1):  # frames 0, 1, 2, 4, 8…
        state.spare.append(shrink(frame, frame.shape[0] / 20))  # for what the summary says about smaller faces
    for t, b in link([track.box for track in state.tracks], [box for box, _ in found]).items():
        track, (box, count) = state.tracks[t], found[b]
        calm = overlap(box, track.box) > CALM
        track.box = tuple(round((a + b) / 2) for a, b in zip(box, track.box)) if calm else box
        track.seen = number
        track.sure = number if count >= NEW_NEIGHBOURS else track.sure
    for box, count in sorted(found) if scan else []:
        if count >= NEW_NEIGHBOURS and all(overlap(box, track.box) < OVERLAP for track in state.tracks):
            state.tracks.append(Track(state.following, box, number, number))
            state.following += 1
    state.tracks = [t for t in state.tracks if number - t.seen <= HOLD and number - t.sure <= DOUBT]


def link(old, new):
    """Match boxes of two frames so that the sum of overlaps is largest. Returns {index in old: index in new}."""
    from scipy.optimize import linear_sum_assignment

    if not old or not new:
        return {}
    overlaps = np.array([[overlap(a, b) for b in new] for a in old])
    return {int(i): int(j) for i, j in zip(*linear_sum_assignment(-overlaps)) if overlaps[i, j] >= OVERLAP}


# ---------------------------------------------------------------- tracks → labels


def cut(state, frame, box):
    """Cut the square that the network gets around a box; the whole frame with --whole-picture. Returns RGB."""
    if not state.args.whole_picture:
        x, y, w, h = box
        frame = utils.crop_square(frame, x + w / 2, y + h / 2, state.args.context * w)
    return np.ascontiguousarray(frame[..., ::-1])


def classify(state, pictures):
    """Classify a list of RGB PIL images or ready network inputs in one batch. Returns float32 (n, classes).

    The batch is filled up to a power of two: backends that compile for each size do so seldom.
    """
    start = time.perf_counter()
    inputs = np.stack([p if isinstance(p, np.ndarray) else utils.square(p, state.side) for p in pictures])
    least = 2 if state.picture else 1  # a batch of one differs in the last bits from what evaluation computes
    size = max(least, min(MAX_BATCH, 1 << (len(inputs) - 1).bit_length()))
    probabilities = utils.predict(state.model, inputs, size)
    state.times["classification"].append((time.perf_counter() - start) * 1000)
    state.counts["classifications"] += len(inputs)
    return probabilities


def refresh(state, frame, number, moment, most=None, whole=None):
    """Classify at most `most` of the tracks that are new or due, the oldest labels first; name all tracks.

    whole: the network's input, if it is known already.
    """
    due = [t for t in state.tracks if t.seen == number and number - t.classified >= CLASSIFY_EVERY]
    due = sorted(due, key=lambda t: t.classified)[:most] if state.model else []
    pictures = [as_saved(cut(state, frame, t.box)) for t in due] if whole is None else [whole]
    memory = WHOLE_MEMORY if state.args.whole_picture else MEMORY
    for track, p in zip(due, classify(state, pictures) if due else []):
        track.count += 1
        track.mean = p if track.count == 1 else track.mean + (p - track.mean) / min(track.count, memory)
        track.classified, track.moment = number, moment
    name_tracks(state)


def as_saved(crop):
    """Return RGB pixels as the PIL image that a saved crop would be: what is tagged is what may be trained on."""
    file = io.BytesIO()
    utils.save_jpeg(file, crop)
    return utils.open_picture(file.getvalue())


def name_tracks(state):
    """Give tracks their labels: below the threshold `unknown`; the same name twice only in the closed world."""
    taken = set()
    for track in sorted((t for t in state.tracks if t.mean is not None), key=lambda t: -t.mean.max()):
        track.label, track.probability = state.labels[track.mean.argmax()], float(track.mean.max())
        if track.probability < state.threshold or (state.threshold and track.label in taken):
            track.label = "unknown"
        taken.add(track.label)


def handle(state, frame, number, moment, most=None, publish=None, whole=None):
    """Do all that is done with a frame: find, classify, print, keep. frame: uint8 BGR; moment: seconds.

    most: how many faces may be classified (None: all). publish: called as soon as the boxes are known.
    """
    start, (height, width, _) = time.perf_counter(), frame.shape
    if frame.shape != state.shape or state.picture:  # the first frame, another picture, a film that changes its size
        state.shape, state.tracks, state.scanned = frame.shape, [], number - SCAN_EVERY
        state.smallest = state.args.min_face or max(40, height // 8)
    if state.args.whole_picture:
        state.tracks = state.tracks or [Track(0, (0, 0, width, height), number, number)]
        state.tracks[0].seen = number
    else:
        follow(state, frame, number)
        state.times["detection"].append((time.perf_counter() - start) * 1000)
    if publish:
        publish()
    refresh(state, frame, number, moment, most, whole)
    for track in state.tracks:
        print_line(state, number, moment, track)
    if state.args.save_faces:
        keep_faces(state, frame, number, moment)
    state.frames += 1


def print_line(state, number, moment, track):
    """Print one face's line, once it has a label."""
    if track.mean is not None or not state.model:
        state.tagged += 1
        cells = [number, f"{moment:.6f}", track.number, *track.box, track.label, f"{track.probability:.6f}"]
        if state.kind == "folder":
            cells.insert(0, utils.escape(state.picture[0].relative_to(state.args.source).as_posix()))
        utils.say("\t".join(map(str, cells if state.model else [*cells[:-1], ""])))


# ---------------------------------------------------------------- --save-faces


def keep_faces(state, frame, number, moment):
    """Keep the crops worth it: of each track KEPT_A_SECOND; of a picture without a model only one that is alone."""
    if state.picture and not state.model and len(state.tracks) != 1:
        state.counts["pictures with several faces" if state.tracks else "pictures without a face"] += 1
        return
    for track in state.tracks:
        named = track.label or not state.model  # with many faces some still wait for their first label
        if named and track.seen == number and moment - track.kept >= 1 / KEPT_A_SECOND - 1e-6:
            crop = cut(state, frame, track.box)
            reason = reason_against(state, frame, track, crop)
            state.counts[reason or "saved"] += 1
            if not reason:
                track.kept, track.look, track.place = moment, look(crop), track.box
                save_crop(state, crop, number, track)


def look(crop):
    """Return how an RGB crop looks from afar: grey, (LOOK_SIDE, LOOK_SIDE), 0..255."""
    import cv2

    return cv2.resize(crop, (LOOK_SIDE, LOOK_SIDE), interpolation=cv2.INTER_AREA).mean(2)


def reason_against(state, frame, track, crop):
    """Return why a crop is not worth keeping, None if it is. Pictures that are only copied are never refused."""
    import cv2

    if state.picture and state.args.whole_picture:
        return None
    if min(crop.shape[:2]) < SMALL:
        return "too small"
    x, y, w, h = track.box
    face = cv2.cvtColor(frame[max(0, y) : y + h, max(0, x) : x + w], cv2.COLOR_BGR2GRAY)
    face = cv2.resize(face, (FACE_SIDE, FACE_SIDE), interpolation=cv2.INTER_AREA)
    if cv2.Laplacian(face, cv2.CV_64F).var() < BLURRED:
        return "too blurred"
    if track.place:  # also at its old place: a box that moves by a pixel makes no new crop
        looks = [look(crop), look(cut(state, frame, track.place))]
        if min(np.abs(now - track.look).mean() for now in looks) < SIMILAR:
            return "too similar"
    return None


def save_crop(state, crop, number, track):
    """Save RGB pixels as JPEG, or copy the picture they come from with --whole-picture.

    The name ends in a hash of the content, so that no other crop is ever overwritten.
    """
    folder = crop_folder(state, track.label)
    folder.mkdir(parents=True, exist_ok=True)
    path, data = state.picture or (None, None)
    stem = utils.folder_names([path.stem[:40]])[path.stem[:40]] if path else f"{number:06d}"
    copy = path and state.args.whole_picture
    ending = path.suffix.lower() if copy else ".jpg"
    digest = hashlib.sha256(data if copy else crop.tobytes()).hexdigest()[:10]
    with utils.whole_file(folder / f"{stem}-{track.number}-{digest}{ending}") as part:
        if copy:
            part.write_bytes(data)
        else:
            utils.save_jpeg(part, crop)


def crop_folder(state, label):
    """Return the folder for crops: DIR/<label>/<film, camera or stream>-<label>/, without a model DIR/<film…>/."""
    source, folder = state.args.source, state.args.save_faces
    path = Path(source)
    runs = {
        "film": lambda: f"{path.stem[:40]}-{hashlib.sha256(os.fsencode(path.resolve())).hexdigest()[:8]}",
        "camera": lambda: f"camera{source}-{state.started}",
        "stream": lambda: f"stream-{urllib.parse.urlsplit(source).hostname}-{state.started}",
    }
    run = runs[state.kind]() if state.kind in runs else ""
    if state.model:
        folder /= state.folders[label]
        run = run and f"{run}-{state.folders[label]}"
    return folder / utils.folder_names([run])[run] if run else folder


# ---------------------------------------------------------------- drawing


@functools.lru_cache(500)
def plate(text, note, size, colour):
    """Draw text and a paler note on a rounded plate. Returns uint8 BGRA (h, w, 4)."""
    font = ImageFont.truetype(utils.font_file(text), size)
    small = ImageFont.truetype(utils.font_file(note), round(0.8 * size))
    pad, gap = round(0.45 * size), round(0.4 * size) if text and note else 0
    width = round(font.getlength(text) + gap + small.getlength(note)) + 2 * pad
    image = Image.new("RGBA", (width, round(1.5 * size)), (0, 0, 0, 0))
    draw = ImageDraw.Draw(image)
    draw.rounded_rectangle((0, 0, width - 1, image.height - 1), size // 3, colour)
    base = round(1.1 * size)
    draw.text((pad, base), text, "white", font, "ls")
    draw.text((width - pad, base), note, (255, 255, 255, 200), small, "rs")
    return np.asarray(image)[..., [2, 1, 0, 3]]


def stamp(frame, sprite, x, y):
    """Blend a BGRA sprite into a BGR frame with its upper left corner near (x, y), moved inside if need be."""
    (height, width), (h, w) = frame.shape[:2], sprite.shape[:2]
    x, y = max(0, min(x, width - w)), max(0, min(y, height - h))
    part, sprite = frame[y : y + h, x : x + w], sprite[: height - y, : width - x]
    alpha = sprite[..., 3:].astype("uint16")
    part[:] = (sprite[..., :3] * alpha + part * (255 - alpha)) // 255


def draw(state, frame, tracks, moment):
    """Return a copy of a BGR frame with boxes, names, probabilities, and what the corner says."""
    picture, size = frame.copy(), max(12, round(min(frame.shape[:2]) / 26))
    for track in tracks:
        colour, pale = utils.ORANGE if track.label == "unknown" else utils.BLUE
        flash = 0 <= moment - track.kept < FLASH
        if not state.args.whole_picture:
            frame_box(picture, track.box, pale if flash else colour, max(2, size // 7) * (2 if flash else 1))
        if track.label:
            sprite = plate(track.label, f"{track.probability:.0%}", size, colour)
            y = track.box[1] - sprite.shape[0] - size // 4
            stamp(picture, sprite, track.box[0], y if y >= 0 else track.box[1] + track.box[3] + size // 4)
    if len(state.shown) > 1 and not state.picture:
        text = f"{(len(state.shown) - 1) / max(1e-6, state.shown[-1] - state.shown[0]):.0f} fps"
        stamp(picture, plate(text, "", round(0.8 * size), (0, 0, 0, 130)), 10**6, size // 3)
    if state.args.save_faces:
        sprite = plate(f"{state.counts['saved']} kept", "", round(0.8 * size), (0, 0, 0, 130))
        stamp(picture, sprite, 10**6, 2 * size)
    return picture


def frame_box(picture, box, colour, thick):
    """Draw a rectangle with round corners on a BGR picture. colour: "#rrggbb"."""
    import cv2

    bgr = tuple(bytes.fromhex(colour[1:]))[::-1]
    (x, y, w, h), r = box, box[2] // 8
    for (ax, ay), (bx, by) in (((r, 0), (w - r, 0)), ((r, h), (w - r, h)), ((0, r), (0, h - r)), ((w, r), (w, h - r))):
        cv2.line(picture, (x + ax, y + ay), (x + bx, y + by), bgr, thick, cv2.LINE_AA)
    for cx, cy, turn in ((r, r, 180), (w - r, r, 270), (w - r, h - r, 0), (r, h - r, 90)):
        cv2.ellipse(picture, (x + cx, y + cy), (r, r), turn, 0, 90, bgr, thick, cv2.LINE_AA)


# ---------------------------------------------------------------- window and output


def open_window(state):
    """Open the window, or warn and go on without. A child process tries first: Qt ends a process without a display."""
    import cv2

    if state.args.no_display:
        return
    trial = [sys.executable, "-c", "import cv2; cv2.namedWindow('trial'); cv2.waitKey(1)"]
    if subprocess.run(trial, capture_output=True, timeout=60, check=False).returncode:
        utils.warn("no window can be opened (no display, or a headless OpenCV): going on as with --no-display")
        return
    cv2.namedWindow(TITLE, cv2.WINDOW_NORMAL | cv2.WINDOW_KEEPRATIO | cv2.WINDOW_GUI_NORMAL)
    state.window = True


@contextlib.contextmanager
def film_output(state):
    """Write what is shown to the film --output, which appears whole at the end: also after Ctrl-C and lost sources."""
    import cv2

    path, stop, film = state.args.output, None, cv2.VideoWriter()

    def write(picture):
        if not film.isOpened():
            state.size, code = picture.shape[1::-1], "mp4v" if path.suffix.lower() == ".mp4" else "MJPG"
            film.open(str(part.resolve()), cv2.VideoWriter.fourcc(*code), state.fps, state.size)
            if not film.isOpened():
                raise utils.UserError(f"--output {utils.escape(path)}: no codec for it here: try .avi")
        film.write(fit(picture, state.size))

    with utils.whole_file(path) as part:
        state.write = write
        try:
            yield
        except (KeyboardInterrupt, utils.UserError, OSError) as error:
            stop = error
        film.release()
        if not cv2.VideoCapture(str(part.resolve()), cv2.CAP_FFMPEG).isOpened():
            raise stop or utils.UserError(f"--output {utils.escape(path)}: could not be written: check the free space")
    if stop:
        raise stop


def fit(picture, size):
    """Fit a BGR picture into a film's size (w, h), black around it where the shape differs."""
    import cv2

    if picture.shape[1::-1] == size:
        return picture
    scale = min(size[0] / picture.shape[1], size[1] / picture.shape[0])
    small = cv2.resize(picture, [max(1, int(n * scale)) for n in picture.shape[1::-1]], interpolation=cv2.INTER_AREA)
    top, left = (size[1] - small.shape[0]) // 2, (size[0] - small.shape[1]) // 2
    bottom, right = size[1] - small.shape[0] - top, size[0] - small.shape[1] - left
    return cv2.copyMakeBorder(small, top, bottom, left, right, cv2.BORDER_CONSTANT)


def present(state, frame, tracks, moment, wait=0.0):
    """Show and write one frame; wait: seconds until the next. Returns True if the user wants to end."""
    now = time.monotonic()
    state.first = state.first or now
    state.shown.append(now)
    state.counts["shown"] += 1
    if state.model and not state.picture:
        state.times["label age"] += [moment - track.moment for track in tracks if track.mean is not None]
    if state.window or state.write:
        picture = draw(state, frame, tracks, moment)
    if state.write and state.kind in ("camera", "stream"):  # the film runs as fast as the camera did
        due = round(moment * state.fps) - state.counts["written"]
        for _ in range(min(due, LIVE_FPS)):
            state.write(picture)
        state.counts["written"] += due
    elif state.write:
        state.write(picture)
    return state.window and show(state, picture, wait)


def show(state, picture, wait):
    """Show a picture and obey the keys pressed, for `wait` seconds, and while it is paused. Returns True to end."""
    import cv2

    if state.counts["shown"] == 1:
        scale = min(1, *(most / side for most, side in zip(WINDOW, picture.shape[1::-1])))
        cv2.resizeWindow(TITLE, *(round(scale * side) for side in picture.shape[1::-1]))
    cv2.imshow(TITLE, picture)
    while True:
        key = cv2.waitKey(50 if state.paused else max(1, round(1000 * wait))) & 0xFF
        if key in (ord("q"), 27) or not window_open():
            return True
        if key == ord("s"):
            path = Path(f"snapshot-{datetime.datetime.now():%Y%m%d-%H%M%S-%f}.png")
            write_picture(path, picture)
            print(f"snapshot: {path}", file=sys.stderr, flush=True)
        state.paused ^= key == ord(" ")
        if not state.paused:
            return False


def window_open():
    """Say whether the window is still there."""
    import cv2

    try:
        return cv2.getWindowProperty(TITLE, cv2.WND_PROP_VISIBLE) >= 1
    except cv2.error:  # what Qt's part of OpenCV answers about a window that was closed
        return False


def write_picture(path, picture):
    """Write a BGR picture as PNG or JPEG, whole or not at all."""
    with utils.whole_file(path) as part:
        if path.suffix.lower() == ".png":
            Image.fromarray(picture[..., ::-1]).save(part)
        else:
            utils.save_jpeg(part, np.ascontiguousarray(picture[..., ::-1]))


# ---------------------------------------------------------------- films and pictures


def tag_film(state):
    """Handle a film frame by frame, in order, nothing dropped, so that two runs print the same lines."""
    import cv2

    path = Path(state.args.source).resolve()  # absolute: ffmpeg would take some names for protocols
    capture = cv2.VideoCapture(str(path), cv2.CAP_FFMPEG)
    rate = capture.get(cv2.CAP_PROP_FPS)
    state.fps = rate if 1 <= rate <= 240 else 25
    number, start = 0, time.monotonic()
    while True:
        good, frame = capture.read()
        if not good:
            break
        moment = max(0.0, capture.get(cv2.CAP_PROP_POS_MSEC) / 1000)
        handle(state, frame, number, moment)
        if present(state, frame, state.tracks, moment, start + moment - time.monotonic()):
            break
        number += 1
    if not state.frames:
        raise utils.UserError(
            f"--source {utils.escape(state.args.source)}: no frame can be read: give another film or picture"
        )


def tag_pictures(state):
    """Handle a picture or a folder of pictures: no tracks and no running mean. Broken ones are warned about."""
    source = Path(state.args.source)
    files = utils.list_files(source) if state.kind == "folder" else [source]
    loaded = utils.in_order(functools.partial(load_picture, state), files, min(4, utils.cores()))
    for (data, pixels, whole), path in zip(utils.progress(loaded, len(files), "pictures"), files):
        if pixels is None:
            utils.warn(f"{utils.escape(path)}: skipped: {whole}")
            continue
        state.picture, state.following = (path, data), 0
        handle(state, pixels, state.frames, 0.0, whole=whole)
        state.write = functools.partial(write_picture, picture_output(state, path)) if state.args.output else None
        state.paused = state.kind == "picture"  # a single one stays until a key is pressed
        if present(state, pixels, state.tracks, 0.0):
            break
    if not state.frames:
        raise utils.UserError(f"--source {utils.escape(source)}: no picture in it can be read: give another one")


def load_picture(state, path):
    """Read a picture in full, upright. Returns (bytes, BGR pixels, network input or None) or (None, None, reason)."""
    try:
        data = path.read_bytes()
        pixels = np.ascontiguousarray(np.asarray(utils.upright(utils.open_picture(data)))[..., ::-1])
        wanted = state.model and state.args.whole_picture
        return data, pixels, utils.square(utils.open_picture(data), state.side) if wanted else None
    except OSError as error:
        return None, None, error.strerror or str(error)
    except utils.PictureError as reason:
        return None, None, str(reason)


def picture_output(state, path):
    """Return where a tagged picture goes: --output itself, or the same place below it."""
    if state.kind == "picture":
        return state.args.output
    inner = path.relative_to(state.args.source)
    if inner.suffix.lower() not in (".png", ".jpg", ".jpeg"):
        inner = inner.with_name(inner.name + ".jpg")
    target = state.args.output / inner
    target.parent.mkdir(parents=True, exist_ok=True)
    return target


# ---------------------------------------------------------------- cameras and streams


def open_live(state):
    """Open a camera or stream. Returns a capture, which may not be open."""
    import cv2

    if state.kind == "camera":
        return cv2.VideoCapture(int(state.args.source))
    limits = [cv2.CAP_PROP_OPEN_TIMEOUT_MSEC, 10_000, cv2.CAP_PROP_READ_TIMEOUT_MSEC, 5_000]
    return cv2.VideoCapture(state.args.source, cv2.CAP_FFMPEG, limits)


def live_frames(state, capture, stop):
    """Yield the frames of a camera or stream, uint8 BGR, until `stop` is set or a served film ends.

    A lost one is tried again after each of PAUSES. Raises UserError where none comes (back).
    """
    import cv2

    count, tries, last = 0, 0, time.monotonic()
    while not stop.is_set():
        good, frame = capture.read()
        if good and frame is not None and frame.size:
            count, tries, last = count + 1, 0, time.monotonic()
            yield frame
        elif 0 < capture.get(cv2.CAP_PROP_FRAME_COUNT) <= count:
            return
        elif capture.isOpened() and time.monotonic() - last < EMPTY:
            stop.wait(0.02)
        elif tries == len(PAUSES) or not count:
            raise utils.UserError(lost(state, count))
        else:
            utils.warn(f"{source_name(state)}: lost: trying again in {PAUSES[tries]} s")
            capture.release()
            stop.wait(PAUSES[tries])
            capture, tries, last = open_live(state), tries + 1, time.monotonic()


def lost(state, count):
    """Return what to say about a camera or stream that gives no picture (any more)."""
    if count:
        return f"{source_name(state)}: lost, and {len(PAUSES)} tries did not bring it back: check it and start again"
    if state.kind == "stream":
        return f"{source_name(state)}: no picture comes from there: check address, user and password"
    return (
        f"{source_name(state)}: no picture comes from it: is it connected, used by another program, or forbidden to "
        "this one by the system's privacy settings? Else give another --source"
    )


def source_name(state):
    """Return what messages call a camera or stream: never its user, password or query."""
    if state.kind == "camera":
        return f"camera {state.args.source}"
    parts = urllib.parse.urlsplit(state.args.source)
    return utils.escape(f"{parts.scheme}://{parts.hostname}")


def read_live(state, live, capture):
    """Thread: keep only the newest frame."""
    try:
        for frame in live_frames(state, capture or open_live(state), live.stop):
            with live.changed:
                live.newest = (live.newest[0] + 1, time.monotonic() - live.start, frame)
                live.changed.notify_all()
    except BaseException as error:  # the main thread tells it
        live.error = error
    live.ended = True


def work_live(state, live):
    """Thread: handle the newest frame, again and again."""

    def publish():
        live.tracks = [replace(track) for track in state.tracks if track.mean is not None or not state.model]

    try:
        for number, moment, frame in newest_frames(live):
            if not state.paused:
                handle(state, frame, number, moment, MAX_BATCH, publish)
                publish()
    except BaseException as error:
        live.error = error


def newest_frames(live):
    """Yield (number, seconds, frame), each time the newest one, until the source ends."""
    done = -1
    while not (live.error or live.stop.is_set()):
        with live.changed:
            if live.newest[0] == done:
                if live.ended:
                    return
                live.changed.wait(0.1)
            newest = live.newest
        if newest[0] > done:
            done = newest[0]
            yield newest


def tag_live(state):
    """Tag a camera or stream: reading, tagging and showing do not wait for each other."""
    live = SimpleNamespace(newest=(-1, 0.0, None), tracks=[], error=None, ended=False, start=time.monotonic())
    live.changed, live.stop, state.fps = threading.Condition(), threading.Event(), LIVE_FPS
    capture = open_live(state) if state.kind == "camera" else None  # macOS asks for permission in the main thread only
    threads = [threading.Thread(target=read_live, args=(state, live, capture), daemon=True)]
    threads.append(threading.Thread(target=work_live, args=(state, live), daemon=True))
    try:
        for thread in threads:
            thread.start()
        for _, _, frame in newest_frames(live):
            if present(state, frame, live.tracks, time.monotonic() - live.start):
                break
        if live.error:
            raise live.error
    finally:
        live.stop.set()
        for thread in threads:
            thread.join(0.4)


# ---------------------------------------------------------------- the end


def summarise(state):
    """Print on stderr how it went: speed, what was kept, and what to do where nothing was found."""
    rate = max(0, state.counts["shown"] - 1) / max(1e-6, (state.shown or [0])[-1] - state.first)
    parts = [f"{state.frames} frames, {rate:.1f} a second shown, {state.counts['classifications']} classifications"]
    for key, unit, digits in (("detection", "ms", 1), ("classification", "ms", 1), ("label age", "s", 2)):
        if state.times[key]:
            parts.append(f"{key} {np.median(state.times[key]):.{digits}f} {unit}")
    lines = ["; median ".join(parts)]
    if not state.tagged and not state.args.whole_picture:
        lines.append(smaller_face(state))
    if state.args.save_faces:
        counts = dict.fromkeys(("too blurred", "too similar", "too small"), 0) | state.counts
        left_out = [f"{n} {reason}" for reason, n in counts.items() if reason.startswith(("too", "pictures"))]
        lines.append(f"{counts.get('saved', 0)} saved in {utils.escape(state.args.save_faces)}; {', '.join(left_out)}")
        lines.append(next_command(state))
    print(*lines, sep="\n", file=sys.stderr)


def smaller_face(state):
    """Search the spare frames for faces of any size; return what to say about the smallest one."""
    found = [hit for grey, scale in state.spare for hit in find(state, grey, scale, 24 / scale)]
    sides = [box[2] for box, count in found if count >= NEW_NEIGHBOURS]
    text = f"nothing was tagged: no face of {state.smallest} px or larger was found"
    if not sides:
        return f"{text}, and no smaller one"
    return f"{text}; the smallest there has {min(sides)} px: --min-face {max(24, int(0.9 * min(sides)))} would find it"


def next_command(state):
    """Return the command that goes on from the crops: collect another class, or train."""
    folder = state.args.save_faces
    data = folder if state.model else folder.parent
    classes = [p for p in data.iterdir() if p.is_dir() and not utils.is_ignored(p.name)] if data.is_dir() else []
    if len(classes) < 2 and not state.model:
        return f"next: python webcam.py --save-faces {shlex.quote(utils.escape(data / 'ANOTHER_NAME'))}"
    return f"next: python train.py {shlex.quote(utils.escape(data))} model"


def main():
    args = parse_arguments()
    kind = source_kind(args.source)
    check_outputs(args, kind)
    import_cv2()
    state = prepare(args, kind)
    open_window(state)
    tag = {"film": tag_film, "picture": tag_pictures, "folder": tag_pictures}.get(kind, tag_live)
    columns = "frame time track x y w h label probability".split()
    utils.say("\t".join(["file"] * (kind == "folder") + columns))
    film = args.output and kind not in ("picture", "folder")
    try:
        with film_output(state) if film else contextlib.nullcontext():
            tag(state)
    finally:
        if state.frames:
            summarise(state)


if __name__ == "__main__":
    try:
        utils.run(main)
    except SystemExit as end:  # all is written; TensorFlow would take another second to tidy up
        sys.stdout.flush()
        os._exit(end.code)
