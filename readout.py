"""The readout: ridge regression from several levels of a frozen network to the classes.

Closed form, arrays in and arrays out: no files, no Keras. Classes count alike, or a stranger would
be taken for whoever has most pictures; each level weighs alike. What it answers about pictures that
it has not seen (leave-one-out) gives its strength, its temperature and, with what it answers about
validation pictures, the threshold for strangers.
The same regression, as a Gaussian process, has a predictive variance (Rasmussen and Williams 2006,
chapter 2): it says how little a picture resembles those learned from, and raises the temperature.
"""

import functools
from collections import Counter, defaultdict, namedtuple

import numpy as np

import utils

STRENGTHS = 10.0 ** np.arange(-6, 1.1, 0.5)  # of ridge regression, in mean squares of a picture
FIRST_STRENGTH = 5  # where the search among them begins
CHUNK = 1024  # rows that are summed at once
MAX_JUDGED = 4_000  # rows of a large set that are left out in turn, drawn by lot
VARIANCE_STRENGTH = 0.01  # of the regression whose predictive variance is asked for
COMPONENTS = 128  # principal components that the saved network tells the variance by
STRANGERS_UNKNOWN = 0.8  # least share of strangers that the threshold aims at
FRIENDS_REFUSED = 0.05, 0.2  # least and largest share of correct answers that it costs
MAX_LEFT_OUT = 40  # classes that play the stranger
MAX_CLASS_ROWS = 2_000  # of each of them, since memory grows with the square

# What is read. read: (slice of units, places of rows) → float32 (n, units); levels: such slices;
# targets, groups: class and group of each row, see leave_out_groups; lone: classes of one group;
# plain: so many rows, the first, are unaugmented
Rows = namedtuple("Rows", "read levels targets groups lone plain class_count")
# kernel (units, classes) and bias (classes,) give logits before temperature. answers: of
# leave-one-out, about the places `judged`; error: their mean square, classes alike; accuracy: the
# share of them that is correct; form: a Form. For temperature and variance see `temper`
Fit = namedtuple(
    "Fit",
    "strength judged answers error form accuracy kernel bias variance temperature",
    defaults=[None] * 6,
)
# The predictive variance of x is 1 + |s|^2 - |s @ kernel + bias|^2, where s = (x - mean) * gain.
# left_out: variances of the rows that the answers are about, by leave-one-out, with
# VARIANCE_STRENGTH; typical: the mean of these
Variance = namedtuple("Variance", "mean gain kernel bias left_out typical")
# shares of friends correct and strangers unknown at each threshold, the chosen one, and for whom
# strangers are taken: a Counter of classes
Strangers = namedtuple("Strangers", "thresholds friends unknown chosen taken_for")


# ---------------------------------------------------------------- ridge regression


def fit_readout(rows, strength=None, seed=0):
    """Return the Fit to Rows with the least leave-one-out error, or of a strength that is given.

    In the dual while there are fewer rows than units, else by sums over all rows; then no more than
    MAX_JUDGED pictures, drawn by lot with this seed, are left out in turn.
    """
    scales = scale_units(rows)
    roots = class_roots(rows.targets)
    wanted = np.eye(rows.class_count)[rows.targets] - 1 / rows.class_count
    if len(rows.targets) <= rows.levels[-1].stop:
        form, drawn = dual_form(rows, scales, roots, wanted), np.arange(len(rows.targets))
    else:
        form, drawn = primal_form(rows, scales, roots, wanted), draw_rows(rows, seed)
    together = left_out_together(rows.groups, drawn)
    judged = drawn[drawn < rows.plain]
    weights = np.square(roots[judged, 0])

    def judge(strength):
        """Return the Fit of a strength, as far as leave-one-out needs it."""
        answers = in_order(leave_out(form, strength, together), together, len(judged))
        squares = np.square(answers - wanted[judged]).sum(axis=1)
        return Fit(strength, judged, answers, np.average(squares, weights=weights))

    best = judge(strength) if strength else search_strength(judge)
    return complete(best, rows.targets[judged], form, scales, together)


