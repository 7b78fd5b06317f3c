"""train.py before any network: what it reads, what it skips, how it divides, what it refuses."""

import hashlib
import os
import re
import stat
import sys
import unicodedata
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

import model
import train
import utils


def dry_run(run_script, data, *options):
    return run_script("train.py", data, "model", "--dry-run", *options)


def test_help_shows_every_option_with_its_default_and_an_example(run_script):
    done = run_script("train.py", "--help")
    assert done.returncode == 0
    assert "example: python train.py" in done.stdout
    text = " ".join(done.stdout.split())
    for option in re.findall(r"--[a-z0-9-]+", done.stdout.partition("options:")[2]):
        assert option in text
    for shown in (
        "default: 0.2",
        "default: 1337",
        "default: auto",
        "default: 20.0",
        "default: 224; 96 from scratch",
    ):
        assert shown in text


@pytest.mark.parametrize(
    "options",
    [["--image-size", "74"], ["--validation-split", "0"], ["--validation-split", "1"], ["--seed", "-1"],
     ["--unfreeze", "11"], ["--batch-size", "0"], ["--cache-gb", "0"], ["--cache-gb", "nan"], ["--views", "0"],
     ["--min-accuracy", "2"], ["--rounds", "x"], ["--no-such-option"], ["--patience", "-1"]],
)  # fmt: skip
def test_values_out_of_range_are_wrong_usage(run_script, options, tmp_path):
    done = run_script("train.py", tmp_path, "model", *options)
    assert done.returncode == 2 and "usage:" in done.stderr
    assert "Traceback" not in done.stderr
    if options == ["--rounds", "x"]:
        assert "invalid int value: 'x'" in done.stderr


def test_dry_run_summarises_and_writes_nothing(run_script, make_classes, tmp_path):
    data = make_classes(cats=12, dogs=8)
    (data / "stray.png").write_bytes(b"")
    (data / "empty").mkdir()
    (data / "cats" / "notes.txt").write_text("no picture")
    Image.new("RGB", (201, 100)).save(data / "dogs" / "wide.png")
    Image.new("RGB", (200, 100)).save(data / "dogs" / "just.png")
    before = sorted(tmp_path.rglob("*"))
    done = dry_run(run_script, data)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "images: 17 train, 4 validation, 2 classes, 2 skipped\n"
    for part in ("data: 1 files lie beside", "empty: an empty class", "notes.txt: skipped: not a picture",
                 "wide.png: skipped: the longer side"):  # fmt: skip
        assert part in done.stderr
    assert all(line.startswith("warning: ") for line in done.stderr.splitlines())
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        ({}, "fewer than two classes"),
        ({"a": 5}, "fewer than two classes"),
        ({"a": 1, "b": 1}, "no class can be divided"),
    ],
)
def test_data_that_cannot_be_trained_on_is_one_line(
    run_script, make_classes, tmp_path, classes, message
):
    (tmp_path / "data").mkdir(exist_ok=True)
    done = dry_run(run_script, make_classes(**classes))
    assert done.returncode == 1
    assert re.search(rf"^error: .*{message}", done.stderr, re.M) and "Traceback" not in done.stderr


def test_a_missing_folder_and_an_unwritable_one_are_one_line(run_script, make_classes, tmp_path):
    for done in (
        dry_run(run_script, tmp_path / "nowhere"),
        run_script("train.py", tmp_path / "nowhere", "model"),
    ):
        assert done.returncode == 1 and re.fullmatch(
            "error: .*nowhere: no such folder.*\n", done.stderr
        )
    data = make_classes(a=4, b=4)
    done = run_script("train.py", data, tmp_path / "missing" / "model")
    assert done.returncode == 1 and "missing: no such folder" in done.stderr


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may read and write everything")
def test_permissions_are_one_line(run_script, make_classes, tmp_path):
    data = make_classes(a=6, b=6)
    (data / "a" / "000.png").chmod(0)
    done = dry_run(run_script, data)
    assert "a/000.png: skipped: Permission denied" in done.stderr
    (tmp_path / "locked").mkdir(mode=stat.S_IRUSR | stat.S_IXUSR)
    done = run_script("train.py", data, tmp_path / "locked" / "model")
    assert done.returncode == 1 and re.search(r"^error: .*ermission", done.stderr, re.M)


