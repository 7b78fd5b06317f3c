# /// script
# requires-python = ">=3.11,<3.14"
# dependencies = [
#     "tensorflow>=2.21,<2.22",
#     "keras>=3.15.1,<4",
#     "numpy>=2.0",
#     "scipy>=1.14",
#     "pillow>=13.0",
#     "opencv-python>=4.10,<5",
#     "av>=18",
#     "matplotlib>=3.9",
#     "pillow-heif>=1.0",
#     "tqdm>=4.66",
#     "filelock>=3.12",
#     "defusedxml>=0.7",
# ]
# ///
"""Teach a ready-made network (InceptionV3) your own classes from folders of pictures.

    python train.py people model
    python train.py people model --weights none --image-size 75
    python train.py held_out model --evaluate

people/<class>/**/<picture> is read once, and the frozen part of the network runs once over each
picture. A closed-form fit to several of its levels gives a first model; rounds of fine-tuning
follow while they help. Leaves model.h5, model.json and model-labels.json, and after every round a
confusion matrix made of the pictures: 000.png, 001.png…
"""

import argparse
import contextlib
import datetime
import difflib
import functools
import glob
import hashlib
import itertools
import json
import os
import re
import shlex
import socket
import subprocess
import sys
import tempfile
import threading
import time
import timeit
import unicodedata
from collections import Counter, defaultdict, namedtuple
from pathlib import Path

import utils  # first: it says which Python and packages are needed

# isort: split
import imaging
import model
import readout
import report

# isort: split
import numpy as np
from PIL import Image

# ---------------------------------------------------------------- settings

heavy_augmentation = True  # False for pictures that all look the way your camera will see them
Augmentation = namedtuple("Augmentation", "rotation shift zoom colour")
# degrees, share of the side, factor, of 255
HEAVY = Augmentation(rotation=45, shift=0.25, zoom=(0.5, 1.5), colour=25)
LIGHT = Augmentation(rotation=0, shift=0.125, zoom=(1.0, 1.0), colour=0)

FINE_TUNING = {
    "head_epochs": 5,
    "rounds": 2,
    "round_epochs": 2,
    "patience": 1,
    "views": 1,
    "batch_size": 32,
}
FROM_SCRATCH = FINE_TUNING | {"rounds": 5, "round_epochs": 4, "patience": 3, "views": 7}
# From scratch, rounds of small sets have more epochs: at least so many steps, and so many a class.
MIN_STEPS, MIN_STEPS_A_CLASS = 40, 3
# From scratch, no training follows if leave-one-out has this accuracy before it: rounds take
# minutes, and the first ones know less than a readout of random features.
GOOD_ENOUGH = 0.95
UNFREEZE = 2  # top blocks that are fine-tuned
HEAD_RATE = 1e-3  # learning rate of the new dense layers on their own
ROUND_RATE = 7e-4  # peak for the top blocks
SCRATCH_RATE = 1e-3  # peak for a whole network
WARM_UP = 0.1  # share of the steps in which the rate rises to its peak
WEIGHT_DECAY = 1e-2
LABEL_SMOOTHING = 0.1
SCRATCH_MOMENTUM = 0.9  # of batch normalisation: the default 0.99 lags behind on so few steps

MAX_GRID_PICTURES = 3_000  # that train: with more, levels are read without cells and mirror images
TRAINED_SHARES = (0.25, 0.5, 0.75, 1.0)  # of the trained layer's logits; validation chooses
REVIEW_SHOWN = 40

INFERENCE_BATCH = 16  # pictures; 64 is no faster on a CPU, and wastes more of a last batch
DEVICE_BATCH = 256  # the same on a GPU, for pictures of up to 224 pixels; fewer of larger ones
CACHE_VERSION = 4  # raise it when the same settings begin to give other features
CACHE_GB = 20.0
MAX_RATIO = 2  # longer side to shorter: beyond it a centre square shows too little
MAX_DIFFERING_BITS, MIN_CORRELATION = 4, 0.95  # of near copies
THUMBNAIL = 16  # pixels
FLAT = 20  # of 255: a picture with fewer shades of grey shows nothing
FEW_VALIDATION = 30
MAX_TABLE = 20  # classes that are listed before training
WORTH_ROUNDING = 1.3  # bfloat16 has to be this much faster to be worth its rounding
DOWNLOAD_SECONDS = 15
FACE_SIDES = (0.35, 0.75)  # of a picture: a face box in a crop of the tagger's framing
FACE_SAMPLE = 100  # pictures in which faces are looked for
MATRICES = "[0-9][0-9][0-9].png"
# Names of the folders of sets that are divided already, in any case.
DIVIDED = {"train", "training"}, {"val", "valid", "validation"}, {"test", "testing"}
LOST = "another process of this run has ended or cannot be reached: start all again with --resume"
DISTRIBUTION = "KERAS_DISTRIBUTION_"  # begins the variables of a run on several machines
UNAUGMENTED, MIRRORED, FIRST_RANDOM = 0, 1, 2  # numbers of views
VALIDATION_VIEW = 10**6  # number of the augmented view of validation pictures
# Of the parameters of an augmentation; and how many there are, and chances that they come from.
MATRIX, COLOUR = slice(0, 6), slice(6, 9)
PARAMETERS, CHANCES = 9, 9

Picture = namedtuple("Picture", "path label digest dhash thumbnail row")  # row of the pixels
DiskArray = namedtuple("DiskArray", "file rows")
# train, validation: indices of pictures; local: those of train that this process trains on;
# largest_shard: how many the process with most trains on; groups: number of each picture's group;
# copies: pairs of indices of equal or near copies under two classes
Data = namedtuple(
    "Data",
    "pictures pixels labels targets train local largest_shard validation weights groups copies",
)
Scored = namedtuple("Scored", "pictures pixels labels targets")  # all that scoring needs of Data
View = namedtuple("View", "rows row_of")  # structured array; {picture: row} as an int array
# base: float32, never trained; exact, fast: compiled frozen parts of it, see model.frozen_part
Networks = namedtuple("Networks", "base exact fast settings")
# network: a twin of the base, which is saved; top, hidden: what is trained of it
Trained = namedtuple("Trained", "network top hidden")
# cut: last frozen layer, None from scratch; levels: of the base; augment: None on the cores
Settings = namedtuple("Settings", "cut levels has_grids map_shape augment batch number_format "
                      "source devices distribution_scope")  # fmt: skip
# views: {number: View}; readouts: {0, 1 or "frozen": Readout}, as they are made
Run = namedtuple("Run", "args recipe data networks views readouts")
# pictures: index of that of each row; strangers: see measure_strangers
Readout = namedtuple("Readout", "fit rows pictures views strangers", defaults=[None])
# network: the one that is saved; kernel, bias: of its last layer; probabilities: of validation
Candidate = namedtuple("Candidate", "network kernel bias probabilities trained_share")
Prediction = namedtuple("Prediction", "file actual predicted probability")
Scores = namedtuple("Scores", "probabilities accuracy predictions title")


# ---------------------------------------------------------------- arguments
# What changes the result belongs in resume_settings, what changes the features in cache_name.


