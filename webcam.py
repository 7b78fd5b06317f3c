# /// script
# requires-python = ">=3.11,<3.14"
# dependencies = [
#     "tensorflow>=2.21,<2.22",
#     "keras>=3.15.1,<4",
#     "numpy>=2.0",
#     "scipy>=1.14",
#     "pillow>=13.0",
#     "opencv-python>=4.10,<5",
#     "av>=18",
#     "matplotlib>=3.9",
#     "pillow-heif>=1.0",
#     "tqdm>=4.66",
#     "filelock>=3.12",
#     "defusedxml>=0.7",
# ]
# ///
"""Tag faces in front of a camera, or in films, streams and pictures; or collect them.

    python webcam.py model
    python webcam.py model --source party.mp4 --output tagged.mp4
    python webcam.py model --source rtsp://192.168.1.20/live
    python webcam.py model --source photos > names.tsv
    python webcam.py --save-faces people/Ann

`model` is the prefix that train.py was given. Keys: q or Esc ends, s saves a snapshot, space
pauses. Frames go to a Tracker, to a Labeller, and to what prints, saves, shows and writes them.
"""

import utils  # before all else: it says in one line which Python and packages are needed

# isort: split
import films
import imaging
import model
import report

# isort: split
import argparse
import collections
import contextlib
import datetime
import functools
import hashlib
import io
import itertools
import json
import os
import re
import shlex
import subprocess
import sys
import threading
import time
import urllib.parse
import urllib.request
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

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
    advice = 'run `pip install "opencv-python<5"`'
    sys.exit(f"error: OpenCV {cv2.__version__} has no face detector: {advice}")

# ---------------------------------------------------------------- settings

SCALE_FACTOR = 1.2  # between two sizes of the face detector
MIN_NEIGHBORS_START = 6  # overlapping detections that begin a track
MIN_NEIGHBORS_KEEP = 2  # and that keep it going
SCAN_EVERY = 10  # frames between searches of the whole picture while a face is followed
FEW_TRACKS = 6  # with more, searching near each costs more than searching the whole picture
DETECT_FACE = 60  # pixels that the smallest face looked for has in the picture that is searched
MIN_IOU = 0.25  # intersection over union from which on two boxes are one face
SMOOTHING_IOU = 0.75  # above it a face hardly moves: its box is averaged, so that it does not jump
MAX_MISSED = 0.3  # seconds that a face may be hidden before its track ends
MAX_MISSED_ONCE = 0.6  # the same if that was in one frame only: on slow machines these are rare

CLASSIFY_EVERY = 8  # frames between two classifications of a track
AVERAGE_WINDOW = 5  # classifications in the running mean
MAX_BATCH = 8  # faces classified at once
AGREEING = 3  # classifications with one label before --events reports somebody
LEFT_AFTER = 3.0  # seconds out of sight after which somebody has left

FILM_ENDINGS = """
    .mp4 .m4v .mov .qt .avi .divx .mkv .webm .mpg .mpeg .mpe .m1v .m2v .vob .mod .ts .mts .m2ts .tod
    .trp .wmv .asf .flv .f4v .3gp .3g2 .ogv .ogm .rm .rmvb .dv .mxf .nut .mjpeg .mjpg .y4m .h264
    .264 .h265 .265 .hevc .lrv .insv .360 .mp
""".split()
PICTURES = (".png", ".jpg", ".jpeg")
LIVE = ("camera", "stream")
RECONNECT_DELAYS = (1, 2, 4)  # seconds before a lost camera or stream is tried again
READ_TIMEOUT = 2.0  # seconds for which a camera may give no frame, at its start above all
CAMERAS = 5  # numbers tried where the wanted camera does not open
LIVE_FPS = 30  # of the .avi that --output makes of a camera or stream
NO_PICTURE = {  # what to do
    "camera": "is it connected, used by another program, or forbidden by the privacy settings?",
    "stream": "check address, user and password",
}
TITLE = "webcam"
WINDOW = (1280, 800)  # largest size in which the window opens

KEPT_A_SECOND = 5  # crops kept of each track
MIN_CROP = 75  # pixels: the smallest network takes so many
SHARP_SIDE = 64  # pixels to which a face is brought before its sharpness is measured
MIN_SHARPNESS = 50.0  # variance of the Laplacian: sharp faces have 90 or more, blurred ones 25
THUMBNAIL = 32  # pixels at which crops are compared
MIN_DIFFERENCE = 2.5  # mean difference of grey levels between two crops kept


@dataclass
class Frame:
    """One frame of a source, or one picture."""

    index: int  # 0, 1, …; on a camera those that came too fast are left out
    timestamp: float  # seconds from the start
    image: np.ndarray  # uint8 RGB (height, width, 3), upright, of square pixels
    path: Path | None = None  # of a picture's file
    files: dict = field(default_factory=dict)  # {box: bytes of a JPEG file}

    def crop_face(self, box, context):
        """Return the square of `context` boxes around a face; None: the whole frame."""
        if not context:
            return self.image
        x, y, w, h = box
        side = min(context * w, imaging.MAX_PIXELS**0.5 - 1)  # so that it can be read again
        return imaging.crop_square(self.image, x + w / 2, y + h / 2, side)

    def encode_crop(self, box, context):
        """Return the crop as the bytes of a JPEG file; of a whole picture its own file."""
        if self.path and not context:
            return self.path.read_bytes()
        if box not in self.files:  # to be classified and saved
            file = io.BytesIO()
            imaging.save_jpeg(file, self.crop_face(box, context))
            self.files[box] = file.getvalue()
        return self.files[box]


@dataclass(eq=False)
class Track:
    """One face followed from frame to frame."""

    id: int
    box: tuple  # x, y, width, height in pixels of the source
    seen: float  # timestamp of the frame in which it was found last
    since: float  # timestamp of the first one, or when somebody lost for a moment appeared
    mean: np.ndarray | float = 0.0  # running mean of its probabilities, (classes,)
    classifications: int = 0
    agreeing: int = 0  # classifications since its label changed
    classified: int = -(10**9)  # index of the frame classified last
    classified_at: float = 0.0  # and its timestamp
    label: str = ""
    best: str = ""  # the most probable class
    probability: float = float("nan")  # of that class
    kept_at: float = -(10.0**9)  # timestamp of the crop kept last
    kept: tuple = ()  # and its thumbnail and box
    reported: tuple = ()  # label and probability that --events told


