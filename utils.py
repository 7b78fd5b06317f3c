"""What train.py, webcam.py and collect_apple_photos.py share.

Reading pictures, cutting squares around faces, names from outside, messages and files,
the network and its three files, and the drawing of mosaic and report.
"""

import argparse
import collections
import contextlib
import csv
import errno
import io
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
    from PIL import Image, ImageOps
except ImportError as absent:
    sys.exit(f"error: {absent}: {INSTALL}")

# Rarely used parsers are where the holes are: only these, of those that Pillow knows, are ever tried.
FORMATS = (
    "JPEG",
    "PNG",
    "WEBP",
    "GIF",
    "BMP",
    "TIFF",
    "PPM",
    "HEIF",
    "AVIF",
)  # a new one: think of refuse_traps
MAX_PIXELS = (
    178_956_970  # pictures above it are bombs or maps, and take over 2 GB to decode and turn
)
# Files made to keep a decoder busy for minutes, or to fill the memory, take more than these:
MAX_SLOW = {
    "ppm": 8e6,
    "ppm_plain": 8e6,
    "bmp_rle": 4e7,
}  # pixels for decoders that are written in Python
MAX_COMMENTS = 1_000  # in such a PPM
MAX_SCANNED = 2e10  # pixels times scans of a progressive JPEG
MAX_STRIPS = 65_536  # of a TIFF, or tiles
MAX_ANIMATED = 6e7  # pixels of an animated WebP or AVIF, whose decoder keeps several frames
MAX_FILE = (
    16,
    2**26,
)  # bytes: so many a pixel, and as many beside; what has more of these may be a film
STRIPE = 2**20  # pixels that are computed with at once

SKIPPED_NAMES = {
    "thumbs.db",
    "desktop.ini",
    "__macosx",
}  # what systems leave in folders, lower case
RESERVED_NAMES = {"con", "prn", "aux", "nul"} | {
    f"{p}{n}" for p in ("com", "lpt") for n in "123456789"
}

OUT_OF_MEMORY = re.compile(
    "^ResourceExhaustedError|RESOURCE_EXHAUSTED"
)  # as TensorFlow and JAX say it
KIT = "finetuning-kit"  # named in the pictures that are ours to remove
Image.MAX_IMAGE_PIXELS = MAX_PIXELS
pillow_heif.register_heif_opener()
tqdm.tqdm.set_lock(
    threading.RLock()
)  # its own is a semaphore too, which a Ctrl-C at the wrong moment leaves locked
warnings.filterwarnings("ignore", module="PIL")  # remarks on metadata that is not used


# ---------------------------------------------------------------- messages


class UserError(Exception):
    """Something a user can mend: one line that names the file or option and says what to do."""


class PictureError(Exception):
    """A file that gives no picture; the text is the reason, without the file's name."""


class RefusedError(PictureError):
    """A file that cannot be read, or that holds a picture too large or too slow to be decoded: no film either."""


def print_line(text):
    """Print one line on stdout at once, so that a program reading it never waits."""
    put = (
        tqdm.tqdm.write if sys.stdout.isatty() else print
    )  # on a terminal a progress bar makes room for the line
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
    return (
        character.isprintable()
        or unicodedata.category(character) == "Zs"
        or character in "\u200c\u200d"
    )


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
    file = (
        error.filename if error.filename2 is None else error.filename2
    )  # of a renaming, the name that people know
    name = f"{escape(file)}: " if file is not None else ""
    return (
        f"{name}{error.strerror or error}: {hints.get(error.errno, 'check the disk and try again')}"
    )


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
    sys.stdout, sys.stderr = (
        stream or open(os.devnull, "w") for stream in (sys.stdout, sys.stderr)
    )
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
        yield from tqdm.tqdm(
            items, desc=label, total=total, leave=False, file=sys.stderr, dynamic_ncols=True
        )
        return
    start = told = time.monotonic()
    for done, item in enumerate(items, 1):
        yield item
        now = time.monotonic()
        if now - told > 10 and done < total:
            told, left = now, (now - start) * (total - done) / done
            print(
                f"{label}: {done} of {total}, about {left:.0f} s left", file=sys.stderr, flush=True
            )


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