def in_order(numbers, together, count):
    """Return numbers about rows, an array for each of together, in the order of their places.

    together: arrays of places. count: the first so many are wanted.
    """
    order = np.argsort(np.concatenate(together))
    return np.concatenate(list(numbers))[order][:count]


def complete(fit, known, form, scales, together):
    """Return a Fit that leave-one-out has judged, with all that is needed to answer.

    known: classes of the rows that its answers are about.
    """
    mean, gain = scales
    coefficients = form.coefficients(fit.strength)
    kernel = gain[:, None] * coefficients[:-1]  # reads the levels as they are
    left_out = in_order(left_out_variances(form, together), together, len(fit.judged))
    variance = measure_variance(mean, gain, form, left_out)
    sharp = fit.answers * sharpness(variance, left_out)
    return fit._replace(
        form=form,
        accuracy=float((fit.answers.argmax(axis=1) == known).mean()),
        kernel=kernel,
        bias=coefficients[-1] + 1 / kernel.shape[1] - mean @ kernel,
        variance=variance,
        temperature=fit_temperature(sharp, known),
    )


def scale_units(rows):
    """Return (mean, gain) of the units: (x - mean) * gain gives all levels mean 0, equal weight.

    That is, the mean square length is 1 / levels for each level. By sums over all rows.
    """
    count, total, squares = len(rows.targets), 0.0, 0.0
    for places in in_chunks(count):
        x = rows.read(every_unit(rows), places).astype("float64")
        total, squares = total + x.sum(axis=0), squares + np.square(x).sum(axis=0)
    mean = total / count
    variance = squares / count - np.square(mean)
    gain = np.empty_like(mean)
    for level in rows.levels:
        gain[level] = 1 / np.sqrt(len(rows.levels) * max(1e-24, variance[level].sum()))
    return mean, gain


def every_unit(rows):
    """Return the slice of all units that are read."""
    return slice(rows.levels[-1].stop)


def in_chunks(count):
    """Return the numbers below a count in pieces, so that few rows are in memory at once."""
    return np.split(np.arange(count), range(CHUNK, count, CHUNK))


def class_roots(targets):
    """Return the roots of weights that let classes count alike, and whose sum is 1: (n, 1)."""
    weights = 1 / np.bincount(targets)[targets]
    return np.sqrt(weights / weights.sum())[:, None]


def standardise(rows, level, scales, places):
    """Return the units of a level, of some rows, with mean 0 and equal weight, float32."""
    mean, gain = (numbers[level].astype("float32") for numbers in scales)
    return (rows.read(level, places) - mean) * gain


def all_units(rows, scales, places):
    """Return what is fitted: all levels of some rows, alike, and 1 for the bias, (n, units + 1)."""
    x = standardise(rows, every_unit(rows), scales, places)
    return np.column_stack([x, np.ones(len(x), "float32")])


# roots, (rows, 1), of the weights; wanted: the centred classes, (rows, classes). Functions.
# blocks: strength, [array of places] → for each of these, its block of I - hat matrix, and its
# residuals times `roots`; coefficients: strength → what all_units is multiplied with, (units + 1,
# classes); components: nothing → (values, vectors), the principal components of all_units,
# weighted: their mean squares, (n,), and (units + 1, n)
Form = namedtuple("Form", "roots wanted blocks coefficients components")


