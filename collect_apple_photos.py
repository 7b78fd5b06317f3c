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
"""Make a training set out of the people in an Apple Photos library, Photos 1 (2015) to Photos 11.

    python collect_apple_photos.py "Photos Library.photoslibrary" people --dry-run
    python collect_apple_photos.py "Photos Library.photoslibrary" people --min-images 20
    python train.py people model

Every face becomes a square picture in people/<person>/, one without a name in people/unknown/.
The library is only read, never changed, and nothing leaves this machine.
"""

import argparse
import collections
import contextlib
import math
import os
import re
import shutil
import sqlite3
import tempfile
import unicodedata
from pathlib import Path
from typing import NamedTuple

import imaging
import utils

LOCK = "collect_apple_photos.lock"  # marks the working folder as ours; locked while in use
# Where Photos 5 to 11 keep pictures: own originals, those of shared albums (until Photos 7, since
# Photos 8), those shared with you;
ORIGINALS = """
    originals resources/cloudsharing/data scopes/cloudsharing/data
    scopes/syndication/originals scopes/momentshared/originals
""".split()
# edited pictures at full size; smaller copies of the three, and of what others share with you.
RENDERS = ("_1_201_a.jpeg", "_1_201_a.heic")
DERIVATIVES = """
    resources resources/cloudsharing/resources scopes/cloudsharing/resources
    scopes/syndication/resources scopes/momentshared/resources
""".split()
HIDDEN = -1  # type of a person whom the user has hidden in People
SPARE = "26 = 2"  # of a picture's bits in a burst: neither picked by the user (8) nor shown (16)
NOBODY = (None, False)  # neither a name, nor hidden


class Face(NamedTuple):
    """A face as every generation of libraries gives it. Its box is a square."""

    person: str | None
    stem: str  # of the file to write
    pictures: tuple  # paths where the full picture may be, the best first
    derivatives: tuple  # paths of smaller copies of it
    thumbnail: Path | bytes | None  # Photos' own picture of the face
    is_film: bool
    hidden: str | None  # why the user does not want to see it
    x: float  # the box's centre as a fraction of the picture's width,
    y: float  # and of its height, from below
    size: float  # the box's side as a fraction of the picture's longer side
    width: float  # of the upright picture as Photos knows it, in pixels
    height: float


def fail(path, problem):
    """Raise UserError for a file or folder."""
    raise utils.UserError(f"{utils.escape(path)}: {problem}")


def read_library(library, folder, include_hidden):
    """Return the faces of a library as a list of Face, from copies of its databases in `folder`."""
    # Photos may have written between the copying of a database and of its -wal
    for is_last in (False, True):
        try:
            return find_faces(library, folder, include_hidden)
        except PermissionError as error:
            place = "System Settings > Privacy & Security > Full Disk Access"
            fail(error.filename, f"may not be read: on a Mac, allow your terminal in {place}")
        except sqlite3.DatabaseError as error:
            if is_last:
                state = f"damaged, incomplete or of an unknown layout ({utils.escape(error)})"
                advice = "quit Photos; if this is a copy of a library, copy it again"
                fail(library, f"its database is {state}: {advice}")


def find_faces(library, folder, include_hidden):
    """Return the faces by the first reader whose database is there and has a table of faces."""
    roots = [path for path in library.iterdir() if path.name.lower() == "database"]
    files = {path.name.lower(): path for root in roots if root.is_dir() for path in root.iterdir()}
    # Photos.sqlite before photos.db, for its libraries also hold a photos.db, without faces.
    for reader, table, *names in (
        (read_photos_5, "ZDETECTEDFACE", "photos.sqlite"),
        (read_photos_1_to_4, "RKFace", "photos.db"),
        (read_photos_1_to_4, "RKFace", "person.db", "imageproxies.apdb", "library.apdb"),
    ):
        if names[0] in files:
            with contextlib.closing(open_copies(files, names, folder)) as db:
                if columns(db, table):
                    return list(reader(library, db, include_hidden))
    if any(name.startswith(("photos.sqlite", "photos.db", "person.db")) for name in files):
        advice = "copy the library again, whole, with Photos closed"  # perhaps only a -wal is here
        fail(library, f"its database is missing or has no table of faces: {advice}")
    if {"apdb", "faces.db", "library.apdb"} & files.keys():
        advice = "open it with Photos, which makes one of its own"
        fail(library, f"this is a library of iPhoto or Aperture: {advice}")
    advice = "give the folder whose name ends in .photoslibrary"
    fail(library, f"this is no Apple Photos library: {advice}")


