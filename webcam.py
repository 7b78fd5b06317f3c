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
import sources
import tracker

# isort: split
import argparse
import collections
import contextlib
import datetime
import functools
import hashlib
import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, ImageDraw

# ---------------------------------------------------------------- settings

CLASSIFY_EVERY = 8  # frames of the source between two classifications of a track
AVERAGE_WINDOW = 5  # classifications in the running mean
MAX_BATCH = 8  # faces classified at once
AGREEING = 3  # classifications with one label until --events reports somebody: 0.64 s at 25 fps
LEFT_AFTER = 3.0  # seconds out of sight after which somebody has left

PICTURES = (".png", ".jpg", ".jpeg")
LIVE_FPS = 30  # of the .avi that --output makes of a camera or stream
TITLE = "webcam"
WINDOW = (1280, 800)  # largest size in which the window opens

KEPT_A_SECOND = 5  # crops kept of each track
MIN_CROP = 75  # pixels: the smallest network takes so many
SHARP_SIDE = 64  # pixels to which a face is brought before its sharpness is measured
MIN_SHARPNESS = 50.0  # variance of the Laplacian: sharp faces have 90 or more, blurred ones 25
THUMBNAIL = 32  # pixels at which crops are compared
MIN_DIFFERENCE = 2.5  # mean difference of grey levels between two crops kept


# ---------------------------------------------------------------- arguments


def parse_arguments(argv=None):
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description="Tag faces live, in films, streams and pictures; or collect them as a training "
        "set. Keys: q or Esc ends, s saves a snapshot, space pauses.",
        epilog="example: python webcam.py model --source party.mp4 --output tagged.mp4",
    )
    option = parser.add_argument  # each option stands in README.md too, and its help has a default
    option("model", nargs="?",
           help="prefix of a trained model (default: none, with --save-faces only)")  # fmt: skip
    option("--source", default="0", metavar="S", help="camera number, film, stream address, "
           "picture or folder of films and pictures (default: %(default)s)")  # fmt: skip
    option("--output", type=utils.to_path, metavar="FILE", help="write what is shown: .mp4 or "
           ".avi; .png or .jpg; a folder for a folder (default: none)")  # fmt: skip
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
    option("--save-faces", type=utils.to_path, metavar="DIR", help="keep crops: in DIR/<label>/ "
           "with a model, in DIR/ without (default: none)")  # fmt: skip
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


def check_arguments(args, source):
    """Check all that can be checked before any work, and settle what is left to the model."""
    if args.by_name and source.kind != "folder":
        raise utils.UsageError(f"{source.title}: --by-name takes a folder")
    for option, path in (("--output", args.output), ("--save-faces", args.save_faces)):
        if path:
            check_output(option, path, source)
    if args.events and not source.films and source.kind not in sources.LIVE:
        raise utils.UserError("--events: there is no film in the source: leave it out")
    if args.model:
        args.model = model.prefix_of(args.model)
        info = model.check_model(args.model)
        if args.whole_picture is None:  # as the model was trained
            args.whole_picture = not model.looks_at_faces(info)
        if args.threshold is None:
            args.threshold = info["threshold"]
    if args.whole_picture:
        args.context = None
    elif not args.by_name:
        imaging.load_cascade()  # is it there?


def check_output(option, path, source):
    """Raise UserError where --output or --save-faces cannot be; warn where a file is replaced."""
    kind = source.kind
    problem = None
    what = "is"
    is_mirror = kind == "folder" and option == "--output"
    endings = PICTURES if kind == "picture" else films.CODECS
    if kind not in sources.LIVE and utils.is_inside(path, Path(source.name)):
        problem = "is or lies in the source: choose another place"
    elif is_mirror and path.is_dir() and utils.is_inside(Path(source.name), path):
        problem = "holds the source, which it could replace: choose another place"
    elif kind == "folder" or option == "--save-faces":
        what = "files of the same names in it are"
        is_named_so = path.suffix.lower() in (*films.CODECS, *PICTURES)
        if path.is_file() or (is_named_so and not path.is_dir()):
            problem = "is a file, or named like one: give a folder"
    elif path.suffix.lower() not in endings:
        problem = f"wrong ending for a {kind}: give a name with {' or '.join(endings)}"
    elif path.is_dir() or not path.parent.is_dir():
        problem = "is a folder, or lies in none: choose another place"
    if problem:
        raise utils.UserError(f"{option} {utils.escape(path)}: {problem}")
    if option == "--output" and path.exists():
        utils.warn(f"{utils.escape(path)}: {what} replaced")


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
        size = min(MAX_BATCH, 1 << (len(tracks) - 1).bit_length())
        for track, answer in zip(tracks, model.predict(self.network, inputs, size)):
            track.classifications += 1
            step = (answer - track.mean) / min(track.classifications, AVERAGE_WINDOW)
            track.mean = track.mean + step


