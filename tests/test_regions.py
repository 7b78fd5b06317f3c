"""webcam.py --by-name: the faces that photo programs have named, found where they are."""

import os
import unicodedata
from xml.sax.saxutils import escape

import pytest
import tagged_photos
from conftest import assert_same_crop, run_here, texture
from PIL import Image
from tagged_photos import packet, tag_photo

import imaging
import regions
import tracker

SIZE, ANN, BEN = (480, 320), (100, 120, 80), (330, 180, 100)
FACES = [("Ann", ANN), ("Bén & Co", BEN), ("", (440, 60, 60))]
ENDINGS = (".jpg", ".png", ".tif", ".webp", ".avif")
PROGRAMS = (*tagged_photos.PROGRAMS, "Picasa")


def found_in(path, picasa=None):
    """Return {name: (left, top, width, height)} of a file's faces, in its upright pixels."""
    image = imaging.read_picture(path)[1]
    orientation, size = regions.find_orientation(image), imaging.upright(image).size
    found = {}
    for region in regions.read_regions(path, picasa or regions.read_picasa([path])):
        box, reason = regions.box_in_picture(region, orientation, size)
        x, y, w, h = box or (0, 0, 0, 0)
        found[region.name if box else reason] = x - w / 2, y - h / 2, w, h
    return found


def assert_found(path, *faces):
    """Assert that a file names these faces, and that each box is the drawn one (x, y, side)."""
    found = found_in(path)
    assert found.keys() == {name for name, _ in faces}, path.name
    for name, (x, y, side) in faces:
        drawn = x - side / 2, y - side / 2, side, side
        assert tracker.iou(found[name], drawn) >= 0.95, (path.name, name)


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize("orientation", range(1, 9))
def test_boxes_lie_where_the_program_drew_them(tmp_path, program, orientation):
    """208 files. Encoding HEIC takes nearly a second."""
    faces = [(name if program == "Picasa" else escape(name), box) for name, box in FACES]
    for ending in (*ENDINGS, ".heic") if program == "Apple" else ENDINGS:
        path = tmp_path / f"IMG_1{ending}"
        assert_found(tag_photo(path, texture(1, SIZE), faces, program, orientation), *FACES)


@pytest.mark.parametrize("name", ["IMG_1.jpg.xmp", "IMG_1.xmp"])
def test_sidecars(tmp_path, name):
    path = tag_photo(tmp_path / "IMG_1.jpg", texture(1, SIZE), [], orientation=6, xmp=b"")
    box = tagged_photos.stored_box(SIZE, ANN, 6)
    (tmp_path / name).write_bytes(packet(tagged_photos.lightroom([("Ann", box)], SIZE[::-1])))
    assert_found(path, ("Ann", ANN))


@pytest.mark.parametrize(
    ("orientation", "applied", "turned", "found"),
    [
        (1, (4800, 3200), 1, True),  # made smaller
        (6, (320, 480), 6, True),  # as the specification has it
        (6, (480, 320), 1, True),  # a program that turned the box already
        (1, (320, 480), 1, False),  # the picture was turned later
        (1, (480, 480), 1, False),  # or cropped
        (6, (480, 480), 6, False),
        (3, (0, 0), 3, True),  # not told
    ],
)
def test_the_size_told_beside_the_boxes_says_whether_they_still_fit(
    tmp_path, orientation, applied, turned, found
):
    box = tagged_photos.stored_box(SIZE, ANN, turned)
    xmp = packet(tagged_photos.digikam([("Ann", box)], applied).replace("stDim:unit", "stDim:u"))
    path = tag_photo(tmp_path / "a.jpg", texture(1, SIZE), [], orientation=orientation, xmp=xmp)
    if found:
        assert_found(path, ("Ann", ANN))
    else:
        reason = "the picture was cropped or turned after the face was named"
        assert found_in(path).keys() == {reason}


def test_one_face_told_by_several_programs_is_one_under_the_first_name(tmp_path):
    here = [("", (0.2, 0.4, 0.16, 0.25)), ("Ann", (0.7, 0.5, 0.2, 0.3))]
    moved = [("Cleo", (0.21, 0.39, 0.16, 0.25)), ("Other", (0.71, 0.5, 0.2, 0.3))]
    pet = [("Rex", (0.5, 0.15, 0.15, 0.2))]
    body = tagged_photos.lightroom(here, SIZE) + tagged_photos.lightroom(pet, SIZE, "Pet")
    xmp = packet(body + tagged_photos.windows(pet, SIZE))
    path = tag_photo(tmp_path / "a.jpg", texture(1, SIZE), [], xmp=xmp)
    (tmp_path / ".picasa.ini").write_text(tagged_photos.picasa(moved, "A.JPG"))
    assert found_in(path).keys() == {"Ann", "Cleo", "not marked as a face (a pet, say)"}