def dual_form(rows, scales, roots, wanted):
    """Return the Form of ridge regression that has a number for each row.

    With K the mean kernel of the levels plus 1 for the bias, its rows weighted, I - hat matrix is
    strength * inv(K + strength).
    """
    count = len(rows.targets)
    kernel = 1.0
    for level in rows.levels:
        x = standardise(rows, level, scales, np.arange(count))
        kernel = kernel + (x @ x.T).astype("float64")
    kernel *= roots * roots.T

    @functools.lru_cache(2)
    def solve(strength):
        """Return I - hat matrix, (rows, rows), and the residuals, (rows, classes)."""
        complement = invert(kernel, strength)
        complement *= strength
        return complement, complement @ (roots * wanted)

    def blocks(strength, parts):
        """Yield (block of I - hat matrix, residuals) of each part."""
        complement, residuals = solve(strength)
        for places in parts:
            yield complement[np.ix_(places, places)], residuals[places]

    def expand(dual):
        """Return (units + 1, n) for numbers of the rows, (rows, n)."""
        dual = roots * dual
        return sum(all_units(rows, scales, places).T @ dual[places] for places in in_chunks(count))

    def coefficients(strength):
        return expand(solve(strength)[1] / strength)

    def components():
        values, vectors = principal_components(kernel)
        return values, expand(vectors / np.sqrt(values))

    return Form(roots, wanted, blocks, coefficients, components)


def primal_form(rows, scales, roots, wanted):
    """Return the Form that has a number for each unit, from sums over all rows."""
    width = rows.levels[-1].stop + 1
    gram, products = np.zeros((width, width)), np.zeros((width, rows.class_count))
    for places in in_chunks(len(rows.targets)):
        x = np.float32(roots[places]) * all_units(rows, scales, places)
        gram += x.T @ x
        products += x.T @ (roots[places] * wanted[places])

    @functools.lru_cache(2)
    def solve(strength):
        """Return the inverse, (units + 1, units + 1), and the coefficients."""
        inverse = invert(gram, strength)
        return inverse, inverse @ products

    def batch_blocks(strength, some):
        """Return what blocks yields for a few parts; its large matrices go before that is used."""
        inverse, coefficients = solve(strength)
        places = np.sort(np.concatenate(some))
        x = roots[places] * all_units(rows, scales, places)
        hat = x @ inverse
        residuals = roots[places] * wanted[places] - x @ coefficients
        found = [np.searchsorted(places, part) for part in some]
        return [(np.eye(len(at)) - hat[at] @ x[at].T, residuals[at]) for at in found]

    def blocks(strength, parts):
        """Yield (block of I - hat matrix, residuals) of each part."""
        for some in batch_parts(parts):
            yield from batch_blocks(strength, some)

    return Form(
        roots, wanted, blocks, lambda strength: solve(strength)[1],
        lambda: principal_components(gram),
    )  # fmt: skip


def batch_parts(parts):
    """Return lists of parts, arrays of places, with about CHUNK places in each."""
    numbers = np.cumsum([len(part) for part in parts]) // CHUNK
    batches = defaultdict(list)
    for number, part in zip(numbers, parts):
        batches[number].append(part)
    return batches.values()


def invert(matrix, strength):
    """Return the inverse of matrix + strength * I, by Cholesky decomposition, in little memory.

    matrix: symmetric, positive semidefinite.
    """
    from scipy.linalg import lapack

    diagonal = slice(None, None, len(matrix) + 1)
    shifted = matrix.copy()
    shifted.flat[diagonal] += strength
    # transposed, which changes nothing, it is as Fortran has it, and is overwritten
    factor, problem = lapack.dpotrf(shifted.T, lower=1, overwrite_a=1)
    lower, problem_2 = lapack.dpotri(factor, lower=1, overwrite_c=1)
    if problem or problem_2 or not np.isfinite(lower).all():
        raise utils.UserError("--weights: the network's features are not finite: use other weights")
    inverse = lower + lower.T
    inverse.flat[diagonal] /= 2
    return inverse


def principal_components(matrix):
    """Return the COMPONENTS largest eigenvalues, and eigenvectors as columns, of a matrix.

    It is symmetric. By subspace iteration (Halko et al. 2011); the smallest of them are rough.
    """
    basis = np.random.default_rng(0).standard_normal((len(matrix), min(COMPONENTS, len(matrix))))
    for _ in range(4):
        basis, _ = np.linalg.qr(matrix @ basis)
    values, vectors = np.linalg.eigh(basis.T @ matrix @ basis)
    return np.maximum(values, 1e-12), basis @ vectors