def assign_labels(tracks, labels, threshold):
    """Give each track a label: its best class, or `unknown`.

    It is unknown below the threshold, or if a more probable track has the same class; never with a
    threshold of 0.
    """
    taken = set()
    for track in sorted(tracks, key=lambda track: -track.mean.max()):
        track.best, track.probability = labels[track.mean.argmax()], float(track.mean.max())
        refused = threshold > 0 and (track.probability < threshold or track.best in taken)
        label = utils.UNKNOWN if refused else track.best
        taken.add(label)
        if label != track.label:
            track.label, track.agreeing = label, 0


class Tagger:
    """Does all that is done with a frame: finds and labels its faces, prints and saves them."""

    def __init__(self, args, source):
        self.args, self.source = args, source
        self.labeller = Labeller(args, source.kind in sources.LIVE)
        # what the summary tells
        self.counts = collections.Counter()
        self.begun = None  # when the first frame was handled
        self.labels = collections.Counter()  # of photos
        self.crops = collections.Counter(saved=0)
        self.times = collections.defaultdict(lambda: collections.deque(maxlen=10**5))
        # (grey frame, its scale, smallest face looked for): searched again if nothing was tagged
        self.samples = collections.deque(maxlen=4)

    @contextlib.contextmanager
    def session(self, path=None):
        """While the block runs, `handle` is about this film or picture, or the camera or stream."""
        self.tracker = tracker.Tracker(not self.args.context, self.args.min_face)
        several = self.source.kind == "folder"
        name = path.relative_to(self.source.name).as_posix() if several else path
        self.file = utils.escape(name or "")
        self.run = run_name(self.source, path)
        with contextlib.closing(EventWriter(self.file if several else "")) as self.events:
            yield

    def handle(self, frame):
        """Find, label, print and save the faces of a Frame. The first call loads the model."""
        self.labeller.load()
        start = time.perf_counter()
        counts = self.counts
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
            self.labels.update(track.label for track in tracks)

    def keep_sample(self, frame):
        """Keep the 1st, 2nd, 4th, 8th… frame until a face is found: smaller ones may be in them."""
        count = self.counts["frames"] + self.counts["photos"] + 1
        if not self.counts["tagged"] and count & (count - 1) == 0:
            sample = tracker.shrink(frame.image, frame.image.shape[0] / 20)
            self.samples.append((*sample, self.tracker.smallest))


# ---------------------------------------------------------------- labels → lines and events


