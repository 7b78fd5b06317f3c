"""What --source names, and the frames that come from it (webcam.py)."""

import contextlib
import io
import itertools
import os
import re
import sys
import time
import urllib.parse
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

import films
import imaging
import utils

# OpenCV reads these when it is imported: no chatter, and cameras on Windows that open at once.
os.environ.setdefault("OPENCV_LOG_LEVEL", "SILENT")
os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")
os.environ.setdefault("QT_LOGGING_RULES", "*=false")
os.environ.setdefault("OPENCV_VIDEOIO_MSMF_ENABLE_HW_TRANSFORMS", "0")
import cv2

if not hasattr(cv2, "CascadeClassifier"):
    advice = 'run `pip install "opencv-python<5"`'
    sys.exit(f"error: OpenCV {cv2.__version__} has no face detector: {advice}")

FILM_ENDINGS = """
    .mp4 .m4v .mov .qt .avi .divx .mkv .webm .mpg .mpeg .mpe .m1v .m2v .vob .mod .ts .mts .m2ts .tod
    .trp .wmv .asf .flv .f4v .3gp .3g2 .ogv .ogm .rm .rmvb .dv .mxf .nut .mjpeg .mjpg .y4m .h264
    .264 .h265 .265 .hevc .lrv .insv .360 .mp
""".split()
LIVE = ("camera", "stream")
RECONNECT_DELAYS = (1, 2, 4)  # seconds before a lost camera or stream is tried again
READ_TIMEOUT = 2.0  # seconds for which a camera may give no frame, at its start above all
CAMERAS = 5  # numbers tried where the wanted camera does not open
CAMERA_ADVICE = {  # what to do where no picture comes
    "camera": "is it connected, used by another program, or forbidden by the privacy settings?",
    "stream": "check address, user and password",
}


@dataclass
class Frame:
    """One frame of a source, or one picture."""

    index: int  # counts what the source gives, not what is handled: intervals in frames rest on it
    timestamp: float  # seconds from the start
    image: np.ndarray  # uint8 RGB (height, width, 3), upright, of square pixels
    path: Path | None = None  # of a picture's file
    files: dict = field(default_factory=dict)  # {box: bytes of a JPEG file}

    def crop_face(self, box, context):
        """Return the square of `context` boxes around a face; None: the whole frame."""
        if not context:
            return self.image
        x, y, w, h = box
        return imaging.crop_square(self.image, x + w / 2, y + h / 2, context * w)

    def encode_crop(self, box, context):
        """Return the crop as the bytes of a JPEG file; of a whole picture its own file."""
        if self.path and not context:
            return self.path.read_bytes()
        if box not in self.files:  # to be classified and saved
            file = io.BytesIO()
            imaging.save_jpeg(file, self.crop_face(box, context))
            self.files[box] = file.getvalue()
        return self.files[box]


# ---------------------------------------------------------------- what is typed → source


@dataclass
class Source:
    """What --source names."""

    kind: str  # camera, stream, folder, film or picture
    name: str  # number, address or path
    title: str = ""  # what messages call it, never with a password
    files: list = ()  # paths
    films: set = ()  # those of them that are films


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
    path = Path(text)
    title = f"--source {utils.escape(text)}"
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
    reason = "not a file" if path.exists() else "no such file"
    try:
        if path.is_file():
            if path.suffix.lower() in FILM_ENDINGS:  # as in a folder
                return True
            _, image = imaging.read_picture(path)
            return imaging.is_animated(image, ("GIF", "PNG"))
    except imaging.RefusedError as error:  # FFmpeg would read some of these
        reason = error
    except imaging.PictureError:
        return True
    raise utils.UserError(
        f"--source {utils.escape(path)}: {reason}: give a camera number, file, folder or address"
    )


# ---------------------------------------------------------------- films and pictures → frames


def load_picture(path):
    """Read a picture in full, upright. Returns its Frame; the PictureError if it is broken."""
    try:
        _, image = imaging.read_picture(path)
        return Frame(0, 0.0, np.asarray(imaging.upright(image)), path)
    except imaging.PictureError as error:
        return error


class PlaybackClock:
    """Says when a frame of a film is due; a pause, or slow work, stops the clock."""

    def __init__(self):
        self.due, self.previous = time.monotonic(), 0.0

    def seconds_until(self, timestamp):
        """Return the seconds until the frame of this timestamp is due."""
        now = time.monotonic()
        self.due = max(now, self.due + min(timestamp - self.previous, films.MAX_FRAME_GAP))
        self.previous = timestamp
        return self.due - now


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
            problem = f"no picture comes from it{others}: {CAMERA_ADVICE[source.kind]}"
            raise utils.UserError(f"{source.title}: {problem}")
        if tries == len(RECONNECT_DELAYS):
            problem = f"lost, and {tries} tries did not bring it back: check it"
            raise utils.UserError(f"{source.title}: {problem}")
        utils.warn(f"{source.title}: lost: trying again in {RECONNECT_DELAYS[tries]} s")
        stop.wait(RECONNECT_DELAYS[tries])
        tries += 1


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
