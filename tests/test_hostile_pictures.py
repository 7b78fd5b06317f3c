"""Broken and hostile pictures: a picture or a reason, never a crash, a hang or gigabytes."""

import io
import os
import random
import resource
import struct
import subprocess
import sys

import numpy as np
import pytest
from conftest import FAST, ROOT, SHARED, draw_classes, run_process
from PIL import Image

import imaging

KINDS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "HEIF", "AVIF")


def originals():
    """Return [bytes] of small pictures of every format, some with what makes parsing harder."""
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 255, (40, 56, 3)).astype("uint8"))
    exif = Image.Exif()
    exif[0x0112] = 6
    found = []
    for kind in KINDS:
        options = {"exif": exif} if kind in ("JPEG", "PNG", "WEBP", "TIFF", "HEIF", "AVIF") else {}
        for one in (image, image.convert("L")):
            buffer = io.BytesIO()
            one.save(buffer, kind, **options)
            found.append(buffer.getvalue())
    for kind, options in (
        ("JPEG", {"progressive": True}),
        ("PNG", {"bits": 4}),
        ("TIFF", {"compression": "tiff_lzw"}),
    ):
        buffer = io.BytesIO()
        (image.quantize(16) if kind == "PNG" else image).save(buffer, kind, **options)
        found.append(buffer.getvalue())
    frames = [image.rotate(90 * n) for n in range(3)]
    for kind in ("GIF", "WEBP", "PNG"):
        buffer = io.BytesIO()
        frames[0].save(buffer, kind, save_all=True, append_images=frames[1:])
        found.append(buffer.getvalue())
    return found


def spoil(data, others, rng):
    """Return a spoilt copy: cut, bits flipped, bytes overwritten, parts of another format."""
    copy, start = bytearray(data), rng.randrange(len(data))
    way = rng.randrange(5)
    if way == 0:
        del copy[start:]
    elif way == 1:
        for _ in range(rng.randrange(1, 12)):
            copy[rng.randrange(len(copy))] ^= 1 << rng.randrange(8)
    elif way == 2:
        place = rng.randrange(min(len(data) - 4, 200))
        copy[place : place + 4] = rng.choice((b"\xff" * 4, b"\x7f\xff\xff\xff", bytes(4)))
    elif way == 3:
        other = rng.choice(others)
        copy[start:] = other[rng.randrange(len(other)) :]
    else:
        copy[start:start] = data[rng.randrange(len(data)) :][: rng.randrange(1, 2000)]
    return bytes(copy)


def test_spoilt_pictures_give_a_picture_or_a_reason():
    """test_mutations.py does this by the hundred thousand."""
    rng, sources = random.Random(1), originals()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # kB, of the whole test session
    pictures = reasons = 0
    for n in range(300):
        data = spoil(sources[n % len(sources)], sources, rng)
        try:
            assert imaging.to_model_input(imaging.open_picture(data), 75).shape == (75, 75, 3)
            imaging.upright(imaging.open_picture(data))
            pictures += 1
        except imaging.PictureError as error:
            assert str(error) and str(error).isprintable()
            reasons += 1
    assert pictures > 20 and reasons > 20  # both ways out were taken
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1e6


LARGEST = """
import io, resource, sys
import numpy as np
from PIL import Image
import imaging
Image.MAX_IMAGE_PIXELS = None
buffer = io.BytesIO()
Image.new(sys.argv[1], (int(sys.argv[2]), int(sys.argv[3])), 0).save(buffer, sys.argv[4])
Image.MAX_IMAGE_PIXELS = imaging.MAX_PIXELS
data = buffer.getvalue()
del buffer
print(imaging.to_model_input(imaging.open_picture(data), 224).shape)
"""


@pytest.mark.long
@pytest.mark.parametrize(
    ("mode", "kind"),
    [
        ("RGB", "PNG"),
        ("RGBA", "PNG"),
        ("P", "PNG"),
        ("L", "JPEG"),
        ("RGB", "JPEG"),
        ("I;16", "PNG"),
        ("F", "TIFF"),
    ],
)
def test_the_largest_pictures_fit_into_two_gigabytes(mode, kind):
    program = LARGEST.replace(
        "print", "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, end=' '); print"
    )
    done = subprocess.run([sys.executable, "-c", program, mode, "16000", "11100", kind], cwd=ROOT,
                          capture_output=True, text=True)  # fmt: skip
    assert "(224, 224, 3)" in done.stdout, done.stderr
    assert int(done.stdout.split()[0]) < 2_000_000  # kB, encoding included


