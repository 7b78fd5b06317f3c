"""Model files from strangers: refused in one line, nothing in them runs, at little cost."""

import base64
import functools
import hashlib
import json
import marshal
import os
import shutil
import struct
import subprocess
import sys
import zlib

import h5py
import numpy as np
import pytest
from conftest import ROOT, run_process
from PIL import Image

import model
import utils

LABELS = ["Ann", "Ben", "Cleo"]


@pytest.fixture(scope="session")
def good_trio(tmp_path_factory):
    """Save a whole, untrained model; every test spoils a copy. Returns its folder."""
    import keras

    folder = tmp_path_factory.mktemp("good")
    keras.utils.clear_session()
    info = {"labels": LABELS, "image_size": 75, "threshold": 0.5, "round": 0}
    model.save_model(model.build_network(3, 75), info, folder / "m")
    (folder / "data" / "Ann").mkdir(parents=True)
    Image.new("RGB", (80, 80)).save(folder / "data" / "Ann" / "1.png")
    return folder


@pytest.fixture
def trio(good_trio, tmp_path):
    """Return a folder with a copy of the good trio, to spoil."""
    shutil.copytree(good_trio, tmp_path / "trio")
    return tmp_path / "trio"


def sign(folder):
    """Make the attribute fit the files again, as somebody who means harm would."""
    with h5py.File(folder / "m.h5", "a") as file:
        info = json.loads(file.attrs["kit"])
        for key, name in (("json", "m.json"), ("labels", "m-labels.json")):
            info["sha256"][key] = hashlib.sha256((folder / name).read_bytes()).hexdigest()
        file.attrs["kit"] = json.dumps(info)


def edit_json(change, where="both"):
    """Return a spoiler: a function changes the architecture in m.json and the .h5; signed."""

    def spoil(folder):
        config = json.loads((folder / "m.json").read_text())
        config = change(config) or config
        if where in ("both", "json"):
            (folder / "m.json").write_text(json.dumps(config))
        if where in ("both", "h5"):
            with h5py.File(folder / "m.h5", "a") as file:
                file.attrs["model_config"] = json.dumps(config)
        sign(folder)

    return spoil


def add_layer(config, layer, argument=None):
    """Put a layer behind the last one; `argument` goes in instead of its output."""
    inner = config["config"]
    last = inner["layers"][-1]
    tensor = {"class_name": "__keras_tensor__", "config": {
        "shape": [None, 3], "dtype": "float32", "keras_history": [last["name"], 0, 0]}}  # fmt: skip
    node = {"args": [argument or tensor], "kwargs": {}}
    inner["layers"].append(layer | {"name": "extra", "inbound_nodes": [node]})
    inner["output_layers"] = ["extra", 0, 0]


def lambda_layer(canary):
    """A Lambda layer whose marshalled code makes a file when it is loaded or called."""
    code = marshal.dumps(
        compile(f"lambda x: (open({str(canary)!r}, 'w').close(), x)[1]", "x", "eval").co_consts[0]
    )
    function = {"class_name": "__lambda__", "config": {
        "code": base64.b64encode(code).decode(), "defaults": None, "closure": None}}  # fmt: skip
    return lambda_around(function)


def saved_model_layer(config, path):
    """Add a Lambda around TFSMLayer: Keras 3.15.1 opens the SavedModel behind its argument."""
    function = {"module": "keras.layers", "class_name": "function", "config": "TFSMLayer"}
    function["registered_name"] = "function"
    add_layer(config, lambda_around(function), str(path))


def lambda_around(function):
    """Return the record of a Lambda layer."""
    more = {"name": "extra", "trainable": True, "dtype": "float32", "arguments": {}}
    layer = {"module": "keras.layers", "class_name": "Lambda", "registered_name": None}
    return layer | {"config": more | {"function": function}}


def set_units(value):
    """Return a change: the last layer claims `value` units."""

    def change(config):
        config["config"]["layers"][-1]["config"]["units"] = value

    return change


def rewrite(change):
    """Return a spoiler that opens m.h5 and hands over its group of weights."""

    def spoil(folder):
        with h5py.File(folder / "m.h5", "a") as file:
            change(file["model_weights"])

    return spoil


LAST = "probabilities/probabilities"


def replace(**dataset):
    """Return a spoiler: the kernel of the last layer becomes another dataset."""

    def change(weights):
        del weights[f"{LAST}/kernel"]
        weights[LAST].create_dataset("kernel", **dataset)

    return rewrite(change)