BODY = tagged_photos.lightroom([("Eve", (0.5, 0.5, 0.5, 0.5))], SIZE)
ENTITIES = '<!ENTITY a "aaaaaaaaaa">' + "".join(
    f'<!ENTITY {b} "{f"&{a};" * 10}">' for a, b in zip("abcdefgh", "bcdefghi")
)
HOSTILE = {
    "a billion laughs": f"<!DOCTYPE x [{ENTITIES}]><x>&i;Region</x>".encode(),
    "a local file": b'<!DOCTYPE x [<!ENTITY f SYSTEM "file:///etc/passwd">]><x>&f;Region</x>',
    "an address": b'<!DOCTYPE x SYSTEM "http://127.0.0.1:9/x.dtd"><x>Region</x>',
    "deep": packet("<a>" * 50_000 + "Region" + "</a>" * 50_000),
    "large": packet(BODY + "<!--" + "x" * regions.MAX_XMP + "-->"),
    "cut off": packet(BODY)[:-200],
    "an unknown encoding": b'<?xml version="1.0" encoding="x-nowhere"?><x>Region</x>',
    "not UTF-8": packet(BODY).replace(b"Eve", b"\xff\xfe"),
    "other tags inside": packet(BODY).replace(b"</rdf:Bag>", b"</rdf:Seq>"),
}


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("ending", [".tif", ".webp"])
def test_hostile_packets_are_refused_and_the_picture_stays_of_use(tmp_path, capsys, ending, name):
    path, ann = tmp_path / f"a{ending}", [("Ann", ANN)]
    tag_photo(path, texture(1, SIZE), ann, "Picasa", xmp=HOSTILE[name])
    assert found_in(path).keys() == {"Ann"}
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"warning: {path}: the names in its metadata are not read: ")
    assert imaging.to_model_input(imaging.open_picture(path.read_bytes()), 75).std() > 10


@pytest.mark.parametrize("box", ["nan nan nan nan", "1e999 0 1 1", "0.5 0.5 -1 1", "7 7 1 1"])
def test_numbers_that_make_no_sense(tmp_path, box):
    keys = " ".join(f'stArea:{key}="{value}"' for key, value in zip("xywh", box.split()))
    body = f'<mwg-rs:RegionList><rdf:Bag><rdf:li mwg-rs:Type="Face"><mwg-rs:Area {keys}/></rdf:li>'
    body += f'<rdf:li mwg-rs:Type="Face"/></rdf:Bag></mwg-rs:RegionList>{BODY}'
    path = tag_photo(tmp_path / "a.jpg", texture(1, SIZE), [], xmp=packet(body))
    assert found_in(path).keys() == {"no box, or one that makes no sense", "Eve"}


def test_a_gigabyte_of_xmp(tmp_path, capsys):
    path = tag_photo(tmp_path / "a.jpg", texture(1, SIZE), [("Ann", ANN)])
    (tmp_path / "a.xmp").write_text("Region")
    os.truncate(tmp_path / "a.xmp", 2**30)  # takes no space
    assert found_in(path).keys() == {"Ann"}
    assert "a.xmp: the names in its metadata are not read: larger" in capsys.readouterr().err
    bomb = tag_photo(tmp_path / "b.png", texture(1, SIZE), [], orientation=2, xmp=b"Region" * 2**24)
    assert bomb.stat().st_size < 10**6 and found_in(bomb) == {}
    assert "b.png" in capsys.readouterr().err


