"""What collect_apple_photos.py promises: on libraries drawn here, and on real ones at hand."""

import collections
import hashlib
import io
import json
import os
import random
import re
import shutil
import signal
import sqlite3
import stat
import tarfile
import time
from pathlib import Path

import pytest
from conftest import ROOT, assert_same_crop, limit, limited, run_here, start, texture
from photos_library import LIBRARIES, jpeg, make_library
from PIL import Image, ImageOps

import collect_apple_photos

SCRIPT = ROOT / "collect_apple_photos.py"
REAL = ROOT.parent / "shared" / "data" / "photos_libraries"
SIZE = (640, 480)
IN_FRAME = (300, 200, 80)
NO_PICTURE = "1 skipped: no picture on this disk (perhaps only in iCloud)"


def collect(library, out, *options, code=0):
    """Run the script here; return what it printed on stdout, and on stderr, as lists of lines."""
    done = run_here(SCRIPT.name, Path.cwd(), library, out, *options)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout.splitlines(), done.stderr.splitlines()


def new_library(folder, generation=10):
    return LIBRARIES[generation](folder / "Test.photoslibrary")


def add_face(library, photo, name="Ann", **columns):
    """Add a face of a new person amid a picture of 640 x 480. Returns its key."""
    return library.face(photo, library.person(name), SIZE, IN_FRAME, **columns)


def collect_beside(library, *options):
    """Finish a library and collect its faces into people/ beside it."""
    return collect(library.finish(), library.path.with_name("people"), *options)


def crop_of(library, name="Ann"):
    (file,) = library.path.with_name("people").joinpath(name).iterdir()
    return file


def assert_collected(library, picture, box=IN_FRAME, context=2.2):
    """Collect, and assert that Ann's only crop was cut from this picture."""
    lines, errors = collect_beside(library)
    assert_same_crop(crop_of(library), picture, box, context)
    return lines, errors


def state_of(folder):
    """Return all that must not change in a library: kinds, times, and the bytes of files."""
    state = {}
    for path in [folder, *folder.rglob("*")]:
        digest = path.is_file() and hashlib.sha256(path.read_bytes()).digest()
        state[path] = path.stat().st_mode, path.stat().st_mtime_ns, digest
    return state


def files(out):
    return sorted(str(path.relative_to(out)) for path in out.rglob("*") if path.is_file())


def counts_of(out):
    return {folder.name: len(list(folder.iterdir())) for folder in out.iterdir()}


# ---------------------------------------------------------------- the whole, for each generation


@pytest.mark.parametrize("generation", LIBRARIES)
def test_every_face_goes_to_its_person_from_the_right_place(tmp_path, generation):
    """Two of Ann's faces, the second and the third, have uuids that differ by case in old ones."""
    first, second = texture(1), texture(2, (480, 640))
    boxes = [(400, 300, 100), (150, 120, 60), (250, 150, 70), (560, 100, 50)]
    faces = list(zip(["Ben", "Ann", "Ann", None], boxes))
    photos = [(first, faces), (second, [("Ann", IN_FRAME)])]
    library = make_library(tmp_path / "Test.photoslibrary", generation, photos)
    before, people = state_of(library), tmp_path / "people"
    lines, errors = collect(library, people)
    assert lines == [
        "images  person",
        "     3  Ann",
        "     1  Ben",
        "     1  unknown",
        "5 faces: 4 named (2 persons), 1 unknown, 0 skipped",
    ]
    assert errors == [
        "enough to train on, but 3 of 3 have fewer than 20 pictures: more would help",
        f"next: python train.py {people} model",
    ]
    cut = [*sorted(people.rglob("*.jpg"), key=lambda path: Image.open(path).width)]
    assert [path.parent.name for path in cut] == ["unknown", "Ann", "Ann", "Ann", "Ben"]
    places = [(first, boxes[3]), (first, boxes[1]), (first, boxes[2]), (second, IN_FRAME)]
    for path, place in zip(cut, [*places, (first, boxes[0])]):
        assert_same_crop(path, *place)
    assert state_of(library) == before
    assert sorted(os.listdir(tmp_path)) == ["Test.photoslibrary", "people"]
    assert len({path.name.lower() for path in cut}) == 5
    image = Image.open(cut[0])
    assert (image.format, image.mode, dict(image.getexif())) == ("JPEG", "RGB", {})