def leave_out_groups(groups, targets, pictures):
    """Return (groups of rows that are left out together, (n,); classes of one group).

    Of such a class, nothing would be left to learn from: its rows are left out picture by picture.
    """
    pairs = np.unique(np.stack([targets, groups]), axis=1)
    lone = np.flatnonzero(np.bincount(pairs[0]) == 1)
    return np.where(np.isin(targets, lone), groups.max() + 1 + pictures, groups), lone


def draw_rows(rows, seed):
    """Return the places of rows of at most MAX_JUDGED pictures, drawn by lot, groups whole.

    Only where no group is small enough, one is drawn in part.
    """
    rng = np.random.default_rng(seed)
    sizes = np.bincount(rows.groups[: rows.plain])
    drawn, room = [], MAX_JUDGED
    for group in rng.permutation(np.flatnonzero(sizes)):
        if sizes[group] <= room:
            drawn.append(group)
            room -= sizes[group]
    if not drawn:
        return np.sort(rng.permutation(rows.plain)[:MAX_JUDGED])
    return np.flatnonzero(np.isin(rows.groups, drawn))


def left_out_together(groups, places):
    """Return [array of places], rows that are left out together: those of a group, sorted."""
    order = places[np.argsort(groups[places], kind="stable")]
    return np.split(order, np.flatnonzero(np.diff(groups[order])) + 1)


def leave_out(form, strength, parts):
    """Yield what fits without each part of the rows answer about it: (n, classes), centred classes.

    parts: arrays of places. The residuals r of rows left out are inv(B) r, where B is their block
    of I - hat matrix (Cook and Weisberg 1982).
    """
    for places, (block, residuals) in zip(parts, form.blocks(strength, parts)):
        yield form.wanted[places] - np.linalg.solve(block, residuals) / form.roots[places]


def search_strength(judge):
    """Return judge(strength) with the least error, walking downhill among STRENGTHS."""
    place = FIRST_STRENGTH
    best = judge(STRENGTHS[place])
    for step in (-1, 1):
        while 0 <= place + step < len(STRENGTHS):
            other = judge(STRENGTHS[place + step])
            if other.error >= best.error:
                break
            best, place = other, place + step
    return best


def widen(fit, units):
    """Return a Fit that reads so many units; those at the end, which it has not seen, with 0."""
    more = units - len(fit.kernel)
    rows = (0, more), (0, 0)
    variance = fit.variance._replace(
        mean=np.pad(fit.variance.mean, (0, more)),
        gain=np.pad(fit.variance.gain, (0, more)),
        kernel=np.pad(fit.variance.kernel, rows),
    )
    return fit._replace(kernel=np.pad(fit.kernel, rows), variance=variance)


# ---------------------------------------------------------------- predictive variance


def measure_variance(mean, gain, form, left_out):
    """Return the Variance of a Form. mean, gain: of the units; left_out: see there."""
    values, vectors = form.components()
    vectors *= np.sqrt(values / (values + VARIANCE_STRENGTH))
    vectors = np.pad(vectors, ((0, 0), (0, COMPONENTS - len(values))))
    return Variance(mean, gain, vectors[:-1], vectors[-1], left_out, left_out.mean())


def left_out_variances(form, parts):
    """Yield the variances, (n,), of each part of the rows by a fit without it.

    parts: arrays of places. With B their block of I - hat matrix, the rows' part of it for a fit
    without them is inv(B) - I (Woodbury's identity).
    """
    for places, (block, _) in zip(parts, form.blocks(VARIANCE_STRENGTH, parts)):
        excess = np.diag(np.linalg.inv(block)) - 1
        yield VARIANCE_STRENGTH * np.maximum(0, excess) / np.square(form.roots[places, 0])


def predict(fit, chunks):
    """Return logits, (n, classes), and variances, (n,), of pictures.

    chunks: their levels, (some, units) at a time.
    """
    logits, variances = [], []
    for x in chunks:
        s = (x - fit.variance.mean) * fit.variance.gain
        seen = s @ fit.variance.kernel + fit.variance.bias
        logits.append(x @ fit.kernel + fit.bias)
        variances.append(1 + np.square(s).sum(axis=1) - np.square(seen).sum(axis=1))
    return np.concatenate(logits), np.concatenate(variances)


