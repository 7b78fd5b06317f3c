"""The closed-form readout, its leave-one-out answers, the temperature and the threshold."""

from types import SimpleNamespace

import numpy as np
import pytest

import readout
import train
import utils

WIDE = [slice(0, 12), slice(12, 100)]  # more units than rows: the dual
NARROW = [slice(0, 12), slice(12, 32)]  # fewer: sums over rows
FORMS = pytest.mark.parametrize(
    ("views", "levels"), [(1, WIDE), (2, WIDE), (1, NARROW), (2, NARROW)]
)
SIZES = (14, 11, 9, 6)  # pictures a class
NOT_HELD = np.zeros((0, 4)), np.zeros(0, int)  # no validation pictures


def make_rows(views=1, levels=WIDE, noise=()):
    """Return Rows of pictures in groups of 1 to 3, each seen in one or two views.

    noise: classes whose pictures look like any other.
    """
    rng = np.random.default_rng(0)
    targets = np.repeat(np.arange(len(SIZES)), SIZES)
    width = levels[-1].stop
    centers = rng.normal(0, 1, (len(SIZES), width))
    centers[list(noise)] = 0
    x = np.tile(centers[targets], (views, 1)) + rng.normal(3, 1.5, (views * len(targets), width))
    x = x.astype("float32")
    groups = np.array([50 * t + n // 3 if t < 3 else 900 + n for n, t in enumerate(targets)])
    return x, readout.Rows(
        read=lambda level, places: x[places, level],
        levels=levels,
        targets=np.tile(targets, views),
        groups=np.tile(groups, views),
        lone=[],
        plain=len(targets),
        class_count=4,
    )


def features(x, levels):
    """Return the rows that the kernel is the product of: standardised levels and 1 for the bias."""
    parts = []
    for level in levels:
        part = x[:, level].astype("float64")
        part -= part.mean(0)
        parts.append(part / np.sqrt(2 * np.square(part).sum(1).mean()))
    return np.column_stack([*parts, np.ones(len(x))])


def answer(rows, strength, x, asked, left_out=()):
    """Return what plain weighted ridge regression, fitted to the other rows, says of some rows."""
    kept = np.setdiff1d(np.arange(len(x)), left_out)
    roots = np.sqrt(1 / 4 / np.bincount(rows.targets)[rows.targets])[kept, None]  # classes alike
    weighted, wanted = roots * x[kept], roots * (np.eye(4)[rows.targets[kept]] - 0.25)
    ridge = strength * np.eye(x.shape[1])
    return x[asked] @ np.linalg.solve(weighted.T @ weighted + ridge, weighted.T @ wanted)


def variance(rows, x, asked, left_out):
    """Return the predictive variance of some rows by Gaussian process regression to the others."""
    kept = np.setdiff1d(np.arange(len(x)), left_out)
    weights = 1 / 4 / np.bincount(rows.targets)[rows.targets[kept]]  # classes alike
    noise = np.diag(readout.VARIANCE_STRENGTH / weights)
    to_kept = x[asked] @ x[kept].T
    known = np.linalg.solve(x[kept] @ x[kept].T + noise, to_kept.T)
    return np.square(x[asked]).sum(1) - (to_kept * known.T).sum(1)


def assert_left_out(fit, rows, x, places):
    """Assert that answers are those of a fit to all rows but the groups of these places."""
    for place in places:
        asked = fit.judged[place]
        together = np.flatnonzero(rows.groups == rows.groups[asked])
        expected = answer(rows, 0.01, x, [asked], together)[0]
        assert fit.answers[place] == pytest.approx(expected, abs=1e-4)


@FORMS
def test_leave_one_out_is_fitting_again_without_each_group(views, levels, monkeypatch):
    monkeypatch.setattr(readout, "CHUNK", 7)  # as of many rows
    x, rows = make_rows(views, levels)
    fit, x = readout.fit_readout(rows, 0.01), features(x, levels)
    assert_left_out(fit, rows, x, range(rows.plain))
    for target in range(4):  # a whole class, as the strangers are measured
        some = np.flatnonzero(rows.targets == target)
        expected = answer(rows, 0.01, x, some, some)
        (found,) = readout.leave_out(fit.form, 0.01, [some])
        assert found == pytest.approx(expected, abs=1e-4)


@FORMS
def test_the_variance_is_that_of_a_gaussian_process(views, levels):
    """Of the rows as they are, and of those of a group or class left out."""
    x, rows = make_rows(views, levels)
    fit, inputs = readout.fit_readout(rows, 0.1), features(x, levels)
    for group in readout.left_out_together(rows.groups, np.arange(rows.plain)):
        out = np.isin(rows.groups, rows.groups[group])
        expected = variance(rows, inputs, group, np.flatnonzero(out))
        assert fit.variance.left_out[group] == pytest.approx(expected, rel=1e-4)
    some = np.flatnonzero(rows.targets == 1)
    (found,) = readout.left_out_variances(fit.form, [some])
    assert found == pytest.approx(variance(rows, inputs, some, some), rel=1e-4)
    everybody = np.arange(len(x))
    expected = variance(rows, inputs, everybody, [])
    assert readout.predict(fit, [x[:9], x[9:]])[1] == pytest.approx(expected, rel=1e-3)


def test_what_resembles_nothing_learned_from_is_nobody_for_sure():
    x, rows = make_rows()
    fit = readout.fit_readout(rows)
    strange = x + np.random.default_rng(1).normal(0, 6, x.shape).astype("float32")
    answers = []
    for some in (x, strange):
        logits, variances = readout.predict(fit, [some])
        answers.append(readout.temper(fit, logits, variances))
        assert (answers[-1].argmax(1) == logits.argmax(1)).all()
    known, unknown = (probabilities.max(1) for probabilities in answers)
    assert known.min() > 0.7 and unknown.max() < 0.3


def test_of_many_rows_some_are_left_out_in_turn_groups_whole(monkeypatch):
    monkeypatch.setattr(readout, "MAX_JUDGED", 30)
    x, rows = make_rows(1, NARROW)
    fit = readout.fit_readout(rows, 0.01)
    assert 28 <= len(fit.judged) <= 30
    assert_left_out(fit, rows, features(x, NARROW), range(len(fit.judged)))
    rows.groups[:31] = 7  # larger than all that can be judged
    fit = readout.fit_readout(rows, 0.01)
    assert fit.judged.tolist() == list(range(31, 40))
    rows.groups[:] = 7
    assert len(readout.fit_readout(rows, 0.01).judged) == 30


@FORMS
def test_kernel_and_bias_give_what_was_fitted_with_the_strength_of_least_error(views, levels):
    x, rows = make_rows(views, levels)
    fit = readout.fit_readout(rows)
    expected = answer(rows, fit.strength, features(x, levels), np.arange(len(x)))
    assert x @ fit.kernel + fit.bias == pytest.approx(expected + 0.25, abs=1e-4)
    place = int(np.argmin(np.abs(readout.STRENGTHS - fit.strength)))
    for strength in readout.STRENGTHS[max(0, place - 1) : place + 2]:
        assert fit.error <= readout.fit_readout(rows, strength).error


@pytest.mark.parametrize("levels", [WIDE, NARROW])
def test_a_class_of_one_group_is_judged_picture_by_picture(levels):
    """A picture and its mirror image together, of a large set, too."""
    x, rows = make_rows(2, levels)
    rows.groups[rows.targets == 1] = 7
    pictures = np.tile(np.arange(40), 2)
    groups, lone = readout.leave_out_groups(rows.groups, rows.targets, pictures)
    assert lone.tolist() == [1] and (groups[rows.targets != 1] < groups.max()).all()
    fit = readout.fit_readout(rows._replace(groups=groups, lone=lone), 0.01)
    for place in range(SIZES[0], SIZES[0] + SIZES[1]):
        expected = answer(rows, 0.01, features(x, levels), [place], [place, place + 40])[0]
        assert fit.answers[place] == pytest.approx(expected, abs=1e-4)


def test_numbers_that_are_not_finite_are_one_line():
    x, rows = make_rows()
    x[3] = np.nan
    with pytest.raises(utils.UserError, match="features are not finite"):
        readout.fit_readout(rows)


@pytest.mark.parametrize("seed", range(20))
def test_the_threshold_refuses_a_fifth_of_the_friends_at_most(seed):
    """Even where strangers look like friends; where they do not, they are unknown."""
    rng = np.random.default_rng(seed)
    right = rng.random(57) < 0.7
    for least in (0.2, 0.85):
        friends, strangers = rng.uniform(least, 1, 57), rng.uniform(0, 1, rng.integers(9, 90))
        found = readout.weigh_thresholds(friends, right, strangers, {})
        correct, unknown = readout.shares_at(found, found.chosen)
        assert (friends[right] >= found.chosen).mean() >= 0.8
        assert correct == pytest.approx((right & (friends >= found.chosen)).mean())
        assert unknown == pytest.approx((strangers < found.chosen).mean())
    assert unknown >= (strangers < 0.85).mean()


def test_a_trained_model_refuses_as_many_correct_answers():
    rng = np.random.default_rng(0)
    friends, strangers = rng.uniform(0.5, 1, 100), rng.uniform(0, 0.9, 100)
    right = np.arange(100) >= 30
    found = readout.weigh_thresholds(friends, right, strangers, {})
    kept = (friends[right] >= found.chosen).mean()
    assert 0.8 <= kept < 0.99
    surer = friends[right] ** 0.1
    unsure = np.full(50, 0.55)  # the class `unknown`, whose answers have no price
    sure = np.concatenate([surer, unsure])
    probabilities = np.column_stack([sure, 1 - sure, np.zeros(120)])
    probabilities[len(surer) :, 2] = 1
    actual = probabilities.argmax(1)
    threshold = readout.move_threshold(found, probabilities, actual, nobody=2)
    assert (surer >= threshold).mean() == pytest.approx(kept, abs=0.02)
    nobody_right = readout.move_threshold(found, probabilities, 1 - actual.clip(0, 1))
    assert nobody_right == found.chosen


def test_each_class_plays_the_stranger_and_the_class_unknown_is_one():
    _, rows = make_rows(noise=[3])
    fit = readout.fit_readout(rows)
    right = fit.answers.argmax(1) == rows.targets
    found = readout.simulate_strangers(fit, rows, NOT_HELD)
    assert found.friends[0] == pytest.approx(right.mean()) and found.friends[-1] < right.mean()
    assert found.taken_for.total() == 40 and set(found.taken_for) <= {0, 1, 2, 3}
    assert len(found.thresholds) <= 81 and (np.diff(found.unknown) >= 0).all()
    found = readout.simulate_strangers(fit, rows, NOT_HELD, nobody=3)
    assert found.friends[0] == pytest.approx(right[rows.targets < 3].mean()) != right.mean()
    assert 3 not in found.taken_for


def test_a_large_class_unknown_counts_as_one_class():
    _, rows = make_rows(noise=[0])  # the largest
    fit = readout.fit_readout(rows)
    found = readout.simulate_strangers(fit, rows, NOT_HELD, nobody=0)
    counted = found.unknown * (26 + 9)  # of the others, and their mean
    assert counted == pytest.approx(counted.round())
    flattered = readout.simulate_strangers(fit, rows._replace(lone=[0]), NOT_HELD, nobody=0)
    counted = flattered.unknown * 26  # a class of one film knows itself
    assert counted == pytest.approx(counted.round())


def test_strangers_of_a_large_set_are_of_fits_that_do_not_know_their_class(monkeypatch):
    _, rows = make_rows(1, NARROW, noise=[2])
    whole = readout.simulate_strangers(readout.fit_readout(rows, 0.01), rows, NOT_HELD)
    monkeypatch.setattr(readout, "MAX_JUDGED", 20)  # of 40
    mirrored = make_rows(2, NARROW, noise=[2])[1]
    both = readout.simulate_strangers(readout.fit_readout(mirrored, 0.01), mirrored, NOT_HELD)
    assert both.taken_for.total() == 40  # mirror images are no pictures of their own
    some = readout.simulate_strangers(readout.fit_readout(rows, 0.01), rows, NOT_HELD)
    assert whole.taken_for == some.taken_for and whole.taken_for.total() == 40
    monkeypatch.setattr(readout, "MAX_CLASS_ROWS", 3)
    few = readout.simulate_strangers(readout.fit_readout(rows, 0.01), rows, NOT_HELD)
    assert few.taken_for.total() == 12
    monkeypatch.setattr(readout, "MAX_LEFT_OUT", 2)
    few = readout.simulate_strangers(readout.fit_readout(rows, 0.01), rows, NOT_HELD)
    assert few.taken_for.total() == 6


def test_friends_are_pictures_of_validation_too_and_not_those_of_a_class_of_one_film():
    """Its frames know each other: their leave-one-out answers are too sure."""
    _, rows = make_rows()
    fit = readout.fit_readout(rows)
    held = np.eye(4)[[0, 1, 1]] * 0.5 + 0.125, np.array([0, 1, 2])
    found = readout.simulate_strangers(fit, rows._replace(lone=[1, 2]), held)
    right = (fit.answers.argmax(1) == rows.targets)[np.isin(rows.targets, [0, 3])]
    assert found.friends[0] == pytest.approx((right.sum() + 2) / (len(right) + 3))
    alone = readout.simulate_strangers(fit, rows._replace(lone=range(4)), NOT_HELD)
    everybody = readout.simulate_strangers(fit, rows, NOT_HELD)
    assert alone.chosen == everybody.chosen  # where nothing else tells of a class, they count


def test_the_temperature_of_a_perfect_set_stays_bounded():
    targets = np.arange(40) % 4
    logits = 10 * np.eye(4)[targets]
    temperature = readout.fit_temperature(logits, targets)
    answers = readout.softmax(logits / temperature)
    assert answers.max() == pytest.approx(40.5 / 41, abs=1e-3)


def test_the_temperature_mends_what_is_too_sure():
    rng = np.random.default_rng(0)
    actual = rng.integers(0, 5, 400)
    guess = np.where(rng.random(400) < 0.7, actual, rng.integers(0, 5, 400))
    logits = 9 * np.eye(5)[guess]
    temperature = readout.fit_temperature(logits, actual)
    answers = readout.softmax(logits / temperature)
    assert temperature > 2 and answers.max() == pytest.approx((guess == actual).mean(), abs=0.01)


@pytest.mark.parametrize(
    ("right", "total", "low", "high"),
    [(88, 89, 0.9390, 0.9997), (0, 10, 0, 0.3085), (10, 10, 0.6915, 1)],
)
def test_the_interval_is_exact(right, total, low, high):
    assert readout.interval(right, total) == pytest.approx([low, high], abs=1e-4)


def test_labels_worth_a_look_are_wrong_ones_and_copies():
    _, rows = make_rows()
    targets, labels = rows.targets.copy(), list("abcd")
    targets[[0, 20]] = 1, 2  # look like classes a and b
    rows = rows._replace(targets=targets, groups=np.arange(40))
    everything = train.Readout(readout.fit_readout(rows), rows, np.arange(40), [0])
    pictures = [SimpleNamespace(label=labels[target]) for target in targets]
    data = SimpleNamespace(targets=targets, labels=labels, pictures=pictures, copies=[(0, 2)])
    review = train.review_labels(data, everything)
    found = {i: (suggested, why) for i, suggested, _, why in review}
    assert found[20] == ("b", "label")
    assert found[0] == ("a", "copy") and found[2] == ("b", "copy")
    assert {row[0] for row in review[:2]} == {0, 20}  # the least probable labels
    assert review[-1][0] == 2 and review[-1][2] < 0.1  # its label fits, that of its copy does not
