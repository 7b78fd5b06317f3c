"""What collect_apple_photos.py promises: on libraries drawn here, and on real ones at hand."""

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
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pillow_heif
import pytest
from conftest import run_here
from photos_library import LIBRARIES, jpeg, make_library
from PIL import Image, ImageOps

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
import collect_apple_photos  # noqa: E402
import utils  # noqa: E402

SCRIPT = ROOT / "collect_apple_photos.py"
REAL = ROOT.parent / "shared" / "data" / "photos_libraries"
needs_real = pytest.mark.skipif(
    not REAL.is_dir(), reason="the real libraries in ../shared are not at hand"
)
pillow_heif.register_heif_opener()


def collect(library, out, *options, code=0):
    """Run the script here; return what it printed on stdout, and on stderr, as lists of lines."""
    done = run_here(SCRIPT.name, Path.cwd(), library, out, *options)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout.splitlines(), done.stderr.splitlines()


def texture(seed, size=(640, 480)):
    """Return a picture that looks different everywhere, so that a crop tells where it was cut."""
    small = np.random.default_rng(seed).integers(
        0, 256, (size[1] // 16, size[0] // 16, 3), dtype=np.uint8
    )
    return Image.fromarray(small).resize(size, Image.Resampling.BICUBIC)


def expected(picture, box, context=2.2):
    """Cut the square around a box (x, y, side) out of an upright PIL image, with plain means."""
    side = round(box[2] * context)
    place = []
    for center, size in zip(box[:2], picture.size):
        start = center - side / 2
        place.append(min(max(start, 0), size - side) if side <= size else start)
    columns, rows = (
        np.clip(np.arange(side) + round(start), 0, size - 1)
        for start, size in zip(place, picture.size)
    )
    return np.asarray(picture.convert("RGB"), dtype=float)[rows][:, columns]


def assert_same_crop(file, picture, box, context=2.2):
    """Assert that the crop in `file` has side and centre of box x context within a pixel."""
    crop = np.asarray(Image.open(file), dtype=float)
    assert abs(crop.shape[0] - box[2] * context) <= 1 and crop.shape[0] == crop.shape[1]
    differences = {}
    for dx in range(-3, 4):
        for dy in range(-3, 4):
            other = expected(picture, (box[0] + dx, box[1] + dy, crop.shape[0]), 1)
            differences[dx, dy] = np.abs(crop - other).mean()
    best = min(differences, key=lambda shift: (differences[shift], max(map(abs, shift))))
    assert max(map(abs, best)) <= 1 and differences[best] < 10, (best, differences[best])


def state_of(folder):
    """Return all that must not change in a library: kinds, times, and the bytes of files."""
    return {
        path: (
            path.stat().st_mode,
            path.stat().st_mtime_ns,
            path.is_file() and hashlib.sha256(path.read_bytes()).digest(),
        )
        for path in [folder, *folder.rglob("*")]
    }


def files(out):
    return sorted(str(path.relative_to(out)) for path in out.rglob("*") if path.is_file())


def leftovers(folder):
    return [name for name in os.listdir(folder) if "unfinished" in name]


GENERATIONS = [pytest.param(generation, id=f"Photos {generation}") for generation in LIBRARIES]
IN_FRAME = (300, 200, 80)


# ---------------------------------------------------------------- the whole, for each generation


@pytest.mark.parametrize("generation", GENERATIONS)
def test_every_face_goes_to_its_person_from_the_right_place(tmp_path, generation):
    first, second = texture(1), texture(2, (480, 640))
    boxes = {"Ann": (150, 120, 60), "Ben": (400, 300, 100), None: (560, 100, 50)}
    faces = [(name, box) for name, box in boxes.items()]
    library = make_library(
        tmp_path / "Test.photoslibrary", generation, [(first, faces), (second, [("Ann", IN_FRAME)])]
    )
    before = state_of(library)
    lines, errors = collect(library, tmp_path / "people")
    assert lines == [
        "images  person",
        "     2  Ann",
        "     1  Ben",
        "     1  unknown",
        "4 faces: 3 named (2 persons), 1 unknown, 0 skipped",
    ]
    assert errors == [
        "enough to train on, but 3 of 3 have fewer than 20 pictures: more would help",
        f"next: python train.py {tmp_path / 'people'} model",
    ]
    for name in ("Ben", None):
        (file,) = (tmp_path / "people" / (name or "unknown")).iterdir()
        assert_same_crop(file, first, boxes[name])
    ann = sorted((tmp_path / "people" / "Ann").iterdir(), key=lambda path: Image.open(path).width)
    assert_same_crop(ann[0], first, boxes["Ann"])
    assert_same_crop(ann[1], second, IN_FRAME)
    assert state_of(library) == before
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize("generation", GENERATIONS)
def test_names_of_the_files_and_their_format(tmp_path, generation):
    library = make_library(
        tmp_path / "Test.photoslibrary", generation, [(texture(1), [("Ann", IN_FRAME)] * 2)]
    )
    collect(library, tmp_path / "people")
    hexes = "[0-9A-F]{8}(-[0-9A-Z]{4}){3}-[0-9A-F]{12}"
    pattern = (
        rf"Ann/{hexes}-{hexes}\.jpg"
        if generation in (5, 6, 9, 10)
        else r"Ann/[\w%+]{22}-[\w%+]{22}-[12]\.jpg"
    )
    names = files(tmp_path / "people")
    assert len(names) == 2 and all(re.fullmatch(pattern, name) for name in names), names
    assert len({name.lower() for name in names}) == 2  # also where uuids differ by case only
    image = Image.open(tmp_path / "people" / names[0])
    assert (image.format, image.mode, dict(image.getexif())) == ("JPEG", "RGB", {})


@pytest.mark.parametrize(
    ("orientation", "size"), [(n, (640, 480)) for n in range(9)] + [(6, (480, 640))]
)
def test_pictures_are_turned_upright_first(tmp_path, orientation, size):
    library = LIBRARIES[10](tmp_path / "Test.photoslibrary")
    box = (200, 150, 70)
    library.face(
        library.photo(data=jpeg(texture(3, size), orientation)), library.person("Ann"), size, box
    )
    collect(library.finish(), tmp_path / "people")
    assert_same_crop(next((tmp_path / "people" / "Ann").iterdir()), texture(3, size), box)


@pytest.mark.parametrize(
    "box",
    [(10, 10, 90), (630, 470, 90), (320, 5, 200), (320, 240, 250), (20, 460, 290)],
    ids=lambda box: str(box),
)
@pytest.mark.parametrize("context", [1.0, 2.2])
def test_crops_at_the_edge_are_shifted_or_padded_and_stay_square(tmp_path, box, context):
    library = make_library(tmp_path / "Test.photoslibrary", 6, [(texture(4), [("Ann", box)])])
    collect(library, tmp_path / "people", "--context", context)
    assert_same_crop(next((tmp_path / "people" / "Ann").iterdir()), texture(4), box, context)


# ---------------------------------------------------------------- rows


ROWS_OF_PHOTOS_10 = {
    "face in trash": ({}, {"ZISINTRASH": 1}),
    "face hidden": ({}, {"ZHIDDEN": 1}),
    "photo in trash": ({"ZTRASHEDSTATE": 1}, {}),
    "photo hidden": ({"ZHIDDEN": 1}, {}),
    "body without a face": ({}, {"ZSIZE": 0.0, "ZCENTERX": 0.0, "ZCENTERY": 0.0}),
    "size unknown": ({}, {"ZSIZE": None}),
    "without a photo": ({}, {"ZASSETFORFACE": None, "ZTRAININGTYPE": 1}),
    "torso only": ({}, {"ZASSETFORFACE": None, "ZASSETFORTORSO": 1}),
    "a cat": ({}, {"ZDETECTIONTYPE": 3}),
}
ROWS_OF_PHOTOS_2 = {
    "face in trash": ({}, {"isInTrash": 1}),
    "face hidden": ({}, {"hidden": 1}),
    "photo in trash": ({"isInTrash": 1}, {}),
    "photo hidden": ({"isHidden": 1}, {}),
    "size 0": ({}, {"size": 0}),
    "without a photo": ({}, {"imageModelId": None, "trainingType": 1}),
}
ROWS_OF_PHOTOS_1 = {
    name: row for name, row in ROWS_OF_PHOTOS_2.items() if name != "without a photo"
}
ROWS_OF_PHOTOS_1["without a photo"] = ({}, {"imageId": "nowhere"})


@pytest.mark.parametrize(
    ("generation", "photo", "face"),
    [
        pytest.param(generation, photo, face, id=f"Photos {generation}, {name}")
        for generation, rows in (
            (10, ROWS_OF_PHOTOS_10),
            (2, ROWS_OF_PHOTOS_2),
            (1, ROWS_OF_PHOTOS_1),
        )
        for name, (photo, face) in rows.items()
    ],
)
def test_rows_that_are_no_faces_are_not_counted(tmp_path, generation, photo, face):
    library = LIBRARIES[generation](tmp_path / "Test.photoslibrary")
    person = library.person("Maria")
    library.face(library.photo(texture(1)), person, (640, 480), IN_FRAME)
    library.face(library.photo(texture(2), **photo), person, (640, 480), IN_FRAME, **face)
    lines, _ = collect(library.finish(), tmp_path / "people")
    assert lines == [
        "images  person",
        "     1  Maria",
        "1 faces: 1 named (1 persons), 0 unknown, 0 skipped",
    ]


@pytest.mark.parametrize(
    ("generation", "photo"), [(10, {"ZHIDDEN": 1}), (2, {"isHidden": 1}), (1, {"isHidden": 1})]
)
def test_hidden_photos_are_taken_on_demand(tmp_path, generation, photo):
    library = LIBRARIES[generation](tmp_path / "Test.photoslibrary")
    library.face(library.photo(texture(2), **photo), library.person("Maria"), (640, 480), IN_FRAME)
    lines, _ = collect(library.finish(), tmp_path / "people", "--include-hidden")
    assert lines[-1] == "1 faces: 1 named (1 persons), 0 unknown, 0 skipped"


# ---------------------------------------------------------------- persons


def persons_of_photos_10(library):
    """Yield (key of a person, folder in which the face must end)."""
    yield None, "unknown"
    yield 999, "unknown"
    yield library.person(None), "unknown"
    yield library.person(""), "unknown"
    yield library.person("  "), "unknown"
    yield library.person(None, ZDISPLAYNAME="Shown"), "Shown"
    yield library.person("Full", ZDISPLAYNAME="Shown"), "Full"
    suzy = library.person("Suzy")
    second = library.person("Susan", ZMERGETARGETPERSON=suzy, ZVERIFIEDTYPE=-2)
    yield library.person("Su", ZMERGETARGETPERSON=second, ZVERIFIEDTYPE=-2), "Suzy"
    library.person("Back", Z_PK=501, ZMERGETARGETPERSON=502)
    yield library.person("Forth", Z_PK=502, ZMERGETARGETPERSON=501), "unknown"
    yield library.person("Lost", ZMERGETARGETPERSON=999), "unknown"


def test_names_come_from_the_right_column_and_through_merges(tmp_path):
    library = LIBRARIES[10](tmp_path / "Test.photoslibrary")
    photo, wanted = library.photo(texture(5)), []
    for person, folder in persons_of_photos_10(library):
        face = library.face(photo, person, (640, 480), IN_FRAME)
        wanted.append(f"{folder}/{library.uuid(photo)}-{face:08X}-FACE-4000-8000-000000000000.jpg")
    collect(library.finish(), tmp_path / "people")
    assert files(tmp_path / "people") == sorted(wanted)


@pytest.mark.parametrize("generation", [1, 2, 10])
def test_persons_of_one_name_share_a_folder_and_others_never_do(tmp_path, generation):
    library = LIBRARIES[generation](tmp_path / "Test.photoslibrary")
    names = [
        "Katie",
        "Katie",
        " Katie ",
        "katie",
        "José",
        "Jose\u0301",
        "unknown",
        "Unknown",
        "../../up",
        "a/b:c",
        ".x",
    ]
    names += ["CON", "x" * 300, "tab\tand\x1b[31m", "王", "dot."]
    photo = library.photo(texture(6))
    for name in names:
        library.face(photo, library.person(name), (640, 480), IN_FRAME)
    library.face(photo, None, (640, 480), IN_FRAME)
    lines, _ = collect(library.finish(), tmp_path / "people")
    counts = {
        folder.name: len(list(folder.iterdir())) for folder in (tmp_path / "people").iterdir()
    }
    assert counts == {name: 1 for name in counts} | {"Katie": 3, "José": 2}
    assert (
        len({name.casefold() for name in counts}) == len(counts) == len(names) - 3 + 1
    )  # Katie, José
    assert {
        "Katie",
        "katie (2)",
        "unknown",
        "Unknown (2)",
        "unknown (3)",
        "a_b_c",
        "_CON",
        "王",
        "dot",
        "_x",
    } <= counts.keys()
    assert lines[-1] == f"17 faces: 16 named ({len(counts) - 1} persons), 1 unknown, 0 skipped"
    assert all("\x1b" not in line and "\t" not in line for line in lines)
    assert lines[-2] == "     1  unknown"
    assert sorted(os.listdir(tmp_path)) == ["Test.photoslibrary", "people"]


# ---------------------------------------------------------------- which picture


@pytest.mark.parametrize("end", ["_1_201_a.jpeg", "_1_201_a.heic"])
def test_edited_photos_are_cut_from_the_edited_picture(tmp_path, end):
    library = LIBRARIES[10](tmp_path / "Test.photoslibrary")
    photo, edited, box = (
        library.photo(texture(7, (800, 600))),
        texture(8, (400, 500)),
        (200, 250, 100),
    )
    library.edit(photo, edited, end)
    library.face(photo, library.person("Maria"), edited.size, box)
    collect(library.finish(), tmp_path / "people")
    assert_same_crop(next((tmp_path / "people" / "Maria").iterdir()), edited, box)


@pytest.mark.parametrize("generation", [1, 2])
def test_edited_photos_of_older_libraries(tmp_path, generation):
    library = LIBRARIES[generation](tmp_path / "Test.photoslibrary")
    photo, edited, box = (
        library.photo(texture(7, (800, 600))),
        texture(8, (400, 500)),
        (200, 250, 100),
    )
    library.edit(photo, edited)
    library.face(photo, library.person("Maria"), edited.size, box)
    collect(library.finish(), tmp_path / "people")
    assert_same_crop(next((tmp_path / "people" / "Maria").iterdir()), edited, box)


def test_an_edited_picture_in_another_folder_than_its_number_says_is_found(tmp_path):
    library = LIBRARIES[2](tmp_path / "Test.photoslibrary")
    photo, edited, box = (
        library.photo(texture(7, (800, 600))),
        texture(8, (400, 500)),
        (200, 250, 100),
    )
    library.edit(photo, edited, folder="00/02")
    library.face(photo, library.person("Maria"), edited.size, box)
    collect(library.finish(), tmp_path / "people")
    assert_same_crop(next((tmp_path / "people" / "Maria").iterdir()), edited, box)


@pytest.mark.parametrize("generation", [1, 2, 10])
def test_the_original_never_stands_in_for_a_lost_edited_picture(tmp_path, generation):
    library = LIBRARIES[generation](tmp_path / "Test.photoslibrary")
    photo = library.photo(texture(7))
    library.edit(photo)
    library.face(photo, library.person("Maria"), (640, 480), IN_FRAME)
    lines, _ = collect(library.finish(), tmp_path / "people")
    assert lines[1:] == [
        "1 skipped: no picture on this disk (perhaps only in iCloud)",
        "1 faces: 0 named (0 persons), 0 unknown, 1 skipped",
    ]
    assert not (tmp_path / "people").exists()


@pytest.mark.parametrize(
    "original",
    [None, b"not a picture", jpeg(texture(9, (480, 640))), jpeg(texture(9))[:20000]],
    ids=["in iCloud", "damaged", "other shape", "truncated"],
)
@pytest.mark.parametrize("edited", [False, True])
def test_smaller_copies_stand_in_the_largest_first(tmp_path, original, edited):
    library = LIBRARIES[10](tmp_path / "Test.photoslibrary")
    photo = library.photo(data=original)
    if edited:
        library.edit(photo)
    library.smaller_copy(
        photo, texture(10, (320, 240)), "resources/derivatives/masters/{}_4_5005_c.jpeg"
    )
    library.smaller_copy(photo, texture(11, (448, 336)))
    library.face(photo, library.person("Ann"), (640, 480), IN_FRAME)
    lines, errors = collect(library.finish(), tmp_path / "people")
    assert lines[-1] == "1 faces: 1 named (1 persons), 0 unknown, 0 skipped"
    assert [
        line
        for line in errors
        if line.startswith("warning: ") and "1 faces come from smaller copies" in line
    ]
    box = [part * 0.7 for part in IN_FRAME]
    assert_same_crop(next((tmp_path / "people" / "Ann").iterdir()), texture(11, (448, 336)), box)


def test_raw_files_give_way_to_copies_or_are_counted(tmp_path):
    library, tiff = LIBRARIES[10](tmp_path / "Test.photoslibrary"), io.BytesIO()
    texture(9, (160, 120)).save(tiff, "TIFF")  # what Pillow sees in many RAW files: a thumbnail
    with_copy, without = (library.photo(data=tiff.getvalue(), ending="dng") for _ in range(2))
    library.smaller_copy(with_copy, texture(10))
    for photo in (with_copy, without):
        library.face(photo, library.person("Ann"), (640, 480), IN_FRAME)
    lines, _ = collect(library.finish(), tmp_path / "people")
    assert (
        lines[-2] == "1 skipped: the picture cannot be read (RAW, damaged or of an unknown format)"
    )
    assert_same_crop(next((tmp_path / "people" / "Ann").iterdir()), texture(10), IN_FRAME)


@pytest.mark.parametrize(
    ("generation", "film"), [(10, {"ZKIND": 1}), (2, {"type": 8}), (1, {"type": 8})]
)
def test_faces_on_films_are_counted(tmp_path, generation, film):
    library = LIBRARIES[generation](tmp_path / "Test.photoslibrary")
    library.face(library.photo(texture(1), **film), library.person("Ann"), (640, 480), IN_FRAME)
    lines, _ = collect(library.finish(), tmp_path / "people")
    assert lines[-2:] == [
        "1 skipped: on a film",
        "1 faces: 0 named (0 persons), 0 unknown, 1 skipped",
    ]


@pytest.mark.parametrize("generation", [1, 2])
@pytest.mark.parametrize("number", [0x2B, 0x19B14])
def test_tiles_stand_in_and_never_those_of_another_row(tmp_path, generation, number):
    library = LIBRARIES[generation](tmp_path / "Test.photoslibrary")
    ann, ben = library.person("Ann"), library.person("Ben")
    faces = [library.face(library.photo(), person, (640, 480), IN_FRAME) for person in (ann, ben)]
    tiles = [texture(seed, (240, 320)) for seed in (21, 22)]
    for face, tile in zip(faces, tiles):
        library.tile(face, tile, *([number + face] if generation == 2 else []))
    if generation == 1:
        library.resource_of(faces[0], 2, texture(23, (240, 320)), "face-thumbnail.jpg")
    collect(library.finish(), tmp_path / "people")
    for name, tile in zip(("Ann", "Ben"), tiles):
        assert_same_crop(next((tmp_path / "people" / name).iterdir()), tile, (120, 160, 240), 1)


def test_tiles_without_a_type_are_told_by_their_names(tmp_path):
    library = LIBRARIES["1 untyped"](tmp_path / "Test.photoslibrary")
    face = library.face(library.photo(), library.person("Ann"), (640, 480), IN_FRAME)
    library.resource_of(face, None, texture(31, (240, 240)), "IMG_0001.jpg")
    library.resource_of(face, None, texture(32, (240, 240)), "FaceTile.PNG")
    library.resource_of(face, None, texture(33, (240, 240)), "IMG_0002.jpg")
    collect(library.finish(), tmp_path / "people")
    assert_same_crop(
        next((tmp_path / "people" / "Ann").iterdir()), texture(32, (240, 240)), (120, 120, 240), 1
    )


def test_photos_1_without_its_library_database_still_has_tiles(tmp_path):
    library = LIBRARIES[1](tmp_path / "Test.photoslibrary")
    library.tile(
        library.face(library.photo(), library.person("Ann"), (640, 480), IN_FRAME),
        texture(1, (200, 200)),
    )
    path = library.finish()
    (path / "database").rename(path / "Database")
    for file in (path / "Database").glob("Library.apdb*"):
        file.unlink()
    lines, _ = collect(path, tmp_path / "people")
    assert lines[-1] == "1 faces: 1 named (1 persons), 0 unknown, 0 skipped"


def test_pictures_that_icloud_keeps_of_faces_are_the_last_resort(tmp_path):
    library = LIBRARIES[10](tmp_path / "Test.photoslibrary")
    photo, ann, ben = library.photo(), library.person("Ann"), library.person("Ben")
    merged = library.person("Annie", ZMERGETARGETPERSON=ann)
    for person in (ann, ben, None):
        library.face(photo, person, (640, 480), IN_FRAME)
    synchronised = library.face(None, merged, (256, 256), (128, 128, 128), ZTRAININGTYPE=1)
    library.insert(
        "ZFACECROP",
        ZASSET=photo,
        ZFACE=synchronised,
        ZPERSON=merged,
        ZRESOURCEDATA=jpeg(texture(12, (256, 256))),
    )
    lines, _ = collect(library.finish(), tmp_path / "people")
    assert lines[-1] == "3 faces: 1 named (1 persons), 0 unknown, 2 skipped"
    assert_same_crop(
        next((tmp_path / "people" / "Ann").iterdir()), texture(12, (256, 256)), (128, 128, 256), 1
    )


def test_heic_originals(tmp_path):
    library, heic = LIBRARIES[10](tmp_path / "Test.photoslibrary"), io.BytesIO()
    texture(13).save(heic, "HEIF", quality=95)
    library.face(
        library.photo(data=heic.getvalue(), ending="heic"),
        library.person("Ann"),
        (640, 480),
        IN_FRAME,
    )
    collect(library.finish(), tmp_path / "people")
    assert_same_crop(next((tmp_path / "people" / "Ann").iterdir()), texture(13), IN_FRAME)


@pytest.mark.parametrize(
    "place",
    ["resources/cloudsharing/data", "scopes/cloudsharing/data", "scopes/syndication/originals"],
)
def test_shared_pictures(tmp_path, place):
    library = LIBRARIES[9](tmp_path / "Test.photoslibrary")
    photo = library.photo(ZSAVEDASSETTYPE=4, ZDIRECTORY="album", ZFILENAME="IMG_1.JPG")
    library.write(f"{place}/album/IMG_1.JPG", jpeg(texture(14)))
    library.face(photo, library.person("Ann"), (640, 480), IN_FRAME)
    collect(library.finish(), tmp_path / "people")
    assert_same_crop(next((tmp_path / "people" / "Ann").iterdir()), texture(14), IN_FRAME)


SHARED_COPIES = [
    "resources/derivatives/{}_1_202_a.jpeg",
    "resources/cloudsharing/resources/derivatives/masters/{}_4_5005_c.jpeg",
    "scopes/cloudsharing/resources/derivatives/masters/{}_4_5005_c.jpeg",
    "scopes/syndication/resources/derivatives/{}_1_105_c.jpeg",
]


@pytest.mark.parametrize("place", SHARED_COPIES)
@pytest.mark.parametrize("generation", [5, 10])
def test_copies_of_edited_and_shared_pictures_are_found_and_the_larger_one_wins(
    tmp_path, generation, place
):
    library = LIBRARIES[generation](tmp_path / "Test.photoslibrary")
    photo = library.photo()
    library.edit(photo)
    library.smaller_copy(photo, texture(16), place)
    library.smaller_copy(photo, texture(17, (320, 240)), "resources/derivatives/{}_1_102_o.jpeg")
    library.write(f"{place.format(f'A/{library.uuid(photo)}')}.plist", b"edit data")
    library.face(photo, library.person("Ann"), (640, 480), IN_FRAME)
    collect(library.finish(), tmp_path / "people")
    assert_same_crop(next((tmp_path / "people" / "Ann").iterdir()), texture(16), IN_FRAME)


@pytest.mark.parametrize("edited", [False, True])
def test_previews_of_photos_2_come_before_tiles(tmp_path, edited):
    """Where a photo was edited, those of the edited picture only."""
    library = LIBRARIES[2](tmp_path / "Test.photoslibrary")
    photo = library.photo()
    library.preview(photo, texture(18), "largepv", *["edit1"] * edited)
    library.preview(photo, texture(19, (320, 240)), "thumb", *["edit1"] * edited)
    library.preview(
        photo, texture(19, (1280, 960)), "largepv", "UNADJUSTEDRAW" if edited else "old"
    )
    library.preview(photo, texture(19, (1280, 960)), "mini", *["edit1"] * edited)
    if edited:
        library.edit(photo)
    face = library.face(photo, library.person("Ann"), (640, 480), IN_FRAME)
    library.tile(face, texture(20, (240, 320)))
    collect(library.finish(), tmp_path / "people")
    assert_same_crop(next((tmp_path / "people" / "Ann").iterdir()), texture(18), IN_FRAME)


def test_of_a_raw_and_a_jpeg_the_jpeg_is_cut(tmp_path):
    library = LIBRARIES[2](tmp_path / "Test.photoslibrary")
    photo = library.photo(data=b"raw", place="2019/a.cr2", nonRawMasterUuid="jpeg")
    library.insert("RKMaster", uuid="jpeg", imagePath="2019/a.jpg")
    library.write("Masters/2019/a.jpg", jpeg(texture(21)))
    library.face(photo, library.person("Ann"), (640, 480), IN_FRAME)
    collect(library.finish(), tmp_path / "people")
    assert_same_crop(next((tmp_path / "people" / "Ann").iterdir()), texture(21), IN_FRAME)


@pytest.mark.parametrize(
    ("generation", "person", "photo", "reason"),
    [
        (10, {"ZTYPE": -1}, {}, "of a person hidden in People"),
        (5, {"ZTYPE": -1}, {}, "of a person hidden in People"),
        (2, {"personType": -1}, {}, "of a person hidden in People"),
        (10, {}, {"ZVISIBILITYSTATE": 2}, "of a burst, not picked"),
        (9, {}, {"ZAVALANCHEPICKTYPE": 2}, "of a burst, not picked"),
        (2, {}, {"burstPickType": 2}, "of a burst, not picked"),
        (2, {}, {"burstPickType": 4, "showInLibrary": 0}, "of a burst, not picked"),
    ],
)
def test_what_the_user_does_not_want_to_see_is_counted_and_taken_on_demand(
    tmp_path, generation, person, photo, reason
):
    library = LIBRARIES[generation](tmp_path / "Test.photoslibrary")
    ann, size = library.person("Ann", **person), (640, 480)
    picks = ("burstPickType" if generation == 2 else "ZAVALANCHEPICKTYPE", (0, 8, 16, 52))
    for bits in picks[1]:  # none, picked, key picture, Photos' own choice
        shown = library.photo(texture(1), **{picks[0]: bits})
        library.face(shown, library.person("Ben"), size, IN_FRAME)
    library.face(library.photo(texture(2), **photo), ann, size, IN_FRAME)
    path = library.finish()
    lines, _ = collect(path, tmp_path / "people")
    assert f"1 skipped: {reason} (--include-hidden)" in lines
    assert lines[-1] == "5 faces: 4 named (1 persons), 0 unknown, 1 skipped"
    lines, _ = collect(path, tmp_path / "all", "--include-hidden")
    assert lines[-1] == "5 faces: 5 named (2 persons), 0 unknown, 0 skipped"


@pytest.mark.parametrize("kind", [3, 10])
def test_only_referenced_pictures_may_lie_outside(tmp_path, kind):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "a{b}.jpg").write_bytes(jpeg(texture(15)))
    library = LIBRARIES[10](tmp_path / "Test.photoslibrary")
    columns = {
        "ZSAVEDASSETTYPE": kind,
        "ZDIRECTORY": str(tmp_path / "elsewhere"),
        "ZFILENAME": "a{b}.jpg",
    }
    library.face(library.photo(**columns), library.person("Ann"), (640, 480), IN_FRAME)
    lines, _ = collect(library.finish(), tmp_path / "people")
    assert lines[-1].startswith(f"1 faces: {int(kind == 10)} named")