# ---------------------------------------------------------------- arguments


def parse_arguments(argv=None):
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description="Tag faces live, in films, streams and pictures; or collect them as a training "
        "set. Keys: q or Esc ends, s saves a snapshot, space pauses.",
        epilog="example: python webcam.py model --source party.mp4 --output tagged.mp4",
    )
    option = parser.add_argument
    option("model", nargs="?",
           help="prefix of a trained model (default: none, with --save-faces only)")  # fmt: skip
    option("--source", default="0", metavar="S", help="camera number, film, stream address, "
           "picture or folder of films and pictures (default: %(default)s)")  # fmt: skip
    option("--output", type=Path, metavar="FILE", help="write what is shown: .mp4 or .avi; "
           ".png or .jpg; a folder for a folder (default: none)")  # fmt: skip
    option("--no-display", action="store_true", help="open no window (default: off)")
    option("--threshold", type=utils.number(float, 0, 1), metavar="P", help="a less probable face "
           "is unknown; 0: everybody gets a name (default: the model's own)")  # fmt: skip
    option("--min-face", type=utils.number(int, 24, 10**5), metavar="PX", help="smallest face "
           "looked for (default: an eighth of the picture's height, at least 40)")  # fmt: skip
    option("--context", type=utils.number(float, 0.5, 10), default=2.0, metavar="F", help="side of "
           "the square given to the model, in face boxes (default: %(default)s)")  # fmt: skip
    what = parser.add_mutually_exclusive_group().add_argument
    what("--whole-picture", action="store_true", default=None,
         help="classify whole pictures (default: as the model was trained)")  # fmt: skip
    what("--faces", action="store_false", dest="whole_picture",
         help="look for faces (default: as the model was trained)")  # fmt: skip
    option("--events", action="store_true", help="cameras, streams, films: print a JSON line when "
           "somebody appeared or left, not one a frame (default: off)")  # fmt: skip
    option("--save-faces", type=Path, metavar="DIR", help="keep the crops: in DIR/<label>/ with a "
           "model, in DIR/ without (default: none)")  # fmt: skip
    option("--by-name", action="store_true", help="with --save-faces, without a model: cut out the "
           "faces that a photo program has named, into DIR/<name>/ (default: off)")  # fmt: skip
    args, others = parser.parse_known_args(argv)
    if others:  # of a shell's star, say
        names = utils.escape(" ".join(others))
        parser.error(
            f"unrecognized arguments: {names} (--source takes one film, picture or folder)"
        )
    if not (args.model or args.save_faces):
        parser.error("give the prefix of a model, or --save-faces DIR")
    shown = args.model or args.output or args.events or args.whole_picture is not None
    if args.by_name and (shown or not args.save_faces):
        parser.error("--by-name goes with --save-faces DIR and --source FOLDER only")
    return args


@dataclass
class Source:
    """What --source names."""

    kind: str  # camera, stream, folder, film or picture
    name: str  # number, address or path
    title: str = ""  # what messages call it, never with a password
    files: list = ()  # paths
    films: set = ()  # those of them that are films

    def shown(self, path):
        """Return the name that lines and events give to one of the files."""
        folder = self.kind == "folder"
        return utils.escape(path.relative_to(self.name).as_posix() if folder else path)


def find_source(text):
    """Return the Source that was typed. Raises UserError if there is nothing."""
    if not text:  # an unset variable of a shell; as a path it would be the current folder
        raise utils.UserError("--source is empty: give a camera number, file, folder or address")
    if text.startswith("file:///"):
        text = urllib.request.url2pathname(urllib.parse.urlsplit(text).path)
    if "://" in text:
        return Source("stream", text, f"stream {host_of(text)}")
    for name in (text, os.path.realpath(text)):  # /dev/v4l/by-id/… leads to /dev/video0
        if number := re.fullmatch(r"(?:/dev/video)?([0-9]{1,5})", name):
            return Source("camera", number[1], f"camera {number[1]}")
    path, title = Path(text), f"--source {utils.escape(text)}"
    if path.is_dir():
        files = utils.list_files(path)
        named_so = {file for file in files if file.suffix.lower() in FILM_ENDINGS}
        return Source("folder", text, title, files, named_so)
    if is_film(path):
        return Source("film", text, title, [path], {path})
    return Source("picture", text, title, [path])


def host_of(address):
    """Return the host of a stream, `here` where it is sent to this machine.

    Raises UserError where there is none. The address may hold a password: it is never shown.
    """
    with contextlib.suppress(ValueError):
        parts = urllib.parse.urlsplit(address)
        if parts.hostname or parts.port:
            return utils.escape(parts.hostname or "here")
    scheme = utils.escape(address.partition("://")[0])
    example = "give one like rtsp://192.168.1.20/live"
    raise utils.UserError(f"--source {scheme}://…: no address: {example}")


def is_film(path):
    """Say whether a file is a film or else a picture. Raises UserError if it can be neither."""
    reason = "no such file"
    try:
        if path.is_file():
            data, image = imaging.read_picture(path)
            if image.format == "JPEG":  # several in a row are a film, raw MJPEG
                seam = b"\xff\xd9\xff\xd8\xff"
                last = data[data.rfind(seam) + 2 :]  # of a photo it is a map of depths, say
                return data.count(seam) > 1 and imaging.open_picture(last).size == image.size
            return image.format in ("GIF", "PNG") and imaging.is_animated(image)
    except imaging.RefusedError as error:  # FFmpeg would read some of these
        reason = error
    except imaging.PictureError:
        return True
    raise utils.UserError(
        f"--source {utils.escape(path)}: {reason}: give a camera number, file, folder or address"
    )


