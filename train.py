"""Teach InceptionV3 your own classes from folders of pictures.

    python train.py people model
    python train.py people model --weights none --image-size 75
    python train.py held_out model --evaluate

people/<class>/**/<picture> is read once; the part of the network that stays frozen runs once for each
augmented view, and what it gives is kept; the new top is trained from there. Leaves model.h5, model.json
and model-labels.json, and after every round a confusion matrix made of the pictures: 000.png, 001.png…
"""

import argparse
import contextlib
import datetime
import functools
import glob
import hashlib
import itertools
import json
import os
import shlex
import socket
import subprocess
import sys
import tempfile
import threading
import time
import timeit
import unicodedata
import urllib.request
import zlib
from collections import Counter, OrderedDict, namedtuple
from pathlib import Path

import imaging
import model
import report
import utils  # first: it says which Python and packages are needed

# isort: split
import numpy as np
from PIL import Image

# ---------------------------------------------------------------- settings

heavy_augmentation = True  # False for pictures that all look the way your camera will see them
Augmentation = namedtuple("Augmentation", "rotation shift zoom colour")
HEAVY = Augmentation(
    rotation=45, shift=0.25, zoom=(0.5, 1.5), colour=25
)  # degrees, of the side, factor, of 255
LIGHT = Augmentation(rotation=0, shift=0.125, zoom=(1.0, 1.0), colour=0)

# Tuned on flowers, grey faces and webcam faces at once; benchmarks/README.md has what was tried.
FINE_TUNING = dict(head_epochs=20, rounds=10, round_epochs=3, patience=6, views=1, batch_size=32)
FROM_SCRATCH = dict(head_epochs=10, rounds=5, round_epochs=4, patience=3, views=7, batch_size=32)
# From scratch, small sets get more epochs, to have so many steps, and so many a class: people are told apart late.
# In fine-tuning that made the model too sure of strangers.
LEAST_STEPS = dict(head_epochs=(120, 8), round_epochs=(40, 3))
UNFREEZE = 2  # top inception blocks that are fine-tuned
HEAD_RATE = 1e-3  # learning rate of the new dense layers on their own
ROUND_RATE = 7e-4  # peak for the top blocks; higher jumps about in the first rounds, lower needs more of them
SCRATCH_RATE = 1e-3  # peak for a whole network
WARM_UP = 0.1  # share of the steps in which the rate rises to its peak
WEIGHT_DECAY = 1e-2
LABEL_SMOOTHING = 0.1
RIDGES = dict(
    hidden=0.1, middle=1.0, layout=0.5
)  # of the last layer's fits, in mean variances of a unit
BLENDS = (
    (0.4, 0.4, 0.2),
    (0.5, 0.5, 0),
    (1, 0, 0),
)  # their shares in the answer: the first that is right most often
SCRATCH_BLENDS = (
    (0.3, 0, 0.7),
    (0.5, 0, 0.5),
    (1, 0, 0),
)  # the middle of such a network knows no more than its top
LOGITS = 10  # between right and wrong in that fit, so that the temperature is around 1
NEAR_ONE = 8  # how firmly few validation pictures leave it there: weight of its squared logarithm, in pictures' loss
KEPT = 0.92  # share of rightly named pictures that the threshold lets through; with more, strangers get names too
DOUBT = 12  # the threshold is at most 1 - so many times the mean doubt (1 - probability) of these pictures,
SURE = 0.9  # or this, if that is lower
SCRATCH_MOMENTUM = 0.9  # of batch normalisation: the default 0.99 lags behind on so few steps

PASS_BATCH = 16  # pictures at once through a network; 64 is no faster on a CPU, and wastes more of a last batch
DEVICE_BATCH = 256  # the same on a GPU, for pictures of up to 224 pixels; fewer of larger ones
SMALLEST_RING = 64  # views
FEATURES = (
    3  # what the kept cache holds: raise it when the same settings begin to give other features
)
CACHE_GB = 20.0
MAX_RATIO = 2  # longer side to shorter: beyond it a centre square shows too little
FEW_PICTURES = 20  # a class with fewer is warned about
FEW_VALIDATION = 30
WORTH_ROUNDING = 1.3  # bfloat16 has to be this much faster to be worth its rounding
DOWNLOAD_SECONDS = 15
IMAGENET = (
    "https://storage.googleapis.com/tensorflow/keras-applications/inception_v3/"
    "inception_v3_weights_tf_dim_ordering_tf_kernels_notop.h5"
)
IMAGENET_MD5 = "bcbd6486424b2319ff4ef7d526e38f63"
MOSAICS = "[0-9][0-9][0-9].png"
LOST = "another process of this run has ended or cannot be reached: look there, then start all again with --resume"
MACHINES = (
    "KERAS_DISTRIBUTION_"  # begins the three environment variables of a run on several machines
)
PREDICTION_COLUMNS = ["file", "actual", "predicted", "probability"]
PLAIN = 0xFFFFFFFF  # the number of the view that is not augmented

Picture = namedtuple("Picture", "path label digest look row")  # row of the store
Parts = namedtuple("Parts", "trunk pool head top")
Store = namedtuple("Store", "file rows")
Ring = namedtuple("Ring", "features keys slots free")
# indices of pictures: train all that train, mine those of them that this process trains on, validation; most: how
# many the process with the largest share trains on
Data = namedtuple("Data", "pictures store train mine most validation labels targets sample_weights")
# Parts: full is float32, fast is trained; layout: pixels → layout; augmentation: None where the cores do it; batch:
# pictures at once where nothing is trained; devices train as one, in the scope of together()
Nets = namedtuple(
    "Nets", "network full fast layout augmentation batch number_format source devices together"
)
Rings = namedtuple("Rings", "views plain shaken")  # training views; validation as it is; augmented
Run = namedtuple("Run", "args recipe data nets rings")


# ---------------------------------------------------------------- arguments
# A new option: README.md must name it. A number of the recipe stands in FINE_TUNING, FROM_SCRATCH and the list below.
# What else changes the result belongs in settings_of, what changes the features in made_from of cache_name.


def parse_arguments():
    """Read the command line. Options whose default depends on the kind of training are absent unless given."""
    parser = argparse.ArgumentParser(
        description="Fine-tune InceptionV3 on data_dir/<class>/**/<picture>.",
        epilog="example: python train.py people model --no-heavy-augmentation --rounds 20. A GPU, several of them and "
        "several machines are used with KERAS_BACKEND=jax (README.md says how); with TensorFlow a run is one process.",
    )
    parser.add_argument(
        "data_dir", type=Path, help="a folder with a folder of pictures for each class"
    )
    parser.add_argument(
        "model", help="prefix of the files to write: model.h5, model.json, model-labels.json…"
    )

    def option(name, text, shown="%(default)s", **settings):
        parser.add_argument(f"--{name}", help=f"{text} (default: {shown})", **settings)

    def flag(name, text):
        option(name, text, "off", action="store_true")

    option("weights", "where to start: auto (imagenet if it can be had, else none), imagenet, none, or a notop FILE",
           default="auto")  # fmt: skip
    option("image-size", "side in pixels", "224; 96 from scratch", type=utils.number(int, 75, 1024))
    option("validation-split", "share of each class kept for validation", default=0.2,
           type=utils.number(float, 1e-6, 1 - 1e-6))  # fmt: skip
    flag("group-by-folder", "keep files of one folder on one side of the split")
    option(
        "seed", "same seed, same split and result", type=utils.number(int, 0, 2**31), default=1337
    )
    option("heavy-augmentation", "turn, shift, zoom, tint and flip; or only shift and flip", default=heavy_augmentation,
           action=argparse.BooleanOptionalAction)  # fmt: skip
    for name, text, low in (
        ("head-epochs", "epochs for the new dense layers", 1),
        ("rounds", "rounds of fine-tuning", 0),
        ("round-epochs", "epochs a round", 1),
        ("patience", "rounds without improvement before stopping, 0: never", 0),
        ("views", "augmented views of each picture at the start", 1),
        ("batch-size", "pictures a training step", 1),
    ):
        key = name.replace("-", "_")
        small = ", more on small sets" if key in LEAST_STEPS else ""
        shown = f"{FINE_TUNING[key]}; {FROM_SCRATCH[key]} from scratch{small}"
        high = 999 if name == "rounds" else 10**6  # the mosaics' names have three digits
        option(name, text, shown, type=utils.number(int, low, high), default=argparse.SUPPRESS)
    option(
        "unfreeze",
        "how many top inception blocks are fine-tuned",
        type=utils.number(int, 0, 10),
        default=UNFREEZE,
    )
    option("cache-dir", "keep the cache here for the next run", "a temporary file", type=Path)
    option(
        "cache-gb",
        "how large the cache may be",
        type=utils.number(float, 1e-6, 1e6),
        default=CACHE_GB,
    )
    flag("float32", "never use bfloat16, faster or not")
    flag("class-weight", "weigh classes by 1/frequency")
    flag("resume", "go on from the last whole round after a stop or a kill")
    flag("evaluate", "no training: score the saved model on all of data_dir")
    option(
        "min-accuracy", "exit 3 if the accuracy is lower", "none", type=utils.number(float, 0, 1)
    )
    flag("dry-run", "read and summarise the data, write nothing")
    args = parser.parse_args()
    if not args.model.endswith(("/", os.sep)):
        args.model = Path(
            args.model
        ).as_posix()  # `./model` is `model`, also in the pictures that are its own
    find_processes(args)
    return args


# ---------------------------------------------------------------- folder → file list


def find_files(data_dir):
    """Return [(path, label)] of everything below data_dir/<class>/; labels are safe to print, and NFC.

    Warns about files beside the class folders and classes without files.
    """
    below = [(path, path.relative_to(data_dir).parts) for path in utils.list_files(data_dir)]
    files = [(path, label_of(parts[0])) for path, parts in below if len(parts) > 1]
    loose = len(below) - len(files)
    if loose:
        utils.warn(
            f"{utils.escape(data_dir)}: {loose} files lie beside the class folders and are not used"
        )
    folders = {
        label_of(p.name) for p in data_dir.iterdir() if p.is_dir() and not utils.is_ignored(p.name)
    }
    for name in sorted(folders - {label for _, label in files}):
        utils.warn(f"{utils.escape(data_dir)}/{name}: an empty class is left out")
    return files