@pytest.mark.parametrize(
    ("box", "context"), [((10, 10, 90), 2.2), ((630, 470, 90), 1), ((320, 240, 250), 2.2)]
)
def test_crops_at_the_edge_are_shifted_or_padded_and_stay_square(tmp_path, box, context):
    library = make_library(tmp_path / "Test.photoslibrary", 6, [(texture(4), [("Ann", box)])])
    collect(library, tmp_path / "people", "--context", context)
    (file,) = (tmp_path / "people" / "Ann").iterdir()
    assert_same_crop(file, texture(4), box, context)


# ---------------------------------------------------------------- rows


PERSON, BURST = "of a person hidden in People", "of a burst, not picked"
ROWS = (  # generations, table, its columns, what becomes of a face with such a row
    ([10], "face", {"ZISINTRASH": 1}, "no face"),
    ([10], "face", {"ZHIDDEN": 1}, "no face"),
    ([10], "face", {"ZSIZE": 0.0, "ZCENTERX": 0.0, "ZCENTERY": 0.0}, "no face"),  # only a body
    ([10], "face", {"ZSIZE": None}, "no face"),
    ([10], "face", {"ZASSETFORFACE": None, "ZASSETFORTORSO": 1}, "no face"),
    ([10], "face", {"ZDETECTIONTYPE": 3}, "no face"),  # a cat's
    ([10], "photo", {"ZTRASHEDSTATE": 1}, "no face"),
    ([10], "photo", {"ZHIDDEN": 1}, "hidden"),
    ([5, 10], "person", {"ZTYPE": -1}, PERSON),
    ([10], "photo", {"ZVISIBILITYSTATE": 2}, BURST),
    ([9, 10], "photo", {"ZAVALANCHEPICKTYPE": 2}, BURST),
    ([9, 10], "photo", {"ZAVALANCHEPICKTYPE": 8}, "shown"),  # picked
    ([9, 10], "photo", {"ZAVALANCHEPICKTYPE": 16}, "shown"),  # the key picture
    ([9, 10], "photo", {"ZAVALANCHEPICKTYPE": 52}, "shown"),  # Photos' own choice
    ([1, 2], "face", {"isInTrash": 1}, "no face"),
    ([1, 2], "face", {"hidden": 1}, "no face"),
    ([1, 2], "face", {"size": 0}, "no face"),
    ([2], "face", {"imageModelId": None, "trainingType": 1}, "no face"),
    ([1], "face", {"imageId": "nowhere"}, "no face"),
    ([1, 2], "photo", {"isInTrash": 1}, "no face"),
    ([1, 2], "photo", {"isHidden": 1}, "hidden"),
    ([2], "person", {"personType": -1}, PERSON),
    ([2], "photo", {"burstPickType": 2}, BURST),
    ([2], "photo", {"burstPickType": 4, "showInLibrary": 0}, BURST),
    ([2], "photo", {"burstPickType": 8}, "shown"),
)


@pytest.mark.parametrize("generation", [1, 2, 5, 9, 10])
def test_faces_that_nobody_wants_are_not_counted_or_taken_on_demand(tmp_path, generation):
    library, found = new_library(tmp_path, generation), collections.Counter(shown=1)
    add_face(library, library.photo(texture(1)))
    for generations, table, columns, outcome in ROWS:
        if generation in generations:
            of = {name: columns if name == table else {} for name in ("face", "photo", "person")}
            photo = library.photo(texture(2), **of["photo"])
            person = library.person("Ann", **of["person"])
            library.face(photo, person, SIZE, IN_FRAME, **of["face"])
            found[outcome] += 1
    path, shown, skipped = library.finish(), found["shown"], found[BURST] + found[PERSON]
    reasons = [f"{found[r]} skipped: {r} (--include-hidden)" for r in (BURST, PERSON) if found[r]]
    total = f"{shown + skipped} faces: {shown} named (1 persons), 0 unknown, {skipped} skipped"
    assert collect(path, tmp_path / "people")[0][1:] == [f"{shown:6}  Ann", *reasons, total]
    shown += skipped + found["hidden"]
    total = f"{shown} faces: {shown} named (1 persons), 0 unknown, 0 skipped"
    lines, _ = collect(path, tmp_path / "all", "--include-hidden")
    assert lines[1:] == [f"{shown:6}  Ann", total]


# ---------------------------------------------------------------- persons