def replace_by(make):
    """Return a spoiler: the kernel of the last layer becomes make(its numbers)."""

    def change(weights):
        numbers = weights[f"{LAST}/kernel"][()]
        del weights[f"{LAST}/kernel"]
        weights[LAST].create_dataset("kernel", data=make(numbers))

    return rewrite(change)


def link(target):
    """Return a spoiler: the last kernel is a link."""

    def change(weights):
        del weights[f"{LAST}/kernel"]
        weights[f"{LAST}/kernel"] = target

    return rewrite(change)


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


@functools.cache
def packed_zeros():
    """Return 2 GB of zeros as zlib packs them."""
    packer = zlib.compressobj(1)
    return b"".join(packer.compress(bytes(2**20)) for _ in range(2**11)) + packer.flush()


def packed_bias(**options):
    """Return a spoiler: a bias of 1024 numbers lies in one piece that unpacks to 2 GB."""

    def change(weights):
        group, more = weights["hidden/hidden"], {"chunks": (1024,), "compression": "gzip"}
        del group["bias"]
        bias = group.create_dataset("bias", (1024,), "float32", **more | options)
        bias.id.write_direct_chunk((0,), packed_zeros())

    return rewrite(change)


def not_finite(value):
    """Return a change: one number of the first kernel is not finite."""

    def change(weights):
        weights["hidden/hidden/bias"][7] = value

    return change


def attribute(**values):
    """Return a spoiler: what travels with the model says something else."""

    def spoil(folder):
        with h5py.File(folder / "m.h5", "a") as file:
            file.attrs["kit"] = json.dumps(json.loads(file.attrs["kit"]) | values)

    return spoil


def labels(value):
    """Return a spoiler: other labels, signed, and the same in the attribute."""

    def spoil(folder):
        (folder / "m-labels.json").write_text(json.dumps(value))
        attribute(labels=value)(folder)
        sign(folder)

    return spoil


def text(name, content):
    """Return a spoiler: a file holds something else."""
    return lambda folder: (folder / name).write_bytes(content)


def linked(folder):
    """Make the model a link to one elsewhere."""
    (folder / "m.h5").rename(folder / "elsewhere.h5")
    (folder / "m.h5").symlink_to(folder / "elsewhere.h5")


def swapped(folder):
    """The labels of another run, with as many classes."""
    (folder / "m-labels.json").write_text('["Cleo", "Ben", "Ann"]')


def size_claim(config):
    config["config"]["layers"][0]["config"]["batch_shape"] = [None, 10**9, 10**9, 3]


def bush(weights):
    """Give a group six names, seven levels deep: 280,000 ways to its end, none of them a loop."""
    for _ in range(7):
        inner = weights.create_group("n0")
        for n in range(1, 6):
            weights[f"n{n}"] = inner
        weights = inner


def linked_weights(folder):
    """Keep all weights in another file, which a link names."""
    shutil.copy(folder / "m.h5", folder / "elsewhere.h5")
    with h5py.File(folder / "m.h5", "a") as file:
        del file["model_weights"]
        file["model_weights"] = h5py.ExternalLink("elsewhere.h5", "/model_weights")


def deep_bomb(weights):
    """Hide a bomb where no real file has anything."""
    deep = weights.create_group("/".join("abcdefgh"))
    deep.create_dataset("x", (2**29,), "float32", chunks=(2**20,))


def wide_chunk(weights):
    """One chunk of 120 MB for 3 numbers."""
    del weights[f"{LAST}/bias"]
    more = {"maxshape": (None,), "chunks": (30_000_000,), "compression": "gzip"}
    weights[LAST].create_dataset("bias", (3,), "float32", **more)


def tiny_chunks(weights):
    """Two million pieces of one number, of which none is there."""
    shape = weights["hidden/hidden/kernel"].shape
    del weights["hidden/hidden/kernel"]
    weights["hidden/hidden"].create_dataset("kernel", shape, "float32", chunks=(1, 1))


def long_text(length, dtype=None):
    """Return a spoiler: what travels with the model is a text of so many characters."""

    def spoil(folder):
        with h5py.File(folder / "m.h5", "a") as file:
            del file.attrs["kit"]
            file.attrs.create("kit", "x" * length, dtype=dtype)

    return spoil