def label_of(folder):
    """Return the class name of a folder's: one spelling for all systems, fit for terminal, file name and CSV."""
    return utils.escape(unicodedata.normalize("NFC", folder))


def in_batches(items, size):
    """Divide a sequence into pieces of so many, in order; the last one may have fewer."""
    return [items[i : i + size] for i in range(0, len(items), size)]


def read_pictures(args, side):
    """Decode every file below data_dir once, in parallel, to squares of that side.

    With several processes each reads its share and tells the others. What gives no picture is listed with the
    reason and left out. Returns ([Picture], number skipped, Store of the squares or None in a dry run).
    """
    files = find_files(args.data_dir)
    store = (
        None
        if args.dry_run
        else open_store(args, None, max(1, len(files)), (side, side, 3), "uint8")
    )
    mine, found = range(args.process, len(files), args.processes), []
    # a few at a time: one by one, small pictures spend an eighth of the time between the threads
    few = in_batches(mine, min(8, max(1, 2**19 // side**2)))
    pieces = utils.ordered_parallel_map(
        lambda some: [read_picture(files[n][0], side) for n in some], few
    )
    results = itertools.chain.from_iterable(pieces)
    for n, (pixels, digest, look) in zip(mine, utils.progress(results, len(mine), "reading")):
        if pixels is not None and store is not None:
            write_rows(store, [n], pixels[None])
        found.append((n, digest, look))
    pictures, skipped = [], 0
    for n, digest, look in sorted(row for rows in exchange(args, found) for row in rows):
        path, label = files[n]
        if digest is None:
            utils.warn(f"{utils.escape(path)}: skipped: {look}")
            skipped += 1
        else:
            pictures.append(Picture(path, label, bytes.fromhex(digest), look, n))
    for label in sorted({label for _, label in files} - {picture.label for picture in pictures}):
        utils.warn(f"{label}: none of its files is a picture that can be used")
    return pictures, skipped, store


def read_picture(path, side):
    """Read one file: (uint8 (side, side, 3), SHA-256 of the file, difference hash: text), or (None, None, reason)."""
    import cv2

    try:
        data, image = imaging.read_picture(path)
        if max(image.size) > MAX_RATIO * min(image.size):
            return None, None, "the longer side is more than twice the shorter one"
        pixels = imaging.to_model_input(image, side)
    except imaging.PictureError as reason:
        return None, None, str(reason)
    grey = cv2.resize(
        cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY), (9, 8), interpolation=cv2.INTER_AREA
    )
    look = np.packbits(grey[:, 1:] > grey[:, :-1]).tobytes().hex()  # 64 bits: equal for near copies
    return pixels, hashlib.sha256(data).hexdigest(), look


# ---------------------------------------------------------------- file list → split


def group_pictures(pictures, data_dir, by_folder):
    """Return sets of indices of pictures that must stay together: equal bytes; with by_folder, one folder.

    Warns where the same bytes lie under two classes.
    """
    from scipy.cluster.hierarchy import DisjointSet

    first, together = {}, DisjointSet(range(len(pictures)))
    for i, picture in enumerate(pictures):
        keys = [picture.digest]
        inner = picture.path.relative_to(data_dir).parent
        if by_folder and len(inner.parts) > 1:
            keys.append(inner)
        for key in keys:
            together.merge(i, first.setdefault(key, i))
        twin = pictures[first[picture.digest]]
        if twin.label != picture.label:
            utils.warn(
                f"{utils.escape(picture.path)}: the same bytes as {utils.escape(twin.path)}, of another class"
            )
    return together.subsets()


def split(pictures, groups, fraction, seed):
    """Divide into training and validation, stratified; groups stay whole. Returns two sorted index arrays.

    Groups are ordered by a hash of seed and content, so that added pictures move only those at the
    boundary. Each class gives max(1, round(n * fraction)) pictures, never its last group.
    Raises UserError for fewer than two classes, or if no class can be divided.
    """
    digests = [min(pictures[i].digest for i in group) for group in groups]
    rank = [hashlib.sha256(f"{seed}:{digest.hex()}".encode()).digest() for digest in digests]
    members = [Counter(pictures[i].label for i in group) for group in groups]
    sizes = sum(members, Counter())
    left = Counter(
        label for counts in members for label in counts
    )  # groups of a class not in validation
    if len(sizes) < 2:
        raise utils.UserError(
            "fewer than two classes with pictures: make a folder for each class, `unknown` say"
        )
    chosen, taken = set(), Counter()
    for label in sorted(sizes):
        wanted = max(1, round(sizes[label] * fraction))
        for g in sorted(
            (g for g in range(len(groups)) if label in members[g]), key=rank.__getitem__
        ):
            if (
                taken[label] < wanted
                and g not in chosen
                and all(left[other] > 1 for other in members[g])
            ):
                chosen.add(g)
                taken += members[g]
                left -= Counter(members[g].keys())
        if not taken[label]:
            utils.warn(f"{label}: its pictures all belong together, so they only train: add others")
    if not chosen:
        raise utils.UserError(
            "no class can be divided into training and validation: add pictures to each class"
        )
    validation = sorted(i for g in chosen for i in groups[g])
    return np.setdiff1d(np.arange(len(pictures)), validation), np.array(validation)


def warn_as_a_colleague(pictures, train, validation):
    """Warn about what makes a result poor or its score too good."""
    sizes = Counter(picture.label for picture in pictures)
    for label, size in sorted(sizes.items()):
        if size < FEW_PICTURES:
            utils.warn(
                f"{label}: only {size} pictures: {FEW_PICTURES} or more make a class reliable"
            )
    (most, large), *_, (least, small) = sizes.most_common()
    if large > 20 * small:
        utils.warn(
            f"{most}: {large / small:.0f} times as many pictures as {least}: even them out or use --class-weight"
        )
    if len(validation) < FEW_VALIDATION:
        utils.warn(f"only {len(validation)} validation pictures: the accuracy is a rough figure")
    looks = {(p.label, p.look): p.path for p in (pictures[i] for i in train)}
    copies = [p for p in (pictures[i] for i in validation) if (p.label, p.look) in looks]
    if copies:
        one, other = (
            utils.escape(copies[0].path),
            utils.escape(looks[copies[0].label, copies[0].look]),
        )
        utils.warn(
            f"{one}: looks like {other}; {len(copies)} validation pictures have such a near copy in training, which "
            "flatters the accuracy: put what belongs together into one folder and use --group-by-folder"
        )


# ---------------------------------------------------------------- the cache


def open_store(args, name, count, shape, dtype):
    """Open a file of `count` rows of one shape: written by ordinary writes, read through a memory map.

    It lies in --cache-dir, else beside the model. Without --cache-dir, or with None as its name, it is a temporary
    file that vanishes with the process, kills included.
    """
    folder = args.cache_dir or Path(args.model).parent
    size = count * int(np.prod(shape)) * np.dtype(dtype).itemsize
    if name is None or not args.cache_dir:
        file = tempfile.TemporaryFile(dir=folder, buffering=0)
    else:
        flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)
        file = open(os.open(folder / name, flags, 0o600), "r+b", buffering=0)
        kept = os.fstat(file.fileno()).st_size  # a longer run may want it all again
        size = max(size, kept) if kept <= args.cache_gb * 1e9 else size
    file.truncate(size)  # takes no space yet: the map must not end before the file
    return Store(file, np.memmap(file, dtype, "r", shape=(count, *shape)))


def write_rows(store, indices, values):
    """Write rows of a Store; a full disk is an OSError here, and never a crash in the memory map."""
    values, breaks = (
        np.ascontiguousarray(values, store.rows.dtype),
        np.flatnonzero(np.diff(indices) != 1) + 1,
    )
    for first, some in zip(
        np.array(indices)[[0, *breaks]], np.split(values, breaks)
    ):  # neighbours at one go
        data = memoryview(some).cast("B")
        store.file.seek(int(first) * values[0].nbytes)
        while data:
            data = data[store.file.write(data) :]


def open_ring(args, name, count, shape, dtype):
    """Open a ring of `count` slots, each of one (picture, view); a kept one knows what it holds already."""
    features = open_store(args, f"{name}.features", count, shape, dtype)
    keys = open_store(
        args, f"{name}.keys", count, (40,), "uint8"
    )  # digest, view, checksum of the slot
    slots = (
        OrderedDict()
    )  # {key: slot}, the next to go first; a dict takes ever longer to find its first one
    for slot in np.flatnonzero(keys.rows.any(1)).tolist():
        record = keys.rows[slot].tobytes()
        if checksum(features.rows[slot]) == record[36:] and is_finite(features.rows[slot]):
            slots[record[:36]] = slot
    return Ring(
        features, keys, slots, sorted(set(range(count)) - set(slots.values()), reverse=True)
    )


def checksum(row):
    """Return four bytes that tell whether a row came whole through a kill or a bad disk."""
    return zlib.crc32(np.ascontiguousarray(row)).to_bytes(4, "big")


def is_finite(features):
    """Say whether all numbers of an array end. NumPy is slow with 16-bit ones: those without end have exponent 31."""
    if features.dtype == "float16":
        return (features.view("uint16") & 0x7C00).max() < 0x7C00
    return np.isfinite(features).all()


def claim_slots(ring, keys):
    """Give every key (digest and view, 36 bytes) a slot, if need be the oldest one.

    Returns the positions of those whose slots are still to be filled. At most as many keys as slots.
    """
    for key in keys:  # those that are wanted are the youngest, before any slot is given away
        if key in ring.slots:
            ring.slots.move_to_end(key)
    missing = []
    for position, key in enumerate(keys):
        if key not in ring.slots:
            ring.slots[key] = ring.free.pop() if ring.free else ring.slots.popitem(last=False)[1]
            missing.append(position)
    return missing


# ---------------------------------------------------------------- pictures → views → features


def draw_changes(args, side, keys):
    """Return how the views under some keys (digest, number) differ from their pictures: float64 (n, 9).

    Six numbers of a matrix, from a view's coordinates (x, y, 1) in pixels to those of its picture, row by row; and what
    is added to R, G and B, of 255. Chance is a hash of (seed, view, picture) alone. Draw new chances last, so that the
    others stay. A change that no setting shows needs another number FEATURES.
    """
    kind = HEAVY if args.heavy_augmentation else LIGHT
    hashes = (
        hashlib.shake_128(f"{args.seed} {view} ".encode() + digest).digest(9 * 8)
        for digest, view in keys
    )
    chance = np.frombuffer(b"".join(hashes), "<u8").reshape(-1, 9) / 2**64  # 0 to 1
    chance[[view == PLAIN for _, view in keys]] = 0  # no change
    strength = np.sqrt(chance[:, 0])
    angle = np.deg2rad(kind.rotation) * (2 * chance[:, 1] - 1) * strength
    low, high = np.log(kind.zoom)
    zoom = np.exp((low + (high - low) * chance[:, 2]) * strength)
    flip = np.where(chance[:, 3] < 0.5, 1, -1)
    center, shift = (
        (side - 1) / 2,
        kind.shift * (2 * chance[:, 4:6, None] - 1) * side * strength[:, None, None],
    )
    cos, sin = np.cos(angle) / zoom, np.sin(angle) / zoom
    turn = np.array([[cos * flip, -sin], [sin * flip, cos]]).transpose(2, 0, 1)
    matrix = np.concatenate([turn, center - turn @ (center + shift)], axis=2)
    colour = kind.colour * (2 * chance[:, 6:] - 1) * strength[:, None]
    return np.column_stack([matrix.reshape(-1, 6), colour])


def augment(picture, changes):
    """Return a turned, shifted, zoomed, tinted and maybe flipped copy of uint8 (side, side, 3).

    changes: a row of `draw_changes`. A new kind of change belongs into `build_augmentation`, too.
    """
    import cv2

    size, flags = picture.shape[1::-1], cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    view = cv2.warpAffine(
        picture, changes[:6].reshape(2, 3), size, flags=flags, borderMode=cv2.BORDER_REFLECT
    )
    return cv2.add(view, (*changes[6:], 0)) if changes[6:].any() else view


def build_augmentation(side):
    """Return the Keras model that does what `augment` does, for a GPU say: [pictures, changes] → uint8 views."""
    keras = model.import_keras()
    ops, pictures, changes = (
        keras.ops,
        keras.Input((side, side, 3), dtype="uint8"),
        keras.Input((9,)),
    )
    matrix = ops.pad(changes[:, :6], ((0, 0), (0, 2)))
    views = ops.image.affine_transform(ops.cast(pictures, "float32"), matrix, "bilinear", "reflect")
    views = ops.round(ops.clip(views + changes[:, None, None, 6:], 0, 255))
    return model.compiled(keras.Model([pictures, changes], ops.cast(views, "uint8")))


def make_views(run, pairs):
    """Return the views of a batch of (index, view) pairs, uint8 (n, side, side, 3): an array of the device, if any."""
    pictures, rows, size = (
        [run.data.pictures[i] for i, _ in pairs],
        run.data.store.rows,
        run.nets.batch,
    )
    places = [picture.row for picture in pictures]
    changes = draw_changes(
        run.args, rows.shape[1], [(p.digest, view) for p, (_, view) in zip(pictures, pairs)]
    )
    if run.nets.augmentation is None:
        numbered = zip(places, changes, pairs)
        return np.stack(
            [rows[n] if view == PLAIN else augment(rows[n], row) for n, row, (_, view) in numbered]
        )
    filled = [rows[np.resize(places, size)], np.resize(changes, (size, changes.shape[1]))]
    return model.predict_batch(run.nets.augmentation, filled)[: len(pairs)]


def training_views(seed, train, start, stop):
    """Return [(index, view)] of places start..stop in the endless sequence in which views are made.

    All pictures once, in a random order, then all of them again as another view.
    """
    wanted = []
    for view in range(start // len(train), -(-stop // len(train))):
        order = np.random.default_rng([seed, view]).permutation(train)
        first = view * len(train)
        wanted += [(int(i), view) for i in order[max(0, start - first) : stop - first]]
    return wanted


def views_made(recipe, number):
    """Return how many augmented views of each picture a run has made by a round."""
    later = number - recipe["first"]
    return recipe["views"] + later * recipe["fresh"] if later >= 0 else 0


def view_key(pictures, index, view):
    """Return the 36 bytes under which a view is kept."""
    return pictures[index].digest + view.to_bytes(4, "big")


def fill_ring(run, ring, trunk, wanted, label):
    """Run those of the wanted [(index, view)] through the frozen part that the ring does not hold yet.

    While the network works on one batch, the next ones are prepared and the last ones written. trunk: a Keras model,
    or None to keep the views themselves. Raises UserError for features that the ring's numbers cannot hold.
    """
    keys = [view_key(run.data.pictures, *pair) for pair in wanted]
    missing = claim_slots(ring, keys)
    batches = in_batches(missing, run.nets.batch)

    def pass_on(pixels):
        """Return what the ring keeps of a batch of views, the checksum of each, and whether all its numbers end."""
        with np.errstate(over="ignore"):  # what does not fit is told below
            kind = ring.features.rows.dtype
            features = (
                np.asarray(pixels)
                if trunk is None
                else model.predict(trunk, pixels, run.nets.batch, kind)
            )
        return features, [checksum(row) for row in features], is_finite(features)

    # On the cores two at once: while one batch waits for Python, the other keeps them busy. A device has them for what
    # comes before and after: a thread takes longer for the checksums of a batch than a device for the network.
    workers, at_once = (4, 8) if on_device() else (1, 2)
    views = utils.ordered_parallel_map(
        lambda batch: make_views(run, [wanted[p] for p in batch]), batches, workers=workers
    )
    results = utils.ordered_parallel_map(pass_on, views, workers=at_once)
    for batch, (features, sums, finite) in zip(
        batches, utils.progress(results, len(batches), label)
    ):
        if not finite:
            rounded = ring.features.rows.dtype == "float16"
            why = (
                "too large for 16-bit numbers: use --float32"
                if rounded
                else "without end: use other --weights"
            )
            raise utils.UserError(f"the network's features are {why}")
        slots = [ring.slots[keys[p]] for p in batch]
        write_rows(ring.features, slots, features)
        write_rows(
            ring.keys, slots, [np.frombuffer(keys[p] + s, "uint8") for p, s in zip(batch, sums)]
        )


def find_slots(run, ring, pairs):
    """Return where the views of [(index, view)] lie in a ring that holds them, as a list of rows."""
    return [ring.slots[view_key(run.data.pictures, *pair)] for pair in pairs]


def predict_views(run, network, ring, pairs):
    """Run a `pool` on (index, view) pairs of a ring. Returns pooled features (n, 2048), middle (n, 1280 or 0)."""
    slots, size = find_slots(run, ring, pairs), run.nets.batch
    parts = [
        model.predict(network, ring.features.rows[some], size) for some in in_batches(slots, size)
    ]
    return np.split(np.concatenate(parts), [2048], axis=1)


# ---------------------------------------------------------------- the network


@functools.cache
def on_device():
    """Say whether JAX computes on something faster than the cores, a GPU say."""
    keras = model.import_keras()
    return keras.config.backend() == "jax" and not keras.distribution.list_devices()[0].startswith(
        "cpu"
    )


def pass_batch(side):
    """Return how many pictures of a side in pixels go through a network at once: a power of two."""
    fitting = DEVICE_BATCH * min(1, 224 / side) ** 2
    return 1 << int(np.log2(max(PASS_BATCH, fitting))) if on_device() else PASS_BATCH


def fastest_format(args):
    """Return the Keras dtype policy to work in: mixed_bfloat16 where a short trial finds it faster.

    The median of five alternating timings of a convolution decides. A processor without such
    instructions is slower or raises: then it is float32.
    """
    keras = model.import_keras()
    if args.float32:
        return "float32"
    batch, trials = np.zeros((8, 28, 28, 192), "float32"), []
    try:
        for name in ("float32", "mixed_bfloat16"):
            layers = [keras.layers.Conv2D(192, 3, padding="same", dtype=name) for _ in range(2)]
            network = model.compiled(keras.Sequential([keras.Input(batch.shape[1:]), *layers]))
            trials.append(functools.partial(network.predict_on_batch, batch))
            trials[-1]()
        times = [[timeit.timeit(trial, number=1) for trial in trials] for _ in range(5)]
    except Exception:  # what a library raises for want of an instruction is its own affair
        return "float32"
    plain, rounded = np.median(times, axis=0)
    return "mixed_bfloat16" if plain / rounded >= WORTH_ROUNDING else "float32"


def find_weights(args):
    """Return (path of notop weights or None for from scratch, lines of warning to repeat at the end)."""
    if args.weights == "none":
        return None, []
    if args.weights not in ("auto", "imagenet"):
        if not args.weights.endswith(
            (".h5", ".hdf5")
        ):  # Keras would read a .keras file as something else
            raise utils.UserError(
                f"--weights {utils.escape(args.weights)}: give a file whose name ends in .h5"
            )
        with model.open_hdf5(Path(args.weights)):
            pass
        return Path(args.weights), []
    keras, name = model.import_keras(), IMAGENET.rpartition("/")[2]
    try:
        return download(keras, name), []
    except Exception as error:  # urllib, ssl, sockets and Keras each raise their own
        reason = utils.escape(error)[:200]
        if sys.stderr.isatty():
            print(file=sys.stderr)  # Keras's bar has no end of line
    if args.weights == "imagenet":
        raise utils.UserError(
            f"--weights imagenet: cannot be downloaded ({reason}): get the file by hand: {IMAGENET}"
        )
    return None, [
        f"the ImageNet weights cannot be had ({reason})",
        "training starts from scratch instead: expect a far lower accuracy unless there are many pictures",
        f"to have them, download {IMAGENET}",
        f"on any machine and run again with --weights {name}",
    ]


def download(keras, name):
    """Return the path of Keras's own ImageNet weights, which it keeps under that name. Raises whatever goes wrong."""
    if not sys.stderr.isatty():
        keras.config.disable_interactive_logging()  # no bar in colours, without an end of line, in a log
    homes = (
        os.environ.get("KERAS_HOME", Path.home() / ".keras"),
        "/tmp/.keras",
    )  # the second if there is no first
    socket.setdefaulttimeout(DOWNLOAD_SECONDS)
    try:
        if not any(Path(home, "models", name).exists() for home in homes):
            try_connection(IMAGENET)
        with contextlib.redirect_stdout(sys.stderr):  # Keras's own progress bar
            return Path(
                keras.utils.get_file(name, IMAGENET, cache_subdir="models", file_hash=IMAGENET_MD5)
            )
    finally:
        socket.setdefaulttimeout(None)


def source_of(path):
    """Return what tells one file of weights from another; path: None for from scratch."""
    return (
        "none"
        if path is None
        else f"{path.name}, SHA-256 {hashlib.sha256(path.read_bytes()).hexdigest()}"
    )


def try_connection(address):
    """Raise OSError unless a server answers in DOWNLOAD_SECONDS, however many addresses its name has."""
    answers = []

    def ask():
        """Note None, or why there is no answer."""
        try:
            with urllib.request.urlopen(address):
                answers.append(None)
        except Exception as error:
            answers.append(error)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(DOWNLOAD_SECONDS)
    if not answers or answers[0]:
        raise OSError(answers[0] if answers else f"no connection within {DOWNLOAD_SECONDS} s")


def load_base(network, path):
    """Load a file of notop weights, of either Keras format, into the blocks of a network. Raises UserError."""
    keras = model.import_keras()
    model.load_arrays(
        keras.Model(network.get_layer("scaled").output, network.get_layer("mixed10").output), path
    )


def cut_network(network, args, scratch):
    """Divide a network at the block `--unfreeze` names. Returns Parts: Keras models that share its layers.

    trunk: pixels → feature map (None from scratch: nothing is frozen). pool: feature map → 2048 pooled features, and
    the 1280 of the middle where the feature map comes before it. head: pooled features → probabilities. top: feature
    map → probabilities. The last layer that is trained sees the hidden units alone; the network's own is fitted.
    """
    keras = model.import_keras()
    pooled, hidden, middle = (
        network.get_layer(name).output for name in ("pooled", "hidden", "middle")
    )
    last = keras.layers.Dense(
        network.output.shape[-1], activation="softmax", dtype="float32", name="trained"
    )(hidden)
    cut = network.input if scratch else network.get_layer(f"mixed{10 - args.unfreeze}").output
    top = keras.Model(cut, last)
    for layer in top.layers:
        if isinstance(layer, keras.layers.BatchNormalization):
            layer.trainable = scratch  # frozen ones also keep their moving averages
            layer.momentum = SCRATCH_MOMENTUM if scratch else layer.momentum
    trunk = None if scratch else keras.Model(network.input, cut)
    both = keras.layers.Concatenate()([pooled, middle]) if scratch or args.unfreeze >= 2 else pooled
    return Parts(trunk, model.compiled(keras.Model(cut, both)), keras.Model(pooled, last), top)


def fold_trunk(parts):
    """Return Parts whose trunk is a compiled copy: its convolutions do the batch normalisation behind them, too.

    The same function, an eighth faster: w * x becomes (w / s) * x + (beta - mean / s), where s is the square root of
    variance + epsilon.
    """
    if parts.trunk is None:
        return parts
    keras, network = model.import_keras(), parts.trunk
    made_by = {id(layer.output): layer for layer in network.layers}
    norms = [
        layer for layer in network.layers if isinstance(layer, keras.layers.BatchNormalization)
    ]
    pairs = [(made_by[id(norm.input)], norm) for norm in norms]
    names = {convolution.name for convolution, _ in pairs}

    def with_bias(layer):
        more = {"use_bias": True, "kernel_initializer": "zeros"} if layer.name in names else {}
        return type(layer).from_config(layer.get_config() | more)

    def skip(layer, inputs, **_):
        return inputs if isinstance(layer, keras.layers.BatchNormalization) else layer(inputs)

    folded = keras.models.clone_model(network, clone_function=with_bias, call_function=skip)
    for convolution, norm in pairs:
        (kernel,), (beta, mean, variance) = convolution.get_weights(), norm.get_weights()
        scale = np.sqrt(variance + norm.epsilon)
        folded.get_layer(convolution.name).set_weights([kernel / scale, beta - mean / scale])
    return parts._replace(trunk=model.compiled(folded))


def prepare(run, network):
    """Compile a model for training with AdamW. Its rate is set before each step: a schedule would be traced along."""
    keras = model.import_keras()
    with run.nets.together():
        optimizer = keras.optimizers.AdamW(weight_decay=WEIGHT_DECAY)
        loss = keras.losses.CategoricalCrossentropy(label_smoothing=LABEL_SMOOTHING)
        # by name alone, the graph would be made twice; a further one has to be named in train_epoch
        accuracy = keras.metrics.CategoricalAccuracy(name="accuracy")
        model.compiled(network, optimizer=optimizer, loss=loss, metrics=[accuracy])
        optimizer.build(network.trainable_variables)  # now, so that --resume finds its variables


def learning_rates(run, network):
    """Return the rate of every step of a model's training, float (steps,): rising to its peak, then a cosine to 0."""
    recipe, scratch, (steps, _) = run.recipe, run.nets.full.trunk is None, epoch_size(run)
    if network is run.nets.fast.head:
        warm_up, total_steps, peak = steps, recipe["head_epochs"] * steps, HEAD_RATE
    else:
        epochs = recipe["rounds"] * recipe["round_epochs"] + (
            recipe["head_epochs"] if scratch else 0
        )
        warm_up, total_steps = int(epochs * steps * WARM_UP), epochs * steps
        peak = SCRATCH_RATE if scratch else ROUND_RATE
    rising = np.linspace(peak / 100, peak, warm_up, endpoint=False)
    falling = (
        peak
        / 2
        * (1 + np.cos(np.linspace(0, np.pi, max(1, total_steps - warm_up), endpoint=False)))
    )
    return np.concatenate([rising, falling])


# ---------------------------------------------------------------- what a run works on


def read_data(args, side):
    """Read and divide data_dir. Prints the `images:` line. Returns Data. Raises UserError."""
    pictures, skipped, store = read_pictures(args, side)
    groups = group_pictures(pictures, args.data_dir, args.group_by_folder)
    train, validation = split(pictures, groups, args.validation_split, args.seed)
    labels = sorted({picture.label for picture in pictures})
    if len(labels) > model.MAX_CLASSES:
        raise utils.UserError(f"{len(labels):,} classes: use at most {model.MAX_CLASSES:,}")
    longest = max(labels, key=len)
    if len(longest) > model.MAX_LABEL:  # as escaped: an undecodable byte takes six characters
        raise utils.UserError(f"{longest[:60]}…: too long for a class name: rename the folder")
    if len(json.dumps(labels)) > model.MAX_LABELS:
        raise utils.UserError(
            f"{len(labels):,} classes with such long names: give the folders shorter ones"
        )
    utils.print_line(
        f"images: {len(train)} train, {len(validation)} validation, {len(labels)} classes, {skipped} skipped"
    )
    warn_as_a_colleague(pictures, train, validation)
    owner = np.array([picture.row % args.processes for picture in pictures])
    shares = np.bincount(owner[train], minlength=args.processes)
    if not shares.all():
        raise utils.UserError(
            f"{args.processes} processes are too many for {len(train)} pictures: start fewer"
        )
    if args.process == 0:  # it scores, so it needs what others have read
        for i in validation[owner[validation] != 0]:
            pixels, _, reason = read_picture(pictures[i].path, side)
            if pixels is None:
                raise utils.UserError(
                    f"{utils.escape(pictures[i].path)}: has changed meanwhile: {reason}"
                )
            write_rows(store, [pictures[i].row], pixels[None])
    targets = np.array([labels.index(picture.label) for picture in pictures])
    frequency = np.bincount(targets[train], minlength=len(labels))
    weights = (
        (len(train) / len(labels) / frequency)[targets]
        if args.class_weight
        else np.ones(len(pictures))
    )
    mine = train[owner[train] == args.process]
    return Data(
        pictures, store, train, mine, int(shares.max()), validation, labels, targets, weights
    )


def set_up_keras(args, number_format):
    """Settle on the number format, if it is None, and the devices. Returns both."""
    keras = model.import_keras()
    with (
        model.silence_output()
    ):  # under JAX, Keras imports a chatting TensorFlow when a layer first describes itself
        keras.layers.Identity().get_config()
    if number_format is None and args.process == 0:
        number_format = fastest_format(args)
    number_format = exchange(args, number_format)[0]
    utils.print_line(f"number format: {number_format}")
    return (
        number_format,
        keras.distribution.list_devices() if keras.config.backend() == "jax" else [None],
    )


def build_networks(args, path, class_count, side, number_format):
    """Build the float32 network to save and, where it pays, a bfloat16 one to train. Returns Nets.

    path: notop weights, or None for from scratch. number_format: a Keras dtype policy, or None to find out.
    Where several devices or processes train as one, the network that they train is another one again: only they
    together can compute with it. What is frozen runs on the first device of each process.
    """
    keras = model.import_keras()
    number_format, devices = set_up_keras(args, number_format)
    keras.utils.clear_session()  # layer names enter the seeds
    keras.utils.set_random_seed(args.seed)
    network = model.build_network(class_count, side)
    together = contextlib.nullcontext
    if path is not None:
        load_base(network, path)

    def twin():
        """Build the network once more, to be trained, with the same numbers. Returns its Parts."""
        other = model.build_network(class_count, side, number_format)
        other.set_weights(network.get_weights())
        return cut_network(other, args, path is None)

    full = fold_trunk(cut_network(network, args, path is None))
    fast = full if number_format == "float32" else fold_trunk(twin())
    if len(devices) > 1:
        together = keras.distribution.DataParallel(auto_shard_dataset=False).scope
        with together():
            shared = twin()
        fast = fast._replace(head=shared.head, top=shared.top)
    layout = model.compiled(keras.Model(network.input, network.get_layer("layout").output))
    augmentation, batch = build_augmentation(side) if on_device() else None, pass_batch(side)
    return Nets(
        network,
        full,
        fast,
        layout,
        augmentation,
        batch,
        number_format,
        source_of(path),
        devices,
        together,
    )


def cache_name(args, nets, square, kind):
    """Return how the names of the cache's files begin: features made in another way lie in other files."""
    views, backend = (
        (HEAVY if args.heavy_augmentation else LIGHT, args.seed),
        model.import_keras().config.backend(),
    )
    made_from = (
        FEATURES,
        nets.source,
        args.unfreeze,
        square,
        kind,
        nets.number_format,
        views,
        backend,
        on_device(),
    )
    name = hashlib.sha256(repr(made_from).encode()).hexdigest()[:16]
    return f"{name}-{args.process}-of-{args.processes}" if args.processes > 1 else name


def open_rings(args, data, nets, recipe):
    """Make room for views: as many as the whole run makes, or as --cache-gb allows. Returns Rings.

    Raises UserError if not even the pictures and a small ring fit.
    """
    cut, square, scratch = (
        nets.full.top.input_shape[1:],
        data.store.rows.shape[1:],
        nets.full.trunk is None,
    )
    kind = "uint8" if scratch else "float32" if args.float32 else "float16"
    plain_kind = "uint8" if scratch else "float32"
    picture, view, plain = (
        np.dtype(row).itemsize for row in (("uint8", square), (kind, cut), (plain_kind, cut))
    )
    view += 0 if scratch else nets.full.head.input_shape[1] * 4  # which train_head keeps of each
    scored = len(data.validation) if args.process == 0 else 1
    fixed = len(data.pictures) // args.processes * picture + scored * (view + plain)
    least = fixed + min(len(data.mine), SMALLEST_RING) * view
    if least > args.cache_gb * 1e9:
        raise utils.UserError(
            f"--cache-gb {args.cache_gb:g}: the cache needs at least {least * 1.06 / 1e9:.2g} GB: give more with "
            "--cache-gb, and a folder on a disk that has it with --cache-dir"
        )
    wanted = 1 + views_made(recipe, recipe["rounds"])
    slots = int(min(wanted * len(data.mine), (args.cache_gb * 1e9 - fixed) // view))
    if slots < 2 * len(data.mine):
        fitted = f"the last layer is fitted on {slots // 2} of {len(data.mine)} pictures"
        utils.warn(f"--cache-gb {args.cache_gb:g}: {fitted}: give more if you can")
    name = cache_name(args, nets, square, kind)
    return Rings(
        open_ring(args, f"{name}-views", slots, cut, kind),
        open_ring(args, f"{name}-plain", scored, cut, plain_kind),
        open_ring(args, f"{name}-shaken", scored, cut, kind),
    )


# ---------------------------------------------------------------- training


def train_epoch(run, network, rows, order, targets, label):
    """Train one epoch with bare `train_on_batch`. Returns the mean {"loss", "accuracy"} over its steps.

    rows: features (slots, …). order: (slot, index) pairs, int (n, 2), repeated from the beginning until the last
    batch is full. targets: float (pictures, classes), one-hot. label: of its progress.
    """
    steps, batch_size, weights = *epoch_size(run), run.data.sample_weights
    batches = np.resize(order, (steps, batch_size, 2))
    logs, features_ahead = (
        [],
        utils.ordered_parallel_map(lambda b: rows[b[:, 0]], batches, workers=1),
    )
    rates = learning_rates(run, network)[int(network.optimizer.iterations) :]
    with run.nets.together():
        for batch, features, rate in zip(
            utils.progress(batches, steps, label), features_ahead, rates
        ):
            network.optimizer.learning_rate = rate
            logs.append(
                network.train_on_batch(features, targets[batch[:, 1]], weights[batch[:, 1]])
            )
    return dict(zip(("loss", "accuracy"), np.mean(logs, axis=0).tolist(), strict=True))


def epoch_size(run):
    """Return (steps an epoch, pictures a step of this process): alike in all processes, which wait for each other.

    The pictures of a step are divided evenly among the devices of all processes.
    """
    args, devices = run.args, len(run.nets.devices)
    batch_size = -(-run.recipe["batch_size"] // devices) * (devices // args.processes)
    return -(-run.data.most // batch_size), batch_size


def epoch_order(seed, window, slots, round_number, epoch):
    """Return (slot, index) pairs, int (n, 2): every picture that has views in the window once, a random one of them.

    window: [(index, view)]. slots: where each of these lies.
    """
    rng = np.random.default_rng([seed, round_number, epoch])
    mixed = np.column_stack([slots, [i for i, _ in window]])[rng.permutation(len(window))]
    _, first = np.unique(mixed[:, 1], return_index=True)
    return mixed[np.sort(first)]


def train_epochs(run, network, rows, slots, window, number, validation):
    """Train the epochs of one round, a line each. Returns them as rows of the history, dicts by column.

    rows, slots: the features, and where those of each view in the window lie. validation: gives the pooled features
    (n, 2048) of the augmented validation pictures; the float32 network scores them with the last layer that is trained.
    """
    data, history = run.data, []
    targets = np.eye(len(data.labels), dtype="float32")[data.targets]
    for epoch in range(1, run.recipe["round_epochs" if number else "head_epochs"] + 1):
        start = time.monotonic()
        order = epoch_order(run.args.seed, window, slots, number, epoch)
        name = f"round {number} epoch {epoch}"
        logs = train_epoch(run, network, rows, order, targets, name)
        if run.args.process:
            continue  # the first one scores
        bring_up(run.nets)
        units, actual = hidden_units(run, validation()), data.targets[data.validation]
        probabilities = answers(units, run.nets.full.top.get_layer("trained").get_weights())
        logs["val_loss"] = float(network.loss(targets[data.validation], probabilities))
        logs["val_accuracy"] = float((probabilities.argmax(1) == actual).mean())
        seconds = time.monotonic() - start
        shown = ", ".join(f"{key} {value:.3f}" for key, value in logs.items())
        utils.print_line(f"{name}: {shown}, {seconds:.0f} s")
        unprinted = {
            "plain_accuracy": "",
            "learning_rate": float(network.optimizer.learning_rate),
            "seconds": seconds,
        }
        history.append(
            {"round": number, "epoch": epoch} | logs | unprinted
        )  # the columns of model-history.csv
    return history


def train_head(run, window):
    """Round 0 of fine-tuning: the new dense layers, on pooled features computed once for each view."""
    args, _, data, nets, rings = run
    pooled = open_store(args, None, len(window), (2048,), "float32")
    for places in in_batches(range(len(window)), nets.batch):
        features, _ = predict_views(run, nets.fast.pool, rings.views, [window[n] for n in places])
        write_rows(pooled, places, features)
    if args.process == 0:
        validation, _ = predict_views(
            run, nets.fast.pool, rings.shaken, [(i, 0) for i in data.validation]
        )
    prepare(run, nets.fast.head)
    return train_epochs(
        run, nets.fast.head, pooled.rows, range(len(window)), window, 0, lambda: validation
    )


def train_top(run, window, number):
    """A round of fine-tuning the top blocks; from scratch, of training the whole network."""
    _, _, data, nets, rings = run
    shaken = [(i, 0) for i in data.validation]
    slots = find_slots(run, rings.views, window)

    def validation():
        return predict_views(run, nets.full.pool, rings.shaken, shaken)[0]

    return train_epochs(
        run, nets.fast.top, rings.views.features.rows, slots, window, number, validation
    )


def bring_up(nets):
    """Bring the float32 network up to date with the one that is trained."""
    if nets.fast is not nets.full:
        nets.full.top.set_weights(nets.fast.top.get_weights())


def hidden_units(run, pooled):
    """Return the float32 network's hidden units (n, 1024) for pooled features (n, 2048)."""
    kernel, bias = run.nets.network.get_layer("hidden").get_weights()
    return np.maximum(pooled @ kernel + bias, 0)


def last_units(run, ring, indices, view):
    """Return what the network's last layer sees of one view of pictures, which a ring holds: float32 (n, units) a part.

    Parts: the hidden units, the middle (zeros where the feature maps come after it), the layout.
    """
    size = run.nets.batch
    views = (make_views(run, [(i, view) for i in chunk]) for chunk in in_batches(indices, size))
    layout = np.concatenate([model.predict(run.nets.layout, pixels, size) for pixels in views])
    pooled, middle = predict_views(run, run.nets.full.pool, ring, [(i, view) for i in indices])
    if not middle.size:
        middle = np.zeros(
            (len(indices), run.nets.network.get_layer("middle").output.shape[1]), "float32"
        )
    return hidden_units(run, pooled), middle, layout


def answers(units, last):
    """Return the probabilities (n, classes) for units (n, k). last: kernel (k, classes) and bias (classes,)."""
    from scipy.special import softmax

    kernel, bias = last
    return softmax(units @ kernel + bias, axis=1)


def fit_parts(run, window):
    """Fit a last layer to each part of its units alone. Returns [(kernel (units, classes), bias (classes,))].

    Ridge regression of the one-hot classes on the units of the training pictures as they are; classes count alike, or a
    stranger would be taken for whoever has most pictures. Gradient steps with cross-entropy leave a layer that is too
    sure of what it has never seen; least squares does not, and errs no more often. In one fit to all, the hidden units,
    which know every training picture by heart, would leave the others no say.
    """
    data, sums = run.data, [0] * len(RIDGES)
    indices = [i for i, view in window if view == PLAIN]
    weights = 1 / np.bincount(data.targets[data.train])
    bring_up(run.nets)
    for chunk in in_batches(indices, 16 * run.nets.batch):
        y = data.targets[chunk, None] == np.arange(len(data.labels))
        for n, part in enumerate(last_units(run, run.rings.views, chunk, PLAIN)):
            x = np.column_stack([part, np.ones(len(chunk))])
            sums[n] = sums[n] + (x * weights[data.targets[chunk], None]).T @ np.column_stack([x, y])
    return [
        ridge_regression(total(run.args, one), ridge) for one, ridge in zip(sums, RIDGES.values())
    ]


def ridge_regression(sums, ridge):
    """Return kernel (n, classes) and bias (classes,) of the least squares fit of one-hot classes, times LOGITS.

    sums: float64 (n + 1, n + 1 + classes), the weighted sum over all samples of the outer product of (x, 1) and
    (x, 1, one-hot y). ridge: in mean variances of x. Raises UserError if training has led to numbers without end.
    """
    from scipy.linalg import solve

    n = len(sums) - 1
    if not np.isfinite(sums).all():
        raise utils.UserError(
            "training has led to numbers without end: use --float32, or other pictures"
        )
    means = sums / sums[n, n]
    mean, shares = means[n, :n], means[n, n + 1 :]
    covariance, cross = (
        means[:n, :n] - np.outer(mean, mean),
        means[:n, n + 1 :] - np.outer(mean, shares),
    )
    strength = ridge * max(np.trace(covariance) / n, 1e-12)
    kernel = LOGITS * solve(covariance + strength * np.eye(n), cross, assume_a="pos")
    return kernel, LOGITS * shares - mean @ kernel


def train_rounds(run, state):
    """Train round after round, save the best, until the rounds or the patience are used up. Returns the state.

    state: of the last whole round of an interrupted run, or None.
    """
    args, recipe, data, nets, rings = run
    scratch = nets.full.trunk is None
    if args.process == 0:
        fill_ring(
            run,
            rings.shaken,
            nets.fast.trunk,
            [(i, 0) for i in data.validation],
            "validation views",
        )
        fill_ring(
            run, rings.plain, nets.full.trunk, [(i, PLAIN) for i in data.validation], "validation"
        )
    prepare(run, nets.fast.top)
    if state:
        restore_weights(run, state)
    state = state or {"round": -1, "stale": 0, "best": None, "history": []}
    while state["round"] < recipe["rounds"] and not (
        recipe["patience"] and state["stale"] >= recipe["patience"]
    ):
        number = state["round"] + 1
        window = ring_window(run, number)
        fill_ring(run, rings.views, nets.fast.trunk, window, "views")
        rows = (
            train_head(run, window)
            if number == 0 and not scratch
            else train_top(run, window, number)
        )
        fits = fit_parts(run, window)
        best = exchange(
            args, None if args.process else finish_round(run, number, rows, fits, state["best"])
        )[0]
        stale = 0 if best != state["best"] else state["stale"] + 1
        state = {"round": number, "stale": stale, "best": best, "history": state["history"] + rows}
        if args.process == 0:
            save_state(run, state)
            write_history(
                args, state["history"]
            )  # after it: on Windows a CSV that is open elsewhere is an error
    return state


def write_history(args, rows):
    """Write model-history.csv: a row an epoch, whose keys are the columns."""
    utils.write_csv(f"{args.model}-history.csv", list(rows[0]), [row.values() for row in rows])


def ring_window(run, number):
    """Return the [(index, view)] that the ring holds in a round: pictures as they are, and the latest views.

    Where not all fit, at most half of the ring holds pictures as they are. Dense layers that are only a beginning learn
    from these alone: views would make round 0 take twice as long.
    """
    capacity, mine, seed = len(run.rings.views.keys.rows), run.data.mine, run.args.seed
    as_they_are = [
        (i, PLAIN) for i, _ in training_views(seed, mine, 0, min(len(mine), max(1, capacity // 2)))
    ]
    room = capacity - len(as_they_are)
    made = len(mine) * views_made(run.recipe, number)
    return as_they_are + training_views(seed, mine, max(0, made - room), made)


def choose_last_layer(run, fits):
    """Return the last layer, of those that average the fits by BLENDS, that is right most often on validation.

    Returns (its kernel and bias, probabilities (n, classes) of the pictures as they are, of their augmented views).
    """
    indices, rings, layers = run.data.validation, run.rings, []
    plain = np.column_stack(last_units(run, rings.plain, indices, PLAIN))
    augmented = np.column_stack(last_units(run, rings.shaken, indices, 0))
    for shares in SCRATCH_BLENDS if run.nets.full.trunk is None else BLENDS:
        kernel = np.concatenate([share * kernel for share, (kernel, _) in zip(shares, fits)])
        layers.append((kernel, sum(share * bias for share, (_, bias) in zip(shares, fits))))
    last = max(
        layers,
        key=lambda layer: (answers(plain, layer).argmax(1) == run.data.targets[indices]).sum(),
    )
    return last, answers(plain, last), answers(augmented, last)


def finish_round(run, number, rows, fits, best):
    """Print the round's line, draw its mosaic, save the model if it is the best yet.

    fits: of the last layer, from `fit_parts`. best: {"round", "right", "loss"} of the best so far, or None. Returns the
    best now.
    """
    args, _, data, _, _ = run
    last, plain, augmented = choose_last_layer(run, fits)
    actual = data.targets[data.validation]
    right = int((plain.argmax(1) == actual).sum())
    rows[-1]["plain_accuracy"] = right / len(actual)
    line = f"round {number}: validation accuracy {right / len(actual):.4f} ({right}/{len(actual)})"
    utils.print_line(line)
    if number == 0:
        for old in Path().glob(MOSAICS):  # of an earlier run with the same prefix
            if is_mosaic_of(old, args.model):
                old.unlink()
        remove_state(args.model)
    path, picture = (
        Path(f"{number:03d}.png"),
        lambda i: data.store.rows[data.pictures[data.validation[i]].row],
    )
    check_mosaic(path, args.model)  # another run may have begun in this folder meanwhile
    report.draw_confusion_matrix(
        path, args.model, line, data.labels, actual, plain.argmax(1), picture
    )
    temperature = fit_temperature(plain, actual)
    calibrated, shaken = soften(plain, temperature), soften(augmented, temperature)
    loss = log_loss(
        np.concatenate([calibrated, shaken]), np.concatenate([actual, actual])
    )  # breaks ties
    if best and (right, -loss) <= (best["right"], -best["loss"]):
        return best
    save_round(run, number, right, last, temperature, choose_threshold(calibrated, actual))
    return {"round": number, "right": right, "loss": loss}


def save_round(run, number, right, last, temperature, threshold):
    """Save the model with its new last layer, and what must travel with it."""
    args, _, data, nets, _ = run
    info = {
        "labels": data.labels,
        "image_size": data.store.rows.shape[1],
        "round": number,
        "temperature": temperature,
        "threshold": threshold,
        "weights": nets.source,
        "accuracy": right / len(data.validation),
        "interval": interval(right, len(data.validation)),
        "number_format": nets.number_format,
        "seed": args.seed,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": versions(),
    }
    nets.network.get_layer("probabilities").set_weights([array / temperature for array in last])
    model.save_model(nets.network, info, args.model)


# ---------------------------------------------------------------- calibration and scores


def soften(probabilities, temperature):
    """Return softmax(log p / temperature), float64 (n, classes): temperature scaling, Guo et al. 2017."""
    from scipy.special import softmax

    return softmax(np.log(np.maximum(probabilities, 1e-30)) / temperature, axis=1)


def log_loss(probabilities, actual):
    """Return the mean negative log probability of the actual classes."""
    return float(-np.log(np.maximum(probabilities[np.arange(len(actual)), actual], 1e-30)).mean())


def fit_temperature(probabilities, actual):
    """Return the temperature, 1/8 to 8, under which the probabilities say best how often they are right.

    No finite set proves certainty: half a mistake more is assumed (Jeffreys' prior), as smoothed targets. And few
    pictures say little about it: its logarithm has a normal prior around 0, of variance 1 / (2 * NEAR_ONE).
    """
    from scipy.optimize import minimize_scalar

    smooth, classes = 0.5 / (len(actual) + 1), probabilities.shape[1]

    def loss(log_temperature):
        """Return the log loss of all pictures and the prior's share, up to a constant."""
        p = np.log(np.maximum(soften(probabilities, np.exp(log_temperature)), 1e-30))
        fit = ((1 - smooth) * p[np.arange(len(actual)), actual] + smooth / classes * p.sum(1)).sum()
        return NEAR_ONE * log_temperature**2 - fit

    bounds = (-np.log(8), np.log(8))
    return float(np.exp(minimize_scalar(loss, bounds=bounds, method="bounded").x))


def choose_threshold(probabilities, actual):
    """Return the probability that a new picture, if rightly named, reaches in KEPT of all cases.

    The quantile k / (n + 1), as in conformal prediction, keeps that promise with few validation pictures too. DOUBT and
    SURE limit it: easy pictures all reach much the same probability, and a film's are seldom as easy.
    """
    right = probabilities.max(1)[probabilities.argmax(1) == actual]
    if not len(right):
        return 0.5
    limit = max(SURE, 1 - DOUBT * (1 - right.mean()))
    return float(min(limit, np.quantile(right, 1 - KEPT, method="weibull")))


def interval(right, total):
    """Return the exact (Clopper-Pearson) 95 % interval of a share as [low, high]."""
    from scipy.stats import binomtest

    return list(binomtest(right, total).proportion_ci(0.95, method="exact"))


def versions():
    """Return the versions of what made a model."""
    from importlib.metadata import version

    found = {"python": sys.version.split()[0]} | {
        name: version(name) for name in ("keras", "numpy", "pillow")
    }
    backend = model.import_keras().config.backend()
    return found | {backend: getattr(sys.modules.get(backend), "__version__", "")}


# ---------------------------------------------------------------- files


def check_outputs(args):
    """Raise UserError before any work where something the user has would be overwritten or cannot be written."""
    folder = Path(args.model).parent
    if not folder.is_dir():
        raise utils.UserError(
            f"{utils.escape(folder)}: no such folder: make it or choose another prefix"
        )
    if not utils.is_utf8(args.model):
        raise utils.UserError(
            f"{utils.escape(args.model)}: no name in UTF-8: choose another prefix"
        )
    if args.model.endswith(("/", os.sep)) or Path(args.model).is_dir():
        raise utils.UserError(
            f"{utils.escape(args.model)}: is a folder: give a prefix such as {Path('model')}"
        )
    # Keras reads names in .weights.h5 as another format; `m-labels.json`, say, belongs to the model `m`
    ends = (".weights", "-labels", "-resume", "-evaluate")
    if not args.evaluate and args.model.endswith(ends):
        raise utils.UserError(
            f"{utils.escape(args.model)}: choose a prefix that does not end in {', '.join(ends)}"
        )
    if not args.evaluate and not model.may_replace_model(args.model):
        raise utils.UserError(
            f"{utils.escape(args.model)}.h5: a model from elsewhere: choose another prefix"
        )
    if args.cache_dir:
        args.cache_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    for place in {folder, Path(), args.cache_dir or folder}:
        try:
            tempfile.TemporaryFile(dir=place).close()
        except OSError as error:
            error.filename = place.resolve()  # not that of a file that nobody knows
            raise
    for path in [Path("evaluate.png")] if args.evaluate else sorted(Path().glob(MOSAICS)):
        check_mosaic(path, args.model)


def check_mosaic(path, prefix):
    """Raise UserError if there is a picture at `path` that no run with this prefix has made."""
    if path.exists() and not is_mosaic_of(path, prefix):
        raise utils.UserError(
            f"{path}: not a picture of this model: move it away or run in another folder"
        )


def is_mosaic_of(path, prefix):
    """Say whether a file is a mosaic that a run with this prefix has made: `report.draw_confusion_matrix` notes it inside."""
    if not path.is_file():  # a named pipe would wait for ever
        return False
    try:
        with Image.open(path, formats=["PNG"]) as image:
            return image.info.get("Software") == f"{utils.KIT}: {prefix}"
    except Exception:  # Pillow's parsers raise much
        return False


def remove_unfinished(prefix):
    """Remove the unfinished files of an earlier run that was killed: only those that this prefix can have."""
    folder, name = Path(prefix).parent, glob.escape(Path(prefix).name)
    ends = (".h5 .json -labels.json -history.csv -report.png -mistakes.csv -evaluate.csv -evaluate-report.png "
            "-resume.json -resume-files.txt -resume.0.npy -resume.1.npy").split()  # fmt: skip
    for stem, _, kind in (end.rpartition(".") for end in ends):
        for path in folder.glob(f".{name}{stem}-unfinished-*.{kind}"):
            path.unlink()
    for path in Path().glob(f".{MOSAICS.replace('.', '-unfinished-*.')}"):
        path.unlink()


def score_saved(args, network, data, what):
    """Score a saved model, as anybody would read it, on data.validation.

    what: begins the line that is printed, `evaluate: accuracy` say. Returns (probabilities (n, classes), accuracy,
    rows of PREDICTION_COLUMNS, a title for pictures).
    """
    actual = data.targets[data.validation]
    size = pass_batch(data.store.rows.shape[1])
    chunks = in_batches([data.pictures[i].row for i in data.validation], size)
    shown = utils.progress(chunks, len(chunks), "scoring")
    probabilities = np.concatenate(
        [model.predict(network, data.store.rows[chunk], size) for chunk in shown]
    )
    right = int((probabilities.argmax(1) == actual).sum())
    low, high = interval(right, len(actual))
    line = f"{what} {right / len(actual):.4f} ({right}/{len(actual)})"
    utils.print_line(f"{line}, 95% interval {low:.4f} to {high:.4f}")
    rows = []
    for i, p in zip(data.validation, probabilities):
        name = data.pictures[i].path.relative_to(args.data_dir).as_posix()
        rows.append([name, data.labels[data.targets[i]], data.labels[p.argmax()], f"{p.max():.6f}"])
    return (
        probabilities,
        right / len(actual),
        rows,
        f"{utils.escape(Path(args.model).name)}, {line}",
    )


def finish_run(run, state):
    """Score the saved files; print `best:`, write mistakes and report, say what is next. Returns the accuracy."""
    args, _, data, _, _ = run
    network, info = model.load_model(args.model)
    what = f"best: round {info['round']}, validation accuracy"
    probabilities, accuracy, rows, title = score_saved(args, network, data, what)
    wrong = sorted((row for row in rows if row[1] != row[2]), key=lambda row: row[3], reverse=True)
    utils.write_csv(f"{args.model}-mistakes.csv", PREDICTION_COLUMNS, wrong)
    write_history(
        args, state["history"]
    )  # again: a kill may have come between the last state and its rows
    actual = data.targets[data.validation]
    report.draw_report(
        f"{args.model}-report.png", title, data.labels, actual, probabilities, state["history"]
    )
    tell_what_next(args, info, rows)
    return accuracy


def tell_what_next(args, info, rows):
    """Say on stderr, in words, how good the model is, what it confuses, what to look at and what to run next."""
    name, confused = (
        utils.escape(args.model),
        Counter((row[1], row[2]) for row in rows if row[1] != row[2]),
    )
    right = len(rows) - confused.total()
    low, high = interval(right, len(rows))
    lines = [f"{name}.h5 names {right} of {len(rows)} pictures rightly that it was not trained on;"]
    lines.append(f"on more pictures like these, expect {low:.0%} to {high:.0%}.")
    if confused:
        pairs = ", ".join(f"{a} for {p} ({n})" for (a, p), n in confused.most_common(3))
        lines.append(f"Taken for another most often: {pairs}.")
    lines.append(f"Below a probability of {info['threshold']:.3f} the tagger says unknown.")
    if "unknown" not in info["labels"]:
        lines.append("There is no class `unknown`: `--threshold 0` gives everybody a name.")
    lines.append(
        f"Look at {info['round']:03d}.png, {name}-report.png and {name}-mistakes.csv. Then:"
    )
    lines.append(f"    python webcam.py {shlex.quote(name)}")
    lines.append("or, if these are not faces, the same with --whole-picture.")
    if args.cache_dir and args.cache_dir.exists():
        stats = [
            path.lstat() for end in ("features", "keys") for path in args.cache_dir.glob(f"*.{end}")
        ]
        size = sum(
            getattr(stat, "st_blocks", 0) * 512 or stat.st_size for stat in stats
        )  # the files have holes
        folder = shlex.quote(utils.escape(args.cache_dir))
        lines.append(
            f"The kept cache takes {size / 1e9:.2f} GB; it shows what your pictures show. To delete it:"
        )
        lines.append(f"    rm {folder}/*.features {folder}/*.keys")
    print("\n".join(lines), file=sys.stderr)


# ---------------------------------------------------------------- stop and go on


def state_files(prefix, number=0):
    """Return the paths of what --resume needs: facts as JSON, the files, the numbers of a round, of the one before."""
    ends = ".json", "-files.txt", f".{number % 2}.npy", f".{1 - number % 2}.npy"  # by turns
    return [Path(f"{prefix}-resume{end}") for end in ends]


def settings_of(args, recipe, data):
    """Return what must be the same when a run goes on, by the name to show."""
    names = "validation_split group_by_folder seed heavy_augmentation unfreeze class_weight float32 cache_gb".split()
    settings = {name: getattr(args, name) for name in names}
    side = data.store.rows.shape[1]
    settings |= recipe | {"image_size": side, "processes": args.processes}
    # Last, since what a user can give again changes these as well: how another version divides, and its network
    return settings | {
        "split": zlib.crc32(data.validation),
        "network": len(data.labels),
    }


def file_list(args, data):
    """Return a line for each picture used, as UTF-8: the file below data_dir and its SHA-256."""
    names = (
        utils.escape(picture.path.relative_to(args.data_dir).as_posix())
        for picture in data.pictures
    )
    return "\n".join(f"{name} {p.digest.hex()}" for name, p in zip(names, data.pictures)).encode()


def training_variables(run):
    """Return the weights of the trained part and the variables of its optimizer, as Keras variables, in order."""
    top = run.nets.fast.top
    return [*top.weights, *top.optimizer.variables]


def save_state(run, state):
    """Save the state after a whole round. The rename of the JSON is the commit; it names the numbers it belongs to."""
    facts, files, numbers, old = state_files(run.args.model, state["round"])
    flat = np.concatenate(
        [np.asarray(variable, "float32").ravel() for variable in training_variables(run)]
    )
    with utils.atomic_write(numbers) as part:
        np.save(part, flat)
    if not files.exists():
        with utils.atomic_write(files) as part:
            part.write_bytes(file_list(run.args, run.data))
    more = {
        "settings": settings_of(run.args, run.recipe, run.data),
        "number_format": run.nets.number_format,
    }
    with utils.atomic_write(facts) as part:
        part.write_text(
            json.dumps(state | more | {"weights": run.nets.source, "numbers": zlib.crc32(flat)})
        )
    old.unlink(missing_ok=True)


def read_state(args):
    """Return the state of an interrupted run as plain data, or None if there is none. Raises UserError."""
    facts = state_files(args.model)[0]
    if not facts.exists():
        utils.print_line("nothing to resume: starting from the beginning")
        return None
    state = model.parse_json(facts, model.read_capped(facts, model.MAX_JSON * 10))
    if not is_sound(state):
        raise utils.UserError(f"{utils.escape(facts)}: damaged: train again without --resume")
    return state


def is_sound(state):
    """Say whether plain data can be a state that we have saved: what is not printed or used is left out."""
    kinds = dict(
        round=int, stale=int, best=dict, history=list, settings=dict, weights=str, numbers=int
    )
    if not isinstance(state, dict) or not all(
        isinstance(state.get(name), kind) for name, kind in kinds.items()
    ):
        return False
    rows, best = state["history"], state["best"]
    plotted = ("loss", "accuracy", "val_loss", "val_accuracy", "plain_accuracy")
    return (
        len(rows) > 0
        and state.get("number_format") in ("float32", "mixed_bfloat16")
        and 0 <= state["round"] <= 999
        and all(isinstance(best.get(name), int | float) for name in ("round", "right", "loss"))
        and all(isinstance(row, dict) and isinstance(row.get("round"), int) for row in rows)
        and all(
            row.get(name) == "" or isinstance(row.get(name), int | float)
            for row in rows
            for name in plotted
        )
    )


def check_state(args, state, recipe, data):
    """Raise UserError, with the reason, unless the interrupted run had the same data and settings."""
    files = state_files(args.model)[1]
    if not files.exists():
        raise utils.UserError(
            f"{utils.escape(files)}: missing, or of another version: train again without --resume"
        )
    before, now = model.read_capped(files, model.MAX_JSON * 100), file_list(args, data)
    if before != now:  # told first: other pictures can change the recipe, too
        line = min(
            set(before.split(b"\n")) ^ set(now.split(b"\n")), default=b"the order of the files "
        )
        name = utils.escape(line.rpartition(b" ")[0].decode(errors="replace"))[:200]
        raise utils.UserError(
            f"--resume: the data has changed ({name}): train anew without --resume"
        )
    for name, value in settings_of(args, recipe, data).items():
        if state["settings"].get(name) != value:
            raise utils.UserError(
                f"--resume: the interrupted run had other {name.replace('_', ' ')} "
                f"({utils.escape(state['settings'].get(name))[:200]}): give it again, or train anew without --resume"
            )


def restore_weights(run, state):
    """Give the trained part and its optimizer the numbers of the last whole round. Raises UserError."""
    path = state_files(run.args.model, state["round"])[2]
    variables = training_variables(run)
    sizes = [int(np.prod(variable.shape)) for variable in variables]
    try:
        flat = np.load(path, mmap_mode="r", allow_pickle=False)
        good = (
            flat.shape == (sum(sizes),)
            and flat.dtype == "float32"
            and zlib.crc32(flat) == state["numbers"]
        )
    except Exception:  # NumPy's parser raises much
        good = False
    if not good:
        raise utils.UserError(
            f"{utils.escape(path)}: missing or damaged: train again without --resume"
        )
    for variable, numbers in zip(variables, np.split(flat, np.cumsum(sizes)[:-1])):
        variable.assign(numbers.reshape(variable.shape))
    (steps, _), scratch = epoch_size(run), run.nets.full.trunk is None
    epochs = sum(scratch or row["round"] > 0 for row in state["history"])
    if int(run.nets.fast.top.optimizer.iterations) != epochs * steps:
        raise utils.UserError(
            f"{utils.escape(path)}: belongs to another round: train again without --resume"
        )


def remove_state(prefix):
    """Remove what --resume needs, at the end of a run that needs it no more."""
    for path in state_files(prefix):  # the commit first
        path.unlink(missing_ok=True)


# ---------------------------------------------------------------- several processes


def end_with_parent():
    """Wait, in a thread, until the parent's end of the pipe is closed, by a kill say; then end this process."""
    os.read(0, 1)
    os._exit(1)


def find_processes(args):
    """Set args.process and args.processes: which of how many processes of one run this is. Raises UserError."""
    args.process, args.processes = 0, 1
    if args.evaluate or args.dry_run or not os.environ.get(f"{MACHINES}NUM_PROCESSES"):
        return
    try:
        args.processes = int(os.environ[f"{MACHINES}NUM_PROCESSES"])
        args.process = int(os.environ[f"{MACHINES}PROCESS_ID"])
        known = 0 <= args.process < args.processes and os.environ[f"{MACHINES}JOB_ADDRESSES"]
    except (KeyError, ValueError):
        known = False
    if not known:
        raise utils.UserError(
            f"{MACHINES}NUM_PROCESSES, _PROCESS_ID and _JOB_ADDRESSES: set all three, see the README"
        )
    if args.processes > 1 and os.environ.get("KERAS_BACKEND") != "jax":
        raise utils.UserError(
            "several processes need JAX: `pip install jax`, and set KERAS_BACKEND=jax"
        )


def exchange(args, value):
    """Return what every process gave, plain data, as a list in their order. All of them must call it.

    What only the first one knows, it gives to all: `exchange(args, None if args.process else …)[0]`.
    """
    if args.processes == 1:
        return [value]
    model.import_keras()
    from jax.experimental import multihost_utils

    data = np.frombuffer(json.dumps(value).encode(), "uint8")
    sizes = multihost_utils.process_allgather(np.array([len(data)])).ravel()
    rows = multihost_utils.process_allgather(np.resize(data, max(sizes)))
    return [json.loads(row[:size].tobytes()) for row, size in zip(rows, sizes)]


def total(args, array):
    """Return the sum of an array over all processes, in JAX's 32 bits. All of them must call it."""
    if args.processes == 1:
        return array
    from jax.experimental import multihost_utils

    return multihost_utils.process_allgather(array.astype("float32")).sum(axis=0, dtype="float64")


def watch(args):
    """Run this process's part of the work as a child; return its exit code.

    JAX ends its process from C++ when another one is gone: somebody has to be left to say so. The child ends
    with its parent, whose end of a pipe is then closed. Raises UserError.
    """
    child = subprocess.Popen(
        [sys.executable, *sys.argv], stdin=subprocess.PIPE, env=os.environ | {model.CHILD: "1"}
    )
    code = None
    while code is None:
        with contextlib.suppress(
            KeyboardInterrupt
        ):  # the child has it too, and says what is to be said
            code = child.wait()
    if code in (0, 1, 3, 130):
        return code
    raise utils.UserError(LOST)


# ---------------------------------------------------------------- the program


def evaluate(args):
    """Score a saved model on all of data_dir. Writes evaluate.png, model-evaluate.csv and a report."""
    network, info = model.load_model(args.model)
    check_outputs(args)
    labels, side = info["labels"], info["image_size"]
    pictures, skipped, store = read_pictures(args, side)
    strange = sorted({p.label for p in pictures} - set(labels))
    if strange and "unknown" not in labels:
        raise utils.UserError(
            f"{', '.join(strange)}: classes that the model does not know: remove these folders"
        )
    if not pictures:
        raise utils.UserError(
            f"{utils.escape(args.data_dir)}: no pictures: give a folder with a folder for each class"
        )
    utils.print_line(
        f"images: {len(pictures)} to evaluate, {len(labels)} classes, {skipped} skipped"
    )
    actual = np.array([labels.index(p.label if p.label in labels else "unknown") for p in pictures])
    data = Data(pictures, store, None, None, None, np.arange(len(pictures)), labels, actual, None)
    probabilities, accuracy, rows, title = score_saved(args, network, data, "evaluate: accuracy")
    utils.write_csv(f"{args.model}-evaluate.csv", PREDICTION_COLUMNS, rows)
    report.draw_report(f"{args.model}-evaluate-report.png", title, labels, actual, probabilities)
    report.draw_confusion_matrix("evaluate.png", args.model, title, labels, actual, probabilities.argmax(1),
                      lambda i: store.rows[pictures[i].row])  # fmt: skip
    return gate(args, accuracy)


def gate(args, accuracy):
    """Return the exit code: 3 if the accuracy that was asked for was not reached."""
    if args.min_accuracy is None or accuracy >= args.min_accuracy:
        return 0
    print(f"accuracy {accuracy:.4f} is below --min-accuracy {args.min_accuracy}", file=sys.stderr)
    return 3


def make_recipe(args, scratch, count, classes):
    """Return the recipe for so many training pictures and classes: what the options say, else the defaults. A dict."""
    defaults = FROM_SCRATCH if scratch else FINE_TUNING
    recipe = {name: getattr(args, name, value) for name, value in defaults.items()}
    steps = -(-count // recipe["batch_size"])
    for name, (least, a_class) in LEAST_STEPS.items() if scratch else ():
        if name not in args:
            recipe[name] = max(recipe[name], -(-max(least, a_class * classes) // steps))
    recipe["fresh"] = recipe["round_epochs"] if scratch else 1  # new views of each picture a round
    if not scratch and not args.unfreeze:
        recipe["rounds"] = 0
    recipe["first"] = 0 if scratch or not recipe["rounds"] else 1  # round with augmented views
    return recipe


def train(args):
    """The whole way: folder → pictures → split → networks → rounds → report. Returns the exit code."""
    import cv2  # noqa: F401 - if it is missing, that is said now and not after reading

    path, warnings = find_weights(args)
    for line in warnings:
        utils.warn(line)
    scratch = path is None
    if len(set(exchange(args, scratch))) > 1:
        raise utils.UserError(
            "--weights auto: not every process could have the weights: give their file to --weights"
        )
    if scratch and args.unfreeze != UNFREEZE:
        utils.warn("--unfreeze is ignored: from scratch, every layer is trained")
    state = read_state(args) if args.resume else None
    if state and state["weights"] != source_of(path):
        raise utils.UserError(
            f"--resume: the interrupted run had other --weights ({utils.escape(state['weights'])}): give these again"
        )
    data = read_data(args, args.image_size or (96 if scratch else 224))
    recipe = make_recipe(args, scratch, len(data.train), len(data.labels))
    if state:
        check_state(args, state, recipe, data)
    nets = build_networks(
        args, path, len(data.labels), data.store.rows.shape[1], state and state["number_format"]
    )
    run = Run(args, recipe, data, nets, open_rings(args, data, nets, recipe))
    state = train_rounds(run, state)
    accuracy = exchange(args, None if args.process else finish_run(run, state))[0]
    if args.process == 0:
        remove_state(args.model)
    for line in warnings:
        utils.warn(line)
    return gate(args, accuracy)


def main():
    """Read the command line and do what it asks for; several processes each do it in a child. Returns the exit code."""
    args = parse_arguments()
    if not args.data_dir.is_dir():  # before any weights are looked for
        raise utils.UserError(
            f"{utils.escape(args.data_dir)}: no such folder: give one with a folder for each class"
        )
    if args.dry_run:
        read_data(args, args.image_size or 75)
        return 0
    if args.evaluate:
        return evaluate(args)
    if args.processes > 1:
        if model.CHILD not in os.environ:
            return watch(args)
        threading.Thread(target=end_with_parent, daemon=True).start()
    if args.process:
        sys.stdout = open(os.devnull, "w")
    return train_alone(args)


def train_alone(args):
    """Train where no other run is at work with the same prefix or cache. Returns the exit code."""
    try:
        check_outputs(args)
        with contextlib.ExitStack() as locks:
            if args.process == 0:
                locks.enter_context(utils.file_lock(f"{args.model}.lock"))
                remove_unfinished(args.model)
            if args.cache_dir:
                locks.enter_context(utils.file_lock(args.cache_dir / f"cache-{args.process}.lock"))
            return train(args)
    except KeyboardInterrupt:
        if state_files(args.model)[0].exists():
            print(
                "The best whole round is saved; the command that began it, with --resume, goes on.",
                file=sys.stderr,
            )
        raise
    except RuntimeError as error:  # what JAX raises when a connection breaks
        if args.processes == 1:
            raise
        raise utils.UserError(f"{LOST} ({utils.escape(error)[:100]})") from None


if __name__ == "__main__":
    try:
        utils.run(main)
    except SystemExit as end:
        if (
            end.code and model.CHILD in os.environ
        ):  # JAX would first wait for the others, who may be gone
            os._exit(end.code)
        raise
