"""Reading pictures of every kind, safely, cutting squares out of them, and the face detector."""

import collections
import contextlib
import functools
import io
import os
import stat
import warnings
import zlib
from pathlib import Path

import utils

# isort: split
# Pillow keeps so many blocks of 16 MB for the next picture. Without them threads wait for each
# other in the system's memory calls. Eight hold a picture of 12 megapixels twice.
os.environ.setdefault("PILLOW_BLOCKS_MAX", str(8 * (os.cpu_count() or 1)))
import numpy as np
import pillow_heif
from PIL import Image, ImageOps, PngImagePlugin

CASCADE = "haarcascade_frontalface_default.xml"
# Rarely used parsers are where the holes are: only these are ever tried.
FORMATS = "JPEG PNG WEBP GIF BMP TIFF PPM HEIF AVIF".split()
PICTURE_ENDINGS = """
    .jpg .jpeg .jpe .jfif .png .webp .gif .bmp .tif .tiff .pgm .ppm .heic .heif .hif .avif
""".split()
NO_PICTURE = "not a picture of a known format"
MAX_LINES = 20  # of one kind of warning
MAX_PIXELS = 178_956_970  # a larger picture takes over 2 GB to decode and turn
MAX_ANIMATED = 20_000_000  # the first frame of more takes seconds
MAX_PICTURE_SIDE = 65_535  # a JPEG's; of as many pixels in one long strip, decoders need minutes
LARGE_FILE, MAX_FILE = 2**26, 2**29  # bytes: may be a film; is no picture
THREADS = 2  # pictures in work at once: one of 12 megapixels takes 90 MB
SHAPE_TOLERANCE = 0.02  # of width / height
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
PNG_OPTIONAL = (b"tRNS", b"eXIf", b"acTL", b"fcTL", b"fdAT")  # chunks that are used
PNG_TEXTS = (b"tEXt", b"zTXt", b"iTXt")
# How texts begin that may say how a PNG is turned: as ImageMagick and GraphicsMagick write it, and
# XMP that is not packed.
PNG_TURNS = (b"Raw profile type exif\0", b"Raw profile type APP1\0", b"XML:com.adobe.xmp\0\0")
TIFF_SUBFILE_TYPE, TIFF_PHOTOMETRIC = 254, 262
TIFF_RANGE = 280, 281  # tags of the smallest and the largest value
STRIPE = 2**20  # pixels that are computed with at once
DARKEST, BRIGHTEST = 0.1, 99.9  # percentiles of a grey picture of many bits: black, white

Image.MAX_IMAGE_PIXELS = MAX_PIXELS
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY  # a long text costs no picture
pillow_heif.register_heif_opener()
warnings.filterwarnings("ignore", module="PIL")  # remarks on metadata that is not used


class PictureError(Exception):
    """A file that gives no picture; the text is the reason, without the file's name."""