def test_referenced_masters_of_photos_2(tmp_path):
    (tmp_path / "elsewhere.jpg").write_bytes(jpeg(texture(15)))
    library = LIBRARIES[2](tmp_path / "Test.photoslibrary")
    photo = library.photo(place=str(tmp_path / "elsewhere.jpg").lstrip("/"), fileIsReference=1)
    library.face(photo, library.person("Ann"), (640, 480), IN_FRAME)
    lines, _ = collect(library.finish(), tmp_path / "people")
    assert lines[-1].startswith("1 faces: 1 named")


# ---------------------------------------------------------------- hostile databases


@pytest.mark.parametrize(
    "photo",
    [
        {"ZDIRECTORY": "../../elsewhere"},
        {"ZDIRECTORY": "../../elsewhere", "ZSAVEDASSETTYPE": 10},
        {"ZDIRECTORY": "link"},
        {"ZDIRECTORY": "loop"},
        {"ZDIRECTORY": "nul\0"},
        {"ZDIRECTORY": "x" * 5000},
        {"ZDIRECTORY": b"\xff\x00", "ZFILENAME": 1e300},
        {"ZUUID": None, "ZFILENAME": None},
    ],
    ids=str,
)
def test_paths_that_leave_the_library_are_not_read(tmp_path, photo):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "a.jpg").write_bytes(jpeg(texture(15)))
    library = LIBRARIES[10](tmp_path / "Test.photoslibrary")
    (tmp_path / "Test.photoslibrary" / "originals").mkdir(parents=True)
    (tmp_path / "Test.photoslibrary" / "originals" / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "Test.photoslibrary" / "originals" / "loop").symlink_to("loop")
    library.face(
        library.photo(**{"ZFILENAME": "a.jpg"} | photo), library.person("Ann"), (640, 480), IN_FRAME
    )
    lines, _ = collect(library.finish(), tmp_path / "people")
    assert lines[-1] == "1 faces: 0 named (0 persons), 0 unknown, 1 skipped"