def test_names_come_from_the_right_column_and_through_merges(tmp_path):
    library = new_library(tmp_path)
    person, photo, wanted = library.person, library.photo(texture(5)), []
    suzy = person("Suzy")
    second = person("Susan", ZMERGETARGETPERSON=suzy, ZVERIFIEDTYPE=-2)
    person("Back", Z_PK=501, ZMERGETARGETPERSON=502)
    circle = person("Forth", Z_PK=502, ZMERGETARGETPERSON=501)
    for key, folder in (
        (None, "unknown"),
        (999, "unknown"),
        (person(None), "unknown"),
        (person("  "), "unknown"),
        (person(None, ZDISPLAYNAME="Shown"), "Shown"),
        (person("Full", ZDISPLAYNAME="Shown"), "Full"),
        (person("Su", ZMERGETARGETPERSON=second, ZVERIFIEDTYPE=-2), "Suzy"),
        (circle, "unknown"),
        (person("Lost", ZMERGETARGETPERSON=999), "unknown"),
    ):
        face = library.face(photo, key, SIZE, IN_FRAME)
        wanted.append(f"{folder}/{library.uuid(photo)}-{face:08X}-FACE-4000-8000-000000000000.jpg")
    collect_beside(library)
    assert files(tmp_path / "people") == sorted(wanted)


FOLDERS = {"Katie": 3, "katie (2)": 1, "José": 2, "unknown": 1, "unknown (2)": 1, "_._.._up": 1}
FOLDERS |= {"tab__[31m": 1}


@pytest.mark.parametrize("generation", [1, 2, 10])
def test_persons_of_one_name_share_a_folder_and_others_never_do(tmp_path, generation):
    library = new_library(tmp_path, generation)
    photo = library.photo(texture(6))
    names = "Katie", "Katie", " Katie ", "katie", "José", "Jose\u0301", "unknown", "../../up"
    for name in (*names, "tab\t\x1b[31m"):
        add_face(library, photo, name)
    library.face(photo, None, SIZE, IN_FRAME)
    lines, _ = collect_beside(library)
    assert counts_of(tmp_path / "people") == FOLDERS
    assert lines[-2:] == [
        "     1  unknown",
        "10 faces: 9 named (6 persons), 1 unknown, 0 skipped",
    ]
    assert all("\x1b" not in line and "\t" not in line for line in lines)
    assert sorted(os.listdir(tmp_path)) == ["Test.photoslibrary", "people"]


# ---------------------------------------------------------------- which picture


@pytest.mark.parametrize(
    ("generation", "more"),
    [
        (10, {}),
        (10, {"end": "_1_201_a.heic"}),
        (1, {}),
        (2, {}),
        (2, {"folder": "00/02"}),  # another folder than its number says
    ],
    ids=str,
)
def test_edited_photos_are_cut_from_the_edited_picture(tmp_path, generation, more):
    library, edited, box = new_library(tmp_path, generation), texture(8, (400, 500)), (200, 250, 99)
    photo = library.photo(texture(7, (800, 600)))
    library.edit(photo, edited, **more)
    library.face(photo, library.person("Ann"), edited.size, box)
    assert_collected(library, edited, box)


@pytest.mark.parametrize("generation", [1, 2, 10])
def test_neither_films_nor_originals_of_lost_edited_pictures_are_cut(tmp_path, generation):
    library = new_library(tmp_path, generation)
    film = {"ZKIND": 1} if generation == 10 else {"type": 8}
    add_face(library, library.photo(texture(1), **film))
    photo = library.photo(texture(7))
    library.edit(photo)
    add_face(library, photo)
    lines, _ = collect_beside(library)
    total = "2 faces: 0 named (0 persons), 0 unknown, 2 skipped"
    assert lines[1:] == [NO_PICTURE, "1 skipped: on a film", total]
    assert not (tmp_path / "people").exists()


ORIGINALS = {"in iCloud": None, "damaged": b"not a picture", "truncated": jpeg(texture(9))[:20000]}
ORIGINALS["of another shape"] = jpeg(texture(9, (480, 640)))


@pytest.mark.parametrize("edited", [False, True])
@pytest.mark.parametrize("original", ORIGINALS)
def test_smaller_copies_stand_in_the_largest_first(tmp_path, original, edited):
    library, largest = new_library(tmp_path), texture(11, (448, 336))
    photo = library.photo(data=ORIGINALS[original])
    if edited:
        library.edit(photo)
    small = texture(10, (320, 240))
    library.smaller_copy(photo, small, "resources/derivatives/masters/{}_4_5005_c.jpeg")
    library.smaller_copy(photo, largest)
    add_face(library, photo)
    lines, errors = assert_collected(library, largest, [part * 0.7 for part in IN_FRAME])
    assert lines[-1] == "1 faces: 1 named (1 persons), 0 unknown, 0 skipped"
    warnings = [line for line in errors if line.startswith("warning: ")]
    assert any("1 face comes from smaller copies" in line for line in warnings)


