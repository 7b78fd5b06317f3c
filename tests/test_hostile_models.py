"""Model files from strangers: refused in one line, nothing in them runs, at little cost."""

import base64
import hashlib
import json
import marshal
import os
import re
import shutil
import struct
import zlib

import h5py
import numpy as np
import pytest
import tiny_network
from conftest import ROOT, run_here, run_process
from PIL import Image

import model
import utils

pytestmark = pytest.mark.usefixtures("tiny")
LABELS = ["Ann", "Ben", "Cleo"]
LAST = "probabilities/probabilities"


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """Save a whole, untrained model. Returns (its folder, the Keras model)."""
    folder = tmp_path_factory.mktemp("good")
    info = {"labels": LABELS, "image_size": 75, "threshold": 0.5, "round": 0}
    with tiny_network.installed():
        network = model.build_network(3, 75)
        model.save_model(network, info, folder / "m")
    (folder / "data" / "Ann").mkdir(parents=True)
    Image.new("RGB", (80, 80)).save(folder / "data" / "Ann" / "1.png")
    return folder, network


@pytest.fixture
def trio(good, tmp_path):
    return shutil.copytree(good[0], tmp_path / "trio")


def text(name, content):
    return lambda folder: (folder / name).write_bytes(content)


def rewrite(change):
    """change(the group of weights in m.h5) happens."""

    def spoil(folder):
        with h5py.File(folder / "m.h5", "a") as file:
            change(file["model_weights"])

    return spoil


def replace(place=f"{LAST}/kernel", **dataset):
    def change(weights):
        del weights[place]
        weights.create_dataset(place, **dataset)

    return rewrite(change)


def replace_by(make, place=f"{LAST}/kernel"):
    """An array becomes make(its numbers), a link say."""

    def change(weights):
        numbers = weights[place][()]
        del weights[place]
        weights[place] = make(numbers)

    return rewrite(change)


def sign(folder):
    """Make the attribute fit the files again, as somebody who means harm would."""
    with h5py.File(folder / "m.h5", "a") as file:
        info = json.loads(file.attrs["kit"])
        for key, name in (("json", "m.json"), ("labels", "m-labels.json")):
            info["sha256"][key] = hashlib.sha256((folder / name).read_bytes()).hexdigest()
        file.attrs["kit"] = json.dumps(info)


def attribute(**values):
    def change(weights):
        attributes = weights.parent.attrs
        attributes["kit"] = json.dumps(json.loads(attributes["kit"]) | values)

    return rewrite(change)


def labels(value):
    """Other labels, signed, and the same in the attribute."""

    def spoil(folder):
        (folder / "m-labels.json").write_text(json.dumps(value))
        attribute(labels=value)(folder)
        sign(folder)

    return spoil


def external(weights):
    """Keep the last kernel's numbers in another file."""
    shape = weights[f"{LAST}/kernel"].shape
    del weights[f"{LAST}/kernel"]
    elsewhere = [("/etc/hostname", 0, 4 * int(np.prod(shape)))]
    weights[LAST].create_dataset("kernel", shape, "float32", external=elsewhere)


def virtual(weights):
    """Make the last kernel a view of another file."""
    shape = weights[f"{LAST}/kernel"].shape
    layout = h5py.VirtualLayout(shape, "float32")
    layout[:] = h5py.VirtualSource("/etc/hostname", "x", shape)
    del weights[f"{LAST}/kernel"]
    weights[LAST].create_virtual_dataset("kernel", layout)


def packed_bias(**options):
    """A bias of 1024 numbers lies in one piece that unpacks to 512 MB."""

    def change(weights):
        del weights["hidden/hidden/bias"]
        options_of_all = {"shape": (1024,), "dtype": "float32", "chunks": (1024,)}
        bias = weights["hidden/hidden"].create_dataset("bias", **options_of_all, **options)
        packer = zlib.compressobj(1)
        zeros = b"".join(packer.compress(bytes(2**20)) for _ in range(2**9)) + packer.flush()
        bias.id.write_direct_chunk((0,), zeros)

    return rewrite(change)