@pytest.fixture
def album(tmp_path):
    """Draw a folder of photos: by several programs, with a pet, a small face, a broken file."""
    folder = tmp_path / "photos"
    (folder / "2019").mkdir(parents=True)
    ann = [("Ann", (240, 160, 80)), ("Ann", (240, 160, 90))]
    tag_photo(folder / "a.jpg", texture(1, SIZE), [ann[0], ("", BEN)], "Lightroom")
    tag_photo(folder / "2019" / "a.jpg", texture(2, SIZE), [ann[1]], "Apple", 6)
    tag_photo(folder / "2019" / "unknown.png", texture(3, SIZE), [("unknown", ANN)], "Windows")
    for number, name in enumerate(("José", unicodedata.normalize("NFD", "José"), "José ")):
        tag_photo(folder / f"j{number}.jpg", texture(4 + number, SIZE), [(name, ANN)], "digiKam")
    tag_photo(folder / "small.jpg", texture(7, SIZE), [("Ann", (100, 120, 30))], "digiKam")
    pet = packet(tagged_photos.apple([("Rex", (0.5, 0.5, 0.3, 0.3))], SIZE, "Pet"))
    tag_photo(folder / "pet.jpg", texture(8, SIZE), [], xmp=pet)
    data = tag_photo(folder / "b.jpg", texture(9, SIZE), [("Ann", ANN)]).read_bytes()
    (folder / "b.jpg").write_bytes(data[: len(data) // 2])
    (folder / "readme.txt").write_text("no picture")
    Image.new("RGB", SIZE).save(folder / "nobody.jpg")
    return folder


def collect(folder, *more):
    words = ["--save-faces", "people", "--by-name", "--source", "photos", *more]
    done = run_here("webcam.py", folder, *words)
    assert done.returncode == 0, done.stderr
    return done


def test_named_faces_become_a_training_set(tmp_path, album, monkeypatch):
    monkeypatch.setattr(imaging, "load_cascade", None)  # no face is looked for
    done = collect(tmp_path)
    assert done.stdout.splitlines() == [
        "images  person",
        "     2  Ann",
        "     3  José",
        "     1  unknown (2)",
        "     1  unknown",
        "1 skipped: not marked as a face (a pet, say)",
        "1 skipped: smaller than 48 pixels",
        done.stdout.splitlines()[-2],
        "10 faces: 6 named (3 persons), 1 unknown, 3 skipped",
    ]
    assert done.stdout.splitlines()[-2].startswith("1 skipped: the picture cannot be read: ")
    assert done.stderr.splitlines()[-1] == "next: python train.py people model"
    files = {path: path.read_bytes() for path in (tmp_path / "people").rglob("*.*")}
    assert len(files) == 7
    (unnamed,) = (tmp_path / "people" / "unknown").iterdir()
    assert_same_crop(unnamed, texture(1, SIZE), BEN, 2 * regions.HAAR_BOX)
    ann = sorted((tmp_path / "people" / "Ann").iterdir(), key=lambda path: Image.open(path).width)
    assert_same_crop(ann[0], texture(1, SIZE), (240, 160, 80), 2 * regions.HAAR_BOX)
    assert_same_crop(ann[1], texture(2, SIZE), (240, 160, 90), 2 * regions.HAAR_BOX)
    for path in files:
        image = Image.open(path)
        assert image.format == "JPEG" and image.width == image.height and not image.getexif()
    again = collect(tmp_path)  # the same again
    assert again.stdout == done.stdout
    assert {path: path.read_bytes() for path in (tmp_path / "people").rglob("*.*")} == files
    collect(tmp_path, "--context", "1")
    assert_same_crop(unnamed, texture(1, SIZE), BEN, regions.HAAR_BOX)


def test_photos_without_names_are_no_failure(tmp_path):
    (tmp_path / "photos").mkdir()
    Image.new("RGB", SIZE).save(tmp_path / "photos" / "nobody.jpg")
    done = collect(tmp_path)
    first, *_, last = done.stdout.splitlines()
    assert first == "no faces: no photo program has left names in these pictures"
    assert last == "0 faces: 0 named (0 persons), 0 unknown, 0 skipped"
    assert done.stderr.startswith("not enough to train on") and not (tmp_path / "people").exists()


@pytest.mark.parametrize(
    "words",
    [
        "model --save-faces people --source photos",
        "--source photos",
        "--save-faces people --source photos --output out",
        "--save-faces people --source photos --whole-picture",
        "--save-faces people --source 0",
        "--save-faces people --source photos/a.jpg",
    ],
)
def test_wrong_usage(tmp_path, album, words):
    done = run_here("webcam.py", tmp_path, "--by-name", *words.split())
    assert done.returncode == 2 and "error: " in done.stderr.splitlines()[-1]
    assert not (tmp_path / "people").exists()


def test_as_many_regions_as_fit_take_no_time(tmp_path):
    body = tagged_photos.windows([("x", (0.5, 0.5, 1e-5 * n, 1e-5)) for n in range(40_000)], SIZE)
    path = tag_photo(tmp_path / "a.webp", texture(1, SIZE), [], xmp=packet(body))
    assert len(regions.read_regions(path, {})) <= regions.MAX_REGIONS
