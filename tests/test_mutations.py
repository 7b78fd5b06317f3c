"""Files with a few changes: a result or a reason, no traceback, hang or gigabytes.

    MUTANTS=200000 pytest -m long tests/test_mutations.py
    python tests/test_mutations.py TIFF 4711 1 /tmp     # one mutant again

A mutant is a pure function of its kind and number. The files are small, so that most changes hit a
header. Each kind runs in a process of its own, which a timer ends after SECONDS of work on one.
"""

import io
import os
import random
import re
import resource
import signal
import struct
import subprocess
import sys
import traceback
import zlib
from pathlib import Path

import h5py
import numpy as np
import pytest

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import imaging  # noqa: E402
import model  # noqa: E402
import utils  # noqa: E402

# isort: split
from PIL import Image  # noqa: E402

MUTANTS = int(os.environ.get("MUTANTS", 2000))  # of each kind
SECONDS, KILOBYTES = 5, 1e6  # that one mutant may take
VALUES = (0, 1, 2, 3, 7, 8, 15, 16, 127, 128, 255, 256, 1000, 65535, 2**24, 2**31 - 1, 2**31)
VALUES += (2**32 - 1, 2**32, 2**63 - 1, 2**63, 2**64 - 1)


def mutate(data, rng):
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        data = rng.choice((change_number, change_number, change_number, change_order))(data, rng)
    return data


def change_number(data, rng):
    """Overwrite a number of 1 to 8 bytes."""
    size, order = rng.choice((1, 2, 2, 4, 4, 8)), rng.choice(("little", "big"))
    place = rng.randint(0, max(0, len(data) - size))
    old = int.from_bytes(data[place : place + size], order)
    near = (old + 1, old - 1, old * 2, old ^ 1 << rng.randrange(8 * size))
    number = rng.choice((rng.choice(VALUES), rng.getrandbits(64), *near)) % 2 ** (8 * size)
    return data[:place] + number.to_bytes(size, order) + data[place + size :]


def change_order(data, rng):
    """Leave out, double, or move a part, or end the file in it."""
    start, end = sorted(rng.choices(range(len(data) + 1), k=2))
    end = min(end, start + rng.choice((4, 20, 200)))
    part, rest, place = data[start:end], data[:start] + data[end:], rng.randint(0, start)
    moved = rest[:place] + part + rest[place:]
    return rng.choice((rest, data[:end] + part + data[end:], moved, data[:start]))


def pictures(kind):
    """Return small files of one kind, as bytes."""
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 255, (2, 3, 3)).astype("uint8")).resize((16, 12))
    deep = Image.fromarray(rng.integers(0, 4095, (12, 16)).astype("uint16"))
    turned = Image.Exif()
    turned[0x0112] = 6
    plain, frames = (image, {"exif": turned}), {"save_all": True, "append_images": [image]}
    packings = ("tiff_lzw", "jpeg", "tiff_adobe_deflate")
    variants = {
        "JPEG": [plain, (image.convert("CMYK"), {"progressive": True})],
        "PNG": [plain, (image.quantize(16), {"transparency": 3}), (deep, {}), (image, frames)],
        "WEBP": [plain, (image.convert("RGBA"), {"lossless": True}), (image, frames)],
        "TIFF": [plain, (deep, {}), (image.convert("F"), {}), (image, frames)]
        + [(image, {"compression": name}) for name in packings],
        "HEIF": [plain, (image.convert("RGBA"), {})],
        "AVIF": [plain],
        "GIF": [(image, frames)],
    }
    files = []
    for picture, options in variants.get(kind, [(image, {})]):
        buffer = io.BytesIO()
        picture.save(buffer, kind, **options)
        files.append(buffer.getvalue())
    return files