def check_arguments(args, source):
    """Check all that can be checked before any work, and settle what is left to the model."""
    if args.by_name and source.kind != "folder":
        raise utils.UsageError(f"{source.title}: --by-name takes a folder")
    for option, path in (("--output", args.output), ("--save-faces", args.save_faces)):
        if path:
            check_output(option, path, source)
    if args.events and not source.films and source.kind not in LIVE:
        raise utils.UserError("--events: there is no film in the source: leave it out")
    if args.model:
        args.model = re.sub(r"(\.h5|(-labels)?\.json)$", "", args.model)
        info = model.check_model(args.model)
        if args.whole_picture is None:  # as the model was trained
            args.whole_picture = not model.looks_at_faces(info)
        if args.threshold is None:
            args.threshold = info["threshold"]
    if args.whole_picture:
        args.context = None
    else:
        imaging.load_cascade()  # is it there?


def check_output(option, path, source):
    """Raise UserError where --output or --save-faces cannot be; warn where a file is replaced."""
    kind, problem, what = source.kind, None, "is"
    endings = PICTURES if kind == "picture" else films.CODECS
    if kind not in LIVE and utils.is_inside(path, Path(source.name)):
        problem = "is or lies in the source: choose another place"
    elif kind == "folder" or option == "--save-faces":
        what = "files of the same names in it are"
        if path.is_file():
            problem = "is a file: give a folder"
    elif path.suffix.lower() not in endings:
        problem = f"cannot hold what a {kind} gives: give a name with {' or '.join(endings)}"
    elif path.is_dir() or not path.parent.is_dir():
        problem = "is a folder, or lies in none: choose another place"
    if problem:
        raise utils.UserError(f"{option} {utils.escape(path)}: {problem}")
    if option == "--output" and path.exists():
        utils.warn(f"{utils.escape(path)}: {what} replaced")


# ---------------------------------------------------------------- films and pictures → frames


def load_picture(path):
    """Read a picture in full, upright. Returns its Frame; the PictureError if it is broken."""
    try:
        _, image = imaging.read_picture(path)
        if imaging.is_animated(image):
            utils.warn(f"{utils.escape(path)}: only the first of its frames is used")
        return Frame(0, 0.0, np.asarray(imaging.upright(image)), path)
    except imaging.PictureError as error:
        return error


# ---------------------------------------------------------------- cameras and streams → frames


def live_frames(source, stop, opened=None):
    """Yield the Frames of a camera or stream as they come; a served film ends.

    stop: an event, everything is to end. opened: what `open_live` gave. A lost source is tried
    again after each of RECONNECT_DELAYS. Raises UserError where none comes (back).
    """
    index, start, tries = 0, None, 0
    while True:
        images, ends = opened or open_live(source)
        opened = None
        for image in itertools.takewhile(lambda _: not stop.is_set(), images):
            now, tries = time.monotonic(), 0
            start = start or now
            yield Frame(index, now - start, image)
            index += 1
        if stop.is_set() or (ends and index):
            return
        if not index:
            others = other_cameras(source.name) if source.kind == "camera" else ""
            problem = f"no picture comes from it{others}: {NO_PICTURE[source.kind]}"
        elif tries == len(RECONNECT_DELAYS):
            problem = f"lost, and {tries} tries did not bring it back: check it"
        else:
            utils.warn(f"{source.title}: lost: trying again in {RECONNECT_DELAYS[tries]} s")
            stop.wait(RECONNECT_DELAYS[tries])
            tries += 1
            continue
        raise utils.UserError(f"{source.title}: {problem}")


def open_live(source):
    """Return a generator of a camera's or stream's images, and whether it is a film, which ends."""
    if source.kind == "camera":
        capture = cv2.VideoCapture(int(source.name))
        return camera_images(capture), capture.get(cv2.CAP_PROP_FRAME_COUNT) > 0
    try:
        film = films.Film(source.name, source.title, live=True)
    except imaging.PictureError:
        return (), False
    return stream_images(film), film.is_finite()


def stream_images(film):
    """Yield the images of a stream; a film comes faster than it plays and has to wait."""
    clock = PlaybackClock()
    with contextlib.suppress(imaging.PictureError):
        for timestamp, image in film.frames():
            if film.is_finite():
                time.sleep(clock.seconds_until(timestamp))
            yield image


def camera_images(capture):
    """Yield the images of an OpenCV capture until it gives none for READ_TIMEOUT seconds."""
    last = time.monotonic()
    try:
        while True:
            good, image = capture.read()
            if good:
                yield cv2.cvtColor(image, cv2.COLOR_BGR2RGB)
                last = time.monotonic()
            elif not capture.isOpened() or time.monotonic() - last > READ_TIMEOUT:
                return
            else:
                time.sleep(0.02)
    finally:
        capture.release()


def other_cameras(number):
    """Return words that name the cameras that do open."""
    others = {str(n) for n in range(CAMERAS)} - {number}
    found = [n for n in sorted(others) if cv2.VideoCapture(int(n)).isOpened()]
    return f" ({', '.join(found)} can be opened)" if found else ""


def newest_frames(newest, stop, threads, wait=time.sleep):
    """Yield the newest Frame, again and again, until one of the threads ends, or all is to.

    newest: [the last one that came]; threads: futures. wait: called with some seconds while there
    is no new one.
    """
    done = None
    while not stop.is_set():
        ended = any(thread.done() for thread in threads)
        frame = newest[-1]  # looked at last: it may have come before the end
        if frame is not done:
            done = frame
            yield frame
        elif ended:
            return
        else:
            wait(0.005)


# ---------------------------------------------------------------- frames → boxes → tracks


def shrink(image, smallest):
    """Return the grey picture to search and its scale: `smallest` px become DETECT_FACE px."""
    scale = min(1.0, DETECT_FACE / smallest)
    size = [max(1, round(n * scale)) for n in image.shape[1::-1]]
    small = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
    return cv2.cvtColor(small, cv2.COLOR_RGB2GRAY), scale


def detect(grey, scale, smallest, largest=0):
    """Find faces of `smallest` to `largest` (0: any) source pixels in a grey picture.

    Returns [(box in source pixels, neighbors)]; the neighbors say how sure the cascade is.
    """
    if min(grey.shape) < 24:
        return []
    least, most = ((round(side * scale),) * 2 for side in (smallest, largest))
    boxes, neighbors = imaging.load_cascade().detectMultiScale2(
        grey, SCALE_FACTOR, MIN_NEIGHBORS_KEEP, minSize=least, maxSize=most
    )
    return [(tuple(round(v / scale) for v in box), int(n)) for box, n in zip(boxes, neighbors)]