def one_text(folder):
    """List 450 layers whose names are one and the same text of 20 MB: 9 GB where they are read."""
    with h5py.File(folder / "m.h5", "a") as file:
        del file["model_weights"].attrs["layer_names"]
        names = ["x" * 20_000_000] + ["y" * 7] * 449
        file["model_weights"].attrs.create("layer_names", names, dtype=h5py.string_dtype())
    data = bytearray((folder / "m.h5").read_bytes())
    start = data.index(struct.pack("<I", 20_000_000))
    while data[start + 16 : start + 20] != struct.pack(
        "<I", 7
    ):  # elsewhere these bytes mean something else
        start = data.index(struct.pack("<I", 20_000_000), start + 1)
    data[start : start + 450 * 16] = (
        data[start : start + 16] * 450
    )  # references: size, place, number
    (folder / "m.h5").write_bytes(data)


def endless_text(size_of, size, reserved=0):
    """Return a spoiler: libhdf5 comes back to the same place among the texts for ever.

    size_of: bytes from the start of the texts to the number that becomes `size`.
    """

    def spoil(folder):
        data = bytearray((folder / "m.h5").read_bytes())
        start = data.index(b"GCOL")
        data[start + 5] = reserved
        data[start + size_of : start + size_of + 8] = size.to_bytes(8, "little")
        (folder / "m.h5").write_bytes(data)

    return spoil


REFUSED = {
    "deep json": text("m.json", b"[" * 200_000 + b"]" * 200_000),
    "deep labels": text("m-labels.json", b"[" * 200_000 + b"]" * 200_000),
    "no json": text("m.json", b"\xff\xfe\x00"),
    "huge json": text("m.json", b"[" + b"0," * 3_000_000 + b"0]"),
    "unsigned json": text("m.json", b"{}"),
    "swapped labels": swapped,
    "labels with escapes": labels(["Ann", "B\x1b[2Jen", "Cleo"]),
    "labels twice": labels(["Ann", "Ann", "Cleo"]),
    "labels of numbers": labels([1, 2, 3]),
    "labels no list": labels({"Ann": 1}),
    "label too long": labels(["Ann", "B" * 10_000, "Cleo"]),
    "label of nothing": labels(["Ann", "", "Cleo"]),
    "too many labels": labels([str(n) for n in range(20_000)]),
    "one label more": labels(["Ann", "Ben", "Cleo", "Dan"]),
    "cut h5": lambda f: os.truncate(f / "m.h5", 5_000_000),
    "junk h5": text("m.h5", b"junk" * 1000),
    "empty h5": text("m.h5", b""),
    "sparse h5": lambda f: os.truncate(f / "m.h5", 2**33),
    "2 GiB bomb": replace(shape=(2**29,), dtype="float32", chunks=(2**20,), compression="gzip"),
    "32 GiB bomb": replace(shape=(2**33,), dtype="float32", chunks=(2**20,), compression="gzip"),
    "bomb in a piece": packed_bias(),
    "bomb in a shuffled piece": packed_bias(shuffle=True),
    "another packing": packed_bias(compression="lzf"),
    "wide chunk": rewrite(wide_chunk),
    "tiny chunks": rewrite(tiny_chunks),
    "other shape": replace_by(np.transpose),
    "integers": replace_by(lambda numbers: numbers.astype("int64")),
    "texts": replace_by(lambda numbers: np.full(numbers.shape, b"x")),
    "nan": rewrite(not_finite(np.nan)),
    "infinite": rewrite(not_finite(np.inf)),
    "larger than float32": replace_by(lambda numbers: np.full(numbers.shape, 1e300)),
    "external link": link(h5py.ExternalLink("/etc/hostname", "/x")),
    "soft link": link(h5py.SoftLink("/model_weights/hidden/hidden/kernel")),
    "external storage": rewrite(external),
    "virtual dataset": rewrite(virtual),
    "a layer less": rewrite(lambda w: w.__delitem__("conv2d_7")),
    "weights linked away": linked_weights,
    "no attribute": rewrite(lambda w: w.parent.attrs.pop("kit")),
    "attribute no json": rewrite(lambda w: w.parent.attrs.__setitem__("kit", "{")),
    "attribute a number": rewrite(lambda w: w.parent.attrs.__setitem__("kit", 3)),
    "attribute a long text": long_text(30_000_000),
    "one text for all names": one_text,
    "a text that never ends": endless_text(24, 2**64 - 16),
    "texts that end too late": endless_text(8, 400_000),
    "texts with another head": endless_text(8, 400_000, reserved=7),
    "attribute of many texts": rewrite(lambda w: w.parent.attrs.__setitem__("kit", ["{}"] * 1000)),
    "threshold a text": attribute(threshold="high"),
    "threshold not finite": attribute(threshold=float("nan")),
    "image size a float": attribute(image_size=75.0),
    "image size 1e9": attribute(image_size=10**9),
    "round with escapes": attribute(round="\x1b[2J"),
    "a link": linked,
    "missing labels": lambda f: (f / "m-labels.json").unlink(),
    "a folder": lambda f: (f / "m.h5").unlink() or (f / "m.h5").mkdir(),
    "a named pipe": lambda f: (f / "m.json").unlink() or os.mkfifo(f / "m.json"),
}
# What is never looked at cannot do harm, and plain Keras alone would use it.
HARMLESS = {
    "lambda in json": lambda f: edit_json(
        lambda c: add_layer(c, lambda_layer(f / "canary")), "json"
    )(f),
    "lambda in h5": lambda f: edit_json(lambda c: add_layer(c, lambda_layer(f / "canary")), "h5")(
        f
    ),
    "saved model layer": lambda f: edit_json(lambda c: saved_model_layer(c, f / "canary"))(f),
    "units 1e10": edit_json(set_units(10**10)),
    "size in json 1e9": edit_json(size_claim),
    "a list": edit_json(lambda c: [1, 2, 3]),
    "no config": rewrite(lambda w: w.parent.attrs.pop("model_config")),
    "bomb beside": rewrite(lambda w: w.create_dataset("x", (2**29,), "float32", chunks=(2**20,))),
    "bomb far below": rewrite(deep_bomb),
    "objects": rewrite(lambda w: w.create_dataset("o", (1,), h5py.string_dtype())),
    "link beside": rewrite(lambda w: w.__setitem__("x", h5py.ExternalLink("/etc/hostname", "/x"))),
    "loop of groups": rewrite(lambda w: w.__setitem__("loop", w)),
    "a type as data": rewrite(lambda w: w.__setitem__("t", np.dtype("float32"))),
    "many names for few groups": rewrite(bush),
    "more names than data": rewrite(
        lambda w: w.attrs.__setitem__("layer_names0", [b"hidden"] * 900)
    ),
}