def columns(source):
    """Return the names of the columns of a source's lines."""
    file = "file " if source.kind in ("folder", "picture") else ""
    place = "frame time track" if source.films or source.kind in sources.LIVE else "face"
    return f"{file}{place} x y w h label probability best".split()


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
        """Print the events of a frame. tracks: all that are followed, or somebody never leaves."""
        for track in tracks:
            if track.agreeing < AGREEING or track.reported[:1] == (track.label,):
                continue
            self.leave([one for one in self.present if one is track])  # it has a new label
            lost = [one for one in self.present if one not in tracks]
            same = [one for one in lost if one.reported[0] == track.label]
            since = same[0].reported[2] if same else track.since
            track.reported = track.label, track.probability, since
            if same:  # somebody who was lost for a moment
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
        label, probability, since = track.reported
        cells = self.file | {
            "event": event,
            "time": round(timestamp, 6),
            "track": track.id,
            "label": label or None,
            "probability": round(probability, 6) if label else None,
            "seconds": round(timestamp - since, 6),
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
    for track in tracks:
        due = frame.timestamp - track.kept_at >= 1 / KEPT_A_SECOND - 1e-6
        if due and track.seen == frame.timestamp:
            verdict = "saved" if frame.path else judge_crop(frame, track, args.context)
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
    font = report.load_font(text, size)
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
        """Show and write a Frame; left: seconds until it is due."""
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
        self.image = image
        shown = image.copy()
        if text := self.status():
            size = round(0.8 * text_size(image))
            draw_label(shown, image.width, size // 3, size, (0, 0, 0, 130), text)
        cv2.imshow(TITLE, cv2.cvtColor(np.asarray(shown), cv2.COLOR_RGB2BGR))

    def wait(self, seconds):
        """Let the window live, for so long and while it is paused, and obey the keys."""
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

    rate: frames a second; the times of an .avi are multiples of its inverse.
    """
    if not path or path.suffix.lower() in PICTURES:
        yield path and functools.partial(write_picture, path)
        return
    with contextlib.closing(films.write_film(path, rate)) as film:
        next(film)
        try:
            yield lambda *picture: film.send(picture)
        except Exception as error:  # no Ctrl-C: then what was written stays
            film.throw(error)


# ---------------------------------------------------------------- films and pictures

warn_once = functools.cache(utils.warn)


def tag_files(source, tagger, viewer):
    """Handle all pictures and films in turn. Broken ones in a folder are warned about."""

    def load(path):  # pictures are read ahead; films are read where their turn comes
        return None if path in source.films else sources.load_picture(path)

    pictures = utils.ordered_parallel_map(load, source.files, imaging.THREADS)
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
    """Handle a picture, or a film frame by frame.

    picture: its Frame, or the PictureError that reading it gave, which is raised here.
    """
    if isinstance(picture, imaging.PictureError):
        raise picture
    source = tagger.source
    clock = sources.PlaybackClock()
    output = output_path(path, source, tagger.args.output)
    rate, frames = None, [picture]
    if path in source.films:
        film = films.Film(str(path.resolve()), utils.escape(path))
        rate = film.rate
        frames = (sources.Frame(n, *timed) for n, timed in enumerate(film.frames()))
        if film.container.streams.audio and output:
            shown = utils.escape(tagger.args.output)
            warn_once(f"--output {shown}: the sound of a film is not written")
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
    pool = ThreadPoolExecutor(2)
    stop = viewer.stop
    # macOS asks for permission in the main thread only
    opened = sources.open_live(source) if source.kind == "camera" else None
    newest = collections.deque([None], 1)

    def work():
        """Thread: handle the newest frame, again and again."""
        for frame in sources.newest_frames(newest, stop, [reader]):
            if not viewer.paused:
                tagger.handle(frame)

    with tagger.session(), open_output(tagger.args.output, LIVE_FPS) as viewer.write:
        reader = pool.submit(newest.extend, sources.live_frames(source, stop, opened))
        worker = pool.submit(work)
        try:
            for frame in sources.newest_frames(newest, stop, [reader, worker], viewer.wait):
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
    if counts["frames"]:
        lines.append(film_summary(tagger, viewer.count / (time.perf_counter() - viewer.first)))
    if counts["photos"]:
        order = sorted(tagger.labels.most_common(), key=lambda pair: pair[0] == utils.UNKNOWN)
        named = [f"{n} {label}" if label else utils.count(n, "face") for label, n in order]
        found = ", ".join(named) or "nothing tagged"
        photos = utils.count(counts["photos"], "photo")
        rate = counts["photos"] / (time.perf_counter() - tagger.begun)
        lines.append(f"{photos}: {found}; {rate:.1f} a second")
    if not counts["tagged"] and tagger.samples:
        lines.append(smaller_face(tagger))
    if args.save_faces:
        crops = ", ".join(f"{number} {verdict}" for verdict, number in tagger.crops.items())
        lines.append(f"{utils.escape(args.save_faces)}: {crops}")
        if tagger.crops["saved"]:
            lines.append(next_step(args, tagger.source))
    if lines:
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
        found = tracker.detect_with_flip(grey, scale, 24 / scale)
        sides += [
            box[2] for box, n in found if n >= tracker.MIN_NEIGHBORS_START and box[2] < smallest
        ]
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
    grouped = " --group-by-folder" if source.films or source.kind in sources.LIVE else ""
    train = f"python train.py {data} model{grouped}"
    return f"next: the same for the other classes, beside it, then {train}"


def main():
    """Read the command line, tag or collect what the source shows, and sum it up."""
    args = parse_arguments()
    for name in ("SIGTERM", "SIGHUP"):  # a film is kept, as after Ctrl-C
        number = getattr(signal, name, None)  # Windows has no SIGHUP
        if number and signal.getsignal(number) == signal.SIG_DFL:
            signal.signal(number, utils.interrupt)
    source = sources.find_source(args.source)
    check_arguments(args, source)
    if args.by_name:
        import regions

        return regions.save_named_faces(source.files, args.save_faces, args.context)
    tagger = Tagger(args, source)
    # A camera and a film load the model with their first frame. Elsewhere threads read ahead: what
    # they warn of would be lost, since loading silences stderr.
    if source.kind not in ("camera", "film"):
        tagger.labeller.load()
    viewer = Viewer(tagger)
    if not args.events:
        utils.print_line("\t".join(columns(source)))
    try:
        tag = tag_live if source.kind in sources.LIVE else tag_files
        tag(source, tagger, viewer)
    except BrokenPipeError:
        if args.output:  # exit code 0 would say that it is there
            problem = "stopped, since nobody reads what is printed any more"
            raise utils.UserError(f"--output {utils.escape(args.output)}: {problem}") from None
        raise
    finally:
        if viewer.count:
            print_summary(tagger, viewer)


if __name__ == "__main__":
    try:
        utils.run(main)
    except SystemExit as end:  # all is written; TensorFlow would take another second to tidy up
        sys.stdout.flush()
        os._exit(end.code)