def ordered_parallel_map(function, items, workers=None):
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
            entries = sorted(
                (e for e in os.scandir(folder) if not is_ignored(e.name)), key=lambda e: e.name
            )
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
def file_lock(path):
    """Hold a lock, the file `path`, while the block runs. A killed process holds it no more.

    Raises UserError if another run holds it. (SQLite's locks work alike on Linux, macOS and Windows; ours are empty. A
    database from somebody else could have it delete files.)
    """
    path = Path(path)
    foreign = path.is_symlink() or (
        path.exists() and not (path.is_file() and path.stat().st_size == 0)
    )
    if foreign or any(os.path.lexists(f"{path}{end}") for end in ("-journal", "-wal", "-shm")):
        raise UserError(
            f"{escape(path)}: not a lock of this kit: delete it and what begins with its name"
        )
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
def atomic_write(path):
    """Give a path beside `path` to write to, and rename it to `path` when the block ends without error."""
    path = Path(path)
    stem = (
        path.stem if len(os.fsencode(path.stem)) <= 200 else path.stem[:50]
    )  # a name has at most 255 bytes
    part = path.with_name(f".{stem}-unfinished-{os.urandom(4).hex()}{path.suffix}")
    open(part, "x").close()  # unlike mkstemp's, with the permissions that new files have here
    try:
        yield part
        with open(
            part, "rb+"
        ) as file:  # on the disk before its name is: a power cut leaves old or new
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def write_csv(path, header, rows):
    """Write a CSV file whole: `header` a list of names, `rows` lists of cells (strings are escaped)."""
    with atomic_write(path) as part, open(part, "w", newline="", encoding="utf-8") as file:
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
    except (
        Exception
    ) as error:  # parsers raise OSError, SyntaxError, ValueError, struct.error and more
        raise PictureError(f"cannot be decoded ({first_line(error)})") from None


def to_model_input(image, side):
    """Turn a PIL image into the network's input: upright RGB, its largest centre square, resized.

    The one such function: training, evaluation and tagging all go through it.
    Returns uint8 of shape (side, side, 3), 0..255. Raises PictureError for broken or truncated data.
    """
    with picture_errors():
        image.draft(
            None, (2 * side, 2 * side)
        )  # large JPEGs: decode a half, quarter or eighth at once
        image = apply_orientation(
            normalise_mode(image)
        )  # before resizing, as others do it, to the same bits
        return np.asarray(rgb(ImageOps.fit(image, (side, side), Image.Resampling.BILINEAR)))


def upright(image):
    """Turn a PIL image into a full-size upright RGB one. Raises PictureError for broken data."""
    with picture_errors():
        return rgb(apply_orientation(normalise_mode(image)))


def normalise_mode(image):
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
    return (
        image if image.mode == "RGB" else image.convert("RGB")
    )  # converting copies, also from RGB to RGB


def apply_orientation(image):
    """Turn and mirror as EXIF says; a broken or unknown orientation leaves the image as it is."""
    ways = Image.Transpose
    turns = {
        2: ways.FLIP_LEFT_RIGHT,
        3: ways.ROTATE_180,
        4: ways.FLIP_TOP_BOTTOM,
        5: ways.TRANSPOSE,
    }
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
    cut = (
        np.asarray(picture.crop((left, top, right, bottom)))
        if is_image
        else picture[top:bottom, left:right]
    )
    return np.pad(cut, [*pads, (0, 0)], mode="edge") if any(map(any, pads)) else cut


def save_jpeg(path, pixels):
    """Save uint8 (height, width, 3) as JPEG of quality 95, colours not subsampled, with no metadata."""
    Image.fromarray(pixels).save(path, "JPEG", quality=95, subsampling=0)