def picture_check(kind, folder):
    """Return a function that makes mutant number n of a kind and reads it."""
    sources, path = pictures(kind), folder / f"mutant.{kind.lower()}"

    def check(n):
        rng = random.Random(f"{kind} {n}")
        data = mutate(rng.choice(sources), rng)
        for chunk in re.finditer(b"IHDR|IDAT|PLTE|tRNS|eXIf|[af]cTL|fdAT", data):
            end = chunk.end() + int.from_bytes(data[chunk.start() - 4 : chunk.start()])
            if rng.random() < 0.9:  # Pillow looks no further where a checksum is wrong
                checksum = struct.pack(">I", zlib.crc32(data[chunk.start() : end]))
                data = data[:end] + checksum + data[end + 4 :]
        path.write_bytes(data)
        try:
            pixels = imaging.to_model_input(imaging.read_picture(path)[1], 75)
            assert pixels.shape == (75, 75, 3) and pixels.dtype == np.uint8
            imaging.upright(imaging.open_picture(data))
        except imaging.PictureError as error:
            assert str(error) and str(error).isprintable()
            return "reason"
        return "result"

    return check


def aim_elsewhere(data, rng):
    """Overwrite what may be an address in an HDF5 file by another, as in a loop."""
    numbers = np.frombuffer(data[: len(data) // 8 * 8], "<u8").copy()
    places = np.flatnonzero((numbers > 0) & (numbers < len(data)))
    one, other = rng.choices(places, k=2)
    numbers[one] = numbers[other]
    return numbers.tobytes()


def hdf5_check(kind, folder):
    """Return a function that makes mutant number n of a small model's files and loads it."""
    import tiny_network

    model.HIDDEN = 8
    with tiny_network.installed():
        network = model.build_network(2, 75, "large set")
        info = {"labels": ["a", "b"], "image_size": 75, "round": 0, "threshold": 0.4}
        model.save_model(network, info, folder / "m")
    with h5py.File(folder / "m.h5", "a") as file:  # of which nothing is read
        del file.attrs["model_config"]
    weights, *others = paths = model.model_paths(folder / "m")
    files = {path: path.read_bytes() for path in paths}

    def check(n):
        rng = random.Random(f"{kind} {n}")
        path = rng.choice((*[weights] * 8, *others))
        change = aim_elsewhere if path == weights and rng.random() < 0.2 else mutate
        path.write_bytes(change(files[path], rng))
        model.may_replace_model(folder / "m")
        try:
            info = model.check_model(folder / "m")
            assert isinstance(info["labels"], list) and 0 <= info["threshold"] <= 1
            model.load_arrays(network, weights)
        except utils.UserError as error:
            assert str(error).isprintable()
            return "reason"
        finally:
            path.write_bytes(files[path])
        return "result"

    return check


CHECKS = dict.fromkeys("JPEG PNG WEBP TIFF HEIF GIF BMP PPM AVIF".split(), picture_check)
CHECKS |= {"HDF5": hdf5_check}


def run(kind, first, count, folder):
    """Check mutants; `folder`/number names the one at work. Exit code 1 after a failure."""
    check, ends = CHECKS[kind](kind, Path(folder)), set()
    signal.signal(signal.SIGPROF, signal.SIG_DFL)  # ends also what never comes back from C
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for n in range(first, first + count):
        Path(folder, "number").write_text(f"{kind} {n}")
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        try:
            ends.add(check(n))
        except BaseException:
            traceback.print_exc()
            sys.exit(1)
        if resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before > KILOBYTES:
            sys.exit("more than a gigabyte")
    signal.setitimer(signal.ITIMER_PROF, 0)
    print(kind, *sorted(ends))


@pytest.mark.slow
@pytest.mark.parametrize("count", [60, pytest.param(MUTANTS, marks=pytest.mark.long)])
def test_mutants_give_a_result_or_a_reason(tmp_path, count):
    """A few of all kinds in one process; of many, each kind has its own."""
    kinds = list(CHECKS) if count > 60 else [",".join(CHECKS)]
    output = ""
    for kind in kinds:
        command = [sys.executable, __file__, kind, "0", str(count), str(tmp_path)]
        done = subprocess.run(command, capture_output=True, text=True)
        number = (tmp_path / "number").read_text()
        assert done.returncode == 0, f"{number}: {done.returncode}\n{done.stderr}"
        output += done.stdout
    assert output.splitlines() == [f"{kind} reason result" for kind in CHECKS]


if __name__ == "__main__":
    for kind in sys.argv[1].split(","):
        run(kind, int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