def test_control_characters_in_class_names_never_reach_the_terminal(run_script, make_classes):
    data = make_classes(**{"a\x1b[31m": 5, "b\nc": 5, "=d": 5})
    (data / "a\x1b[31m" / "bad\x1b.png").write_bytes(b"x")
    done = dry_run(run_script, data)
    assert done.returncode == 0, done.stderr
    assert "\x1b" not in done.stdout + done.stderr
    assert "a\\x1b[31m" in done.stderr


def pictures_of(spec):
    """Make a list of Pictures from [(class, folder, content)]."""
    return [
        train.Picture(
            Path("data", label, folder, f"{n}.png"),
            label,
            hashlib.sha256(content.encode()).digest(),
            b"",
            n,
        )
        for n, (label, folder, content) in enumerate(spec)
    ]


def divide(pictures, by_folder=False, fraction=0.2, seed=1):
    groups = train.group_pictures(pictures, Path("data"), by_folder)
    return train.split(pictures, groups, fraction, seed)


@pytest.mark.parametrize(
    ("n", "fraction", "expected"),
    [(10, 0.2, 2), (40, 0.25, 10), (3, 0.1, 1), (2, 0.9, 1), (5, 0.5, 2)],
)
def test_each_class_gives_its_share(n, fraction, expected):
    pictures = pictures_of([(label, "", f"{label}{i}") for label in "ab" for i in range(n)])
    fit, validation = divide(pictures, fraction=fraction)
    assert Counter(pictures[i].label for i in validation) == {"a": expected, "b": expected}
    assert sorted([*fit, *validation]) == list(range(2 * n))


def test_added_pictures_move_only_those_at_the_boundary():
    spec = [(label, "", f"{label}{i}") for label in "ab" for i in range(100)]
    before = {spec[i] for i in divide(pictures_of(spec))[1]}
    longer = spec + [("a", "", f"new{i}") for i in range(10)]
    after = {longer[i] for i in divide(pictures_of(longer))[1]}
    assert len(before - after) <= 2


def test_another_seed_is_another_split():
    pictures = pictures_of([(label, "", f"{label}{i}") for label in "ab" for i in range(50)])
    assert set(divide(pictures, seed=1)[1]) != set(divide(pictures, seed=2)[1])


def test_equal_bytes_stay_together_across_classes_and_are_warned_about(capsys):
    spec = [(label, "", f"{label}{i}") for label in "ab" for i in range(10)]
    spec += [("a", "", "twin"), ("b", "", "twin"), ("a", "", "twin")]
    for seed in range(20):
        _, validation = divide(pictures_of(spec), seed=seed)
        assert len({20, 21, 22} & set(validation)) in (0, 3)
    message = capsys.readouterr().err
    assert (
        os.path.join("data", "b", "21.png") in message
        and os.path.join("data", "a", "20.png") in message
    )


def test_folders_stay_together_and_loose_files_are_groups_of_one():
    spec = [("a", f"clip{i % 4}", f"a{i}") for i in range(40)] + [
        ("b", "", f"b{i}") for i in range(40)
    ]
    pictures = pictures_of(spec)
    _, validation = divide(pictures, by_folder=True)
    by_clip = Counter(spec[i][1] for i in validation if spec[i][0] == "a")
    assert list(by_clip.values()) == [10]
    assert sum(spec[i][0] == "b" for i in validation) == 8


def test_a_class_of_one_group_only_trains(capsys):
    spec = [("a", "clip", f"a{i}") for i in range(10)] + [("b", "", f"b{i}") for i in range(10)]
    pictures = pictures_of(spec)
    fit, validation = divide(pictures, by_folder=True)
    assert all(pictures[i].label == "b" for i in validation) and len(fit) == 18
    assert "a: its pictures all belong together" in capsys.readouterr().err


