"""What train.py, webcam.py and collect_apple_photos.py share.

Reading pictures, cutting squares around faces, names from outside, messages and files,
the network and its three files, and the drawing of mosaic and report.
"""

import argparse
import collections
import contextlib
import csv
import errno
import functools
import hashlib
import io
import json
import logging
import mmap
import os
import re
import sqlite3
import stat
import struct
import sys
import threading
import time
import unicodedata
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

INSTALL = "run `pip install -r requirements.txt` in the folder of this script"
if not (3, 11) <= sys.version_info[:2] <= (3, 13):
    sys.exit(
        f"error: this is Python {sys.version_info[0]}.{sys.version_info[1]}: "
        "install Python 3.11, 3.12 or 3.13, which TensorFlow and Keras have packages for"
    )
# Pillow keeps so many blocks of 16 MB for the next picture: else threads wait for each other in the system's memory
# calls, and two decode no faster than one. Eight hold a picture of 12 megapixels twice, before and after turning.
os.environ.setdefault("PILLOW_BLOCKS_MAX", str(8 * (os.cpu_count() or 1)))
try:
    import numpy as np
    import pillow_heif
    import tqdm
    from PIL import Image, ImageDraw, ImageFont, ImageOps
    from PIL.PngImagePlugin import PngInfo
except ImportError as absent:
    sys.exit(f"error: {absent}: {INSTALL}")

# Rarely used parsers are where the holes are: only these, of those that Pillow knows, are ever tried.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "HEIF", "AVIF")  # a new one: think of refuse_traps
MAX_PIXELS = 178_956_970  # pictures above it are bombs or maps, and take over 2 GB to decode and turn
# Files made to keep a decoder busy for minutes, or to fill the memory, take more than these:
MAX_SLOW = {"ppm": 8e6, "ppm_plain": 8e6, "bmp_rle": 4e7}  # pixels for decoders that are written in Python
MAX_COMMENTS = 1_000  # in such a PPM
MAX_SCANNED = 2e10  # pixels times scans of a progressive JPEG
MAX_STRIPS = 65_536  # of a TIFF, or tiles
MAX_ANIMATED = 6e7  # pixels of an animated WebP or AVIF, whose decoder keeps several frames
MAX_FILE = (16, 2**26)  # bytes: so many a pixel, and as many beside; what has more of these may be a film
STRIPE = 2**20  # pixels that are computed with at once

SKIPPED_NAMES = {"thumbs.db", "desktop.ini", "__macosx"}  # what systems leave in folders, lower case
RESERVED_NAMES = {"con", "prn", "aux", "nul"} | {f"{p}{n}" for p in ("com", "lpt") for n in "123456789"}

CHILD = "FINETUNING_KIT_CHILD"  # set in processes of a run on several machines
OUT_OF_MEMORY = re.compile("^ResourceExhaustedError|RESOURCE_EXHAUSTED")  # as TensorFlow and JAX say it
KIT = "finetuning-kit"  # named in the pictures that are ours to remove
ATTRIBUTE = "kit"  # of the root of model.h5: what travels with the model, as JSON
BASE_PARAMETERS = 21_802_784  # numbers in InceptionV3 without its top
LAYOUT = 16  # about so many blocks a side make the layout of a picture
MAX_CLASSES = 10_000
MAX_LABEL = 255  # characters
MAX_LABELS = 1_500_000  # all of them as JSON; MAX_TEXTS allows as many characters for each layer
CLASSES = {
    *("Functional", "InputLayer", "Rescaling", "Conv2D", "BatchNormalization", "Activation", "Concatenate"),
    *("AveragePooling2D", "MaxPooling2D", "GlobalAveragePooling2D", "Dense", "DTypePolicy", "GlorotUniform"),
    *("Flatten", "LayerNormalization", "Zeros", "Ones", "__keras_tensor__"),
}  # all that a model.json of ours names
MAX_JSON = 4_000_000  # bytes; a real model.json has 300,000
MAX_ITEMS = 5_000  # groups and arrays in a file of weights; real ones have 900
HEAP = re.compile(rb"GCOL\x01(?=...(.{4}))", re.S)  # begins a piece of an HDF5 file that holds texts; its size
MAX_TEXTS = 2**29  # bytes of one attribute, whose texts may all be one and the same long one; real ones take 1e8

TURNED = 8  # length of a class name that is turned by a quarter, in font sizes
MOSAIC_CLASSES = 40  # more would leave thumbnails too small to recognise
BLUE, ORANGE = ("#0072b2", "#deebf5"), ("#d55e00", "#fae3d5")  # right and wrong, strong and pale: told apart by all
INK, GREY, LINE = "#222222", "#666666", "#e4e4e4"

Image.MAX_IMAGE_PIXELS = MAX_PIXELS
pillow_heif.register_heif_opener()
JITTING = threading.Lock()  # functools.cache lets two threads make the same thing twice
tqdm.tqdm.set_lock(threading.RLock())  # its own is a semaphore too, which a Ctrl-C at the wrong moment leaves locked
warnings.filterwarnings("ignore", module="PIL")  # remarks on metadata that is not used


# ---------------------------------------------------------------- messages


class UserError(Exception):
    """Something a user can mend: one line that names the file or option and says what to do."""


class PictureError(Exception):
    """A file that gives no picture; the text is the reason, without the file's name."""


class RefusedError(PictureError):
    """A file that cannot be read, or that holds a picture too large or too slow to be decoded: no film either."""


def say(text):
    """Print one line on stdout at once, so that a program reading it never waits."""
    put = tqdm.tqdm.write if sys.stdout.isatty() else print  # on a terminal a progress bar makes room for the line
    put(text)
    sys.stdout.flush()


def warn(text):
    """Print one line on stderr that begins `warning: `."""
    tqdm.tqdm.write(f"warning: {text}", file=sys.stderr)


def escape(name):
    """Return `name` (str or path) with control characters, line breaks and lone surrogates as \\x escapes."""
    return "".join(c if is_shown(c) else c.encode("unicode_escape").decode() for c in str(name))


def is_shown(character):
    """Say whether a character is harmless on a terminal: printable, a wide space, or what joins or parts letters."""
    return character.isprintable() or unicodedata.category(character) == "Zs" or character in "\u200c\u200d"