@pytest.fixture(scope="session")
def good_network(good_trio):
    """Return the saved network as plain Keras reads it, and one to load into."""
    network, other = model.build_network(3, 75), model.build_network(3, 75)
    network.load_weights(good_trio / "m.h5")
    return network, other


@pytest.mark.parametrize("name", sorted(REFUSED.keys() - {"one label more"}))
def test_a_bad_trio_is_refused_in_one_line(trio, name, good_network):
    REFUSED[name](trio)
    with pytest.raises(utils.UserError) as caught:
        model.check_model(trio / "m")
        model.load_arrays(good_network[1], trio / "m.h5")
    message = str(caught.value)
    assert message.startswith(f"{trio}/m") and message.isprintable()


WORST = ("one label more", "nan", "deep json", "sparse h5", "32 GiB bomb", "bomb in a piece")


@pytest.mark.slow
@pytest.mark.parametrize("name", [*WORST, "attribute a long text", "weights linked away"])
def test_the_worst_end_in_one_line_and_take_little_memory(trio, name):
    REFUSED[name](trio)
    program = (
        "import resource, subprocess, sys; done = subprocess.run(sys.argv[1:]); "
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss); sys.exit(done.returncode)"
    )
    command = [sys.executable, "-c", program, sys.executable, ROOT / "train.py", "data", "m"]
    done = subprocess.run([*command, "--evaluate"], cwd=trio, capture_output=True, text=True)
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("error: m")
    assert int(done.stdout) < 1.5e6  # kB


@pytest.mark.parametrize("name", HARMLESS)
def test_strange_extras_are_not_looked_at(trio, name, good_network):
    expected, other = good_network
    HARMLESS[name](trio)
    other.set_weights([np.zeros_like(array) for array in other.get_weights()])
    assert model.check_model(trio / "m")["labels"] == LABELS
    model.load_arrays(other, trio / "m.h5")
    pairs = zip(other.get_weights(), expected.get_weights())
    assert all(np.array_equal(a, b) for a, b in pairs)
    assert not (trio / "canary").exists()


@pytest.mark.slow
def test_a_model_that_names_code_is_used_without_it(trio):
    HARMLESS["lambda in json"](trio)
    HARMLESS["saved model layer"](trio)
    evaluated = run_process(ROOT / "train.py", trio, "data", "m", "--evaluate")
    assert evaluated.returncode == 0 and "evaluate: accuracy" in evaluated.stdout, evaluated.stderr
    assert not (trio / "canary").exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["swapped labels", "nan"])