def linked_weights(folder):
    """Keep all weights in another file, which a link names."""
    shutil.copy(folder / "m.h5", folder / "elsewhere.h5")
    with h5py.File(folder / "m.h5", "a") as file:
        del file["model_weights"]
        file["model_weights"] = h5py.ExternalLink("elsewhere.h5", "/model_weights")


def one_text(folder):
    """List 450 layers whose names are one and the same text of 20 MB: 9 GB where they are read."""
    with h5py.File(folder / "m.h5", "a") as file:
        del file["model_weights"].attrs["layer_names"]
        names = ["x" * 20_000_000] + ["y" * 7] * 449
        file["model_weights"].attrs.create("layer_names", names, dtype=h5py.string_dtype())
    data = bytearray((folder / "m.h5").read_bytes())
    size, other = struct.pack("<I", 20_000_000), struct.pack("<I", 7)
    start = data.index(size)
    while data[start + 16 : start + 20] != other:  # elsewhere these bytes mean something else
        start = data.index(size, start + 1)
    reference = data[start : start + 16]  # size, place, number
    data[start : start + 450 * 16] = reference * 450
    (folder / "m.h5").write_bytes(data)


def endless_text(folder):
    """libhdf5 comes back to the same place among the texts for ever."""
    data = bytearray((folder / "m.h5").read_bytes())
    start = data.index(b"GCOL") + 24  # the size of the first text
    data[start : start + 8] = (2**64 - 16).to_bytes(8, "little")
    (folder / "m.h5").write_bytes(data)


def endless_gaps(folder):
    """The first gap among the names of the first group is followed by itself: took 10 GB."""
    data = bytearray((folder / "m.h5").read_bytes())
    gap, start = struct.unpack_from("<QQ", data, data.index(b"HEAP\0") + 16)
    data[start + gap : start + gap + 8] = gap.to_bytes(8, "little")
    (folder / "m.h5").write_bytes(data)


def shared_names(folder):
    """Two groups have their names in one place: HDF5 crashed."""
    data = bytearray((folder / "m.h5").read_bytes())
    heaps = [found.start() for found in re.finditer(b"HEAP\0", data)]
    starts = {heap: struct.unpack_from("<Q", data, heap + 24)[0] for heap in heaps}
    apart = next(start for heap, start in starts.items() if start != heap + 32)
    struct.pack_into("<Q", data, heaps[-1] + 24, apart)
    (folder / "m.h5").write_bytes(data)


def add_bush(weights):
    """Give a group six names, seven levels deep: 280,000 ways to its end, none of them a loop."""
    for _ in range(7):
        inner = weights.create_group("n0")
        for n in range(1, 6):
            weights[f"n{n}"] = inner
        weights = inner


def add_extras(weights):
    """Add what harms those who look at all that a file holds: a bomb, a link, a loop, a bush."""
    weights.create_dataset("a/b/c/x", (2**29,), **BIG)
    weights["x"] = h5py.ExternalLink("/etc/hostname", "/x")
    weights["loop"] = weights
    add_bush(weights)


def add_code(folder):
    """Name a Lambda layer whose marshalled code makes a file, in m.json and m.h5; signed."""
    source = f"lambda x: (open({str(folder / 'canary')!r}, 'w').close(), x)[1]"
    code = marshal.dumps(compile(source, "x", "eval").co_consts[0])
    function = {"code": base64.b64encode(code).decode(), "defaults": None, "closure": None}
    layer = {"module": "keras.layers", "class_name": "Lambda", "registered_name": None}
    layer["config"] = {"name": "extra", "trainable": True, "dtype": "float32", "arguments": {}}
    layer["config"]["function"] = {"class_name": "__lambda__", "config": function}
    config = json.loads((folder / "m.json").read_text())
    inner, history = config["config"], [config["config"]["layers"][-1]["name"], 0, 0]
    tensor = {"shape": [None, 3], "dtype": "float32", "keras_history": history}
    node = {"args": [{"class_name": "__keras_tensor__", "config": tensor}], "kwargs": {}}
    inner["layers"].append(layer | {"name": "extra", "inbound_nodes": [node]})
    inner["output_layers"] = ["extra", 0, 0]
    (folder / "m.json").write_text(json.dumps(config))
    with h5py.File(folder / "m.h5", "a") as file:
        file.attrs["model_config"] = json.dumps(config)
    sign(folder)


