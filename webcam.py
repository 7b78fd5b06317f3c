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
import imaging
import model
import report

# isort: split
import argparse
import collections
import contextlib
import datetime
import fractions
import functools
import hashlib
import io
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
MAX_BATCH = 8  # faces classified at once; on a camera the others wait for the next frame
AGREEING = 3  # classifications with one label before --events reports somebody
LEFT_AFTER = 3.0  # seconds out of sight after which somebody has left

FILMS = {".mp4": ("libx264", "yuv420p"), ".avi": ("mjpeg", "yuvj420p")}  # --output: codec, pixels
FILM_ENDINGS = set(".mp4 .m4v .mov .avi .mkv .webm .mpg .mpeg .m2v .vob .ts .mts .m2ts".split())
FILM_ENDINGS |= set(".wmv .asf .flv .f4v .3gp .3g2 .ogv .dv .mxf .mjpeg .mjpg .y4m".split())
PICTURES = (".png", ".jpg", ".jpeg")
LIVE = ("camera", "stream")
RECONNECT_DELAYS = (1, 2, 4)  # seconds before a lost camera or stream is tried again
READ_TIMEOUT = 2.0  # seconds for which a camera may give no frame, at its start above all
CAMERAS = 5  # numbers tried where the wanted camera does not open
STREAM_TIMEOUTS = (10.0, 5.0)  # seconds to open a stream and to read from it
LIVE_FPS = 30  # of the .avi that --output makes of a camera or stream
WINDOW_POLL_AFTER = 0.5  # seconds without a frame after which the window is served all the same
MAX_FRAME_GAP = 60.0  # seconds that a frame of a film is shown; what is longer is a broken clock
NO_PICTURE = {
    "camera": "no picture comes from it: is it connected, used by another program, or forbidden "
    "to this one by the system's privacy settings? Else give another --source",
    "stream": "no picture comes from there: check address, user and password",
}
TITLE = "webcam"
WINDOW = (1280, 800)  # largest size in which the window opens

KEPT_A_SECOND = 5  # crops kept of each track
MIN_CROP = 75  # pixels: the smallest network takes so many
SHARP_SIDE = 64  # pixels to which a face is brought before its sharpness is measured
MIN_SHARPNESS = 50.0  # variance of the Laplacian: sharp faces have 90 or more, blurred ones 25
THUMBNAIL = 32  # pixels at which crops are compared
MIN_DIFFERENCE = 2.5  # mean difference of grey levels between two crops kept
FLASH = 0.2  # seconds that a box lights up when its face was kept


@dataclass
class Frame:
    """One frame of a source, or one picture."""

    index: int  # 0, 1, …; on a camera those that came too fast are left out
    timestamp: float  # seconds from the start
    image: np.ndarray  # uint8 BGR (height, width, 3), upright, of square pixels
    path: Path | None = None  # of a picture's file
    data: bytes = b""  # and what is in it
    crops: dict = field(default_factory=dict)  # {box: RGB pixels}
    files: dict = field(default_factory=dict)  # {box: bytes of a JPEG file}

    def crop_face(self, box, context):
        """Return the square of `context` boxes around a face, RGB; None: the whole frame."""
        if box not in self.crops:
            crop = self.image
            if context:
                x, y, w, h = box
                side = min(context * w, imaging.MAX_PIXELS**0.5 - 1)  # so that it can be read again
                crop = imaging.crop_square(crop, x + w / 2, y + h / 2, side)
            self.crops[box] = cv2.cvtColor(crop, cv2.COLOR_BGR2RGB)
        return self.crops[box]

    def encode_crop(self, box, context):
        """Return the crop as the bytes of a JPEG file; of a whole picture its own file."""
        if self.data and not context:
            return self.data
        if box not in self.files:
            file = io.BytesIO()
            imaging.save_jpeg(file, self.crop_face(box, context))
            self.files[box] = file.getvalue()
        return self.files[box]


@dataclass
class Track:
    """One face followed from frame to frame."""

    id: int
    box: tuple  # x, y, width, height in pixels of the source
    seen: float  # timestamp of the frame in which it was found last
    since: float  # and first
    mean: np.ndarray | None = None  # running mean of its probabilities, (classes,)
    classifications: int = 0
    agreeing: int = 0  # the last so many gave the same label
    classified: int = -(10**9)  # index of the frame classified last
    classified_at: float = 0.0  # and its timestamp
    label: str = ""
    best: str = ""  # the most probable class
    probability: float = float("nan")  # of that class
    kept_at: float = -(10.0**9)  # timestamp of the crop kept last


@dataclass
class Statistics:
    """What the summary tells."""

    counts: collections.Counter = field(default_factory=collections.Counter)
    labels: collections.Counter = field(default_factory=collections.Counter)  # of photos
    times: dict = field(
        default_factory=lambda: collections.defaultdict(lambda: collections.deque(maxlen=10**5))
    )
    # (grey frame, its scale, smallest face looked for) of a few frames: were there smaller faces?
    samples: collections.deque = field(default_factory=lambda: collections.deque(maxlen=4))


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
    files: list = field(default_factory=list)  # paths
    films: set = field(default_factory=set)  # those of them that are films

    def columns(self):
        """Return the names of the columns printed."""
        face = "x y w h label probability best".split()
        if self.films or self.kind in LIVE:
            return ["file"] * (self.kind == "folder") + ["frame", "time", "track", *face]
        return ["file", "face", *face]

    def shown(self, path):
        """Return what the column `file` says."""
        folder = self.kind == "folder"
        return utils.escape(path.relative_to(self.name).as_posix() if folder else path)


def find_source(text):
    """Return the Source that was typed. Raises UserError if there is nothing."""
    if not text:  # an unset variable of a shell; as a path it would be the current folder
        raise utils.UserError("--source is empty: give a camera number, file, folder or address")
    if text.startswith("file:///"):
        text = urllib.request.url2pathname(urllib.parse.urlsplit(text).path)
    if "://" in text:
        check_address(text)
        return Source("stream", text)
    device = re.fullmatch(r"/dev/video(\d{1,5})", os.path.realpath(text))
    if device or re.fullmatch(r"[0-9]{1,5}", text):
        return Source("camera", device[1] if device else text)
    path = Path(text)
    if path.is_dir():
        files = utils.list_files(path)
        return Source("folder", text, files, {p for p in files if p.suffix.lower() in FILM_ENDINGS})
    film = is_film(path)
    return Source("film" if film else "picture", text, [path], {path} if film else set())


def check_address(text):
    """Raise UserError for an address without a host. It may hold a password: it is not shown."""
    scheme = text.partition("://")[0]
    with contextlib.suppress(ValueError):
        parts = urllib.parse.urlsplit(text)
        listens = scheme in ("udp", "rtp", "srt", "tcp") and parts.port
        if utils.is_utf8(text) and (parts.hostname or listens):
            return
    example = "give one like rtsp://192.168.1.20/live"
    raise utils.UserError(f"--source {utils.escape(scheme)}://…: no address: {example}")


