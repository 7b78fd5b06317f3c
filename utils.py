"""What train.py, webcam.py and collect_apple_photos.py share: messages, names, files, pictures."""

import argparse
import collections
import contextlib
import csv
import errno
import io
import os
import re
import stat
import sys
import threading
import time
import unicodedata
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

INSTALL = "run `pip install -r requirements.txt` in the folder of this script"
if not (3, 11) <= sys.version_info[:2] <= (3, 13):
    sys.exit(
        f"error: this is Python {sys.version_info[0]}.{sys.version_info[1]}: "
        "install Python 3.11, 3.12 or 3.13, which TensorFlow and Keras have packages for"
    )
# Pillow keeps so many blocks of 16 MB for the next picture. Without them threads wait for each
# other in the system's memory calls. Eight hold a picture of 12 megapixels twice.
os.environ.setdefault("PILLOW_BLOCKS_MAX", str(8 * (os.cpu_count() or 1)))
try:
    import filelock
    import numpy as np
    import pillow_heif
    import tqdm
    from PIL import Image, ImageOps
except ImportError as absent:
    sys.exit(f"error: {absent}: {INSTALL}")

KIT = "finetuning-kit"  # named in the pictures that are ours to remove
ESTIMATE_AFTER, RECENT = 10, 30  # seconds: of progress before the time left is estimated, and from
# Rarely used parsers are where the holes are: only these are ever tried.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "HEIF", "AVIF")
MAX_PIXELS = 178_956_970  # a larger picture takes over 2 GB to decode and turn
MAX_ANIMATED = 20_000_000  # the first frame of more takes seconds
LARGE_FILE, MAX_FILE = 2**26, 2**29  # bytes: may be a film; is no picture
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
TIFF_SUBFILE_TYPE, TIFF_PHOTOMETRIC = 254, 262
TIFF_RANGE = 280, 281  # tags of the smallest and the largest value
STRIPE = 2**20  # pixels that are computed with at once
DARKEST, BRIGHTEST = 0.1, 99.9  # percentiles of a grey picture of many bits: black, white
# What systems leave in folders, lower case.
SKIPPED_NAMES = {"thumbs.db", "desktop.ini", "__macosx", "@eadir", "#recycle", "$recycle.bin"}
SKIPPED_NAMES |= {"lost+found"}
RESERVED_NAMES = {f"{port}{n}" for port in ("com", "lpt") for n in range(1, 10)}
RESERVED_NAMES |= {"con", "prn", "aux", "nul"}
# As TensorFlow and JAX say it; they have no class in common for it.
OUT_OF_MEMORY = re.compile("^ResourceExhaustedError|RESOURCE_EXHAUSTED")

Image.MAX_IMAGE_PIXELS = MAX_PIXELS
pillow_heif.register_heif_opener()
tqdm.tqdm.set_lock(threading.RLock())  # its own stays locked after a Ctrl-C at the wrong moment
warnings.filterwarnings("ignore", module="PIL")  # remarks on metadata that is not used


# ---------------------------------------------------------------- messages


class UserError(Exception):
    """Something a user can mend: one line that names the file or option and says what to do."""


class PictureError(Exception):
    """A file that gives no picture; the text is the reason, without the file's name."""


class RefusedError(PictureError):
    """A file that cannot be read, or a picture that cannot be used: it is no film either."""


def print_line(text):
    """Print one line on stdout at once, so that a program reading it never waits."""
    # on a terminal a progress bar makes room for the line
    put = tqdm.tqdm.write if sys.stdout.isatty() else print
    put(text)
    sys.stdout.flush()


def warn(text):
    """Print one line on stderr that begins `warning: `."""
    tqdm.tqdm.write(f"warning: {text}", file=sys.stderr)


def escape(name):
    """Return `name` (str or path) with control characters and lone surrogates as \\x escapes."""
    return "".join(c if is_shown(c) else c.encode("unicode_escape").decode() for c in str(name))


def is_shown(character):
    """Say whether a terminal may show a character: printable, a space, or what joins letters."""
    is_space = unicodedata.category(character) == "Zs"
    return character.isprintable() or is_space or character in "\u200c\u200d"


def first_line(error):
    """Return the first line of what a library says about an error, escaped, 200 characters."""
    return escape(str(error).partition("\n")[0] or type(error).__name__)[:200]


def csv_cell(name):
    """Return `name` escaped, behind an apostrophe if a spreadsheet took it for a formula."""
    text = escape(name)
    return "'" + text if text[:1] in ("=", "+", "-", "@") else text