BIG = {"dtype": "float32", "chunks": (2**20,), "compression": "gzip"}
WIDE = {"maxshape": (None,), "chunks": (30_000_000,), "compression": "gzip"}
REFUSED = {
    "deep json": text("m.json", b"[" * 200_000 + b"]" * 200_000),
    "no json": text("m.json", b"\xff\xfe\x00"),
    "huge json": text("m.json", b"[" + b"0," * 3_000_000 + b"0]"),
    "unsigned json": text("m.json", b"{}"),
    "swapped labels": text("m-labels.json", b'["Cleo", "Ben", "Ann"]'),
    "labels with escapes": labels(["Ann", "B\x1b[2Jen", "Cleo"]),
    "labels twice": labels(["Ann", "Ann", "Cleo"]),
    "labels of numbers": labels([1, 2, 3]),
    "label too long": labels(["Ann", "B" * 10_000, "Cleo"]),
    "too many labels": labels([str(n) for n in range(20_000)]),
    "one label more": labels([*LABELS, "Dan"]),
    "cut h5": lambda f: os.truncate(f / "m.h5", 100_000),
    "empty h5": text("m.h5", b""),
    "sparse h5": lambda f: os.truncate(f / "m.h5", 2**33),
    "32 GiB bomb": replace(shape=(2**33,), **BIG),
    "bomb in a piece": packed_bias(compression="gzip"),
    "another packing": packed_bias(compression="lzf"),
    "wide chunk": replace("hidden/hidden/bias", shape=(1024,), dtype="float32", **WIDE),
    "tiny chunks": replace(
        "hidden/hidden/kernel", shape=(64, 1024), dtype="float32", chunks=(1, 1)
    ),
    "other shape": replace_by(np.transpose),
    "integers": replace_by(lambda numbers: numbers.astype("int64")),
    "texts": replace_by(lambda numbers: np.full(numbers.shape, b"x")),
    "nan": replace("hidden/hidden/bias", data=np.full((1024,), np.nan, "float32")),
    "larger than float32": replace_by(lambda numbers: np.full(numbers.shape, 1e300)),
    "external link": replace_by(lambda _: h5py.ExternalLink("/etc/hostname", "/x")),
    "soft link": replace_by(lambda _: h5py.SoftLink("/model_weights/hidden/hidden/bias")),
    "external storage": rewrite(external),
    "virtual dataset": rewrite(virtual),
    "a layer less": rewrite(lambda w: w.pop(next(name for name in w if "conv2d" in name))),
    "weights linked away": linked_weights,
    "no attribute": rewrite(lambda w: w.parent.attrs.pop("kit")),
    "attribute no json": rewrite(lambda w: w.parent.attrs.create("kit", "{")),
    "attribute a long text": rewrite(lambda w: w.parent.attrs.create("kit", "x" * 30_000_000)),
    "attribute of many texts": rewrite(lambda w: w.parent.attrs.create("kit", ["{}"] * 1000)),
    "one text for all names": one_text,
    "a text that never ends": endless_text,
    "gaps without end": endless_gaps,
    "names in one place": shared_names,
    "threshold not finite": attribute(threshold=float("nan")),
    "threshold a text": attribute(threshold="high"),
    "round with escapes": attribute(round="\x1b[2J"),
    "image size 1e9": attribute(image_size=10**9),
    "face crops a text": attribute(face_crops="x"),
    "levels unknown": attribute(levels=["mixed0"]),
    "a link": lambda f: (f / "m.h5").symlink_to((f / "m.h5").rename(f / "elsewhere.h5")),
    "missing labels": lambda f: (f / "m-labels.json").unlink(),
    "only the h5": lambda f: [(f / name).unlink() for name in ("m.json", "m-labels.json")],
    "other numbers": replace_by(lambda numbers: numbers + np.float32(0.001)),
    "a folder": lambda f: (f / "m.h5").unlink() or (f / "m.h5").mkdir(),
    "a named pipe": lambda f: (f / "m.json").unlink() or os.mkfifo(f / "m.json"),
}