def test_no_class_ever_loses_its_last_group_to_twins_in_another():
    for seed in range(30):
        spec = [("a", "", "x"), ("b", "", "x"), ("a", "", "y"), ("b", "", "y"), ("a", "", "z")]
        pictures = pictures_of(spec)
        fit, _ = divide(pictures, seed=seed, fraction=0.9)
        assert {pictures[i].label for i in fit} == {"a", "b"}


def test_the_warnings_of_a_careful_colleague(run_script, make_classes, tmp_path):
    data = make_classes(few=5, many=120, twins=25)
    picture = np.kron(
        np.random.default_rng(0).integers(0, 255, (10, 10, 3)), np.ones((16, 16, 1))
    ).astype("uint8")
    for n in range(30):  # the same scene again and again, other bytes
        Image.fromarray(picture).save(data / "twins" / f"copy{n}.jpg", quality=50 + n)
    (data / "many" / "stolen.png").write_bytes((data / "few" / "000.png").read_bytes())
    done = dry_run(run_script, data)
    assert "few: only 5 pictures" in done.stderr
    assert "many: 24 times as many pictures as few" in done.stderr
    assert "such a near copy in training" in done.stderr and "--group-by-folder" in done.stderr
    assert "the same bytes as" in done.stderr
    assert "validation pictures: the accuracy is a rough figure" not in done.stderr
    few = dry_run(run_script, make_classes("small", a=6, b=6))
    assert "only 2 validation pictures" in few.stderr


class Heavy:
    seed, heavy_augmentation = 5, True


class Light:
    seed, heavy_augmentation = 5, False


@pytest.mark.parametrize("args", [Heavy, Light])
def test_views_depend_on_seed_picture_and_view_alone(args):
    picture = np.random.default_rng(0).integers(0, 255, (75, 75, 3)).astype("uint8")
    keys = [(b"a" * 32, 3), (b"b" * 32, 3), (b"a" * 32, 4), (b"a" * 32, train.PLAIN)]
    changes = train.draw_changes(args, 75, keys)
    one, other, third, plain = (train.augment(picture, row) for row in changes)
    assert one.shape == (75, 75, 3) and one.dtype == np.uint8
    assert np.array_equal(changes[:1], train.draw_changes(args, 75, keys[:1]))
    assert not np.array_equal(
        changes[:3], train.draw_changes(type("", (args,), {"seed": 6}), 75, keys[:3])
    )
    assert not np.array_equal(one, other) and not np.array_equal(one, third)
    assert np.array_equal(plain, picture)


def test_light_views_are_not_turned_and_heavy_ones_are():
    stripes = np.zeros((80, 80, 3), "uint8")
    stripes[::8] = stripes[1::8] = stripes[2::8] = stripes[3::8] = 200
    rows_vary = []
    for args in (Light, Heavy):
        changes = train.draw_changes(args, 80, [(b"a" * 32, view) for view in range(20)])
        rows_vary.append(np.mean([train.augment(stripes, row).std(1).mean() for row in changes]))
    assert rows_vary[0] < 1 < 20 < rows_vary[1]


def test_a_device_changes_pictures_as_the_cores_do():
    y, x = np.mgrid[:96, :96]
    picture = np.stack([x * 2, y * 2, 128 + 100 * np.sin(x / 9) * np.cos(y / 7)], axis=2).astype(
        "uint8"
    )
    changes = train.draw_changes(
        Heavy, 96, [(b"a" * 32, view) for view in (*range(11), train.PLAIN)]
    )
    cores = np.stack([train.augment(picture, row) for row in changes])
    network = train.build_augmentation(96)
    device = np.asarray(model.predict_batch(network, [np.stack([picture] * 12), changes]))
    assert device.dtype == np.uint8 and np.array_equal(device[-1], picture)
    assert np.abs(cores.astype(int) - device).mean() < 1
    assert np.abs(cores[:-1].astype(int) - picture).mean() > 20


