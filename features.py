"""From pictures to what the frozen network makes of them: views, cached in files."""

import contextlib
import functools
import hashlib
import socket
import sys
import timeit
from collections import namedtuple
from pathlib import Path

import numpy as np

import dataset
import model
import processes
import utils

# A new kind of change takes fields here, neutral ones in LIGHT; random numbers, after the others,
# and columns in augmentation_parameters; and code in both augment (on the cores) and
# build_augmentation (on a GPU). Unaugmented and mirrored views have 0 in new columns, which must
# change nothing. Kept caches and --resume see the fields in view_settings.
# rotation: degrees; shift: share of the side; zoom: factors; colour: of 255
Augmentation = namedtuple("Augmentation", "rotation shift zoom colour")
HEAVY = Augmentation(rotation=45, shift=0.25, zoom=[0.5, 1.5], colour=25)
LIGHT = Augmentation(rotation=0, shift=0.125, zoom=[1.0, 1.0], colour=0)

UNAUGMENTED, MIRRORED = 0, 1  # numbers of views
VALIDATION_VIEW = 10**6  # number of the augmented view of validation pictures
# Columns of augmentation_parameters; how many there are, and how many random numbers they need.
MATRIX, COLOUR = slice(0, 6), slice(6, 9)
PARAMETERS, CHANCES = 9, 9

LARGE_SET = 3_000  # pictures that train: of more, levels are read without cells and mirror images
INFERENCE_BATCH = 16  # pictures; 64 is no faster on a CPU, and wastes more of a last batch
DEVICE_BATCH = 256  # the same on a GPU, for pictures of up to 224 pixels; fewer of larger ones
CACHE_VERSION = 5  # raise it when code alone, not a setting, makes other features or views
WORTH_ROUNDING = 1.3  # bfloat16 has to be this much faster to be worth its rounding
DOWNLOAD_SECONDS = 15

View = namedtuple("View", "rows row_of")  # structured array; {picture: row} as an int array
# base: float32, never trained; exact, fast: compiled frozen parts of it, see model.frozen_part
# cut: last frozen layer, None from scratch; use: key of model.BASE.levels; levels: of the base;
# augment: None on the cores; weights: their fingerprint
Networks = namedtuple(
    "Networks",
    "base exact fast cut use levels map_shape augment batch number_format weights "
    "distribution_scope",
)


# ---------------------------------------------------------------- the frozen network


def find_weights(args):
    """Return (path of notop weights, None for from scratch; warnings to repeat at the end)."""
    if args.weights == "none":
        return None, []
    if args.weights not in ("auto", "imagenet"):
        if not args.weights.endswith((".h5", ".hdf5")):
            name = utils.escape(args.weights)
            raise utils.UserError(f"--weights {name}: give a file whose name ends in .h5")
        model.check_file(Path(args.weights))
        return Path(args.weights), []
    keras = model.import_keras()
    address = model.BASE.address
    name = address.rpartition("/")[2]
    try:
        return download(keras, name), []
    except Exception as error:  # urllib, ssl, sockets and Keras each raise their own
        reason = utils.escape(error)[:200]
        if sys.stderr.isatty():
            print(file=sys.stderr)  # Keras's bar has no end of line
    if args.weights == "imagenet":
        raise utils.UserError(
            f"--weights imagenet: cannot be downloaded ({reason}): get {address} by hand "
            f"and give it with --weights {name}"
        )
    return None, [
        f"the ImageNet weights cannot be had ({reason})",
        "training starts from scratch: expect far lower accuracy unless there are many pictures",
        f"to have them, download {address}",
        f"on any machine and run again with --weights {name}",
    ]


def download(keras, name):
    """Return the path of Keras's own ImageNet weights. Raises whatever goes wrong."""
    if not sys.stderr.isatty():
        keras.config.disable_interactive_logging()  # no bar in colours in a log
    socket.setdefaulttimeout(DOWNLOAD_SECONDS)
    try:
        with contextlib.redirect_stdout(sys.stderr):  # Keras's own progress bar
            settings = {"cache_subdir": "models", "file_hash": model.BASE.md5}
            return Path(keras.utils.get_file(name, model.BASE.address, **settings))
    finally:
        socket.setdefaulttimeout(None)


def weights_fingerprint(path):
    """Return what tells one file of weights from another; path: None for from scratch."""
    if path is None:
        return "none"
    return f"{path.name}, SHA-256 {hashlib.sha256(path.read_bytes()).hexdigest()}"


