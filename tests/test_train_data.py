"""train.py before any network: what it reads, what it skips, how it divides, what it refuses."""

import hashlib
import itertools
import os
import re
import sys
import unicodedata
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from conftest import draw_classes, error_line, train_here
from PIL import Image
from PIL.PngImagePlugin import PngInfo

import dataset
import features
import model
import report
import train
import utils


def read(data, *options):
    """Read and divide a folder as a dry run does, in this process. Returns Data."""
    words = [str(data), str(data.parent / "model"), "--dry-run", *map(str, options)]
    return dataset.read_data(train.parse_arguments(words), 75)


def dry_run(data, *options):
    return train_here(data.parent, data, "model", "--dry-run", *options)


MISTYPED = {
    "validation-split 20": "20 is not between 0.001 and 0.999",
    "rounds x": "--rounds: invalid int value: 'x'",
    "image-size 74": "--image-size",
    "cache-gb nan": "--cache-gb",
    "unfreeze 11": "--unfreeze",
    "no-such-option": "--no-such-option",
}


@pytest.mark.parametrize("option", MISTYPED)
def test_values_out_of_range_are_wrong_usage(tmp_path, option):
    done = train_here(tmp_path, tmp_path, "model", *f"--{option}".split())
    assert done.returncode == 2 and "usage:" in done.stderr and MISTYPED[option] in done.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("nowhere model", "error: .*nowhere: no such folder"),
        ("data missing/model", "error: missing: no such folder"),
        ("data model-labels", "error: model-labels: choose a prefix"),
        ("data model --weights nowhere.h5", "error: nowhere.h5: no such file"),
        ("data model --weights w.keras", "error: --weights w.keras: give a file"),
        ("data/ann model", "error: .*did you mean .*/data[?]"),
        ("empty model", "error: empty: fewer than two classes"),
        ("one model", "error: one: fewer than two classes"),
        ("few model --weights none", "error: no class can be divided"),
        ("data foreign --weights none", "error: foreign.h5 or foreign.json: from elsewhere"),
    ],
)
def test_what_is_wrong_is_told_before_the_work(make_classes, tmp_path, words, message):
    make_classes(ann=4, ben=4)
    make_classes("one", a=5)
    make_classes("few", a=1, b=1)
    (tmp_path / "empty").mkdir()
    (tmp_path / "foreign.h5").write_bytes(b"somebody's")
    for more in ([], ["--dry-run"]):
        assert re.match(message, error_line(train_here(tmp_path, *words.split(), *more)))
    assert (tmp_path / "foreign.h5").read_bytes() == b"somebody's"


def test_dry_run_summarises_and_writes_nothing(make_classes, tmp_path):
    data = make_classes(cats=12, dogs=8)
    (data / "stray.png").write_bytes(b"")
    (data / "empty").mkdir()
    (data / "cats" / "notes.txt").write_text("no picture")
    (data / "cats" / "copy.png").write_bytes((data / "cats" / "000.png").read_bytes())
    Image.new("RGB", (201, 100)).save(data / "dogs" / "wide.png")
    Image.new("RGB", (200, 100)).save(data / "dogs" / "just.png")
    before = sorted(tmp_path.rglob("*"))
    done = dry_run(data)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "images: 17 train, 5 validation, 2 classes, 2 skipped",
        "near copies: 2 pictures stay with theirs",
        "pictures  groups  train  validation  class",
        "      13      12     10           3  cats",
        "       9       9      7           2  dogs",
    ]
    for part in (
        "data: 1 file lies beside the class folders",
        "empty: a class without files",
        "1 file is no picture: 1 .txt",
        "wide.png: skipped: the longer side",
    ):
        assert part in done.stderr
    assert all(line.startswith("warning: ") for line in done.stderr.splitlines())
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.skipif(sys.platform != "linux", reason="names are text here")
def test_a_class_name_that_no_model_can_have_is_told_before_the_training(make_classes):
    data = make_classes(red=3, green=3)
    (data / "red").rename(data / os.fsdecode(b"\xc4" * 60))  # six characters each, when shown
    assert "too long for a class name: rename" in error_line(dry_run(data))