@pytest.mark.parametrize(
    "face",
    [
        {"ZSIZE": 1e9},
        {"ZSIZE": float("inf")},
        {"ZSIZE": "wide"},
        {"ZSIZE": b"\x01"},
        {"ZCENTERX": float("nan")},
        {"ZCENTERX": 1e300},
        {"ZCENTERY": -3},
        {"ZCENTERY": "high"},
    ],
    ids=str,
)
def test_boxes_that_make_no_sense_are_counted(tmp_path, face):
    library = LIBRARIES[10](tmp_path / "Test.photoslibrary")
    library.face(library.photo(texture(1)), library.person("Ann"), (640, 480), IN_FRAME, **face)
    lines, _ = collect(library.finish(), tmp_path / "people")
    assert lines[-2] == "1 skipped: the face's box makes no sense"


@pytest.mark.parametrize(
    "size", [(0, 0), (None, None), ("a", "b"), (float("inf"), 1), (10**18, 10**18)], ids=str
)
def test_odd_sizes_of_the_picture_harm_nothing(tmp_path, size):
    library = LIBRARIES[10](tmp_path / "Test.photoslibrary")
    columns = dict(zip(("ZSOURCEWIDTH", "ZSOURCEHEIGHT"), size))
    library.face(library.photo(texture(1)), library.person("Ann"), (640, 480), IN_FRAME, **columns)
    collect(library.finish(), tmp_path / "people")