def test_the_tagger_refuses_them_too(trio, name):
    REFUSED[name](trio)
    done = run_process(
        ROOT / "webcam.py",
        trio,
        "m",
        "--source",
        "data/Ann/1.png",
        "--no-display",
        "--whole-picture",
    )
    assert (
        done.returncode == 1
        and len(done.stderr.splitlines()) == 1
        and done.stderr.startswith("error: m")
    )


def test_the_folder_with_the_model_is_no_place_for_code(trio, monkeypatch):
    """What lies beside a model that somebody sent, and is named like a module, does not run."""
    for name in ("cv2", "numpy", "PIL", "keras", "matplotlib"):
        (trio / f"{name}.py").write_text("open('canary', 'w').close()")
    monkeypatch.delenv("DISPLAY", raising=False)
    done = run_process(
        ROOT / "webcam.py", trio, "m", "--source", "data/Ann/1.png", "--whole-picture"
    )
    assert done.returncode == 0 and "no window can be opened" in done.stderr, done.stderr
    assert not (trio / "canary").exists()


def test_weights_that_keras_would_read_in_another_way(run_script, tmp_path, weights_file):
    shutil.copy(weights_file, tmp_path / "w.keras")
    for name in ("a", "b"):
        (tmp_path / "data" / name).mkdir(parents=True)
    done = run_script("train.py", "data", "m", "--weights", "w.keras")
    assert done.returncode == 1 and done.stderr.splitlines()[-1].startswith(
        "error: --weights w.keras: give a file"
    )


def test_the_settings_of_a_stranger_do_not_change_the_pictures(tmp_path):
    (tmp_path / "matplotlibrc").write_text("foo\x1b]0;x\x07: 1\ntext.usetex: True\nfigure.dpi: 1\n")
    code = (
        "import numpy as np, report; "
        "report.draw_report('r.png', 't', ['a', 'b'], np.array([0, 1]), np.eye(2))"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], cwd=tmp_path, env=environment, capture_output=True
    )
    assert (done.returncode, done.stderr) == (0, b"") and Image.open(
        tmp_path / "r.png"
    ).width == 990


def test_the_good_trio_is_not_refused(trio):
    assert model.load_model(trio / "m")[1]["labels"] == ["Ann", "Ben", "Cleo"]


PLAIN = """
import os
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
import keras

def attempt(folder, load):
    try:
        load(folder)(keras.ops.zeros((1, 75, 75, 3)))
    except Exception as error:
        print(folder, type(error).__name__, str(error)[:400].replace("\\n", " "))

def from_json(folder):
    return keras.models.model_from_json(open(f"{folder}/m.json").read())

attempt("saved model layer", from_json)
keras.config.enable_unsafe_deserialization()
attempt("lambda in json", from_json)
attempt("lambda in h5", lambda folder: keras.models.load_model(
    f"{folder}/m.h5", compile=False, safe_mode=False))
"""


def test_the_attacks_do_work_in_plain_keras(good_trio, tmp_path):
    """A lambda runs with the safe mode off, and a SavedModel that the file names is looked for."""
    names = ("saved model layer", "lambda in json", "lambda in h5")
    for name in names:
        shutil.copytree(good_trio, tmp_path / name)
        HARMLESS[name](tmp_path / name)
    done = subprocess.run(
        [sys.executable, "-c", PLAIN], cwd=tmp_path, capture_output=True, text=True
    )
    for name in names[1:]:
        assert (tmp_path / name / "canary").exists(), done.stdout + done.stderr
    assert str(tmp_path / names[0] / "canary") in done.stdout


def test_bombs_do_open_in_plain_h5py(trio):
    REFUSED["2 GiB bomb"](trio)
    with h5py.File(trio / "m.h5") as file:
        assert file["model_weights/probabilities/probabilities/kernel"].nbytes == 2**31
    assert (trio / "m.h5").stat().st_size < 120e6


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_not_finite_are_refused(tmp_path, weights_file, value):
    path = shutil.copy(weights_file, tmp_path / "w.h5")
    with h5py.File(path, "a") as file:
        name = next(name for name in file if name.startswith("batch_normalization"))
        file[name][name]["beta"][3] = value
    with pytest.raises(utils.UserError, match=r"w\.h5: .*not finite"):
        model.load_arrays(model.backbone_of(model.build_network(2, 75)), path)