def is_film(path):
    """Say whether a file is a film or else a picture. Raises UserError if it can be neither."""
    name = f"--source {utils.escape(path)}"
    if not path.is_file() or path.stat().st_size == 0:
        what = "is empty" if path.is_file() else "no such file"
        raise utils.UserError(f"{name}: {what}: give a camera number, file or address")
    try:
        data, image = imaging.read_picture(path)
    except imaging.RefusedError as reason:  # FFmpeg would read some of these
        raise utils.UserError(f"{name}: {reason}: give another one") from None
    except imaging.PictureError:
        return True
    if image.format == "JPEG":  # several in a row are a film, raw MJPEG
        return data.count(b"\xff\xd9\xff\xd8\xff") > 1
    return image.format in ("GIF", "PNG") and is_animated(image)


def is_animated(image):
    """Say whether a PIL image has frames that follow in time, which pages and previews do not."""
    moving = image.format in ("GIF", "PNG", "WEBP", "AVIF")
    with imaging.picture_errors():
        return moving and getattr(image, "is_animated", False)


def check_output(option, path, source):
    """Raise UserError where --output or --save-faces cannot be; warn where a file is replaced."""
    kind = source.kind
    inside = kind not in LIVE and utils.is_inside(path, Path(source.name))
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
    for problem in (text for text, found in problems.items() if found):
        raise utils.UserError(f"{option} {utils.escape(path)}: {problem}")
    if option == "--output" and path.exists():
        what = "files of the same names in it are" if folder else "is"
        utils.warn(f"{utils.escape(path)}: {what} replaced")


def model_prefix(name):
    """Return the prefix of a model of which the prefix or one file is named."""
    for ending in (".h5", "-labels.json", ".json"):
        if name.endswith(ending) and Path(name).is_file():
            name = name.removesuffix(ending)
            break
    paths = [Path(f"{name}{ending}") for ending in (".h5", ".json", "-labels.json")]
    absent = [path.name for path in paths if not path.exists()]
    if 0 < len(absent) < len(paths):
        there = next(path for path in paths if path.exists())
        lack = utils.escape(" and ".join(absent))
        raise utils.UserError(f"{utils.escape(there)}: {lack} missing: copy the three together")
    return name


# ---------------------------------------------------------------- films → frames


class FilmError(utils.UserError):
    """A file or stream that gives no film; the text is the reason, without its name."""


class Film:
    """An open film or stream. Raises FilmError."""

    def __init__(self, address, name, live=False):
        import av

        options = {"rtsp_transport": "tcp"} if live else {}
        timeouts = STREAM_TIMEOUTS if live else None
        self.name = name  # as messages have it
        try:
            self.container = av.open(
                address,
                format=None if live else film_format(address),
                options=options,
                timeout=timeouts,
                metadata_errors="ignore",
            )
        except av.error.FFmpegError:
            raise FilmError("no frame can be read") from None
        cover = av.stream.Disposition.attached_pic  # of a music file
        streams = [s for s in self.container.streams.video if not s.disposition & cover]
        if not streams:
            raise FilmError("there is no film in it")
        self.stream = max(streams, key=lambda s: s.width * s.height)
        self.stream.thread_type = "SLICE" if live else "AUTO"  # by frames: faster, but later
        rate = float(self.stream.average_rate or 0)
        self.rate = rate if 0.05 <= rate <= 500 else 25.0
        self.duration = (self.container.duration or 0) / av.time_base  # seconds; 0: not known
        if self.container.format.name == "avi":  # FFmpeg shortens what was cut
            self.duration = max(self.duration, self.stream.frames / self.rate)
        playlist = self.container.format.name in ("hls", "dash")  # its size says nothing
        self.finite = self.duration > 0 or (self.container.size > 0 and not playlist)
        self.total = round(min(self.duration * self.rate, 10**7))  # frames, about
        self.has_sound = bool(self.container.streams.audio)

    def frames(self):
        """Yield its Frames as a player shows them: deinterlaced, upright, of square pixels."""
        timestamp, origin = -1 / self.rate, None
        for index, frame in enumerate(deinterlace(self.decode(), self.stream.time_base)):
            if origin is None:
                origin = frame.time or 0.0
            told = -1e9 if frame.time is None else frame.time - origin  # None in raw streams
            timestamp = told if told > timestamp else timestamp + 1 / self.rate
            yield Frame(index, timestamp, self.to_image(frame))
        if origin is None:
            raise FilmError("no frame can be read")

    def decode(self):
        """Yield the decoded frames as they are; warn if bytes are missing at the end."""
        import av

        start, end = (self.container.start_time or 0) / av.time_base, 0.0
        streams = self.container.streams
        try:
            for packet in self.container.demux(*streams.video, *streams.audio):
                if packet.pts is not None:
                    end = max(end, float((packet.pts + (packet.duration or 0)) * packet.time_base))
                if packet.stream.index == self.stream.index:
                    with contextlib.suppress(av.error.InvalidDataError):
                        yield from packet.decode()
        except av.error.FFmpegError:  # a cut file, or a stream that is lost
            pass
        counted = re.search("mp4|matroska|avi", self.container.format.name)  # others estimate
        if counted and 0 < end - start < min(0.9 * self.duration, self.duration - 0.5):
            seconds = f"{end - start:.1f} of {self.duration:.1f} s"
            utils.warn(f"{self.name}: broke off after {seconds}: its end may be missing")

    def to_image(self, frame):
        """Return a decoded frame as uint8 BGR (height, width, 3)."""
        image = frame.to_ndarray(format="bgr24")
        ratio = float(self.stream.sample_aspect_ratio or 1)
        if ratio != 1 and 0.1 < ratio < 10:  # the width of its pixels, in heights
            height, width = image.shape[:2]
            image = cv2.resize(image, (round(width * ratio), height), interpolation=cv2.INTER_AREA)
        matrix = frame.side_data.get("DISPLAYMATRIX")
        return apply_orientation(image, np.frombuffer(matrix, "int32")) if matrix else image

    def close(self):
        """Let the file go."""
        self.container.close()


def film_format(path):
    """Return FFmpeg's name for raw MJPEG, of which it would take one named .jpg for a picture."""
    with open(path, "rb") as file:
        return "mjpeg" if file.read(2) == b"\xff\xd8" else None


def apply_orientation(image, matrix):
    """Turn and mirror an image as a film's display matrix says, nine numbers in three rows."""
    across, up = matrix[0], matrix[4]
    if abs(matrix[1]) + abs(matrix[3]) > abs(across) + abs(up):
        image = image.transpose(1, 0, 2)
        across, up = matrix[3], matrix[1]
    return np.ascontiguousarray(image[:: -1 if up < 0 else 1, :: -1 if across < 0 else 1])


def deinterlace(frames, time_base):
    """Yield decoded frames, from the first interlaced one on through FFmpeg's deinterlacer."""
    graph = shape = None
    for frame in frames:
        here = frame.width, frame.height, frame.format.name
        if graph and shape != here:
            yield from filter_frame(graph, None)
            graph = None
        if not graph and frame.interlaced_frame:
            graph, shape = make_deinterlacer(frame, time_base), here
        yield from filter_frame(graph, frame) if graph else (frame,)
    if graph:
        yield from filter_frame(graph, None)