def test_raw_files_give_way_to_copies_or_are_counted(tmp_path):
    library, tiff = new_library(tmp_path), io.BytesIO()
    texture(9, (160, 120)).save(tiff, "TIFF")  # what Pillow sees in many RAW files: a thumbnail
    with_copy, without = (library.photo(data=tiff.getvalue(), ending="dng") for _ in range(2))
    library.smaller_copy(with_copy, texture(10))
    add_face(library, with_copy)
    add_face(library, without)
    lines, _ = assert_collected(library, texture(10))
    reason = "the picture cannot be read (RAW, damaged or of an unknown format)"
    assert lines[-2] == f"1 skipped: {reason}"


@pytest.mark.parametrize("generation", [1, 2])
@pytest.mark.parametrize("number", [0x2B, 0x19B14])
def test_tiles_stand_in_and_never_those_of_another_row(tmp_path, generation, number):
    library = new_library(tmp_path, generation)
    tiles = {name: texture(seed, (240, 320)) for seed, name in enumerate(("Ann", "Ben"), 21)}
    faces = [add_face(library, library.photo(), name) for name in tiles]
    for face, tile in zip(faces, tiles.values()):
        library.tile(face, tile, *([number + face] if generation == 2 else []))
    if generation == 1:
        library.resource_of(faces[0], 2, texture(23, (240, 320)), "face-thumbnail.jpg")
    collect_beside(library)
    for name, tile in tiles.items():
        assert_same_crop(crop_of(library, name), tile, (120, 160, 240), 1)


def test_tiles_without_a_type_are_told_by_their_names(tmp_path):
    library, tile = new_library(tmp_path, "1 untyped"), texture(32, (240, 240))
    face = add_face(library, library.photo())
    for filename in ("IMG_0001.jpg", "FaceTile.PNG", "IMG_0002.jpg"):
        image = tile if "Tile" in filename else texture(33, (240, 240))
        library.resource_of(face, None, image, filename)
    assert_collected(library, tile, (120, 120, 240), 1)


def test_photos_1_without_its_library_database_still_has_tiles(tmp_path):
    library, tile = new_library(tmp_path, 1), texture(1, (200, 200))
    library.tile(add_face(library, library.photo()), tile)
    path = library.finish()
    (path / "database").rename(path / "Database")
    for file in (path / "Database").glob("Library.apdb*"):
        file.unlink()
    collect(path, tmp_path / "people")
    assert_same_crop(crop_of(library), tile, (100, 100, 200), 1)


def test_pictures_that_icloud_keeps_of_faces_are_the_last_resort(tmp_path):
    library, kept = new_library(tmp_path), texture(12, (256, 256))
    photo, ann, ben = library.photo(), library.person("Ann"), library.person("Ben")
    merged = library.person("Annie", ZMERGETARGETPERSON=ann)
    for person in (ann, ben, None):
        library.face(photo, person, SIZE, IN_FRAME)
    face = library.face(None, merged, (256, 256), (128, 128, 128), ZTRAININGTYPE=1)
    columns = {"ZASSET": photo, "ZFACE": face, "ZPERSON": merged, "ZRESOURCEDATA": jpeg(kept)}
    library.insert("ZFACECROP", **columns)
    lines, _ = assert_collected(library, kept, (128, 128, 256), 1)
    assert lines[-1] == "3 faces: 1 named (1 persons), 0 unknown, 2 skipped"


@pytest.mark.parametrize(
    "place",
    ["resources/cloudsharing/data", "scopes/cloudsharing/data", "scopes/syndication/originals"],
)
def test_shared_pictures(tmp_path, place):
    library = new_library(tmp_path, 9)
    library.write(f"{place}/album/IMG_1.JPG", jpeg(texture(14)))
    columns = {"ZSAVEDASSETTYPE": 4, "ZDIRECTORY": "album", "ZFILENAME": "IMG_1.JPG"}
    add_face(library, library.photo(**columns))
    assert_collected(library, texture(14))


@pytest.mark.parametrize(
    "place",
    [
        "resources/derivatives/{}_1_202_a.jpeg",
        "resources/cloudsharing/resources/derivatives/masters/{}_4_5005_c.jpeg",
        "scopes/cloudsharing/resources/derivatives/masters/{}_4_5005_c.jpeg",
        "scopes/syndication/resources/derivatives/{}_1_105_c.jpeg",
    ],
)
def test_of_copies_of_edited_and_shared_pictures_the_larger_one_wins(tmp_path, place):
    library = new_library(tmp_path)
    photo = library.photo()
    library.edit(photo)
    library.smaller_copy(photo, texture(16), place)
    library.smaller_copy(photo, texture(17, (320, 240)), "resources/derivatives/{}_1_102_o.jpeg")
    library.write(f"{place.format(f'A/{library.uuid(photo)}')}.plist", b"edit data")
    add_face(library, photo)
    assert_collected(library, texture(16))