def test_an_animation_on_a_vast_canvas_is_refused():
    """One changed number in its header, and its first frame takes many seconds."""
    frames = [Image.new("RGB", (40, 40), color) for color in ("red", "blue")]
    file = io.BytesIO()
    frames[0].save(file, "WEBP", save_all=True, append_images=frames[1:])
    data = bytearray(file.getvalue())
    place = data.index(b"VP8X") + 12  # width and height less 1, of three bytes each
    assert data[place : place + 6] == b"\x27\0\0\x27\0\0"
    data[place + 2] = 16
    with pytest.raises(imaging.RefusedError, match="larger than 20,000,000 pixels"):
        imaging.open_picture(bytes(data))
    data[place + 2] = 1
    assert imaging.open_picture(bytes(data)).size == (65576, 40)


def test_pixels_that_look_like_comments_are_none():
    data = b"P5 400 400 4095\n" + b"\1#" * 160_000
    assert imaging.to_model_input(imaging.open_picture(data), 75).std() == 0


def test_grey_with_premultiplied_transparency_is_read():
    buffer = io.BytesIO()
    Image.new("LA", (80, 80), (100, 128)).save(buffer, "TIFF")
    data = buffer.getvalue().replace(
        struct.pack("<HHIH", 338, 3, 1, 2), struct.pack("<HHIH", 338, 3, 1, 1)
    )
    image = imaging.open_picture(data)
    assert (
        image.mode == "La" and imaging.to_model_input(image, 75).min() > 200
    )  # half of the white behind, and the grey


def test_a_file_far_larger_than_a_picture_is_not_read(tmp_path):
    path = tmp_path / "tail.jpg"
    Image.new("RGB", (80, 80)).save(path)
    os.truncate(path, 2**33)  # takes no space
    with pytest.raises(imaging.PictureError, match="larger than 536,870,912 bytes"):
        imaging.read_picture(path)
    os.truncate(path, 2**24)  # what phones hang behind a picture is fine
    assert imaging.read_picture(path)[1].size == (80, 80)


def test_a_large_film_is_no_picture(tmp_path):
    path = tmp_path / "film.jpg"
    path.write_bytes(b"\0\0\0\x18ftypqt  ")
    os.truncate(path, 2**28)
    with pytest.raises(imaging.PictureError, match="known format"):
        imaging.read_picture(path)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "I;16", "F"])
def test_pictures_in_stripes_are_those_in_one(monkeypatch, mode):
    numbers = np.random.default_rng(0).integers(0, 255, (90, 70, 4)).astype("uint8")
    image = Image.fromarray(numbers, "RGBA").convert("LA" if mode == "LA" else "RGBA")
    if mode in ("I;16", "F"):
        image = Image.fromarray(
            numbers[..., 0].astype({"I;16": "uint16", "F": "float32"}[mode]) * 200
        )
    whole = np.asarray(imaging.upright(image))
    monkeypatch.setattr(imaging, "STRIPE", 1000)
    assert np.array_equal(np.asarray(imaging.upright(image)), whole) and whole.std() > 10


def test_a_file_that_blows_up_is_refused_before_it_is_decoded():
    program = (
        "import resource; resource.setrlimit(resource.RLIMIT_AS, (2**31, 2**31))\n"
        + """
import struct, zlib, imaging
body = b"\\x89PNG\\r\\n\\x1a\\n"
header = struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
for name, data in ((b"IHDR", header), (b"IDAT", zlib.compress(bytes(10**6)))):
    body += struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
try:
    imaging.to_model_input(imaging.open_picture(body), 75)
except imaging.PictureError as error:
    print(error)
"""
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout, done.stderr


@pytest.mark.needs_shared
def test_the_dirty_folder():
    answers = {}
    for path in sorted((SHARED / "data" / "dirty").rglob("*")):
        if path.is_file():
            try:
                answers[path.name] = imaging.to_model_input(
                    imaging.open_picture(path.read_bytes()), 224
                ).shape
            except imaging.PictureError as reason:
                answers[path.name] = str(reason)
    assert answers["yes.mkv"] == answers["ORL_README"] == "not a picture of a known format"
    assert sum(answer == (224, 224, 3) for answer in answers.values()) >= 17


@pytest.mark.slow
def test_a_training_run_over_a_set_of_which_a_third_is_broken(tmp_path, weights_file):
    data = draw_classes(tmp_path / "data", {"a": 20, "b": 20})
    rng, sources = random.Random(3), originals()
    for n in range(20):
        (data / "ab"[n % 2] / f"broken{n}.jpg").write_bytes(
            sources[n % len(sources)][: rng.randrange(1, 60)]
        )
    done = run_process(ROOT / "train.py", tmp_path, "data", "m", *FAST, "--weights", weights_file)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("images: 32 train, 8 validation, 2 classes, 20 skipped")
    listed = [line for line in done.stderr.splitlines() if "skipped: " in line]
    assert len(listed) == 20 and all(line.startswith("warning: data/") for line in listed)
    assert done.stderr.count("warning: ") <= 22
