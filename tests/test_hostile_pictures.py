"""Broken and hostile pictures: a picture or a reason, never a crash, a hang or gigabytes."""

import io
import os
import struct

import numpy as np
import pytest
from conftest import ROOT, SHARED, run_process
from PIL import Image

import imaging

LARGEST = """
import io, resource, sys
from PIL import Image
import imaging
Image.MAX_IMAGE_PIXELS = None
buffer = io.BytesIO()
Image.new(sys.argv[1], (16000, 11100), 0).save(buffer, sys.argv[2])
Image.MAX_IMAGE_PIXELS = imaging.MAX_PIXELS
data = buffer.getvalue()
del buffer
print(imaging.to_model_input(imaging.open_picture(data), 224).shape)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.long
@pytest.mark.parametrize(
    "kind", ["RGB PNG", "RGBA PNG", "P PNG", "I;16 PNG", "RGB JPEG", "L JPEG", "F TIFF"]
)
def test_the_largest_pictures_fit_into_two_gigabytes(kind):
    done = run_process("-c", ROOT, LARGEST, *kind.split())
    shape, kilobytes = done.stdout.splitlines()
    assert shape == "(224, 224, 3)" and int(kilobytes) < 2_000_000  # encoding included


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
    data[place + 1 : place + 3] = b"\x80\0"
    assert imaging.open_picture(bytes(data)).size == (32808, 40)
    data[place : place + 3] = b"\0\0\x3d"  # four million
    one_frame = data.replace(b"ANMF", b"A)MF", 1)  # no animation: one like it took four minutes
    with pytest.raises(imaging.RefusedError, match="a side longer than 65,535 pixels"):
        imaging.open_picture(bytes(one_frame))


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_a_long_strip_is_refused(kind):
    """Broken headers say so; with a palette or of floats these took seconds and gigabytes."""
    file = io.BytesIO()
    Image.new("L", (1, 65_536)).save(file, kind)
    with pytest.raises(imaging.RefusedError, match="a side longer than 65,535 pixels"):
        imaging.open_picture(file.getvalue())


def test_a_file_far_larger_than_a_picture_is_not_read(tmp_path):
    path, film = tmp_path / "tail.jpg", tmp_path / "film.jpg"
    Image.new("RGB", (80, 80)).save(path)
    os.truncate(path, 2**33)  # takes no space
    with pytest.raises(imaging.PictureError, match="larger than 536,870,912 bytes"):
        imaging.read_picture(path)
    os.truncate(path, 2**24)  # what phones hang behind a picture is fine
    assert imaging.read_picture(path)[1].size == (80, 80)
    film.write_bytes(b"\0\0\0\x18ftypqt  ")
    os.truncate(film, 2**28)
    with pytest.raises(imaging.PictureError, match="known format"):
        imaging.read_picture(film)


def test_a_large_png_is_read_like_a_small_one(tmp_path, monkeypatch):
    """Also where metadata that nobody needs is broken."""
    path, broken = tmp_path / "large.png", b"\0\0\0\1iCCPx1234"
    Image.new("RGB", (80, 80)).save(path)
    data = path.read_bytes()
    path.write_bytes(data[:33] + broken + data[33:])  # behind the header
    monkeypatch.setattr(imaging, "LARGE_FILE", 100)
    assert imaging.read_picture(path)[1].size == (80, 80)


@pytest.mark.needs_shared
def test_the_dirty_folder():
    answers = {}
    for path in (SHARED / "data" / "dirty").glob("*/*"):
        try:
            image = imaging.open_picture(path.read_bytes())
            answers[path.name] = imaging.to_model_input(image, 224).shape
        except imaging.PictureError as reason:
            answers[path.name] = str(reason)
    assert answers["yes.mkv"] == "not a picture of a known format"
    assert sum(answer == (224, 224, 3) for answer in answers.values()) >= 17


@pytest.mark.parametrize("mode", ["RGBA", "LA", "I;16", "F"])
def test_pictures_in_stripes_are_those_in_one(monkeypatch, mode):
    numbers = np.random.default_rng(0).integers(0, 255, (90, 70, 4)).astype("uint8")
    image = Image.fromarray(numbers, "RGBA")
    if mode in ("I;16", "F"):
        kind = "uint16" if mode == "I;16" else "float32"
        image = Image.fromarray(numbers[..., 0].astype(kind) * 200)
    image = image.convert(mode)
    whole = np.asarray(imaging.upright(image))
    monkeypatch.setattr(imaging, "STRIPE", 1000)
    assert np.array_equal(np.asarray(imaging.upright(image)), whole) and whole.std() > 10


def test_pixels_that_look_like_comments_are_none():
    data = b"P5 400 400 4095\n" + b"\1#" * 160_000
    assert imaging.to_model_input(imaging.open_picture(data), 75).std() == 0


def test_grey_with_premultiplied_transparency_is_read():
    buffer = io.BytesIO()
    Image.new("LA", (80, 80), (100, 128)).save(buffer, "TIFF")
    kinds = [struct.pack("<HHIH", 338, 3, 1, kind) for kind in (2, 1)]
    image = imaging.open_picture(buffer.getvalue().replace(*kinds))
    assert image.mode == "La"
    assert imaging.to_model_input(image, 75).min() > 200  # half of the white behind, and the grey