def test_the_ring_overwrites_the_oldest_and_knows_what_it_holds(tmp_path):
    class Args:
        model, cache_dir = str(tmp_path / "m"), None

    ring = train.open_ring(Args, "x", 3, (2,), "float16")
    keys = [bytes([n]) * 36 for n in range(5)]
    assert train.claim_slots(ring, keys[:3]) == [0, 1, 2]
    assert train.claim_slots(ring, [keys[0], keys[3]]) == [1]  # 0 is used again, so 1 is the oldest
    assert set(ring.slots) == {keys[0], keys[2], keys[3]}
    assert sorted(ring.slots.values()) == [0, 1, 2]
    # of three that are wanted two are held, the oldest and the youngest: one more, wanted first, takes the third's slot
    assert train.claim_slots(ring, [keys[4], keys[2], keys[3]]) == [0]
    assert sorted(ring.slots.values()) == [0, 1, 2]


def test_a_kept_ring_is_found_again_and_a_damaged_slot_is_not(tmp_path):
    class Args:
        model, cache_dir, cache_gb = str(tmp_path / "m"), tmp_path, 1

    ring = train.open_ring(Args, "x", 4, (2,), "float32")
    keys = [bytes([n + 1]) * 36 for n in range(2)]
    rows = np.array([[1, 2], [3, 4]], "float32")
    slots = [ring.slots[key] for key in keys if train.claim_slots(ring, [key]) == [0]]
    train.write_rows(ring.features, slots, rows)
    train.write_rows(
        ring.keys,
        slots,
        [np.frombuffer(k + train.checksum(r), "uint8") for k, r in zip(keys, rows)],
    )
    again = train.open_ring(Args, "x", 4, (2,), "float32")
    assert {key: again.features.rows[slot].tolist() for key, slot in again.slots.items()} == {
        keys[0]: [1, 2], keys[1]: [3, 4]}  # fmt: skip
    train.write_rows(ring.features, slots[:1], rows[1:] + 1)
    assert list(train.open_ring(Args, "x", 4, (2,), "float32").slots) == keys[1:]
    assert not train.open_ring(
        Args, "x", 1, (2,), "float32"
    ).slots  # a shorter run leaves the rest as it is,
    assert list(train.open_ring(Args, "x", 4, (2,), "float32").slots) == keys[1:]
    Args.cache_gb = 1e-8  # unless there is no room for it
    train.open_ring(Args, "x", 1, (2,), "float32")
    assert not train.open_ring(Args, "x", 4, (2,), "float32").slots