def first_line(error):
    """Return the first line of what a library says about an error, escaped, and short enough for a line of ours."""
    return escape(str(error).partition("\n")[0] or type(error).__name__)[:200]


def csv_cell(name):
    """Return `name` escaped and, where a spreadsheet would take it for a formula, behind an apostrophe."""
    text = escape(name)
    return "'" + text if text[:1] in ("=", "+", "-", "@") else text


def advice(error):
    """Return one line for an OSError: what failed with which file, and what to do."""
    hints = {
        errno.ENOSPC: "free some space or choose another folder",
        errno.EDQUOT: "free some space or choose another folder",
        errno.EFBIG: "the file system or a limit of the shell allows no larger file; choose another folder",
        errno.EACCES: "check the permissions or choose another folder",
        errno.EPERM: "check the permissions or choose another folder",
        errno.EROFS: "choose a folder that can be written",
        errno.ENOENT: "check that the path is right and was not moved meanwhile",
        errno.EMFILE: "close other programs or raise `ulimit -n`",
    }
    file = error.filename if error.filename2 is None else error.filename2  # of a renaming, the name that people know
    name = f"{escape(file)}: " if file is not None else ""
    return f"{name}{error.strerror or error}: {hints.get(error.errno, 'check the disk and try again')}"


def missing(error):
    """Return one line for an ImportError: what is missing, and what to do."""
    if ".so" in str(error):  # OpenCV's, in a bare container
        return f"{error}: run `apt-get install libgl1 libglib2.0-0`, or what your system calls these packages"
    return f"{error}: {INSTALL}"


def explain(error):
    """Return one line for an exception that a user can do something about, None for a bug."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, OSError):
        return advice(error)
    if isinstance(error, ImportError):
        return missing(error)
    # TensorFlow and JAX have no class in common for it
    if isinstance(error, MemoryError) or OUT_OF_MEMORY.search(f"{type(error).__name__}: {error}"):
        return "out of memory: close other programs, or train with a smaller --batch-size or --image-size"
    return None


def run(main):
    """Call a script's `main()` and leave with its exit code.

    0 (or None) done, 1 an expected failure told in one line, 3 from the accuracy gate, 130 Ctrl-C.
    Text that leaves the process is UTF-8, save on a terminal, which gets escapes for what it lacks.
    """
    # None where it was closed, by `>&-` say
    sys.stdout, sys.stderr = (stream or open(os.devnull, "w") for stream in (sys.stdout, sys.stderr))
    for stream in (sys.stdout, sys.stderr):
        encoding = stream.encoding if stream.isatty() else "utf-8"
        stream.reconfigure(encoding=encoding, errors="backslashreplace")
    try:
        code = main() or 0
    except BrokenPipeError:  # the reader of our output, `head` say, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        code = 130
    except Exception as error:
        line = explain(error)
        if line is None:
            raise
        print(f"error: {line}", file=sys.stderr)
        code = 1
    sys.exit(code)


def progress(items, total, label):
    """Yield from `items`, showing on stderr how far it is and the time left.

    A bar on a terminal; elsewhere a plain line every ten seconds, so that a log stays short.
    """
    if sys.stderr.isatty():
        yield from tqdm.tqdm(items, desc=label, total=total, leave=False, file=sys.stderr, dynamic_ncols=True)
        return
    start = told = time.monotonic()
    for done, item in enumerate(items, 1):
        yield item
        now = time.monotonic()
        if now - told > 10 and done < total:
            told, left = now, (now - start) * (total - done) / done
            print(f"{label}: {done} of {total}, about {left:.0f} s left", file=sys.stderr, flush=True)


def number(kind, low, high):
    """Return an argparse type: an int or float (`kind`) from `low` to `high`."""

    def value(text):
        """Turn what was typed into a number in the range."""
        if not low <= kind(text) <= high:
            raise argparse.ArgumentTypeError(f"{text} is not between {low} and {high}")
        return kind(text)

    value.__name__ = kind.__name__  # argparse says: invalid int value
    return value


def cores():
    """Return how many processor cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def in_order(function, items, workers=None):
    """Yield function(item) for every item, in order, computed ahead in threads (Pillow and OpenCV run beside Python).

    Only a few results wait at a time, so memory stays flat. workers: threads, one a core if not given.
    """
    workers = workers or cores()
    pool, waiting = ThreadPoolExecutor(workers), collections.deque()
    try:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > 2 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


# ---------------------------------------------------------------- names and files


def folder_names(names, taken=()):
    """Return {name: folder name}: readable, safe on Linux, macOS and Windows, and distinct even there.

    NFC; separators and control characters become `_`; no leading dot, trailing dot or space; at most
    80 characters and 200 bytes; names that fall together by case or normalisation get ` (2)`, ` (3)`…
    `taken`: folder names that are in use already.
    """
    used, folders, last = {unicodedata.normalize("NFC", name).casefold() for name in taken}, {}, {}
    for name in sorted(set(names)):
        text = unicodedata.normalize("NFC", name)
        text = "".join("_" if c in '/\\:*?"<>|' or not is_shown(c) else c for c in text)[:80]
        text = text.encode()[:200].decode(errors="ignore").strip(" ").rstrip(". ")
        if text.startswith("."):
            text = "_" + text[1:]
        if not text or text.split(".")[0].rstrip().lower() in RESERVED_NAMES:
            text = "_" + text
        folder, number = text, last.get(text.casefold(), 1)
        while folder.casefold() in used:
            number += 1
            folder = f"{text} ({number})"
        last[text.casefold()] = number
        used.add(folder.casefold())
        folders[name] = folder
    return folders


def is_utf8(name):
    """Say whether a name is proper Unicode, and not bytes of another encoding, which Python passes on as surrogates."""
    return name.encode(errors="ignore").decode() == name


def is_inside(path, place):
    """Say whether `path` is or lies in what is at `place`, also where names differ only in case or spelling."""
    path = Path(os.path.realpath(path))
    return any(one.exists() and one.samefile(place) for one in (path, *path.parents))


