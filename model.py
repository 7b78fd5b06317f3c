"""The network: how it is built, saved and loaded again (train.py and webcam.py)."""

import collections
import contextlib
import functools
import hashlib
import json
import logging
import math
import os
import re
import struct
import sys
import threading
import zlib
from pathlib import Path

import numpy as np

import readout
import utils

BACKENDS = ("tensorflow", "jax")
CHILD = "FINETUNING_KIT_CHILD"  # set in processes of a run on several machines

Base = collections.namedtuple("Base", "builder scale offset blocks levels address md5")
Level = collections.namedtuple("Level", "block units")  # units: a slice of the layer `levels`
GRID = 3  # cells a side: a spatial pyramid of two steps (Lazebnik et al. 2006)
# The network that all begins with; another one is another table. blocks: layers past which no
# shortcut leads, in order; the last is what the builder gives. How many of the top ones are trained
# is train.UNFREEZE. levels: for each use {block: cells a side that its feature map is pooled in},
# in order; the last is the top. Which are best is measured as in benchmarks/NOTES.md; README.md,
# docs/curious.md and tests/docs_pictures.py name or draw them.
BASE = Base(
    builder="InceptionV3",  # in keras.applications
    scale=1 / 127.5,
    offset=-1,
    blocks=tuple(f"mixed{number}" for number in range(11)),  # the last ones can be trained
    levels={
        "learned": {"mixed3": GRID, "mixed5": GRID, "mixed8": 1, "mixed10": 1},
        "large set": {"mixed3": 1, "mixed5": 1, "mixed8": 1, "mixed10": 1},
        "random": {"mixed0": GRID, "mixed10": 1},  # random features tell less with every block
    },
    address="https://storage.googleapis.com/tensorflow/keras-applications/inception_v3/"
    "inception_v3_weights_tf_dim_ordering_tf_kernels_notop.h5",
    md5="bcbd6486424b2319ff4ef7d526e38f63",
)
MOMENTUM = 0.9  # of batch normalisation that is trained: the default 0.99 lags behind
HIDDEN = 1024  # units that training teaches
READOUT = ("probabilities", "standardised", "components", "sharpness")  # layers, see set_readout

METADATA_ATTRIBUTE = "kit"  # of the root of model.h5: what travels with the model, as JSON
OUR_INPUT = b'"name": "pixels"'  # stands in every model.json of ours
MIN_SIDE, MAX_SIDE = 75, 1024  # pixels
MIN_FACE_CROPS = 0.2  # of the training pictures; of sets of things 0.03, of faces 0.37 to 0.99
MAX_CLASSES = 10_000
MAX_LABEL = 255  # characters
MAX_LABELS = 1_500_000  # characters, all of them as JSON
MAX_JSON = 4_000_000  # bytes; a real model.json has 300,000
MAX_WEIGHTS = 2**29  # bytes; a real model.h5 has 1e8
TEXT_HEAP = b"GCOL\x01"  # begins a part of an HDF5 file that holds texts
NAME_HEAP = b"HEAP\0\0\0\0"  # and one that holds the names of a group's members
NO_GAP = 1  # ends the list of a name heap's gaps
MAX_CHUNKS = 10_000  # of an array

JITTING = threading.Lock()  # functools.cache lets two threads make the same thing twice


# ---------------------------------------------------------------- the network


@functools.cache
def import_keras():
    """Import Keras, over TensorFlow unless KERAS_BACKEND says otherwise, without start-up chatter.

    It takes seconds, so functions ask here rather than at the top of a file. Returns the module.
    Raises utils.UserError if a package is missing.
    """
    backend = os.environ.setdefault("KERAS_BACKEND", "tensorflow")
    if backend not in BACKENDS:
        raise utils.UserError(
            f"KERAS_BACKEND={utils.escape(backend)}: choose one of {', '.join(BACKENDS)}"
        )
    os.environ["MPLBACKEND"] = "Agg"  # Keras imports matplotlib, which fails if a notebook set it
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    for name in ("absl", "tensorflow"):  # which wonders how often it traces graphs, say
        logging.getLogger(name).setLevel("ERROR")
    try:
        with silence_output():
            import keras

            if CHILD in os.environ:
                join_processes(keras)
            # whatever a keras.json of long ago says
            keras.config.set_image_data_format("channels_last")
            keras.config.set_floatx("float32")
            keras.ops.zeros(1)  # what the first operation has to say is said here
    except ImportError as error:
        raise utils.UserError(
            f"{error}: {utils.INSTALL} "
            "(TensorFlow has no packages for Intel Macs and Windows on ARM: see README.md)"
        ) from None
    except ValueError as error:
        raise utils.UserError(f"Keras cannot be used: {utils.first_line(error)}") from None
    return keras