def detect_with_flip(grey, scale, smallest):
    """Find faces as `detect` does, with the mean neighbors of a picture and its mirror image.

    A picture is seen only once, and what is no face is seldom taken for one both ways round: of 448
    flowers 7 instead of 11 show a "face", at the same recall (0.937 and 0.934 of the heads in
    single frames of 14 films).
    """
    width, found = round(grey.shape[1] / scale), []
    mirrored = detect(cv2.flip(grey, 1), scale, smallest)
    for (x, y, w, h), n in detect(grey, scale, smallest):
        twin = width - x - w, y, w, h
        others = [m for other, m in mirrored if iou(twin, other) > MIN_IOU]
        found.append(((x, y, w, h), (n + max(others, default=0)) / 2))
    return found


def detect_near(grey, scale, box):
    """Find faces around a known box (source pixels) of about its size, as `detect` does."""
    x, y, w, h = (v * scale for v in box)
    left, top = max(0, round(x - w / 2)), max(0, round(y - h / 2))
    part = grey[top : round(y + 1.5 * h), left : round(x + 1.5 * w)]
    right, down = round(left / scale), round(top / scale)
    found = detect(part, scale, 0.75 * box[2], 1.35 * box[2])
    return [((x + right, y + down, w, h), n) for (x, y, w, h), n in found]


def iou(a, b):
    """Return intersection over union of two boxes (x, y, w, h)."""
    width, height = (min(a[i] + a[i + 2], b[i] + b[i + 2]) - max(a[i], b[i]) for i in (0, 1))
    both = max(0, width) * max(0, height)
    return both / (a[2] * a[3] + b[2] * b[3] - both)


def distinct_faces(found):
    """Return [(box, neighbors)] without those that overlap a surer one."""
    found = sorted(found)  # of equally sure ones always the same is kept
    boxes, neighbors = [box for box, _ in found], [n for _, n in found]
    return [found[n] for n in cv2.dnn.NMSBoxes(boxes, neighbors, 0, MIN_IOU)]


def match_boxes(old, new):
    """Match boxes of two frames so that the sum of IoUs is largest. Returns {index: new index}."""
    from scipy.optimize import linear_sum_assignment

    if not old or not new:
        return {}
    ious = np.array([[iou(a, b) for b in new] for a in old])
    pairs = zip(*linear_sum_assignment(-ious))
    return {i: j for i, j in pairs if ious[i, j] >= MIN_IOU}