def open_copies(files, names, folder):
    """Copy databases, each with its -wal; return the first, the others attached to it.

    All that is new may lie in the -wal.
    """
    folder = Path(tempfile.mkdtemp(dir=folder))
    wanted = {name + end for name in names for end in ("", "-wal")}
    for name in sorted(wanted & files.keys()):  # a database before its -wal
        shutil.copyfile(files[name], folder / name)
    db = sqlite3.connect(folder / names[0])
    db.row_factory = sqlite3.Row
    db.text_factory = lambda data: data.decode(errors="replace")
    for name in names[1:]:
        db.execute("ATTACH ? AS ?", (str(folder / name), name.partition(".")[0]))
    return db


def columns(db, table):
    """Return the names of a table's columns, none if there is no such table."""
    return {row["name"] for row in db.execute(f"PRAGMA table_info({table})")}


def add_missing(db, table, names):
    """Add the columns that this version of Photos lacks to a table, with NULL in all rows.

    The databases are copies, so one query does for all versions. A misspelt name is added, too.
    """
    for name in set(names.split()) - columns(db, table):
        db.execute(f"ALTER TABLE {table} ADD COLUMN {name}")


def find_persons(rows):
    """Return {key: (name or None, is hidden)} from rows (key, names, key merged into, type)."""
    rows = {row[0]: row[1:] for row in rows}
    persons = {}
    for start in rows:
        key = start
        passed = set()
        while key in rows and rows[key][2] and key not in passed:
            passed.add(key)
            key = rows[key][2]
        full, shown, merged, kind = rows.get(key, (None,) * 4)
        name = unicodedata.normalize("NFC", str(full or "").strip() or str(shown or "").strip())
        # merged in a circle: unknown
        persons[start] = name if name and not merged else None, kind == HIDDEN
    return persons


def index_by_name(folders, pattern, place):
    """Return {part of the name: paths} of the pictures below folders whose names match a pattern.

    place: which of the parts between underscores.
    """
    found = collections.defaultdict(list)
    for folder in folders:
        for path in sorted(folder.rglob(pattern)):
            if path.suffix.lower() in imaging.PICTURE_ENDINGS:
                found[path.stem.split("_")[place]].append(path)
    return found


def read_photos_5(library, db, include_hidden):
    """Yield the faces of Photos 5 to 11. Columns are looked up: even beta versions differ."""
    photos = "ZASSET" if columns(db, "ZASSET") else "ZGENERICASSET"
    suffix = "FORFACE" if "ZASSETFORFACE" in columns(db, "ZDETECTEDFACE") else ""
    edited = "ZADJUSTMENTSSTATE"
    if edited not in columns(db, photos):
        edited = "ZHASADJUSTMENTS"
    add_missing(db, photos, "ZAVALANCHEPICKTYPE ZVISIBILITYSTATE")
    add_missing(db, "ZDETECTEDFACE", "ZDETECTIONTYPE")
    add_missing(db, "ZPERSON", "ZTYPE")
    query = "SELECT Z_PK, ZFULLNAME, ZDISPLAYNAME, ZMERGETARGETPERSON, ZTYPE FROM ZPERSON"
    persons = find_persons(db.execute(query))
    query = "SELECT ZASSET, ZPERSON, CAST(ZRESOURCEDATA AS BLOB) FROM ZFACECROP"
    thumbnails = {(of, persons.get(key, NOBODY)[0]): data for of, key, data in db.execute(query)}
    copies = index_by_name([library / name / "derivatives" for name in DERIVATIVES], "*_*", 0)
    query = f"""
        SELECT IFNULL(f.ZUUID, f.Z_PK) AS uuid, f.ZPERSON{suffix} AS person,
               p.Z_PK AS photo, p.ZUUID AS asset, p.{edited} AS edited,
               p.ZDIRECTORY AS folder, p.ZFILENAME AS file,
               p.ZSAVEDASSETTYPE = 10 AS referenced, p.ZKIND = 1 AS is_film,
               p.ZAVALANCHEPICKTYPE & {SPARE} OR IFNULL(p.ZVISIBILITYSTATE, 0) <> 0 AS is_spare,
               f.ZCENTERX AS x, f.ZCENTERY AS y, f.ZSIZE AS size,
               f.ZSOURCEWIDTH AS width, f.ZSOURCEHEIGHT AS height
        FROM ZDETECTEDFACE f JOIN {photos} p ON p.Z_PK = f.ZASSET{suffix}
        WHERE f.ZSIZE > 0 AND IFNULL(f.ZISINTRASH, 0) = 0 AND IFNULL(f.ZHIDDEN, 0) = 0
          AND IFNULL(p.ZTRASHEDSTATE, 0) = 0 AND (IFNULL(p.ZHIDDEN, 0) = 0 OR {include_hidden:d})
          AND IFNULL(f.ZDETECTIONTYPE, 1) IN (0, 1)"""
    for row in db.execute(query):
        person = persons.get(row["person"], NOBODY)
        thumbnail = person[0] and thumbnails.pop((row["photo"], person[0]), None)
        paths = picture_paths(row, library), copies[str(row["asset"])]
        yield make_face(row, person, *paths, thumbnail)