WORDS = {
    "swapped labels": "m-labels.json: not the class names that m.h5 was trained on",
    "unsigned json": "m.h5: does not belong to the .json",
    "missing labels": "m.h5: m-labels.json missing beside it",
    "only the h5": "m.h5: m.json and m-labels.json missing beside it",
    "other numbers": "m.h5: damaged: copy it again",
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_bad_trio_is_refused_in_one_line(trio, name):
    REFUSED[name](trio)
    with pytest.raises(utils.UserError) as caught:
        model.load_model(trio / "m")
    told = str(caught.value)
    assert told.startswith(f"{trio}/m") and told.isprintable() and WORDS.get(name, "") in told


@pytest.mark.parametrize("has_config", [True, False])
def test_strange_extras_are_not_looked_at(good, trio, has_config):
    """They cannot do harm then. Plain Keras would use the architecture."""
    rewrite(add_extras)(trio)
    add_code(trio)
    if not has_config:
        rewrite(lambda weights: weights.parent.attrs.pop("model_config"))(trio)
    network, info = model.load_model(trio / "m")
    pairs = zip(network.get_weights(), good[1].get_weights(), strict=True)
    assert info["labels"] == LABELS and all(np.array_equal(a, b) for a, b in pairs)
    assert not (trio / "canary").exists()


def test_a_model_that_names_code_is_used_without_it(trio):
    from keras.models import load_model
    from keras.src.saving.serialization_lib import SafeModeScope

    add_code(trio)
    done = run_here("train.py", trio, "data", "m", "--evaluate")
    assert done.returncode == 0 and "evaluate: accuracy" in done.stdout, done.stderr
    assert not (trio / "canary").exists()
    with SafeModeScope(False):  # plain Keras runs it where it is told so
        load_model(trio / "m.h5", compile=False, safe_mode=False)(np.zeros((1, 75, 75, 3)))
    assert (trio / "canary").exists()


WORST = "deep json,sparse h5,32 GiB bomb,bomb in a piece,attribute a long text"
WORST += ",one text for all names"
MEASURE = """
import resource, sys
import tiny_network, train, utils
sys.argv = ["train.py", "good/data", "", "--evaluate"]
with tiny_network.installed():
    for name in "good", *NAMES:
        sys.argv[2] = name + "/m"
        try:
            utils.run(train.main)
        except SystemExit as end:
            print(end.code, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.slow
def test_the_worst_take_little_memory(good, tmp_path):
    names = WORST.split(",")
    for name in ("good", *names):
        shutil.copytree(good[0], tmp_path / name)
    for name in names:
        REFUSED[name](tmp_path / name)
    program = MEASURE.replace("NAMES", repr(names))
    environment = {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    done = run_process("-c", tmp_path, program, **environment)
    ends = [tuple(map(int, line.split())) for line in done.stdout.splitlines() if line[:1] in "01"]
    assert [code for code, _ in ends] == [0] + [1] * len(names), done.stderr
    assert len([line for line in done.stderr.splitlines() if line.startswith("error: ")]) == 6
    assert ends[-1][1] - ends[0][1] < 300_000  # kB more than a good model


@pytest.mark.slow
def test_the_folder_with_the_model_is_no_place_for_code(trio, monkeypatch):
    """What lies beside a model that somebody sent, and is named like a module, does not run."""
    for name in ("cv2", "numpy", "PIL", "keras", "matplotlib"):
        (trio / f"{name}.py").write_text("open('canary', 'w').close()")
    monkeypatch.delenv("DISPLAY", raising=False)
    words = ["webcam.py", "m", "--source", "data/Ann/1.png", "--whole-picture"]
    done = run_process(ROOT / "tests" / "tiny_network.py", trio, *words)
    assert done.returncode == 0 and "no window can be opened" in done.stderr, done.stderr
    assert not (trio / "canary").exists()