class Tracker:
    """Follows the faces of one film, camera or stream, or finds those of one picture.

    whole: the whole picture is the only "face".
    """

    def __init__(self, whole=False, min_face=None):
        self.whole, self.min_face = whole, min_face
        self.tracks, self.ids = [], itertools.count()
        self.size = ()  # of the last frame
        self.smallest = 0  # face looked for, pixels
        self.scanned = 0  # index of the frame of which the whole was searched last
        self.previous = 0.0  # timestamp of the last frame

    def update(self, frame):
        """Return the tracks after a Frame."""
        size = frame.image.shape[1::-1]
        if self.size != size:  # the first frame, or a film that changes its size
            self.size, self.tracks = size, []
            self.smallest = self.min_face or max(40, size[1] // 8)
        self.update_tracks(self.detect(frame), frame.timestamp)
        return self.tracks

    def detect(self, frame):
        """Find faces: now all over the picture, now only near the tracks."""
        if self.whole:
            return [((0, 0, *self.size), MIN_NEIGHBORS_START)]
        grey, scale = shrink(frame.image, self.smallest)
        if frame.path:
            found = detect_with_flip(grey, scale, self.smallest)
        elif frame.index - self.scanned >= SCAN_EVERY or not 0 < len(self.tracks) <= FEW_TRACKS:
            found = detect(grey, scale, self.smallest)
            self.scanned = frame.index
        else:
            boxes = [track.box for track in self.tracks]
            found = [face for box in boxes for face in detect_near(grey, scale, box)]
        return distinct_faces(found)

    def update_tracks(self, faces, timestamp):
        """Match faces to the tracks, end those that are lost, and begin new ones."""
        matches = match_boxes([track.box for track in self.tracks], [box for box, _ in faces])
        for old, new in matches.items():
            track, box = self.tracks[old], faces[new][0]
            if iou(box, track.box) > SMOOTHING_IOU:
                box = tuple(round((a + b) / 2) for a, b in zip(box, track.box))
            track.box, track.seen = box, timestamp
        self.tracks = [track for track in self.tracks if not self.is_lost(track, timestamp)]
        for box, neighbors in sorted(faces):
            free = all(iou(box, track.box) < MIN_IOU for track in self.tracks)
            if free and neighbors >= MIN_NEIGHBORS_START:
                self.tracks.append(Track(next(self.ids), box, timestamp, timestamp))
        self.previous = timestamp

    def is_lost(self, track, timestamp):
        """Say whether a track has ended: in seconds, however many frames come."""
        missed_once = track.seen == self.previous
        limit = MAX_MISSED_ONCE if missed_once else MAX_MISSED
        return timestamp - track.seen > limit + 1e-6


# ---------------------------------------------------------------- tracks → labels


class Labeller:
    """The model, and what it says about tracks. Without a model nobody has a label."""

    def __init__(self, args, live):
        self.args, self.live = args, live
        self.network = self.info = None  # Keras model, and what travels with it

    def load(self):
        """Load the model, if there is one."""
        if not self.args.model or self.network:
            return
        self.network, self.info = model.load_model(self.args.model)
        side = self.info["image_size"]
        for n in (1, 2) if self.live else ():  # ready for one face and for several
            model.predict(self.network, np.zeros((n, side, side, 3), "uint8"), n)

    def update(self, frame, tracks):
        """Classify the tracks that are new or due, and label all. Returns how many were due."""
        seen = [track for track in tracks if track.seen == frame.timestamp]
        due = [track for track in seen if frame.index - track.classified >= CLASSIFY_EVERY]
        if due and self.network:
            self.classify(frame, due)
            assign_labels(tracks, self.info["labels"], self.args.threshold)
        for track in due:
            track.agreeing += 1
            track.classified, track.classified_at = frame.index, frame.timestamp
        return len(due)

    def classify(self, frame, tracks):
        """Take what the network says into the tracks' running means.

        The batch is filled up to a power of two: backends that compile for each size do so seldom.
        """
        # decoded again, so that the network gets just what training would read
        files = [frame.encode_crop(track.box, self.args.context) for track in tracks]
        crops = [imaging.open_picture(file) for file in files]
        side = self.info["image_size"]
        inputs = np.stack([imaging.to_model_input(crop, side) for crop in crops])
        # a batch of one differs in the last bits from what evaluation computes
        least = 2 if frame.path else 1
        size = max(least, min(MAX_BATCH, 1 << (len(tracks) - 1).bit_length()))
        for track, answer in zip(tracks, model.predict(self.network, inputs, size)):
            track.classifications += 1
            step = (answer - track.mean) / min(track.classifications, AVERAGE_WINDOW)
            track.mean = track.mean + step


def assign_labels(tracks, labels, threshold):
    """Label tracks: `unknown` below the threshold, or with a surer one's name; 0: everybody."""
    taken = set()
    for track in sorted(tracks, key=lambda track: -track.mean.max()):
        track.best, track.probability = labels[track.mean.argmax()], float(track.mean.max())
        refused = threshold > 0 and (track.probability < threshold or track.best in taken)
        before, track.label = track.label, utils.UNKNOWN if refused else track.best
        taken.add(track.label)
        if track.label != before:
            track.agreeing = 0


class Tagger:
    """Does all that is done with a frame: finds and labels its faces, prints and saves them."""

    def __init__(self, args, source):
        self.args, self.source = args, source
        self.labeller = Labeller(args, source.kind in LIVE)
        self.tracker = Tracker()
        # what the summary tells
        self.counts = collections.Counter()
        self.begun = None  # when the first frame was handled
        self.labels = collections.Counter()  # of photos
        self.crops = collections.Counter(saved=0)
        self.times = collections.defaultdict(lambda: collections.deque(maxlen=10**5))
        # (grey frame, its scale, smallest face looked for) of a few: were there smaller faces?
        self.samples = collections.deque(maxlen=4)

    @contextlib.contextmanager
    def session(self, path=None):
        """Follow, while the block runs, a film or picture of this path, or the camera or stream."""
        self.tracker = Tracker(not self.args.context, self.args.min_face)
        self.file = self.source.shown(path) if path else ""
        self.run = run_name(self.source, path)
        several = self.source.kind == "folder"
        with contextlib.closing(EventWriter(self.file if several else "")) as self.events:
            yield

    def handle(self, frame):
        """Find, label, print and save the faces of a Frame. The first one has the model loaded."""
        self.labeller.load()
        start, counts = time.perf_counter(), self.counts
        self.begun = self.begun or start
        tracks = self.tracker.update(frame)
        found = time.perf_counter()
        due = self.labeller.update(frame, tracks)
        if self.args.context:
            self.times["detection"].append(1000 * (found - start))
            self.keep_sample(frame)
        if due and self.labeller.network:
            counts["classifications"] += due
            self.times["classification"].append(1000 * (time.perf_counter() - found))
        if self.args.events:
            self.events.write(frame, tracks)
        else:
            print_lines(columns(self.source), self.file, frame, tracks)
        if self.args.save_faces:
            save_crops(self, frame, tracks)
        counts["photos" if frame.path else "frames"] += 1
        counts["tagged"] += len(tracks)
        if frame.path:
            self.labels.update(track.label or "faces" for track in tracks)

    def keep_sample(self, frame):
        """Keep photos and frames 0, 1, 2, 4… until a face is found: smaller ones may be in them."""
        if not self.counts["tagged"] and frame.index & (frame.index - 1) == 0:
            sample = shrink(frame.image, frame.image.shape[0] / 20)
            self.samples.append((*sample, self.tracker.smallest))


# ---------------------------------------------------------------- labels → lines and events


def columns(source):
    """Return the names of the columns of a source's lines."""
    face = "x y w h label probability best".split()
    if source.films or source.kind in LIVE:
        return ["file"] * (source.kind == "folder") + ["frame", "time", "track", *face]
    return ["file", "face", *face]


def print_lines(columns, file, frame, tracks):
    """Print a line for each face of a frame. file: its name, for the column of that name."""
    for track in tracks:
        cells = dict(zip("xywh", track.box)) | {
            "file": file,
            "frame": frame.index,
            "time": f"{frame.timestamp:.6f}",
            "track": track.id,
            "face": track.id,
            "label": track.label,
            "probability": f"{track.probability:.6f}" if track.label else "",
            "best": track.best,
        }
        utils.print_line("\t".join(str(cells[column]) for column in columns))


class EventWriter:
    """Prints a JSON object when somebody appeared and when somebody left."""

    def __init__(self, file=""):
        self.file = {"file": file} if file else {}
        self.present = []  # tracks reported, in sight or lost a moment ago

    def write(self, frame, tracks):
        """Print the events of a frame."""
        for track in tracks:
            if track.agreeing < AGREEING or track.label in track.reported:
                continue
            self.leave([one for one in self.present if one is track])  # it has a new label
            track.reported = track.label, track.probability
            lost = [one for one in self.present if one not in tracks]
            same = [one for one in lost if one.reported[0] == track.label]
            if same:  # somebody who was lost for a moment
                track.since = same[0].since
                self.present.remove(same[0])
            else:
                self.print_event("appeared", track, frame.timestamp)
            self.present.append(track)
        self.leave([one for one in self.present if frame.timestamp - one.seen > LEFT_AFTER])

    def leave(self, tracks):
        """Report that these have left."""
        for track in tracks:
            self.present.remove(track)
            self.print_event("left", track, track.seen)

    def print_event(self, event, track, timestamp):
        """Print one JSON object; `seconds` is how long somebody has been seen until then."""
        label, probability = track.reported
        cells = self.file | {
            "event": event,
            "time": round(timestamp, 6),
            "track": track.id,
            "label": label or None,
            "probability": round(probability, 6) if label else None,
            "seconds": round(timestamp - track.since, 6),
        }
        utils.print_line(json.dumps(cells, ensure_ascii=False))

    def close(self):
        """Let everybody leave."""
        self.leave(self.present[:])


# ---------------------------------------------------------------- labels → crops


def save_crops(tagger, frame, tracks):
    """Save the crops of a frame that are worth it.

    Of a picture all of them with a model, and without one only a face that is alone.
    """
    args = tagger.args
    if frame.path and not args.model and len(tracks) != 1:
        tagger.crops["with several faces" if tracks else "without a face"] += 1
        return
    keep_all = frame.path and (args.model or not args.context)
    for track in tracks:
        due = frame.timestamp - track.kept_at >= 1 / KEPT_A_SECOND - 1e-6
        if due and track.seen == frame.timestamp:
            verdict = "saved" if keep_all else judge_crop(frame, track, args.context)
            tagger.crops[verdict] += 1
            if verdict == "saved":
                track.kept_at = frame.timestamp
                track.kept = thumbnail(frame, track.box, args.context), track.box
                save_crop(tagger, frame, track)


def thumbnail(frame, box, context):
    """Return a crop small and grey, (THUMBNAIL, THUMBNAIL), 0 to 255."""
    crop = frame.crop_face(box, context)
    return cv2.resize(crop, (THUMBNAIL, THUMBNAIL), interpolation=cv2.INTER_AREA).mean(2)


def judge_crop(frame, track, context):
    """Return `saved`, or why a crop is not worth it."""
    if min(frame.crop_face(track.box, context).shape[:2]) < MIN_CROP:
        return "too small"
    x, y, w, h = track.box
    face = cv2.cvtColor(frame.image[y : y + h, x : x + w], cv2.COLOR_RGB2GRAY)
    face = cv2.resize(face, (SHARP_SIDE, SHARP_SIDE), interpolation=cv2.INTER_AREA)
    if cv2.Laplacian(face, cv2.CV_64F).var() < MIN_SHARPNESS:
        return "too blurred"
    if track.kept:  # a box that moves by a pixel makes no new crop
        before, place = track.kept
        now = [thumbnail(frame, box, context) for box in (track.box, place)]
        if min(np.abs(before - one).mean() for one in now) < MIN_DIFFERENCE:
            return "too similar"
    return "saved"


def save_crop(tagger, frame, track):
    """Save a crop. Its name ends in a hash of the content, so that none is overwritten."""
    args, run = tagger.args, tagger.run
    folder = args.save_faces
    if args.model:
        labels = tagger.labeller.info["labels"]
        label = utils.folder_names([*labels, utils.UNKNOWN])[track.label]
        folder /= label
        run = run and f"{run}-{label}"
    if run:
        folder /= utils.folder_name(run)
    folder.mkdir(parents=True, exist_ok=True)
    data = frame.encode_crop(track.box, args.context)
    stem = utils.folder_name(frame.path.stem[:40]) if frame.path else f"{frame.index:06d}"
    ending = frame.path.suffix.lower() if frame.path and not args.context else ".jpg"
    name = f"{stem}-{track.id}-{hashlib.sha256(data).hexdigest()[:10]}{ending}"
    with utils.atomic_write(folder / name) as part:
        part.write_bytes(data)


def run_name(source, path):
    """Return the folder for the crops of a film, or of now; "" for those of pictures."""
    if path:
        digest = hashlib.sha256(os.fsencode(path.resolve())).hexdigest()[:8]
        return f"{path.stem[:40]}-{digest}" if path in source.films else ""
    where = source.title.replace("camera ", "camera").replace(" ", "-")
    return f"{where}-{datetime.datetime.now():%Y%m%d-%H%M%S}"


# ---------------------------------------------------------------- drawing


def draw_label(image, x, y, size, colour, text):
    """Write a text on a rounded plate at (x, y) of a PIL image, moved inside."""
    font = ImageFont.truetype(report.font_file(text), size)
    pad, height = round(0.45 * size), round(1.5 * size)
    width = round(font.getlength(text)) + 2 * pad
    x, y = max(0, min(x, image.width - width)), max(0, min(y, image.height - height))
    pen = ImageDraw.Draw(image, "RGBA")
    pen.rounded_rectangle((x, y, x + width - 1, y + height - 1), size // 3, colour)
    pen.text((x + pad, y + round(1.1 * size)), text, "white", font, "ls")


def caption(track, whole):
    """Return what is written at a track."""
    if track.label == utils.UNKNOWN and not whole:
        return track.label
    doubt = "?" if track.label != track.best else ""
    return f"{track.best}{doubt} {track.probability:.0%}"


def text_size(image):
    """Return the height of letters that fit a PIL image, pixels."""
    return max(12, round(min(image.size) / 26))


def draw_tracks(frame, tracks, whole):
    """Draw boxes and captions on a Frame. Returns an RGB PIL image. whole: draw no boxes."""
    image = Image.fromarray(frame.image)
    size = text_size(image)
    thick = max(2, size // 7)
    for track in tracks:
        colour, _ = report.ORANGE if track.label == utils.UNKNOWN else report.BLUE
        x, y, w, h = track.box
        if not whole:
            place = x, y, x + w, y + h
            ImageDraw.Draw(image).rounded_rectangle(place, w // 8, None, colour, thick)
        if track.label:
            above = y - round(1.75 * size)
            y = above if above >= 0 else y + h + size // 4
            draw_label(image, x, y, size, colour, caption(track, whole))
    return image


# ---------------------------------------------------------------- window and output


class PlaybackClock:
    """Says when a frame of a film is due; a pause, or slow work, stops the clock."""

    def __init__(self):
        self.due, self.previous = time.monotonic(), 0.0

    def seconds_until(self, timestamp):
        """Return the seconds until the next frame, of this timestamp, is due."""
        now = time.monotonic()
        self.due = max(now, self.due + min(timestamp - self.previous, films.MAX_FRAME_GAP))
        self.previous = timestamp
        return self.due - now


class Viewer:
    """Draws frames with the tagger's tracks, and shows and writes them."""

    def __init__(self, tagger):
        self.tagger = tagger
        self.window = not tagger.args.no_display and can_open_window()
        self.image = None  # PIL image in the window
        self.write = None  # function that takes a drawn PIL image and its timestamp
        # a single picture stays until a key says go on or end
        self.paused = tagger.source.kind == "picture"
        self.stop = threading.Event()  # everything is to end
        self.count, self.first = 0, None  # frames shown, time of the first one
        self.latest = collections.deque(maxlen=30)  # times of the last ones

    def show(self, frame, left=0.0):
        """Show and write a Frame; left: seconds until the next."""
        self.latest.append(time.perf_counter())
        self.first = self.first or self.latest[0]
        self.count += 1
        tracks = self.tagger.tracker.tracks
        if not frame.path:
            ages = [frame.timestamp - track.classified_at for track in tracks if track.label]
            self.tagger.times["label age"] += ages
        if self.window or self.write:
            image = draw_tracks(frame, tracks, whole=not self.tagger.args.context)
        if self.write:
            self.write(image, frame.timestamp)
        if self.window:
            self.display(image)
            self.wait(left)

    def status(self):
        """Return the line that only the window shows."""
        args, parts = self.tagger.args, []
        if args.model and not self.tagger.labeller.network:
            parts.append("loading the model")
        if self.count > 1 and self.tagger.counts["photos"] == 0:
            rate = (len(self.latest) - 1) / (self.latest[-1] - self.latest[0])
            parts.append(f"{rate:.0f} fps")
        if args.save_faces:
            parts.append(f"{self.tagger.crops['saved']} kept")
        return ", ".join(parts)

    def display(self, image):
        """Show a picture in the window."""
        if not self.image:
            open_window(image)
        self.image, shown, text = image, image.copy(), self.status()
        if text:
            size = round(0.8 * text_size(image))
            draw_label(shown, image.width, size // 3, size, (0, 0, 0, 130), text)
        cv2.imshow(TITLE, cv2.cvtColor(np.asarray(shown), cv2.COLOR_RGB2BGR))

    def wait(self, seconds):
        """Let the window live, for so long and while it is paused, and obey the keys.

        A new key is one more `if` here.
        """
        if not self.image:
            time.sleep(seconds)
            return
        while not self.stop.is_set():
            # the low byte of an arrow's code is a Q or S
            key = chr(cv2.waitKeyEx(max(1, round(1000 * seconds))) & 0xFFFF).lower()
            if key in ("q", "\x1b") or is_closed():
                self.stop.set()
            if key == "s":
                save_snapshot(self.image)
            self.paused ^= key == " "
            if not self.paused:
                return
            seconds = 0.05


def can_open_window():
    """Say whether a window can be opened, and warn if not.

    A child process tries: Qt ends a process that has no display.
    """
    # -P: not a cv2.py of the current folder
    trial = [sys.executable, "-P", "-c", "import cv2; cv2.namedWindow('trial'); cv2.waitKey(1)"]
    try:
        subprocess.run(trial, capture_output=True, timeout=60, check=True)
    except subprocess.SubprocessError:
        reason = "no display, or a headless OpenCV"
        utils.warn(f"no window can be opened ({reason}): going on as with --no-display")
        return False
    return True


def open_window(image):
    """Open the window in the shape of a PIL image; by itself it would have 400 x 300 pixels."""
    cv2.namedWindow(TITLE, cv2.WINDOW_NORMAL | cv2.WINDOW_KEEPRATIO | cv2.WINDOW_GUI_NORMAL)
    small = image.copy()
    small.thumbnail(WINDOW)
    cv2.resizeWindow(TITLE, *small.size)


def is_closed():
    """Say whether the user has closed the window."""
    try:
        return cv2.getWindowProperty(TITLE, cv2.WND_PROP_VISIBLE) < 1
    except cv2.error:  # what Qt's part of OpenCV answers then
        return True


def save_snapshot(image):
    """Save what is shown, a PIL image, in the current folder; warn where that cannot be."""
    path = Path(f"snapshot-{datetime.datetime.now():%Y%m%d-%H%M%S-%f}.png")
    try:
        write_picture(path, image)
        print(f"snapshot: {path}", file=sys.stderr, flush=True)
    except OSError as error:
        utils.warn(f"no snapshot: {utils.advice(error)}")


def write_picture(path, image, _=0.0):
    """Write a PIL image as PNG or JPEG, whole or not at all."""
    with utils.atomic_write(path) as part:
        image.save(part, quality=95, subsampling=0)


@contextlib.contextmanager
def open_output(path, rate):
    """Give a function that writes a PIL image of a timestamp to a picture or film, None to none.

    rate: of an .avi.
    """
    if not path or path.suffix.lower() in PICTURES:
        yield path and functools.partial(write_picture, path)
        return
    with contextlib.closing(films.write_film(path, rate)) as film:
        next(film)
        yield lambda *picture: film.send(picture)


# ---------------------------------------------------------------- films and pictures

warn_once = functools.cache(utils.warn)


def tag_files(source, tagger, viewer):
    """Handle all pictures and films in turn. Broken ones in a folder are warned about."""

    def load(path):  # pictures are read ahead; films are read where their turn comes
        return None if path in source.films else load_picture(path)

    pictures = utils.ordered_parallel_map(load, source.files, min(4, utils.cores()))
    if source.kind == "folder":
        pictures = utils.progress(pictures, len(source.files), "files")
    skipped = collections.defaultdict(list)
    for path, picture in zip(source.files, pictures):
        try:
            tag_file(path, picture, tagger, viewer)
        except imaging.PictureError as error:
            if source.kind == "film":
                raise utils.UserError(f"{source.title}: {error}: give another file") from None
            skipped[imaging.skip_reason(error, path)].append(path)
        if viewer.stop.is_set():
            break
    imaging.warn_about_skipped(skipped)
    if not viewer.count:
        problem = "no picture or film in it can be read: give another one"
        raise utils.UserError(f"{source.title}: {problem}")


def tag_file(path, picture, tagger, viewer):
    """Handle a picture, a Frame, or a film, frame by frame, so that two runs print the same lines.

    Raises PictureError, the one that is given as a picture.
    """
    if isinstance(picture, imaging.PictureError):
        raise picture
    source, clock = tagger.source, PlaybackClock()
    output, rate, frames = output_path(path, source, tagger.args.output), None, [picture]
    if path in source.films:
        film = films.Film(str(path.resolve()), utils.escape(path))
        rate = film.rate
        frames = (Frame(n, *shown) for n, shown in enumerate(film.frames()))
        if film.container.streams.audio and output:
            warn_once("the sound of a film is not written to --output")
        total = round(min(film.duration * film.rate, 10**7))
        if source.kind == "film" and total and not viewer.window:
            frames = utils.progress(frames, total, "frames")
    with tagger.session(path), open_output(output, rate) as viewer.write:
        for frame in frames:
            tagger.handle(frame)
            viewer.show(frame, clock.seconds_until(frame.timestamp))
            if viewer.stop.is_set():
                break


def output_path(path, source, output):
    """Return where a tagged picture or film goes: `output`, the same place below it, None."""
    if not output or source.kind != "folder":
        return output
    target = output / path.relative_to(source.name)
    endings, ending = (films.CODECS, ".mp4") if path in source.films else (PICTURES, ".jpg")
    if target.suffix.lower() not in endings:
        name = f"{path.name}{ending}"
        if len(os.fsencode(name)) > 244 or path.with_name(name).exists():  # another one's
            digest = hashlib.sha256(os.fsencode(path.name)).hexdigest()[:8]
            name = f"{path.stem[:40]}-{digest}{path.suffix[:10]}{ending}"
        target = target.with_name(name)
    target.parent.mkdir(parents=True, exist_ok=True)
    return target


# ---------------------------------------------------------------- cameras and streams


def tag_live(source, tagger, viewer):
    """Tag a camera or stream: reading, tagging and showing do not wait for each other."""
    pool, stop = ThreadPoolExecutor(2), viewer.stop
    # macOS asks for permission in the main thread only
    opened = open_live(source) if source.kind == "camera" else None
    newest = collections.deque([None], 1)

    def work():
        """Thread: handle the newest frame, again and again."""
        for frame in newest_frames(newest, stop, [reader]):
            if not viewer.paused:
                tagger.handle(frame)

    with tagger.session(), open_output(tagger.args.output, LIVE_FPS) as viewer.write:
        reader = pool.submit(newest.extend, live_frames(source, stop, opened))
        worker = pool.submit(work)
        try:
            for frame in newest_frames(newest, stop, [reader, worker], viewer.wait):
                viewer.show(frame)
            wait([worker])  # the last frame counts, too
        finally:
            stop.set()
            wait([worker])  # after the frame at hand nothing more is printed or saved
    worker.result()
    if reader.done():  # it may hang in a dead stream
        reader.result()


# ---------------------------------------------------------------- the end


def print_summary(tagger, viewer):
    """Print on stderr how it went, what was kept, and what to do where nothing was found."""
    args, counts, lines = tagger.args, tagger.counts, []
    seconds = time.perf_counter() - viewer.first
    if counts["frames"]:
        lines.append(film_summary(tagger, viewer.count / seconds))
    if counts["photos"]:
        order = sorted(tagger.labels.most_common(), key=lambda pair: pair[0] == utils.UNKNOWN)
        found = ", ".join(f"{number} {label}" for label, number in order) or "nothing tagged"
        photos = utils.count(counts["photos"], "photo")
        rate = counts["photos"] / (time.perf_counter() - tagger.begun)
        lines.append(f"{photos}: {found}; {rate:.1f} a second")
    if not counts["tagged"] and tagger.samples:
        lines.append(smaller_face(tagger))
    if args.save_faces:
        crops = ", ".join(f"{number} {verdict}" for verdict, number in tagger.crops.items())
        lines.append(f"{utils.escape(args.save_faces)}: {crops}")
        lines.append(next_step(args, tagger.source))
    print(*lines, sep="\n", file=sys.stderr)


def film_summary(tagger, rate):
    """Return frames, speed, and the medians of what was timed."""
    counts, times = tagger.counts, tagger.times
    text = f"{counts['frames']} frames, {rate:.1f} a second shown"
    text += f", {counts['classifications']} classifications"
    for key, unit in ("detection", "ms"), ("classification", "ms"), ("label age", "s"):
        if times[key]:
            text += f"; median {key} {np.median(times[key]):.2f} {unit}"
    return text


def smaller_face(tagger):
    """Search the samples for faces of any size; say what would have found the smallest."""
    sides = []
    for grey, scale, smallest in tagger.samples:
        found = detect_with_flip(grey, scale, 24 / scale)
        sides += [box[2] for box, n in found if n >= MIN_NEIGHBORS_START and box[2] < smallest]
    most = max(smallest for _, _, smallest in tagger.samples)
    text = f"nothing was tagged: no face of {most} px or larger was found"
    if not sides:
        return f"{text}, and no smaller one"
    option = f"--min-face {max(24, int(0.9 * min(sides)))}"
    return f"{text}; the smallest there has {min(sides)} px: {option} would find it"


def next_step(args, source):
    """Return what to do with the crops: correct them, or collect other classes and train."""
    if args.model:  # never to train on what the model itself sorted
        todo = "look through it, correct it, copy it into your training set, and train on that"
        return f"next: {todo}: python train.py TRAINING_SET {shlex.quote(utils.escape(args.model))}"
    parent = args.save_faces.parent  # the current folder may hold anything
    data = "FOLDER" if parent == Path() else shlex.quote(utils.escape(parent))
    # pictures have no folder for each occasion
    grouped = " --group-by-folder" if source.films or source.kind in LIVE else ""
    train = f"python train.py {data} model{grouped}"
    return f"next: the same for the other classes, beside it, then {train}"


def main():
    """Read the command line, tag or collect what the source shows, and sum it up."""
    args = parse_arguments()
    source = find_source(args.source)
    check_arguments(args, source)
    if args.by_name:
        import regions

        return regions.save_named_faces(source.files, args.save_faces, args.context)
    tagger = Tagger(args, source)
    if source.kind != "camera":  # it is shown meanwhile; other threads are not heard then
        tagger.labeller.load()
    viewer = Viewer(tagger)
    if not args.events:
        utils.print_line("\t".join(columns(source)))
    try:
        tag = tag_live if source.kind in LIVE else tag_files
        tag(source, tagger, viewer)
    finally:
        if viewer.count:
            print_summary(tagger, viewer)


if __name__ == "__main__":
    try:
        utils.run(main)
    except SystemExit as end:  # all is written; TensorFlow would take another second to tidy up
        sys.stdout.flush()
        os._exit(end.code)