def list_files(root):
    """Return the files below the folder `root`, any depth, sorted, as paths.

    Left out: dot files and dot folders, what systems leave behind, links that leave `root` or loop.
    A folder that is reached twice keeps its own name: links are followed last.
    """
    inside, found, seen = Path(root).resolve(), [], set()
    folders, links = [Path(root)] if Path(root).is_dir() else [], []
    while folders or links:
        folder = folders.pop() if folders else links.pop(0)
        real = folder.resolve()
        if real in seen or not real.is_relative_to(inside):
            continue
        seen.add(real)
        try:
            entries = sorted((e for e in os.scandir(folder) if not is_ignored(e.name)), key=lambda e: e.name)
        except OSError as error:
            warn(advice(error))
            continue
        for entry in entries:
            path = folder / entry.name
            with contextlib.suppress(OSError, RuntimeError):  # a link that leads to itself
                if entry.is_dir():
                    (links if entry.is_symlink() else folders).append(path)
                elif not entry.is_symlink() or path.resolve().is_relative_to(inside):
                    found.append(path)
    return sorted(found)


def is_ignored(name):
    """Say whether a file or folder name is one that people do not mean: hidden, or left by a system."""
    return name.startswith(".") or name.lower() in SKIPPED_NAMES


@contextlib.contextmanager
def only_run(path):
    """Hold a lock, the file `path`, while the block runs. A killed process holds it no more.

    Raises UserError if another run holds it. (SQLite's locks work alike on Linux, macOS and Windows; ours are empty. A
    database from somebody else could have it delete files.)
    """
    path = Path(path)
    foreign = path.is_symlink() or (path.exists() and not (path.is_file() and path.stat().st_size == 0))
    if foreign or any(os.path.lexists(f"{path}{end}") for end in ("-journal", "-wal", "-shm")):
        raise UserError(f"{escape(path)}: not a lock of this kit: delete it and what begins with its name")
    try:
        lock = sqlite3.connect(path, timeout=0, isolation_level=None)
        lock.execute("PRAGMA journal_mode = MEMORY")  # else a kill would leave a journal beside it
        lock.execute("BEGIN EXCLUSIVE")
    except sqlite3.Error as error:
        reason = "another run is at work here: wait for it or choose another name"
        if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY:
            reason = f"cannot be locked ({error}): choose a folder with a shorter path or on another disk"
        raise UserError(f"{escape(path)}: {reason}") from None
    try:
        yield
    finally:
        lock.close()
        with contextlib.suppress(OSError):  # somebody else may have opened it already
            path.unlink()