@functools.cache
def list_devices():
    """Return the names of the devices that train as one: JAX's of all processes, else one."""
    keras = model.import_keras()
    return keras.distribution.list_devices() if keras.config.backend() == "jax" else ["cpu"]


def on_device():
    """Say whether JAX computes on something faster than the cores, a GPU say."""
    return not list_devices()[0].startswith("cpu")


def distribution_scope():
    """Return what gives the scope in which all devices train as one."""
    if len(list_devices()) == 1:
        return contextlib.nullcontext
    return model.import_keras().distribution.DataParallel(auto_shard_dataset=False).scope


def inference_batch(side):
    """Return how many pictures of a side in pixels are predicted at once: a power of two."""
    fitting = DEVICE_BATCH * min(1, 224 / side) ** 2
    return 1 << int(np.log2(max(INFERENCE_BATCH, fitting))) if on_device() else INFERENCE_BATCH


def fastest_format(args):
    """Return the Keras dtype policy of the frozen pass: mixed_bfloat16 where a trial is faster.

    The median of five alternating timings of a convolution decides. A processor without such
    instructions is slower or raises: then it is float32.
    """
    keras = model.import_keras()
    if args.float32:
        return "float32"
    batch = np.zeros((8, 28, 28, 192), "float32")
    layers = [keras.layers.Conv2D(192, 3, dtype=name) for name in ("float32", "mixed_bfloat16")]
    trials = [lambda layer=layer: keras.ops.convert_to_numpy(layer(batch)) for layer in layers]
    try:
        for trial in trials:
            trial()  # the first call builds
        times = [[timeit.timeit(trial, number=1) for trial in trials] for _ in range(5)]
    except Exception:  # libraries differ in what they raise if the processor lacks it
        return "float32"
    exact, rounded = np.median(times, axis=0)
    return "mixed_bfloat16" if exact / rounded >= WORTH_ROUNDING else "float32"


def choose_format(args, number_format):
    """Settle on the number format of the frozen pass, if it is None."""
    with model.silence_output():  # under JAX, a first layer imports a chatting TensorFlow
        model.import_keras().layers.Identity().get_config()
    number_format = number_format or processes.from_first(args, lambda: fastest_format(args))
    utils.print_line(f"number format: {number_format}")
    return number_format


def is_large(data):
    """Say whether a set trains on so many pictures that less of each is read."""
    return len(data.train) > LARGE_SET


def build_networks(args, path, data, recipe, number_format):
    """Build the network as it is, and its frozen part. Returns Networks.

    path: notop weights, or None for from scratch. number_format: a Keras dtype policy, or None to
    find out. What is frozen runs on the first device of each process.
    """
    keras = model.import_keras()
    number_format = choose_format(args, number_format)
    keras.utils.clear_session()  # layer names enter the seeds
    keras.utils.set_random_seed(args.seed)
    side, class_count = data.pixels.rows.shape[1], len(data.labels)
    use, cut = "random", None
    if path is not None:
        use = "large set" if is_large(data) else "learned"
        cut = model.BASE.blocks[-1 - args.unfreeze]  # last frozen layer
    base = model.build_network(class_count, side, use)
    if path is not None:
        model.load_arrays(model.backbone_of(base), path)
    mapped = cut if recipe["rounds"] else None  # the layer whose feature map is kept
    exact = fast = model.frozen_part(base, mapped)
    if number_format != "float32":
        rounded = model.build_network(class_count, side, use, number_format)
        rounded.set_weights(base.get_weights())
        fast = model.frozen_part(rounded, mapped)
    return Networks(
        base=base,
        exact=exact,
        fast=fast,
        cut=cut,
        use=use,
        levels=model.list_levels(base, use),
        map_shape=(base.get_layer(cut).output if cut else base.input).shape[1:],
        augment=build_augmentation(side) if on_device() else None,
        batch=inference_batch(side),
        number_format=number_format,
        weights=weights_fingerprint(path),
        distribution_scope=distribution_scope(),
    )


# ---------------------------------------------------------------- pictures → views


def augmentation_of(args):
    """Return the Augmentation that was asked for."""
    return HEAVY if args.heavy_augmentation else LIGHT