def picture_paths(row, library):
    """Return the paths where Photos 5 to 11 may keep a photo at full size."""
    uuid, file = str(row["asset"]), f"{row['folder']}/{row['file']}"
    if row["edited"]:  # never the original: the box belongs to the edited picture
        return [f"{library}/resources/renders/{uuid[:1]}/{uuid}{end}" for end in RENDERS]
    if row["referenced"] and file.startswith("/"):
        return [file]
    return [f"{library}/{folder}/{file}" for folder in ORIGINALS]


def read_photos_1_to_4(library, db, include_hidden):
    """Yield the faces of Photos 1, whose other two databases are attached, and of Photos 2 to 4."""
    add_missing(db, "RKPerson", "displayName mergeTargetPersonId personType")
    query = "SELECT modelId, name, displayName, mergeTargetPersonId, personType FROM RKPerson"
    persons = find_persons(db.execute(query))
    thumbnails, edits = find_resources(library, db)
    # without the small ones, _mini_
    previews = index_by_name([library / "resources/proxies/derivatives"], "*_[lt]*_*", -1)
    for row in db.execute(faces_query(db, include_hidden)):
        pictures = [f"{library}/Masters/{row['file']}"]
        is_edited = bool(row["edited"])
        if is_edited:
            pictures = edits.get((row["version"], row["tag"]), ())
        elif row["referenced"]:  # kept outside of the library, on this disk or another
            pictures = [f"{disk}/{row['file']}" for disk in ("", *Path("/Volumes").glob("*"))]
        copies = previews[row["hex"]]
        copies = [path for path in copies if path.name.startswith("UNADJUSTED") != is_edited]
        person = persons.get(row["person"], NOBODY)
        yield make_face(row, person, pictures, copies, thumbnails.get(row["face"]))


def find_resources(library, db):
    """Return {face: path} of Photos' own pictures of faces, {(version, tag): paths} of edited ones.

    Photos 1 names their files; those of Photos 2 to 4 bear the number of their row.
    """
    add_missing(db, "RKModelResource", "attachedModelType resourceUuid filename")
    # by name: some lie in another folder than their number says
    numbered = index_by_name([library / "resources/media"], "f*_*", 1)
    thumbnails, edits = {}, {}
    query = """
        SELECT attachedModelId, attachedModelType, resourceType, resourceTag,
               printf('%x', modelId), resourceUuid, filename
        FROM RKModelResource"""
    for of, of_type, kind, tag, number, uuid, file in db.execute(query):
        paths = numbered[number]
        if uuid:
            codes = "/".join(str(ord(letter)) for letter in str(uuid)[:2])
            paths = [Path(f"{library}/resources/modelresources/{codes}/{uuid}/{file}")]
        # of a face, not of a photo with the same number
        if of_type == 5 or (of_type is None and "face" in str(file).lower()):
            thumbnails[of] = next(iter(paths), None)
        elif (of_type, kind) == (2, 4):
            edits[of, tag] = paths
    return thumbnails, edits


