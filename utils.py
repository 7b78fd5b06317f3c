"""What train.py, webcam.py and collect_apple_photos.py share.

Reading pictures, cutting squares around faces, names from outside, messages and files,
the network and its three files, and the drawing of mosaic and report.
"""

import contextlib
import csv
import errno
import hashlib
import io
import os
import sys
import tempfile
import time
import unicodedata
from pathlib import Path

if not (3, 11) <= sys.version_info[:2] <= (3, 13):
    sys.exit(
        f"error: this is Python {sys.version_info[0]}.{sys.version_info[1]}: "
        "install Python 3.11, 3.12 or 3.13, which TensorFlow and Keras have packages for"
    )
try:
    import numpy as np
    import pillow_heif
    import tqdm
    from PIL import Image
except ImportError as missing:
    sys.exit(f"error: {missing}: run `pip install -r requirements.txt` in the folder of this script")

# Rarely used parsers are where the holes are: only these are ever tried.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "HEIF", "AVIF")
MAX_PIXELS = 178_956_970  # pictures above it are bombs or maps, and would not fit into 2 GB decoded
SKIPPED_NAMES = {"thumbs.db", "desktop.ini", "__macosx"}  # what systems leave in folders, lower case
RESERVED_NAMES = {"con", "prn", "aux", "nul"} | {f"{p}{n}" for p in ("com", "lpt") for n in "123456789"}

Image.MAX_IMAGE_PIXELS = MAX_PIXELS
pillow_heif.register_heif_opener()


# ---------------------------------------------------------------- messages


class UserError(Exception):
    """Something a user can mend: one line that names the file or option and says what to do."""


class PictureError(Exception):
    """A file that gives no picture; the text is the reason, without the file's name."""


def say(text):
    """Print one line on stdout at once, so that a program reading it never waits."""
    print(text, flush=True)


def warn(text):
    """Print one line on stderr that begins `warning: `."""
    print(f"warning: {text}", file=sys.stderr, flush=True)


def escape(name):
    """Return `name` (str or path) with control characters, line breaks and lone surrogates as \\x escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(name))


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
    name = f"{escape(error.filename)}: " if error.filename is not None else ""
    return f"{name}{error.strerror or error}: {hints.get(error.errno, 'check the disk and try again')}"


def run(main):
    """Call a script's `main()` and leave with its exit code.

    0 (or None) done, 1 an expected failure told in one line, 3 from the accuracy gate, 130 Ctrl-C.
    Text that leaves the process is UTF-8, save on a terminal, which gets escapes for what it lacks.
    """
    for stream in (sys.stdout, sys.stderr):
        encoding = stream.encoding if stream.isatty() else "utf-8"
        stream.reconfigure(encoding=encoding, errors="backslashreplace")
    try:
        code = main() or 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        code = 1
    except BrokenPipeError:  # the reader of our output, `head` say, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    except OSError as error:
        print(f"error: {advice(error)}", file=sys.stderr)
        code = 1
    except MemoryError:
        print("error: out of memory: close other programs or use a smaller --batch-size", file=sys.stderr)
        code = 1
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        code = 130
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


# ---------------------------------------------------------------- names and files


def folder_names(names, taken=()):
    """Return {name: folder name}: readable, safe on Linux, macOS and Windows, and distinct even there.

    NFC; separators and control characters become `_`; no leading dot, trailing dot or space; at most
    80 characters and 200 bytes; names that fall together by case or normalisation get ` (2)`, ` (3)`…
    `taken`: folder names that are in use already.
    """
    used, folders = {unicodedata.normalize("NFC", name).casefold() for name in taken}, {}
    for name in sorted(set(names)):
        text = unicodedata.normalize("NFC", name)
        text = "".join("_" if c in '/\\:*?"<>|' or not c.isprintable() else c for c in text)[:80]
        text = text.encode()[:200].decode(errors="ignore").strip(" ").rstrip(". ")
        if text.startswith("."):
            text = "_" + text[1:]
        if not text or text.split(".")[0].rstrip().lower() in RESERVED_NAMES:
            text = "_" + text
        folder, number = text, 1
        while folder.casefold() in used:
            number += 1
            folder = f"{text} ({number})"
        used.add(folder.casefold())
        folders[name] = folder
    return folders


def list_files(root):
    """Return the files below the folder `root`, any depth, sorted, as paths.

    Left out: dot files and dot folders, what systems leave behind, links that leave `root` or loop.
    """
    root = Path(root)
    inside, found, seen = root.resolve(), [], set()
    for folder, subfolders, files in os.walk(root, followlinks=True):
        real = Path(folder).resolve()
        if real in seen or not real.is_relative_to(inside):
            subfolders.clear()
            continue
        seen.add(real)
        subfolders[:] = sorted(name for name in subfolders if not is_ignored(name))
        for name in files:
            path = Path(folder, name)
            if not is_ignored(name) and (not path.is_symlink() or path.resolve().is_relative_to(inside)):
                found.append(path)
    return sorted(found)


def is_ignored(name):
    """Say whether a file or folder name is one that people do not mean: hidden, or left by a system."""
    return name.startswith(".") or name.lower() in SKIPPED_NAMES


@contextlib.contextmanager
def whole_file(path):
    """Give a path beside `path` to write to, and rename it to `path` when the block ends without error."""
    path = Path(path)
    handle, name = tempfile.mkstemp(prefix=f".{path.stem}-", suffix=path.suffix, dir=path.parent)
    os.close(handle)
    try:
        yield Path(name)
        with open(name, "rb+") as file:  # on the disk before its name is: a power cut leaves old or new
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(name, 0o666 & ~umask)
        os.replace(name, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)


def write_csv(path, header, rows):
    """Write a CSV file whole: `header` a list of names, `rows` lists of cells (strings are escaped)."""
    with whole_file(path) as part, open(part, "w", newline="", encoding="utf-8", errors="backslashreplace") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows([csv_cell(c) if isinstance(c, str) else c for c in row] for row in rows)


# ---------------------------------------------------------------- pictures


def open_picture(data):
    """Open the first frame of a picture file.

    data: the bytes of the file. Returns a PIL image of which only the header has been read.
    Raises PictureError for what is no picture of a known format, or has over MAX_PIXELS pixels.
    """
    with picture_errors():
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        if image.width * image.height > MAX_PIXELS:
            raise PictureError(f"larger than {MAX_PIXELS:,} pixels")
        return image


@contextlib.contextmanager
def picture_errors():
    """Turn whatever Pillow's parsers raise over a broken file into PictureError with the reason."""
    try:
        yield
    except (PictureError, MemoryError, KeyboardInterrupt):
        raise
    except Image.UnidentifiedImageError:
        raise PictureError("not a picture of a known format") from None
    except Exception as error:  # parsers raise OSError, SyntaxError, ValueError, struct.error and more
        reason = escape(str(error) or type(error).__name__).partition("\\n")[0]
        raise PictureError(f"cannot be decoded ({reason[:100]})") from None