def constant(variance):
    """Return a Variance that is 1 whatever the picture, for levels that training changes."""
    return variance._replace(gain=0 * variance.gain, bias=0 * variance.bias, typical=1.0)


def sharpness(variance, variances):
    """Return what multiplies the logits of pictures with these variances, (n,): (n, 1).

    It is 1 for a typical one, and small for what resembles nothing learned from: nobody for sure.
    """
    return np.exp(np.clip(variance.typical - variances, -99, 99))[:, None]


def temper(fit, logits, variances):
    """Return the probabilities, (n, classes), for logits of a Fit and variances, (n,)."""
    return softmax(logits * sharpness(fit.variance, variances) / fit.temperature)


def answer_left_out(fit, parts, absent=None):
    """Yield the probabilities, (n, classes), that fits without each part of the rows give it.

    parts: arrays of places. absent: for each, a class that its fit must not name, since these are
    its rows.
    """
    both = zip(leave_out(fit.form, fit.strength, parts), left_out_variances(fit.form, parts))
    for number, (logits, variances) in enumerate(both):
        if absent is not None:
            logits[:, absent[number]] = -np.inf
        yield temper(fit, logits, variances)


# ---------------------------------------------------------------- calibration


def softmax(logits):
    """Return softmax over the last axis."""
    from scipy.special import softmax as scipy_softmax

    return scipy_softmax(logits, axis=-1)


def log_loss(probabilities, targets, smoothing=0.0):
    """Return the mean cross-entropy of (n, classes) with target classes (n,).

    smoothing: the share of a target that is spread over all classes.
    """
    logs = np.log(np.maximum(probabilities, 1e-30))
    own = logs[np.arange(len(targets)), targets]
    return float(-((1 - smoothing) * own + smoothing * logs.mean(axis=1)).mean())


def fit_temperature(logits, targets):
    """Return the temperature with the least log loss (Guo et al. 2017).

    Targets count n + 1/2 of n + 1 times, what Jeffreys's prior (1946) expects after n right
    answers: a finite set proves no certainty.
    """
    from scipy.optimize import minimize_scalar

    classes = logits.shape[1]
    smoothing = classes / (classes - 1) / (2 * len(targets) + 2)
    scale = max(1e-12, np.abs(logits).max())

    def loss(log_temperature):
        return log_loss(softmax(logits / np.exp(log_temperature)), targets, smoothing)

    bounds = np.log(scale) + np.array([-8, 5])
    return float(np.exp(minimize_scalar(loss, bounds=bounds, method="bounded").x))


def interval(right, total):
    """Return the exact (Clopper-Pearson) 95 % interval of a share as [low, high]."""
    from scipy.stats import binomtest

    return list(binomtest(right, total).proportion_ci(0.95, method="exact"))


# ---------------------------------------------------------------- strangers


def simulate_strangers(fit, rows, held, nobody=None, seed=0):
    """Leave each class out in turn. Returns Strangers, or None with two classes.

    The rows of the class left out are the strangers; friends are leave-one-out answers of the
    others, and held: probabilities, (n, classes), and classes of validation pictures. The rows of
    lone classes know each other: these count only where validation has none of the class. nobody:
    index of the class `unknown`, or None; its answers count as strangers, as many as of another
    class. seed: see draw_classes.
    """
    if rows.class_count < 3:
        return None
    answers = temper(fit, fit.answers, fit.variance.left_out)
    actual = rows.targets[fit.judged]
    is_counted = ~np.isin(actual, np.intersect1d(rows.lone, held[1]))
    absent, parts = draw_classes(rows, nobody, seed)
    strangers = [found[places < rows.plain]
                 for places, found in zip(parts, answer_left_out(fit, parts, absent))]  # fmt: skip
    unknown = answers[actual == nobody]
    if len(unknown) and nobody not in rows.lone:
        usual = round(np.mean([len(some) for some in strangers]))
        strangers.append(unknown[np.linspace(0, len(unknown) - 1, usual).astype(int)])
    strangers = np.concatenate(strangers)
    taken = strangers.argmax(axis=1)
    reached = np.where(taken == nobody, 0, strangers.max(axis=1))
    friends = np.concatenate([answers[is_counted], held[0]])
    actual = np.concatenate([actual[is_counted], held[1]])
    friends, actual = friends[actual != nobody], actual[actual != nobody]
    right = friends.argmax(axis=1) == actual
    taken_for = Counter(taken[taken != nobody].tolist())
    return weigh_thresholds(friends.max(axis=1), right, reached, taken_for)