def test_uuids_do_not_lead_out_of_the_dataset_nor_overwrite_each_other(tmp_path):
    library = LIBRARIES[10](tmp_path / "Test.photoslibrary")
    photo, ann = library.photo(texture(1)), library.person("Ann")
    for uuid in ("../../../escaped", "same", "same", None):
        library.face(photo, ann, (640, 480), IN_FRAME, ZUUID=uuid)
    path = library.finish()
    expected, _ = collect(path, tmp_path / "people", "--dry-run")
    lines, _ = collect(path, tmp_path / "people")
    assert lines == expected
    assert lines[-2:] == [
        "1 skipped: twice in the database",
        "4 faces: 3 named (1 persons), 0 unknown, 1 skipped",
    ]
    assert len(files(tmp_path / "people")) == 3
    assert sorted(os.listdir(tmp_path)) == ["Test.photoslibrary", "people"]


def test_text_that_is_not_utf_8(tmp_path):
    library = LIBRARIES[10](tmp_path / "Test.photoslibrary")
    person = library.person("x")
    library.open["Photos.sqlite"].execute("UPDATE ZPERSON SET ZFULLNAME = CAST(x'41ff42' AS TEXT)")
    library.face(library.photo(texture(1)), person, (640, 480), IN_FRAME)
    lines, _ = collect(library.finish(), tmp_path / "people")
    assert lines[1] == "     1  A\ufffdB"


