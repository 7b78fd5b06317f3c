"""Files with one or a few fields changed: a result or a reason, no traceback, hang or gigabytes.

    MUTANTS=200000 pytest -m long tests/test_mutations.py
    python tests/test_mutations.py TIFF 4711 1 /tmp     # one mutant again

A mutant is a pure function of its kind and number. Each kind runs in a process of its own, which
a timer ends after SECONDS of work on one mutant.
"""

import hashlib
import io
import json
import os
import random
import resource
import signal
import struct
import subprocess
import sys
import traceback
import zlib
from pathlib import Path
from types import SimpleNamespace

import h5py
import numpy as np
import pytest

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT)]

import imaging  # noqa: E402
import model  # noqa: E402
import utils  # noqa: E402

# isort: split
from PIL import Image  # noqa: E402

MUTANTS = int(os.environ.get("MUTANTS", 2000))  # of each kind
SECONDS, KILOBYTES = 5, 1e6  # that one mutant may take
PICTURES = ("JPEG", "PNG", "WEBP", "TIFF", "HEIF")
VALUES = (0, 1, 2, 3, 7, 8, 15, 16, 127, 128, 255, 256, 1000, 65535, 2**24, 2**31 - 1, 2**31)
VALUES += (2**32 - 1, 2**32, 2**63 - 1, 2**63, 2**64 - 1)


# ---------------------------------------------------------------- pictures


def seeds(kind):
    """Return small files of one kind, as bytes."""
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 255, (40, 56, 3)).astype("uint8"))
    exif = Image.Exif()
    exif[0x0112] = 6
    deep = Image.fromarray(rng.integers(0, 4095, (40, 56)).astype("uint16"))
    floats = Image.fromarray(rng.random((40, 56)).astype("float32"))
    frames = {"save_all": True, "append_images": [image.rotate(90)]}
    variants = {
        "JPEG": [(image, {"exif": exif}), (image.convert("CMYK"), {"progressive": True})],
        "PNG": [
            (image, {"exif": exif}), (image.quantize(16), {"transparency": 3}), (deep, {}),
            (image, frames),
        ],
        "WEBP": [
            (image, {"exif": exif}), (image.convert("RGBA"), {"lossless": True}), (image, frames),
        ],
        "TIFF": [
            (image, {"exif": exif}), (deep, {}), (floats, {}),
            (image, {"compression": "tiff_lzw"}), (image, {"compression": "jpeg"}),
            (image, {"compression": "tiff_adobe_deflate"}), (image, frames),
            (image.convert("1"), {"compression": "group4"}),
        ],
        "HEIF": [(image, {"exif": exif}), (image.convert("RGBA"), {})],
    }[kind]  # fmt: skip
    files = []
    for picture, options in variants:
        buffer = io.BytesIO()
        picture.save(buffer, kind, **options)
        files.append(buffer.getvalue())
    return files


def jpeg_blocks(data):
    """Return the spans of a JPEG's segments; that of the scan goes to the end."""
    start, spans = 2, [(0, 2)]
    while start + 4 <= len(data) and data[start] == 255:
        is_scan = data[start + 1] == 0xDA
        end = len(data) if is_scan else start + 2 + int.from_bytes(data[start + 2 : start + 4])
        spans.append((start, end))
        start = end
    return spans


def png_blocks(data):
    """Return the spans of a PNG's chunks."""
    start, spans = 8, []
    while start < len(data):
        end = start + 12 + int.from_bytes(data[start : start + 4])
        spans.append((start, end))
        start = end
    return spans


def webp_blocks(data):
    """Return the spans of a WebP's chunks, and those in its frames."""
    spans, pending = [(0, 12)], [(12, len(data))]
    while pending:
        start, stop = pending.pop()
        while start + 8 <= stop:
            size = int.from_bytes(data[start + 4 : start + 8], "little")
            end = start + 8 + size + size % 2
            spans.append((start, end))
            if data[start : start + 4] == b"ANMF":
                pending.append((start + 24, end))
            start = end
    return spans


def tiff_blocks(data):
    """Return the spans of a TIFF's header, of its directories' entries, and of what is between."""
    spans, place = [(0, 8)], int.from_bytes(data[4:8], "little")
    while place:
        count = int.from_bytes(data[place : place + 2], "little")
        spans.append((place, place + 2))
        spans += [(place + 2 + 12 * n, place + 14 + 12 * n) for n in range(count)]
        end = place + 2 + 12 * count
        spans.append((end, end + 4))
        place = int.from_bytes(data[end : end + 4], "little")
    return spans


def heif_blocks(data):
    """Return the spans of a HEIF's boxes, and of those inside."""
    spans, pending = [], [(0, len(data))]
    while pending:
        start, stop = pending.pop()
        while start + 8 <= stop:
            end = start + (int.from_bytes(data[start : start + 4]) or stop - start)
            name = data[start + 4 : start + 8]
            inside = {b"meta": 12, b"iprp": 8, b"ipco": 8, b"iinf": 14, b"iref": 12}.get(name)
            spans.append((start, min(end, start + 400)))
            if inside:
                pending.append((start + inside, end))
            start = max(end, start + 8)
    return spans