@pytest.mark.parametrize("edited", [False, True])
def test_previews_of_photos_2_come_before_tiles(tmp_path, edited):
    """Where a photo was edited, those of the edited picture only."""
    library = new_library(tmp_path, 2)
    photo, right, large = library.photo(), ["edit1"] * edited, texture(19, (1280, 960))
    library.preview(photo, texture(18), "largepv", *right)
    library.preview(photo, texture(19, (320, 240)), "thumb", *right)
    library.preview(photo, large, "largepv", "UNADJUSTEDRAW" if edited else "old")
    library.preview(photo, large, "mini", *right)
    if edited:
        library.edit(photo)
    library.tile(add_face(library, photo), texture(20, (240, 320)))
    assert_collected(library, texture(18))


def test_of_a_raw_and_a_jpeg_the_jpeg_is_cut(tmp_path):
    library = new_library(tmp_path, 2)
    photo = library.photo(data=b"raw", place="2019/a.cr2", nonRawMasterUuid="jpeg")
    library.insert("RKMaster", uuid="jpeg", imagePath="2019/a.jpg")
    library.write("Masters/2019/a.jpg", jpeg(texture(21)))
    add_face(library, photo)
    assert_collected(library, texture(21))


@pytest.mark.parametrize(("kind", "named"), [(3, 0), (10, 1), ("master", 1)])
def test_only_referenced_pictures_may_lie_outside(tmp_path, kind, named):
    path = tmp_path / "elsewhere" / "a{b}.jpg"
    path.parent.mkdir()
    path.write_bytes(jpeg(texture(15)))
    if kind == "master":
        library = new_library(tmp_path, 2)
        photo = library.photo(place=str(path).lstrip("/"), is_reference=1)
    else:
        library, names = new_library(tmp_path), {"ZDIRECTORY": str(path.parent)}
        photo = library.photo(ZSAVEDASSETTYPE=kind, ZFILENAME=path.name, **names)
    add_face(library, photo)
    lines, _ = collect_beside(library)
    assert lines[-1].startswith(f"1 faces: {named} named")


# ---------------------------------------------------------------- hostile databases


def test_paths_that_leave_the_library_are_not_read(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "a.jpg").write_bytes(jpeg(texture(15)))
    library = new_library(tmp_path)
    originals = library.path / "originals"
    originals.mkdir(parents=True)
    (originals / "link").symlink_to(tmp_path / "elsewhere")
    (originals / "loop").symlink_to("loop")
    for folder in ("../../elsewhere", "link", "loop", "nul\0", "x" * 5000, b"\xff\x00"):
        add_face(library, library.photo(ZDIRECTORY=folder, ZFILENAME="a.jpg"))
    columns = {"ZDIRECTORY": "../../elsewhere", "ZFILENAME": "a.jpg", "ZSAVEDASSETTYPE": 10}
    add_face(library, library.photo(**columns))
    add_face(library, library.photo(ZUUID=None, ZFILENAME=1e300))
    lines, _ = collect_beside(library)
    assert lines[-1] == "8 faces: 0 named (0 persons), 0 unknown, 8 skipped"


def test_numbers_that_make_no_sense_are_counted_or_do_no_harm(tmp_path):
    library = new_library(tmp_path)
    photo = library.photo(texture(1))
    for number in (1e9, float("inf"), "wide", b"\x01"):
        add_face(library, photo, ZSIZE=number)
    for number in (float("nan"), 1e300, -3, "high"):
        add_face(library, photo, ZCENTERX=number)
    for side in (0, None, "a", float("inf"), 10**18):  # of the picture, told beside the face
        add_face(library, photo, "Ben", ZSOURCEWIDTH=side, ZSOURCEHEIGHT=side)
    lines, _ = collect_beside(library)
    assert "8 skipped: the face's box makes no sense" in lines
    assert lines[-1].startswith("13 faces: ")


def test_uuids_do_not_lead_out_of_the_dataset_nor_overwrite_each_other(tmp_path):
    library = new_library(tmp_path)
    photo, ann = library.photo(texture(1)), library.person("Ann")
    for uuid in ("../../../escaped", "same", "same", None):
        library.face(photo, ann, SIZE, IN_FRAME, ZUUID=uuid)
    path = library.finish()
    expected, _ = collect(path, tmp_path / "people", "--dry-run")
    lines, _ = collect(path, tmp_path / "people")
    total = "4 faces: 3 named (1 persons), 0 unknown, 1 skipped"
    assert lines == expected and lines[-2:] == ["1 skipped: twice in the database", total]
    assert len(files(tmp_path / "people")) == 3
    assert sorted(os.listdir(tmp_path)) == ["Test.photoslibrary", "people"]