# ---------------------------------------------------------------- options


@pytest.fixture
def family(tmp_path):
    """A library of 3 faces of Ann (one of 40 px), 1 of Ben, 1 without a name."""
    big, small = IN_FRAME, (100, 100, 40)
    faces = [("Ann", big), ("Ann", big), ("Ann", small), ("Ben", big), (None, big)]
    return make_library(tmp_path / "Test.photoslibrary", 10, [(texture(1), faces)])


SMALL = "1 skipped: smaller than 48 pixels (--min-size)"
TABLES = [
    (
        [],
        ["2 Ann", "1 Ben", "1 unknown"],
        [SMALL],
        "5 faces: 3 named (2 persons), 1 unknown, 1 skipped",
    ),
    (
        ["--min-size", 40],
        ["3 Ann", "1 Ben", "1 unknown"],
        [],
        "5 faces: 4 named (2 persons), 1 unknown, 0 skipped",
    ),
    (
        ["--min-images", 2],
        ["2 Ann", "2 unknown"],
        [SMALL],
        "5 faces: 2 named (1 persons), 2 unknown, 1 skipped",
    ),
    (
        ["--min-images", 3],
        ["4 unknown"],
        [SMALL],
        "5 faces: 0 named (0 persons), 4 unknown, 1 skipped",
    ),
    (
        ["--no-unknown"],
        ["2 Ann", "1 Ben"],
        [SMALL, "1 skipped: without a name (--no-unknown)"],
        "5 faces: 3 named (2 persons), 0 unknown, 2 skipped",
    ),
    (
        ["--no-unknown", "--min-images", 2],
        ["2 Ann"],
        [
            "1 skipped: of a person with fewer than 2 (--min-images)",
            SMALL,
            "1 skipped: without a name (--no-unknown)",
        ],
        "5 faces: 2 named (1 persons), 0 unknown, 3 skipped",
    ),
]