class RefusedError(PictureError):
    """A file that cannot be read, or a picture that cannot be used: it is no film either."""


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
                if file.read(len(PNG_SIGNATURE)) != PNG_SIGNATURE:
                    file.seek(0)
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
    pixels or MAX_PICTURE_SIDE in a row, or is only a preview.
    """
    with picture_errors():
        file = io.BytesIO(drop_png_metadata(data)) if isinstance(data, bytes) else data
        image = Image.open(file, formats=FORMATS)
        # decoders of these keep several frames at once
        limit = MAX_ANIMATED if is_animated(image, ("WEBP", "AVIF")) else MAX_PIXELS
        if image.width * image.height > limit:
            raise RefusedError(f"larger than {limit:,} pixels")
        if max(image.size) > MAX_PICTURE_SIDE:
            raise RefusedError(f"a side longer than {MAX_PICTURE_SIDE:,} pixels")
        if getattr(image, "tag_v2", {}).get(TIFF_SUBFILE_TYPE, 0) & 1:
            raise RefusedError("begins with a small preview, as RAW files do: export it as JPEG")
        return image


def is_animated(image, formats):
    """Say whether a PIL image has frames that follow in time, which pages and previews do not.

    formats: of those that are looked at. Raises PictureError for broken data.
    """
    with picture_errors():
        return image.format in formats and getattr(image, "is_animated", False)


def drop_png_metadata(data):
    """Return a PNG without what Pillow would refuse it for; other data as they are.

    That is all optional chunks but transparency, EXIF, the frames of an animation and texts that
    may hold the orientation: others may be long, misnamed or broken.
    """
    if not data.startswith(PNG_SIGNATURE):
        return data
    kept = [PNG_SIGNATURE]
    for kind, chunk in png_chunks(data):
        is_whole = zlib.crc32(chunk[4:-4]) == int.from_bytes(chunk[-4:])
        may_turn = kind in PNG_TEXTS and chunk[8:].startswith(PNG_TURNS)
        is_used = kind in PNG_OPTIONAL or may_turn
        if kind[:1].isupper() or (is_used and is_whole):
            kept.append(chunk)
    return b"".join(kept)


def png_chunks(data):
    """Yield pairs (kind, chunk) of a PNG; a chunk with its length, kind and checksum."""
    start = len(PNG_SIGNATURE)
    while start < len(data):
        size, kind = int.from_bytes(data[start : start + 4]), data[start + 4 : start + 8]
        yield kind, data[start : start + 12 + size]
        start += 12 + size


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
        raise PictureError(NO_PICTURE) from None
    except Exception as error:  # OSError, SyntaxError, ValueError, struct.error and more
        raise PictureError(f"cannot be decoded ({utils.first_line(error)})") from None


def skip_reason(error, path):
    """Return why a PictureError has a file skipped: NO_PICTURE only if its ending says so, too."""
    if str(error) != NO_PICTURE or path.suffix.lower() not in PICTURE_ENDINGS:
        return str(error)
    damaged = "damaged, or of a kind that cannot be read: save it as JPEG or PNG"
    return damaged if path.stat().st_size else "empty"


def warn_about_skipped(skipped):
    """Warn about files by reason, {reason: [path]}: one line for all that are no pictures."""
    others = skipped.pop(NO_PICTURE, [])
    if others:
        endings = collections.Counter(path.suffix.lower() or "without ending" for path in others)
        kinds = ", ".join(f"{number} {ending}" for ending, number in endings.most_common(8))
        no_pictures = utils.count(len(others), "file is no picture", "files are no pictures")
        utils.warn(f"{utils.escape(others[0].parent)}…: {no_pictures}: {utils.escape(kinds)}")
    for reason, paths in skipped.items():
        for path in paths[:MAX_LINES]:
            utils.warn(f"{utils.escape(path)}: skipped: {reason}")
        if len(paths) > MAX_LINES:
            utils.warn(f"{len(paths) - MAX_LINES} more files skipped: {reason}")


def to_model_input(image, side):
    """Turn a PIL image into the network's input: upright RGB, largest centre square, resized.

    The one such function: training, evaluation and tagging all go through it.
    Returns uint8 of shape (side, side, 3), 0..255. Raises PictureError for broken or cut data.
    """
    with picture_errors():
        image.draft(None, (2 * side, 2 * side))  # JPEGs may be decoded at an eighth of the size
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
    """Scale a grey image of integers or floats to 8 bits. What is transparent becomes white."""
    low, high = grey_range(image)
    transparent = image.info.pop("transparency", None)
    grey = Image.new("L", image.size)
    rows = max(1, STRIPE // image.width)
    for top in range(0, image.height, rows):  # in stripes, which take little memory
        part = image.crop((0, top, image.width, min(top + rows, image.height)))
        numbers = np.array(part, "float32")
        scaled = np.clip((numbers - low) * (255 / (high - low)), 0, 255)
        scaled[np.isnan(scaled)] = 0
        scaled[numbers == transparent] = 255
        grey.paste(Image.fromarray((scaled + 0.5).astype("uint8")), (0, top))
    grey.info.update(image.info)  # what tells how to turn it
    return grey


def grey_range(image):
    """Return the values of a grey image of many bits that become black and white.

    The range that the file declares (PGM, and TIFF by its tags), else the percentiles DARKEST and
    BRIGHTEST of its finite values, for 12 bits lie in files of 16, and floats have any unit.
    Swapped where a TIFF says that white is zero.
    """
    tags = getattr(image, "tag_v2", {})
    limits = np.ravel([tags.get(tag) for tag in TIFF_RANGE])
    if image.format == "PPM" and image.mode == "I":
        limits = np.array([0, 65535])  # Pillow has scaled it
    if limits.dtype.kind not in "iuf":
        small = image.resize([min(size, 1024) for size in image.size], Image.Resampling.NEAREST)
        numbers = np.asarray(small).astype("float32")
        numbers = numbers[np.isfinite(numbers)]
        limits = np.percentile(numbers, (DARKEST, BRIGHTEST)) if numbers.size else (0, 0)
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


def is_other_shape(a, b):
    """Say whether two sizes (width, height) have different ratios; no if one holds 0 or nan."""
    return abs(a[0] * b[1] - a[1] * b[0]) > SHAPE_TOLERANCE * a[1] * b[0]


def crop_square(picture, center_x, center_y, side):
    """Cut a square out of a picture.

    picture: a PIL image, or uint8 (height, width, 3); centre and side in pixels, rounded to whole
    ones. A square that leaves the picture is shifted inside if it fits, else padded with the edge.
    Returns uint8 (n, n, 3) with n = round(side), at least 1, and at most what can be read again.
    """
    n = round(min(max(1, side), MAX_PIXELS**0.5 - 1))
    is_image = isinstance(picture, Image.Image)
    width, height = picture.size if is_image else picture.shape[1::-1]
    rows, columns = pixel_range(center_y, n, height), pixel_range(center_x, n, width)
    top, left = rows[0], columns[0]
    if is_image:
        cut = np.asarray(picture.crop((left, top, columns[-1] + 1, rows[-1] + 1)))
    else:
        cut = picture[top : rows[-1] + 1, left : columns[-1] + 1]
    if cut.shape[:2] == (n, n):
        return cut
    return cut[rows - top][:, columns - left]


def pixel_range(center, n, size):
    """Return the n pixels of 0..size-1 around a centre; past the edge, its pixel again."""
    start = round(center - n / 2)
    if n <= size:
        start = min(max(start, 0), size - n)
    return np.clip(np.arange(start, start + n), 0, size - 1)


def save_jpeg(path, pixels):
    """Save uint8 (height, width, 3) as JPEG: quality 95, no subsampling, no metadata."""
    Image.fromarray(pixels).save(path, "JPEG", quality=95, subsampling=0)


@functools.cache
def load_cascade():
    """Return OpenCV's face detector, from the current folder, else from beside this script.

    Raises UserError where its file is missing or damaged.
    """
    import cv2

    path = Path(CASCADE)
    if not path.is_file():
        path = Path(__file__).resolve().with_name(CASCADE)
    cascade = cv2.CascadeClassifier()
    with contextlib.suppress(OSError, ValueError, cv2.error, SystemError):
        # not by its name: OpenCV ends the process on some, and on Windows it opens only ASCII
        text = path.read_text("utf-8")
        mode = cv2.FILE_STORAGE_READ | cv2.FILE_STORAGE_MEMORY
        storage = cv2.FileStorage(text, mode)  # its nodes live as long as it does
        cascade.read(storage.getFirstTopLevelNode())
    if cascade.empty():
        raise utils.UserError(f"{utils.escape(path)}: missing or damaged: copy it from the kit")
    return cascade