def test_every_epoch_takes_every_picture_once_with_a_random_view():
    window = [(i, v) for v in range(4) for i in range(50)]
    orders = [
        train.epoch_order(1, window, [100 * v + i for i, v in window], 1, epoch) for epoch in (1, 2)
    ]
    for order in orders:
        assert sorted(order[:, 1]) == list(range(50))
        assert len(set(order[:, 0] // 100)) == 4
    assert not np.array_equal(*orders)


@pytest.mark.parametrize(("slots", "first", "at_first", "later"), [
    (1000, 0, 50 + 50, 50 + 50 + 3 * 50), (60, 0, 30 + 30, 30 + 30),
    (1000, 1, 50, 50 + 50 + 2 * 50), (60, 1, 30, 30 + 30),
])  # fmt: skip
def test_the_ring_holds_pictures_as_they_are_beside_the_latest_views(slots, first, at_first, later):
    ring = SimpleNamespace(keys=SimpleNamespace(rows=range(slots)))
    run = SimpleNamespace(
        rings=SimpleNamespace(views=ring), data=SimpleNamespace(mine=np.arange(50)),
        args=SimpleNamespace(seed=1), recipe={"views": 1, "fresh": 1, "first": first},
    )  # fmt: skip
    windows = [train.ring_window(run, number) for number in (0, 3)]
    for window, size in zip(windows, (at_first, later)):
        assert len(window) == len(set(window)) == size <= slots
        assert [view for _, view in window].count(train.PLAIN) == min(50, slots // 2)
    assert max(view for _, view in windows[1] if view != train.PLAIN) >= 2 - first
    assert {pair for pair in windows[0] if pair[1] == train.PLAIN} <= set(windows[1])


def test_the_last_layer_is_a_ridge_regression_of_the_classes():
    """The sums give what least squares gives on the samples themselves, with their weights."""
    rng = np.random.default_rng(0)
    x, y, w = rng.normal(3, 1, (90, 5)), np.eye(3)[np.arange(90) % 7 // 3], rng.uniform(0.5, 2, 90)
    x[:, :3] += y
    both = np.column_stack([x, np.ones(90), y])
    kernel, bias = train.ridge_regression((both[:, :6] * w[:, None]).T @ both, 0.3)
    centred = [
        np.sqrt(w / w.sum())[:, None] * (a - np.average(a, axis=0, weights=w)) for a in (x, y)
    ]
    ridge = np.sqrt(0.3 * (centred[0] ** 2).sum() / 5)
    stacked = [np.concatenate(pair) for pair in zip(centred, (ridge * np.eye(5), np.zeros((5, 3))))]
    assert np.allclose(kernel, train.LOGITS * np.linalg.lstsq(*stacked)[0])
    shares = np.average(y, axis=0, weights=w)  # 43 %, 43 %, 14 %: a rare class needs the intercept
    assert np.allclose(np.average(x @ kernel + bias, axis=0, weights=w), train.LOGITS * shares)


def test_a_part_of_the_last_layer_is_left_out_where_it_hurts(monkeypatch):
    targets = np.array([0, 1, 0, 1])
    data = SimpleNamespace(validation=np.arange(4), targets=targets)
    nets = SimpleNamespace(full=SimpleNamespace(trunk="frozen"))
    run = SimpleNamespace(data=data, nets=nets, rings=SimpleNamespace(plain=None, shaken=None))
    good, fits = np.eye(2)[targets], [(10 * np.eye(2), np.zeros(2))] * 3
    bad = 10 * (1 - good)
    for middle, layout, shares in zip(
        (good, good, bad), (good, bad, bad), train.BLENDS, strict=True
    ):
        monkeypatch.setattr(train, "last_units", lambda *_, parts=(good, middle, layout): parts)
        (kernel, _), plain, _ = train.choose_last_layer(run, fits)
        assert np.allclose(kernel, np.concatenate([share * 10 * np.eye(2) for share in shares]))
        assert (plain.argmax(1) == targets).all()


def test_training_that_ran_away_is_one_line():
    with pytest.raises(utils.UserError, match="use --float32"):
        train.ridge_regression(np.full((6, 9), np.nan), 0.1)


def test_temperature_of_a_perfect_set_stays_bounded():
    perfect = np.eye(4)[np.arange(40) % 4] * (1 - 4e-6) + 1e-6
    temperature = train.fit_temperature(perfect, np.arange(40) % 4)
    assert 1 / 8 <= temperature <= 8
    assert train.soften(perfect, temperature).max() < 1


def test_temperature_mends_what_is_too_sure():
    rng = np.random.default_rng(0)
    actual = rng.integers(0, 5, 400)
    guess = np.where(rng.random(400) < 0.7, actual, rng.integers(0, 5, 400))
    sure = np.eye(5)[guess] * (1 - 5e-4) + 1e-4
    temperature = train.fit_temperature(sure, actual)
    before, after = (train.log_loss(p, actual) for p in (sure, train.soften(sure, temperature)))
    assert temperature > 2 and after < before / 2


def test_few_pictures_leave_the_temperature_near_one():
    for right, temperature in (
        ([1] * 9 + [0] * 3, 1.9),
        ([1] * 9000 + [0] * 3000, 6.2),
    ):  # 0.999 sure, 3 of 4 right
        sure = np.tile([[0.999, 0.001]], (len(right), 1))
        assert train.fit_temperature(sure, 1 - np.array(right)) == pytest.approx(
            temperature, abs=0.1
        )


def test_the_threshold_is_reached_by_92_of_100_new_pictures():
    """Whatever few validation pictures there are: on average over many draws, as exchangeable pictures go."""
    rng, reached = np.random.default_rng(0), []
    for _ in range(500):
        sure = rng.uniform(0.5, 0.9, 31)
        both = np.column_stack([sure, 1 - sure])
        reached.append(sure[-1] >= train.choose_threshold(both[:-1], np.zeros(30, int)))
    assert np.mean(reached) == pytest.approx(0.92, abs=0.03)
    for alike, limit in ((0.995, 0.94), (0.93, 0.90)):
        assert train.choose_threshold(
            np.tile([[alike, 1 - alike]], (50, 1)), np.zeros(50, int)
        ) == pytest.approx(limit)
    assert train.choose_threshold(both, np.ones(31, int)) == 0.5


@pytest.mark.parametrize(
    ("right", "total", "low", "high"),
    [(88, 89, 0.9390, 0.9997), (0, 10, 0, 0.3085), (10, 10, 0.6915, 1)],
)
def test_the_interval_is_exact(right, total, low, high):
    assert train.interval(right, total) == pytest.approx([low, high], abs=1e-4)


def test_a_link_that_sorts_first_does_not_take_the_pictures_of_a_class(
    run_script, make_classes, tmp_path
):
    data = make_classes(red=3, green=3)
    (data / "aaa").symlink_to(data / "red", target_is_directory=True)
    done = dry_run(run_script, data)
    assert "images: 4 train, 2 validation, 2 classes, 0 skipped" in done.stdout, done.stderr
    assert utils.list_files(data)[0].parent.name == "green"


def test_a_class_of_which_no_file_can_be_used_is_named(run_script, make_classes):
    data = make_classes(red=3, green=3)
    (data / "blue").mkdir()
    (data / "blue" / "notes.txt").write_text("no picture")
    done = dry_run(run_script, data, "--evaluate")  # of the two, the one that writes nothing
    assert done.returncode == 0 and "2 classes, 1 skipped" in done.stdout
    assert "warning: blue: none of its files is a picture" in done.stderr
    assert [path.name for path in data.parent.iterdir()] == ["data"]


@pytest.mark.skipif(sys.platform != "linux", reason="names are text here")
def test_a_class_name_that_no_model_can_have_is_told_before_the_training(run_script, make_classes):
    data = make_classes(red=3, green=3)
    (data / "red").rename(data / os.fsdecode(b"\xc4" * 60))  # six characters each, when shown
    done = dry_run(run_script, data)
    assert (
        done.returncode == 1 and "too long for a class name: rename" in done.stderr.splitlines()[-1]
    )


def test_a_model_from_elsewhere_is_not_replaced(run_script, make_classes, tmp_path):
    data = make_classes(red=3, green=3)
    (tmp_path / "model.h5").write_bytes(b"somebody's")
    for more in ([], ["--resume"]):
        done = run_script("train.py", data, "model", "--weights", "none", *more)
        assert done.returncode == 1 and "error: model.h5: a model from elsewhere" in done.stderr
    assert (tmp_path / "model.h5").read_bytes() == b"somebody's"


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_a_named_pipe_is_listed_and_nothing_waits_for_it(run_script, make_classes):
    data = make_classes(red=3, green=3)
    os.mkfifo(data / "red" / "pipe.png")
    done = dry_run(run_script, data)
    assert done.returncode == 0 and "pipe.png: skipped: not a file" in done.stderr


def test_one_name_in_two_spellings_is_one_class(run_script, make_classes):
    names = [unicodedata.normalize(form, "Köln") for form in ("NFC", "NFD")]
    assert len(set(names)) == 2
    data = make_classes(**dict.fromkeys([*names, "red"], 3))
    assert "2 classes" in dry_run(run_script, data).stdout