@pytest.mark.parametrize(
    ("options", "rows", "reasons", "total"), TABLES, ids=lambda value: str(value)[:40]
)
def test_options_move_faces_and_every_face_is_accounted_for(
    tmp_path, family, options, rows, reasons, total
):
    wanted = [
        "images  person",
        *(f"{row.split()[0]:>6}  {row.split()[1]}" for row in rows),
        *reasons,
        total,
    ]
    lines, _ = collect(family, tmp_path / "dry", *options, "--dry-run")
    assert lines == wanted
    assert sorted(os.listdir(tmp_path)) == ["Test.photoslibrary"]
    lines, _ = collect(family, tmp_path / "people", *options)
    assert lines == wanted
    folders = {
        folder.name: len(list(folder.iterdir())) for folder in (tmp_path / "people").iterdir()
    }
    assert folders == {row.split()[1]: int(row.split()[0]) for row in rows}


def test_too_many_wanted_images_say_what_fewer_would_keep(tmp_path, family):
    _, errors = collect(family, tmp_path / "people", "--min-images", 3)
    (line,) = [line for line in errors if "--min-images" in line]
    assert line == (
        "warning: --min-images 3 leaves nobody with a name: "
        "1 person with 2 pictures (2 would keep 1), 1 person with 1 picture (1 would keep 2)"
    )
    assert errors[-1].startswith("not enough to train on")
    _, errors = collect(family, tmp_path / "more", "--min-images", 2)
    assert not any("--min-images" in line for line in errors)