def parse_arguments(argv=None):
    """Read the command line. Options that depend on the kind of training may be absent."""
    parser = argparse.ArgumentParser(
        description="Fine-tune InceptionV3 on data_dir/<class>/**/<picture>.",
        epilog="example: python train.py people model --no-heavy-augmentation --rounds 20. GPUs "
        "and several machines are used with KERAS_BACKEND=jax (see README.md).",
    )
    parser.add_argument("data_dir", type=Path, help="a folder with a folder for each class")
    parser.add_argument("model", help="prefix of the files: model.h5, model.json…")

    def option(name, text, shown="%(default)s", **settings):
        parser.add_argument(f"--{name}", help=f"{text} (default: {shown})", **settings)

    def flag(name, text):
        option(name, text, "off", action="store_true")

    number = utils.number
    weights = "auto (imagenet if it can be had, else none), imagenet, none, or a notop FILE"
    option("weights", weights, default="auto")
    option("image-size", "side in pixels", "224; 96 from scratch", type=number(int, 75, 1024))

    def share(text):
        """Turn what was typed into a share; who types 20 means percent."""
        if float(text) > 1:
            raise argparse.ArgumentTypeError(f"{text} is no share: say 0.2 for 20 %")
        return number(float, 1e-6, 1 - 1e-6)(text)

    option("validation-split", "share of each class kept for validation", "0.2", type=share)
    flag("group-by-folder", "keep files of one folder on one side of the split")
    option("seed", "same seed, same split and result", type=number(int, 0, 2**31), default=1337)
    option("heavy-augmentation", "turn, shift, zoom, tint and flip; or only shift and flip",
           default=heavy_augmentation, action=argparse.BooleanOptionalAction)  # fmt: skip
    for name, text, low, high in (
        ("head-epochs", "epochs for the new dense layers", 1, 10**6),
        ("rounds", "rounds of fine-tuning, all of them made if given", 0, 999),
        ("round-epochs", "epochs a round", 1, 10**6),
        ("patience", "rounds without improvement before stopping, 0: never", 0, 10**6),
        ("views", "augmented views of each picture at the start", 1, 10**6),
        ("batch-size", "pictures a training step", 1, 10**6),
    ):
        key = name.replace("-", "_")
        shown = f"{FINE_TUNING[key]}; {FROM_SCRATCH[key]} from scratch"
        option(name, text, shown, type=number(int, low, high), default=argparse.SUPPRESS)
    blocks = number(int, 0, len(model.BASE.blocks) - 1)
    option("unfreeze", "top blocks that are fine-tuned", type=blocks, default=UNFREEZE)
    option("cache-dir", "keep the cache here for the next run", "a temporary file", type=Path)
    option("cache-gb", "size of the cache", type=number(float, 1e-6, 1e6), default=CACHE_GB)
    flag("float32", "never use bfloat16, faster or not")
    flag("fit-all", "fit the readout of the saved model once more, on validation pictures too")
    flag("class-weight", "weigh classes by 1/frequency")
    flag("resume", "go on from the last whole round after a stop or a kill")
    flag("evaluate", "no training: score the saved model on all of data_dir")
    option("min-accuracy", "exit 3 if it is lower", "none", type=number(float, 0, 1))
    flag("dry-run", "read and summarise the data, write nothing")
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        known = re.findall(r"--[a-z0-9-]+", parser.format_help())
        near = difflib.get_close_matches(unknown[0].partition("=")[0], known, 1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        parser.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")
    if not args.model.endswith(("/", os.sep)):
        args.model = Path(args.model).as_posix()  # `./model` is `model`
    find_processes(args)
    return args


# ---------------------------------------------------------------- folder → file list


def find_division(data_dir):
    """Return ({part: folder}, test folder or None) of a divided set, else None twice.

    Such a set has a folder called train and one called val or test, which share class folders.
    Without a val folder, train is what is to be divided.
    """
    folders = {path.name.casefold(): path for path in list_folders(data_dir)}
    parts = [next((folders[name] for name in sorted(names & folders.keys())), None)
             for names in DIVIDED]  # fmt: skip
    classes = [{label_of(p.name) for p in list_folders(part)} if part else set() for part in parts]
    if not classes[0] & (classes[1] | classes[2]):
        return None, None
    found = {"train": parts[0]} | ({"validation": parts[1]} if classes[1] else {})
    return found, parts[2]


def find_parts(data_dir):
    """Return ([(path, label, part)], parts, test folder) of all files; parts: see find_division.

    A class that only validation has is left out. Warns of what is left out, or is not tested.
    """
    parts, test = find_division(data_dir)
    roots = parts or {"all": data_dir}
    files = [(*file, part) for part, root in roots.items() for file in find_files(root)]
    if parts:
        for path in sorted(set(list_folders(data_dir)) - {*parts.values(), test}):
            utils.warn(f"{utils.escape(path)}: left out, since {parts['train'].name} has classes")
    if not parts or "validation" not in parts:
        return files, parts, test
    trained, tested = ({label for _, label, part in files if part == name} for name in parts)
    for label in sorted(trained - tested):
        utils.warn(f"{label}: not tested, since {utils.escape(parts['validation'])} has none")
    for label in sorted(tested - trained):
        utils.warn(f"{label}: left out, since {utils.escape(parts['train'])} has none")
    return [file for file in files if file[1] in trained], parts, test


def list_folders(folder):
    """Return the folders in a folder that people mean."""
    return [p for p in folder.iterdir() if os.path.isdir(p) and not utils.is_ignored(p.name)]


def find_files(data_dir):
    """Return [(path, label)] of everything below data_dir/<class>/; labels are printable, and NFC.

    Warns about files beside the class folders, classes without files, and links not followed.
    """
    left_out = []
    found = [(p, p.relative_to(data_dir).parts) for p in utils.list_files(data_dir, left_out)]
    files = [(path, label_of(parts[0])) for path, parts in found if len(parts) > 1]
    name, loose = utils.escape(data_dir), len(found) - len(files)
    if loose:
        beside = utils.count(loose, "file lies", "files lie")
        utils.warn(f"{name}: {beside} beside the class folders and cannot be used")
    outside = [path for path in left_out if not utils.is_clouded(path.name)]
    clouded = len(left_out) - len(outside)
    if outside:
        links = utils.count(len(outside), "link leads", "links lead")
        are = "is" if len(outside) == 1 else "are"
        example = utils.escape(outside[0])
        utils.warn(f"{name}: {links} out of it or in a circle and {are} not followed: {example}")
    if clouded:
        there = utils.count(clouded, "picture is", "pictures are")
        utils.warn(f"{name}: {there} in iCloud only: download them first")
    folders = {label_of(path.name) for path in list_folders(data_dir)}
    for label in sorted(folders - {label for _, label in files}):
        utils.warn(f"{name}/{label}: a class without files is left out")
    return files


def label_of(folder):
    """Return the class name of a folder's: one spelling, fit for terminal, file name and CSV."""
    return utils.escape(unicodedata.normalize("NFC", folder))


def in_batches(items, size):
    """Divide a sequence into pieces of so many, in order; the last one may have fewer."""
    return [items[i : i + size] for i in range(0, len(items), size)]


def read_pictures(args, files, side):
    """Decode files once, in parallel, to squares of that side in pixels.

    files: [(path, label)]. With several processes each reads its share and tells the others.
    Returns ([Picture], number skipped, DiskArray of the squares or None in a dry run).
    """
    pixels = None
    if not args.dry_run:
        pixels = temporary_array(args, (max(1, len(files)), side, side, 3), "uint8")
    local = range(args.process, len(files), args.processes)
    few = in_batches(local, min(8, max(1, 2**19 // side**2)))  # one by one, threads wait more
    read = utils.ordered_parallel_map(
        lambda some: [read_picture(files[row][0], side) for row in some], few
    )
    results = itertools.chain.from_iterable(read)
    found = []
    for row, (square, facts) in zip(local, utils.progress(results, len(local), "reading")):
        if square is not None and pixels is not None:
            write_rows(pixels, [row], square[None])
        found.append((row, facts))
    pictures, skipped, flaws = [], defaultdict(list), defaultdict(list)
    for row, facts in sorted(itertools.chain(*all_gather(args, found)), key=lambda pair: pair[0]):
        path, label = files[row]
        if "reason" in facts:
            skipped[facts["reason"]].append(path)
            continue
        thumbnail = np.frombuffer(bytes.fromhex(facts["thumbnail"]), "uint8")
        digest, dhash = bytes.fromhex(facts["digest"]), int(facts["dhash"], 16)
        pictures.append(Picture(path, label, digest, dhash, thumbnail, row))
        if facts["flaw"]:
            flaws[facts["flaw"]].append(path)
    imaging.warn_about_skipped(skipped)
    for flaw, paths in flaws.items():
        few = utils.count(len(paths), "picture is", "pictures are")
        utils.warn(f"{utils.escape(paths[0])}…: {few} {flaw}, but used")
    for label in sorted({label for _, label in files} - {picture.label for picture in pictures}):
        utils.warn(f"{label}: none of its files is a picture that can be used")
    return pictures, len(files) - len(pictures), pixels


def read_picture(path, side):
    """Read one file. Returns (uint8 (side, side, 3) or None if there is no picture, facts as dict).

    facts: {"reason"} why there is no picture; or SHA-256, difference hash and thumbnail in
    hexadecimal, and a "flaw" that deserves a warning, or None.
    """
    import cv2

    try:
        data, image = imaging.read_picture(path)
        shorter = min(image.size)
        if max(image.size) > MAX_RATIO * shorter:
            return None, {"reason": "the longer side is more than twice the shorter one"}
        pixels = imaging.to_model_input(image, side)
    except imaging.PictureError as error:
        return None, {"reason": imaging.skip_reason(error, path)}
    grey = cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY)
    small = cv2.resize(grey, (9, 8), interpolation=cv2.INTER_AREA)
    thumbnail = cv2.resize(grey, (THUMBNAIL, THUMBNAIL), interpolation=cv2.INTER_AREA)
    flaw = None
    if int(grey.max()) - int(grey.min()) < FLAT:
        flaw = "of one colour"
    elif shorter < side / 2:
        flaw = f"less than half as large as the {side} pixels that are looked at"
    return pixels, {
        "digest": hashlib.sha256(data).hexdigest(),
        "dhash": np.packbits(small[:, 1:] > small[:, :-1]).tobytes().hex(),
        "thumbnail": thumbnail.tobytes().hex(),
        "flaw": flaw,
    }


# ---------------------------------------------------------------- file list → split


def find_near_copies(pictures):
    """Return pairs of indices of pictures that nearly look alike, or are equal.

    At most MAX_DIFFERING_BITS of their difference hashes differ, so one of the five parts of the
    hash is equal: only pictures that share a part are compared, each with few others at most.
    """
    hashes = np.array([picture.dhash for picture in pictures], "uint64")
    thumbnails = normalise_rows(np.array([picture.thumbnail for picture in pictures], "float32"))
    pairs = set()
    for shift in range(0, 65, 13):
        part = (hashes >> np.uint64(shift)) & np.uint64(2**13 - 1)
        order = np.lexsort((hashes, part))
        for step in range(1, 17):  # neighbours in this order
            one, other = order[:-step], order[step:]
            bits = np.bitwise_count(hashes[one] ^ hashes[other])
            near = (part[one] == part[other]) & (bits <= MAX_DIFFERING_BITS)
            one, other = one[near], other[near]
            alike = (thumbnails[one] * thumbnails[other]).sum(1) > MIN_CORRELATION
            pairs |= {(int(min(p)), int(max(p))) for p in zip(one[alike], other[alike])}
    return sorted(pairs)


def normalise_rows(rows):
    """Return rows with mean 0 and length 1, so that their products are correlations."""
    rows = rows - rows.mean(1, keepdims=True)
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-6)


def group_pictures(pictures, data_dir, by_folder, depth=1):
    """Return (sets of indices that stay together, pairs under two classes, number of near copies).

    Together stay equal bytes, near copies within a class and, with by_folder, one folder. depth: of
    the class folders. Where near copies tie all folders of a class together, so that it could not
    be tested, its folders alone decide, with a warning.
    """
    keys = [[picture.digest] for picture in pictures]
    for picture, own in zip(pictures, keys):
        inner = picture.path.relative_to(data_dir).parent
        if by_folder and len(inner.parts) > depth:
            own.append(inner)
    first = {}
    twins = ((first.setdefault(picture.digest, i), i) for i, picture in enumerate(pictures))
    pairs = {*find_near_copies(pictures), *(pair for pair in twins if pair[0] != pair[1])}
    copies = {pair for pair in pairs if len({pictures[i].label for i in pair}) > 1}
    near = sorted(pairs - copies)
    groups = merge(keys, near)
    if by_folder:
        tied = tied_classes(pictures, groups) - tied_classes(pictures, merge(keys, []))
        for label in sorted(tied):
            utils.warn(f"{label}: all its folders share near copies: the accuracy is too good")
        near = [(i, j) for i, j in near
                if pictures[i].label not in tied or keys[i][1:] == keys[j][1:]]  # fmt: skip
        groups = merge(keys, near)
    return groups, sorted(copies), len(set(itertools.chain(*near)))


def merge(keys, pairs):
    """Return sets of indices that belong together: those that share a key, and those of pairs."""
    from scipy.cluster.hierarchy import DisjointSet

    together, first = DisjointSet(range(len(keys))), {}
    for i, own in enumerate(keys):
        for key in own:
            together.merge(i, first.setdefault(key, i))
    for one, other in pairs:
        together.merge(one, other)
    return together.subsets()


def tied_classes(pictures, groups):
    """Return the classes that cannot be tested: each of their groups has most of the class."""
    sizes, testable = Counter(picture.label for picture in pictures), set()
    for group in groups:
        members = Counter(pictures[i].label for i in group)
        testable |= {label for label, count in members.items() if 2 * count <= sizes[label]}
    return set(sizes) - testable


def warn_about_copies(pictures, copies):
    """Warn about equal or near copies under two classes, and say what is done with them."""
    for one, other in copies[: imaging.MAX_LINES]:
        kind = "the same bytes as"
        if pictures[one].digest != pictures[other].digest:
            kind = "looks the same as"
        paths = (utils.escape(pictures[i].path) for i in (other, one))
        first, second = paths
        utils.warn(f"{first}: {kind} {second}, of another class; both are used: move one away")
    if len(copies) > imaging.MAX_LINES:
        more = len(copies) - imaging.MAX_LINES
        utils.warn(f"{more} more pairs of copies under two classes")


def split(pictures, groups, fraction, seed):
    """Divide into training and validation, stratified; groups stay whole. Returns index arrays.

    Groups are ordered by a hash of seed and content, so that added pictures move only those at the
    boundary. Each class gives max(1, round(n * fraction)) pictures, never its last group, nor one
    that has most of its pictures. Raises UserError if no class can be divided.
    """
    digests = [min(pictures[i].digest for i in group) for group in groups]
    rank = [hashlib.sha256(f"{seed}:{digest.hex()}".encode()).digest() for digest in digests]
    members = [Counter(pictures[i].label for i in group) for group in groups]
    sizes = sum(members, Counter())
    left = Counter(label for counts in members for label in counts)  # groups that still train
    of_class = defaultdict(list)
    for group, counts in enumerate(members):
        for label in counts:
            of_class[label].append(group)
    chosen, taken = set(), Counter()
    for label in sorted(sizes):
        wanted = max(1, round(sizes[label] * fraction))
        for group in sorted(of_class[label], key=rank.__getitem__):
            is_free = group not in chosen and all(
                left[other] > 1 and 2 * number <= sizes[other]
                for other, number in members[group].items()
            )
            if taken[label] < wanted and is_free:
                chosen.add(group)
                taken += members[group]
                left -= Counter(members[group].keys())
        if not taken[label]:
            utils.warn(
                f"{label}: not tested, since all its pictures belong together (near copies, or "
                "one folder with --group-by-folder): add pictures of another time or place"
            )
    if not chosen:
        raise utils.UserError("no class can be divided: add other pictures to each class")
    validation = sorted(i for group in chosen for i in groups[group])
    return np.setdiff1d(np.arange(len(pictures)), validation), np.array(validation)


def warn_about_data(args, pictures, validation):
    """Warn about what makes a result poor or its score too good."""
    sizes = Counter(picture.label for picture in pictures)
    for label, size in sorted(sizes.items()):
        if size < utils.FEW_PICTURES:
            there, enough = utils.count(size, "picture"), utils.FEW_PICTURES
            utils.warn(f"{label}: only {there}: {enough} or more are reliable")
    (most, large), *_, (least, small) = sizes.most_common()
    if large > 20 * small:
        times = f"{large / small:.0f} times as many pictures as {least}"
        utils.warn(f"{most}: {times}: even them out or use --class-weight")
    if len(validation) < FEW_VALIDATION:
        there = utils.count(len(validation), "validation picture")
        utils.warn(f"only {there}: the accuracy is a rough figure")
    films = sum(CROP_NAME.fullmatch(picture.path.name) is not None for picture in pictures)
    if films > len(pictures) / 2 and not args.group_by_folder:
        utils.warn(
            f"{utils.escape(args.data_dir)}: crops of films: frames of one film lie on both sides "
            "of the split, which flatters the accuracy: use --group-by-folder"
        )


CROP_NAME = re.compile(r"\d{6}-\d+-[0-9a-f]{10}\.jpg")  # as --save-faces names them


def print_table(pictures, labels, groups, validation):
    """Print how many pictures and groups each class has, and how they are divided."""
    held = set(validation.tolist())
    total = Counter(picture.label for picture in pictures)
    tested = Counter(pictures[i].label for i in held)
    together = {label: set() for label in labels}
    for picture, group in zip(pictures, groups.tolist()):
        together[picture.label].add(group)
    utils.print_line("pictures  groups  train  validation  class")
    for label in labels:
        n, v = total[label], tested[label]
        utils.print_line(f"{n:8}  {len(together[label]):6}  {n - v:5}  {v:10}  {label}")


def read_data(args, side):
    """Read and divide data_dir. Prints the `images:` line. Returns Data. Raises UserError."""
    files, parts, test = find_parts(args.data_dir)
    check_labels(args, sorted({label for _, label, _ in files}))
    pictures, skipped, pixels = read_pictures(args, [file[:2] for file in files], side)
    labels = sorted({picture.label for picture in pictures})
    check_labels(args, labels)
    depth = 2 if parts else 1
    groups, copies, near = group_pictures(pictures, args.data_dir, args.group_by_folder, depth)
    group_of = np.zeros(len(pictures), int)
    for number, group in enumerate(groups):
        group_of[list(group)] = number
    is_divided = bool(parts) and "validation" in parts
    if is_divided:
        is_validation = np.array([files[p.row][2] == "validation" for p in pictures])
        train, validation = np.flatnonzero(~is_validation), np.flatnonzero(is_validation)
        if not len(train) or not len(validation):
            raise utils.UserError(f"{utils.escape(args.data_dir)}: a part without pictures")
    else:
        train, validation = split(pictures, groups, args.validation_split or 0.2, args.seed)
    utils.print_line(
        f"images: {len(train)} train, {len(validation)} validation, {len(labels)} classes, "
        f"{skipped} skipped"
    )
    if parts:
        names = " and ".join(sorted(path.name for path in parts.values()))
        rest = f"; {test.name} is left alone, for --evaluate" if test else ""
        utils.print_line(f"{'divided as' if is_divided else 'read from'} {names}{rest}")
    leaked = int(np.isin(group_of[validation], group_of[train]).sum())
    if leaked:
        there = utils.count(leaked, "validation picture has", "validation pictures have")
        utils.warn(f"{there} near copies among those that train, which flatters the accuracy")
    elif near:
        utils.print_line(f"near copies: {near} pictures stay with theirs")
    if args.dry_run or len(labels) <= MAX_TABLE:
        print_table(pictures, labels, group_of, validation)
    warn_about_copies(pictures, copies)
    warn_about_data(args, pictures, validation)
    return make_data(args, pictures, pixels, train, validation, labels, group_of, copies)


def check_folders(args):
    """Raise UserError unless there are two class folders at least; cheap, nothing is read."""
    parts, _ = find_division(args.data_dir)
    if parts and "validation" in parts and args.validation_split:
        name = utils.escape(args.data_dir)
        raise utils.UsageError(f"--validation-split: {name} is divided already: leave it out")
    if not parts:
        check_labels(args, sorted(label_of(path.name) for path in list_folders(args.data_dir)))


def check_labels(args, labels):
    """Raise UserError for class names, or a number of them, that no model can have."""
    if len(labels) < 2:
        hint = "make a folder for each class"
        if not labels and any(path.is_file() for path in args.data_dir.iterdir()):
            hint = f"did you mean {utils.escape(args.data_dir.resolve().parent)}?"
        name = utils.escape(args.data_dir)
        raise utils.UserError(f"{name}: fewer than two classes with pictures: {hint}")
    if len(labels) > model.MAX_CLASSES:
        raise utils.UserError(f"{len(labels):,} classes: use at most {model.MAX_CLASSES:,}")
    longest = max(labels, key=len)
    if len(longest) > model.MAX_LABEL:  # as escaped: an undecodable byte takes six characters
        raise utils.UserError(f"{longest[:60]}…: too long for a class name: rename the folder")
    if len(json.dumps(labels)) > model.MAX_LABELS:
        raise utils.UserError(f"{len(labels):,} classes with such long names: shorten the names")


def make_data(args, pictures, pixels, train, validation, labels, groups, copies):
    """Return the Data of this process. Raises UserError if there are too many processes."""
    owner = np.array([picture.row % args.processes for picture in pictures])
    shards = np.bincount(owner[train], minlength=args.processes)
    if not shards.all():
        n = len(train)
        raise utils.UserError(f"{args.processes} processes are too many for {n} pictures")
    if args.process == 0:  # it scores, so it needs what others have read
        for i in validation[owner[validation] != 0]:
            square, facts = read_picture(pictures[i].path, pixels.rows.shape[1])
            if square is None:
                path = utils.escape(pictures[i].path)
                raise utils.UserError(f"{path}: has changed meanwhile: {facts['reason']}")
            write_rows(pixels, [pictures[i].row], square[None])
    targets = np.array([labels.index(picture.label) for picture in pictures])
    weights = np.ones(len(pictures), "float32")
    if args.class_weight:
        frequency = np.bincount(targets[train], minlength=len(labels))
        weights = (len(train) / len(labels) / np.maximum(1, frequency))[targets].astype("float32")
    local = train[owner[train] == args.process]
    return Data(pictures, pixels, labels, targets, train, local, int(shards.max()), validation,
                weights, groups, copies)  # fmt: skip


# ---------------------------------------------------------------- arrays on disk


def cache_folder(args):
    """Return where the cache lies: in --cache-dir, else beside the model."""
    return args.cache_dir or Path(args.model).parent


def temporary_array(args, shape, dtype):
    """Open an array in a file without a name, which vanishes with the process, kills included.

    It is written by ordinary writes, and read through a memory map.
    """
    file = tempfile.TemporaryFile(dir=cache_folder(args), buffering=0)
    return map_array(file, shape, dtype)


def map_array(file, shape, dtype):
    """Return the DiskArray in an open file, which takes no space before it is written."""
    file.truncate(int(np.prod(shape)) * np.dtype(dtype).itemsize)
    return DiskArray(file, np.memmap(file, dtype, "r", shape=tuple(shape)))


def write_rows(array, rows, values):
    """Write rows of a DiskArray; a full disk is an OSError here, and never a crash in the map."""
    values = np.ascontiguousarray(values, array.rows.dtype)
    breaks = np.flatnonzero(np.diff(rows) != 1) + 1
    for first, some in zip(np.array(rows)[[0, *breaks]], np.split(values, breaks)):
        data = memoryview(some.view("uint8").reshape(-1))
        array.file.seek(int(first) * values[0].nbytes)
        while data:
            data = data[array.file.write(data) :]


# ---------------------------------------------------------------- pictures → views


def augmentation_parameters(args, side, digests, view):
    """Return how one view of pictures with these digests differs from them: (n, PARAMETERS).

    MATRIX: from a view's coordinates (x, y, 1) in pixels to those of its picture, row by row;
    COLOUR: what is added to R, G and B, of 255. Chance is a hash of (seed, view, picture) alone.
    Draw new chances last, so that the others stay; view_settings tells versions apart.
    """
    parameters = np.zeros((len(digests), PARAMETERS))
    if view in (UNAUGMENTED, MIRRORED):
        identity, mirror = (1, 0, 0, 0, 1, 0), (-1, 0, side - 1, 0, 1, 0)
        parameters[:, MATRIX] = identity if view == UNAUGMENTED else mirror
        return parameters
    kind = HEAVY if args.heavy_augmentation else LIGHT
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
    """Return all that views are made of, plain data: what the cache and --resume compare."""
    kind = HEAVY if args.heavy_augmentation else LIGHT
    return [CACHE_VERSION, args.seed, *kind]


def augment(picture, parameters):
    """Return a turned, shifted, zoomed, tinted and maybe flipped copy of uint8 (side, side, 3).

    parameters: a row of `augmentation_parameters`. A new kind of change belongs into
    `build_augmentation`, too, which does the same on a GPU.
    """
    import cv2

    size, matrix = picture.shape[1::-1], parameters[MATRIX].reshape(2, 3)
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
    settings, rows = run.networks.settings, run.data.pixels.rows
    pictures = [run.data.pictures[i] for i in indices]
    places = [picture.row for picture in pictures]
    digests = [picture.digest for picture in pictures]
    parameters = augmentation_parameters(run.args, rows.shape[1], digests, view)
    if settings.augment is None:
        if view == UNAUGMENTED:
            return rows[places]
        return np.stack([augment(rows[place], p) for place, p in zip(places, parameters)])
    size = settings.batch
    filled = [rows[np.resize(places, size)], np.resize(parameters, (size, PARAMETERS))]
    return model.predict_batch(settings.augment, filled)[: len(indices)]


# ---------------------------------------------------------------- views → cached features


def list_views(run, round_number):
    """Return the numbers of the views that a round trains on, of which the cache holds the latest.

    A picture as it is, its mirror image, and then random ones; from scratch, where a view costs
    next to nothing, fresh ones each round.
    """
    recipe = run.recipe
    last = recipe["views"] + (round_number - 1) * recipe["fresh"] if round_number else 0
    room = views_that_fit(run)
    views = list(range(last + 1))
    return views if len(views) <= room else views[:1] + views[len(views) - room + 1 :]


def row_type(run, has_levels):
    """Return the dtype of a row of a view's file: digest, levels, feature map at the cut.

    exact: whether these are of the float32 network.
    """
    settings, recipe = run.networks.settings, run.recipe
    fields = [("digest", "V32"), ("exact", "?")]
    if has_levels:
        fields.append(("levels", "float32", (settings.levels[-1].units.stop,)))
    if recipe["rounds"]:
        kind = "float32" if run.args.float32 else "float16"
        fields.append(("map", "uint8" if settings.cut is None else kind, settings.map_shape))
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
    """Return a View, computed if this run has not done so; the oldest one that is not needed goes.

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
        array = temporary_array(args, (len(indices),), dtype)
        fill_view(run, view, array, indices, np.arange(len(indices)))
        return View(array.rows, row_of)
    path = args.cache_dir / f"{cache_name(run, view)}-{view}.features"
    with utils.atomic_write(path) as part, open(part, "r+b", buffering=0) as file:
        array = map_array(file, (len(indices),), dtype)
        missing = copy_known_rows(data, path, array, indices)
        fill_view(run, view, array, indices, missing)
        del array
    return View(np.memmap(path, dtype, "r", shape=(len(indices),)), row_of)


def copy_known_rows(data, path, array, indices):
    """Copy what an earlier file of a view holds into a new one. Returns the rows still missing."""
    dtype, known = array.rows.dtype, {}
    if path.exists() and path.stat().st_size and path.stat().st_size % dtype.itemsize == 0:
        old = np.memmap(path, dtype, "r")
        known = {digest.tobytes(): row for row, digest in enumerate(old["digest"])}
    before = np.array([known.get(data.pictures[i].digest, -1) for i in indices])
    if known:  # what is scored must have gone through the float32 network
        before[np.isin(indices, data.validation) & ~old["exact"][before]] = -1
    for rows in in_batches(np.flatnonzero(before >= 0), 256):
        write_rows(array, rows, old[before[rows]])
    return np.flatnonzero(before < 0)


def fill_view(run, view, array, indices, missing):
    """Compute the missing rows of a view's file.

    While the network works on one batch, the next ones are prepared and the last ones written.
    """
    if not len(missing):
        return
    settings, data = run.networks.settings, run.data
    batches = in_batches(missing, settings.batch)
    if view == UNAUGMENTED:  # what is scored goes through the float32 network
        held = np.isin(indices[missing], data.validation)
        batches = [b for part in (held, ~held) for b in in_batches(missing[part], settings.batch)]

    def compute(batch, pixels):
        """Return the rows of a batch, computed."""
        exact = view == UNAUGMENTED and indices[batch[0]] in held_out
        values = np.zeros(len(batch), array.rows.dtype)
        digests = b"".join(data.pictures[i].digest for i in indices[batch])
        values["digest"] = np.frombuffer(digests, "V32")
        values["exact"] = exact or run.networks.fast is run.networks.exact
        compute_features(run, values, pixels, exact)
        return values

    held_out = set(data.validation.tolist())
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
            why = "too large for 16 bits: use --float32" if rounded else "not finite: use others"
            raise utils.UserError(f"--weights: the network's features are {why}")
        write_rows(array, batch, values)


def compute_features(run, values, pixels, exact):
    """Fill the fields `levels` and `map` of rows (n,) with what the frozen part makes of pixels."""
    networks, fields = run.networks, values.dtype.names
    settings = networks.settings
    is_scratch = settings.cut is None
    if "map" in fields and is_scratch:
        values["map"] = np.asarray(pixels)
    if "levels" not in fields and is_scratch:
        return
    network = networks.exact if exact else networks.fast
    flat = model.predict(network, pixels, settings.batch)
    levels, maps = np.split(flat, [settings.levels[-1].units.stop], axis=1)
    if "levels" in fields:
        values["levels"] = levels
    if "map" in fields and not is_scratch:
        with np.errstate(over="ignore"):  # what does not fit is reported by the caller
            values["map"] = maps.reshape(-1, *settings.map_shape)


def is_finite(values):
    """Say whether all features in rows (n,) are finite."""
    fields = [name for name in ("levels", "map") if name in values.dtype.names]
    return all(np.isfinite(values[name].max()) and np.isfinite(values[name].min())
               for name in fields)  # fmt: skip


def cache_name(run, view):
    """Return how the name of a view's file begins: other features lie in other files."""
    args, settings = run.args, run.networks.settings
    backend = model.import_keras().config.backend()
    chances = [] if view in (UNAUGMENTED, MIRRORED) else view_settings(args)
    made_from = [CACHE_VERSION, chances, settings.source, settings.cut, settings.map_shape]
    made_from += [str(settings.levels), run.data.pixels.rows.shape[1:]]
    made_from += [settings.number_format, args.float32, backend, on_device(), args.process]
    made_from += [args.processes, bool(run.recipe["rounds"])]
    return hashlib.sha256(repr(made_from).encode()).hexdigest()[:16]


def gather_levels(run, view):
    """Return (levels of a view, float32 (rows, units); {picture: row} as an int array).

    The first process, which fits the readout, gets those of all others, who must call it too.
    """
    args, data, known = run.args, run.data, ("levels", view)
    local = get_view(run, view)
    if args.processes == 1:
        return local.rows["levels"], local.row_of
    if known in run.views:
        return run.views[known]
    mine = np.flatnonzero(local.row_of >= 0)
    width = run.networks.settings.levels[-1].units.stop
    most = max(all_gather(args, len(mine)))
    table = temporary_array(args, (len(data.pictures), width), "float32")
    for start in range(0, most, INFERENCE_BATCH):
        some = mine[start : start + INFERENCE_BATCH]
        rows = np.zeros((INFERENCE_BATCH, width), "float32")
        rows[: len(some)] = local.rows["levels"][local.row_of[some]]
        numbers = np.r_[some, np.full(INFERENCE_BATCH - len(some), -1)]
        for indices, values in zip(gather_arrays(numbers), gather_arrays(rows)):
            for index, row in zip(indices, values):
                if index >= 0 and args.process == 0:
                    write_rows(table, [index], row[None])
    run.views[known] = table.rows, np.arange(len(data.pictures))
    return run.views[known]


# ---------------------------------------------------------------- the network


@functools.cache
def on_device():
    """Say whether JAX computes on something faster than the cores, a GPU say."""
    keras = model.import_keras()
    devices = keras.distribution.list_devices() if keras.config.backend() == "jax" else ["cpu"]
    return not devices[0].startswith("cpu")


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
    except Exception:  # what a library raises for want of an instruction is its own affair
        return "float32"
    exact, rounded = np.median(times, axis=0)
    return "mixed_bfloat16" if exact / rounded >= WORTH_ROUNDING else "float32"


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
    keras, address = model.import_keras(), model.BASE.address
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


def choose_devices(args, number_format):
    """Settle on the number format of the frozen pass, if it is None, and the devices."""
    keras = model.import_keras()
    with model.silence_output():  # under JAX, a first layer imports a chatting TensorFlow
        keras.layers.Identity().get_config()
    if number_format is None and args.process == 0:
        number_format = fastest_format(args)
    number_format = all_gather(args, number_format)[0]
    utils.print_line(f"number format: {number_format}")
    is_jax = keras.config.backend() == "jax"
    return number_format, keras.distribution.list_devices() if is_jax else [None]


def build_networks(args, path, data, recipe, number_format):
    """Build the network as it is, and its frozen part. Returns Networks.

    path: notop weights, or None for from scratch. number_format: a Keras dtype policy, or None to
    find out. What is frozen runs on the first device of each process.
    """
    keras = model.import_keras()
    number_format, devices = choose_devices(args, number_format)
    keras.utils.clear_session()  # layer names enter the seeds
    keras.utils.set_random_seed(args.seed)
    side, class_count = data.pixels.rows.shape[1], len(data.labels)
    has_grids = len(data.train) <= MAX_GRID_PICTURES
    base = model.build_network(class_count, side, has_grids)
    if path is not None:
        model.load_arrays(model.backbone_of(base), path)
    cut = model.cut_name(args.unfreeze) if path is not None else None
    scope = contextlib.nullcontext
    if len(devices) > 1:
        scope = keras.distribution.DataParallel(auto_shard_dataset=False).scope
    has_map = cut is not None and bool(recipe["rounds"])
    exact = model.frozen_part(base, cut if has_map else None)
    fast, rounded = exact, base
    if number_format != "float32":
        rounded = model.build_network(class_count, side, has_grids, number_format)
        rounded.set_weights(base.get_weights())
        fast = model.frozen_part(rounded, cut if has_map else None)
    settings = Settings(
        cut=cut,
        levels=model.list_levels(base),
        has_grids=has_grids,
        map_shape=(base.get_layer(cut).output if cut else base.input).shape[1:],
        augment=build_augmentation(side) if on_device() else None,
        batch=inference_batch(side),
        number_format=number_format,
        source=weights_fingerprint(path),
        devices=devices,
        distribution_scope=scope,
    )
    return Networks(base, exact, fast, settings)


def build_trained(run, head=None):
    """Build the twin that rounds train. Returns Trained.

    head: weights of its new dense layers, random if not given. Where several devices or processes
    train as one, only they together can compute with the twin.
    """
    data, networks, cut = run.data, run.networks, run.networks.settings.cut
    model.import_keras().utils.set_random_seed(run.args.seed)  # --resume builds less before
    with networks.settings.distribution_scope():
        side, has_grids = data.pixels.rows.shape[1], networks.settings.has_grids
        network = model.build_network(len(data.labels), side, has_grids)
        for layer, same in zip(network.layers, networks.base.layers):
            if layer.name != "probabilities":  # which the first process has filled to save it
                layer.set_weights(same.get_weights())
        top, hidden = model.trainable_part(network, cut, None if cut else SCRATCH_MOMENTUM)
        if head is not None:
            top.get_layer("hidden").set_weights(head[:2])
            top.get_layer("trained").set_weights(head[2:])
    compile_for_training(run, top)
    return Trained(network, top, hidden)


def variables_of(trained):
    """Return what a round of training changes: weights, seeds, and the optimizer's variables."""
    return [*trained.top.variables, *trained.top.optimizer.variables]


# ---------------------------------------------------------------- training


def compile_for_training(run, network):
    """Compile a model with AdamW. Its rate is set before each step: a schedule would be traced."""
    keras = model.import_keras()
    with run.networks.settings.distribution_scope():
        optimizer = keras.optimizers.AdamW(weight_decay=WEIGHT_DECAY)
        loss = keras.losses.CategoricalCrossentropy(label_smoothing=LABEL_SMOOTHING)
        # by name alone, the graph would be made twice
        accuracy = keras.metrics.CategoricalAccuracy(name="accuracy")
        model.compiled(network, optimizer=optimizer, loss=loss, metrics=[accuracy])
        optimizer.build(network.trainable_variables)  # now, so that --resume finds its variables


def training_schedule(run, is_head):
    """Return the learning rate of every step: rising to its peak, then a cosine to 0. (steps,)."""
    recipe, (steps, _) = run.recipe, epoch_size(run)
    if is_head:
        warm_up, total, peak = steps, recipe["head_epochs"] * steps, HEAD_RATE
    else:
        total = recipe["rounds"] * recipe["round_epochs"] * steps
        warm_up = int(total * WARM_UP)
        peak = SCRATCH_RATE if run.networks.settings.cut is None else ROUND_RATE
    rising = np.linspace(peak / 100, peak, warm_up, endpoint=False)
    angles = np.linspace(0, np.pi, max(1, total - warm_up), endpoint=False)
    return np.concatenate([rising, peak / 2 * (1 + np.cos(angles))])


def epoch_size(run):
    """Return (steps an epoch, pictures a step of this process): alike in all processes.

    The pictures of a step are divided evenly among the devices of all processes.
    """
    args, devices = run.args, len(run.networks.settings.devices)
    batch = -(-run.recipe["batch_size"] // devices) * (devices // args.processes)
    return -(-run.data.largest_shard // batch), batch


def train_epoch(run, network, read, round_number, epoch):
    """Train one epoch with bare `train_on_batch`. Returns {"loss", "accuracy"}, means of its steps.

    Every local picture comes once, and some twice to fill the last batch. read: picture indices
    (n,) and a random generator → features (n, …).
    """
    data, (steps, size) = run.data, epoch_size(run)
    rng = np.random.default_rng([run.args.seed, round_number, epoch])
    order = np.resize(rng.permutation(data.local), (steps, size))
    targets = np.eye(len(data.labels), dtype="float32")
    ahead = utils.ordered_parallel_map(lambda batch: read(batch, rng), order, workers=1)
    rates = training_schedule(run, not round_number)[int(network.optimizer.iterations) :]
    logs, label = [], f"round {round_number} epoch {epoch}"
    with run.networks.settings.distribution_scope():
        for batch, features, rate in zip(utils.progress(order, steps, label), ahead, rates):
            network.optimizer.learning_rate = rate
            y, weights = targets[data.targets[batch]], data.weights[batch]
            logs.append(network.train_on_batch(features, y, weights))
    return dict(zip(("loss", "accuracy"), np.mean(logs, axis=0).tolist(), strict=True))


def train_epochs(run, network, read, round_number, predict_validation):
    """Train the epochs of one round, a line each. Returns them as rows of the history, dicts.

    read: see train_epoch. predict_validation: gives the probabilities (n, classes) of what the
    epoch is scored on.
    """
    data, history = run.data, []
    actual = data.targets[data.validation]
    count = run.recipe["round_epochs" if round_number else "head_epochs"]
    for epoch in range(1, count + 1):
        start = time.monotonic()
        logs = train_epoch(run, network, read, round_number, epoch)
        if run.args.process:
            continue  # the first one scores
        probabilities = predict_validation()
        logs["val_loss"] = readout.log_loss(probabilities, actual, LABEL_SMOOTHING)
        logs["val_accuracy"] = float((probabilities.argmax(1) == actual).mean())
        seconds = time.monotonic() - start
        shown = ", ".join(f"{key} {value:.3f}" for key, value in logs.items())
        utils.print_line(f"round {round_number} epoch {epoch}: {shown}, {seconds:.0f} s")
        rate = float(network.optimizer.learning_rate)
        more = {"plain_accuracy": "", "learning_rate": rate, "seconds": seconds}
        history.append({"round": round_number, "epoch": epoch} | logs | more)
    return history


def train_head(run):
    """Round 0: train new dense layers on the top level. Returns (weights, rows of history)."""
    data, settings = run.data, run.networks.settings
    view, top_level = get_view(run, UNAUGMENTED), settings.levels[-1].units
    with settings.distribution_scope():
        head = model.build_head(top_level.stop - top_level.start, len(data.labels))
    compile_for_training(run, head)

    def read(indices, _=None):
        """Return the top level of pictures."""
        return view.rows["levels"][view.row_of[indices], top_level]

    def predict_validation():
        """Return probabilities; by hand, since one process alone cannot use a shared model."""
        kernel, bias, kernel_2, bias_2 = head.get_weights()
        hidden = np.maximum(read(data.validation) @ kernel + bias, 0)
        return readout.softmax(hidden @ kernel_2 + bias_2)

    rows = train_epochs(run, head, read, 0, predict_validation)
    return head.get_weights(), rows


def train_top(run, trained, round_number):
    """A round of fine-tuning the top blocks; from scratch, of training the whole network."""
    wanted = list_views(run, round_number)
    for view in set(run.views) - {*wanted, UNAUGMENTED, MIRRORED, VALIDATION_VIEW}:
        if isinstance(view, int):  # its file goes with it
            del run.views[view]
    views = [get_view(run, view) for view in wanted]
    held = None if run.args.process else get_view(run, VALIDATION_VIEW)

    def read(indices, rng):
        """Return the feature maps of pictures, each in a view drawn by lot."""
        chosen = rng.integers(0, len(views), len(indices))
        pairs = ((views[number], index) for number, index in zip(chosen, indices))
        return np.stack([view.rows["map"][view.row_of[index]] for view, index in pairs])

    def predict_validation():
        """Return probabilities of the augmented validation pictures."""
        return readout.softmax(predict_trained(run, trained, held, run.data.validation))

    return train_epochs(run, trained.top, read, round_number, predict_validation)


def predict_trained(run, trained, view, indices):
    """Return the logits that the trained part gives for a view of pictures, (n, classes)."""
    size, parts = run.networks.settings.batch, []
    for some in in_batches(view.row_of[indices], size):
        parts.append(model.predict(trained.hidden, view.rows["map"][some], size))
    kernel, bias = trained.top.get_layer("trained").get_weights()
    return np.concatenate(parts) @ kernel + bias


# ---------------------------------------------------------------- cached features → readout


def round_readout(run, round_number):
    """Return the Readout of a round, made once: with mirror images from round 1 on, if they help.

    Leave-one-out says whether they do. All processes call it, since all give their levels; only the
    first one has a result.
    """
    number = min(round_number, 1)
    if number not in run.readouts:
        chosen = make_readout(run, [UNAUGMENTED]) if not number else round_readout(run, 0)
        if number and run.networks.settings.has_grids:
            mirrored = make_readout(run, [UNAUGMENTED, MIRRORED])
            # weights sum to one over twice the rows, so the error of the same answers is half
            if mirrored and 2 * mirrored.fit.error < chosen.fit.error:
                chosen = mirrored
        if chosen and not chosen.strangers:
            chosen = chosen._replace(strangers=measure_strangers(run, chosen))
        run.readouts[number] = chosen
    return run.readouts[number]


def make_readout(run, views, levels=None, indices=None, strength=None):
    """Fit the classes to levels (default: all) of pictures (default: those that train).

    views: those that are read, unaugmented first; what is no training picture has that one only.
    Returns a Readout, or None in all processes but the first.
    """
    data, tables = run.data, [gather_levels(run, view) for view in views]
    if run.args.process:
        return None
    indices = data.train if indices is None else indices
    parts = [indices, *(np.intersect1d(indices, data.train) for _ in views[1:])]
    starts = np.cumsum([0, *map(len, parts)])

    def read(level, places):
        """Return some units of rows whose places are sorted: float32 (n, units)."""
        found = []
        for start, part, (rows, row_of) in zip(starts, parts, tables):
            inside = places[(places >= start) & (places < start + len(part))] - start
            found.append(rows[row_of[part[inside]], level])
        return np.concatenate(found)

    pictures = np.concatenate(parts)
    levels = [level.units for level in levels or run.networks.settings.levels]
    rows = readout.Rows(read, levels, data.targets[pictures], data.groups[pictures], len(indices),
                        len(data.labels))  # fmt: skip
    fit = readout.fit_readout(rows, strength, run.args.seed)
    return Readout(fit, rows, pictures, views)


def measure_strangers(run, made):
    """Return the Strangers of a Readout. Only frozen levels can tell: training has seen all."""
    labels = run.data.labels
    nobody = labels.index(utils.UNKNOWN) if utils.UNKNOWN in labels else None
    return readout.simulate_strangers(made.fit, made.rows, nobody, run.args.seed)


def readout_candidate(run, made):
    """Return the Candidate of a Readout alone, with its temperature folded in."""
    kernel, bias = made.fit.kernel / made.fit.temperature, made.fit.bias / made.fit.temperature
    probabilities = readout.softmax(read_validation(run) @ kernel + bias)
    return Candidate(run.networks.base, add_hidden(kernel), bias, probabilities, 0.0)


def add_hidden(kernel):
    """Return the kernel of a last layer that reads the levels and none of the hidden units."""
    return np.concatenate([kernel, np.zeros((model.HIDDEN, kernel.shape[1]))])


def read_validation(run):
    """Return the levels of the validation pictures, float32 (n, units)."""
    view = get_view(run, UNAUGMENTED)
    return view.rows["levels"][view.row_of[run.data.validation]]


def trained_candidates(run, trained, made):
    """Yield Candidates that mix the trained layer's logits with a readout of what stayed frozen.

    From scratch nothing did: the trained layer is alone, with a temperature fitted on validation.
    What was trained knows its pictures by heart, so only validation can judge these.
    """
    data, networks = run.data, run.networks
    actual = data.targets[data.validation]
    logits = predict_trained(run, trained, get_view(run, UNAUGMENTED), data.validation)
    kernel, bias = trained.top.get_layer("trained").get_weights()
    frozen_kernel, frozen_bias = read_frozen(run, made)
    frozen_logits = read_validation(run) @ frozen_kernel + frozen_bias
    for share in TRAINED_SHARES if networks.settings.cut else (1.0,):
        mixed = share * logits + (1 - share) * frozen_logits
        heat = readout.fit_temperature(mixed, actual)
        mixed_kernel = np.concatenate([(1 - share) * frozen_kernel, share * kernel]) / heat
        mixed_bias = ((1 - share) * frozen_bias + share * bias) / heat
        probabilities = readout.softmax(mixed / heat)
        yield Candidate(trained.network, mixed_kernel, mixed_bias, probabilities, share)


def read_frozen(run, made):
    """Return kernel and bias of a readout of the levels that training leaves as they are."""
    settings, blocks = run.networks.settings, model.BASE.blocks
    kernel = np.zeros((settings.levels[-1].units.stop, len(run.data.labels)))
    if settings.cut is None:
        return kernel, 0.0
    last = blocks.index(settings.cut)
    frozen = [level for level in settings.levels if blocks.index(level.block) <= last]
    if "frozen" not in run.readouts:
        run.readouts["frozen"] = make_readout(run, made.views, frozen, strength=made.fit.strength)
    fit = run.readouts["frozen"].fit
    kernel[: len(fit.kernel)] = fit.kernel / made.fit.temperature
    return kernel, fit.bias / made.fit.temperature


# ---------------------------------------------------------------- rounds


def run_rounds(run, state):
    """Train round after round, save the best, until nothing improves. Returns the state.

    state: of the last whole round of an interrupted run, or None.
    """
    if run.recipe["rounds"]:
        views_that_fit(run)  # or it is told before the work
    trained = None
    if state is None:
        remove_state(run.args.model)
        head, rows = train_head(run)
        start = {"round": -1, "stale": 0, "best": None, "history": []}
        state = end_round(run, None, start, rows, head)
    elif run.recipe["rounds"]:
        head, trained = None, restore_trained(run, state)
    if state["best"] is None:  # its files have gone
        state["best"] = finish_round(run, trained, state["round"], [], None)
    while not is_finished(run, state):
        trained = trained or build_trained(run, head)
        rows = train_top(run, trained, state["round"] + 1)
        state = end_round(run, trained, state, rows, variables_of(trained))
    return state


def end_round(run, trained, state, rows, variables):
    """Score a round, save what --resume needs. Returns the state after it.

    rows: of the history; variables: arrays or Keras variables that a later round begins with.
    """
    number = state["round"] + 1
    best = finish_round(run, trained, number, rows, state["best"])
    stale = 0 if best != state["best"] else state["stale"] + 1
    history = state["history"] + rows
    state = {"round": number, "stale": stale, "best": best, "history": history}
    if run.args.process == 0:
        save_state(run, state, variables)
        write_history(run.args, history)  # after it: on Windows a CSV that is open is an error
    return state


def is_finished(run, state):
    """Say whether no further round is due: all made, none that improves, or nothing to gain."""
    recipe, best = run.recipe, state["best"]
    if state["round"] >= recipe["rounds"]:
        return True
    if best is None or "rounds" in run.args:  # rounds that were asked for are made
        return False
    is_scratch = run.networks.settings.cut is None
    if best["right"] == len(run.data.validation) or (is_scratch and best["loo"] >= GOOD_ENOUGH):
        return True
    return bool(recipe["patience"] and state["stale"] >= recipe["patience"])


def finish_round(run, trained, number, rows, best):
    """Print a round's line, save the model if it is the best yet, draw. Returns the best now.

    best: {"round", "right", "loss", "loo"} of the best so far, or None. In all processes.
    """
    made = round_readout(run, number)
    if run.args.process == 0:
        candidates = [readout_candidate(run, made)]
        candidates += trained_candidates(run, trained, made) if number else []
        best = score_round(run, number, rows, made, candidates, best)
    return all_gather(run.args, best)[0]


def score_round(run, number, rows, made, candidates, best):
    """Do what `finish_round` says, in the first process."""
    data = run.data
    actual = data.targets[data.validation]
    chosen = min(candidates, key=lambda c: score(c.probabilities, actual))
    wrong, loss = score(chosen.probabilities, actual)
    right = len(actual) - wrong
    if rows:
        rows[-1]["plain_accuracy"] = right / len(actual)
    line = f"round {number}: validation accuracy {right / len(actual):.4f} ({right}/{len(actual)})"
    utils.print_line(line)
    if best is None or (right, -loss) > (best["right"], -best["loss"]):
        known = made.rows.targets[readout.answered(made.fit)]
        loo = float((made.fit.answers.argmax(1) == known).mean())
        best = {"round": number, "right": right, "loss": loss, "loo": loo}
        save_candidate(run, number, right, made, chosen)
    draw_round(run, number, line, chosen.probabilities)
    return best


def score(probabilities, actual):
    """Return what is least for the best answers: (mistakes, log loss)."""
    wrong = int((probabilities.argmax(1) != actual).sum())
    return wrong, readout.log_loss(probabilities, actual)


def draw_round(run, number, title, probabilities):
    """Draw the confusion matrix of a round; a picture that cannot be drawn is a warning."""
    args, data = run.args, run.data
    path = Path(f"{number:03d}.png")
    if number == 0:
        for old in Path().glob(MATRICES):  # of an earlier run with the same prefix
            if is_matrix_of(old, args.model):
                old.unlink()
    check_matrix(path, args.model)  # another run may have begun in this folder meanwhile
    with drawing(path):
        report.draw_confusion_matrix(
            path, args.model, title, data.labels, data.targets[data.validation],
            probabilities.argmax(1), lambda i: square_of(data, data.validation[i]),
        )  # fmt: skip


def square_of(data, index):
    """Return the pixels of a picture, uint8 (side, side, 3)."""
    return data.pixels.rows[data.pictures[index].row]


@contextlib.contextmanager
def drawing(path):
    """Turn what goes wrong while a picture is drawn into a warning; the model is safe already."""
    try:
        yield
    except Exception as error:
        is_systems = getattr(error, "errno", None)  # a full disk, say; Pillow's own have none
        if is_systems or isinstance(error, MemoryError):
            raise
        utils.warn(f"{utils.escape(path)}: could not be drawn ({utils.first_line(error)})")


def save_candidate(run, number, right, made, chosen):
    """Save a network with its new last layer, and what must travel with it."""
    args, data, networks = run.args, run.data, run.networks
    settings, count = networks.settings, len(data.validation)
    strangers, promise, threshold = made.strangers, None, 0.5
    if strangers:
        threshold, promise = strangers.chosen, readout.shares_at(strangers, strangers.chosen)
    if strangers and chosen.trained_share:
        # only frozen levels can be simulated: as many answers are refused as there
        refused = 1 - promise[0] / max(1e-9, strangers.friends[0])
        threshold = float(np.quantile(chosen.probabilities.max(1), np.clip(refused, 0, 1)))
    info = {
        "labels": data.labels,
        "base": model.BASE.builder,
        "has_grids": settings.has_grids,
        "image_size": data.pixels.rows.shape[1],
        "face_crops": share_of_face_crops(data),
        "round": number,
        "trained_share": chosen.trained_share,
        "threshold": threshold,
        "strangers": promise and {"friends": promise[0], "unknown": promise[1]},
        "weights": settings.source,
        "accuracy": right / count,
        "validation": validation_fingerprint(data),
        "interval": readout.interval(right, count),
        "number_format": settings.number_format,
        "seed": args.seed,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": versions(),
    }
    save_network(args, chosen.network, chosen.kernel, chosen.bias, info)


def validation_fingerprint(data):
    """Return what tells one set of validation pictures from another."""
    digests = sorted(data.pictures[i].digest + data.labels[data.targets[i]].encode()
                     for i in data.validation)  # fmt: skip
    return hashlib.sha256(b"".join(digests)).hexdigest()


def save_network(args, network, kernel, bias, info):
    """Save a network with these numbers in its last layer."""
    if not np.isfinite(kernel).all():
        raise utils.UserError("training has led to numbers that are not finite: use --float32")
    network.get_layer("probabilities").set_weights([kernel, bias])
    model.save_model(network, info, args.model)


def share_of_face_crops(data):
    """Return in what share of the training pictures there is one face of a crop's size.

    The tagger's crops are twice as wide as the face box.
    """
    import cv2

    found, side = [], data.pixels.rows.shape[1]
    step = max(1, len(data.local) // FACE_SAMPLE)
    low, high = (max(24, round(share * side)) for share in FACE_SIDES)
    for index in data.local[::step]:
        grey = cv2.cvtColor(square_of(data, index), cv2.COLOR_RGB2GRAY)
        faces = imaging.load_cascade().detectMultiScale(
            grey, 1.1, 3, minSize=(low, low), maxSize=(high, high)
        )
        found.append(len(faces) == 1)
    return round(float(np.mean(found)), 3)


def versions():
    """Return the versions of what made a model."""
    from importlib.metadata import version

    found = {"python": sys.version.split()[0]}
    found |= {name: version(name) for name in ("keras", "numpy", "pillow")}
    backend = model.import_keras().config.backend()
    return found | {backend: getattr(sys.modules.get(backend), "__version__", "")}


# ---------------------------------------------------------------- files


def check_outputs(args):
    """Raise UserError before any work where a file would be overwritten or cannot be written."""
    name, folder = utils.escape(args.model), Path(args.model).parent
    # Keras reads names in .weights.h5 as another format; `m-labels.json` belongs to the model `m`
    ends = (".weights", "-labels", "-resume", "-evaluate", "-review")
    problem = None
    if not folder.is_dir():
        name, problem = utils.escape(folder), "no such folder: make it or choose another prefix"
    elif not utils.is_utf8(args.model):
        problem = "no name in UTF-8: choose another prefix"
    elif args.model.endswith(("/", os.sep)) or Path(args.model).is_dir():
        problem = f"is a folder: give a prefix such as {Path('model')}"
    elif not args.evaluate and args.model.endswith(ends):
        problem = f"choose a prefix that does not end in {', '.join(ends)}"
    elif not args.evaluate and not model.may_replace_model(args.model):
        name, problem = f"{name}.h5", "a model from elsewhere: choose another prefix"
    if problem:
        raise utils.UserError(f"{name}: {problem}")
    if args.cache_dir and not args.dry_run:
        args.cache_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    for place in {folder, Path(), args.cache_dir or folder}:
        try:
            tempfile.TemporaryFile(dir=place).close()
        except OSError as error:
            error.filename = place.resolve()  # not that of a file that nobody knows
            raise
    for path in [Path("evaluate.png")] if args.evaluate else sorted(Path().glob(MATRICES)):
        check_matrix(path, args.model)


def check_matrix(path, prefix):
    """Raise UserError if there is a picture at `path` that no run with this prefix has made."""
    if path.exists() and not is_matrix_of(path, prefix):
        what = "not a picture of this model"
        raise utils.UserError(f"{path}: {what}: move it away or run in another folder")


def is_matrix_of(path, prefix):
    """Say whether a file is a confusion matrix of ours, made with this prefix."""
    if not path.is_file():  # a named pipe would wait for ever
        return False
    try:
        with Image.open(path, formats=["PNG"]) as image:
            kit, _, made_for = image.info.get("Software", "").partition(": ")
            return kit == utils.KIT and Path(made_for).resolve() == Path(prefix).resolve()
    except Exception:  # Pillow's parsers raise much
        return False


def remove_unfinished(prefix):
    """Remove the unfinished files of an earlier run that was killed: those of this prefix."""
    folder, name = Path(prefix).parent, glob.escape(Path(prefix).name)
    ends = ".h5 .json -labels.json -history.csv -report.png -mistakes.csv -review.csv -review.png "
    ends += "-evaluate.csv -evaluate-report.png -resume.npz"
    for stem, _, kind in (end.rpartition(".") for end in ends.split()):
        for path in folder.glob(f".{name}{stem}-unfinished-*.{kind}"):
            path.unlink()
    for path in Path().glob(f".{MATRICES.replace('.', '-unfinished-*.')}"):
        path.unlink()


def write_history(args, rows):
    """Write model-history.csv: a row an epoch, whose keys are the columns."""
    utils.write_csv(f"{args.model}-history.csv", list(rows[0]), [row.values() for row in rows])


def score_saved(args, network, data, indices, what):
    """Score a saved model, as anybody would read it. Returns Scores.

    what: begins the line that is printed, `evaluate: accuracy` say.
    """
    actual, side = data.targets[indices], data.pixels.rows.shape[1]
    size = inference_batch(side)
    chunks = in_batches([data.pictures[i].row for i in indices], size)
    shown = utils.progress(chunks, len(chunks), "scoring")
    parts = [model.predict(network, data.pixels.rows[chunk], size) for chunk in shown]
    probabilities = np.concatenate(parts)
    right = int((probabilities.argmax(1) == actual).sum())
    low, high = readout.interval(right, len(actual))
    line = f"{what} {right / len(actual):.4f} ({right}/{len(actual)})"
    utils.print_line(f"{line}, 95% interval {low:.4f} to {high:.4f}")
    predictions = [
        Prediction(
            file=file_name(args, data, i),
            actual=data.labels[data.targets[i]],
            predicted=data.labels[p.argmax()],
            probability=float(p.max()),
        )
        for i, p in zip(indices, probabilities)
    ]
    title = f"{utils.escape(Path(args.model).name)}, {line}"
    return Scores(probabilities, right / len(actual), predictions, title)


def write_predictions(path, predictions):
    """Write predictions as CSV, a row each."""
    rows = [p._replace(probability=f"{p.probability:.6f}") for p in predictions]
    utils.write_csv(path, Prediction._fields, rows)


def file_name(args, data, index):
    """Return the name of a picture below data_dir."""
    return data.pictures[index].path.relative_to(args.data_dir).as_posix()


def finish_run(run, state, before):
    """Score the saved files, write what is to be looked at, say what is next. Returns accuracy.

    before: what travelled with the earlier model that is replaced, or None.
    """
    args, data = run.args, run.data
    network, info = model.load_model(args.model, run.networks.base)
    what = f"best: round {info['round']}, validation accuracy"
    found = score_saved(args, network, data, data.validation, what)
    made = round_readout(run, info["round"])
    strangers = made.strangers
    if info["strangers"]:
        friends, unknown = (info["strangers"][key] for key in ("friends", "unknown"))
        utils.print_line(f"strangers: threshold {info['threshold']:.3f}: {friends:.2f} of friends "
                         f"correct, {unknown:.2f} of strangers unknown")  # fmt: skip
    wrong = [p for p in found.predictions if p.predicted != p.actual]
    wrong.sort(key=lambda p: -p.probability)
    write_predictions(f"{args.model}-mistakes.csv", wrong)
    write_history(args, state["history"])  # again: a kill may have come between state and rows
    with drawing(f"{args.model}-report.png"):
        panel = strangers and (*strangers[:3], info["threshold"])
        report.draw_report(
            f"{args.model}-report.png", found.title, data.labels, data.targets[data.validation],
            found.probabilities, state["history"], panel,
        )  # fmt: skip
    everything = make_readout(run, made.views, None, np.arange(len(data.pictures)),
                              made.fit.strength)  # fmt: skip
    review = review_labels(data, everything, made.fit.temperature)
    write_review(args, data, review)
    if args.fit_all:
        fit_all(run, network, info, everything.fit, made.fit.temperature)
    print_next_steps(args, info, found.predictions, strangers, len(review), before)
    return found.accuracy


def fit_all(run, network, info, fit, temperature):
    """Save the model once more with a readout of all pictures; its figures stay as they are."""
    args = run.args
    if info["trained_share"]:
        utils.warn("--fit-all: the best round uses what was trained: nothing is fitted again")
        return
    info["fit_all"] = True
    kernel, bias = add_hidden(fit.kernel / temperature), fit.bias / temperature
    save_network(args, network, kernel, bias, info)
    utils.print_line(
        "fit-all: the saved model's readout knows all pictures now; every figure printed and "
        "stored is that of the model before"
    )


# ---------------------------------------------------------------- labels worth a look


def review_labels(data, everything, temperature):
    """Return rows (index, suggested label, probability, why) for labels that deserve a look.

    `label`: a readout that has not seen the picture gives its label less than another; `copy`:
    equal or near copies under two classes. The least probable labels come first, as in confident
    learning (Northcutt et al. 2021).
    """
    answers = readout.softmax(everything.fit.answers / temperature)
    judged = everything.pictures[readout.answered(everything.fit)]
    doubts = {}  # {index: (probability of its own label, suggestion, its probability, why)}
    for i, p in zip(judged.tolist(), answers):
        if p.argmax() != data.targets[i]:
            own, suggestion = float(p[data.targets[i]]), data.labels[p.argmax()]
            doubts[i] = (own, suggestion, float(p.max()), "label")
    for pair in data.copies:
        for i, other in (pair, pair[::-1]):
            doubts[i] = (0.0, data.pictures[other].label, 1.0, "copy")
    order = sorted(doubts, key=lambda i: (doubts[i][0], i))
    return [(i, *doubts[i][1:]) for i in order]


def write_review(args, data, review):
    """Write model-review.csv, and the first pictures of it as model-review.png."""
    header = ["file", "label", "suggested", "probability", "why"]
    rows = [[file_name(args, data, i), data.pictures[i].label, suggested, f"{p:.6f}", why]
            for i, suggested, p, why in review]  # fmt: skip
    utils.write_csv(f"{args.model}-review.csv", header, rows)
    path, first = Path(f"{args.model}-review.png"), review[:REVIEW_SHOWN]
    if not first:
        path.unlink(missing_ok=True)
        return
    squares = [square_of(data, i) for i, *_ in first]
    with drawing(path):
        report.draw_review_sheet(path, squares, [row[1] for row in rows], [row[1] for row in first])


def print_next_steps(args, info, predictions, strangers, doubtful, before):
    """Say on stderr how good the model is, what it confuses, what to look at and to run next."""
    name = utils.escape(args.model)
    confused = Counter((p.actual, p.predicted) for p in predictions if p.predicted != p.actual)
    right = len(predictions) - confused.total()
    low, high = readout.interval(right, len(predictions))
    lines = [
        f"{name}.h5 classifies {right} of {len(predictions)} pictures correctly that it was not "
        f"trained on; on more pictures like these, expect {low:.0%} to {high:.0%}."
    ]
    if before and before.get("accuracy"):
        is_same = before.get("validation") == info["validation"]
        whose = "the same" if is_same else "its own"
        lines.append(
            f"It replaces a model that classified {before['accuracy']:.4f} of {whose} validation "
            "pictures correctly."
        )
    if confused:
        pairs = ", ".join(f"{a} for {p} ({n})" for (a, p), n in confused.most_common(3))
        lines.append(f"Confused most often: {pairs}.")
    if doubtful:
        labels = utils.count(doubtful, "label deserves", "labels deserve")
        lines.append(f"{labels} a look: {name}-review.png and {name}-review.csv.")
    lines.append(f"Below a probability of {info['threshold']:.3f} the tagger says unknown.")
    if strangers and strangers.taken_for:
        labels = info["labels"]
        most = ", ".join(labels[number] for number, _ in strangers.taken_for.most_common(3))
        lines.append(f"Strangers are taken most often for: {most}.")
    if utils.UNKNOWN not in info["labels"]:
        lines.append("A class `unknown`, with pictures of many others, teaches it who is strange.")
    lines.append(f"Look at {info['round']:03d}.png, {name}-report.png, {name}-mistakes.csv. Then:")
    command = f"    python webcam.py {shlex.quote(name)}"
    lines.append(command if info["face_crops"] >= 0.5 else f"{command} --source FOLDER_OF_PHOTOS")
    if args.cache_dir and args.cache_dir.exists():
        files = list(args.cache_dir.glob("*.features"))
        size = sum(path.stat().st_size for path in files) / 1e9
        folder = shlex.quote(utils.escape(args.cache_dir))
        lines.append(f"The kept cache takes {size:.2f} GB and shows what your pictures show.")
        lines.append(f"To delete it: rm {folder}/*.features")
    print("\n".join(lines), file=sys.stderr)


# ---------------------------------------------------------------- stop and go on


def state_path(prefix):
    """Return the path of what --resume needs: facts, split and variables after a whole round."""
    return Path(f"{prefix}-resume.npz")


def resume_settings(args, recipe, data):
    """Return what must be the same when a run goes on, by the name to show; plain data."""
    names = "validation_split group_by_folder seed heavy_augmentation unfreeze class_weight float32"
    settings = {name: getattr(args, name) for name in [*names.split(), "cache_gb", "processes"]}
    settings |= recipe | {"image_size": data.pixels.rows.shape[1], "labels": data.labels}
    views = json.loads(json.dumps(view_settings(args)))
    return settings | {"views_made_of": views, "split": data.validation.tolist()}


def file_list(args, data):
    """Return a line for each picture used: the file below data_dir and its SHA-256."""
    digests = (picture.digest.hex() for picture in data.pictures)
    return [f"{utils.escape(file_name(args, data, i))} {d}" for i, d in enumerate(digests)]


def save_state(run, state, variables):
    """Save the state after a whole round, with the variables that the next one begins with."""
    facts = state | {
        "settings": resume_settings(run.args, run.recipe, run.data),
        "files": file_list(run.args, run.data),
        "number_format": run.networks.settings.number_format,
        "weights": run.networks.settings.source,
    }
    arrays = {f"v{number}": np.asarray(variable) for number, variable in enumerate(variables)}
    with utils.atomic_write(state_path(run.args.model)) as part:
        np.savez(part, facts=np.frombuffer(json.dumps(facts).encode(), "uint8"), **arrays)


def read_state(args):
    """Return the state of an interrupted run as plain data, or None if there is none."""
    path = state_path(args.model)
    if not path.exists():
        utils.print_line("nothing to resume: starting from the beginning")
        return None
    try:
        with np.load(path, allow_pickle=False) as file:
            state = json.loads(file["facts"].tobytes())
        if not model.model_paths(args.model)[0].exists():
            utils.warn(f"{utils.escape(args.model)}.h5: the best round is gone: the last is saved")
            state["best"] = None
        known = {"round", "stale", "best", "history", "settings", "files", "weights"}
        if not known <= state.keys() or not state["history"]:
            raise ValueError
        return state
    except Exception:  # NumPy's and zip's parsers raise much
        raise damaged_state(path) from None


def damaged_state(path):
    """Return the UserError for a state that cannot be used."""
    name = utils.escape(path)
    return utils.UserError(f"{name}: damaged or of another version: train without --resume")


def check_state(args, state, recipe, data):
    """Raise UserError, with the reason, unless the interrupted run had these data and settings."""
    now = file_list(args, data)
    if state["files"] != now:  # reported first: other pictures can change the recipe, too
        changed = min(set(state["files"]) ^ set(now), default="the order of the files ")
        name = utils.escape(changed.rpartition(" ")[0])[:200]
        raise utils.UserError(f"--resume: the data has changed ({name}): train without --resume")
    for name, value in resume_settings(args, recipe, data).items():
        before = state["settings"].get(name)
        if before != value:
            shown = utils.escape(before)[:100]
            raise utils.UserError(
                f"--resume: the interrupted run had other {name.replace('_', ' ')} ({shown}): give "
                "it again, or train without --resume"
            )


def restore_trained(run, state):
    """Return Trained as it was after the last whole round. Raises UserError."""
    path, after_head = state_path(run.args.model), state["round"] == 0
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = [file[f"v{number}"] for number in range(len(file.files) - 1)]
        trained = build_trained(run, arrays if after_head else None)
        variables = [] if after_head else variables_of(trained)
        for variable, array in zip(variables, arrays, strict=not after_head):
            variable.assign(array)
    except Exception:  # NumPy's and zip's parsers raise much
        raise damaged_state(path) from None
    return trained


def remove_state(prefix):
    """Remove what --resume needs, at the end of a run that needs it no more."""
    state_path(prefix).unlink(missing_ok=True)


# ---------------------------------------------------------------- several processes


def end_with_parent():
    """Wait, in a thread, until the parent's end of the pipe is closed, by a kill say; then end."""
    os.read(0, 1)
    os._exit(1)


def find_processes(args):
    """Set args.process and args.processes: which of how many processes of one run this is."""
    args.process, args.processes = 0, 1
    if args.evaluate or args.dry_run or not os.environ.get(f"{DISTRIBUTION}NUM_PROCESSES"):
        return
    try:
        args.processes = int(os.environ[f"{DISTRIBUTION}NUM_PROCESSES"])
        args.process = int(os.environ[f"{DISTRIBUTION}PROCESS_ID"])
        addresses = os.environ[f"{DISTRIBUTION}JOB_ADDRESSES"]
        known = 0 <= args.process < args.processes and addresses
    except (KeyError, ValueError):
        known = False
    if not known:
        names = f"{DISTRIBUTION}NUM_PROCESSES, _PROCESS_ID and _JOB_ADDRESSES"
        raise utils.UserError(f"{names}: set all three, see the README")
    if args.processes > 1 and os.environ.get("KERAS_BACKEND") != "jax":
        raise utils.UserError("several processes need JAX: pip install jax, set KERAS_BACKEND=jax")


def all_gather(args, value):
    """Return what every process gave, plain data, as a list in their order. All must call it.

    What only the first one knows, it gives to all: `all_gather(args, value or None)[0]`.
    """
    if args.processes == 1:
        return [value]
    data = np.frombuffer(json.dumps(value).encode(), "uint8")
    sizes = gather_arrays(np.array([len(data)])).ravel()
    rows = gather_arrays(np.resize(data, max(sizes)))
    return [json.loads(row[:size].tobytes()) for row, size in zip(rows, sizes)]


def gather_arrays(array):
    """Return the arrays of all processes, of one shape, as one with a first axis more."""
    model.import_keras()
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(array))


def watch(args):
    """Run this process's part of the work as a child; return its exit code.

    JAX ends its process from C++ when another one is gone: somebody has to be left to say so. The
    child ends with its parent, whose end of a pipe is then closed. Raises UserError.
    """
    environment = os.environ | {model.CHILD: "1"}
    command = [sys.executable, *sys.argv]
    child = subprocess.Popen(command, stdin=subprocess.PIPE, env=environment)
    code = None
    while code is None:
        with contextlib.suppress(KeyboardInterrupt):  # the child has it too
            code = child.wait()
    if code in (0, 1, 3, 130):
        return code
    raise utils.UserError(LOST)


# ---------------------------------------------------------------- the program


def evaluate(args):
    """Score a saved model on all of data_dir. Writes evaluate.png, a CSV file and a report."""
    network, info = model.load_model(args.model)
    check_outputs(args)
    labels, side = info["labels"], info["image_size"]
    files = find_files(args.data_dir)
    files = rename_strange(args, files, labels)
    pictures, skipped, pixels = read_pictures(args, files, side)
    if not pictures:
        name = utils.escape(args.data_dir)
        raise utils.UserError(f"{name}: no pictures: give a folder with a folder for each class")
    utils.print_line(
        f"images: {len(pictures)} to evaluate, {len(labels)} classes, {skipped} skipped"
    )
    targets = np.array([labels.index(picture.label) for picture in pictures])
    everything = np.arange(len(pictures))
    data = Scored(pictures, pixels, labels, targets)
    found = score_saved(args, network, data, everything, "evaluate: accuracy")
    write_predictions(f"{args.model}-evaluate.csv", found.predictions)
    with drawing("evaluate.png"):
        path = f"{args.model}-evaluate-report.png"
        report.draw_report(path, found.title, labels, targets, found.probabilities)
        predicted = found.probabilities.argmax(1)
        report.draw_confusion_matrix("evaluate.png", args.model, found.title, labels, targets,
                                     predicted, lambda i: square_of(data, i))  # fmt: skip
    return gate(args, found.accuracy)


def rename_strange(args, files, labels):
    """Return files whose labels the model knows; others become `unknown`, or are left out."""
    for strange in sorted({label for _, label in files} - set(labels)):
        near = difflib.get_close_matches(strange.casefold(), [s.casefold() for s in labels], 1, 0.7)
        name = next((label for label in labels if [label.casefold()] == near), None)
        hint = f" (did you mean {name}?)" if name else ""
        what = "counts as unknown" if utils.UNKNOWN in labels else "is left out"
        utils.warn(f"{utils.escape(args.data_dir)}/{strange}: no class of the model{hint}: {what}")
    if utils.UNKNOWN in labels:
        return [(path, label if label in labels else utils.UNKNOWN) for path, label in files]
    kept = [(path, label) for path, label in files if label in labels]
    if not kept:
        name = utils.escape(args.data_dir)
        hint = f"to name photos: python webcam.py {shlex.quote(args.model)} --source {name}"
        raise utils.UserError(f"{name}: no folder is a class of the model; {hint}")
    return kept


def gate(args, accuracy):
    """Return the exit code: 3 if the accuracy that was asked for was not reached."""
    if args.min_accuracy is None or accuracy >= args.min_accuracy:
        return 0
    print(f"accuracy {accuracy:.4f} is below --min-accuracy {args.min_accuracy}", file=sys.stderr)
    return 3


def make_recipe(args, is_scratch, count, classes):
    """Return the recipe for so many training pictures and classes, a dict."""
    defaults = FROM_SCRATCH if is_scratch else FINE_TUNING
    recipe = {name: getattr(args, name, value) for name, value in defaults.items()}
    if is_scratch and "round_epochs" not in args:
        steps = -(-count // recipe["batch_size"])
        wanted = max(MIN_STEPS, MIN_STEPS_A_CLASS * classes)
        recipe["round_epochs"] = max(recipe["round_epochs"], -(-wanted // steps))
    recipe["fresh"] = recipe["round_epochs"] if is_scratch else 0  # new views a round
    if not is_scratch and not args.unfreeze:
        recipe["rounds"] = 0
    return recipe


def train(args):
    """Go all the way: folder → split → features → rounds → report. Returns the exit code."""
    state = read_state(args) if args.resume else None
    check_folders(args)  # before any weights are fetched
    path, warnings = find_weights(args)
    for line in warnings:
        utils.warn(line)
    is_scratch = path is None
    if len(set(all_gather(args, is_scratch))) > 1:
        raise utils.UserError("--weights auto: a process could not have them: give it their file")
    if is_scratch and args.unfreeze != UNFREEZE:
        utils.warn("--unfreeze is ignored: from scratch, every layer is trained")
    if state and state["weights"] != weights_fingerprint(path):
        shown = utils.escape(state["weights"])
        raise utils.UserError(f"--resume: the interrupted run had other --weights ({shown})")
    data = read_data(args, args.image_size or (96 if is_scratch else 224))
    recipe = make_recipe(args, is_scratch, len(data.train), len(data.labels))
    if state:
        check_state(args, state, recipe, data)
    number_format = state and state["number_format"]
    run = Run(args, recipe, data, build_networks(args, path, data, recipe, number_format), {}, {})
    before = None if args.resume else model.read_info(args.model)
    state = run_rounds(run, state)
    accuracy = None
    if args.process == 0:
        accuracy = finish_run(run, state, before)
        remove_state(args.model)
    for line in warnings:
        utils.warn(line)
    return gate(args, all_gather(args, accuracy)[0])


def train_alone(args):
    """Train where no other run is at work with the same prefix or cache. Returns the exit code."""
    try:
        check_outputs(args)
        with contextlib.ExitStack() as locks:
            if args.process == 0:
                locks.enter_context(utils.file_lock(f"{args.model}.lock"))
                remove_unfinished(args.model)
            if args.cache_dir:
                lock = args.cache_dir / f"cache-{args.process}.lock"
                locks.enter_context(utils.file_lock(lock))
            return train(args)
    except KeyboardInterrupt:
        hint = "nothing is saved yet"
        if state_path(args.model).exists():
            hint = "the best whole round is saved; the same command with --resume goes on"
        print(hint, file=sys.stderr)
        raise
    except RuntimeError as error:  # what JAX raises when a connection breaks
        if args.processes == 1:
            raise
        raise utils.UserError(f"{LOST} ({utils.escape(error)[:100]})") from None


def main():
    """Read the command line and do what it asks for. Returns the exit code."""
    args = parse_arguments()
    if not args.data_dir.is_dir():
        name = utils.escape(args.data_dir)
        raise utils.UserError(f"{name}: no such folder: give one with a folder for each class")
    if args.dry_run:
        check_outputs(args)
        check_folders(args)
        if args.weights not in ("auto", "imagenet"):
            find_weights(args)
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


if __name__ == "__main__":
    try:
        utils.run(main)
    except SystemExit as end:
        if end.code and model.CHILD in os.environ:  # JAX would first wait for the others
            os._exit(end.code)
        raise