def make_deinterlacer(frame, time_base):
    """Return a PyAV filter graph for frames such as this one."""
    import av.filter

    graph = av.filter.Graph()
    source = graph.add_buffer(
        width=frame.width, height=frame.height, format=frame.format, time_base=time_base
    )
    bwdif, sink = graph.add("bwdif", "mode=send_frame:deint=interlaced"), graph.add("buffersink")
    source.link_to(bwdif)
    bwdif.link_to(sink)
    graph.configure()
    return graph


def filter_frame(graph, frame):
    """Push a frame into a filter graph, None at the end; yield those that come out."""
    graph.push(frame)
    with contextlib.suppress(BlockingIOError, EOFError):
        while True:
            yield graph.pull()


def load_picture(path):
    """Read a picture in full, upright. Returns (its Frame, ""), or (None, the reason)."""
    try:
        data, image = imaging.read_picture(path)
        note = "only the first of its frames is used" if is_animated(image) else ""
        pixels = cv2.cvtColor(np.asarray(imaging.upright(image)), cv2.COLOR_RGB2BGR)
        return Frame(0, 0.0, pixels, path, data), note
    except imaging.PictureError as reason:
        return None, f"skipped: {reason}"


# ---------------------------------------------------------------- cameras and streams → frames


class Live:
    """The newest frame of a camera or stream, which a thread of its own reads."""

    def __init__(self, source, stop):
        self.kind, self.source = source.kind, source.name
        self.stop = stop  # an event: everything is to end
        host = urllib.parse.urlsplit(source.name).hostname  # never the user, password or query
        self.name = f"{self.kind} {self.source if self.kind == 'camera' else utils.escape(host)}"
        self.finite = False  # it is a film that somebody serves
        self.newest = None
        self.ended = False  # nothing newer will come
        self.start = 0.0  # time of the first frame

    def open(self):
        """Open the source. Returns a generator of its images, empty if it does not open."""
        if self.kind == "camera":
            capture = cv2.VideoCapture(int(self.source))
            self.finite = capture.get(cv2.CAP_PROP_FRAME_COUNT) > 0  # a virtual camera's film
            return camera_images(capture, self.stop)
        try:
            film = Film(self.source, self.name, live=True)
        except FilmError:
            return iter(())
        self.finite = film.finite
        return self.stream_images(film)

    def stream_images(self, film):
        """Yield the images of a stream; a film comes faster than it plays and has to wait."""
        begin = time.monotonic()
        with contextlib.closing(film), contextlib.suppress(FilmError):
            for frame in film.frames():
                yield frame.image
                if film.finite:
                    ahead = frame.timestamp + begin - time.monotonic()
                    self.stop.wait(min(1.0, max(0.0, ahead)))

    def read(self, images=None):
        """Thread: keep the newest frame until the source is to stop or a served film ends.

        A lost source is tried again after each of RECONNECT_DELAYS. Raises UserError where none
        comes (back).
        """
        images, tries = images or self.open(), 0
        try:
            while True:
                for image in images:
                    now, tries = time.monotonic(), 0
                    self.start = self.start or now
                    index = self.newest.index + 1 if self.newest else 0
                    self.newest = Frame(index, now - self.start, image)
                    if self.stop.is_set():
                        return
                if self.stop.is_set() or (self.finite and self.newest):
                    return
                self.check_hope(tries)
                utils.warn(f"{self.name}: lost: trying again in {RECONNECT_DELAYS[tries]} s")
                self.stop.wait(RECONNECT_DELAYS[tries])
                images, tries = self.open(), tries + 1
        finally:
            self.ended = True

    def check_hope(self, tries):
        """Raise UserError if the source gave nothing at all, or was lost for good."""
        if not self.newest:
            others = other_cameras(self.source) if self.kind == "camera" else ""
            raise utils.UserError(f"{self.name}: {NO_PICTURE[self.kind]}{others}")
        if tries == len(RECONNECT_DELAYS):
            lost = f"lost, and {tries} tries did not bring it back"
            raise utils.UserError(f"{self.name}: {lost}: check it and try again")

    def frames(self, meanwhile=lambda: None):
        """Yield the newest Frame until the source ends. meanwhile: called while there is none."""
        done = None
        while not self.stop.is_set():
            ended, newest = self.ended, self.newest  # in this order: one may come before the end
            if newest is not done:
                done = newest
                yield newest
            elif ended:
                return
            else:
                time.sleep(0.005)
                meanwhile()


def camera_images(capture, stop):
    """Yield the images of an OpenCV capture until it gives none for READ_TIMEOUT seconds."""
    last = time.monotonic()
    try:
        while not stop.is_set():
            good, image = capture.read()
            if good:
                yield image
                last = time.monotonic()
            elif not capture.isOpened() or time.monotonic() - last > READ_TIMEOUT:
                return
            else:
                stop.wait(0.02)
    finally:
        capture.release()


def other_cameras(source):
    """Return words that name the cameras that do open."""
    numbers = [n for n in range(CAMERAS) if n != int(source)]
    found = [str(n) for n in numbers if cv2.VideoCapture(n).isOpened()]
    return f" ({', '.join(found)} can be opened)" if found else ""


# ---------------------------------------------------------------- frame → boxes → tracks


def load_cascade():
    """Load the face detector from the current folder, else from beside this script."""
    # relative where it can be: on Windows, OpenCV reads no XML file below a folder whose name is
    # not ASCII
    beside = Path(__file__).resolve().with_name(utils.CASCADE)
    name = utils.CASCADE if Path(utils.CASCADE).is_file() else str(beside)
    cascade = cv2.CascadeClassifier()
    with contextlib.suppress(cv2.error, SystemError):
        if utils.is_utf8(name):  # OpenCV ends the process on other names
            cascade.load(name)
    if cascade.empty():
        raise utils.UserError(f"{utils.escape(name)}: missing or damaged: copy it from the kit")
    return cascade


def shrink(image, smallest):
    """Return the grey picture to search and its scale: `smallest` px become DETECT_FACE px."""
    scale = min(1.0, DETECT_FACE / smallest)
    if scale < 1:
        size = [max(1, round(n * scale)) for n in image.shape[1::-1]]
        image = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
    return cv2.cvtColor(image, cv2.COLOR_BGR2GRAY), scale


def detect(cascade, grey, scale, smallest, largest=0):
    """Find faces of `smallest` to `largest` (0: any) source pixels in a grey picture.

    Returns [(box in source pixels, neighbors)]; the neighbors say how sure the cascade is.
    """
    if min(grey.shape) < 24:
        return []
    least, most = ((round(side * scale),) * 2 for side in (smallest, largest))
    boxes, neighbors = cascade.detectMultiScale2(
        grey, SCALE_FACTOR, MIN_NEIGHBORS_KEEP, minSize=least, maxSize=most
    )
    return [(tuple(round(v / scale) for v in box), int(n)) for box, n in zip(boxes, neighbors)]