def test_rare_persons_of_one_photo_do_not_overwrite_each_other_in_unknown(tmp_path):
    library = new_library(tmp_path)
    photo = library.photo(texture(1))
    for name, uuid in (("Ann", None), ("Ben", None), ("Ann", "same"), ("Cem", "same")):
        library.face(photo, library.person(name), SIZE, IN_FRAME, ZUUID=uuid)
    lines, _ = collect(library.finish(), tmp_path / "people", "--min-images", "3")
    assert lines[-1] == "4 faces: 0 named (0 persons), 3 unknown, 1 skipped"
    assert len(files(tmp_path / "people")) == 3


# ---------------------------------------------------------------- options


@pytest.fixture
def family(tmp_path):
    """A library of 3 faces of Ann (one of 40 px), 1 of Ben, 1 without a name."""
    faces = [("Ann", IN_FRAME), ("Ann", IN_FRAME), ("Ann", (100, 100, 40))]
    faces += [("Ben", IN_FRAME), (None, IN_FRAME)]
    return make_library(tmp_path / "Test.photoslibrary", 10, [(texture(1), faces)])


SMALL = "1 skipped: smaller than 48 pixels (--min-size)"
NAMELESS = "1 skipped: without a name (--no-unknown)"
FEW = "1 skipped: of a person with fewer than 2 (--min-images)"


@pytest.mark.parametrize(
    ("options", "counts", "reasons", "total"),
    [
        ("", "2 Ann, 1 Ben, 1 unknown", [SMALL], (3, 2, 1, 1)),
        ("--min-size 40", "3 Ann, 1 Ben, 1 unknown", [], (4, 2, 1, 0)),
        ("--min-images 2", "2 Ann, 2 unknown", [SMALL], (2, 1, 2, 1)),
        ("--min-images 3", "4 unknown", [SMALL], (0, 0, 4, 1)),
        ("--no-unknown", "2 Ann, 1 Ben", [SMALL, NAMELESS], (3, 2, 0, 2)),
        ("--no-unknown --min-images 2", "2 Ann", [FEW, SMALL, NAMELESS], (2, 1, 0, 3)),
    ],
)
def test_options_move_faces_and_every_face_is_accounted_for(
    tmp_path, family, options, counts, reasons, total
):
    pairs = [text.split() for text in counts.split(", ")]
    table = [f"{count:>6}  {name}" for count, name in pairs]
    last = "5 faces: {} named ({} persons), {} unknown, {} skipped".format(*total)
    dry, errors = collect(family, tmp_path / "people", *options.split(), "--dry-run")
    assert sorted(os.listdir(tmp_path)) == ["Test.photoslibrary"]
    lines, _ = collect(family, tmp_path / "people", *options.split())
    assert lines == dry == ["images  person", *table, *reasons, last]
    assert counts_of(tmp_path / "people") == {name: int(count) for count, name in pairs}
    command = f"next: the same without --dry-run, then python train.py {tmp_path / 'people'} model"
    assert errors[-1] == command or len(pairs) == 1


def test_too_many_wanted_images_say_what_fewer_would_keep(tmp_path, family):
    _, errors = collect(family, tmp_path / "people", "--min-images", 3)
    kept = "1 person with 2 pictures (2 would keep 1), 1 person with 1 picture (1 would keep 2)"
    assert f"warning: --min-images 3 leaves nobody with a name: {kept}" in errors
    assert errors[-1].startswith("not enough to train on")


def test_a_dry_run_leaves_a_full_folder_alone(tmp_path, family):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("kept")
    before = state_of(tmp_path / "full")
    collect(family, tmp_path / "full", "--dry-run")
    assert state_of(tmp_path / "full") == before


