"""The network: how it is built, saved and loaded again (train.py and webcam.py)."""

import contextlib
import functools
import hashlib
import json
import logging
import mmap
import os
import re
import sys
import threading
from pathlib import Path

import numpy as np

import utils

CHILD = "FINETUNING_KIT_CHILD"  # set in processes of a run on several machines
METADATA_ATTRIBUTE = "kit"  # of the root of model.h5: what travels with the model, as JSON
BASE_PARAMETERS = 21_802_784  # numbers in InceptionV3 without its top
LAYOUT = 16  # about so many blocks a side make the layout of a picture
MAX_CLASSES = 10_000
MAX_LABEL = 255  # characters
MAX_LABELS = 1_500_000  # all of them as JSON; MAX_TEXTS allows as many characters for each layer
CLASSES = {
    *(
        "Functional",
        "InputLayer",
        "Rescaling",
        "Conv2D",
        "BatchNormalization",
        "Activation",
        "Concatenate",
    ),
    *(
        "AveragePooling2D",
        "MaxPooling2D",
        "GlobalAveragePooling2D",
        "Dense",
        "DTypePolicy",
        "GlorotUniform",
    ),
    *("Flatten", "LayerNormalization", "Zeros", "Ones", "__keras_tensor__"),
}  # all that a model.json of ours names
MAX_JSON = 4_000_000  # bytes; a real model.json has 300,000
MAX_ITEMS = 5_000  # groups and arrays in a file of weights; real ones have 900
HEAP = re.compile(
    rb"GCOL\x01(?=...(.{4}))", re.S
)  # begins a piece of an HDF5 file that holds texts; its size
MAX_TEXTS = (
    2**29
)  # bytes of one attribute, whose texts may all be one and the same long one; real ones take 1e8

JITTING = threading.Lock()  # functools.cache lets two threads make the same thing twice


# ---------------------------------------------------------------- the network and its three files


@functools.cache
def import_keras():
    """Import Keras, TensorFlow behind it unless KERAS_BACKEND says otherwise, without start-up chatter.

    It takes seconds, so functions ask here rather than at the top of a file. Returns the module.
    Raises utils.UserError if a package is missing.
    """
    os.environ.setdefault("KERAS_BACKEND", "tensorflow")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    logging.getLogger("absl").setLevel("ERROR")
    try:
        with silence_output():
            import keras

            if CHILD in os.environ:
                join_processes(keras)
            keras.config.set_image_data_format(
                "channels_last"
            )  # whatever a keras.json of long ago says
            keras.config.set_floatx("float32")
            keras.ops.zeros(1)  # what the first operation has to say is said here
    except (ImportError, ValueError) as error:  # ValueError: no such backend
        raise utils.UserError(
            f"{error}: {utils.INSTALL} (TensorFlow has no packages for Intel Macs and Windows on ARM: see README.md)"
        ) from None
    return keras


def join_processes(keras):
    """Make this process one of those that train together; it has to come before Keras's first operation."""
    import jax

    hosts = os.environ["KERAS_DISTRIBUTION_JOB_ADDRESSES"].split(",")
    os.environ.setdefault("no_grpc_proxy", ",".join(host.rpartition(":")[0] for host in hosts))
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    keras.distribution.initialize()


@contextlib.contextmanager
def silence_output():
    """Send stdout and stderr nowhere while libraries in C++ introduce themselves."""
    sys.stdout.flush(), sys.stderr.flush()
    kept, nowhere = {fd: os.dup(fd) for fd in (1, 2)}, os.open(os.devnull, os.O_WRONLY)
    for fd in kept:
        os.dup2(nowhere, fd)
    try:
        yield
    finally:
        for fd, copy in kept.items():
            os.dup2(copy, fd)
            os.close(copy)
        os.close(nowhere)


def build_network(class_count, side, number_format="float32"):
    """Build InceptionV3 with a new top: pooling, 1024 dense units, softmax. Weights are random.

    The last layer sees the hidden units, the pooled features of block `mixed8`, and the layout: means of about 16 x 16
    blocks of the picture, these two with mean 0 and variance 1. The top may take for a friend who is strange to them.

    Takes RGB pixels 0..255 of shape (batch, side, side, 3), scales them itself, and gives
    probabilities of shape (batch, class_count) in float32. number_format: a Keras dtype policy.
    """
    keras = import_keras()
    keras.config.set_dtype_policy(number_format)  # applications take no dtype argument
    try:
        pixels = keras.Input((side, side, 3), name="pixels")
        scaled = keras.layers.Rescaling(1 / 127.5, offset=-1, name="scaled")(pixels)
        base = keras.applications.InceptionV3(weights=None, include_top=False, input_tensor=scaled)
        pooled = keras.layers.GlobalAveragePooling2D(name="pooled")(base.output)
        hidden = keras.layers.Dense(1024, activation="relu", name="hidden")(pooled)
        middle = keras.layers.GlobalAveragePooling2D()(base.get_layer("mixed8").output)
        middle = keras.layers.LayerNormalization(center=False, scale=False, name="middle")(middle)
        layout = keras.layers.Flatten()(keras.layers.AveragePooling2D(round(side / LAYOUT))(scaled))
        layout = keras.layers.LayerNormalization(center=False, scale=False, name="layout")(layout)
        units = keras.layers.Concatenate(name="units")([hidden, middle, layout])
        softmax = keras.layers.Dense(
            class_count, activation="softmax", dtype="float32", name="probabilities"
        )
        return keras.Model(pixels, softmax(units))
    finally:
        keras.config.set_dtype_policy("float32")