def faces_query(db, include_hidden):
    """Return the SQL that gives the faces of an RKFace table with their photos."""
    if not columns(db, "RKVersion"):  # Photos 1 without its Library.apdb: only thumbnails
        db.execute("CREATE TEMP TABLE RKVersion (modelId, uuid, masterUuid, isInTrash)")
        db.execute("CREATE TEMP TABLE RKMaster (uuid, imagePath)")
    names = "adjustmentUuid hasAdjustments isHidden type nonRawMasterUuid"
    add_missing(db, "RKVersion", f"{names} burstPickType showInLibrary")
    add_missing(db, "RKMaster", "fileIsReference")
    is_first = "imageId" in columns(db, "RKFace")
    key, image = ("uuid", "imageId") if is_first else ("modelId", "imageModelId")
    return f"""
        SELECT IFNULL(f.uuid, '') || '-' || f.modelId AS uuid, f.modelId AS face,
               f.personId AS person, IFNULL(v.uuid, f.{image}) AS asset, v.modelId AS version,
               printf('%x', v.modelId) AS hex, v.adjustmentUuid AS tag,
               IFNULL(v.hasAdjustments, IFNULL(v.adjustmentUuid, '') NOT IN
                      ('', 'UNADJUSTEDNONRAW', 'UNADJUSTEDRAW')) AS edited,
               m.imagePath AS file, m.fileIsReference AS referenced, v.type = 8 AS is_film,
               v.burstPickType & {SPARE}
               OR (IFNULL(v.burstPickType, 0) <> 0 AND v.showInLibrary = 0) AS is_spare,
               f.centerX AS x, f.centerY AS y, f.size, f.sourceWidth AS width,
               f.sourceHeight AS height
        FROM RKFace f LEFT JOIN RKVersion v ON v.{key} = f.{image}
             LEFT JOIN RKMaster m  -- of a RAW and a JPEG, the JPEG
             ON m.uuid = IFNULL(NULLIF(v.nonRawMasterUuid, ''), v.masterUuid)
        WHERE f.size > 0 AND IFNULL(f.isInTrash, 0) = 0 AND IFNULL(f.hidden, 0) = 0
          AND IFNULL(v.isInTrash, 0) = 0 AND (IFNULL(v.isHidden, 0) = 0 OR {include_hidden:d})
          AND (v.modelId IS NOT NULL OR NOT EXISTS (SELECT 1 FROM RKVersion))"""


def make_face(row, person, pictures, derivatives, thumbnail):
    """Return the Face of a database's row. A value that should be a number and is not becomes NaN.

    The columns that each reader's SQL names: asset and uuid; x and y of the box's centre and its
    size, in shares of the picture; width and height of the picture in pixels; is_film; is_spare
    for an unpicked picture of a burst. Whatever else a Face is to know comes in here.
    """
    numbers = {
        name: float(row[name]) if isinstance(row[name], int | float) else math.nan
        for name in ("x", "y", "size", "width", "height")
    }
    hidden = "of a person hidden in People" if person[1] else None
    if row["is_spare"]:
        hidden = "of a burst, not picked"
    return Face(
        person=person[0],
        stem=re.sub(r"[^a-zA-Z0-9_+%-]", "_", f"{row['asset']}-{row['uuid']}")[:150],
        pictures=tuple(pictures),
        derivatives=tuple(derivatives),
        thumbnail=thumbnail,
        is_film=bool(row["is_film"]),
        hidden=hidden,
        **numbers,
    )


def collect(faces, library, dataset, args):
    """Cut the faces out into `dataset`/<person>.

    Returns {person's folder: pictures} and {reason: faces that were skipped}.
    """
    counts = collections.Counter()
    skipped = collections.Counter()
    smaller = 0
    dataset.mkdir()
    groups = group_by_picture(faces, dataset, skipped, args)
    work = utils.ordered_parallel_map(
        lambda group: collect_picture(group, library, args), groups, imaging.THREADS
    )
    for results in utils.progress(work, len(groups), "pictures"):
        for target, reason, is_smaller in results:
            (skipped if reason else counts)[reason or target.parent.name] += 1
            smaller += is_smaller and not reason
    if smaller:
        come = utils.count(smaller, "face comes", "faces come")
        problem = "from smaller copies: the pictures are not here or cannot be read"
        utils.warn(f"{utils.escape(library)}: {come} {problem}")
    return counts, skipped


def group_by_picture(faces, dataset, skipped, args):
    """Return lists of pairs (Face, file to write), one list a picture; count what is left out."""
    persons = {face.person for face in faces if face.person}
    folders = utils.folder_names(persons, taken=[utils.UNKNOWN]) | {None: utils.UNKNOWN}
    stems, groups = set(), collections.defaultdict(list)
    for face in faces:
        if face.hidden and not args.include_hidden:
            skipped[f"{face.hidden} (--include-hidden)"] += 1
        elif args.no_unknown and not face.person:
            skipped["without a name (--no-unknown)"] += 1
        elif face.stem in stems:  # of two persons, even: both may go into unknown
            skipped["twice in the database"] += 1
        else:
            stems.add(face.stem)
            target = dataset / folders[face.person] / f"{face.stem}.jpg"
            key = face.pictures, face.derivatives, face.width, face.height
            groups[key].append((face, target))
    return list(groups.values())