def join_processes(keras):
    """Make this process one of those that train together. Comes before Keras's first operation."""
    import jax

    hosts = os.environ["KERAS_DISTRIBUTION_JOB_ADDRESSES"].split(",")
    os.environ.setdefault("no_grpc_proxy", ",".join(host.rpartition(":")[0] for host in hosts))
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    keras.distribution.initialize()


@contextlib.contextmanager
def silence_output():
    """Send stderr nowhere while libraries in C++ introduce themselves.

    stdout stays, since another thread may print a line that a program reads. Only with several
    processes it is silenced too: their libraries print there when they connect.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    kept = {fd: os.dup(fd) for fd in ((1, 2) if CHILD in os.environ else (2,))}
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for fd in kept:
        os.dup2(nowhere, fd)
    try:
        yield
    finally:
        for fd, copy in kept.items():
            os.dup2(copy, fd)
            os.close(copy)
        os.close(nowhere)


def build_network(class_count, side, use="learned", number_format="float32"):
    """Build the backbone with a new top: a softmax layer that reads several levels of it at once.

    The levels are the feature maps of some blocks, mean-pooled whole or in cells; beside them come
    the hidden units that training teaches. All are multiplied with one number, see `add_sharpness`.
    Weights are random. Takes RGB pixels 0..255 of shape (batch, side, side, 3), scales them itself,
    and gives float32 probabilities of shape (batch, class_count). use: a key of BASE.levels.
    number_format: a Keras dtype policy.
    """
    keras = import_keras()
    layers = keras.layers
    keras.config.set_dtype_policy(number_format)  # applications take no dtype argument
    try:
        pixels = keras.Input((side, side, 3), name="pixels")
        scaled = layers.Rescaling(BASE.scale, offset=BASE.offset, name="scaled")(pixels)
        builder = getattr(keras.applications, BASE.builder)
        backbone = builder(weights=None, include_top=False, input_tensor=scaled)
        table = BASE.levels[use].items()
        pooled = [pool(backbone.get_layer(block), count) for block, count in table]
        levels = layers.Concatenate(name="levels", dtype="float32")(pooled)
        hidden = layers.Dense(HIDDEN, activation="relu", name="hidden")(pooled[-1])
        keras.config.set_dtype_policy("float32")
        sharpness = add_sharpness(levels)
        sharp = layers.Multiply()([layers.Concatenate()([levels, hidden]), sharpness])
        units = layers.Concatenate(name="units")([sharp, sharpness])  # the last is for the bias
        softmax = layers.Dense(class_count, "softmax", use_bias=False, name="probabilities")
        return keras.Model(pixels, softmax(units))
    finally:
        keras.config.set_dtype_policy("float32")


def add_sharpness(levels):
    """Return exp(typical variance - variance) of a batch of levels, (batch, 1).

    The predictive variance is told by standardised levels and by how much of these lies along the
    principal components: see readout.Variance.
    """
    layers = import_keras().layers
    standard = layers.BatchNormalization(epsilon=0, center=False, name="standardised")(levels)
    seen = layers.Dense(readout.COMPONENTS, name="components")(standard)
    squares = [layers.Dot(axes=1)([units, units]) for units in (standard, seen)]
    variance = layers.Subtract(name="variance")(squares)
    return layers.Dense(1, activation="exponential", name="sharpness")(variance)


def set_readout(network, kernel, bias, variance):
    """Give the layers behind the levels of a network the numbers of a readout.

    kernel, bias: of the logits, temperature folded in. variance: a readout.Variance.
    """
    numbers = [
        [np.vstack([kernel, bias])],
        [variance.gain, variance.mean, np.ones_like(variance.mean)],
        [variance.kernel, variance.bias],
        # the variance is 1 more than what the layer `variance` gives
        [np.array([[-1.0]]), np.array([variance.typical - 1])],
    ]
    for name, arrays in zip(READOUT, numbers):
        network.get_layer(name).set_weights(arrays)


def pool(layer, count):
    """Return the means of a layer's feature map in count x count cells, flat."""
    layers = import_keras().layers
    name = f"{layer.name}_level"
    if count == 1:
        return layers.GlobalAveragePooling2D(name=name)(layer.output)
    cell = -(-layer.output.shape[1] // count)
    cells = layers.AveragePooling2D(cell, padding="same", name=f"{name}_pool")(layer.output)
    return layers.Flatten(name=name)(cells)


def list_levels(network, use):
    """Return the parts of the layer `levels` of a network built for a use, in order, as [Level]."""
    levels = []
    start = 0
    for block in BASE.levels[use]:
        stop = start + network.get_layer(f"{block}_level").output.shape[1]
        levels.append(Level(block, slice(start, stop)))
        start = stop
    return levels


def describe(use):
    """Return as text what features of a use depend on, for models and kept caches of it."""
    return f"{BASE.builder}, scale {BASE.scale}, offset {BASE.offset}, {BASE.levels[use]}"


def backbone_of(network):
    """Return the part of a network that weights without a top belong to, a Keras model."""
    scaled, last = network.get_layer("scaled"), network.get_layer(BASE.blocks[-1])
    return import_keras().Model(scaled.output, last.output)


def frozen_part(network, cut):
    """Return the frozen part, folded and compiled: pixels → one flat row a picture, float32.

    The row holds the levels, and the feature map at the layer `cut`, if any.
    """
    keras = import_keras()
    row = network.get_layer("levels").output
    if cut:
        flat = keras.layers.Flatten(dtype="float32")(network.get_layer(cut).output)
        row = keras.layers.Concatenate(dtype="float32")([row, flat])
    return fold_normalisation(keras.Model(network.input, row))


def build_head(units, class_count):
    """Return the new dense layers alone: top level (batch, units) → probabilities."""
    keras = import_keras()
    hidden = keras.layers.Dense(HIDDEN, activation="relu", name="hidden")
    softmax = keras.layers.Dense(class_count, "softmax", name="trained")
    return keras.Sequential([keras.Input((units,)), hidden, softmax])


def trainable_part(network, cut):
    """Return what is trained above a layer, as Keras models that share layers with `network`.

    cut: name of the last frozen layer, None for none. Gives (output of the cut → probabilities, by
    a softmax layer `trained` that sees the hidden units only; output of the cut → hidden units).
    momentum: of batch normalisation where that is trained; None freezes it.
    """
    keras = import_keras()
    softmax = keras.layers.Dense(network.output.shape[-1], "softmax", name="trained")
    hidden = network.get_layer("hidden").output
    start = network.get_layer(cut).output if cut else network.input
    top = keras.Model(start, softmax(hidden))
    for layer in top.layers:
        if isinstance(layer, keras.layers.BatchNormalization):
            layer.trainable = cut is None  # frozen ones also keep their moving averages
            layer.momentum = MOMENTUM
    return top, compiled(keras.Model(start, hidden))


def fold_normalisation(network):
    """Return a compiled copy of a Keras model whose convolutions do the batch normalisation, too.

    The same function, an eighth faster: w * x becomes (w / s) * x + (beta - gamma * mean / s), with
    s the square root of variance + epsilon. Normalisations that are not right behind a plain
    convolution, or not alone there, stay as they are.
    """
    keras = import_keras()
    inputs = keras.tree.flatten([layer.input for layer in network.layers] + network.outputs)
    uses = collections.Counter(map(id, inputs))
    plain = {  # convolutions that only multiply
        id(layer.output): layer.name
        for layer in network.layers
        if type(layer) is keras.layers.Conv2D
        and uses[id(layer.output)] == 1
        and not layer.use_bias
        and layer.activation is keras.activations.linear
    }
    norms = {  # {name of a convolution: the normalisation behind it}
        plain[id(layer.input)]: layer
        for layer in network.layers
        if isinstance(layer, keras.layers.BatchNormalization) and id(layer.input) in plain
    }
    folded_away = {norm.name for norm in norms.values()}

    def with_bias(layer):
        more = {"use_bias": True, "kernel_initializer": "zeros"} if layer.name in norms else {}
        return type(layer).from_config(layer.get_config() | more)

    def skip(layer, inputs, **more):
        return inputs if layer.name in folded_away else layer(inputs, **more)

    folded = keras.models.clone_model(network, clone_function=with_bias, call_function=skip)
    for layer in folded.layers:
        if layer.weights:
            weights = network.get_layer(layer.name).get_weights()
            if layer.name in norms:
                weights = fold(*weights, norms[layer.name])
            layer.set_weights(weights)
    return compiled(folded)


def fold(kernel, norm):
    """Return the kernel and bias of a convolution that does a batch normalisation, too."""
    scale = np.sqrt(np.asarray(norm.moving_variance) + norm.epsilon)
    if norm.scale:
        scale = scale / np.asarray(norm.gamma)
    offset = np.asarray(norm.beta) if norm.center else 0
    return kernel / scale, offset - np.asarray(norm.moving_mean) / scale


def compiled(model, **settings):
    """Compile a Keras model. XLA only with JAX, which always uses it; it slows TensorFlow down."""
    model.compile(jit_compile=import_keras().config.backend() == "jax", **settings)
    return model


def predict(model, rows, batch_size):
    """Predict in batches of one size, the last one filled up, so that one graph serves all.

    rows: array (n, …), may be a memory map. Returns (n, …). It waits for each batch: call it in
    threads.
    """
    parts = []
    for start in range(0, len(rows), batch_size):
        part = rows[start : start + batch_size]
        filled = np.resize(part, (batch_size, *part.shape[1:]))
        parts.append(np.asarray(predict_batch(model, filled))[: len(part)])
    return np.concatenate(parts)


def predict_batch(model, batch):
    """Return what `model.predict_on_batch` gives, in JAX as an array of the device.

    Threads may call it at once. In JAX, Keras's own waits for the device and writes every variable.
    """
    if import_keras().config.backend() != "jax":
        return model.predict_on_batch(batch)
    with JITTING:
        variables, compute = jitted(model)
    trained, others = ([variable.value for variable in some] for some in variables)
    return compute(trained, others, batch)


@functools.cache
def jitted(model):
    """Return (trainable variables, others) of a Keras model, and what JAX compiles of it.

    That is a function: (values of the ones, of the others, batch) → prediction. Keras takes a
    millisecond to list the variables.
    """
    import jax

    variables = model.trainable_variables, model.non_trainable_variables
    return variables, jax.jit(lambda *numbers: model.stateless_call(*numbers, training=False)[0])


# ---------------------------------------------------------------- the model's three files


def prefix_of(text):
    """Return the prefix of a model, of which somebody may have typed one of the files."""
    return re.sub(r"(?<=[^/\\])(\.h5|(-labels)?\.json)$", "", text)


def model_paths(prefix):
    """Return the paths of the model's three files: weights and all, architecture, labels."""
    return Path(f"{prefix}.h5"), Path(f"{prefix}.json"), Path(f"{prefix}-labels.json")


def save_model(network, info, prefix):
    """Save a Keras model as three files; the rename of the `.h5`, the last, is the commit.

    info: what else must travel with the model, plain data with at least `labels`, `image_size` and
    `round`. It becomes JSON in an attribute of the `.h5`, with the SHA-256 of the other two files.
    """
    import h5py

    weights, architecture, labels = model_paths(prefix)
    texts = [network.to_json().encode(), json.dumps(info["labels"]).encode()]
    sums = {"sha256": checksums(*texts), "arrays_sha256": array_checksum(network)}
    metadata = json.dumps(info | sums)
    with utils.atomic_write(weights) as part:
        try:
            network.save(part)
            with h5py.File(part, "a") as file:
                file.attrs[METADATA_ATTRIBUTE] = metadata
        except (OSError, RuntimeError, ValueError) as error:  # HDF5 wraps what the system said
            reason = f"cannot be written ({utils.first_line(error)})"
            raise utils.UserError(
                f"{utils.escape(weights)}: {reason}: free some space, then --resume"
            ) from None
        for path, text in zip((architecture, labels), texts):
            with utils.atomic_write(path) as other_part:
                other_part.write_bytes(text)


def checksums(architecture, labels):
    """Return the SHA-256 of the bytes of the two files that belong to a `.h5`."""
    texts = {"json": architecture, "labels": labels}
    return {name: hashlib.sha256(text).hexdigest() for name, text in texts.items()}


def array_checksum(network):
    """Return the SHA-256 of all weights of a Keras model."""
    whole = hashlib.sha256()
    for array in network.get_weights():
        whole.update(np.ascontiguousarray(array))
    return whole.hexdigest()


def looks_at_faces(info):
    """Say whether a model was trained on crops of faces, as far as its info tells."""
    return info["face_crops"] >= MIN_FACE_CROPS


def may_replace_model(prefix):
    """Say whether a model of this prefix may be replaced: there is none, or this kit wrote it."""
    weights, architecture, _ = model_paths(prefix)
    try:
        if os.path.lexists(weights):
            return read_metadata(weights) is not None
        # a kill between the renames of a first save leaves it without a model.h5
        return not os.path.lexists(architecture) or OUR_INPUT in read_text(architecture)
    except (OSError, utils.UserError):
        return False


def versions():
    """Return the versions of what made a model."""
    from importlib.metadata import version

    found = {"python": sys.version.split()[0]}
    found |= {name: version(name) for name in ("keras", "numpy", "pillow")}
    backend = import_keras().config.backend()
    return found | {backend: sys.modules[backend].__version__}


def load_model(prefix, network=None):
    """Load a model of ours: returns (compiled Keras model, info), info as given to `save_model`.

    The network is built here: no class that a file names is ever looked up, and of the `.h5` only
    the arrays that the network wants are read. Raises UserError for anything that is not whole.
    network: one that was built for this model before and is filled now; building takes seconds.
    """
    info = check_model(prefix)
    if network is None:
        network = build_network(len(info["labels"]), info["image_size"], info["levels"])
    weights = model_paths(prefix)[0]
    load_arrays(network, weights)
    if info.get("arrays_sha256") != array_checksum(network):
        raise utils.UserError(f"{utils.escape(weights)}: damaged: copy it again")
    return compiled(network), info


def read_info(prefix):
    """Return what travels with a model, or None if there is none that is whole."""
    try:
        return check_model(prefix)
    except utils.UserError:
        return None


def check_model(prefix):
    """Check all of a model's three files but the arrays, without TensorFlow. Returns its info.

    Raises UserError for what is missing or damaged, and for files that do not belong together.
    """
    paths = weights, architecture, labels_path = model_paths(prefix)
    missing = [path.name for path in paths if not os.path.lexists(path)]
    if 0 < len(missing) < len(paths):
        names = utils.escape(" and ".join(missing))
        there = next(path for path in paths if os.path.lexists(path))
        raise utils.UserError(
            f"{utils.escape(there)}: {names} missing beside it: copy all three files of a model"
        )
    if missing and Path(prefix).is_dir():
        name = utils.escape(Path(prefix))
        raise utils.UserError(f"{name}: is a folder: give the prefix of a model, {name}/model say")
    texts = read_text(architecture), read_text(labels_path)
    info = check_info(read_metadata(weights), weights)
    if info["labels"] != parse_json(labels_path, texts[1]):
        raise utils.UserError(
            f"{utils.escape(labels_path)}: not the class names that {utils.escape(weights.name)} "
            "was trained on: copy all three files of one training again"
        )
    if info.get("sha256") != checksums(*texts):
        raise utils.UserError(
            f"{utils.escape(weights)}: does not belong to the .json and -labels.json beside it: "
            "copy all three files of one training again, or finish that run with --resume"
        )
    return info


def check_info(info, path):
    """Return the plain data that travels with a model if we may have written it.

    What may be missing gets a default. Raises UserError.
    """
    if info is None:
        raise utils.UserError(f"{utils.escape(path)}: not saved by this kit: train a model with it")
    if isinstance(info, dict) and are_labels(info.get("labels")):
        info = {"threshold": 0.5, "levels": "learned", "face_crops": 1.0} | info
        ranges = (("image_size", MIN_SIDE, MAX_SIDE), ("round", 0, 999))
        whole = all(type(info.get(key)) is int and a <= info[key] <= b for key, a, b in ranges)
        shares = info["threshold"], info["face_crops"]
        known = type(info["levels"]) is str and info["levels"] in BASE.levels
        if whole and known and all(type(s) in (int, float) and 0 <= s <= 1 for s in shares):
            check_base(info, path)
            return info
    raise utils.UserError(
        f"{utils.escape(path)}: what belongs to the model is damaged in it: train again"
    )


def check_base(info, path):
    """Raise UserError if a model reads other features than this kit has for its use."""
    now = describe(info["levels"])
    base = info.get("base", now)
    if base != now:
        problem = f"of another network ({utils.escape(base)[:100]})"
        remedy = "use it with the kit that saved it, or train again"
        raise utils.UserError(f"{utils.escape(path)}: {problem}: {remedy}")


def are_labels(labels):
    """Say whether these are class names, fit to become folder names and terminal text."""
    if not isinstance(labels, list) or not 2 <= len(labels) <= MAX_CLASSES:
        return False
    good = (isinstance(name, str) and 0 < len(name) <= MAX_LABEL for name in labels)
    return (
        all(good) and len(set(labels)) == len(labels) and list(map(utils.escape, labels)) == labels
    )


def check_file(path, limit=MAX_WEIGHTS):
    """Raise UserError unless there is a file, not larger than `limit` bytes, and no link to one."""
    if path.is_symlink():
        problem = "is a link: copy the file itself here"
    elif not path.exists():
        problem = "no such file: check the name"
    elif not path.is_file():  # a named pipe would wait for ever
        problem = "is no file: remove it"
    elif path.stat().st_size > limit:
        problem = f"larger than {limit:,} bytes, as no such file is: use another one"
    else:
        return
    raise utils.UserError(f"{utils.escape(path)}: {problem}")


def read_text(path):
    """Return the bytes of a JSON file that `check_file` lets pass."""
    check_file(path, MAX_JSON)
    return path.read_bytes()


def parse_json(path, text):
    """Return the plain data in JSON. Raises UserError for all else, endless nesting included."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError, TypeError):
        raise utils.UserError(
            f"{utils.escape(path)}: damaged, not JSON: copy it again or train again"
        ) from None


# ---------------------------------------------------------------- reading HDF5


@contextlib.contextmanager
def open_hdf5(path):
    """Open an HDF5 file to read; what it holds, and cannot be used, becomes a UserError."""
    import h5py

    check_file(path)
    try:
        data = path.read_bytes()
        check_names(data)
        check_texts(data)
        del data  # a tenth of a gigabyte
        with h5py.File(path, "r") as file:
            yield file
    except (OSError, RuntimeError, KeyError, ValueError, TypeError, zlib.error) as error:
        reason = f"damaged, not HDF5, or of another network ({utils.first_line(error)})"
        remedy = "use another file, or train a model of an older kit again"
        raise utils.UserError(f"{utils.escape(path)}: {reason}: {remedy}") from None


def read_metadata(path):
    """Return what `save_model` has put into a `.h5` beside the weights, None if nothing."""
    with open_hdf5(path) as file:
        if METADATA_ATTRIBUTE not in file.attrs:
            return None
        attribute = file.attrs.get_id(METADATA_ATTRIBUTE)
        # a list of texts, or one of fixed size, may fill the memory when it is read
        is_one = attribute.shape == () and attribute.get_storage_size() <= MAX_JSON
        text = file.attrs[METADATA_ATTRIBUTE] if is_one else ""
    return parse_json(path, text)


def check_names(data):
    """Raise ValueError for heaps of names, in the bytes of an HDF5 file, that would do harm.

    HDF5 follows a list of free places that is a circle until the memory is full, and crashes where
    two heaps keep their names in one place.
    """
    starts = set()
    for heap in re.finditer(NAME_HEAP, data):
        gap, start = struct.unpack("<QQ", data[heap.start() + 16 : heap.start() + 32].ljust(16))
        if start in starts:
            raise ValueError("names of two groups in one place")
        starts.add(start)
        seen = set()
        while gap != NO_GAP and start + gap + 8 <= len(data):
            if gap in seen:
                raise ValueError("names that lead in a circle")
            seen.add(gap)
            (gap,) = struct.unpack_from("<Q", data, start + gap)


def check_texts(data):
    """Raise ValueError if a text in the bytes of an HDF5 file is too long, or makes a circle."""
    for heap in re.finditer(TEXT_HEAP, data):
        place = heap.start() + 16
        end = heap.start() + int.from_bytes(data[place - 8 : place], "little")
        # header and text, by turns; index 0: free. HDF5 itself refuses what ends too late
        while place + 16 <= end <= len(data):
            index, size = struct.unpack_from("<H6xQ", data, place)
            if index == 0 and place + size == end:
                break
            if index == 0 or size > min(MAX_JSON, end - place):
                raise ValueError("a text longer than a model has")
            place += 16 + math.ceil(size / 8) * 8


def load_arrays(network, path):
    """Give the layers of a Keras model their numbers from a file of weights.

    path: a whole model or weights alone in Keras's legacy HDF5 format, or a `.weights.h5`. Read are
    the arrays that the layers have, by name and shape, and nothing else that the file may hold.
    Raises UserError if one is missing, of another shape or kind, or not finite.
    """
    with open_hdf5(path) as file:
        for layer, group in match_layers(network, file):
            layer.set_weights(
                [read_array(group, weight, n) for n, weight in enumerate(layer.weights)]
            )


def match_layers(network, file):
    """Return pairs (layer that has weights, HDF5 group of its arrays), matched kind by kind.

    A legacy file names its groups as the layers were named, numbered as they were made; the first
    convolution is `conv2d_94` if it was the second network of its process. A `.weights.h5` names
    them by class, numbered in the order of `network.layers`.
    """
    root = child(file, "model_weights") or child(file, "layers") or file
    is_new = root.name == "/layers"
    layers = {
        f"{snake_case(type(layer).__name__)}_{place}" if is_new else layer.name: layer
        for place, layer in enumerate(network.layers)
        if layer.weights
    }
    groups = names_by_kind(root)
    pairs = []
    for kind, wanted in names_by_kind(layers).items():
        if len(groups[kind]) != len(wanted):
            raise ValueError(f"{len(groups[kind])} layers of kind {kind}, not {len(wanted)}")
        for layer, group in zip(wanted, groups[kind]):
            pairs.append((layers[layer], child(root, group, "vars" if is_new else group)))
    return pairs


def names_by_kind(names):
    """Return {kind: names of layers in the order of their numbers}."""
    kinds = collections.defaultdict(list)
    for name in sorted(names, key=lambda name: split_name(name)[1]):
        kinds[split_name(name)[0]].append(name)
    return kinds


def split_name(name):
    """Split a layer's name, `conv2d_7` say, into its kind and number; the first has none: 0."""
    kind, number = re.fullmatch(r"(.*?)(?:_(\d{1,9}))?", name, re.DOTALL).groups()
    return kind, int(number or 0)


def snake_case(name):
    """Return the name that Keras makes of a class: `batch_normalization`, say."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower()


def child(group, *names):
    """Return what lies in an HDF5 group under a path, None if nothing does.

    Links to other places, in this file or another, are not followed.
    """
    import h5py

    for name in names:
        if not isinstance(group, h5py.Group) or name not in group:
            return None
        if not isinstance(group.get(name, getlink=True), h5py.HardLink):
            raise ValueError("links to other data")
        group = group[name]
    return group


def read_array(group, weight, index):
    """Return the numbers of a Keras variable, the `index`-th of its layer, as float32.

    Raises ValueError unless the HDF5 group holds them as finite floats of just that shape.
    """
    import h5py

    names = weight.name, f"{weight.name}:0", str(index)
    item = next(filter(None, (child(group, name) for name in names)), None)
    shape = tuple(weight.shape)
    if not isinstance(item, h5py.Dataset) or item.shape != shape or item.dtype.kind != "f":
        raise ValueError(f"no floats of shape {shape} for {weight.path}")
    if item.is_virtual or item.external:
        raise ValueError(f"{weight.path} lies in another file")
    if item.chunks:
        check_chunks(item)
    with np.errstate(over="ignore"):  # too large for float32: infinite
        array = item[()].astype("float32")
    if not np.isfinite(array).all():
        raise ValueError(f"{weight.path} holds numbers that are not finite")
    return array


def check_chunks(item):
    """Raise ValueError unless an HDF5 array in chunks unpacks to just what its shape says.

    HDF5 itself unpacks whatever a chunk holds, gigabytes even.
    """
    number = math.prod(item.chunks)
    size = number * item.dtype.itemsize
    filters = item.id.get_create_plist().get_nfilters()
    is_usual = item.compression in (None, "gzip") and item.size / MAX_CHUNKS <= number <= item.size
    if not is_usual or filters != bool(item.compression) + item.shuffle:
        raise ValueError(f"{item.name} is packed in an unusual way")
    chunks = []
    item.id.chunk_iter(chunks.append)
    for chunk in chunks if item.compression else ():
        packed = item.id.read_direct_chunk(chunk.chunk_offset)[1]
        if len(zlib.decompressobj().decompress(packed, size + 1)) > size:
            raise ValueError(f"{item.name} unpacks to more than it is")