def test_a_dry_run_leaves_a_full_folder_alone_and_says_what_comes_next(tmp_path, family):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("kept")
    before = state_of(tmp_path / "full")
    _, errors = collect(family, tmp_path / "full", "--dry-run")
    assert state_of(tmp_path / "full") == before
    command = f"python train.py {tmp_path / 'full'} model"
    assert errors[-1] == f"next: the same without --dry-run, then {command}"


def test_context(tmp_path, family):
    collect(family, tmp_path / "people", "--context", 1.5)
    assert_same_crop(next((tmp_path / "people" / "Ben").iterdir()), texture(1), IN_FRAME, 1.5)


@pytest.mark.parametrize(
    "options",
    [
        ["--context", "0"],
        ["--context", "nan"],
        ["--min-size", "0"],
        ["--min-images", "-1"],
        ["--min-size", "x"],
        ["--x"],
    ],
    ids=" ".join,
)
def test_wrong_usage_ends_with_2(tmp_path, family, options):
    _, errors = collect(family, tmp_path / "people", *options, code=2)
    assert errors[0].startswith("usage: ")


def test_help_names_every_option_and_loads_nothing_heavy(tmp_path):
    code = "import sys, collect_apple_photos as c; sys.argv[1:] = ['--help']\n"
    heavy = "{'tensorflow', 'keras', 'cv2', 'scipy', 'matplotlib'}"
    code += f"try: c.main()\nfinally: print(sorted({heavy} & {{*sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    for option in (
        "--context F",
        "--min-size PX",
        "--min-images N",
        "--no-unknown",
        "--include-hidden",
        "--dry-run",
    ):
        assert option in done.stdout
    assert (
        len(re.findall(r"\(default:\s", done.stdout)) == 6
        and "python collect_apple_photos.py" in done.stdout
    )
    assert done.stdout.splitlines()[-1] == "[]"


# ---------------------------------------------------------------- failures


def an_iphoto_library(path):
    (path / "Database" / "apdb").mkdir(parents=True)
    for name in ("Library.apdb", "ImageProxies.apdb", "Faces.db"):
        (path / "Database" / name).touch()


def an_empty_database(path):
    (path / "database").mkdir(parents=True)
    (path / "database" / "Photos.sqlite").touch()


def a_database_without_its_wal(path):
    make_library(path, 2, [])
    with sqlite3.connect(path / "database" / "photos.db") as db:
        db.execute("DROP TABLE RKFace")


def only_the_wal(path):
    make_library(path, 2, [])
    (path / "database" / "photos.db").rename(path / "database" / "photos.db-wal")


def a_truncated_database(path):
    make_library(path, 10, [(texture(1), [("Ann", IN_FRAME)])])
    file = path / "database" / "Photos.sqlite"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def a_garbled_database(path):
    an_empty_database(path)
    (path / "database" / "Photos.sqlite").write_bytes(b"no database" * 1000)


def an_unknown_layout(path):
    make_library(path, 10, [])
    with sqlite3.connect(path / "database" / "Photos.sqlite") as db:
        db.execute("ALTER TABLE ZDETECTEDFACE RENAME COLUMN ZISINTRASH TO ZGONE")


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda path: path.mkdir(), "no Apple Photos library"),
        (lambda path: None, "no such folder"),
        (lambda path: path.touch(), "no such folder"),
        (an_iphoto_library, "iPhoto or Aperture"),
        (an_empty_database, "no table of faces"),
        (a_database_without_its_wal, "no table of faces"),
        (only_the_wal, "copy the library again, whole"),
        (a_truncated_database, "damaged, incomplete or of an unknown layout"),
        (a_garbled_database, "damaged, incomplete or of an unknown layout"),
        (an_unknown_layout, "no such column: f.ZISINTRASH"),
    ],
)
def test_other_folders_and_broken_databases_give_one_line(tmp_path, make, words):
    path = tmp_path / "An\x1b[31m odd library"
    make(path)
    lines, errors = collect(path, tmp_path / "people", code=1)
    assert lines == [] and len(errors) == 1
    assert (
        errors[0].startswith("error: ")
        and words in errors[0]
        and "\\x1b" in errors[0]
        and "\x1b" not in errors[0]
    )
    assert not (tmp_path / "people").exists() and leftovers(tmp_path) == []


@pytest.mark.parametrize(
    "out", ["Test.photoslibrary/people", "Test.photoslibrary", "link/people", "full", "file"]
)
def test_folders_that_are_refused(tmp_path, family, out):
    (tmp_path / "link").symlink_to(family)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("kept")
    (tmp_path / "file").write_text("kept")
    before = state_of(tmp_path)
    _, errors = collect(family, tmp_path / out, code=1)
    assert len(errors) == 1 and errors[0].startswith("error: ")
    assert state_of(tmp_path) == before


def test_an_empty_folder_is_filled_and_missing_parents_are_made(tmp_path, family):
    (tmp_path / "empty").mkdir()
    collect(family, tmp_path / "empty")
    collect(family, tmp_path / "a" / "b" / "people")
    assert files(tmp_path / "empty") == files(tmp_path / "a" / "b" / "people") != []
    assert sorted(os.listdir(tmp_path)) == ["Test.photoslibrary", "a", "empty"]


@pytest.mark.parametrize("generation", LIBRARIES)
def test_a_library_without_faces_is_no_failure(tmp_path, generation):
    lines, _ = collect(
        make_library(tmp_path / "Test.photoslibrary", generation, [(texture(1), [])]),
        tmp_path / "people",
    )
    assert "no faces" in lines[0]
    assert lines[-1] == "0 faces: 0 named (0 persons), 0 unknown, 0 skipped"