def collect_picture(faces, library, args):
    """Cut out one picture's faces, pairs (Face, file).

    Returns triples (file, reason or None, from a smaller copy).
    """
    image = None
    is_smaller = True
    problem = None
    try:
        image, is_smaller = read_photo(faces[0][0], library)
    except imaging.PictureError as error:
        problem = str(error)
    results = []
    for face, target in faces:
        found = (face, image, args.context) if image else read_thumbnail(face, library)
        reason = save_crop(*found, target, args) if found else problem
        results.append((target, reason, is_smaller))
    return results


def read_photo(face, library):
    """Return the best picture there is of a face's photo, and whether it is a smaller copy.

    Raises PictureError with the reason when there is none.
    """
    if face.is_film:  # its still pictures show another moment than the box
        raise imaging.PictureError("on a film")
    reason = "no picture on this disk (perhaps only in iCloud)"
    for path in candidates(face, library):
        try:
            image = imaging.upright(open_photo(Path(path), library))
        except FileNotFoundError:
            continue
        except (MemoryError, imaging.PictureError):
            reason = "the picture cannot be read (RAW, damaged or of an unknown format)"
            continue
        if not imaging.is_other_shape(image.size, (face.width, face.height)):
            return image, path in face.derivatives
        reason = "the picture has another shape than Photos says"
    raise imaging.PictureError(reason)


def candidates(face, library):
    """Yield the paths where the picture of a face may be, the best first."""
    yield from face.pictures
    yield from sorted(face.derivatives, key=lambda path: count_pixels(path, library), reverse=True)


def count_pixels(path, library):
    """Return how many pixels a picture has, 0 if it cannot be read."""
    with contextlib.suppress(FileNotFoundError, imaging.PictureError):
        return math.prod(open_photo(path, library).size)
    return 0


def open_photo(path, library):
    """Return a picture, a Path or its bytes, as a PIL image: only the header has been read.

    Raises FileNotFoundError also for one that leaves the library by a link.
    """
    if isinstance(path, bytes):
        return imaging.open_picture(path)
    is_outside = not path.is_relative_to(library)
    if not os.path.isfile(path) or not (is_outside or utils.leads_into(path, library)):
        raise FileNotFoundError(path)
    # others are films, or RAW files of which Pillow would give a preview
    if path.suffix.lower() not in imaging.PICTURE_ENDINGS:
        raise imaging.PictureError("not a kind of picture that can be opened")
    return imaging.read_picture(path)[1]


def read_thumbnail(face, library):
    """Return Photos' own picture of a face, None if there is none: what save_crop takes."""
    if face.thumbnail is None:
        return None
    try:
        image = imaging.upright(open_photo(face.thumbnail, library))
    except (FileNotFoundError, MemoryError, imaging.PictureError):
        return None
    size = min(image.size) / max(image.size) / 2  # they are about twice as large as the box
    return face._replace(x=0.5, y=0.5, size=size), image, 2


def save_crop(face, image, context, target, args):
    """Save the square around a face, `context` times as large as its box.

    face: its box in shares of `image`, which may be Photos' own picture of it. Returns None, or why
    it was not saved.
    """
    width, height = image.size
    side = face.size * max(width, height)
    if not (0 <= face.x <= 1 and 0 <= face.y <= 1 and face.size <= 1):
        return "the face's box makes no sense"
    if side < args.min_size:
        return f"smaller than {args.min_size} pixels (--min-size)"
    if not args.dry_run:
        target.parent.mkdir(exist_ok=True)  # not its parents: after a Ctrl-C they are gone for good
        center = face.x * width, (1 - face.y) * height
        imaging.save_jpeg(target, imaging.crop_square(image, *center, side * context))
    return None


def merge_rare(counts, skipped, dataset, args):
    """Move persons with too few pictures into unknown, or leave them out, on disk and in counts."""
    unknown = dataset / utils.UNKNOWN
    for name in [*counts.keys() - {utils.UNKNOWN}]:
        if counts[name] >= args.min_images:
            continue
        count = counts.pop(name)
        if args.no_unknown:
            skipped[f"of a person with fewer than {args.min_images} (--min-images)"] += count
        else:
            counts[utils.UNKNOWN] += count
            for path in list((dataset / name).glob("*.jpg")):
                unknown.mkdir(exist_ok=True)
                path.rename(unknown / path.name)
        shutil.rmtree(dataset / name, ignore_errors=True)