def augmentation_parameters(args, side, digests, view):
    """Return how one view of pictures with these digests differs from them: (n, PARAMETERS).

    MATRIX: from a view's coordinates (x, y, 1) in pixels to those of its picture, row by row;
    COLOUR: what is added to R, G and B, of 255. The random numbers are a hash of (seed, view,
    picture), of which a longer one begins like a shorter one.
    """
    parameters = np.zeros((len(digests), PARAMETERS))
    if view in (UNAUGMENTED, MIRRORED):
        identity, mirror = (1, 0, 0, 0, 1, 0), (-1, 0, side - 1, 0, 1, 0)
        parameters[:, MATRIX] = identity if view == UNAUGMENTED else mirror
        return parameters
    kind = augmentation_of(args)
    keys = (f"{args.seed} {view} ".encode() + digest for digest in digests)
    hashes = b"".join(hashlib.shake_128(key).digest(8 * CHANCES) for key in keys)
    chance = np.frombuffer(hashes, "<u8").reshape(-1, CHANCES) / 2**64  # 0 to 1
    strength = np.sqrt(chance[:, 0])
    angle = np.deg2rad(kind.rotation) * (2 * chance[:, 1] - 1) * strength
    low, high = np.log(kind.zoom)
    zoom = np.exp((low + (high - low) * chance[:, 2]) * strength)
    flip = np.where(chance[:, 3] < 0.5, 1, -1)
    center = (side - 1) / 2
    shift = kind.shift * side * (2 * chance[:, 4:6] - 1) * strength[:, None]
    cos, sin = np.cos(angle) / zoom, np.sin(angle) / zoom
    turn = np.array([[cos * flip, -sin], [sin * flip, cos]]).transpose(2, 0, 1)
    offset = center - turn @ (center + shift)[:, :, None]
    parameters[:, MATRIX] = np.concatenate([turn, offset], axis=2).reshape(-1, 6)
    parameters[:, COLOUR] = kind.colour * (2 * chance[:, 6:9] - 1) * strength[:, None]
    return parameters


def view_settings(args):
    """Return the settings that views are made with, plain data for the cache and --resume."""
    return [CACHE_VERSION, args.seed, *augmentation_of(args)]


def augment(picture, parameters):
    """Return a turned, shifted, zoomed, tinted and maybe flipped copy of uint8 (side, side, 3).

    parameters: a row of `augmentation_parameters`.
    """
    import cv2

    size = picture.shape[1::-1]
    matrix = parameters[MATRIX].reshape(2, 3)
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    view = cv2.warpAffine(picture, matrix, size, flags=flags, borderMode=cv2.BORDER_REFLECT)
    colour = parameters[COLOUR]
    return cv2.add(view, (*colour, 0)) if colour.any() else view


def build_augmentation(side):
    """Return a Keras model that does what `augment` does: [pictures, parameters] → views."""
    keras = model.import_keras()
    ops = keras.ops
    pictures, parameters = keras.Input((side, side, 3), dtype="uint8"), keras.Input((PARAMETERS,))
    matrix = ops.pad(parameters[:, MATRIX], ((0, 0), (0, 2)))
    moved = ops.cast(pictures, "float32")
    views = ops.image.affine_transform(moved, matrix, "bilinear", "reflect")
    views = ops.round(ops.clip(views + parameters[:, None, None, COLOUR], 0, 255))
    return model.compiled(keras.Model([pictures, parameters], ops.cast(views, "uint8")))


def make_views(run, indices, view):
    """Return one view of pictures, uint8 (n, side, side, 3): an array of the device, if any."""
    networks, rows = run.networks, run.data.pixels.rows
    pictures = [run.data.pictures[i] for i in indices]
    places = [picture.row for picture in pictures]
    digests = [picture.digest for picture in pictures]
    parameters = augmentation_parameters(run.args, rows.shape[1], digests, view)
    if networks.augment is None:
        if view == UNAUGMENTED:
            return rows[places]
        return np.stack([augment(rows[place], p) for place, p in zip(places, parameters)])
    size = networks.batch
    filled = [rows[np.resize(places, size)], np.resize(parameters, (size, PARAMETERS))]
    return model.predict_batch(networks.augment, filled)[: len(indices)]


# ---------------------------------------------------------------- views → cached features


def list_views(run, round_number):
    """Return the numbers of the views that a round trains on, of which the cache holds the latest.

    A picture as it is, its mirror image, and then random ones; from scratch, where a view costs
    next to nothing, fresh ones each round.
    """
    recipe = run.recipe
    last = recipe["views"] + (round_number - 1) * recipe["fresh"]
    room = views_that_fit(run)
    views = list(range(last + 1))
    return views if len(views) <= room else views[:1] + views[len(views) - room + 1 :]