def test_the_current_folder_is_not_replaced(tmp_path, family, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    _, (error,) = collect(family, tmp_path / "here", code=1)
    assert "is the current folder" in error and Path.cwd() == tmp_path / "here"


@pytest.mark.parametrize(
    "options",
    ["--context 0", "--context nan", "--min-size 0", "--min-images -1", "--min-size x", "--x"],
)
def test_wrong_usage_ends_with_2(tmp_path, options):
    _, errors = collect(tmp_path, tmp_path / "people", *options.split(), code=2)
    assert errors[0].startswith("usage: ")


# ---------------------------------------------------------------- failures


def database_of(content):
    """Return a function that makes a library whose database holds these bytes."""

    def make(path):
        (path / "database").mkdir(parents=True)
        (path / "database" / "Photos.sqlite").write_bytes(content)

    return make


def changed_database(query, generation=10):
    """Return a function that makes a library and changes its database by a query."""

    def make(path):
        make_library(path, generation, [])
        name = "photos.db" if generation == 2 else "Photos.sqlite"
        with sqlite3.connect(path / "database" / name) as db:
            db.execute(query)

    return make


def only_the_wal(path):
    make_library(path, 2, [])
    (path / "database" / "photos.db").rename(path / "database" / "photos.db-wal")


RENAME = "ALTER TABLE ZDETECTEDFACE RENAME COLUMN ZISINTRASH TO ZGONE"


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda path: path.mkdir(), "no Apple Photos library"),
        (lambda path: path.touch(), "no such folder"),
        (lambda path: (path / "Database" / "apdb").mkdir(parents=True), "iPhoto or Aperture"),
        (database_of(b""), "no table of faces"),
        (database_of(b"no database" * 1000), "damaged, incomplete or of an unknown layout"),
        (changed_database("DROP TABLE RKFace", 2), "no table of faces"),  # without its -wal
        (only_the_wal, "copy the library again, whole"),
        (changed_database(RENAME), "no such column: f.ZISINTRASH"),
    ],
)
def test_other_folders_and_broken_databases_give_one_line(tmp_path, make, words):
    path = tmp_path / "An\x1b[31m odd library"
    make(path)
    lines, (error,) = collect(path, tmp_path / "people", code=1)
    assert lines == [] and error.startswith("error: ") and words in error
    assert "\\x1b" in error and "\x1b" not in error
    assert os.listdir(tmp_path) == [path.name]


@pytest.mark.parametrize("out", ["Test.photoslibrary", "link/people", "full", "file"])
def test_folders_that_are_refused(tmp_path, family, out):
    (tmp_path / "link").symlink_to(family)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("kept")
    (tmp_path / "file").write_text("kept")
    before = state_of(tmp_path)
    _, (error,) = collect(family, tmp_path / out, code=1)
    assert error.startswith("error: ")
    assert state_of(tmp_path) == before


def test_an_empty_folder_is_filled_and_missing_parents_are_made(tmp_path, family):
    (tmp_path / "empty").mkdir()
    collect(family, tmp_path / "empty")
    collect(family, tmp_path / "a" / "b" / "people")
    assert files(tmp_path / "empty") == files(tmp_path / "a" / "b" / "people") != []
    assert sorted(os.listdir(tmp_path)) == ["Test.photoslibrary", "a", "empty"]


@pytest.mark.parametrize("generation", LIBRARIES)
def test_a_library_without_faces_is_no_failure(tmp_path, generation):
    library = make_library(tmp_path / "Test.photoslibrary", generation, [(texture(1), [])])
    lines, _ = collect(library, tmp_path / "people")
    assert "no faces" in lines[0]
    assert lines[-1] == "0 faces: 0 named (0 persons), 0 unknown, 0 skipped"


def test_a_missing_permission_names_the_setting(tmp_path, family, monkeypatch):
    def refuse(source, _):
        raise PermissionError(1, "Operation not permitted", str(source))

    monkeypatch.setattr(shutil, "copyfile", refuse)
    _, (error,) = collect(family, tmp_path / "people", code=1)
    assert re.search(r"Photos\.sqlite: .*Full Disk Access", error)
    assert os.listdir(tmp_path) == ["Test.photoslibrary"]


def test_a_database_that_photos_changed_while_it_was_copied_is_copied_again(
    tmp_path, family, monkeypatch
):
    copy, times = shutil.copyfile, []

    def torn(source, target):
        times.append(source)
        copy(source, target)
        if len(times) == 1:
            Path(target).write_bytes(b"half" * 1000)

    monkeypatch.setattr(shutil, "copyfile", torn)
    lines, _ = collect(family, tmp_path / "people")
    assert lines[-1].startswith("5 faces")


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path, family):
    done = limited(tmp_path, [limit("RLIMIT_FSIZE", 4000)], SCRIPT, family, "people")
    assert done.returncode == 1 and done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert os.listdir(tmp_path) == ["Test.photoslibrary"]