BLOCKS = {
    "JPEG": jpeg_blocks, "PNG": png_blocks, "WEBP": webp_blocks, "TIFF": tiff_blocks,
    "HEIF": heif_blocks,
}  # fmt: skip


def change_number(data, span, rng):
    """Overwrite a number of 1, 2, 4 or 8 bytes near the start of a block."""
    size = rng.choice((1, 2, 2, 4, 4, 8))
    last = min(span[1], span[0] + 64, len(data)) - size
    if last < span[0]:
        return data
    place = rng.randint(span[0], last)
    order = rng.choice(("little", "big"))
    old = int.from_bytes(data[place : place + size], order)
    new = rng.choice(
        (rng.choice(VALUES), old + 1, old - 1, old * 2, old ^ 1 << rng.randrange(8 * size))
    )
    number = (new % 2 ** (8 * size)).to_bytes(size, order)
    return data[:place] + number + data[place + size :]


def change_bytes(data, span, rng):
    """Overwrite a few bytes anywhere in a block."""
    copy = bytearray(data)
    for _ in range(rng.randint(1, 8)):
        copy[rng.randrange(span[0], max(span[0] + 1, min(span[1], len(copy))))] = rng.randrange(256)
    return bytes(copy)


def change_order(data, spans, rng):
    """Leave out, double, or move a block, or end the file in it."""
    (start, end), (other, _) = rng.choice(spans), rng.choice(spans)
    block, rest = data[start:end], data[:start] + data[end:]
    return rng.choice((rest, data[:end] + block + data[end:], rest[:other] + block + rest[other:],
                       data[: rng.randint(start, max(start, min(end, len(data))))]))  # fmt: skip


def right_checksums(data):
    """Return a PNG whose chunks have the right checksums."""
    for start, end in png_blocks(data):
        chunk = data[start + 4 : end - 4]
        data = data[: end - 4] + struct.pack(">I", zlib.crc32(chunk)) + data[end:]
    return data


def mutate(data, spans, rng):
    """Return a copy with one to three changes; spans: where its blocks are."""
    if rng.random() < 0.15:
        return change_order(data, spans, rng)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        change = rng.choice((change_number, change_number, change_bytes))
        data = change(data, rng.choice(spans), rng)
    return data


def make_picture_check(kind, folder):
    """Return a function that makes mutant number n of a kind and reads it."""
    sources = [(data, BLOCKS[kind](data)) for data in seeds(kind)]
    path = folder / f"mutant.{kind.lower()}"

    def check(n):
        rng = random.Random(f"{kind} {n}")
        data = mutate(*rng.choice(sources), rng)
        if kind == "PNG" and rng.random() < 0.8:
            data = right_checksums(data)
        path.write_bytes(data)
        try:
            pixels = imaging.to_model_input(imaging.read_picture(path)[1], 75)
            assert pixels.shape == (75, 75, 3) and pixels.dtype == np.uint8
            signal.setitimer(signal.ITIMER_PROF, SECONDS)
            imaging.upright(imaging.open_picture(data))
        except imaging.PictureError as error:
            assert str(error) and str(error).isprintable()

    return check


# ---------------------------------------------------------------- models


SHAPES = {
    "conv2d": {"kernel": (3, 3, 3, 4)}, "conv2d_1": {"kernel": (1, 1, 4, 8)},
    "batch_normalization": {"beta": (4,), "moving_mean": (4,), "moving_variance": (4,)},
    "probabilities": {"kernel": (8, 2), "bias": (2,)},
}  # fmt: skip


def small_network():
    """Return what the loader knows of a Keras model: layers with names and weights."""
    layers = []
    for name, shapes in SHAPES.items():
        weights = [
            SimpleNamespace(name=key, path=f"{name}/{key}", shape=s) for key, s in shapes.items()
        ]
        layers.append(SimpleNamespace(name=name, weights=weights, set_weights=lambda arrays: None))
    return SimpleNamespace(layers=layers)


def write_small_model(folder):
    """Write a model of that network in Keras's legacy layout, partly packed."""
    texts = {"json": b'{"name": "pixels", "config": [1, 2, {"a": null}]}', "labels": b'["a", "b"]'}
    (folder / "m.json").write_bytes(texts["json"])
    (folder / "m-labels.json").write_bytes(texts["labels"])
    sums = {key: hashlib.sha256(text).hexdigest() for key, text in texts.items()}
    info = {"labels": ["a", "b"], "image_size": 75, "round": 0, "threshold": 0.4, "sha256": sums}
    with h5py.File(folder / "m.h5", "w") as file:
        file.attrs["kit"] = json.dumps(info)
        for name, shapes in SHAPES.items():
            for key, shape in shapes.items():
                packing = {"compression": "gzip", "shuffle": True} if len(shape) == 4 else {}
                numbers = np.arange(np.prod(shape), dtype="float32").reshape(shape)
                file.create_dataset(f"model_weights/{name}/{name}/{key}", data=numbers, **packing)
        file["model_weights"].attrs["layer_names"] = list(SHAPES)