def pictures_of(spec):
    """Make a list of Pictures from [(class, folder, content)]; each looks as its content says."""
    pictures = []
    for n, (label, folder, content) in enumerate(spec):
        digest = hashlib.sha256(content.encode()).digest()
        dhash = int.from_bytes(digest[:8], "little")
        thumbnail = np.frombuffer(hashlib.shake_128(digest).digest(256), "uint8")
        path = Path("data", label, folder, f"{n}.png")
        pictures.append(dataset.Picture(path, label, digest, dhash, thumbnail, n))
    return pictures


def divide(pictures, by_folder=False, fraction=0.2, seed=1):
    groups, _, _ = dataset.group_pictures(pictures, [Path("data")], by_folder)
    return dataset.split(pictures, groups, fraction, seed)


@pytest.mark.parametrize(
    ("n", "fraction", "expected"),
    [(10, 0.2, 2), (40, 0.25, 10), (3, 0.1, 1), (2, 0.9, 1), (5, 0.5, 2)],
)
def test_each_class_gives_its_share(n, fraction, expected):
    pictures = pictures_of([(label, "", f"{label}{i}") for label in "ab" for i in range(n)])
    fit, validation = divide(pictures, fraction=fraction)
    assert Counter(pictures[i].label for i in validation) == {"a": expected, "b": expected}
    assert sorted([*fit, *validation]) == list(range(2 * n))


def test_added_pictures_move_only_those_at_the_boundary_and_another_seed_many():
    spec = [(label, "", f"{label}{i}") for label in "ab" for i in range(100)]
    before = {spec[i] for i in divide(pictures_of(spec))[1]}
    longer = spec + [("a", "", f"new{i}") for i in range(10)]
    after = {longer[i] for i in divide(pictures_of(longer))[1]}
    assert len(before - after) <= 2
    assert len(before - {spec[i] for i in divide(pictures_of(spec), seed=2)[1]}) > 10


def test_folders_stay_together_and_loose_files_are_groups_of_one(capsys):
    """A class of one folder only trains."""
    spec = [("a", f"clip{i % 4}", f"a{i}") for i in range(40)]
    spec += [("b", "", f"b{i}") for i in range(40)] + [("c", "clip", f"c{i}") for i in range(10)]
    fit, validation = divide(pictures_of(spec), by_folder=True)
    held = Counter(spec[i][:2] for i in validation)
    assert held.pop(("b", "")) == 8 and list(held.values()) == [10] and len(fit) == 72
    assert "c: not tested, since all its pictures belong together" in capsys.readouterr().err


def test_no_class_ever_loses_its_last_group_to_twins_in_another():
    for seed in range(30):
        spec = [("a", "", "x"), ("b", "", "x"), ("a", "", "y"), ("b", "", "y"), ("a", "", "z")]
        pictures = pictures_of(spec)
        fit, _ = divide(pictures, seed=seed, fraction=0.9)
        assert {pictures[i].label for i in fit} == {"a", "b"}


def scene(seed):
    """Return a picture of 120 x 120 with some coarse shapes, as photos have."""
    small = np.random.default_rng(seed).integers(0, 256, (5, 5, 3)).astype("uint8")
    return Image.fromarray(small).resize((120, 120), Image.Resampling.BICUBIC)


@pytest.fixture
def copied(tmp_path):
    """Save 24 pictures of two classes, each again as poorer JPEG, smaller, and cut by 2 %."""
    for n in range(24):
        folder, image = tmp_path / "data" / "ab"[n % 2], scene(n)
        folder.mkdir(parents=True, exist_ok=True)
        image.save(folder / f"{n}.png")
        image.save(folder / f"{n}-poor.jpg", quality=60)
        image.resize((90, 90)).save(folder / f"{n}-small.jpg", quality=60)
        image.crop((1, 1, 119, 119)).save(folder / f"{n}-cut.jpg")
    return tmp_path / "data"