def row_type(run, has_levels):
    """Return the dtype of a row of a view's file.

    Its fields: digest; exact, whether the rest is of the float32 network; levels; map, at the cut.
    """
    networks, recipe = run.networks, run.recipe
    fields = [("digest", "V32"), ("exact", "?")]
    if has_levels:
        fields.append(("levels", "float32", (networks.levels[-1].units.stop,)))
    if recipe["rounds"]:
        kind = "float32" if run.args.float32 else "float16"
        fields.append(("map", "uint8" if networks.cut is None else kind, networks.map_shape))
    return np.dtype(fields)


def views_that_fit(run):
    """Return how many views of the training pictures --cache-gb has room for.

    Raises UserError if not even the pictures and one view fit.
    """
    args, data = run.args, run.data
    view = row_type(run, True).itemsize * len(data.local)
    fixed = data.pixels.rows.nbytes // args.processes
    fixed += 2 * row_type(run, True).itemsize * len(data.validation)
    fitting = int((args.cache_gb * 1e9 - fixed) // view)
    if fitting < 1:
        raise utils.UserError(
            f"--cache-gb {args.cache_gb:g}: the cache needs {(fixed + view) * 1.06 / 1e9:.2g} GB "
            "at least: give more, and with --cache-dir a folder on a disk that has it"
        )
    return fitting


def get_view(run, view):
    """Return a View, computed if this run has not done so.

    The unaugmented one has all pictures of this process, and on the first one, which scores, all of
    validation; others have pictures of one side. Only those that the readout reads have levels.
    """
    if view not in run.views:
        data = run.data
        indices = data.validation if view == VALIDATION_VIEW else data.local
        if view == UNAUGMENTED and run.args.process == 0:
            indices = np.union1d(indices, data.validation)
        run.views[view] = compute_view(run, view, indices)
    return run.views[view]


def compute_view(run, view, indices):
    """Run one view of some pictures through the frozen part, but for what a kept cache holds."""
    args, data = run.args, run.data
    has_levels = view in (UNAUGMENTED, MIRRORED)
    dtype = row_type(run, has_levels)
    row_of = np.full(len(data.pictures), -1)
    row_of[indices] = np.arange(len(indices))
    if not args.cache_dir:
        array = dataset.temporary_array(args, (len(indices),), dtype)
        fill_view(run, view, array, indices, np.arange(len(indices)))
        return View(array.rows, row_of)
    path = args.cache_dir / f"{cache_name(run, view)}-{view}.features"
    with utils.atomic_write(path) as part, open(part, "r+b", buffering=0) as file:
        array = dataset.map_array(file, path, (len(indices),), dtype)
        missing = copy_known_rows(data, view, path, array, indices)
        fill_view(run, view, array, indices, missing)
        del array
    return View(np.memmap(path, dtype, "r", shape=(len(indices),)), row_of)


def copy_known_rows(data, view, path, array, indices):
    """Copy what an earlier file of a view holds into a new one. Returns the rows still missing."""
    dtype = array.rows.dtype
    known = {}
    if path.exists() and path.stat().st_size and path.stat().st_size % dtype.itemsize == 0:
        old = np.memmap(path, dtype, "r")
        known = {digest.tobytes(): row for row, digest in enumerate(old["digest"])}
    before = np.array([known.get(data.pictures[i].digest, -1) for i in indices])
    if known and view == UNAUGMENTED:  # what is scored must have gone through the float32 network
        before[np.isin(indices, data.validation) & ~old["exact"][before]] = -1
    for rows in dataset.in_batches(np.flatnonzero(before >= 0), 256):
        dataset.write_rows(array, rows, old[before[rows]])
    return np.flatnonzero(before < 0)


def fill_view(run, view, array, indices, missing):
    """Compute the missing rows of a view's file.

    While the network works on one batch, the next ones are prepared and the last ones written.
    """
    data = run.data
    # what is scored goes through the float32 network
    held = np.isin(indices, data.validation) & (view == UNAUGMENTED)
    parts = (missing[held[missing]], missing[~held[missing]])
    batches = [batch for part in parts for batch in dataset.in_batches(part, run.networks.batch)]

    def compute(batch, pixels):
        """Return the rows of a batch, computed."""
        exact = held[batch[0]]
        values = np.zeros(len(batch), array.rows.dtype)
        digests = b"".join(data.pictures[i].digest for i in indices[batch])
        values["digest"] = np.frombuffer(digests, "V32")
        values["exact"] = exact or run.networks.fast is run.networks.exact
        compute_features(run, values, pixels, exact)
        return values

    # On the cores two at once: while one batch waits for Python, the other keeps them busy.
    workers, at_once = (4, 8) if on_device() else (1, 2)
    views = utils.ordered_parallel_map(
        lambda batch: (batch, make_views(run, indices[batch], view)), batches, workers=workers
    )
    results = utils.ordered_parallel_map(lambda pair: compute(*pair), views, workers=at_once)
    label = {UNAUGMENTED: "pictures", MIRRORED: "mirror images"}.get(view, "augmented views")
    for batch, values in zip(batches, utils.progress(results, len(batches), label)):
        if not is_finite(values):
            rounded = run.recipe["rounds"] and array.rows.dtype["map"].base == "float16"
            why = "not finite: use other weights"
            if rounded:
                why = "too large for 16 bits: use --float32"
            raise utils.UserError(f"--weights: the network's features are {why}")
        dataset.write_rows(array, batch, values)


def compute_features(run, values, pixels, exact):
    """Fill the fields `levels` and `map` of rows (n,) with what the frozen part makes of pixels."""
    networks, fields = run.networks, values.dtype.names
    maps = pixels  # from scratch
    if "levels" in fields or networks.cut:
        network = networks.exact if exact else networks.fast
        flat = model.predict(network, pixels, networks.batch)
        levels, maps_at_cut = np.split(flat, [networks.levels[-1].units.stop], axis=1)
        if networks.cut:
            maps = maps_at_cut.reshape(-1, *networks.map_shape)
        if "levels" in fields:
            values["levels"] = levels
    if "map" in fields:
        with np.errstate(over="ignore"):  # what does not fit is reported by the caller
            values["map"] = np.asarray(maps)


def is_finite(values):
    """Say whether all features in rows (n,) are finite."""
    return all(np.isfinite(values[name]).all() for name in values.dtype.names[2:])


def trim_cache(args):
    """Delete the files of a kept cache that were used longest ago, until --cache-gb is kept."""
    files = [(path, path.stat()) for path in args.cache_dir.glob("[0-9a-f]" * 16 + "-*.features")]
    size = sum(facts.st_size for _, facts in files)
    for path, facts in sorted(files, key=lambda file: file[1].st_mtime):
        if size > args.cache_gb * 1e9:
            with contextlib.suppress(OSError):  # Windows keeps what is in use
                path.unlink()
                size -= facts.st_size


def cache_name(run, view):
    """Return how the name of a view's file begins: other features lie in other files."""
    args, networks = run.args, run.networks
    backend = model.import_keras().config.backend()
    chances = [] if view in (UNAUGMENTED, MIRRORED) else view_settings(args)
    made_from = [CACHE_VERSION, chances, networks.weights, networks.cut or args.seed]
    made_from += [model.describe(networks.use), run.data.pixels.rows.shape[1:]]
    made_from += [networks.number_format, args.float32, backend, on_device(), args.process]
    made_from += [args.processes, bool(run.recipe["rounds"])]
    return hashlib.sha256(repr(made_from).encode()).hexdigest()[:16]


def gather_levels(run, view):
    """Return (levels of a view, float32 (rows, units); {picture: row} as an int array).

    The first process, which fits the readout, gets those of all others, who must call it too.
    """
    args, data = run.args, run.data
    local = get_view(run, view)
    if args.processes == 1:
        return local.rows["levels"], local.row_of
    if view in run.gathered:
        return run.gathered[view]
    mine = np.flatnonzero(local.row_of >= 0)
    width = run.networks.levels[-1].units.stop
    most = max(processes.all_gather(args, len(mine)))
    table = dataset.temporary_array(args, (len(data.pictures), width), "float32")
    for start in range(0, most, INFERENCE_BATCH):
        some = mine[start : start + INFERENCE_BATCH]
        rows = np.zeros((INFERENCE_BATCH, width), "float32")
        rows[: len(some)] = local.rows["levels"][local.row_of[some]]
        numbers = np.r_[some, np.full(INFERENCE_BATCH - len(some), -1)]
        for indices, values in zip(processes.gather_arrays(numbers), processes.gather_arrays(rows)):
            for index, row in zip(indices, values):
                if index >= 0 and args.process == 0:
                    dataset.write_rows(table, [index], row[None])
    run.gathered[view] = table.rows, np.arange(len(data.pictures))
    return run.gathered[view]
