"""From a folder to pictures that are read, grouped and divided: the Data that train.py works on."""

import hashlib
import itertools
import json
import os
import re
import tempfile
import unicodedata
from collections import Counter, defaultdict, namedtuple
from pathlib import Path

import numpy as np

import imaging
import model
import processes
import utils

MAX_RATIO = 2  # longer side to shorter: beyond it a centre square shows too little
MAX_DIFFERING_BITS, MIN_CORRELATION = 4, 0.95  # of near copies
THUMBNAIL = 16  # pixels
FLAT = 20  # of 255: a picture with fewer shades of grey shows nothing
FEW_VALIDATION = 30
MAX_TABLE = 20  # classes that are listed before training
FACE_SIDES = (0.35, 0.75)  # of a picture: a face box in a crop of the tagger's framing
FACE_SAMPLE = 100  # pictures in which faces are looked for
# Names of the folders of sets that are divided already, in any case.
DIVIDED = {"train", "training"}, {"val", "valid", "validation"}, {"test", "testing"}
CROP_NAME = re.compile(r"\d{6}-\d+-[0-9a-f]{10}\.jpg")  # as --save-faces names them

Picture = namedtuple("Picture", "path label digest dhash thumbnail row")  # row of the pixels
DiskArray = namedtuple("DiskArray", "file rows place")  # place: its file or folder
# train, validation: indices of pictures; local: those of train that this process trains on;
# largest_shard: how many the process with most trains on; groups: number of each picture's group;
# copies: pairs of indices of equal or near copies under two classes
Data = namedtuple(
    "Data",
    "pictures pixels labels targets train local largest_shard validation weights groups copies",
)
Scored = namedtuple("Scored", "pictures pixels labels targets")  # all that scoring needs of Data


# ---------------------------------------------------------------- folder → file list


def find_division(data_dir):
    """Return ({part: folder of its classes}, test folder or None).

    The parts are train and, where it is divided already, validation. A divided set has a folder
    called train and one called val or test, which share class folders. Without a val folder, train
    is what is to be divided; of any other set, all of data_dir is.
    """
    folders = {path.name.casefold(): path for path in list_folders(data_dir)}
    parts = [next((folders[name] for name in sorted(names & folders.keys())), None)
             for names in DIVIDED]  # fmt: skip
    classes = [{label_of(p.name) for p in list_folders(part)} if part else set() for part in parts]
    if not classes[0] & (classes[1] | classes[2]):
        return {"train": data_dir}, None
    found = {"train": parts[0]} | ({"validation": parts[1]} if classes[1] else {})
    return found, parts[2]


def find_parts(data_dir):
    """Return ([(path, label, part)], parts, test folder) of all files; parts: see find_division.

    A class that only validation has is left out. Warns of what is left out, or is not tested.
    """
    parts, test = find_division(data_dir)
    if parts["train"] != data_dir:
        for path in sorted(set(list_folders(data_dir)) - {*parts.values(), test}):
            utils.warn(f"{utils.escape(path)}: left out, since {parts['train'].name} has classes")
    files = [(*file, part) for part, root in parts.items() for file in find_files(root)]
    if "validation" not in parts:
        return files, parts, test
    trained, tested = ({label for _, label, part in files if part == name} for name in parts)
    for label in sorted(trained - tested):
        utils.warn(f"{label}: not tested, since {utils.escape(parts['validation'])} has none")
    for label in sorted(tested - trained):
        utils.warn(f"{label}: left out, since {utils.escape(parts['train'])} has none")
    return [file for file in files if file[1] in trained], parts, test


def list_folders(folder):
    """Return the folders in a folder, but for hidden ones and those that systems leave behind."""
    return [p for p in folder.iterdir() if os.path.isdir(p) and not utils.is_ignored(p.name)]