def test_near_copies_stay_together(copied, capsys):
    data = read(copied)
    names = [int(re.match(r"\d+", picture.path.name)[0]) for picture in data.pictures]
    pairs = set(zip(names, data.groups.tolist()))
    assert len(pairs) == 24 == len({group for _, group in pairs})
    held = {names[i] for i in data.validation}
    assert len(held) == 6 and 4 * len(held) == len(data.validation)
    assert "near copies: 96 pictures stay with theirs" in capsys.readouterr().out


def test_near_copies_are_found_among_many_that_look_alike():
    """Also where the first bit of their hashes is what differs."""
    rng = np.random.default_rng(0)
    _, one, *crowd = pictures_of([("a", "", str(n)) for n in range(400)])
    other = one._replace(dhash=one.dhash ^ 1 << 63)
    parts = [sum(8191 << 13 * k for k in range(4) if k != kept) for kept in range(4)]
    alike = [
        picture._replace(
            dhash=one.dhash ^ int(rng.integers(2**52)) & parts[n % 4] ^ (n // 4 % 2) << 63
        )
        for n, picture in enumerate(crowd)
    ]
    found = dataset.find_near_copies([*alike[:200], one, *alike[200:], other])
    assert (200, 399) in found


def test_folders_decide_where_near_copies_tie_them_all(tmp_path, capsys):
    """Two films of one person before the same wall; without folders, that class only trains."""
    for n in range(8):
        for label, image in (("a", scene(1)), ("b", scene(10 + n))):
            folder = tmp_path / "data" / label / f"film{n % 2}"
            folder.mkdir(parents=True, exist_ok=True)
            image.save(folder / f"{n}.jpg", quality=70 + n)
    data = read(tmp_path / "data", "--group-by-folder")
    assert "a: its folders hold near copies" in capsys.readouterr().err
    held = [data.pictures[i] for i in data.validation]
    assert list(Counter(picture.path.parent for picture in held).values()) == [4, 4]
    assert {picture.label for picture in held} == {"a", "b"}
    read(tmp_path / "data")
    assert "a: not tested" in capsys.readouterr().err


def test_copies_under_two_classes_are_warned_about_with_both_names(copied, capsys):
    """Equal bytes whatever they show: of one colour, no correlation tells."""
    (copied / "b" / "equal.png").write_bytes((copied / "a" / "0.png").read_bytes())
    Image.open(copied / "a" / "2.png").save(copied / "b" / "near.jpg", quality=70)
    data, errors = read(copied), capsys.readouterr().err
    names = [picture.path.relative_to(copied).as_posix() for picture in data.pictures]
    pairs = {frozenset(names[i] for i in pair) for pair in data.copies}
    assert {frozenset(("b/equal.png", "a/0.png")), frozenset(("b/near.jpg", "a/2.png"))} <= pairs
    for kind, ends in (("the same bytes as", "equal|0"), ("looks the same as", "near|2")):
        path = rf"{copied}/[ab]/({ends})[.]\w+"
        assert re.search(f"{path}: {kind} {path}, of another class; both are used", errors), errors
    equal, twin = (data.groups[names.index(name)] for name in ("b/equal.png", "a/0.png"))
    assert equal == twin
    for n, label in itertools.product(range(20), "ab"):
        Image.new("RGB", (80, 80), (10 * n, 90, 90)).save(copied / label / f"flat{n}.png")
    read(copied)
    told = capsys.readouterr().err
    assert len(re.findall("the same bytes as|looks the same as", told)) == 20
    assert "more pairs of copies under two classes" in told


def test_the_warnings_of_a_careful_colleague(make_classes, capsys):
    data = make_classes(few=5, many=120, single=1)
    read(data)
    errors = capsys.readouterr().err
    assert "few: only 5 pictures" in errors and "single: only 1 picture:" in errors
    assert "many: 120 times as many pictures as single" in errors
    assert "only 25 validation pictures: the accuracy is a rough figure" in errors
    read(make_classes("more", a=100, b=60))
    assert "rough figure" not in capsys.readouterr().err


def test_crops_of_films_without_their_folders_are_warned_about(make_classes, capsys):
    data = make_classes(Ann=4, Ben=4)
    for path in sorted(data.rglob("*.png")):
        path.rename(path.with_name(f"{int(path.stem):06d}-1-0123456789.jpg"))
    for option, is_told in (("--float32", True), ("--group-by-folder", False)):
        read(data, option)
        told = capsys.readouterr().err
        assert ("frames of one film lie on both sides" in told) == is_told


def test_a_divided_set_is_used_as_it_is_and_not_divided_otherwise(make_classes, tmp_path, capsys):
    for part in ("train", "val", "test"):
        make_classes(f"data/{part}", a=5, b=5)
    data = read(tmp_path / "data")
    for some, part in ((data.train, "train"), (data.validation, "val")):
        assert {data.pictures[i].path.relative_to(tmp_path).parts[1] for i in some} == {part}
    assert data.labels == ["a", "b"]
    output, told = capsys.readouterr()
    assert output.startswith("images: 10 train, 10 validation, 2 classes, 0 skipped\n")
    assert "divided as train and val; test is left alone, for --evaluate" in output
    assert "10 validation pictures have near copies among those that train" in told
    assert "stay with theirs" not in output
    done = train_here(tmp_path, "data", "m", "--validation-split", "0.3")
    assert done.returncode == 2 and "error: --validation-split: " in done.stderr
    # with other classes in them, these folders are classes like any
    make_classes("others/train", a=3, b=3)
    make_classes("others/val", c=3, d=3)
    assert read(tmp_path / "others").labels == ["train", "val"]


def test_sets_are_divided_in_many_ways(make_classes, capsys):
    make_classes("data/Training", **{"Rene\u0301": 6, "b": 6, "more": 6})
    make_classes("data/Test", **{"Ren\u00e9": 3, "b": 3})
    data = make_classes(notes=3)
    found = read(data)  # no val folder: Training is divided, Test left alone
    assert found.labels == ["Ren\u00e9", "b", "more"] and len(found.pictures) == 18
    assert len(found.validation) == 3
    output, told = capsys.readouterr()
    assert "read from Training; Test is left alone, for --evaluate" in output
    assert "notes: left out" in told
    make_classes("data/VALID", b=3, more=3, strange=3)
    found = read(data)
    assert found.labels == ["Ren\u00e9", "b", "more"] and len(found.validation) == 6
    told = capsys.readouterr().err
    assert "Ren\u00e9: not tested, since" in told and "strange: left out, since" in told
    for path in (data / "Training" / "more").iterdir():
        path.write_bytes(b"no picture")
    found = read(data)  # nothing of that class can be learned from
    assert found.labels == ["Ren\u00e9", "b"] and len(found.train) == 12
    assert "more: left out, since no picture of it in" in capsys.readouterr().err


def test_folders_of_a_divided_set_stay_together_by_their_own_names(make_classes, tmp_path):
    data = tmp_path / "data"
    for part in ("train", "val"):
        make_classes(f"data/{part}/a", film=3, other=2)
        make_classes(f"data/{part}", b=4)
    for path in (data / "val").rglob("*.png"):  # drawn as those in train are
        Image.open(path).transpose(Image.Transpose.ROTATE_90).save(path)
    groups = read(data, "--group-by-folder").groups
    assert Counter(Counter(groups.tolist()).values()) == {3: 2, 2: 2, 1: 8}


def add_films(data):
    for n in range(25):
        (data / "a" / f"IMG_{n}.MOV").write_bytes(b"film")
        (data / "b" / f"{n}.jpg").write_bytes(b"broken")
    (data / "b" / "nothing.heic").write_bytes(b"")
    (data / "a" / ".IMG_1.HEIC.icloud").touch()
    (data / "blue").mkdir()
    (data / "blue" / "IMG.AAE").write_text("edits")
    os.mkfifo(data / "a" / "pipe.png")


def add_links(data):
    """A link to elsewhere, one that sorts before its folder, and one to a picture elsewhere."""
    elsewhere = draw_classes(data.parent / "store", {"c": 1})
    (data / "c").symlink_to(elsewhere / "c", target_is_directory=True)
    (data / "0").symlink_to(data / "a", target_is_directory=True)
    (data / "a" / "link.png").symlink_to(elsewhere / "c" / "000.png")


def add_odd_names(data):
    """Control characters, and one class in two spellings."""
    for n, name in enumerate((unicodedata.normalize("NFD", "ö"), "ö", "a\x1b[31m", "b\nc")):
        draw_classes(data, {name: 2}, side=80 + n)
    (data / "b\nc" / "bad\x1b.png").write_bytes(b"x")


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (add_films, [
            "2 classes, 53 skipped", "26 files are no pictures: 25 .mov, 1 .aae",
            "warning: blue: none of its files is a picture", "pipe.png: skipped: not a file",
            "24.jpg: skipped: damaged, or of a kind", "nothing.heic: skipped: empty",
            "warning: 5 more files skipped: damaged, or of a kind that cannot be read",
            "data: 1 picture is in iCloud only",
        ]),
        (add_links, [
            "images: 6 train, 2 validation, 2 classes, 0 skipped",
            "c: a class without files is left",
            "3 links lead out of it or in a circle: not followed",
        ]),
        (add_odd_names, ["5 classes, 1 skipped", "a\\x1b[31m", "b\\nc", "bad\\x1b.png"]),
    ],
)  # fmt: skip
def test_what_is_said_of_a_folder(make_classes, change, expected):
    data = make_classes(a=4, b=4)
    change(data)
    done = dry_run(data)
    text = done.stdout + done.stderr
    assert done.returncode == 0 and [part for part in expected if part not in text] == []
    assert "\x1b" not in text and text.count(".jpg: skipped") <= 20
    assert all(line.startswith("warning: ") for line in done.stderr.splitlines())