@contextlib.contextmanager
def whole_file(path):
    """Give a path beside `path` to write to, and rename it to `path` when the block ends without error."""
    path = Path(path)
    stem = path.stem if len(os.fsencode(path.stem)) <= 200 else path.stem[:50]  # a name has at most 255 bytes
    part = path.with_name(f".{stem}-unfinished-{os.urandom(4).hex()}{path.suffix}")
    open(part, "x").close()  # unlike mkstemp's, with the permissions that new files have here
    try:
        yield part
        with open(part, "rb+") as file:  # on the disk before its name is: a power cut leaves old or new
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def write_csv(path, header, rows):
    """Write a CSV file whole: `header` a list of names, `rows` lists of cells (strings are escaped)."""
    with whole_file(path) as part, open(part, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows([csv_cell(c) if isinstance(c, str) else c for c in row] for row in rows)


# ---------------------------------------------------------------- pictures


def read_picture(path):
    """Read a picture file. Returns (its bytes, a PIL image of which only the header has been read).

    Raises PictureError with the reason for whatever gives no picture, unreadable files included.
    """
    try:
        facts = path.stat()
        if not stat.S_ISREG(facts.st_mode):  # a named pipe would wait for ever
            raise PictureError("not a file")
        with open(path, "rb") as file:
            if facts.st_size > MAX_FILE[1]:
                image = open_picture(file)
                if facts.st_size > MAX_FILE[0] * image.width * image.height + MAX_FILE[1]:
                    raise PictureError("far larger than its picture")
                file.seek(0)
            data = file.read()
        return data, open_picture(data)
    except OSError as error:
        raise RefusedError(error.strerror or str(error)) from None


def open_picture(data):
    """Open the first frame of a picture file.

    data: the bytes of the file, or the open file. Returns a PIL image of which only the header has been read.
    Raises PictureError for what is no picture of a known format, or has over MAX_PIXELS pixels.
    """
    with picture_errors():
        file = io.BytesIO(data) if isinstance(data, bytes) else data
        if count_strips(file) > MAX_STRIPS:
            raise RefusedError("too many strips or tiles")
        image = Image.open(file, formats=FORMATS)
        if image.width * image.height > MAX_PIXELS:
            raise RefusedError(f"larger than {MAX_PIXELS:,} pixels")
        if isinstance(data, bytes):
            refuse_traps(image, data)
        return image


def count_strips(file):
    """Return how many strips or tiles an open TIFF file's first directory names, 0 for others.

    Pillow would make a list of all tiles before it looks at how large the picture is.
    """
    head, most = file.read(16), 0
    order = {b"II": "<", b"MM": ">"}.get(head[:2])
    if order and len(head) == 16:
        big = head[2] == 43  # BigTIFF, as Pillow sees it
        kinds = ("Q", "Q", "HHQQ") if big else ("I", "H", "HHII")
        place, number, entry = (struct.Struct(order + kind) for kind in kinds)
        file.seek(min(place.unpack_from(head, 8 if big else 4)[0], 2**40))
        count = int.from_bytes(file.read(number.size), "little" if order == "<" else "big")
        data = file.read(min(count, 2**16) * entry.size)
        whole = data[: len(data) // entry.size * entry.size]
        most = max([count, *(n for tag, _, n, _ in entry.iter_unpack(whole) if tag in (273, 324))])
    return most


def refuse_traps(image, data):
    """Raise PictureError for a picture that would take a decoder minutes or gigabytes, its size notwithstanding."""
    pixels, kind = image.width * image.height, image.format
    decoder = image.tile[0][0] if image.tile else ""
    slow = pixels > MAX_SLOW.get(decoder, MAX_PIXELS)
    slow |= decoder == "ppm_plain" and data.count(b"#") > MAX_COMMENTS
    if kind in ("JPEG", "MPO"):
        slow |= pixels * data.count(b"\xff\xda\0") > MAX_SCANNED
    if kind in ("WEBP", "AVIF"):
        slow |= pixels > MAX_ANIMATED and getattr(image, "is_animated", False)
    if kind == "TIFF" and 322 in image.tag_v2:
        slow |= float(image.tag_v2[322]) * image.tag_v2[323] > 4 * max(pixels, STRIPE)
    if slow:
        raise RefusedError("would take minutes or gigabytes to decode: save it in another format")


@contextlib.contextmanager
def picture_errors():
    """Turn whatever Pillow's parsers raise over a broken file into PictureError with the reason."""
    try:
        yield
    except (PictureError, MemoryError):
        raise
    except Image.DecompressionBombError:  # Pillow's own limit is twice ours, and comes first
        raise RefusedError(f"larger than {MAX_PIXELS:,} pixels") from None
    except Image.UnidentifiedImageError:
        raise PictureError("not a picture of a known format") from None
    except Exception as error:  # parsers raise OSError, SyntaxError, ValueError, struct.error and more
        raise PictureError(f"cannot be decoded ({first_line(error)})") from None


def square(image, side):
    """Turn a PIL image into the network's input: upright RGB, its largest centre square, resized.

    The one such function: training, evaluation and tagging all go through it.
    Returns uint8 of shape (side, side, 3), 0..255. Raises PictureError for broken or truncated data.
    """
    with picture_errors():
        image.draft(None, (2 * side, 2 * side))  # large JPEGs: decode a half, quarter or eighth at once
        image = turned(plain_mode(image))  # before resizing, as others do it, to the same bits
        return np.asarray(rgb(ImageOps.fit(image, (side, side), Image.Resampling.BILINEAR)))


def upright(image):
    """Turn a PIL image into a full-size upright RGB one. Raises PictureError for broken data."""
    with picture_errors():
        return rgb(turned(plain_mode(image)))


def plain_mode(image):
    """Give a PIL image a mode to resize in: palettes, bits, 16-bit or float greys, CMYK and the like become others."""
    image.load()
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        return grey_8_bit(image)
    if image.mode == "PA" or "transparency" in image.info:
        return image.convert("RGBA")
    if image.mode == "La":
        return image.convert("LA")
    return image if image.mode in ("L", "LA", "RGB", "RGBA", "RGBa") else image.convert("RGB")


def grey_8_bit(image):
    """Scale a 16-bit, 32-bit or float grey image to 8 bits: by its mode's range, and floats up to 1 by 0..1."""
    scale = 1 / 257
    if image.mode == "F":
        scale = 255 if image.getextrema()[1] <= 1 else 1
    copy, rows = Image.new("L", image.size), max(1, STRIPE // image.width)
    for top in range(0, image.height, rows):  # in stripes, which take little memory
        part = image.crop((0, top, image.width, min(top + rows, image.height)))
        grey = np.nan_to_num(np.clip(np.asarray(part).astype("float32"), 0, 2**16)) * scale
        copy.paste(Image.fromarray(np.clip(grey, 0, 255).astype("uint8")), (0, top))
    copy.info.update(image.info)  # what tells how to turn it
    return copy


def rgb(image):
    """Convert to RGB, what is transparent on white."""
    if image.mode in ("RGBA", "LA", "RGBa"):
        copy = Image.new("RGB", image.size, "white")
        copy.paste(image, mask=image)
        return copy
    return image if image.mode == "RGB" else image.convert("RGB")  # converting copies, also from RGB to RGB


def turned(image):
    """Turn and mirror as EXIF says; a broken or unknown orientation leaves the image as it is."""
    ways = Image.Transpose
    turns = {2: ways.FLIP_LEFT_RIGHT, 3: ways.ROTATE_180, 4: ways.FLIP_TOP_BOTTOM, 5: ways.TRANSPOSE}
    turns |= {6: ways.ROTATE_270, 7: ways.TRANSVERSE, 8: ways.ROTATE_90}
    try:
        orientation = image.getexif().get(0x0112, 1)
    except Exception:  # whatever is wrong with the EXIF block, the pixels are there
        return image
    return image.transpose(turns[orientation]) if orientation in turns else image


def crop_square(picture, center_x, center_y, side):
    """Cut a square out of a picture.

    picture: a PIL image, or uint8 (height, width, 3); centre and side in pixels, fractions are rounded to whole ones.
    A square that leaves the picture is shifted inside if it fits, else padded with the edge pixels.
    Returns uint8 (n, n, 3) with n = round(side), at least 1.
    """
    n, is_image = max(1, round(side)), isinstance(picture, Image.Image)
    width, height = picture.size if is_image else picture.shape[1::-1]
    spans, pads = [], []
    for center, size in ((center_y, height), (center_x, width)):
        start = round(center - n / 2)
        if n <= size:
            start = min(max(start, 0), size - n)
        first, last = min(max(start, 0), size - 1), max(min(start + n, size), 1)
        spans.append((first, last))
        pads.append((first - start, start + n - last))
    (top, bottom), (left, right) = spans
    cut = np.asarray(picture.crop((left, top, right, bottom))) if is_image else picture[top:bottom, left:right]
    return np.pad(cut, [*pads, (0, 0)], mode="edge") if any(map(any, pads)) else cut


def save_jpeg(path, pixels):
    """Save uint8 (height, width, 3) as JPEG of quality 95, colours not subsampled, with no metadata."""
    Image.fromarray(pixels).save(path, "JPEG", quality=95, subsampling=0)


# ---------------------------------------------------------------- the network and its three files


@functools.cache
def import_keras():
    """Import Keras, TensorFlow behind it unless KERAS_BACKEND says otherwise, without start-up chatter.

    It takes seconds, so functions ask here rather than at the top of a file. Returns the module.
    Raises UserError if a package is missing.
    """
    os.environ.setdefault("KERAS_BACKEND", "tensorflow")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    logging.getLogger("absl").setLevel("ERROR")
    try:
        with output_aside():
            import keras

            if CHILD in os.environ:
                join_processes(keras)
            keras.config.set_image_data_format("channels_last")  # whatever a keras.json of long ago says
            keras.config.set_floatx("float32")
            keras.ops.zeros(1)  # what the first operation has to say is said here
    except (ImportError, ValueError) as error:  # ValueError: no such backend
        raise UserError(
            f"{error}: {INSTALL} (TensorFlow has no packages for Intel Macs and Windows on ARM: see README.md)"
        ) from None
    return keras


def join_processes(keras):
    """Make this process one of those that train together; it has to come before Keras's first operation."""
    import jax

    hosts = os.environ["KERAS_DISTRIBUTION_JOB_ADDRESSES"].split(",")
    os.environ.setdefault("no_grpc_proxy", ",".join(host.rpartition(":")[0] for host in hosts))
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    keras.distribution.initialize()


@contextlib.contextmanager
def output_aside():
    """Send stdout and stderr nowhere while libraries in C++ introduce themselves."""
    sys.stdout.flush(), sys.stderr.flush()
    kept, nowhere = {fd: os.dup(fd) for fd in (1, 2)}, os.open(os.devnull, os.O_WRONLY)
    for fd in kept:
        os.dup2(nowhere, fd)
    try:
        yield
    finally:
        for fd, copy in kept.items():
            os.dup2(copy, fd)
            os.close(copy)
        os.close(nowhere)


def build_network(class_count, side, number_format="float32"):
    """Build InceptionV3 with a new top: pooling, 1024 dense units, softmax. Weights are random.

    The last layer sees the hidden units, the pooled features of block `mixed8`, and the layout: means of about 16 x 16
    blocks of the picture, these two with mean 0 and variance 1. The top may take for a friend who is strange to them.

    Takes RGB pixels 0..255 of shape (batch, side, side, 3), scales them itself, and gives
    probabilities of shape (batch, class_count) in float32. number_format: a Keras dtype policy.
    """
    keras = import_keras()
    keras.config.set_dtype_policy(number_format)  # applications take no dtype argument
    try:
        pixels = keras.Input((side, side, 3), name="pixels")
        scaled = keras.layers.Rescaling(1 / 127.5, offset=-1, name="scaled")(pixels)
        base = keras.applications.InceptionV3(weights=None, include_top=False, input_tensor=scaled)
        pooled = keras.layers.GlobalAveragePooling2D(name="pooled")(base.output)
        hidden = keras.layers.Dense(1024, activation="relu", name="hidden")(pooled)
        middle = keras.layers.GlobalAveragePooling2D()(base.get_layer("mixed8").output)
        middle = keras.layers.LayerNormalization(center=False, scale=False, name="middle")(middle)
        layout = keras.layers.Flatten()(keras.layers.AveragePooling2D(round(side / LAYOUT))(scaled))
        layout = keras.layers.LayerNormalization(center=False, scale=False, name="layout")(layout)
        units = keras.layers.Concatenate(name="units")([hidden, middle, layout])
        softmax = keras.layers.Dense(class_count, activation="softmax", dtype="float32", name="probabilities")
        return keras.Model(pixels, softmax(units))
    finally:
        keras.config.set_dtype_policy("float32")


def count_parameters(class_count, side):
    """Return how many numbers the weights of a network of `build_network` are."""
    units = 1024 + 1280 + 3 * (side // round(side / LAYOUT)) ** 2
    return BASE_PARAMETERS + (2048 + 1) * 1024 + (units + 1) * class_count


def compiled(model, **settings):
    """Compile a Keras model; XLA only where the backend is nothing else (measured: it slows TensorFlow down)."""
    model.compile(jit_compile=import_keras().config.backend() == "jax", **settings)
    return model


def predict(model, rows, batch_size, dtype="float32"):
    """Predict in batches of one size, the last one filled up, so that one compiled graph serves all.

    rows: array (n, …), may be a memory map. Returns (n, …) of that dtype. Waits for each batch: call it in threads.
    """
    parts = []
    for start in range(0, len(rows), batch_size):
        part = rows[start : start + batch_size]
        filled = np.resize(part, (batch_size, *part.shape[1:])) if len(part) < batch_size else part
        parts.append(np.asarray(predict_batch(model, filled).astype(dtype))[: len(part)])
    return np.concatenate(parts)


def predict_batch(model, batch):
    """Return what `model.predict_on_batch` gives, in JAX as an array of the device; threads may call it at once.

    In JAX, Keras's own waits for the device, and then writes every variable anew.
    """
    if import_keras().config.backend() != "jax":
        return model.predict_on_batch(batch)
    with JITTING:
        variables, compute = jitted(model)
    trained, others = ([variable.value for variable in some] for some in variables)
    return compute(trained, others, batch)


@functools.cache
def jitted(model):
    """Return (trainable variables, others) of a Keras model, for good, and what JAX compiles of it.

    That is a function: (values of the ones, of the others, batch) → prediction. Keras takes a millisecond to list them.
    """
    import jax

    variables = model.trainable_variables, model.non_trainable_variables
    return variables, jax.jit(lambda *numbers: model.stateless_call(*numbers, training=False)[0])


def trio(prefix):
    """Return the paths of the model's three files: weights and all, architecture, labels."""
    return Path(f"{prefix}.h5"), Path(f"{prefix}.json"), Path(f"{prefix}-labels.json")


def save_model(model, info, prefix):
    """Save a Keras model as `prefix.h5`, `.json` and `-labels.json`; the rename of the `.h5` is the commit.

    info: what else must travel with the model, plain data with at least `labels` and `image_size`; it
    becomes JSON in an attribute of the `.h5`, with the SHA-256 of the other two files added.
    """
    import h5py

    weights, architecture, labels = trio(prefix)
    texts = {architecture: model.to_json().encode(), labels: json.dumps(info["labels"]).encode()}
    sums = {key: hashlib.sha256(text).hexdigest() for key, text in zip(("json", "labels"), texts.values())}
    with whole_file(weights) as weights_part:
        try:
            model.save(weights_part)
            with h5py.File(weights_part, "a") as file:
                file.attrs[ATTRIBUTE] = json.dumps(info | {"sha256": sums})
        except (OSError, RuntimeError, ValueError) as error:  # HDF5 wraps what the system said
            reason = f"cannot be written ({first_line(error)})"
            raise UserError(f"{escape(weights)}: {reason}: free some space, then --resume") from None
        for path, text in texts.items():
            with whole_file(path) as part:
                part.write_bytes(text)


def is_ours(prefix):
    """Say whether a model of this prefix may be replaced: there is none, or it is one of this kit's."""
    import h5py

    weights, architecture, _ = trio(prefix)
    try:
        if os.path.lexists(weights) and not weights.is_file():
            return False
        if weights.exists():
            with h5py.File(weights, "r") as file:
                return ATTRIBUTE in file.attrs
        if architecture.exists():  # a kill between the renames of a first save leaves it without a model.h5
            check_architecture(parse_json(architecture, read_capped(architecture, MAX_JSON)), architecture)
        return True
    except (OSError, UserError):
        return False


def load_model(prefix):
    """Load a model of ours: returns (compiled Keras model, info) with info as given to `save_model`.

    Safe with files from strangers: no class named in a file is ever looked up. The network is built here, from
    numbers checked first. Raises UserError for anything that is not whole.
    """
    info = check_model(prefix)
    model = build_network(len(info["labels"]), info["image_size"])
    load_weights(model, trio(prefix)[0])
    return compiled(model), info


def check_model(prefix):
    """Check the three files of a model without TensorFlow: sizes, JSON, labels, HDF5 shapes. Returns its info.

    What is trusted is h5py with libhdf5. Raises UserError for anything that is not whole.
    """
    weights, architecture, labels_path = trio(prefix)
    texts = [read_capped(path, MAX_JSON) for path in (architecture, labels_path)]
    labels = check_labels(parse_json(labels_path, texts[1]), labels_path)
    side = check_architecture(parse_json(architecture, texts[0]), architecture)
    ours, config = check_hdf5(weights, count_parameters(len(labels), side))
    info = parse_json(weights, ours)
    check_architecture(parse_json(weights, config), weights)  # plain Keras would build the network from it
    sums = [hashlib.sha256(text).hexdigest() for text in texts]
    if not isinstance(info, dict) or info.get("sha256") != dict(zip(("json", "labels"), sums)):
        raise UserError(
            f"{escape(weights)}: does not belong to the .json and -labels.json beside it: copy all three files "
            "of one training run again, or finish that run with --resume"
        )
    threshold = info.setdefault("threshold", 0.5)
    good = all(type(info.get(name)) is int for name in ("image_size", "round")) and 0 <= info["round"] <= 999
    known = good and info.get("labels") == labels and info["image_size"] == side
    if not known or not isinstance(threshold, int | float) or not 0 <= threshold <= 1:
        raise UserError(f"{escape(weights)}: what belongs to the model is damaged in it: train again")
    return info


def load_weights(model, path):
    """Load a checked HDF5 file's arrays into a Keras model. Raises UserError for other shapes or NaN."""
    try:
        model.load_weights(path)
    except (ValueError, KeyError, TypeError, AttributeError, OSError, RuntimeError) as error:
        reason = f"these weights do not fit InceptionV3 ({first_line(error)})"
        raise UserError(f"{escape(path)}: {reason}: use another file") from None
    if not all(np.isfinite(array).all() for array in model.get_weights()):
        raise UserError(f"{escape(path)}: holds numbers that are not finite: train again or use another file")


def check_file(path, limit):
    """Raise UserError unless there is a file of at most `limit` bytes at `path`, and no link to one."""
    if path.is_symlink():
        raise UserError(f"{escape(path)}: is a link: copy the file itself here")
    if not path.exists():
        raise UserError(f"{escape(path)}: no such file: check the name (a model's prefix has no ending)")
    if not path.is_file():  # a named pipe would wait for ever
        raise UserError(f"{escape(path)}: is no file: remove it")
    if path.stat().st_size > limit:
        raise UserError(f"{escape(path)}: larger than {limit:,} bytes, as no such file is: use another one")


def read_capped(path, limit):
    """Return the bytes of a file that `check_file` lets pass."""
    check_file(path, limit)
    return path.read_bytes()


def parse_json(path, text):
    """Return the plain data in JSON bytes. Raises UserError for anything else, endless nesting included."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError, TypeError):
        raise UserError(f"{escape(path)}: damaged, not JSON: copy it again or train again") from None


def check_labels(labels, path):
    """Return a list of class names fit to become folder names and terminal text, or raise UserError."""
    good = isinstance(labels, list) and 2 <= len(labels) <= MAX_CLASSES
    good = good and all(isinstance(label, str) and escape(label) == label for label in labels)
    good = good and all(0 < len(label) <= MAX_LABEL for label in labels)
    if not good or len(set(labels)) != len(labels):
        raise UserError(f"{escape(path)}: not a list of two or more different class names: train again")
    return labels


def check_architecture(config, path):
    """Return the image size that an architecture names, read as plain data. Raises UserError.

    The network is never made from it, but plain Keras would do so: whatever is not part of ours is refused.
    """
    try:
        _, height, width, channels = config["config"]["layers"][0]["config"]["batch_shape"]
    except (TypeError, KeyError, IndexError, ValueError):
        raise UserError(f"{escape(path)}: names no image size: it was not written by this kit") from None
    if type(height) is not int or not 75 <= height <= 1024 or width != height or channels != 3:
        raise UserError(f"{escape(path)}: its image size is not one that this kit makes: do not use it")
    pending = [config]
    while pending:
        item = pending.pop()
        if isinstance(item, dict):
            pending += item.values()
            names = [item[key] for key in ("class_name", "registered_name") if item.get(key)]
            if not all(isinstance(name, str) and name in CLASSES for name in names):
                raise UserError(f"{escape(path)}: has layers that this kit does not use: do not open it with Keras")
        elif isinstance(item, list):
            pending += item
        elif isinstance(item, int | float) and abs(item) > MAX_CLASSES:
            raise UserError(f"{escape(path)}: a layer is larger than this kit makes: do not open it with Keras")
    return height


def check_hdf5(path, parameters):
    """Check an HDF5 file of weights before anything is read from it; return its two attributes of text.

    parameters: how many numbers it must declare, no more and no less, so that no bomb can hide in it;
    links, and data kept in other files, are refused. Returns (ours, Keras's `model_config`), None if absent.
    """
    import h5py

    check_file(path, 5 * parameters + 10 * MAX_JSON)
    try:
        longest = longest_text(path)
        with h5py.File(path, "r") as file:
            count = count_numbers(file, longest)
            if count != parameters:
                numbers = f"{count:,} numbers, not {parameters:,}"
                raise UserError(f"{escape(path)}: holds {numbers}: it belongs to another network or version")
            return text_attribute(file, ATTRIBUTE), text_attribute(file, "model_config")
    except (OSError, RuntimeError, KeyError, ValueError, TypeError, MemoryError) as error:
        reason = f"damaged, not HDF5 or made to harm ({first_line(error)})"
        raise UserError(f"{escape(path)}: {reason}: copy it again") from None


def text_attribute(file, name):
    """Return an attribute of an HDF5 file that is one text of at most MAX_JSON characters, else None."""
    if name not in file.attrs or file.attrs.get_id(name).shape != ():
        return None
    text = file.attrs[name]
    return text if isinstance(text, str) and len(text) <= MAX_JSON else None


def longest_text(path):
    """Return how many bytes a text among the attributes of an HDF5 file can have at most, 0 if there is none."""
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        sizes = (int.from_bytes(heap[1], "little") for heap in HEAP.finditer(data))
        return max((size for size in sizes if size <= len(data)), default=0)


def count_numbers(file, longest):
    """Count the numbers that an open HDF5 file declares. Raises ValueError for what we never write.

    longest: bytes of its longest text.
    """
    import h5py

    count, seen, pending = 0, 0, [(file, 0)]
    while pending:
        group, depth = pending.pop()
        check_texts(group, longest)
        check_names(group)
        for name in group:
            seen += 1
            if seen > MAX_ITEMS or depth > 7:
                raise ValueError("more inside than such a file has")
            if not isinstance(group.get(name, getlink=True), h5py.HardLink):
                raise ValueError("links to other data")
            item = group[name]
            if isinstance(item, h5py.Group):
                pending.append((item, depth + 1))
                continue
            good = isinstance(item, h5py.Dataset) and not item.external and not item.is_virtual
            if not good or item.dtype.kind != "f" or item.dtype.itemsize > 4:
                raise ValueError("data kept elsewhere or of another kind")
            if item.chunks and np.prod(item.chunks, dtype=float) > item.size:  # all of a piece is unpacked
                raise ValueError("unpacks to more than it is")
            check_texts(item, longest)
            count += item.size
    return count


def check_texts(item, longest):
    """Raise ValueError if an attribute of a group or array may fill the memory when it is read."""
    import h5py

    for attribute in map(item.attrs.get_id, item.attrs):
        if attribute.dtype.hasobject:  # it only names what lies elsewhere in the file
            most = np.prod(attribute.shape, dtype=float) * longest
            if most > MAX_TEXTS or not h5py.check_string_dtype(attribute.dtype):
                raise ValueError("attributes of more text than such a file has")


def check_names(group):
    """Raise ValueError unless the lists of what Keras is to read in a group are short and without repeats."""
    for key in group.attrs:
        most = {"layer_names": 500, "weight_names": 8}.get(key.rstrip("0123456789"))
        if most and (key[-1].isdigit() or not all(n <= most for n in group.attrs.get_id(key).shape)):
            raise ValueError("longer lists than such a file has")
        if most and len(set(group.attrs[key])) < len(group.attrs[key]):
            raise ValueError("the same data listed twice")


# ---------------------------------------------------------------- mosaic and report


@functools.cache
def import_matplotlib():
    """Import matplotlib with its own settings: it would read those of the current folder, whoever they are from."""
    logging.getLogger("matplotlib").setLevel("CRITICAL")
    import matplotlib

    matplotlib.rcdefaults()


@functools.cache
def font_file(text):
    """Return the path of a font that has every character of `text`: DejaVu Sans, else one of the system's."""
    import_matplotlib()
    from matplotlib import font_manager, ft2font

    first = font_manager.findfont("DejaVu Sans")

    def candidates():
        """Yield font files; looking through the system's takes long."""
        yield first
        yield from sorted(font_manager.findSystemFonts(), key=lambda path: ("CJK" not in path, "Bold" in path, path))

    for path in candidates():
        with contextlib.suppress(RuntimeError, OSError):
            if set(map(ord, text)) <= set(ft2font.FT2Font(path).get_charmap()):
                return path
    return first


def draw_text(draw, xy, text, size, fill, anchor="la", width=None):
    """Write one line of any script on a PIL drawing, cut to `width` pixels with an ellipsis if given."""
    font = ImageFont.truetype(font_file(text), size)
    if width is not None and font.getlength(text) > width:
        while text and font.getlength(text + "…") > width:
            text = text[:-1]
        text += "…"
    draw.text(xy, text, fill, font, anchor)


def draw_mosaic(path, prefix, title, labels, actual, predicted, pictures):
    """Draw the confusion matrix with the pictures themselves: a row a class, a column for what it was taken for.

    labels: class names. actual, predicted: int arrays (n,). pictures: a function from 0..n-1 to uint8
    (side, side, 3). With more than MOSAIC_CLASSES classes, those with the most mistakes are shown.
    """
    wrong = np.bincount(np.r_[actual[actual != predicted], predicted[actual != predicted]], minlength=len(labels))
    shown = np.sort(np.argsort(-wrong, kind="stable")[:MOSAIC_CLASSES])
    cell = int(np.clip(2400 // len(shown), 93, 560))
    size = int(np.clip(cell // 15, 20, 32))  # of the class names, in pixels
    widest = max(ImageFont.truetype(font_file(labels[i]), size).getlength(labels[i]) for i in shown)
    left = round(np.clip(widest + 40, 6.5 * size, 17 * size))
    turned = cell - 8 <= widest and cell < TURNED * size  # by a quarter, to stand above the columns
    top = 120 + size * (TURNED if turned else 2)
    canvas = Image.new("RGB", (left + cell * len(shown) + 20, top + cell * len(shown) + 20), "white")
    draw, wide = ImageDraw.Draw(canvas), canvas.width - 40
    note = "" if len(shown) == len(labels) else f", the {len(shown)} most confused of {len(labels)} classes"
    draw_text(draw, (20, 18), title, 30, INK, width=wide)
    draw_text(draw, (20, 60), f"rows: what it is; columns: what it was taken for{note}", 18, GREY, width=wide)
    for row, a in enumerate(shown):
        y, x = top + row * cell, left + row * cell
        total, right = (actual == a).sum(), ((actual == a) & (predicted == a)).sum()
        draw_text(draw, (left - 12, y + cell // 2 - 2), labels[a], size, INK, "rs", left - 24)
        draw_text(draw, (left - 12, y + cell // 2 + size), f"{right} of {total}", size - 4, GREY, "rs")
        draw_column_name(canvas, (x, top - 12), labels[a], size, cell, turned)
        for column, p in enumerate(shown):
            inside = np.flatnonzero((actual == a) & (predicted == p))
            draw_cell(canvas, (left + column * cell, y), cell, pictures, inside, a == p)
    chunk = PngInfo()
    chunk.add_text("Software", f"{KIT}: {prefix}")
    with whole_file(path) as part:
        canvas.save(part, "PNG", pnginfo=chunk)


def draw_column_name(canvas, corner, name, size, cell, turned):
    """Write a class name above its column, upright or turned."""
    x, bottom = corner
    if not turned:
        draw_text(ImageDraw.Draw(canvas), (x + cell // 2, bottom), name, size, INK, "ms", cell - 8)
        return
    length = TURNED * size
    strip = Image.new("RGB", (length, 2 * size), "white")
    draw_text(ImageDraw.Draw(strip), (0, size), name, size, INK, "lm", length)
    canvas.paste(strip.rotate(90, expand=True), (x + cell // 2 - size, bottom - length))


def draw_cell(canvas, corner, cell, pictures, inside, correct):
    """Fill one cell with the pictures whose indices are `inside`, their number on a badge."""
    draw, (x, y) = ImageDraw.Draw(canvas), corner
    frame, (strong, pale) = (x + 1, y + 1, x + cell - 2, y + cell - 2), BLUE if correct else ORANGE
    if not len(inside):
        draw.rectangle(frame, fill=pale if correct else "white", outline=LINE)
        return
    draw.rectangle(frame, fill=pale, outline=strong, width=3)
    across = min(int(np.ceil(np.sqrt(len(inside)))), max(1, cell // 40))
    thumb = (cell - 10) // across
    for n, index in enumerate(inside[: across * across]):
        picture = Image.fromarray(pictures(index)).resize((thumb - 2, thumb - 2), Image.Resampling.LANCZOS)
        canvas.paste(picture, (x + 6 + n % across * thumb, y + 6 + n // across * thumb))
    text, size = str(len(inside)), int(np.clip(cell // 18, 13, 26))
    wide = size * len(text) * 0.65 + 8
    draw.rectangle((x + 1, y + 1, x + 1 + wide, y + 5 + size), fill=strong)
    draw_text(draw, (x + 1 + wide / 2, y + 3 + size // 2), text, size, "white", "mm")


def draw_report(path, title, labels, actual, probabilities, history=None):
    """Draw learning curves (if there is a history), scores of each class, and reliability as one PNG.

    actual: int (n,). probabilities: (n, classes). history: list of dicts, an epoch each, with the
    columns of `model-history.csv`. With over MOSAIC_CLASSES classes those with the lowest scores are shown.
    """
    import_matplotlib()
    from matplotlib.figure import Figure

    recall, precision = class_scores(actual, probabilities.argmax(1), len(labels))
    order = np.argsort(np.nan_to_num(recall + precision), kind="stable")[:MOSAIC_CLASSES]
    weakest = [labels[i] for i in order], recall[order], precision[order]
    panels = [  # (height in inches, function that plots it)
        (3.2, lambda axes: plot_reliability(axes, actual, probabilities)),
        (1.2 + 0.24 * len(order), lambda axes: plot_classes(axes, *weakest, len(labels))),
    ]
    if history:
        panels.insert(0, (3.2, lambda axes: plot_history(axes, history)))
    heights = [height for height, _ in panels]
    figure = Figure(figsize=(9, sum(heights) + 0.3), layout="constrained")
    figure.suptitle(title, parse_math=False, font=Path(font_file(title)))
    for axes, (_, plot) in zip(figure.subplots(len(panels), 1, height_ratios=heights), panels):
        plot(axes)
    with whole_file(path) as part:
        figure.savefig(part, dpi=110, metadata={"Software": KIT})


def class_scores(actual, predicted, class_count):
    """Return recall and precision of each class, float (class_count,) each, NaN where undefined."""
    right = np.bincount(actual[actual == predicted], minlength=class_count).astype(float)
    with np.errstate(invalid="ignore"):
        recall = right / np.bincount(actual, minlength=class_count)
        return recall, right / np.bincount(predicted, minlength=class_count)


def plot_history(axes, history):
    """Plot accuracy against epochs: training, augmented validation, plain validation."""
    epochs = np.arange(1, len(history) + 1)
    curves = (("accuracy", "training", BLUE[0], "-"), ("val_accuracy", "validation, augmented", "#e69f00", "--"))
    for key, label, colour, line in (*curves, ("plain_accuracy", "validation", "#000000", "o")):
        points = [(e, row[key]) for e, row in zip(epochs, history) if row[key] != ""]
        axes.plot(*zip(*points), line, color=colour, label=label)
    axes.set(xlabel="epoch", ylabel="accuracy", ylim=(0, 1.03))
    axes.set_title("Learning curves", loc="left")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")


def plot_reliability(axes, actual, probabilities):
    """Plot how often the model is right against how sure it is, in ten bins of equally many pictures."""
    sure, right = probabilities.max(1), probabilities.argmax(1) == actual
    groups = np.array_split(np.argsort(sure), min(10, len(sure)))
    axes.plot([0, 1], [0, 1], color="#999999", linewidth=1, label="as sure as right")
    x, y, n = ([f(g) for g in groups] for f in (lambda g: sure[g].mean(), lambda g: right[g].mean(), len))
    axes.plot(x, y, "o-", color=BLUE[0], label=f"bins of about {round(np.mean(n))} pictures")
    axes.set(xlabel="probability given", ylabel="share that is right", ylim=(-0.03, 1.03), xlim=(0, 1.02))
    axes.set_title("Reliability of the probabilities", loc="left")
    axes.grid(alpha=0.3)
    axes.legend(loc="upper left")


def plot_classes(axes, labels, recall, precision, class_count):
    """Plot recall and precision of classes, the weakest on top."""
    y = np.arange(len(labels))
    axes.barh(y, recall, color="#56b4e9", height=0.7, label="recall (pictures found)")
    axes.plot(precision, y, "D", color=ORANGE[0], markersize=5, label="precision (tags that are right)")
    axes.set_yticks(y, [label if len(label) < 30 else label[:29] + "…" for label in labels])
    for tick, label in zip(axes.get_yticklabels(), labels):
        tick.set(font=Path(font_file(label)), parse_math=False)
    axes.set(xlim=(0, 1.02), ylim=(len(labels) - 0.5, -0.5))
    title = "Classes" if len(labels) == class_count else f"The weakest {len(labels)} of {class_count} classes"
    axes.set_title(title, loc="left")
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2, frameon=False, borderaxespad=0.2)