def detect_with_flip(cascade, grey, scale, smallest):
    """Find faces as `detect` does, with the mean neighbors of a picture and its mirror image.

    A picture is seen only once, and what is no face is seldom taken for one both ways round: of 448
    flowers 7 instead of 11 show a "face", at the same recall (0.937 and 0.934 of the heads in
    single frames of 14 films).
    """
    width, mirrored = grey.shape[1] / scale, []
    for (x, y, w, h), n in detect(cascade, cv2.flip(grey, 1), scale, smallest):
        mirrored.append(((round(width) - x - w, y, w, h), n))
    found = []
    for box, n in detect(cascade, grey, scale, smallest):
        others = [m for other, m in mirrored if iou(box, other) > MIN_IOU]
        found.append((box, (n + max(others, default=0)) / 2))
    return found


def detect_near(cascade, grey, scale, box):
    """Find faces around a known box (source pixels) of about its size, as `detect` does."""
    x, y, w, h = (v * scale for v in box)
    left, top = max(0, round(x - w / 2)), max(0, round(y - h / 2))
    part = grey[top : round(y + 1.5 * h), left : round(x + 1.5 * w)]
    right, down = round(left / scale), round(top / scale)
    found = detect(cascade, part, scale, 0.75 * box[2], 1.35 * box[2])
    return [((x + right, y + down, w, h), n) for (x, y, w, h), n in found]


def iou(a, b):
    """Return intersection over union of two boxes (x, y, w, h)."""
    width = min(a[0] + a[2], b[0] + b[2]) - max(a[0], b[0])
    height = min(a[1] + a[3], b[1] + b[3]) - max(a[1], b[1])
    both = max(0, width) * max(0, height)
    return both / (a[2] * a[3] + b[2] * b[3] - both)


def distinct_faces(found):
    """Return [(box, neighbors)] without those that overlap a surer one."""
    kept = []
    for box, n in sorted(found, key=lambda face: (-face[1], face[0])):
        if all(iou(box, other) < MIN_IOU for other, _ in kept):
            kept.append((box, n))
    return kept


def match_boxes(old, new):
    """Match boxes of two frames so that the sum of IoUs is largest. Returns {index: new index}."""
    from scipy.optimize import linear_sum_assignment

    if not old or not new:
        return {}
    ious = np.array([[iou(a, b) for b in new] for a in old])
    pairs = zip(*linear_sum_assignment(-ious))
    return {int(i): int(j) for i, j in pairs if ious[i, j] >= MIN_IOU}