def hdf5_blocks(path):
    """Return the spans of an HDF5 file's superblock, object headers, and index nodes."""
    data, spans = path.read_bytes(), [(0, 96)]
    with h5py.File(path) as file:
        items = [file]
        file.visititems(lambda _, item: items.append(item))
        for item in items:
            facts = h5py.h5o.get_info(item.id)
            spans += [
                (facts.addr + n, facts.addr + n + 64) for n in range(0, facts.hdr.space.total, 32)
            ]
    for name in (b"TREE", b"SNOD", b"HEAP", b"GCOL"):
        start = data.find(name)
        while start >= 0:
            spans += [(start, start + 32), (start + 16, start + 80), (start + 64, start + 200)]
            start = data.find(name, start + 1)
    return spans


def aim_elsewhere(data, spans, rng):
    """Overwrite an address by that of another block, as in a loop."""
    span, (target, _) = rng.choice(spans), rng.choice(spans)
    place = span[0] + 8 * rng.randrange(max(1, (span[1] - span[0]) // 8))
    return data[:place] + struct.pack("<Q", target) + data[place + 8 :]


ODD = (
    None,
    True,
    -1,
    0,
    1.5,
    10**4000,
    float("nan"),
    "",
    "a\x1b[2J",
    "\ud800",
    [],
    {},
    [[]] * 9,
    "x" * 300,
)


def change_json(text, rng):
    """Return JSON bytes with one value, or a few bytes, changed."""
    if rng.random() < 0.3:
        return change_bytes(text, (0, len(text)), rng)
    root = {"top": json.loads(text)}
    inside, key = root, "top"
    while isinstance(inside[key], dict | list) and inside[key] and rng.random() < 0.8:
        inside = inside[key]
        key = rng.choice(list(inside) if isinstance(inside, dict) else range(len(inside)))
    if inside is not root and rng.random() < 0.2:
        del inside[key]
    else:
        inside[key] = rng.choice(ODD)
    return json.dumps(root["top"]).encode()


def make_hdf5_check(kind, folder):
    """Return a function that makes mutant number n of a small model's `.h5` and loads it."""
    write_small_model(folder)
    path, network = folder / "m.h5", small_network()
    data, spans = path.read_bytes(), hdf5_blocks(path)

    def check(n):
        rng = random.Random(f"{kind} {n}")
        change = aim_elsewhere if rng.random() < 0.2 else mutate
        path.write_bytes(change(data, spans, rng))
        load(folder, network)

    return check


def make_json_check(kind, folder):
    """Return a function that makes mutant number n of a small model's JSON and loads it."""
    write_small_model(folder)
    texts = [(folder / name).read_bytes() for name in ("m.json", "m-labels.json")]
    with h5py.File(folder / "m.h5") as file:
        metadata = file.attrs["kit"].encode()

    def check(n):
        rng = random.Random(f"{kind} {n}")
        new, which = [*texts, metadata], rng.randrange(3)
        new[which] = change_json(new[which], rng)
        if which < 2 and rng.random() < 0.8:  # signed
            sums = {k: hashlib.sha256(t).hexdigest() for k, t in zip(("json", "labels"), new)}
            new[2] = json.dumps(json.loads(metadata) | {"sha256": sums}).encode()
        (folder / "m.json").write_bytes(new[0])
        (folder / "m-labels.json").write_bytes(new[1])
        with h5py.File(folder / "m.h5", "a") as file:
            file.attrs["kit"] = new[2].replace(b"\0", b"0")  # HDF5's texts end there
        load(folder, small_network())

    return check


def load(folder, network):
    """Load the three files as `load_model` does."""
    model.may_replace_model(folder / "m")
    try:
        info = model.check_model(folder / "m")
        assert isinstance(info["labels"], list) and 0 <= info["threshold"] <= 1
        model.load_arrays(network, folder / "m.h5")
    except utils.UserError as error:
        assert str(error).isprintable()


# ---------------------------------------------------------------- running them


MAKERS = dict.fromkeys(PICTURES, make_picture_check)
MAKERS |= {"HDF5": make_hdf5_check, "JSON": make_json_check}


def run(kind, first, count, folder):
    """Check mutants; `folder`/number names the one at work. Exit code 1 after a failure."""
    check = MAKERS[kind](kind, Path(folder))
    signal.signal(signal.SIGPROF, signal.SIG_DFL)  # ends also what never comes back from C
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for n in range(first, first + count):
        Path(folder, "number").write_text(str(n))
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        try:
            check(n)
        except BaseException:
            traceback.print_exc()
            sys.exit(1)
        if resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before > KILOBYTES:
            sys.exit("more than a gigabyte")


@pytest.mark.parametrize("kind", [pytest.param(k, marks=pytest.mark.long) for k in MAKERS])
def test_mutants_give_a_result_or_a_reason(kind, tmp_path):
    command = [sys.executable, __file__, kind, "0", str(MUTANTS), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    number = (tmp_path / "number").read_text()
    assert done.returncode == 0, f"{kind} {number}: {done.returncode}\n{done.stderr}"


if __name__ == "__main__":
    run(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