def test_a_missing_permission_names_the_setting(tmp_path, family, monkeypatch, capsys):
    def refuse(source, _):
        raise PermissionError(1, "Operation not permitted", str(source))

    monkeypatch.setattr(shutil, "copyfile", refuse)
    monkeypatch.setattr(sys, "argv", ["collect", str(family), str(tmp_path / "people")])
    with pytest.raises(utils.UserError, match=r"Photos\.sqlite: .*Full Disk Access"):
        collect_apple_photos.main()
    assert leftovers(tmp_path) == []


def test_a_database_that_photos_changed_while_it_was_copied_is_copied_again(
    tmp_path, family, monkeypatch, capsys
):
    copy, times = shutil.copyfile, []

    def torn(source, target):
        times.append(source)
        copy(source, target)
        if len(times) == 1:
            Path(target).write_bytes(b"half" * 1000)

    monkeypatch.setattr(shutil, "copyfile", torn)
    monkeypatch.setattr(sys, "argv", ["collect", str(family), str(tmp_path / "people")])
    collect_apple_photos.main()
    assert capsys.readouterr().out.splitlines()[-1].startswith("5 faces")


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path, family):
    code = "import resource, signal, sys, utils, collect_apple_photos as c\n"
    code += "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
    code += "resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000))\n"
    code += f"sys.argv[1:] = [{str(family)!r}, {str(tmp_path / 'people')!r}]\nutils.run(c.main)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert (
        done.returncode == 1 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    )
    assert sorted(os.listdir(tmp_path)) == ["Test.photoslibrary"]


# ---------------------------------------------------------------- the working folder


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A library that takes a few seconds: 60 pictures of 6 megapixels with 4 faces each."""
    data = jpeg(texture(1, (3008, 2000)))
    library = LIBRARIES[10](tmp_path_factory.mktemp("large") / "Test.photoslibrary")
    persons = [library.person(name) for name in ("Ann", "Ben", "Cleo")]
    for _ in range(60):
        photo = library.photo(data=data)
        for number, person in enumerate((*persons, None)):
            library.face(photo, person, (3008, 2000), (400 + 600 * number, 900, 200))
    return library.finish()


def start(library, out):
    return subprocess.Popen(
        [sys.executable, SCRIPT, library, out], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def kill_at_random(library, folder, kills, seed):
    """Kill a run `kills` times, at moments spread over its time, and look at what is there."""
    rng, before, started = random.Random(seed), state_of(library), time.monotonic()
    collect(library, folder / "whole")
    seconds, whole = time.monotonic() - started, files(folder / "whole")
    for number in range(kills):
        process = start(library, folder / "people")
        time.sleep(seconds * (number + rng.random()) / kills)
        process.kill()
        process.communicate()
        assert not (folder / "people").exists() or files(folder / "people") == whole
        assert state_of(library) == before
        if (folder / "people").exists():
            shutil.rmtree(folder / "people")
    collect(library, folder / "people")
    assert files(folder / "people") == whole
    assert sorted(os.listdir(folder)) == ["people", "whole"]


@pytest.mark.slow
def test_two_kills(tmp_path, large):
    kill_at_random(large, tmp_path, 2, 1)


@pytest.mark.long
def test_ten_kills(tmp_path, large):
    kill_at_random(large, tmp_path, 10, 2)


def wait_for(condition):
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_what_is_unfinished_is_private_and_in_one_folder(tmp_path, large):
    process, folder = start(large, tmp_path / "people"), tmp_path / ".people-unfinished"
    wait_for(lambda: list(folder.glob("**/*.jpg")) and list(folder.glob("**/photos.sqlite")))
    assert os.listdir(tmp_path) == [".people-unfinished"]
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    _, errors = collect(
        large, tmp_path / "people", code=1
    )  # a second run does not disturb the first
    assert "another run is at work here" in errors[0]
    other, _ = collect(large, tmp_path / "others")
    out, _ = process.communicate()
    assert process.returncode == 0 and out.decode().splitlines() == other
    assert sorted(os.listdir(tmp_path)) == ["others", "people"]


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such signal")
def test_ctrl_c_leaves_nothing(tmp_path, large):
    process = start(large, tmp_path / "people")
    wait_for(lambda: list(tmp_path.glob(".people-unfinished/**/*.jpg")))
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 130 and b"Traceback" not in errors
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("content", ["folder", "file", "link"])
def test_what_is_not_from_here_is_never_removed(tmp_path, family, content):
    mine, way = tmp_path / "mine", tmp_path / ".people-unfinished"
    mine.mkdir()
    (mine / "work").mkdir()
    (mine / "work" / "precious").write_text("kept")
    if content == "file":
        way.write_text("kept")
    elif content == "link":
        way.symlink_to(mine)
        (mine / collect_apple_photos.LOCK).touch()
    else:
        mine.rename(way)
    before = state_of(tmp_path)
    _, errors = collect(family, tmp_path / "people", code=1)
    assert "is not from here" in errors[0]
    assert state_of(tmp_path) == before


@pytest.mark.parametrize(
    "left", [[], ["collect_apple_photos.lock"], ["collect_apple_photos.lock", "work/dataset/a.jpg"]]
)
def test_what_a_killed_run_left_is_removed(tmp_path, family, left):
    for name in [".", *left]:
        path = tmp_path / ".people-unfinished" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.mkdir() if name == "." else path.touch()
    collect(family, tmp_path / "people")
    assert sorted(os.listdir(tmp_path)) == ["Test.photoslibrary", "people"]


# ---------------------------------------------------------------- real libraries


@pytest.mark.slow
@needs_real
@pytest.mark.parametrize(
    "name", [path.name[: -len(".tar.xz")] for path in sorted(REAL.glob("*.tar.xz"))]
)
def test_every_face_of_a_real_library(tmp_path, name):
    with tarfile.open(REAL / f"{name}.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
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
        assert_same_crop(
            tmp_path / "people" / (face["name"] or "unknown") / f"{stem}.jpg", picture, box
        )
    assert len(files(tmp_path / "people")) == len(truth["faces"])