def test_folders_that_are_no_classes_of_the_model_are_named(capsys):
    args = train.parse_arguments(["held_out", "m", "--evaluate"])
    files = [(Path("held_out", name, "1.jpg"), name) for name in ("ann", "Ben", "Zoe")]
    found = train.rename_strange(args, files, ["Ann", "Ben", "unknown"])
    assert [label for _, label in found] == ["unknown", "Ben", "unknown"]
    assert capsys.readouterr().err.splitlines() == [
        "warning: held_out/Zoe: no class of the model: counts as unknown",
        "warning: held_out/ann: no class of the model (did you mean Ann?): counts as unknown",
    ]
    assert train.rename_strange(args, files, ["Ann", "Ben"]) == files[1:2]
    assert "ann: no class of the model (did you mean Ann?): is left out" in capsys.readouterr().err
    with pytest.raises(utils.UserError, match="held_out: no folder is a class of the model"):
        train.rename_strange(args, files[2:], ["Ann", "Ben"])
    with pytest.raises(utils.UserError, match="held_out: divided: give one of its parts"):
        train.rename_strange(args, [(Path("held_out/test/Ann/1.jpg"), "test")], ["Ann", "Ben"])


def parameters(side, digests, view, *options):
    args = train.parse_arguments(["data", "m", *options])
    return features.augmentation_parameters(args, side, digests, view)