def square(image, side):
    """Turn a PIL image into the network's input: upright RGB, its largest centre square, resized.

    The one such function: training, evaluation and tagging all go through it.
    Returns uint8 of shape (side, side, 3), 0..255. Raises PictureError for broken or truncated data.
    """
    with picture_errors():
        image.draft(None, (2 * side, 2 * side))  # large JPEGs: decode a half, quarter or eighth at once
        image = plain_mode(image)
        margin_x, margin_y = (max(0, a - b) / 2 for a, b in (image.size, image.size[::-1]))
        box = (margin_x, margin_y, image.width - margin_x, image.height - margin_y)
        if image.size != (side, side):
            image = image.resize((side, side), Image.Resampling.BILINEAR, box, reducing_gap=3.0)
        return np.asarray(turned(rgb(image)))


def upright(image):
    """Turn a PIL image into a full-size upright RGB one. Raises PictureError for broken data."""
    with picture_errors():
        return turned(rgb(plain_mode(image)))


def plain_mode(image):
    """Give a PIL image a mode that can be resized: palettes, bits and 16-bit or float greys become others."""
    image.load()
    info = image.info
    if image.mode in ("P", "PA") or (image.mode in ("L", "RGB", "1") and "transparency" in info):
        return image.convert("RGBA" if image.mode == "PA" or "transparency" in info else "RGB")
    if image.mode == "1":
        return image.convert("L")
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        return grey_8_bit(image)
    return image


def grey_8_bit(image):
    """Scale a 16-bit, 32-bit or float grey image to 8 bits: by its mode's range, never by its content."""
    grey = np.asarray(image).astype("float32")
    scale = 255 if image.mode == "F" and grey.max(initial=0) <= 1 else 1 if image.mode == "F" else 1 / 257
    return with_orientation_of(image, Image.fromarray(np.clip(np.nan_to_num(grey) * scale, 0, 255).astype("uint8")))


def with_orientation_of(image, copy):
    """Give `copy` what tells how to turn it: converting through NumPy drops it."""
    copy.info.update(image.info)
    copy.getexif().update(image.getexif())
    return copy


def rgb(image):
    """Convert to RGB, what is transparent on white."""
    if image.mode in ("RGBA", "LA", "RGBa", "La"):
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return with_orientation_of(image, Image.alpha_composite(white, image).convert("RGB"))
    return image.convert("RGB")


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


def crop_square(pixels, center_x, center_y, side):
    """Cut a square out of a picture.

    pixels: uint8 (height, width, 3); centre and side in pixels, fractions are rounded to whole ones.
    A square that leaves the picture is shifted inside if it fits, else padded with the edge pixels.
    Returns uint8 (n, n, 3) with n = round(side), at least 1.
    """
    n = max(1, round(side))
    spans, pads = [], []
    for center, size in ((center_y, pixels.shape[0]), (center_x, pixels.shape[1])):
        start = round(center - n / 2)
        if n <= size:
            start = min(max(start, 0), size - n)
        first, last = min(max(start, 0), size - 1), max(min(start + n, size), 1)
        spans.append(slice(first, last))
        pads.append((first - start, start + n - last))
    cut = pixels[spans[0], spans[1]]
    return np.pad(cut, [*pads, (0, 0)], mode="edge") if any(map(any, pads)) else cut


def save_jpeg(path, pixels):
    """Save uint8 (height, width, 3) as JPEG of quality 95, colours not subsampled, with no metadata."""
    Image.fromarray(pixels).save(path, "JPEG", quality=95, subsampling=0)