class Tracker:
    """Follows the faces of one film, camera or stream, or finds those of one picture.

    Without a cascade the whole picture is the only "face".
    """

    def __init__(self, cascade, min_face=None):
        self.cascade, self.min_face = cascade, min_face
        self.tracks, self.next_track_id = [], 0
        self.size = ()
        self.smallest = 0  # face looked for, pixels
        self.scanned = 0  # index of the frame of which the whole was searched last
        self.previous = 0.0  # timestamp of the last frame

    def update(self, frame):
        """Return the tracks after a Frame."""
        height, width = frame.image.shape[:2]
        if self.size != (width, height):  # the first frame, or a film that changes its size
            self.size, self.tracks = (width, height), []
            self.scanned = frame.index - SCAN_EVERY
            self.smallest = self.min_face or max(40, height // 8)
        if self.cascade:
            self.update_tracks(self.detect(frame), frame.timestamp)
        else:
            self.tracks = self.tracks or [self.new_track((0, 0, width, height), frame.timestamp)]
            self.tracks[0].seen = frame.timestamp
        self.previous = frame.timestamp
        return self.tracks

    def new_track(self, box, timestamp):
        """Return a track that begins now."""
        self.next_track_id += 1
        return Track(self.next_track_id - 1, box, timestamp, timestamp)

    def detect(self, frame):
        """Find faces: now all over the picture, now only near the tracks."""
        grey, scale = shrink(frame.image, self.smallest)
        if frame.path:
            found = detect_with_flip(self.cascade, grey, scale, self.smallest)
        elif frame.index - self.scanned >= SCAN_EVERY or not 0 < len(self.tracks) <= FEW_TRACKS:
            found = detect(self.cascade, grey, scale, self.smallest)
            self.scanned = frame.index
        else:
            boxes = [track.box for track in self.tracks]
            found = [face for box in boxes for face in detect_near(self.cascade, grey, scale, box)]
        return distinct_faces(found)

    def update_tracks(self, faces, timestamp):
        """Match faces to the tracks, end those that are lost, and begin new ones."""
        matches = match_boxes([track.box for track in self.tracks], [box for box, _ in faces])
        for old, new in matches.items():
            track, box = self.tracks[old], faces[new][0]
            if iou(box, track.box) > SMOOTHING_IOU:
                box = tuple(round((a + b) / 2) for a, b in zip(box, track.box))
            track.box, track.seen = box, timestamp
        tracks = [track for track in self.tracks if not self.is_lost(track, timestamp)]
        for box, neighbors in sorted(faces):
            free = all(iou(box, track.box) < MIN_IOU for track in tracks)
            if free and neighbors >= MIN_NEIGHBORS_START:
                tracks.append(self.new_track(box, timestamp))
        self.tracks = tracks

    def is_lost(self, track, timestamp):
        """Say whether a track has ended: in seconds, however many frames come."""
        missed_once = track.seen == self.previous
        limit = MAX_MISSED_ONCE if missed_once else MAX_MISSED
        return timestamp - track.seen > limit + 1e-6


# ---------------------------------------------------------------- tracks → labels


class Labeller:
    """The model, and what it says about tracks. Without a model nobody has a label."""

    def __init__(self, args, source, statistics):
        self.prefix = args.model
        self.live = source.kind in LIVE
        self.statistics = statistics
        self.network, self.labels, self.side = None, [], 0
        self.threshold = args.threshold
        self.context = None if args.whole_picture else args.context

    def load(self):
        """Load the model. A camera is shown meanwhile, and tagged from then on."""
        network, info = model.load_model(self.prefix)
        self.labels, self.side = info["labels"], info["image_size"]
        if self.threshold is None:
            self.threshold = info["threshold"]
        for n in (1, 2) if self.live else ():  # ready for one face and for several
            model.predict(network, np.zeros((n, self.side, self.side, 3), "uint8"), n)
        self.network = network

    def update(self, frame, tracks):
        """Classify the tracks that are new or due, and label all."""
        seen = [track for track in tracks if track.seen == frame.timestamp]
        due = [track for track in seen if frame.index - track.classified >= CLASSIFY_EVERY]
        if self.live:  # the oldest labels only: the next frame waits
            due = sorted(due, key=lambda track: track.classified)[:MAX_BATCH]
        before = {track.id: track.label for track in due}
        if due and self.network:
            self.classify(frame, due)
            unique = self.threshold > 0 and self.context is not None
            assign_labels(tracks, self.labels, self.threshold, unique)
        for track in due:
            track.agreeing = track.agreeing + 1 if track.label == before[track.id] else 1
            track.classified, track.classified_at = frame.index, frame.timestamp

    def classify(self, frame, tracks):
        """Take what the network says into the tracks' running means.

        The batch is filled up to a power of two: backends that compile for each size do so seldom.
        """
        start = time.perf_counter()
        files = [frame.encode_crop(track.box, self.context) for track in tracks]
        # decoded again, so that the network gets just what training would read
        inputs = np.stack(
            [imaging.to_model_input(imaging.open_picture(data), self.side) for data in files]
        )
        # a batch of one differs in the last bits from what evaluation computes
        least = 2 if frame.path else 1
        size = max(least, min(MAX_BATCH, 1 << (len(tracks) - 1).bit_length()))
        for track, answer in zip(tracks, model.predict(self.network, inputs, size)):
            track.classifications += 1
            mean = answer if track.mean is None else track.mean
            track.mean = mean + (answer - mean) / min(track.classifications, AVERAGE_WINDOW)
        self.statistics.times["classification"].append((time.perf_counter() - start) * 1000)
        self.statistics.counts["classifications"] += len(tracks)


def assign_labels(tracks, labels, threshold, unique):
    """Label tracks: `unknown` below the threshold, or, if `unique`, with a surer one's name."""
    taken = set()
    known = [track for track in tracks if track.mean is not None]
    for track in sorted(known, key=lambda track: -track.mean.max()):
        track.best, track.probability = labels[track.mean.argmax()], float(track.mean.max())
        refused = track.probability < threshold or (unique and track.best in taken)
        track.label = "unknown" if refused else track.best
        taken.add(track.label)


class Tagger:
    """Does all that is done with a frame: tracker, labeller, and the sinks that print and save."""

    def __init__(self, args, source):
        self.args, self.source = args, source
        self.statistics = Statistics()
        self.cascade = None if args.whole_picture else load_cascade()
        self.labeller = Labeller(args, source, self.statistics)
        self.tracker = self.events = None
        self.sinks = []  # functions that print or save what a frame shows
        self.tracks = []  # to be shown

    def start(self, file="", run=""):
        """Begin with another film, picture or camera. file: its name in lines; run: a folder."""
        self.tracker, self.tracks = Tracker(self.cascade, self.args.min_face), []
        self.sinks = [functools.partial(print_lines, self.source.columns(), file)]
        if self.args.events:
            self.events = EventWriter(file if self.source.kind == "folder" else "")
            self.sinks = [self.events.write]
        if self.args.save_faces:
            saver = CropSaver(self.args, self.labeller, run, self.statistics.counts)
            self.sinks.append(saver.write)

    def handle(self, frame):
        """Find, label, print and save the faces of a Frame."""
        start, counts = time.perf_counter(), self.statistics.counts
        tracks = self.tracker.update(frame)
        if self.cascade:
            self.statistics.times["detection"].append((time.perf_counter() - start) * 1000)
            handled = counts["frames"] + counts["photos"]
            if not counts["tagged"] and handled & (handled - 1) == 0:  # frames 0, 1, 2, 4, 8…
                sample = shrink(frame.image, frame.image.shape[0] / 20)
                self.statistics.samples.append((*sample, self.tracker.smallest))
        self.labeller.update(frame, tracks)
        # with many faces some still wait for their first label
        self.tracks = [track for track in tracks if track.label or not self.labeller.network]
        for sink in self.sinks:
            sink(frame, self.tracks)
        counts["photos" if frame.path else "frames"] += 1
        counts["tagged"] += len(self.tracks)

    def close(self):
        """Report that everybody has left: no more frames come."""
        if self.events:
            self.events.close()


# ---------------------------------------------------------------- labels → lines and events


def print_lines(columns, file, frame, tracks):
    """Print a line for each face of a frame. file: its name, for the column of that name."""
    for track in tracks:
        cells = dict(zip("xywh", track.box), label=track.label, best=track.best, file=file)
        cells |= {"frame": frame.index, "time": f"{frame.timestamp:.6f}", "track": track.id}
        cells["face"] = track.id
        cells["probability"] = f"{track.probability:.6f}" if track.label else ""
        utils.print_line("\t".join(str(cells[column]) for column in columns))


@dataclass
class Visit:
    """Somebody who is in sight, or was until a moment ago."""

    label: str
    track: int
    since: float
    last: float = 0.0
    probability: float = 0.0


class EventWriter:
    """Prints a JSON object when somebody appeared and when somebody left."""

    def __init__(self, file=""):
        self.file, self.visits = file, []

    def write(self, frame, tracks):
        """Print the events of a frame."""
        in_sight = [track.id for track in tracks]
        for track in (track for track in tracks if track.agreeing >= AGREEING):
            for visit in self.visits[:]:
                if visit.track == track.id and visit.label != track.label:
                    self.leave(visit)
            visit = self.visit_of(track, in_sight)
            visit.track, visit.last, visit.probability = track.id, track.seen, track.probability
            if visit not in self.visits:
                self.visits.append(visit)
                self.print_event("appeared", visit, frame.timestamp)
        for visit in self.visits[:]:
            if frame.timestamp - visit.last > LEFT_AFTER:
                self.leave(visit)

    def visit_of(self, track, in_sight):
        """Return a track's visit, else that of a lost track with the same label, else a new one."""
        for visit in self.visits:
            lost = visit.label == track.label and visit.track not in in_sight
            if visit.track == track.id or lost:
                return visit
        return Visit(track.label, track.id, track.since)

    def leave(self, visit):
        """End a visit."""
        self.visits.remove(visit)
        self.print_event("left", visit, visit.last)

    def print_event(self, event, visit, timestamp):
        """Print one JSON object; `seconds` is how long somebody has been seen until then."""
        cells = {"file": self.file} if self.file else {}
        cells |= {"event": event, "time": round(timestamp, 6), "track": visit.track}
        known = {"label": visit.label, "probability": round(visit.probability, 6)}
        cells |= known if visit.label else dict.fromkeys(known)
        cells["seconds"] = round(timestamp - visit.since, 6)
        utils.print_line(json.dumps(cells, ensure_ascii=False))

    def close(self):
        """Let everybody leave."""
        for visit in self.visits[:]:
            self.leave(visit)


# ---------------------------------------------------------------- labels → crops


class CropSaver:
    """Saves the crops that the model would get, those that are worth it."""

    def __init__(self, args, labeller, run, counts):
        self.folder, self.run = args.save_faces, run  # run: a folder for what belongs together
        self.labeller, self.context, self.counts = labeller, labeller.context, counts
        self.kept = {}  # {track id: (thumbnail, box) of the crop kept last}

    def write(self, frame, tracks):
        """Save crops of a frame; of a picture without a model only a face that is alone."""
        if frame.path and not self.labeller.network and len(tracks) != 1:
            self.counts[f"pictures {'with several faces' if tracks else 'without a face'}"] += 1
            return
        self.kept = {t.id: self.kept[t.id] for t in tracks if t.id in self.kept}
        for track in tracks:
            due = frame.timestamp - track.kept_at >= 1 / KEPT_A_SECOND - 1e-6
            if due and track.seen == frame.timestamp:
                reason = self.reason_against(frame, track)
                self.counts[reason or "saved"] += 1
                if not reason:
                    track.kept_at = frame.timestamp
                    self.kept[track.id] = self.thumbnail(frame, track.box), track.box
                    self.save(frame, track)

    def thumbnail(self, frame, box):
        """Return a crop small and grey, (THUMBNAIL, THUMBNAIL), 0 to 255."""
        crop, size = frame.crop_face(box, self.context), (THUMBNAIL, THUMBNAIL)
        return cv2.resize(crop, size, interpolation=cv2.INTER_AREA).mean(2)

    def reason_against(self, frame, track):
        """Return why a crop is not worth keeping, None if it is. Of pictures, a model keeps all."""
        if frame.path and (self.labeller.network or not self.context):
            return None
        if min(frame.crop_face(track.box, self.context).shape[:2]) < MIN_CROP:
            return "too small"
        x, y, w, h = track.box
        face = cv2.cvtColor(frame.image[y : y + h, x : x + w], cv2.COLOR_BGR2GRAY)
        face = cv2.resize(face, (SHARP_SIDE, SHARP_SIDE), interpolation=cv2.INTER_AREA)
        if cv2.Laplacian(face, cv2.CV_64F).var() < MIN_SHARPNESS:
            return "too blurred"
        if track.id in self.kept:  # a box that moves by a pixel makes no new crop
            before, place = self.kept[track.id]
            now = [self.thumbnail(frame, box) for box in (track.box, place)]
            if min(np.abs(before - one).mean() for one in now) < MIN_DIFFERENCE:
                return "too similar"
        return None

    def save(self, frame, track):
        """Save a crop. Its name ends in a hash of the content, so that none is overwritten."""
        folder, run = self.folder, self.run
        if self.labeller.network:
            label = utils.folder_names([*self.labeller.labels, "unknown"])[track.label]
            folder /= label
            run = run and f"{run}-{label}"
        if run:
            folder /= utils.folder_names([run])[run]
        folder.mkdir(parents=True, exist_ok=True)
        data = frame.encode_crop(track.box, self.context)
        stem, ending = f"{frame.index:06d}", ".jpg"
        if frame.path:
            stem = utils.folder_names([frame.path.stem[:40]])[frame.path.stem[:40]]
        if frame.path and not self.context:
            ending = frame.path.suffix.lower()
        name = f"{stem}-{track.id}-{hashlib.sha256(data).hexdigest()[:10]}{ending}"
        with utils.atomic_write(folder / name) as part:
            part.write_bytes(data)


def run_name(kind, name):
    """Return the folder for the crops of one film, or of one run with a camera or stream."""
    now, path = f"{datetime.datetime.now():%Y%m%d-%H%M%S}", Path(name)
    if kind == "camera":
        return f"camera{name}-{now}"
    if kind == "stream":
        return f"stream-{urllib.parse.urlsplit(name).hostname or 'here'}-{now}"
    return f"{path.stem[:40]}-{hashlib.sha256(os.fsencode(path.resolve())).hexdigest()[:8]}"


# ---------------------------------------------------------------- drawing


def draw_label(image, x, y, size, colour, text, note=""):
    """Write a text and a paler note on a rounded plate at (x, y) of a PIL image, moved inside."""
    large = ImageFont.truetype(report.font_file(text), size)
    small = ImageFont.truetype(report.font_file(note), round(0.8 * size))
    pad, height, base = round(0.45 * size), round(1.5 * size), round(1.1 * size)
    width = round(large.getlength(text) + small.getlength(note)) + pad * (3 if note else 2)
    x, y = max(0, min(x, image.width - width)), max(0, min(y, image.height - height))
    pen = ImageDraw.Draw(image, "RGBA")
    pen.rounded_rectangle((x, y, x + width - 1, y + height - 1), size // 3, colour)
    pen.text((x + pad, y + base), text, "white", large, "ls")
    pen.text((x + width - pad, y + base), note, (255, 255, 255, 200), small, "rs")


def caption(track, whole):
    """Return what is written at a track, and the note beside it."""
    if track.label == "unknown" and not whole:
        return track.label, ""
    doubt = "?" if track.label != track.best else ""
    return f"{track.best}{doubt}", f"{track.probability:.0%}"


def text_size(image):
    """Return the height of letters that fit a PIL image, pixels."""
    return max(12, round(min(image.size) / 26))


def draw_tracks(frame, tracks, whole):
    """Draw boxes and captions on a Frame. Returns an RGB PIL image. whole: draw no boxes."""
    image = Image.fromarray(cv2.cvtColor(frame.image, cv2.COLOR_BGR2RGB))
    size = text_size(image)
    thick = max(2, size // 7)
    for track in tracks:
        colour, pale = report.ORANGE if track.label == "unknown" else report.BLUE
        x, y, w, h = track.box
        if not whole:
            flash = 0 <= frame.timestamp - track.kept_at < FLASH
            line, width = (pale, 2 * thick) if flash else (colour, thick)
            ImageDraw.Draw(image).rounded_rectangle((x, y, x + w, y + h), w // 8, None, line, width)
        if track.label:
            above = y - round(1.75 * size)
            y = above if above >= 0 else y + h + size // 4
            draw_label(image, x, y, size, colour, *caption(track, whole))
    return image


def draw_corner(image, lines):
    """Return a copy of a PIL image with lines of text in its upper right corner."""
    image, size = image.copy(), text_size(image)
    for n, text in enumerate(lines):
        y = size // 3 + n * round(1.6 * size)
        draw_label(image, image.width, y, round(0.8 * size), (0, 0, 0, 130), text)
    return image


# ---------------------------------------------------------------- window and output


class Viewer:
    """Draws frames, and shows and writes them."""

    def __init__(self, args, labeller, statistics):
        self.args, self.labeller, self.statistics = args, labeller, statistics
        self.window = not args.no_display and open_window()
        self.write = None  # function that takes a drawn PIL image and its timestamp
        self.paused = False
        self.stop = threading.Event()  # everything is to end
        self.count, self.first = 0, time.monotonic()  # frames shown, time of the first one
        self.latest = collections.deque(maxlen=30)  # times of the last ones

    def show(self, frame, tracks, left=0.0):
        """Show and write a Frame; left: seconds until the next. Returns whether to end."""
        self.latest.append(time.monotonic())
        self.first, self.count = self.first if self.count else self.latest[0], self.count + 1
        if not frame.path:
            ages = [frame.timestamp - track.classified_at for track in tracks if track.label]
            self.statistics.times["label age"] += ages
        if not (self.window or self.write):
            return False
        image = draw_tracks(frame, tracks, self.args.whole_picture)
        if self.write:
            self.write(image, frame.timestamp)
        return self.window and self.display(image, left, self.corner(frame))

    def corner(self, frame):
        """Return the lines that only the window shows."""
        lines = ["loading the model"] if self.args.model and not self.labeller.network else []
        if self.count > 1 and not frame.path:
            seconds = max(1e-6, self.latest[-1] - self.latest[0])
            lines.append(f"{(len(self.latest) - 1) / seconds:.0f} fps")
        if self.args.save_faces:
            lines.append(f"{self.statistics.counts['saved']} kept")
        return lines

    def display(self, image, left, corner):
        """Show a picture for `left` seconds, and while it is paused, and obey the keys.

        A new key is one more `if` here. Returns whether the user wants to end.
        """
        if self.count == 1:  # else it would have 400x300 whatever the picture
            scale = min(1, WINDOW[0] / image.width, WINDOW[1] / image.height)
            cv2.resizeWindow(TITLE, round(scale * image.width), round(scale * image.height))
        shown = np.asarray(draw_corner(image, corner))
        cv2.imshow(TITLE, cv2.cvtColor(shown, cv2.COLOR_RGB2BGR))
        while True:
            key, ends = wait_for_key(50 if self.paused else round(1000 * left))
            if ends or self.stop.is_set():
                return True
            if key == "s":
                save_snapshot(image)
            self.paused ^= key == " "
            if not self.paused:
                return False

    def keep_alive(self):
        """Let the window be closed though no frame comes for long."""
        waiting = self.count and time.monotonic() - self.latest[-1] > WINDOW_POLL_AFTER
        if self.window and waiting and wait_for_key(5)[1]:
            self.stop.set()

    @contextlib.contextmanager
    def writing(self, path, rate):
        """Write what is shown to a film while the block runs; path: None for no film."""
        with film_output(path, rate) if path else contextlib.nullcontext() as self.write:
            yield


def open_window():
    """Open the window, or warn and return False.

    A child process tries first: Qt ends a process that has no display.
    """
    opens = False
    # -P: not a cv2.py of the current folder
    trial = [sys.executable, "-P", "-c", "import cv2; cv2.namedWindow('trial'); cv2.waitKey(1)"]
    with contextlib.suppress(subprocess.TimeoutExpired):
        done = subprocess.run(trial, capture_output=True, timeout=60, check=False)
        opens = done.returncode == 0
    if opens:
        cv2.namedWindow(TITLE, cv2.WINDOW_NORMAL | cv2.WINDOW_KEEPRATIO | cv2.WINDOW_GUI_NORMAL)
    else:
        reason = "no display, or a headless OpenCV"
        utils.warn(f"no window can be opened ({reason}): going on as with --no-display")
    return opens


def wait_for_key(milliseconds):
    """Let the window live. Returns (the key pressed, a small letter; whether it is to end)."""
    # the low byte of an arrow's code is a Q or S
    key = chr(cv2.waitKeyEx(max(1, milliseconds)) & 0xFFFF).lower()
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


def write_picture(path, image, _=0.0):
    """Write a PIL image as PNG or JPEG, whole or not at all."""
    with utils.atomic_write(path) as part:
        image.save(part, quality=95, subsampling=0)


class FilmWriter:
    """Adds pictures to a film, and keeps their times. All have the size of the first one."""

    def __init__(self, film, ending, rate):
        self.film, self.ending, self.rate = film, ending, rate
        self.stream, self.ticks = None, -1
        self.previous = self.clock = 0.0  # timestamp of the last picture, and when it is shown

    def write(self, image, timestamp):
        """Add a PIL image; one that comes before the next tick of an .avi is dropped."""
        import av

        self.stream = self.stream or add_stream(self.film, self.ending, self.rate, image.size)
        frame = av.VideoFrame.from_image(
            ImageOps.pad(image, (self.stream.width, self.stream.height))
        )
        self.clock += min(timestamp - self.previous, MAX_FRAME_GAP)
        self.previous = timestamp
        frame.time_base = self.stream.codec_context.time_base
        frame.pts = round(self.clock / frame.time_base)
        if frame.pts > self.ticks:
            self.ticks = frame.pts
            self.film.mux(self.stream.encode(frame))

    def close(self):
        """Add what the encoder still holds."""
        self.film.mux(self.stream.encode(None) if self.stream else ())


@contextlib.contextmanager
def film_output(path, rate):
    """Give a function that adds (PIL image, timestamp) to a film.

    The film appears whole at the end: also after Ctrl-C and lost sources. rate: of an .avi.
    """
    import av

    stop = writer = None
    problem = f"--output {utils.escape(path)}: could not be written: free some space"
    with utils.atomic_write(path) as part:
        try:
            with av.open(str(part.resolve()), "w") as film:
                writer = FilmWriter(film, path.suffix.lower(), rate)
                with contextlib.closing(writer):
                    yield writer.write
        except av.error.FFmpegError as error:
            raise utils.UserError(f"{problem} ({utils.first_line(error)})") from None
        except (KeyboardInterrupt, Exception) as error:  # out of memory, say
            stop = error
        if not (writer and writer.stream):
            raise stop or utils.UserError(problem)
    if stop:
        raise stop


def add_stream(film, ending, rate, size):
    """Add a stream for pictures of a size to a film that is written. Returns it."""
    codec, pixels = FILMS[ending]
    rate = fractions.Fraction(rate).limit_denominator(1001)
    stream = film.add_stream(codec, rate=rate)
    stream.codec_context.time_base = 1 / fractions.Fraction(rate if ending == ".avi" else 90_000)
    stream.width, stream.height = (max(2, side - side % 2) for side in size)
    stream.pix_fmt = pixels
    stream.options = {"preset": "veryfast", "crf": "20", "bf": "0"}
    return stream


# ---------------------------------------------------------------- films and pictures


class PlaybackClock:
    """Says how long to wait for a frame of a film; a pause, or slow work, stops the clock."""

    def __init__(self):
        self.start, self.previous = time.monotonic(), 0.0

    def left(self, timestamp):
        """Return the seconds until a frame is due."""
        latest = time.monotonic() - timestamp
        jumps = timestamp > self.previous + MAX_FRAME_GAP
        self.start = latest if jumps else max(self.start, latest)
        self.previous = timestamp
        return self.start - latest


def tag_files(source, tagger, viewer):
    """Handle all pictures and films in turn. Broken ones in a folder are warned about."""

    def load(path):  # pictures are read ahead; films are read where their turn comes
        return (None, "") if path in source.films else load_picture(path)

    loaded = utils.ordered_parallel_map(load, source.files, min(4, utils.cores()))
    if source.kind == "folder":
        loaded = utils.progress(loaded, len(source.files), "files")
    for (frame, note), path in zip(loaded, source.files):
        ends, name = False, utils.escape(path)
        try:
            if path in source.films:
                ends = tag_film(path, source, tagger, viewer)
            elif frame:
                ends = tag_picture(frame, source, tagger, viewer)
        except FilmError as error:
            if source.kind == "film":
                raise utils.UserError(f"--source {name}: {error}: give another file") from None
            note = f"skipped: {error}"
        if note:
            utils.warn(f"{name}: {note}")
        if ends:
            break
    if not viewer.count:
        name = f"--source {utils.escape(source.name)}"
        raise utils.UserError(f"{name}: no picture or film in it can be read: give another one")


def tag_picture(frame, source, tagger, viewer):
    """Handle a picture: no tracks and no running mean. Returns whether the user wants to end."""
    tagger.start(source.shown(frame.path))
    if tagger.args.events:
        del tagger.sinks[0]  # nobody comes or goes
    tagger.handle(frame)
    tagger.statistics.labels.update(track.label or "faces" for track in tagger.tracks)
    output = output_path(frame.path, source, tagger.args.output)
    viewer.write = functools.partial(write_picture, output) if output else None
    viewer.paused = source.kind == "picture"  # a single one stays until a key says go on or end
    return viewer.show(frame, tagger.tracks)


def tag_film(path, source, tagger, viewer):
    """Handle a film frame by frame, nothing dropped, so that two runs print the same lines.

    Returns whether the user wants to end. Raises FilmError.
    """
    tagger.start(source.shown(path), run_name("film", path))
    output, clock = output_path(path, source, tagger.args.output), PlaybackClock()
    with contextlib.closing(Film(str(path.resolve()), utils.escape(path))) as film:
        frames = film.frames()
        if source.kind == "film" and film.total and not viewer.window:
            frames = utils.progress(frames, film.total, "frames")
        if film.has_sound and output:
            warn_once("the sound of a film is not written to --output")
        with viewer.writing(output, film.rate), contextlib.closing(tagger):
            for frame in frames:
                tagger.handle(frame)
                if viewer.show(frame, tagger.tracks, clock.left(frame.timestamp)):
                    return True
    return False


@functools.cache
def warn_once(text):
    """Warn, however often it is called."""
    utils.warn(text)


def output_path(path, source, output):
    """Return where a tagged picture or film goes: `output`, the same place below it, None."""
    if not output or source.kind != "folder":
        return output
    target = output / path.relative_to(source.name)
    endings, ending = (FILMS, ".mp4") if path in source.films else (PICTURES, ".jpg")
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
    live = Live(source, viewer.stop)
    tagger.start(run=run_name(source.kind, source.name))
    pool = ThreadPoolExecutor(2)
    # macOS asks for permission in the main thread only
    images = live.open() if source.kind == "camera" else None
    reader = pool.submit(live.read, images)
    worker = pool.submit(work_live, live, tagger, viewer)
    try:
        with viewer.writing(tagger.args.output, LIVE_FPS):
            for frame in live.frames(viewer.keep_alive):
                if viewer.show(frame, tagger.tracks):
                    break
            else:
                wait([worker])  # the last frame counts, too
    finally:
        viewer.stop.set()
        wait([worker])  # it ends after the frame at hand; nothing is printed or saved after that
        wait([reader], 0.4)  # it may hang in a dead stream
        pool.shutdown(wait=False)
        tagger.close()
    worker.result()
    if reader.done():
        reader.result()


def work_live(live, tagger, viewer):
    """Thread: handle the newest frame, again and again. A camera's first has the model loaded."""
    try:
        for frame in live.frames():
            # only now: where no camera is, this is told at once
            if tagger.args.model and not tagger.labeller.network:
                tagger.labeller.load()
            elif not viewer.paused:
                tagger.handle(frame)
    except BaseException:
        viewer.stop.set()
        raise


# ---------------------------------------------------------------- the end


def print_summary(tagger, viewer):
    """Print on stderr how it went, what was kept, and what to do where nothing was found."""
    counts, lines, seconds = tagger.statistics.counts, [], time.monotonic() - viewer.first
    if counts["frames"]:
        lines.append(film_summary(tagger.statistics, viewer.count / max(seconds, 1e-6)))
    if counts["photos"]:
        lines.append(photo_summary(tagger.statistics, seconds))
    if not counts["tagged"] and tagger.cascade:
        lines.append(smaller_face(tagger))
    if tagger.args.save_faces:
        reasons = ["too blurred", "too similar", "too small"]
        reasons += [key for key in counts if key.startswith("pictures")]
        left_out = ", ".join(f"{counts[reason]} {reason}" for reason in reasons)
        folder = utils.escape(tagger.args.save_faces)
        lines += [f"{counts['saved']} saved in {folder}; {left_out}", next_step(tagger)]
    print(*lines, sep="\n", file=sys.stderr)


def film_summary(statistics, rate):
    """Return frames, speed, and the medians of what was timed."""
    counts, times = statistics.counts, statistics.times
    parts = [f"{counts['frames']} frames, {rate:.1f} a second shown"]
    parts[0] += f", {counts['classifications']} classifications"
    units = {"detection": (1, "ms"), "classification": (1, "ms"), "label age": (2, "s")}
    for key, (digits, unit) in units.items():
        if times[key]:
            parts.append(f"median {key} {np.median(times[key]):.{digits}f} {unit}")
    return "; ".join(parts)


def photo_summary(statistics, seconds):
    """Return the photos, how many of each label, and the speed."""
    labels, count = statistics.labels, statistics.counts["photos"]
    order = sorted(labels, key=lambda label: (label == "unknown", -labels[label], label))
    found = ", ".join(f"{labels[label]} {label}" for label in order) or "nothing tagged"
    return f"{count} photo{'s' * (count != 1)}: {found}; {count / seconds:.1f} a second"


def smaller_face(tagger):
    """Search the sample frames for faces of any size; say what would have found the smallest."""
    samples, sides = tagger.statistics.samples, []
    search = detect_with_flip if tagger.statistics.counts["photos"] else detect
    for grey, scale, smallest in samples:
        for box, neighbors in search(tagger.cascade, grey, scale, 24 / scale):
            if neighbors >= MIN_NEIGHBORS_START and box[2] < smallest:
                sides.append(box[2])
    most = max(smallest for _, _, smallest in samples)
    text = f"nothing was tagged: no face of {most} px or larger was found"
    if not sides:
        return f"{text}, and no smaller one"
    option = f"--min-face {max(24, int(0.9 * min(sides)))}"
    return f"{text}; the smallest there has {min(sides)} px: {option} would find it"


def next_step(tagger):
    """Return what to do with the crops: correct them, collect another class, or train."""
    args, folder = tagger.args, tagger.args.save_faces
    if tagger.labeller.network:
        todo = "look through it, correct it, copy it into your training set, and train on that"
        return f"next: {todo}: python train.py TRAINING_SET {shlex.quote(utils.escape(args.model))}"
    data = folder.parent
    folders = list(data.iterdir()) if data.is_dir() else []
    classes = [path for path in folders if path.is_dir() and not utils.is_ignored(path.name)]
    if len(classes) < 2 or data == Path():  # the current folder may hold anything
        whole = " --whole-picture" if args.whole_picture else ""
        another = shlex.quote(utils.escape(data / "ANOTHER_NAME"))
        return f"next: python webcam.py --save-faces {another}{whole}"
    return f"next: python train.py {shlex.quote(utils.escape(data))} model"


def check_arguments(args, source):
    """Check all that can be checked before any work, and settle what is left to the model."""
    if args.by_name and source.kind != "folder":
        raise utils.UsageError(f"--source {utils.escape(source.name)}: --by-name takes a folder")
    for option, path in (("--output", args.output), ("--save-faces", args.save_faces)):
        if path:
            check_output(option, path, source)
    if args.events and not source.films and source.kind not in LIVE:
        raise utils.UserError("--events: there is no film in the source: leave it out")
    if args.model:
        args.model = model_prefix(args.model)
        info = model.check_model(args.model)
        if args.whole_picture is None:  # as the model was trained
            args.whole_picture = info.get("face_crops", 1.0) < 0.5


def main():
    """Read the command line, tag or collect what the source shows, and sum it up."""
    args = parse_arguments()
    source = find_source(args.source)
    check_arguments(args, source)
    if args.by_name:
        import regions

        return regions.save_named_faces(source.files, args.save_faces, args.context)
    tagger = Tagger(args, source)
    if args.model and source.kind != "camera":  # a camera is shown while the model is loaded
        tagger.labeller.load()
    viewer = Viewer(args, tagger.labeller, tagger.statistics)
    if not args.events:
        utils.print_line("\t".join(source.columns()))
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