def count_parameters(class_count, side):
    """Return how many numbers the weights of a network of `build_network` are."""
    units = 1024 + 1280 + 3 * (side // round(side / LAYOUT)) ** 2
    return BASE_PARAMETERS + (2048 + 1) * 1024 + (units + 1) * class_count


def compiled(model, **settings):
    """Compile a Keras model; XLA only where the backend is nothing else (measured: it slows TensorFlow down)."""
    model.compile(jit_compile=import_keras().config.backend() == "jax", **settings)
    return model


def predict(model, rows, batch_size, dtype="float32"):
    """Predict in batches of one size, the last one filled up, so that one compiled graph serves all.

    rows: array (n, …), may be a memory map. Returns (n, …) of that dtype. Waits for each batch: call it in threads.
    """
    parts = []
    for start in range(0, len(rows), batch_size):
        part = rows[start : start + batch_size]
        filled = np.resize(part, (batch_size, *part.shape[1:])) if len(part) < batch_size else part
        parts.append(np.asarray(predict_batch(model, filled).astype(dtype))[: len(part)])
    return np.concatenate(parts)


def predict_batch(model, batch):
    """Return what `model.predict_on_batch` gives, in JAX as an array of the device; threads may call it at once.

    In JAX, Keras's own waits for the device, and then writes every variable anew.
    """
    if import_keras().config.backend() != "jax":
        return model.predict_on_batch(batch)
    with JITTING:
        variables, compute = jitted(model)
    trained, others = ([variable.value for variable in some] for some in variables)
    return compute(trained, others, batch)


@functools.cache
def jitted(model):
    """Return (trainable variables, others) of a Keras model, for good, and what JAX compiles of it.

    That is a function: (values of the ones, of the others, batch) → prediction. Keras takes a millisecond to list them.
    """
    import jax

    variables = model.trainable_variables, model.non_trainable_variables
    return variables, jax.jit(lambda *numbers: model.stateless_call(*numbers, training=False)[0])


def model_paths(prefix):
    """Return the paths of the model's three files: weights and all, architecture, labels."""
    return Path(f"{prefix}.h5"), Path(f"{prefix}.json"), Path(f"{prefix}-labels.json")


def save_model(model, info, prefix):
    """Save a Keras model as `prefix.h5`, `.json` and `-labels.json`; the rename of the `.h5` is the commit.

    info: what else must travel with the model, plain data with at least `labels` and `image_size`; it
    becomes JSON in an attribute of the `.h5`, with the SHA-256 of the other two files added.
    """
    import h5py

    weights, architecture, labels = model_paths(prefix)
    texts = {architecture: model.to_json().encode(), labels: json.dumps(info["labels"]).encode()}
    sums = {
        key: hashlib.sha256(text).hexdigest()
        for key, text in zip(("json", "labels"), texts.values())
    }
    with utils.atomic_write(weights) as weights_part:
        try:
            model.save(weights_part)
            with h5py.File(weights_part, "a") as file:
                file.attrs[METADATA_ATTRIBUTE] = json.dumps(info | {"sha256": sums})
        except (OSError, RuntimeError, ValueError) as error:  # HDF5 wraps what the system said
            reason = f"cannot be written ({utils.first_line(error)})"
            raise utils.UserError(
                f"{utils.escape(weights)}: {reason}: free some space, then --resume"
            ) from None
        for path, text in texts.items():
            with utils.atomic_write(path) as part:
                part.write_bytes(text)


def may_replace_model(prefix):
    """Say whether a model of this prefix may be replaced: there is none, or it is one of this kit's."""
    import h5py

    weights, architecture, _ = model_paths(prefix)
    try:
        if os.path.lexists(weights) and not weights.is_file():
            return False
        if weights.exists():
            with h5py.File(weights, "r") as file:
                return METADATA_ATTRIBUTE in file.attrs
        if (
            architecture.exists()
        ):  # a kill between the renames of a first save leaves it without a model.h5
            check_architecture(
                parse_json(architecture, read_capped(architecture, MAX_JSON)), architecture
            )
        return True
    except (OSError, utils.UserError):
        return False


def load_model(prefix):
    """Load a model of ours: returns (compiled Keras model, info) with info as given to `save_model`.

    Safe with files from strangers: no class named in a file is ever looked up. The network is built here, from
    numbers checked first. Raises utils.UserError for anything that is not whole.
    """
    info = check_model(prefix)
    model = build_network(len(info["labels"]), info["image_size"])
    load_weights(model, model_paths(prefix)[0])
    return compiled(model), info


def check_model(prefix):
    """Check the three files of a model without TensorFlow: sizes, JSON, labels, HDF5 shapes. Returns its info.

    What is trusted is h5py with libhdf5. Raises utils.UserError for anything that is not whole.
    """
    weights, architecture, labels_path = model_paths(prefix)
    texts = [read_capped(path, MAX_JSON) for path in (architecture, labels_path)]
    labels = check_labels(parse_json(labels_path, texts[1]), labels_path)
    side = check_architecture(parse_json(architecture, texts[0]), architecture)
    ours, config = check_hdf5(weights, count_parameters(len(labels), side))
    info = parse_json(weights, ours)
    check_architecture(
        parse_json(weights, config), weights
    )  # plain Keras would build the network from it
    sums = [hashlib.sha256(text).hexdigest() for text in texts]
    if not isinstance(info, dict) or info.get("sha256") != dict(zip(("json", "labels"), sums)):
        raise utils.UserError(
            f"{utils.escape(weights)}: does not belong to the .json and -labels.json beside it: copy all three files "
            "of one training run again, or finish that run with --resume"
        )
    threshold = info.setdefault("threshold", 0.5)
    good = (
        all(type(info.get(name)) is int for name in ("image_size", "round"))
        and 0 <= info["round"] <= 999
    )
    known = good and info.get("labels") == labels and info["image_size"] == side
    if not known or not isinstance(threshold, int | float) or not 0 <= threshold <= 1:
        raise utils.UserError(
            f"{utils.escape(weights)}: what belongs to the model is damaged in it: train again"
        )
    return info


def load_weights(model, path):
    """Load a checked HDF5 file's arrays into a Keras model. Raises utils.UserError for other shapes or NaN."""
    try:
        model.load_weights(path)
    except (ValueError, KeyError, TypeError, AttributeError, OSError, RuntimeError) as error:
        reason = f"these weights do not fit InceptionV3 ({utils.first_line(error)})"
        raise utils.UserError(f"{utils.escape(path)}: {reason}: use another file") from None
    if not all(np.isfinite(array).all() for array in model.get_weights()):
        raise utils.UserError(
            f"{utils.escape(path)}: holds numbers that are not finite: train again or use another file"
        )


def check_file(path, limit):
    """Raise utils.UserError unless there is a file of at most `limit` bytes at `path`, and no link to one."""
    if path.is_symlink():
        raise utils.UserError(f"{utils.escape(path)}: is a link: copy the file itself here")
    if not path.exists():
        raise utils.UserError(
            f"{utils.escape(path)}: no such file: check the name (a model's prefix has no ending)"
        )
    if not path.is_file():  # a named pipe would wait for ever
        raise utils.UserError(f"{utils.escape(path)}: is no file: remove it")
    if path.stat().st_size > limit:
        raise utils.UserError(
            f"{utils.escape(path)}: larger than {limit:,} bytes, as no such file is: use another one"
        )


def read_capped(path, limit):
    """Return the bytes of a file that `check_file` lets pass."""
    check_file(path, limit)
    return path.read_bytes()


def parse_json(path, text):
    """Return the plain data in JSON bytes. Raises utils.UserError for anything else, endless nesting included."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError, TypeError):
        raise utils.UserError(
            f"{utils.escape(path)}: damaged, not JSON: copy it again or train again"
        ) from None


def check_labels(labels, path):
    """Return a list of class names fit to become folder names and terminal text, or raise utils.UserError."""
    good = isinstance(labels, list) and 2 <= len(labels) <= MAX_CLASSES
    good = good and all(isinstance(label, str) and utils.escape(label) == label for label in labels)
    good = good and all(0 < len(label) <= MAX_LABEL for label in labels)
    if not good or len(set(labels)) != len(labels):
        raise utils.UserError(
            f"{utils.escape(path)}: not a list of two or more different class names: train again"
        )
    return labels


def check_architecture(config, path):
    """Return the image size that an architecture names, read as plain data. Raises utils.UserError.

    The network is never made from it, but plain Keras would do so: whatever is not part of ours is refused.
    """
    try:
        _, height, width, channels = config["config"]["layers"][0]["config"]["batch_shape"]
    except (TypeError, KeyError, IndexError, ValueError):
        raise utils.UserError(
            f"{utils.escape(path)}: names no image size: it was not written by this kit"
        ) from None
    if type(height) is not int or not 75 <= height <= 1024 or width != height or channels != 3:
        raise utils.UserError(
            f"{utils.escape(path)}: its image size is not one that this kit makes: do not use it"
        )
    pending = [config]
    while pending:
        item = pending.pop()
        if isinstance(item, dict):
            pending += item.values()
            names = [item[key] for key in ("class_name", "registered_name") if item.get(key)]
            if not all(isinstance(name, str) and name in CLASSES for name in names):
                raise utils.UserError(
                    f"{utils.escape(path)}: has layers that this kit does not use: do not open it with Keras"
                )
        elif isinstance(item, list):
            pending += item
        elif isinstance(item, int | float) and abs(item) > MAX_CLASSES:
            raise utils.UserError(
                f"{utils.escape(path)}: a layer is larger than this kit makes: do not open it with Keras"
            )
    return height


def check_hdf5(path, parameters):
    """Check an HDF5 file of weights before anything is read from it; return its two attributes of text.

    parameters: how many numbers it must declare, no more and no less, so that no bomb can hide in it;
    links, and data kept in other files, are refused. Returns (ours, Keras's `model_config`), None if absent.
    """
    import h5py

    check_file(path, 5 * parameters + 10 * MAX_JSON)
    try:
        longest = longest_text(path)
        with h5py.File(path, "r") as file:
            count = count_numbers(file, longest)
            if count != parameters:
                numbers = f"{count:,} numbers, not {parameters:,}"
                raise utils.UserError(
                    f"{utils.escape(path)}: holds {numbers}: it belongs to another network or version"
                )
            return text_attribute(file, METADATA_ATTRIBUTE), text_attribute(file, "model_config")
    except (OSError, RuntimeError, KeyError, ValueError, TypeError, MemoryError) as error:
        reason = f"damaged, not HDF5 or made to harm ({utils.first_line(error)})"
        raise utils.UserError(f"{utils.escape(path)}: {reason}: copy it again") from None


def text_attribute(file, name):
    """Return an attribute of an HDF5 file that is one text of at most MAX_JSON characters, else None."""
    if name not in file.attrs or file.attrs.get_id(name).shape != ():
        return None
    text = file.attrs[name]
    return text if isinstance(text, str) and len(text) <= MAX_JSON else None


def longest_text(path):
    """Return how many bytes a text among the attributes of an HDF5 file can have at most, 0 if there is none."""
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        sizes = (int.from_bytes(heap[1], "little") for heap in HEAP.finditer(data))
        return max((size for size in sizes if size <= len(data)), default=0)


def count_numbers(file, longest):
    """Count the numbers that an open HDF5 file declares. Raises ValueError for what we never write.

    longest: bytes of its longest text.
    """
    import h5py

    count, seen, pending = 0, 0, [(file, 0)]
    while pending:
        group, depth = pending.pop()
        check_texts(group, longest)
        check_names(group)
        for name in group:
            seen += 1
            if seen > MAX_ITEMS or depth > 7:
                raise ValueError("more inside than such a file has")
            if not isinstance(group.get(name, getlink=True), h5py.HardLink):
                raise ValueError("links to other data")
            item = group[name]
            if isinstance(item, h5py.Group):
                pending.append((item, depth + 1))
                continue
            good = isinstance(item, h5py.Dataset) and not item.external and not item.is_virtual
            if not good or item.dtype.kind != "f" or item.dtype.itemsize > 4:
                raise ValueError("data kept elsewhere or of another kind")
            if (
                item.chunks and np.prod(item.chunks, dtype=float) > item.size
            ):  # all of a piece is unpacked
                raise ValueError("unpacks to more than it is")
            check_texts(item, longest)
            count += item.size
    return count


def check_texts(item, longest):
    """Raise ValueError if an attribute of a group or array may fill the memory when it is read."""
    import h5py

    for attribute in map(item.attrs.get_id, item.attrs):
        if attribute.dtype.hasobject:  # it only names what lies elsewhere in the file
            most = np.prod(attribute.shape, dtype=float) * longest
            if most > MAX_TEXTS or not h5py.check_string_dtype(attribute.dtype):
                raise ValueError("attributes of more text than such a file has")


def check_names(group):
    """Raise ValueError unless the lists of what Keras is to read in a group are short and without repeats."""
    for key in group.attrs:
        most = {"layer_names": 500, "weight_names": 8}.get(key.rstrip("0123456789"))
        if most and (
            key[-1].isdigit() or not all(n <= most for n in group.attrs.get_id(key).shape)
        ):
            raise ValueError("longer lists than such a file has")
        if most and len(set(group.attrs[key])) < len(group.attrs[key]):
            raise ValueError("the same data listed twice")
