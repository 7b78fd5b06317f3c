"""The closed-form readout, its leave-one-out answers, the temperature and the threshold, on numbers."""

from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest

import model
import train
import utils

LEVELS = [
    model.Level("low", False, 0, 12),
    model.Level("top", False, 12, 32),
    model.Level("low", True, 32, 60),
]
SIZES = (14, 11, 9, 6)  # pictures a class


def make_run(labels=("a", "b", "c", "d"), spread=1.5, noise=()):
    """Return what the readout needs of a run: levels of two views of pictures, in groups of 1 to 3.

    noise: classes whose pictures look like any other.
    """
    rng = np.random.default_rng(0)
    targets = np.repeat(np.arange(len(SIZES)), SIZES)
    count, width = len(targets), LEVELS[-1].stop
    centers = rng.normal(0, 1, (len(SIZES), width))
    centers[list(noise)] = 0
    views = {}
    for view in (train.UNAUGMENTED, train.MIRRORED):
        rows = np.zeros(count, [("levels", "float32", (width,))])
        rows["levels"] = centers[targets] + rng.normal(3, spread, (count, width))
        views[view] = train.View(rows, np.arange(count))
    data = SimpleNamespace(
        labels=list(labels), targets=targets, pictures=range(count), train=np.arange(count),
        groups=np.array([50 * t + n // 3 if t < 3 else 900 + n for n, t in enumerate(targets)]),
    )  # fmt: skip
    args = SimpleNamespace(processes=1, process=0, seed=1)
    return SimpleNamespace(args=args, data=data, views=views)


def features(run, views, grid_share):
    """Return the rows that the kernel is the product of: standardised levels and 1 for the bias."""
    parts = []
    rows = np.concatenate([run.views[view].rows["levels"] for view in views]).astype("float64")
    for level in LEVELS:
        x = rows[:, level.start : level.stop]
        x = x - x.mean(0)
        share = grid_share if level.is_grid else (1 - grid_share) / 2
        parts.append(x * np.sqrt(share / np.square(x).sum(1).mean()))
    return np.column_stack([*parts, np.ones(len(rows))])


def refit_without(fit, x, y, left_out):
    """Return what a fit to all other rows answers for some rows: plain weighted ridge regression."""
    kept = np.setdiff1d(np.arange(len(x)), left_out)
    weighted, wanted = fit.roots[kept] * x[kept], fit.roots[kept] * y[kept]
    ridge = fit.strength * np.eye(x.shape[1])
    return x[left_out] @ np.linalg.solve(weighted.T @ weighted + ridge, weighted.T @ wanted)


@pytest.mark.parametrize("views", [[0], [0, 1]])
@pytest.mark.parametrize("grid_share", train.GRID_SHARES)
def test_leave_one_out_is_fitting_again_without_each_group(views, grid_share):
    run = make_run()
    like = SimpleNamespace(grid_share=grid_share, strength=0.01)
    fit = train.fit_readout(run, run.data.train, views, LEVELS, like)
    x, y = features(run, views, grid_share), train.centred(run.data.targets[fit.rows], 4)
    groups = run.data.groups[fit.rows]
    for n in range(len(fit.answers)):
        together = np.flatnonzero(groups == groups[n])
        expected = refit_without(fit, x, y, together)[list(together).index(n)]
        assert fit.answers[n] == pytest.approx(expected, abs=1e-4)


def test_a_class_of_one_group_is_judged_picture_by_picture():
    """Without it, nothing of the class would be left to learn from."""
    run = make_run()
    run.data.groups[run.data.targets == 1] = 7
    fit = train.fit_readout(run, run.data.train, [0], LEVELS)
    of_class = run.data.targets == 1
    assert (fit.answers[of_class].argmax(1) == 1).mean() > 0.8


def test_classes_count_alike():
    """A stranger is not taken for whoever has most pictures."""
    run = make_run()
    run.views[0].rows["levels"][:] = 1  # all pictures look the same
    fit = train.fit_readout(run, run.data.train, [0], LEVELS)
    answer = run.views[0].rows["levels"][:1] @ fit.kernel + fit.bias
    assert answer == pytest.approx(np.full((1, 4), 0.25), abs=0.01)


@pytest.mark.parametrize("views", [[0], [0, 1]])
def test_kernel_and_bias_give_what_the_fit_says(views):
    run = make_run()
    fit = train.fit_readout(run, run.data.train, views, LEVELS)
    x, y = features(run, views, fit.grid_share), train.centred(run.data.targets[fit.rows], 4)
    fitted = run.views[0].rows["levels"] @ fit.kernel + fit.bias
    everything = refit_without(fit, np.r_[x, x], np.r_[y, y], np.arange(len(x), 2 * len(x)))
    assert fitted == pytest.approx(everything[: len(fitted)] + 0.25, abs=1e-4)


def test_the_sums_over_many_pictures_give_the_same_as_the_kernel(monkeypatch):
    run, means = make_run(), LEVELS[:2]
    dual = train.fit_readout(run, run.data.train, [0], means)
    monkeypatch.setattr(train, "MAX_DUAL", 30)
    primal = train.fit_readout(run, run.data.train, [0], LEVELS, like=dual)
    assert primal.kernel[:32] == pytest.approx(dual.kernel, abs=1e-4)
    assert primal.bias == pytest.approx(dual.bias, abs=1e-4)
    assert primal.kernel.shape == (60, 4) and not primal.kernel[32:].any()
    groups = run.data.groups
    whole = np.bincount(groups) == np.bincount(groups[primal.rows], minlength=groups.max() + 1)
    same = whole[groups[primal.rows]]
    assert len(primal.rows) == 30 and same.sum() >= 28  # groups are drawn whole
    assert primal.answers[same] == pytest.approx(dual.answers[primal.rows[same]], abs=1e-4)
    assert primal.strength == train.fit_readout(run, run.data.train, [0], means).strength


def test_numbers_that_are_not_finite_are_one_line():
    run = make_run()
    run.views[0].rows["levels"][3] = np.nan
    with pytest.raises(utils.UserError, match="features are not finite"):
        train.fit_readout(run, run.data.train, [0], LEVELS)


# ---------------------------------------------------------------- strangers


def shares(friends, right, strangers):
    found = train.weigh_thresholds(*map(np.array, (friends, right, strangers)), {})
    return train.shares_at(found, found.chosen), found.chosen


def test_the_threshold_lies_between_friends_and_strangers():
    both, chosen = shares([0.9, 0.95, 0.99, 0.8], [True] * 4, [0.3, 0.4, 0.5, 0.0])
    assert both == (1, 1) and 0.5 < chosen <= 0.8


@pytest.mark.parametrize("seed", range(6))
def test_the_threshold_refuses_a_fifth_of_the_friends_at_most(seed):
    """Even where strangers look like friends, and some answers about friends are wrong."""
    rng = np.random.default_rng(seed)
    friends, strangers = rng.uniform(0.2, 1, 57), rng.uniform(0.2, 1, rng.integers(1, 90))
    right = rng.random(57) < 0.7
    (correct, _), chosen = shares(friends, right, strangers)
    assert (friends[right] >= chosen).mean() >= 0.8
    assert correct == pytest.approx((right & (friends >= chosen)).mean())


def test_each_class_plays_the_stranger():
    """The readout is fitted again without it, and its pictures are shown to that one."""
    run = make_run()
    fit = train.fit_readout(run, run.data.train, [0], LEVELS)
    found = train.simulate_strangers(run, fit, 0.1)
    x, y = features(run, [0], fit.grid_share), train.centred(run.data.targets, 4)
    reached, taken_for = [], Counter()
    for left in range(4):
        without = refit_without(fit, x, y, np.flatnonzero(run.data.targets == left))
        without[:, left] = -np.inf
        reached += train.softmax(without / 0.1).max(1).tolist()
        taken_for.update("abcd"[c] for c in without.argmax(1))
    friends = train.softmax(fit.answers / 0.1)
    expected = np.unique([0, *reached, *friends.max(1)])
    assert found.thresholds == pytest.approx(expected, abs=1e-3)
    assert found.taken_for == taken_for and found.taken_for.total() == 40
    right = fit.answers.argmax(1) == run.data.targets
    assert found.friends[0] == pytest.approx(right.mean()) and found.friends[-1] < right.mean()
    assert found.unknown[0] == 0 and (np.diff(found.unknown) >= 0).all()


def test_the_class_unknown_is_a_stranger():
    run = make_run(("a", "b", "c", "unknown"), noise=[3])
    fit = train.fit_readout(run, run.data.train, [0], LEVELS)
    found = train.simulate_strangers(run, fit, 0.1)
    friend = run.data.targets < 3
    right = fit.answers.argmax(1) == run.data.targets
    assert found.friends[0] == pytest.approx(right[friend].mean()) != right.mean()
    assert "unknown" not in found.taken_for


def test_two_classes_cannot_tell_about_strangers():
    assert train.simulate_strangers(make_run(("a", "b")), None, 1.0) is None


# ---------------------------------------------------------------- calibration


def test_the_temperature_of_a_perfect_set_stays_bounded():
    targets = np.arange(40) % 4
    logits = 10 * np.eye(4)[targets]
    temperature = train.fit_temperature(logits, targets)
    answers = train.softmax(logits / temperature)
    assert 0.9 < answers.max() < 1 - 1e-4


def test_the_temperature_mends_what_is_too_sure():
    rng = np.random.default_rng(0)
    actual = rng.integers(0, 5, 400)
    guess = np.where(rng.random(400) < 0.7, actual, rng.integers(0, 5, 400))
    logits = 9 * np.eye(5)[guess]
    temperature = train.fit_temperature(logits, actual)
    answers = train.softmax(logits / temperature)
    assert temperature > 2 and answers.max() == pytest.approx((guess == actual).mean(), abs=0.01)


@pytest.mark.parametrize(
    ("right", "total", "low", "high"),
    [(88, 89, 0.9390, 0.9997), (0, 10, 0, 0.3085), (10, 10, 0.6915, 1)],
)
def test_the_interval_is_exact(right, total, low, high):
    assert train.interval(right, total) == pytest.approx([low, high], abs=1e-4)


# ---------------------------------------------------------------- labels


def test_labels_worth_a_look_are_wrong_ones_and_copies():
    run = make_run()
    run.data.targets[[0, 20]] = 1, 2  # look like classes a and b
    run.data.groups = np.arange(40)
    run.data.pictures = [SimpleNamespace(label=run.data.labels[t]) for t in run.data.targets]
    run.data.copies = [(2, 30)]
    fit = train.fit_readout(run, run.data.train, [0], LEVELS)
    review = train.review_labels(run.args, run.data, fit, 0.05)
    assert [row[0] for row in review[:2]] == [2, 30]  # the copies, sure to be two classes
    found = {i: (suggested, why) for i, suggested, _, why in review}
    assert found[0] == ("a", "label") and found[20] == ("b", "label")
    assert found[2] == ("c", "copy") and found[30] == ("a", "copy")
    assert {row[0] for row in review[2:4]} == {0, 20}  # the least probable labels