def find_files(data_dir):
    """Return [(path, label)] of everything below data_dir/<class>/; labels are printable, and NFC.

    Warns about files beside the class folders, classes without files, and links not followed.
    """
    found = [(p, p.relative_to(data_dir).parts) for p in utils.list_files(data_dir)]
    files = [(path, label_of(parts[0])) for path, parts in found if len(parts) > 1]
    name = utils.escape(data_dir)
    loose = len(found) - len(files)
    if loose:
        beside = utils.count(loose, "file lies", "files lie")
        utils.warn(f"{name}: {beside} beside the class folders and cannot be used")
    folders = {label_of(path.name) for path in list_folders(data_dir)}
    for label in sorted(folders - {label for _, label in files}):
        utils.warn(f"{name}/{label}: a class without files is left out")
    return files


def label_of(folder):
    """Return the class name of a folder's: one spelling, fit for terminal, file name and CSV."""
    return utils.escape(unicodedata.normalize("NFC", folder))


# ---------------------------------------------------------------- file list → pictures


def read_pictures(args, files, side):
    """Decode files once, in parallel, to squares of that side in pixels.

    files: [(path, label)]. With several processes each reads its share and tells the others.
    Returns ([Picture], number skipped, DiskArray of the squares or None in a dry run).
    """
    pixels = None
    if not args.dry_run:
        pixels = temporary_array(args, (max(1, len(files)), side, side, 3), "uint8")
    local = range(args.process, len(files), args.processes)
    batches = in_batches(local, min(8, max(1, 2**19 // side**2)))  # one by one, threads wait more
    read = utils.ordered_parallel_map(
        lambda rows: [read_square(files[row][0], side) for row in rows], batches
    )
    results = itertools.chain.from_iterable(read)
    mine = []
    for row, (square, facts) in zip(local, utils.progress(results, len(local), "reading")):
        if square is not None and pixels is not None:
            write_rows(pixels, [row], square[None])
        mine.append((row, facts))
    pictures, skipped, flaws = [], defaultdict(list), defaultdict(list)
    for row, facts in sorted(itertools.chain(*processes.all_gather(args, mine))):
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
        number = utils.count(len(paths), "picture is", "pictures are")
        utils.warn(f"{utils.escape(paths[0])}…: {number} {flaw}, but used")
    for label in sorted({label for _, label in files} - {picture.label for picture in pictures}):
        utils.warn(f"{label}: none of its files is a picture that can be used")
    return pictures, len(files) - len(pictures), pixels


def unknown_class(data):
    """Return the index of the class `unknown`, or None."""
    return data.labels.index(utils.UNKNOWN) if utils.UNKNOWN in data.labels else None


def in_batches(items, size):
    """Divide a sequence into pieces of so many, in order; the last one may have fewer."""
    return [items[i : i + size] for i in range(0, len(items), size)]


def read_square(path, side):
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


# ---------------------------------------------------------------- pictures → split


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
        # turned, so that the part comes first, and in each order other bits last
        end = min(shift + 13, 64)
        turned = hashes << np.uint64(-end % 64) | hashes >> np.uint64(end % 64)
        order = np.argsort(turned, kind="stable")
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


def group_pictures(pictures, roots, by_folder):
    """Return (sets of indices that stay together, pairs under two classes, number of near copies).

    Equal bytes stay together, near copies within a class and, with by_folder, the files of one
    folder. roots: where the class folders lie. Where near copies tie all folders of a class
    together, so that it could not be tested, its folders alone decide, with a warning.
    """
    keys = [[picture.digest] for picture in pictures]
    for picture, own in zip(pictures, keys):
        folder = picture.path.parent
        if by_folder and folder.parent not in roots:  # else it is a class folder
            own.append(folder)
    first = {}
    twins = ((first.setdefault(picture.digest, i), i) for i, picture in enumerate(pictures))
    pairs = {*find_near_copies(pictures), *(pair for pair in twins if pair[0] != pair[1])}
    copies = {pair for pair in pairs if len({pictures[i].label for i in pair}) > 1}
    near = sorted(pairs - copies)
    groups = merge(keys, near)
    if by_folder:
        tied = tied_classes(pictures, groups) - tied_classes(pictures, merge(keys, []))
        for label in sorted(tied):
            utils.warn(
                f"{label}: its folders hold near copies of each other's pictures, which "
                "flatters the accuracy: add pictures of another time or place"
            )
        near = [(i, j) for i, j in near
                if pictures[i].label not in tied or keys[i][1:] == keys[j][1:]]  # fmt: skip
        groups = merge(keys, near)
    return groups, sorted(copies), len(set(itertools.chain(*near)))


def merge(keys, pairs):
    """Return sets of indices that belong together: those that share a key, and those of pairs."""
    from scipy.cluster.hierarchy import DisjointSet

    together = DisjointSet(range(len(keys)))
    first = {}
    for i, own in enumerate(keys):
        for key in own:
            together.merge(i, first.setdefault(key, i))
    for one, other in pairs:
        together.merge(one, other)
    return together.subsets()


def tied_classes(pictures, groups):
    """Return the classes that cannot be tested: all of their pictures are in one group."""
    numbers = Counter(label for group in groups for label in {pictures[i].label for i in group})
    return {label for label, number in numbers.items() if number == 1}


def warn_about_copies(pictures, copies):
    """Warn about equal or near copies under two classes, and say what is done with them."""
    for one, other in copies[: imaging.MAX_LINES]:
        kind = "the same bytes as"
        if pictures[one].digest != pictures[other].digest:
            kind = "looks the same as"
        first, second = (utils.escape(pictures[i].path) for i in (other, one))
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
    sizes = Counter(picture.label for picture in pictures)
    left = Counter(label for counts in members for label in counts)  # groups that still train
    of_class = defaultdict(list)
    for group, counts in enumerate(members):
        for label in counts:
            of_class[label].append(group)
    chosen = set()
    taken = Counter()
    for label in sorted(sizes):
        wanted = max(1, round(sizes[label] * fraction))
        for group in sorted(of_class[label], key=rank.__getitem__):
            if taken[label] >= wanted:
                break
            is_free = group not in chosen and all(
                left[other] > 1 and 2 * number <= sizes[other]
                for other, number in members[group].items()
            )
            if is_free:
                chosen.add(group)
                taken.update(members[group])
                left.subtract(members[group].keys())
        if not taken[label]:
            utils.warn(
                f"{label}: not tested, since all its pictures belong together (near copies, or "
                "one folder with --group-by-folder): add pictures of another time or place"
            )
    if not chosen:
        raise utils.UserError("no class can be divided: add other pictures to each class")
    validation = np.array(sorted(i for group in chosen for i in groups[group]))
    return np.setdiff1d(np.arange(len(pictures)), validation), validation


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


def print_table(pictures, labels, groups, validation):
    """Print how many pictures and groups each class has, and how they are divided."""
    total = Counter(picture.label for picture in pictures)
    tested = Counter(pictures[i].label for i in validation)
    pairs = {(picture.label, group) for picture, group in zip(pictures, groups.tolist())}
    together = Counter(label for label, _ in pairs)
    utils.print_line("pictures  groups  train  validation  class")
    for label in labels:
        n, v = total[label], tested[label]
        utils.print_line(f"{n:8}  {together[label]:6}  {n - v:5}  {v:10}  {label}")


def drop_untrained(pictures, part_of, folder):
    """Return pictures without classes of which none in `folder`, the part that trains, was read."""
    trained = {picture.label for picture in pictures if part_of[picture.row] == "train"}
    for label in sorted({picture.label for picture in pictures} - trained):
        name = utils.escape(folder)
        utils.warn(f"{label}: left out, since no picture of it in {name} can be read")
    return [picture for picture in pictures if picture.label in trained]


def read_data(args, side):
    """Read and divide data_dir. Prints the `images:` line. Returns Data. Raises UserError."""
    files, parts, test = find_parts(args.data_dir)
    check_labels(args, sorted({label for _, label, _ in files}))
    pictures, skipped, pixels = read_pictures(args, [file[:2] for file in files], side)
    part_of = [part for *_, part in files]
    pictures = drop_untrained(pictures, part_of, parts["train"])
    labels = sorted({picture.label for picture in pictures})
    check_labels(args, labels)
    groups, copies, near = group_pictures(pictures, parts.values(), args.group_by_folder)
    group_of = np.zeros(len(pictures), int)
    for number, group in enumerate(groups):
        group_of[list(group)] = number
    is_divided = "validation" in parts
    if is_divided:
        is_validation = np.array([part_of[p.row] == "validation" for p in pictures])
        train, validation = np.flatnonzero(~is_validation), np.flatnonzero(is_validation)
        if not len(validation):
            empty = utils.escape(parts["validation"])
            raise utils.UserError(f"{empty}: no pictures: leave it out or fill it")
    else:
        train, validation = split(pictures, groups, args.validation_split or 0.2, args.seed)
    sizes = f"{len(train)} train, {len(validation)} validation, {len(labels)} classes"
    utils.print_line(f"images: {sizes}, {skipped} skipped")
    if parts["train"] != args.data_dir:
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
    if "validation" in parts and args.validation_split:
        name = utils.escape(args.data_dir)
        raise utils.UsageError(f"--validation-split: {name} is divided already: leave it out")
    if parts["train"] == args.data_dir:
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
    if args.process == 0:  # which scores
        read_others(args, pictures, pixels, validation)
    targets = np.array([labels.index(picture.label) for picture in pictures])
    weights = np.ones(len(pictures), "float32")
    if args.class_weight:
        frequency = np.bincount(targets[train], minlength=len(labels))
        weights = (len(train) / len(labels) / np.maximum(1, frequency))[targets].astype("float32")
    local = train[owner[train] == args.process]
    return Data(pictures, pixels, labels, targets, train, local, int(shards.max()), validation,
                weights, groups, copies)  # fmt: skip


def read_others(args, pictures, pixels, indices):
    """Let the first process read those of some pictures that others have read."""
    for picture in (pictures[i] for i in indices):
        if picture.row % args.processes:
            square, facts = read_square(picture.path, pixels.rows.shape[1])
            if square is None:
                path = utils.escape(picture.path)
                raise utils.UserError(f"{path}: has changed meanwhile: {facts['reason']}")
            write_rows(pixels, [picture.row], square[None])


def square_of(data, index):
    """Return the pixels of a picture, uint8 (side, side, 3)."""
    return data.pixels.rows[data.pictures[index].row]


def share_of_face_crops(data):
    """Return in what share of the training pictures there is one face of a crop's size.

    The tagger's crops are twice as wide as the face box.
    """
    import cv2

    found = []
    side = data.pixels.rows.shape[1]
    step = max(1, len(data.local) // FACE_SAMPLE)
    low, high = (max(24, round(share * side)) for share in FACE_SIDES)
    for index in data.local[::step]:
        grey = cv2.cvtColor(square_of(data, index), cv2.COLOR_RGB2GRAY)
        faces = imaging.load_cascade().detectMultiScale(
            grey, 1.1, 3, minSize=(low, low), maxSize=(high, high)
        )
        found.append(len(faces) == 1)
    return round(float(np.mean(found)), 3)


def file_name(args, data, index):
    """Return the name of a picture below data_dir."""
    return data.pictures[index].path.relative_to(args.data_dir).as_posix()


# ---------------------------------------------------------------- arrays on disk


def temporary_array(args, shape, dtype):
    """Open an array in a file without a name, which vanishes with the process, kills included.

    It is written by ordinary writes, and read through a memory map.
    """
    folder = args.cache_dir or Path(args.model).parent
    file = tempfile.TemporaryFile(dir=folder, buffering=0)
    return map_array(file, folder.resolve(), shape, dtype)


def map_array(file, place, shape, dtype):
    """Return the DiskArray in an open file, which takes no space before it is written."""
    with utils.naming(place):
        file.truncate(int(np.prod(shape)) * np.dtype(dtype).itemsize)
    return DiskArray(file, np.memmap(file, dtype, "r", shape=shape), place)


def write_rows(array, rows, values):
    """Write rows of a DiskArray; a full disk is an OSError here, and never a crash in the map."""
    values = np.ascontiguousarray(values, array.rows.dtype)
    breaks = np.flatnonzero(np.diff(rows) != 1) + 1
    with utils.naming(array.place):
        for first, some in zip(np.array(rows)[[0, *breaks]], np.split(values, breaks)):
            data = memoryview(some.view("uint8").reshape(-1))
            array.file.seek(int(first) * values[0].nbytes)
            while data:
                data = data[array.file.write(data) :]