def draw_classes(rows, nobody, seed):
    """Return classes that are left out in turn, drawn by lot, and [places of the rows of each].

    At most MAX_LEFT_OUT, and fewer where they have very many rows. Of a class of over
    MAX_CLASS_ROWS only so many, drawn by lot: the rest stays in the fit, which flatters a little.
    """
    rng = np.random.default_rng(seed)
    classes, parts, room = [], [], 10 * MAX_CLASS_ROWS
    for left in rng.permutation([c for c in range(rows.class_count) if c != nobody]):
        if len(classes) < MAX_LEFT_OUT and room > 0:
            places = np.flatnonzero(rows.targets == left)
            if len(places) > MAX_CLASS_ROWS:
                places = np.sort(rng.permutation(places)[:MAX_CLASS_ROWS])
            classes.append(left)
            parts.append(places)
            room -= len(places)
    return classes, parts


def weigh_thresholds(friends, right, strangers, taken_for):
    """Return Strangers for every threshold that makes a difference, with the chosen one.

    friends: probabilities of friends' answers; right: whether these are correct. strangers:
    probabilities with which strangers are taken for somebody. Chosen is the threshold where both
    shares have the largest sum, among those that call STRANGERS_UNKNOWN of the strangers unknown
    and refuse a share of the correct answers that FRIENDS_REFUSED allows; if none does both, the
    highest that refuses no more. Of all that make no difference, the middle in log odds.
    """
    from scipy.special import expit, logit

    thresholds = np.unique(np.concatenate([[0.0], friends, strangers]))
    correct = np.sort(friends[right])
    passed = len(correct) - np.searchsorted(correct, thresholds)
    friends_share = passed / max(1, len(friends))
    unknown = np.searchsorted(np.sort(strangers), thresholds) / max(1, len(strangers))
    most, least = (1 - np.array(FRIENDS_REFUSED)) * len(correct)
    allowed = np.flatnonzero(passed >= least)
    allowed = allowed[passed[allowed] <= max(most, passed[allowed[-1]])]
    enough = allowed[unknown[allowed] >= STRANGERS_UNKNOWN]
    best = enough[np.argmax((friends_share + unknown)[enough])] if len(enough) else allowed[-1]
    ends = np.clip(thresholds[[max(0, best - 1), best]], 1e-9, 1 - 1e-9)
    middle = min(float(expit(logit(ends).mean())), float(thresholds[best]))
    return Strangers(thresholds, friends_share, unknown, middle, taken_for)


def shares_at(strangers, threshold):
    """Return (share of friends correct, share of strangers unknown) at a threshold."""
    place = min(np.searchsorted(strangers.thresholds, threshold), len(strangers.thresholds) - 1)
    return float(strangers.friends[place]), float(strangers.unknown[place])


def move_threshold(strangers, probabilities, actual, nobody=None):
    """Return the threshold that refuses as many correct answers as the chosen one of Strangers.

    probabilities, (n, classes), and actual classes: of a model that was trained on all classes, and
    of which strangers cannot be simulated. nobody: index of the class `unknown`, or None.
    """
    is_right = (probabilities.argmax(axis=1) == actual) & (actual != nobody)
    if not is_right.any():
        return strangers.chosen
    kept = shares_at(strangers, strangers.chosen)[0] / max(1e-9, strangers.friends[0])
    return float(np.quantile(probabilities[is_right].max(axis=1), 1 - min(1, kept)))
