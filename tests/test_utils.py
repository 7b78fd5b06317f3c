"""The shared module: pictures of every kind in, safe names and whole files out."""

import contextlib
import io
import os
import signal
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
from conftest import ROOT
from photos_library import STORED
from PIL import Image
from tagged_photos import packet

import imaging
import utils

RED, BLUE = (220, 30, 30), (30, 40, 220)


def two_halves(width=80, height=60, colours=(RED, BLUE)):
    image = Image.new("RGB", (width, height), colours[0])
    image.paste(colours[1], (width // 2, 0, width, height))
    return image


def encoded(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def decoded(data, side=40):
    return imaging.to_model_input(imaging.open_picture(data), side)


MODES = "1 PNG,L PNG,P PNG,P GIF,LA PNG,RGBA PNG,RGBA WEBP,CMYK JPEG,CMYK TIFF,I;16 PNG,I;16 TIFF"
MODES += ",I TIFF,F TIFF,YCbCr JPEG,RGB JPEG,RGB PNG,RGB BMP,RGB PPM,RGB HEIF,RGB AVIF"
NUMBERS = {"I;16": "uint16", "I": "int32", "F": "float32"}
DARK, BRIGHT = (10, 20, 60), (250, 240, 180)


@pytest.mark.parametrize("mode", MODES.split(","))
def test_every_format_and_mode_gives_its_colours(mode):
    mode, kind = mode.split()
    image = two_halves(colours=(DARK, BRIGHT))
    if mode in NUMBERS:
        scale = 1 if mode == "F" else 257
        image = Image.fromarray(np.asarray(image.convert("L")).astype(NUMBERS[mode]) * scale)
    pixels = decoded(encoded(image if mode in NUMBERS else image.convert(mode), kind))
    assert pixels.shape == (40, 40, 3) and pixels.dtype == np.uint8
    assert pixels[:, :15].mean() < 50 and pixels[:, 25:].mean() > 200
    if mode in ("RGB", "P", "RGBA", "CMYK", "YCbCr"):
        for x, colour in ((5, DARK), (35, BRIGHT)):
            assert pixels[20, x] == pytest.approx(np.array(colour), abs=25)


@pytest.mark.parametrize("orientation", range(10))
def test_exif_turns_are_undone(orientation):
    upright = np.asarray(two_halves(80, 60).resize((64, 48))).copy()
    upright[:24] //= 2  # four different quarters
    image = Image.fromarray(upright)
    raw = image.transpose(STORED[orientation]) if orientation in STORED else image
    exif = Image.Exif()
    exif[0x0112] = orientation
    expected = decoded(encoded(image, "PNG"), 24).astype(int)
    assert np.abs(decoded(encoded(raw, "PNG", exif=exif), 24) - expected).max() <= 1
    full = np.asarray(imaging.upright(imaging.open_picture(encoded(raw, "PNG", exif=exif))))
    assert np.array_equal(full, upright)


RAMP = np.repeat(np.linspace(0, 1, 80)[None], 60, 0)  # black on the left, white on the right


def greys(numbers, kind="TIFF", **options):
    """Save grey numbers as a file, read it again; return the middle row as floats 0..1."""
    data = encoded(Image.fromarray(numbers), kind, **options)
    return np.asarray(imaging.upright(imaging.open_picture(data)))[30, :, 0] / 255


@pytest.mark.parametrize(
    "numbers",
    [
        (RAMP * 65535).astype("uint16"),
        (RAMP * 4095).astype("uint16"),
        (RAMP * 900).astype("int32"),
        (RAMP * 2 - 1).astype("float32"),
        (280 + 30 * RAMP).astype("float32"),
    ],
    ids=["16 bits", "12 of 16 bits", "int32", "-1 to 1", "kelvin"],
)
def test_greys_of_many_bits_show_what_they_hold(numbers):
    """Whatever the unit, one odd pixel, and whether white is zero."""
    for kind in ("TIFF", "PNG") if numbers.dtype == "uint16" else ("TIFF",):
        assert np.abs(greys(numbers, kind) - RAMP[0]).max() < 0.02
    if numbers.dtype != "int32":  # no such files
        assert np.abs(greys(numbers, tiffinfo={262: 0}) - RAMP[0][::-1]).max() < 0.02
    for odd in (np.nan, np.inf, -1e30) if numbers.dtype == "float32" else (numbers.max() // 2,):
        numbers = numbers.copy()
        numbers[0, 0] = odd
        assert np.abs(greys(numbers) - RAMP[0]).max() < 0.02


def test_flat_and_empty_greys_are_pictures():
    for numbers in (np.full((9, 9), 700, "uint16"), np.full((9, 9), np.nan, "float32")):
        image = imaging.upright(imaging.open_picture(encoded(Image.fromarray(numbers), "TIFF")))
        assert np.asarray(image).std() == 0


def test_a_declared_range_counts():
    numbers = (RAMP * 4095).astype("uint16")
    assert abs(greys(numbers, tiffinfo={280: 0, 281: 8190}).max() - 0.5) < 0.01
    plain = b"P2 80 1 1000\n" + b" ".join(b"%d" % n for n in np.arange(80) * 5)
    pixels = np.asarray(imaging.upright(imaging.open_picture(plain)))[0, :, 0]
    assert np.abs(pixels - np.arange(80) * 5 * 255 / 1000).max() <= 1


def png_with(kind, body, checksum=None):
    """Return a PNG with one more chunk behind its header, whose checksum is right if not given."""
    data = encoded(two_halves(), "PNG")
    checksum = checksum or struct.pack(">I", zlib.crc32(kind + body))
    return data[:33] + struct.pack(">I", len(body)) + kind + body + checksum + data[33:]


EXIF_KEY = b"Raw profile type exif\0\0"


@pytest.mark.parametrize("kind", [b"zTXt", b"tEXt", b"iTXt"])
def test_a_png_is_turned_by_its_texts(kind):
    """As ImageMagick and GraphicsMagick write EXIF, and as XMP has it."""
    exif = Image.Exif()
    exif[0x0112] = 6
    content = exif.tobytes()
    profile = b"\nexif\n%8d\n%s\n" % (len(content), content.hex().encode())
    texts = {b"zTXt": EXIF_KEY + zlib.compress(profile), b"tEXt": EXIF_KEY[:-1] + profile}
    xmp = packet("<tiff:Orientation>6</tiff:Orientation>")
    texts[b"iTXt"] = b"XML:com.adobe.xmp\0\0\0\0\0" + xmp
    turned = two_halves().transpose(Image.Transpose.ROTATE_270)
    assert np.array_equal(decoded(png_with(kind, texts[kind])), decoded(encoded(turned, "PNG")))


CHUNKS = [
    (b"zTXt", EXIF_KEY + zlib.compress(b"0" * 3_000_000)),
    (b"zTXt", EXIF_KEY + b"broken"),
    (b"tEXt", b"transparency\0yes"),
    (b"eXIf", b"MM\0*broken"),
    (b"zTXt", b"Title\0\0broken"),
    (b"iCCP", b"profile\0\0broken", b"1234"),  # a wrong checksum
    (b"eXIf", b"x", b"1234"),
]


@pytest.mark.parametrize("chunk", CHUNKS, ids=lambda chunk: chunk[1][:12].decode("latin1"))
def test_metadata_never_costs_a_picture(chunk):
    expected = decoded(encoded(two_halves(), "PNG"))
    assert np.array_equal(decoded(png_with(*chunk)), expected)
    exif = b"Exif\x00\x00MM\x00*\xff\xff\xff\xff" + bytes(range(40))
    assert decoded(encoded(two_halves(), "JPEG", exif=exif)).shape == (40, 40, 3)


def test_a_raw_file_is_not_used_as_its_preview():
    small, large = two_halves(160, 120), two_halves(640, 480)
    options = {"save_all": True, "append_images": [large]}
    with pytest.raises(imaging.RefusedError, match="small preview"):
        imaging.open_picture(encoded(small, "TIFF", tiffinfo={254: 1}, **options))
    assert imaging.open_picture(encoded(large, "TIFF", tiffinfo={254: 0})).size == (640, 480)


def test_alpha_lies_on_white_and_hidden_colours_do_not_bleed():
    image = Image.new("RGBA", (60, 60), (0, 0, 0, 0))
    image.paste((200, 20, 20, 255), (30, 0, 60, 60))
    pixels = decoded(encoded(image, "PNG"), 30).astype(int)
    assert pixels[:, :13].min() > 250
    assert (pixels[:, 17:] - (200, 20, 20)).max() < 5
    assert pixels[..., 0].min() > 190  # the black under the transparent half shows nowhere


@pytest.mark.parametrize("side", [13_378, 20_000])  # our own limit, and Pillow's, twice as high
def test_a_picture_that_is_too_large_is_refused_and_no_film(side):
    data = encoded(two_halves(), "PNG")
    header = b"IHDR" + struct.pack(">II", side, side) + data[24:29]
    data = data[:12] + header + struct.pack(">I", zlib.crc32(header)) + data[33:]
    with pytest.raises(imaging.RefusedError, match="larger than 178,956,970 pixels"):
        imaging.open_picture(data)


NO_PICTURES = [b"", b"%PDF-1.7", b"P5 10 10 255 abc", b"GIF89a", encoded(two_halves(), "ICO")]
NO_PICTURES += [encoded(two_halves(), "JPEG")[:500], encoded(two_halves(), "PNG")[:90]]


@pytest.mark.parametrize("data", NO_PICTURES, ids=range(len(NO_PICTURES)))
def test_what_is_no_picture_gives_a_reason(data):
    with pytest.raises(imaging.PictureError, match=r"\w+ \w+"):
        decoded(data)


FOLDER_NAMES = {"Ann": "Ann", "AC/DC": "AC_DC", "a\\b:c": "a_b_c", ".hidden": "_hidden"}
FOLDER_NAMES |= {"Dr. ": "Dr", "con": "_con", "COM1.txt": "_COM1.txt", "..": "_", "": "_"}
FOLDER_NAMES |= {"x" * 300: "x" * 80, "王" * 200: "王" * 66}
FOLDER_NAMES |= {"tab\there": "tab_here", "\x1b[31mred": "_[31mred", "Mihály": "Mihály"}
FOLDER_NAMES |= {"王": "王", "山田　太郎": "山田　太郎"}


def test_folder_names_work_everywhere_and_can_be_read():
    assert {name: utils.folder_name(name) for name in FOLDER_NAMES} == FOLDER_NAMES


ESCAPED = {"a\x1b[2Jb": "a\\x1b[2Jb", "two\nlines": "two\\nlines", "\udc80": "\\udc80"}
ESCAPED |= {"two\u2028lines": "two\\u2028lines", "山田　太郎 é": "山田　太郎 é"}
CELLS = {"=cmd()": "'=cmd()", "+1": "'+1", "-x": "'-x", "@a": "'@a", "ok": "ok"}


def test_what_a_terminal_or_a_spreadsheet_would_obey_is_escaped():
    assert {text: utils.escape(text) for text in ESCAPED} == ESCAPED
    assert {text: utils.csv_cell(text) for text in CELLS} == CELLS


def test_listing_leaves_out_what_nobody_means(tmp_path, capsys):
    wanted = ["a/1.jpg", "a/again.jpg", "a/b/c/2.jpg"]
    names = "a/.hidden.jpg .git/3.jpg a/Thumbs.db __MACOSX/4.jpg @eaDir/5.jpg lost+found/6.jpg"
    for name in [*wanted, *names.split(), "System Volume Information/1"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "a" / "again.jpg").unlink()
    (tmp_path / "a" / "again.jpg").symlink_to(tmp_path / "a" / "1.jpg")
    (tmp_path / "a" / "itself.jpg").symlink_to(tmp_path / "a" / "itself.jpg")
    found = [str(path.relative_to(tmp_path)) for path in utils.list_files(tmp_path)]
    told = capsys.readouterr().err
    assert found == wanted and "1 link leads" in told and "itself.jpg" in told


def test_a_file_appears_whole_or_not_at_all(tmp_path):
    path = tmp_path / "file.txt"
    path.write_text("old")
    with pytest.raises(RuntimeError), utils.atomic_write(path) as part:
        part.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["file.txt"]
    before = path.stat().st_ino
    with utils.atomic_write(path) as part:
        part.write_text("new")
    assert path.stat().st_ino != before, "renamed, not written over"
    assert path.read_text() == "new" and os.listdir(tmp_path) == ["file.txt"]
    mask = os.umask(0)
    os.umask(mask)
    assert path.stat().st_mode & 0o777 == 0o666 & ~mask


def test_a_lock_is_held_by_one_and_gone_with_its_holder(tmp_path):
    program = (
        "import time, utils\nwith utils.file_lock('lock'):\n    print(flush=True), time.sleep(60)"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", program]
    with subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"\n"
        with pytest.raises(utils.UserError, match="another run is at work here"):
            with utils.file_lock(tmp_path / "lock"):
                pass
        other.kill()
    with utils.file_lock(tmp_path / "lock"):
        pass
    assert os.listdir(tmp_path) == []


def test_a_file_of_somebody_else_is_no_lock(tmp_path):
    (tmp_path / "text").write_text("mine")
    (tmp_path / "empty").write_text("")
    (tmp_path / "link").symlink_to("empty")
    (tmp_path / "folder").mkdir()
    for name in ("text", "link", "folder"):
        with pytest.raises(utils.UserError, match=f"{name}: not a lock of this kit"):
            with utils.file_lock(tmp_path / name):
                pass
    assert (tmp_path / "text").read_text() == "mine" and (tmp_path / "link").is_symlink()


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("RESOURCE_EXHAUSTED: Out of memory")]
)
def test_too_little_memory_is_one_line(error, capsys):
    def main():
        raise error

    with pytest.raises(SystemExit) as end:
        utils.run(main)
    assert end.value.code == 1 and capsys.readouterr().err.startswith("error: out of memory: close")


@pytest.mark.parametrize("lost", [None, SystemError("bad argument to internal function")])
def test_a_ctrl_c_that_a_library_loses_stops_all_the_same(lost, capsys):
    done = []

    def main():
        for item in utils.progress(range(9), 9, "items"):
            done.append(item)
            if item == 2:
                with contextlib.suppress(KeyboardInterrupt):
                    signal.raise_signal(signal.SIGINT)
                if lost:
                    raise lost

    with pytest.raises(SystemExit) as end:
        utils.run(main)
    assert end.value.code == 130 and capsys.readouterr().err == "stopped\n"
    assert done == [0, 1, 2]


def test_a_transparent_grey_is_white_whatever_the_bits():
    shallow = np.full((60, 80), 20, "uint8")
    shallow[:, 40:] = 230
    for numbers in (shallow, shallow.astype("uint16") * 257):
        data = encoded(Image.fromarray(numbers), "PNG", transparency=int(numbers[0, 0]))
        pixels = np.asarray(imaging.upright(imaging.open_picture(data)))
        assert pixels[30, 5].tolist() == [255, 255, 255]


def test_a_parallel_map_keeps_order_and_stops_early():
    started = []

    def slow(item):
        started.append(item)
        return item * 2

    results = utils.ordered_parallel_map(slow, range(1000), workers=2)
    assert [next(results) for _ in range(3)] == [0, 2, 4]
    results.close()
    assert len(started) < 20


def test_the_time_left_is_that_of_the_items_after_the_first(monkeypatch, capsys):
    """A start-up of 13 s in the first of 66 pictures is not the rate of the others."""
    clock = iter([0.0, 13.0, 14.0, 25.0, 40.0, *range(41, 200)])
    monkeypatch.setattr(utils.time, "monotonic", lambda: next(clock))
    assert list(utils.progress("x" * 6, 6, "reading")) == ["x"] * 6
    assert capsys.readouterr().err.splitlines() == [
        "reading: 2 of 6, about 4 s left",
        "reading: 3 of 6, about 18 s left",
        "reading: 4 of 6, about 18 s left",
    ]
