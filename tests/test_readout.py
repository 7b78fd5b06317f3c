"""The closed-form readout, its leave-one-out answers, the temperature and the threshold, on numbers."""

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
    for target in range(4):  # a whole class, as the strangers are measured
        some = np.flatnonzero(run.data.targets[fit.rows] == target)
        answers = train.leave_out(fit.block, fit.residuals, fit.roots, y, [some])
        expected = refit_without(fit, x, y, some)
        assert answers[some] == pytest.approx(expected, abs=1e-4)


def test_classes_count_alike():
    run = make_run()
    roots = train.class_roots(run.data.targets, 4)
    sums = np.bincount(run.data.targets, np.square(roots).ravel())
    assert sums == pytest.approx([0.25] * 4)


def test_a_class_of_one_group_is_judged_picture_by_picture():
    run = make_run()
    run.data.groups[run.data.targets == 1] = 7
    groups = train.loo_groups(run.data, np.arange(40))
    sizes = [len(group) for group in groups if run.data.targets[group[0]] == 1]
    assert sizes == [1] * SIZES[1]


def test_strength_and_grids_have_the_least_error():
    run = make_run()
    best = train.fit_readout(run, run.data.train, [0], LEVELS)
    place = int(np.argmin(np.abs(train.STRENGTHS - best.strength)))
    for share in train.GRID_SHARES:
        for strength in train.STRENGTHS[max(0, place - 1) : place + 2]:
            like = SimpleNamespace(grid_share=share, strength=strength)
            other = train.fit_readout(run, run.data.train, [0], LEVELS, like)
            assert best.error <= other.error + 1e-12 or share != best.grid_share


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


@pytest.mark.parametrize("seed", range(20))
def test_the_threshold_refuses_a_fifth_of_the_friends_at_most(seed):
    """Even where strangers look like friends, and some answers about friends are wrong."""
    rng = np.random.default_rng(seed)
    friends, strangers = rng.uniform(0.2, 1, 57), rng.uniform(0.2, 1, rng.integers(1, 90))
    right = rng.random(57) < 0.7
    (correct, _), chosen = shares(friends, right, strangers)
    assert (friends[right] >= chosen).mean() >= 0.8
    assert correct == pytest.approx((right & (friends >= chosen)).mean())


def test_most_strangers_are_unknown_where_friends_allow_it():
    rng = np.random.default_rng(3)
    (_, unknown), _ = shares(rng.uniform(0.85, 1, 100), rng.random(100) < 0.9, rng.random(300))
    assert unknown >= 0.8


def measured(run):
    fit = train.fit_readout(run, run.data.train, [0], LEVELS)
    return fit, train.simulate_strangers(run, fit, 0.1)


def test_each_class_plays_the_stranger():
    run = make_run()
    fit, found = measured(run)
    friends = (fit.answers.argmax(1) == run.data.targets).mean()
    assert found.friends[0] == pytest.approx(friends) and found.friends[-1] < friends
    assert found.taken_for.total() == 40 and set(found.taken_for) <= set("abcd")
    assert len(found.thresholds) <= 81 and (np.diff(found.unknown) >= 0).all()


def test_the_class_unknown_is_a_stranger():
    run = make_run(("a", "b", "c", "unknown"), noise=[3])
    fit, found = measured(run)
    friend = run.data.targets < 3
    right = fit.answers.argmax(1) == run.data.targets
    assert found.friends[0] == pytest.approx(right[friend].mean()) != right.mean()
    assert "unknown" not in found.taken_for


def test_two_classes_cannot_tell_about_strangers():
    run = make_run(("a", "b"))
    assert train.simulate_strangers(run, None, 1.0) is None


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