def check_folders(library, out, dry_run):
    """Raise UserError unless `library` is a folder, and `out` absent or empty and outside of it."""
    if not library.is_dir():
        fail(library, "no such folder: give the one that ends in .photoslibrary")
    if utils.is_inside(out, library):
        fail(out, "lies in the library, which stays as it is: choose another out_dir")
    if dry_run:
        return
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        fail(out, "is there already: choose another out_dir or move this one away")
    if os.path.ismount(out):  # it could not be replaced at the end
        fail(out, "is where a disk is mounted: give a folder in it")
    if out == Path.cwd():
        fail(out, "is the current folder, which cannot be replaced: give a folder in it")


@contextlib.contextmanager
def working_folder(out):
    """Give a folder of mode 0700 beside `out`, cleared of what a killed run left, gone at the end.

    Only an empty folder or one with our mark is touched: an empty file, locked while a run lives.
    """
    folder = next(path for path in out.parents if path.is_dir()) / f".{out.name}-unfinished"
    is_ours = folder.is_dir() and ((folder / LOCK).is_file() or not any(folder.iterdir()))
    if folder.is_symlink() or (folder.exists() and not is_ours):
        fail(folder, "stands in the way and is not from here: move it elsewhere")
    folder.mkdir(exist_ok=True)
    folder.chmod(0o700)
    work = folder / "work"
    try:
        with utils.file_lock(folder / LOCK):
            shutil.rmtree(work, ignore_errors=True)
            work.mkdir()
            try:
                yield work
            finally:
                shutil.rmtree(work, ignore_errors=True)
    finally:
        with contextlib.suppress(OSError):  # another run is at work in it
            folder.rmdir()


def warn_rare(counts, args):
    """Warn if --min-images leaves nobody; say which values would keep how many persons."""
    sizes = [counts[name] for name in counts if name != utils.UNKNOWN]
    if not sizes or max(sizes) >= args.min_images:
        return
    kept = []
    for size, persons in sorted(collections.Counter(sizes).items(), reverse=True)[:5]:
        people = f"{utils.count(persons, 'person')} with {utils.count(size, 'picture')}"
        kept.append(f"{people} ({size} would keep {sum(other >= size for other in sizes)})")
    utils.warn(f"--min-images {args.min_images} leaves nobody with a name: {', '.join(kept)}")


def parse_arguments():
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )

    def option(name, text, shown="%(default)s", **how):
        parser.add_argument(f"--{name}", help=f"{text} (default: {shown})", **how)

    parser.add_argument(
        "library", type=utils.to_path, help="the folder whose name ends in .photoslibrary"
    )
    parser.add_argument("out_dir", type=utils.to_path, help="folder to write to, absent or empty")
    number = utils.number
    option("context", "side of the crop / of the face's box, which is tighter than webcam.py's",
           type=number(float, 0.5, 10), default=2.2, metavar="F")  # fmt: skip
    option("min-size", "skip faces with a smaller box",
           type=number(int, 1, 10**6), default=48, metavar="PX")  # fmt: skip
    option("min-images", "persons with fewer pictures go into unknown, or with --no-unknown are "
           "left out", type=number(int, 1, 10**9), default=1, metavar="N")  # fmt: skip
    for name, text in (
        ("no-unknown", "leave out faces without a name"),
        (
            "include-hidden",
            "also what the user hid: photos, persons, and pictures of a burst that nobody picked",
        ),
        ("dry-run", "print the table as it would be, write nothing"),
    ):
        option(name, text, "off", action="store_true")
    return parser.parse_args()


def main():
    """Collect the faces of a library into a new folder."""
    args = parse_arguments()
    library, out = (Path(os.path.realpath(path)) for path in (args.library, args.out_dir))
    check_folders(library, out, args.dry_run)
    with tempfile.TemporaryDirectory() if args.dry_run else working_folder(out) as folder:
        dataset = Path(folder, "dataset")
        faces = read_library(library, Path(folder), args.include_hidden)
        counts, skipped = collect(faces, library, dataset, args)
        warn_rare(counts, args)
        merge_rare(counts, skipped, dataset, args)
        if counts and not args.dry_run:
            out.parent.mkdir(parents=True, exist_ok=True)
            with contextlib.suppress(FileNotFoundError):
                out.rmdir()
            dataset.rename(out)
    nobody = "no faces: Photos has found none in this library, so nothing was written"
    before = "the same without --dry-run, then " if args.dry_run else ""
    utils.print_people(counts, skipped, nobody, args.out_dir, before)


if __name__ == "__main__":
    utils.run(main)