@pytest.mark.parametrize("kind", ["--heavy-augmentation", "--no-heavy-augmentation"])
def test_views_depend_on_seed_picture_and_view_alone(kind):
    picture = np.random.default_rng(0).integers(0, 255, (75, 75, 3)).astype("uint8")
    a, b = b"a" * 32, b"b" * 32
    third = parameters(75, [a, b], 3, kind)
    one, other = (features.augment(picture, row) for row in third)
    assert one.shape == (75, 75, 3) and one.dtype == np.uint8
    assert np.array_equal(third[1:], parameters(75, [b], 3, kind))
    for options in ([3, kind, "--seed", "6"], [4, kind]):
        assert not np.isclose(third, parameters(75, [a, b], *options)).all(1).any()
    assert not np.array_equal(one, other)
    for view, expected in ((features.UNAUGMENTED, picture), (features.MIRRORED, picture[:, ::-1])):
        change = parameters(75, [a], view, kind)[0]
        assert np.array_equal(features.augment(picture, change), expected)


def test_light_views_are_not_turned_and_heavy_ones_are():
    stripes = np.zeros((80, 80, 3), "uint8")
    stripes[np.arange(80) % 8 < 4] = 200
    rows_vary = []
    for kind in ("--no-heavy-augmentation", "--heavy-augmentation"):
        changes = [parameters(80, [b"a" * 32], view, kind)[0] for view in range(2, 22)]
        views = [features.augment(stripes, change) for change in changes]
        rows_vary.append(np.mean([view.std(1).mean() for view in views]))
    assert rows_vary[0] < 1 < 20 < rows_vary[1]