# ---------------------------------------------------------------- the working folder


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A library that takes a few seconds: 60 pictures of 6 megapixels with 4 faces each."""
    data = jpeg(texture(1, (3008, 2000)))
    library = new_library(tmp_path_factory.mktemp("large"))
    persons = [library.person(name) for name in ("Ann", "Ben", "Cleo")]
    for _ in range(60):
        photo = library.photo(data=data)
        for number, person in enumerate((*persons, None)):
            library.face(photo, person, (3008, 2000), (400 + 600 * number, 900, 200))
    return library.finish()


@pytest.mark.slow
@pytest.mark.parametrize("kills", [2, pytest.param(10, marks=pytest.mark.long)])
def test_kills_at_random_moments_leave_all_or_nothing(tmp_path, large, kills):
    rng, before, started = random.Random(kills), state_of(large), time.monotonic()
    collect(large, tmp_path / "whole")
    seconds, whole = time.monotonic() - started, files(tmp_path / "whole")
    people = tmp_path / "people"
    for number in range(kills):
        process = start(SCRIPT, tmp_path, large, people)
        time.sleep(seconds * (number + rng.random()) / kills)
        process.kill()
        process.communicate()
        assert not people.exists() or files(people) == whole
        assert state_of(large) == before
        shutil.rmtree(people, ignore_errors=True)
    collect(large, people)
    assert files(people) == whole
    assert sorted(os.listdir(tmp_path)) == ["people", "whole"]


def wait_for(condition):
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_what_is_unfinished_is_private_and_ctrl_c_removes_it(tmp_path, large, family):
    process, folder = start(SCRIPT, tmp_path, large, "people"), tmp_path / ".people-unfinished"
    wait_for(lambda: list(folder.glob("**/*.jpg")) and list(folder.glob("**/photos.sqlite")))
    assert sorted(os.listdir(tmp_path)) == [".people-unfinished", "Test.photoslibrary"]
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    _, errors = collect(family, tmp_path / "people", code=1)  # disturbs nothing
    assert "another run is at work here" in errors[0]
    assert process.poll() is None and list(folder.glob("**/*.jpg"))
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 130 and "Traceback" not in errors
    assert os.listdir(tmp_path) == ["Test.photoslibrary"]


@pytest.mark.parametrize("kind", ["folder", "file", "link"])
def test_what_is_not_from_here_is_never_removed(tmp_path, family, kind):
    mine, way = tmp_path / "mine", tmp_path / ".people-unfinished"
    mine.mkdir()
    (mine / "precious").write_text("kept")
    (mine / collect_apple_photos.LOCK).touch()
    if kind == "file":
        way.write_text("kept")
    elif kind == "link":
        way.symlink_to(mine)
    else:
        (mine / collect_apple_photos.LOCK).unlink()
        mine.rename(way)
    before = state_of(tmp_path)
    _, errors = collect(family, tmp_path / "people", code=1)
    assert "is not from here" in errors[0]
    assert state_of(tmp_path) == before


# ---------------------------------------------------------------- real libraries


@pytest.mark.slow
@pytest.mark.needs_shared
@pytest.mark.parametrize("name", sorted(path.name for path in REAL.glob("*.tar.xz")))
def test_every_face_of_a_real_library(tmp_path, name):
    with tarfile.open(REAL / name) as archive:
        archive.extractall(tmp_path, filter="data")
    name = name.removesuffix(".tar.xz")
    library, before = tmp_path / name, state_of(tmp_path / name)
    lines, errors = collect(library, tmp_path / "people")
    truth = json.loads((REAL / "truth.json").read_text())["libraries"][name]
    named = f"{truth['named_faces']} named (3 persons)"
    assert lines[-1] == f"{truth['eligible_faces']} faces: {named}, 1 unknown, 0 skipped"
    assert [line for line in errors if "enough to train" not in line and "next: " not in line] == []
    assert state_of(library) == before
    for face in truth["faces"]:
        stem = f"{face['asset_uuid']}-{face['face_uuid']}"
        stem += f"-{face['face_pk']}" if truth["generation"] == "photos2to4" else ""
        picture = ImageOps.exif_transpose(Image.open(library / face["pixel_file"]))
        assert picture.size == tuple(face["upright_size"])
        left, top, right, bottom = face["box_upright_px_topleft_origin"]
        box = ((left + right) / 2, (top + bottom) / 2, right - left)
        file = tmp_path / "people" / (face["name"] or "unknown") / f"{stem}.jpg"
        assert_same_crop(file, picture, box)
    assert len(files(tmp_path / "people")) == len(truth["faces"])


def test_text_that_is_not_utf_8(tmp_path):
    library = new_library(tmp_path)
    add_face(library, library.photo(texture(1)), "x")
    library.execute("ZPERSON", "UPDATE ZPERSON SET ZFULLNAME = CAST(x'41ff42' AS TEXT)")
    lines, _ = collect_beside(library)
    assert lines[1] == "     1  A\ufffdB"