def advice(error):
    """Return one line for an OSError: what failed with which file, and what to do."""
    space, permission = "free some space", "check the permissions"
    hints = {
        errno.ENOSPC: f"{space} or choose another folder",
        errno.EDQUOT: f"{space} or choose another folder",
        errno.EFBIG: "files may not be so large here: choose another folder",
        errno.EACCES: f"{permission} or choose another folder",
        errno.EPERM: f"{permission} or choose another folder",
        errno.EROFS: "choose a folder that can be written",
        errno.ENOENT: "check that the path is right and was not moved meanwhile",
        errno.EMFILE: "close other programs or raise `ulimit -n`",
    }
    # the second file of a renaming is the one that people know
    file = error.filename if error.filename2 is None else error.filename2
    name = f"{escape(file)}: " if file is not None else ""
    hint = hints.get(error.errno, "check the disk and try again")
    return f"{name}{error.strerror or error}: {hint}"


def missing(error):
    """Return one line for an ImportError: what is missing, and what to do."""
    if ".so" in str(error):  # OpenCV's, in a bare container
        packages = "`apt-get install libgl1 libglib2.0-0`, or what your system calls these packages"
        return f"{error}: run {packages}"
    return f"{error}: {INSTALL}"


def explain(error):
    """Return one line for an exception that a user can do something about, None for a bug."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, OSError):
        return advice(error)
    if isinstance(error, ImportError):
        return missing(error)
    if isinstance(error, MemoryError) or OUT_OF_MEMORY.search(f"{type(error).__name__}: {error}"):
        remedy = "close other programs, or train with a smaller --batch-size or --image-size"
        return f"out of memory: {remedy}"
    return None


def run(main):
    """Call a script's `main()` and leave with its exit code.

    0 (or None) done, 1 an expected failure told in one line, 3 from the accuracy gate, 130 Ctrl-C.
    Text that leaves the process is UTF-8, save on a terminal, which gets escapes for what it lacks.
    """
    nowhere = open(os.devnull, "w")
    # None where it was closed, by `>&-` say
    sys.stdout, sys.stderr = sys.stdout or nowhere, sys.stderr or nowhere
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
    is_terminal, told = sys.stderr.isatty(), time.monotonic()
    marks = collections.deque()  # (seconds, items done): begins with the end of the first item
    shape = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt}{postfix}"
    bar = tqdm.tqdm(
        desc=label, total=total, leave=False, file=sys.stderr, dynamic_ncols=True,
        bar_format=shape, disable=not is_terminal,
    )  # fmt: skip
    with bar:
        for done, item in enumerate(items, 1):
            yield item
            now = time.monotonic()
            marks.append((now, done))
            while marks[0][0] < now - RECENT:
                marks.popleft()
            left = time_left(marks, total)
            bar.set_postfix_str(left, refresh=False)
            bar.update()
            if not is_terminal and now - told > 10 and done < total:
                told = now
                line = ", ".join(filter(None, [f"{label}: {done} of {total}", left]))
                print(line, file=sys.stderr, flush=True)


def time_left(marks, total):
    """Return `about 7 s left` by the rate between the first and last of `marks`, "" if too early.

    marks: pairs (seconds, items done). That is after a tenth of the work or after ten seconds.
    """
    (start, before), (now, done) = marks[0], marks[-1]
    is_early = done < total / 10 and now - start < ESTIMATE_AFTER
    if is_early or done == before:
        return ""
    return f"about {(now - start) / (done - before) * (total - done):.0f} s left"


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
    """Yield function(item) for every item, in order, computed ahead in threads.

    Only a few results wait at a time, so memory stays flat. workers: threads, else one a core.
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
    """Return {name: folder name}: readable, safe on Linux, macOS and Windows, distinct even there.

    NFC; separators and control characters become `_`; no leading dot, trailing dot or space; at
    most 80 characters and 200 bytes; names that fall together by case or normalisation get ` (2)`,
    ` (3)`… `taken`: folder names that are in use already.
    """
    used = {unicodedata.normalize("NFC", name).casefold() for name in taken}
    folders, last = {}, {}
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
    """Say whether a name is proper Unicode, and not bytes of another encoding as surrogates."""
    return name.encode(errors="ignore").decode() == name


def is_inside(path, place):
    """Say whether `path` is or lies in `place`, also where names differ in case or spelling."""
    path = Path(os.path.realpath(path))
    return any(one.exists() and one.samefile(place) for one in (path, *path.parents))


def list_files(root, left_out=None):
    """Return the files below the folder `root`, any depth, sorted, as paths.

    Left out: dot files and dot folders, what systems leave behind, links that leave `root` or loop;
    these links are added to the list `left_out`. A folder that is reached twice keeps its own name:
    links are followed last.
    """
    inside, found, seen = Path(root).resolve(), [], set()
    folders, links = [Path(root)] if Path(root).is_dir() else [], []
    left_out = [] if left_out is None else left_out
    while folders or links:
        folder = folders.pop() if folders else links.pop(0)
        real = folder.resolve()
        if real in seen or not real.is_relative_to(inside):
            left_out.append(folder)
            continue
        seen.add(real)
        try:
            names = sorted(name for name in os.listdir(folder) if not is_ignored(name))
        except OSError as error:
            warn(advice(error))
            continue
        for path in (folder / name for name in names):
            if path.is_dir():
                (links if path.is_symlink() else folders).append(path)
            elif not path.is_symlink() or leads_into(path, inside):
                found.append(path)
            else:
                left_out.append(path)
    return sorted(found)