@pytest.mark.slow
def test_a_device_changes_pictures_as_the_cores_do():
    y, x = np.mgrid[:96, :96]
    wave = 128 + 100 * np.sin(x / 9) * np.cos(y / 7)
    picture = np.stack([x * 2, y * 2, wave], axis=2).astype("uint8")
    changes = np.concatenate([parameters(96, [b"a" * 32], view) for view in range(12)])
    cores = np.stack([features.augment(picture, row) for row in changes])
    network = features.build_augmentation(96)
    device = np.asarray(model.predict_batch(network, [np.stack([picture] * 12), changes]))
    assert device.dtype == np.uint8 and np.array_equal(device[0], picture)
    assert np.abs(cores.astype(int) - device).mean() < 1
    assert np.abs(cores[1:].astype(int) - picture).mean() > 20


def test_pictures_that_show_nothing_or_little_are_counted(make_classes, capsys):
    data = make_classes(a=5, b=5)
    Image.new("RGB", (90, 90), "navy").save(data / "a" / "flat.png")
    for n in range(3):
        Image.radial_gradient("L").crop((n, 0, n + 33, 33)).save(data / "b" / f"small{n}.png")
    read(data)
    told = capsys.readouterr().err
    assert f"{data}/a/flat.png…: 1 picture is of one colour, but used" in told
    assert f"{data}/b/small0.png…: 3 pictures are less than half as large as the 75 pix" in told


def test_a_prefix_is_the_same_from_wherever_it_is_written(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    note = PngInfo()
    note.add_text("Software", f"{report.KIT}: {Path('m')}")
    Image.new("RGB", (9, 9)).save("000.png", pnginfo=note)
    for prefix in ("m", "./m", tmp_path / "m"):
        train.check_outputs(train.parse_arguments([".", str(prefix)]))
    with pytest.raises(utils.UserError, match="not a picture of this model but of m: move"):
        train.check_outputs(train.parse_arguments([".", "n"]))


def test_a_picture_that_cannot_be_drawn_is_a_warning(capsys):
    """Pillow raises OSError over fonts, as it does over disks; those have a number."""
    with train.drawing("000.png"):
        raise OSError("invalid pixel size")
    assert capsys.readouterr().err == "warning: 000.png: could not be drawn (invalid pixel size)\n"
    with pytest.raises(OSError), train.drawing("000.png"):
        open("/nowhere/at/all")