def leads_into(link, folder):
    """Say whether a link leads to something in `folder`, a resolved path, and not to itself."""
    with contextlib.suppress(OSError, RuntimeError):
        return link.resolve(strict=True).is_relative_to(folder)
    return False


def is_ignored(name):
    """Say whether people do not mean a file or folder of this name: hidden, or left by a system."""
    return name.startswith(".") or name.lower() in SKIPPED_NAMES


@contextlib.contextmanager
def file_lock(path):
    """Hold a lock, the empty file `path`, while the block runs. A killed process holds it no more.

    Raises UserError if another run holds it, or if something else is there.
    """
    path = Path(path)
    is_empty = path.is_file() and path.stat().st_size == 0
    if path.is_symlink() or (path.exists() and not is_empty):
        raise UserError(f"{escape(path)}: not a lock of this kit: delete it")
    lock = filelock.FileLock(path, timeout=0)
    try:
        lock.acquire()
    except filelock.Timeout:
        raise UserError(
            f"{escape(path)}: another run is at work here: wait for it or choose another name"
        ) from None
    try:
        yield
    finally:
        lock.release()
        with contextlib.suppress(OSError):  # somebody else may have opened it already
            path.unlink()


@contextlib.contextmanager
def atomic_write(path):
    """Give a path to write to, which becomes `path` when the block ends without error."""
    path = Path(path)
    # a name has at most 255 bytes
    stem = path.stem if len(os.fsencode(path.stem)) <= 200 else path.stem[:50]
    part = path.with_name(f".{stem}-unfinished-{os.urandom(4).hex()}{path.suffix}")
    open(part, "x").close()  # unlike mkstemp's, with the permissions that new files have here
    try:
        yield part
        # on the disk before its name is: a power cut leaves old or new
        with open(part, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def write_csv(path, header, rows):
    """Write a CSV file whole: `header` a list of names, `rows` lists of cells."""
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
        if facts.st_size > MAX_FILE:
            raise PictureError(f"larger than {MAX_FILE:,} bytes")
        with open(path, "rb") as file:
            if facts.st_size > LARGE_FILE:  # not read whole unless it begins as a picture
                open_picture(file)
                file.seek(0)
            data = file.read()
        return data, open_picture(data)
    except OSError as error:
        raise RefusedError(error.strerror or str(error)) from None


def open_picture(data):
    """Open the first frame of a picture file.

    data: the bytes of the file, or the open file. Returns a PIL image of which only the header has
    been read. Raises PictureError for what is no picture of a known format, has over MAX_PIXELS
    pixels, or is only a preview.
    """
    with picture_errors():
        file = io.BytesIO(drop_png_metadata(data)) if isinstance(data, bytes) else data
        image = Image.open(file, formats=FORMATS)
        limit = MAX_ANIMATED if is_animation(image) else MAX_PIXELS
        if image.width * image.height > limit:
            raise RefusedError(f"larger than {limit:,} pixels")
        if getattr(image, "tag_v2", {}).get(TIFF_SUBFILE_TYPE, 0) & 1:
            raise RefusedError("begins with a small preview, as RAW files do: export it as JPEG")
        return image


def is_animation(image):
    """Say whether a PIL image is one whose decoder keeps several frames at once."""
    return image.format in ("WEBP", "AVIF") and getattr(image, "is_animated", False)


def drop_png_metadata(data):
    """Return a PNG without what Pillow would refuse it for; other data as they are.

    That is all optional chunks but transparency and EXIF: texts may be long, misnamed or broken.
    """
    if not data.startswith(PNG_SIGNATURE):
        return data
    kept, start = [PNG_SIGNATURE], len(PNG_SIGNATURE)
    while start < len(data):
        size, kind = int.from_bytes(data[start : start + 4]), data[start + 4 : start + 8]
        chunk = data[start : start + 12 + size]
        is_whole = zlib.crc32(chunk[4:-4]) == int.from_bytes(chunk[-4:])
        if kind[:1].isupper() or (kind in (b"tRNS", b"eXIf") and is_whole):
            kept.append(chunk)
        start += len(chunk)
    return b"".join(kept)


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
    except Exception as error:  # OSError, SyntaxError, ValueError, struct.error and more
        raise PictureError(f"cannot be decoded ({first_line(error)})") from None


def to_model_input(image, side):
    """Turn a PIL image into the network's input: upright RGB, largest centre square, resized.

    The one such function: training, evaluation and tagging all go through it.
    Returns uint8 of shape (side, side, 3), 0..255. Raises PictureError for broken or cut data.
    """
    with picture_errors():
        image.draft(
            None, (2 * side, 2 * side)
        )  # large JPEGs: decoded at an eighth of the size, say
        # upright before it is resized, as others do it, to the same bits
        image = apply_orientation(normalise_mode(image))
        return np.asarray(rgb(ImageOps.fit(image, (side, side), Image.Resampling.BILINEAR)))


def upright(image):
    """Turn a PIL image into a full-size upright RGB one. Raises PictureError for broken data."""
    with picture_errors():
        return rgb(apply_orientation(normalise_mode(image)))


def normalise_mode(image):
    """Give a PIL image one of the modes L, LA, RGB, RGBA, RGBa, which can be resized."""
    image.load()
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        return grey_8_bit(image)
    if image.mode == "PA" or "transparency" in image.info:
        return image.convert("RGBA")
    if image.mode == "La":
        return image.convert("LA")
    return image if image.mode in ("L", "LA", "RGB", "RGBA", "RGBa") else image.convert("RGB")


def grey_8_bit(image):
    """Scale a grey image of integers or floats to 8 bits, and LA where a value is transparent."""
    low, high = grey_range(image)
    transparent = image.info.get("transparency")
    grey, mask = Image.new("L", image.size), Image.new("L", image.size)
    rows = max(1, STRIPE // image.width)
    for top in range(0, image.height, rows):  # in stripes, which take little memory
        part = image.crop((0, top, image.width, min(top + rows, image.height)))
        numbers = np.array(part, "float32")
        if transparent is not None:
            mask.paste(Image.fromarray(np.uint8(255) * (numbers != transparent)), (0, top))
        numbers -= low
        numbers *= 255 / (high - low)
        np.clip(numbers, 0, 255, out=numbers)
        numbers[np.isnan(numbers)] = 0
        grey.paste(Image.fromarray((numbers + 0.5).astype("uint8")), (0, top))
    result = grey if transparent is None else Image.merge("LA", (grey, mask))
    result.info.update(image.info)  # what tells how to turn it
    return result


def grey_range(image):
    """Return the values of a grey image of many bits that become black and white.

    The range that the file declares (PGM, and TIFF by its tags), else the percentiles DARKEST and
    BRIGHTEST of its finite values, for 12 bits lie in files of 16, and floats have any unit.
    Swapped where a TIFF says that white is zero.
    """
    tags = getattr(image, "tag_v2", {})
    limits = np.array([next(iter(np.ravel(tags.get(tag))), None) for tag in TIFF_RANGE])
    if image.format == "PPM" and image.mode == "I":
        limits = np.array([0, 65535])  # Pillow has scaled it
    if limits.dtype.kind not in "iuf":
        small = image.resize([min(size, 1024) for size in image.size], Image.Resampling.NEAREST)
        numbers = np.asarray(small).astype("float32")
        numbers = numbers[np.isfinite(numbers)] if np.isfinite(numbers).any() else np.zeros(1)
        limits = np.percentile(numbers, (DARKEST, BRIGHTEST))
        if limits[0] == limits[1]:
            limits = numbers.min(), numbers.max()
    low, high = map(float, limits)
    if low == high:  # flat
        high = low + 1
    return (high, low) if tags.get(TIFF_PHOTOMETRIC) == 0 else (low, high)


def rgb(image):
    """Convert to RGB, what is transparent on white."""
    if image.mode in ("RGBA", "LA", "RGBa"):
        copy = Image.new("RGB", image.size, "white")
        copy.paste(image, mask=image)
        return copy
    # converting copies, also from RGB to RGB
    return image if image.mode == "RGB" else image.convert("RGB")


def apply_orientation(image):
    """Turn and mirror a PIL image in place, as EXIF says; return it."""
    with contextlib.suppress(Exception):  # a broken EXIF block: the pixels are there
        ImageOps.exif_transpose(image, in_place=True)
    return image


def crop_square(picture, center_x, center_y, side):
    """Cut a square out of a picture.

    picture: a PIL image, or uint8 (height, width, 3); centre and side in pixels, rounded to whole
    ones. A square that leaves the picture is shifted inside if it fits, else padded with the edge.
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
    if is_image:
        cut = np.asarray(picture.crop((left, top, right, bottom)))
    else:
        cut = picture[top:bottom, left:right]
    return np.pad(cut, [*pads, (0, 0)], mode="edge") if any(map(any, pads)) else cut


def save_jpeg(path, pixels):
    """Save uint8 (height, width, 3) as JPEG: quality 95, no subsampling, no metadata."""
    Image.fromarray(pixels).save(path, "JPEG", quality=95, subsampling=0)
