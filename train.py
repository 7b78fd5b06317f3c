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
"""Teach a ready-made network (InceptionV3) your own classes from folders of pictures.

    python train.py people model
    python train.py people model --weights none --image-size 75
    python train.py held_out model --evaluate

people/<class>/**/<picture> is read once, and the frozen part of the network runs once over each
picture. A closed-form fit to several of its levels gives a first model; rounds of fine-tuning
follow while they help. Leaves model.h5, model.json and model-labels.json, and after every round a
confusion matrix made of the pictures: 000.png, 001.png…
"""

import argparse
import contextlib
import datetime
import difflib
import glob
import hashlib
import json
import os
import shlex
import sys
import tempfile
import threading
import time
from collections import Counter, namedtuple
from pathlib import Path

import utils  # first: it says which Python and packages are needed

# isort: split
import dataset
import features
import model
import processes
import readout
import report

# isort: split
import numpy as np

# ---------------------------------------------------------------- settings

heavy_augmentation = True  # False for pictures that all look the way your camera will see them

FINE_TUNING = {
    "head_epochs": 5,
    "rounds": 2,
    "round_epochs": 2,
    "patience": 1,
    "views": 1,
    "batch_size": 32,
}
FROM_SCRATCH = FINE_TUNING | {"rounds": 5, "round_epochs": 4, "views": 7}
# From scratch, rounds of small sets have more epochs: at least so many steps, and so many a class.
MIN_STEPS, MIN_STEPS_A_CLASS = 40, 3
# From scratch, no training follows if leave-one-out and validation have this accuracy: rounds take
# minutes, and the first ones know less than a readout of random features.
GOOD_ENOUGH = 0.95
UNFREEZE = 2  # top blocks that are fine-tuned
HEAD_RATE = 1e-3  # learning rate of the new dense layers on their own
ROUND_RATE = 7e-4  # peak for the top blocks
SCRATCH_RATE = 1e-3  # peak for a whole network
WARM_UP = 0.1  # share of the steps in which the rate rises to its peak
WEIGHT_DECAY = 1e-2
LABEL_SMOOTHING = 0.1
TRAINED_SHARES = (0.25, 0.5, 0.75, 1.0)  # of the trained layer's logits; validation chooses
CACHE_GB = 20.0
MATRICES = "[0-9][0-9][0-9].png"
OUTPUTS = (
    ".h5 .json -labels.json -history.csv -report.png -mistakes.csv -review.csv -review.png "
    "-evaluate.csv -evaluate-report.png -resume.npz"
).split()

# network: a copy of the base that rounds train and that may be saved; top, hidden: see
# model.trainable_part
Trained = namedtuple("Trained", "network top hidden")
# views: {number: View}; gathered: {number: what gather_levels gives}, of several processes;
# readouts: {0, 1 or "frozen": Readout}; all as they are made
Run = namedtuple("Run", "args recipe data networks views gathered readouts")
# pictures: index of that of each row; probabilities: of validation; strangers: a readout.Strangers
Readout = namedtuple(
    "Readout", "fit rows pictures views probabilities strangers", defaults=[None, None]
)
# network, numbers: what is saved, see model.set_readout; probabilities: of validation
Candidate = namedtuple("Candidate", "network numbers probabilities trained_share")
# a row of model-mistakes.csv and model-evaluate.csv; probability: of the predicted class
Prediction = namedtuple("Prediction", "file actual predicted probability")
Scores = namedtuple("Scores", "probabilities accuracy predictions title")


# ---------------------------------------------------------------- arguments
# What changes the result belongs in resume_settings, what changes the features in cache_name.


def parse_arguments(argv=None):
    """Read the command line. Options that depend on the kind of training may be absent."""
    parser = argparse.ArgumentParser(
        description="Fine-tune InceptionV3 on data_dir/<class>/**/<picture>.",
        epilog="example: python train.py people model --no-heavy-augmentation --rounds 20. GPUs "
        "and several machines are used with KERAS_BACKEND=jax (see README.md).",
    )
    parser.add_argument("data_dir", type=utils.to_path, help="folder with a folder for each class")
    parser.add_argument("model", help="prefix of the files: model.h5, model.json…")

    # each option stands in README.md too; a % in its text is written %%
    def option(name, text, shown="%(default)s", **settings):
        parser.add_argument(f"--{name}", help=f"{text} (default: {shown})", **settings)

    def flag(name, text):
        option(name, text, "off", action="store_true")

    number = utils.number
    weights = "auto (imagenet if it can be had, else none), imagenet, none, or a notop FILE"
    option("weights", weights, default="auto")
    option("image-size", "side in pixels", "224; 96 from scratch", type=number(int, 75, 1024))

    share = number(float, 0.001, 0.999)
    option("validation-split", "share of each class kept for validation", "0.2", type=share)
    flag("group-by-folder", "keep files of one folder on one side of the split")
    option("seed", "same seed, same split and result", type=number(int, 0, 2**31), default=1337)
    option("heavy-augmentation", "turn, shift, zoom, tint and flip; or only shift and flip",
           default=heavy_augmentation, action=argparse.BooleanOptionalAction)  # fmt: skip
    for name, text, low, high in (
        ("head-epochs", "epochs for the new dense layers", 1, 10**6),
        ("rounds", "rounds of fine-tuning, all of them made if given", 0, 999),
        ("round-epochs", "epochs a round", 1, 10**6),
        ("patience", "rounds without improvement before stopping, 0: never", 0, 10**6),
        ("views", "augmented copies of each picture that a round trains on", 1, 10**6),
        ("batch-size", "pictures a training step", 1, 4096),
    ):
        key = name.replace("-", "_")
        shown = f"{FINE_TUNING[key]}; {FROM_SCRATCH[key]} from scratch"
        option(name, text, shown, type=number(int, low, high), default=argparse.SUPPRESS)
    blocks = number(int, 0, len(model.BASE.blocks) - 1)
    option("unfreeze", "top blocks that are fine-tuned", type=blocks, default=UNFREEZE)
    option("cache-dir", "keep the cache here for reuse", "a temporary file", type=utils.to_path)
    option("cache-gb", "size of the cache", type=number(float, 1e-6, 1e6), default=CACHE_GB)
    flag("float32", "never use bfloat16, faster or not")
    flag("fit-all", "fit the readout of the saved model once more, on validation pictures too")
    flag("class-weight", "weigh classes by 1/frequency")
    flag("resume", "go on from the last whole round after a stop or a kill")
    flag("evaluate", "no training: score the saved model on all of data_dir")
    option("min-accuracy", "exit 3 if it is lower", "none", type=number(float, 0, 1))
    flag("dry-run", "read and summarise the data, write nothing")
    args = parser.parse_args(argv)
    if not args.model.endswith(("/", os.sep)):
        args.model = model.prefix_of(Path(args.model).as_posix())  # `./model.h5` is `model`
    processes.find_processes(args)
    return args


# ---------------------------------------------------------------- the network


def build_trained(run, head=None):
    """Build the twin that rounds train. Returns Trained.

    head: weights of its new dense layers, random if not given. Where several devices or processes
    train as one, only they together can compute with the twin.
    """
    data, networks, cut = run.data, run.networks, run.networks.cut
    model.import_keras().utils.set_random_seed(run.args.seed)  # --resume builds less before
    with networks.distribution_scope():
        side = data.pixels.rows.shape[1]
        network = model.build_network(len(data.labels), side, networks.use)
        for layer, same in zip(network.layers, networks.base.layers):
            if layer.name not in model.READOUT:  # which the first process has filled to save it
                layer.set_weights(same.get_weights())
        top, hidden = model.trainable_part(network, cut)
        if head is not None:
            top.get_layer("hidden").set_weights(head[:2])
            top.get_layer("trained").set_weights(head[2:])
    compile_for_training(run, top)
    return Trained(network, top, hidden)


def variables_of(trained):
    """Return what a round of training changes: weights, seeds, and the optimizer's variables."""
    return [*trained.top.variables, *trained.top.optimizer.variables]


# ---------------------------------------------------------------- training


def compile_for_training(run, network):
    """Compile a model with AdamW. Its rate is set before each step: a schedule would be traced."""
    keras = model.import_keras()
    with run.networks.distribution_scope():
        optimizer = keras.optimizers.AdamW(weight_decay=WEIGHT_DECAY)
        loss = keras.losses.CategoricalCrossentropy(label_smoothing=LABEL_SMOOTHING)
        # by name alone, the graph would be made twice
        accuracy = keras.metrics.CategoricalAccuracy(name="accuracy")
        model.compiled(network, optimizer=optimizer, loss=loss, metrics=[accuracy])
        optimizer.build(network.trainable_variables)  # now, so that --resume finds its variables


def training_schedule(run, is_head):
    """Return the learning rate of every step: rising to its peak, then a cosine to 0. (steps,)."""
    recipe, (steps, _) = run.recipe, epoch_size(run)
    if is_head:
        warm_up, total, peak = steps, recipe["head_epochs"] * steps, HEAD_RATE
    else:
        total = recipe["rounds"] * recipe["round_epochs"] * steps
        warm_up = int(total * WARM_UP)
        peak = SCRATCH_RATE if run.networks.cut is None else ROUND_RATE
    rising = np.linspace(peak / 100, peak, warm_up, endpoint=False)
    angles = np.linspace(0, np.pi, total - warm_up, endpoint=False)
    return np.concatenate([rising, peak / 2 * (1 + np.cos(angles))])


def epoch_size(run):
    """Return (steps an epoch, pictures a step of this process): alike in all processes.

    The pictures of a step are divided evenly among the devices of all processes.
    """
    args, devices = run.args, len(features.list_devices())
    batch = -(-run.recipe["batch_size"] // devices) * (devices // args.processes)
    return -(-run.data.largest_shard // batch), batch


def train_epoch(run, network, read, round_number, epoch):
    """Train one epoch with bare `train_on_batch`. Returns {"loss", "accuracy"}, means of its steps.

    Every local picture comes once, and some twice to fill the last batch. read: picture indices
    (n,) and a random generator → features (n, …).
    """
    data, (steps, size) = run.data, epoch_size(run)
    rng = np.random.default_rng([run.args.seed, round_number, epoch])
    order = np.resize(rng.permutation(data.local), (steps, size))
    targets = np.eye(len(data.labels), dtype="float32")
    ahead = utils.ordered_parallel_map(lambda batch: read(batch, rng), order, workers=1)
    rates = training_schedule(run, not round_number)[int(network.optimizer.iterations) :]
    logs, label = [], f"round {round_number} epoch {epoch}"
    with run.networks.distribution_scope():
        for batch, x, rate in zip(utils.progress(order, steps, label), ahead, rates):
            network.optimizer.learning_rate = rate
            y, weights = targets[data.targets[batch]], data.weights[batch]
            logs.append(network.train_on_batch(x, y, weights))
    return dict(zip(("loss", "accuracy"), np.mean(logs, axis=0).tolist(), strict=True))


def train_epochs(run, network, read, round_number, predict_validation):
    """Train the epochs of one round, a line each. Returns them as rows of the history, dicts.

    read: see train_epoch. predict_validation: gives the probabilities (n, classes) of what the
    epoch is scored on.
    """
    data, history = run.data, []
    actual = data.targets[data.validation]
    count = run.recipe["round_epochs" if round_number else "head_epochs"]
    for epoch in range(1, count + 1):
        start = time.monotonic()
        logs = train_epoch(run, network, read, round_number, epoch)
        if run.args.process:
            continue  # the first one scores
        probabilities = predict_validation()
        logs["val_loss"] = readout.log_loss(probabilities, actual, LABEL_SMOOTHING)
        logs["val_accuracy"] = float((probabilities.argmax(1) == actual).mean())
        shown = ", ".join(f"{key} {value:.3f}" for key, value in logs.items())
        logs |= {"plain_accuracy": "", "learning_rate": float(network.optimizer.learning_rate)}
        logs["seconds"] = time.monotonic() - start
        utils.print_line(f"round {round_number} epoch {epoch}: {shown}, {logs['seconds']:.0f} s")
        history.append({"round": round_number, "epoch": epoch} | logs)
    return history


def train_head(run):
    """Round 0: train new dense layers on the top level. Returns (weights, rows of history)."""
    data, networks = run.data, run.networks
    view, top_level = features.get_view(run, features.UNAUGMENTED), networks.levels[-1].units
    with networks.distribution_scope():
        head = model.build_head(top_level.stop - top_level.start, len(data.labels))
    compile_for_training(run, head)

    def read(indices, _=None):
        """Return the top level of pictures."""
        return view.rows["levels"][view.row_of[indices], top_level]

    def predict_validation():
        """Return probabilities; by hand, since one process alone cannot use a shared model."""
        kernel, bias, kernel_2, bias_2 = head.get_weights()
        hidden = np.maximum(read(data.validation) @ kernel + bias, 0)
        return readout.softmax(hidden @ kernel_2 + bias_2)

    rows = train_epochs(run, head, read, 0, predict_validation)
    return head.get_weights(), rows


def train_top(run, trained, round_number):
    """A round of fine-tuning the top blocks; from scratch, of training the whole network."""
    wanted = features.list_views(run, round_number)
    kept = {*wanted, features.MIRRORED, features.VALIDATION_VIEW}
    for view in set(run.views) - kept:
        del run.views[view]  # its file goes with it, unless the cache is kept
    views = [features.get_view(run, view) for view in wanted]
    held = None if run.args.process else features.get_view(run, features.VALIDATION_VIEW)

    def read(indices, rng):
        """Return the feature maps of pictures, each in a view chosen at random."""
        chosen = rng.integers(0, len(views), len(indices))
        pairs = ((views[number], index) for number, index in zip(chosen, indices))
        return np.stack([view.rows["map"][view.row_of[index]] for view, index in pairs])

    def predict_validation():
        """Return probabilities of the augmented validation pictures."""
        return readout.softmax(predict_trained(run, trained, held, run.data.validation))

    return train_epochs(run, trained.top, read, round_number, predict_validation)


def predict_trained(run, trained, view, indices):
    """Return the logits that the trained part gives for a view of pictures, (n, classes)."""
    size = run.networks.batch
    batches = dataset.in_batches(view.row_of[indices], size)
    parts = [model.predict(trained.hidden, view.rows["map"][some], size) for some in batches]
    kernel, bias = trained.top.get_layer("trained").get_weights()
    return np.concatenate(parts) @ kernel + bias


# ---------------------------------------------------------------- cached features → readout


def round_readout(run, round_number):
    """Return the Readout of a round, made once: with mirror images from round 1 on, if they help.

    Leave-one-out says whether they do. All processes call it, since all give their levels; only the
    first one has a result.
    """
    data, number = run.data, min(round_number, 1)
    if number not in run.readouts:
        chosen = make_readout(run, [features.UNAUGMENTED]) if not number else round_readout(run, 0)
        if number and not features.is_large(data):
            mirrored = make_readout(run, [features.UNAUGMENTED, features.MIRRORED])
            if mirrored and mirrored.fit.error < chosen.fit.error:
                chosen = mirrored
        if chosen and chosen.probabilities is None:
            fit, nobody = chosen.fit, dataset.unknown_class(data)
            p = readout.temper(fit, *readout.predict(fit, read_validation(run)))
            held = p, data.targets[data.validation]
            # only frozen levels can tell: training has seen all classes
            found = readout.simulate_strangers(fit, chosen.rows, held, nobody, run.args.seed)
            chosen = chosen._replace(probabilities=p, strangers=found, fit=fit._replace(form=None))
        run.readouts[number] = chosen
    return run.readouts[number]


def make_readout(run, views, levels=None, indices=None, strength=None):
    """Fit the classes to levels (default: all) of pictures (default: those that train).

    views: those that are read, unaugmented first; what is no training picture has that one only.
    From scratch, the top is not read: only training makes it tell anything. Returns a Readout,
    whose kernel is 0 for what is not read, or None in all processes but the first.
    """
    data, tables = run.data, [features.gather_levels(run, view) for view in views]
    if run.args.process:
        return None
    indices = data.train if indices is None else indices
    parts = [indices, *(np.intersect1d(indices, data.train) for _ in views[1:])]
    starts = np.cumsum([0, *map(len, parts)])

    def read(level, places):
        """Return some units of rows whose places are sorted: float32 (n, units)."""
        found = []
        for start, part, (rows, row_of) in zip(starts, parts, tables):
            inside = places[(places >= start) & (places < start + len(part))] - start
            found.append(rows[row_of[part[inside]], level])
        return np.concatenate(found)

    pictures = np.concatenate(parts)
    targets = data.targets[pictures]
    groups, lone = readout.leave_out_groups(data.groups[pictures], targets, pictures)
    every, is_scratch = run.networks.levels, run.networks.cut is None
    levels = [level.units for level in levels or (every[:-1] if is_scratch else every)]
    rows = readout.Rows(read, levels, targets, groups, lone, len(indices), len(data.labels))
    fit = readout.fit_readout(rows, strength, run.args.seed)
    return Readout(readout.widen(fit, every[-1].units.stop), rows, pictures, views)


def readout_numbers(fit):
    """Return what model.set_readout takes, of a Fit that reads none of the hidden units."""
    kernel = np.pad(fit.kernel, ((0, model.HIDDEN), (0, 0)))
    return kernel / fit.temperature, fit.bias / fit.temperature, fit.variance


def read_validation(run):
    """Yield the levels of the validation pictures, float32 (some, units) at a time."""
    view = features.get_view(run, features.UNAUGMENTED)
    for rows in dataset.in_batches(view.row_of[run.data.validation], readout.CHUNK):
        yield view.rows["levels"][rows]


def trained_candidates(run, trained, made):
    """Yield Candidates that mix the trained layer's logits with a readout of what stayed frozen.

    Where nothing did, from scratch say, the trained layer is alone, with a temperature of its own.
    What was trained fits its own pictures too well, so only validation can judge these.
    """
    data = run.data
    view = features.get_view(run, features.UNAUGMENTED)
    logits = predict_trained(run, trained, view, data.validation)
    kernel, bias = trained.top.get_layer("trained").get_weights()
    frozen, shares = fit_frozen(run, made), TRAINED_SHARES
    if frozen is None:
        shares = (1.0,)
        frozen = made.fit._replace(variance=readout.constant(made.fit.variance))
    frozen_logits, variances = readout.predict(frozen, read_validation(run))
    frozen_logits /= frozen.temperature
    sharpness = readout.sharpness(frozen.variance, variances)
    for share in shares:
        mixed = sharpness * (share * logits + (1 - share) * frozen_logits)
        heat = readout.fit_temperature(mixed, data.targets[data.validation])
        kept = (1 - share) / frozen.temperature
        mixed_kernel = np.concatenate([kept * frozen.kernel, share * kernel]) / heat
        mixed_bias = (kept * frozen.bias + share * bias) / heat
        numbers = mixed_kernel, mixed_bias, frozen.variance
        yield Candidate(trained.network, numbers, readout.softmax(mixed / heat), share)


def fit_frozen(run, made):
    """Return the Fit of a readout of the levels that training leaves as they are, None if none."""
    networks, place = run.networks, model.BASE.blocks.index
    frozen = [level for level in networks.levels
              if networks.cut and place(level.block) <= place(networks.cut)]  # fmt: skip
    if frozen and "frozen" not in run.readouts:
        whole = make_readout(run, made.views, frozen, strength=made.fit.strength)
        run.readouts["frozen"] = whole._replace(fit=whole.fit._replace(form=None))
    return run.readouts["frozen"].fit if frozen else None


# ---------------------------------------------------------------- rounds


def run_rounds(run, state):
    """Train round after round, save the best, until nothing improves. Returns the state.

    state: of the last whole round of an interrupted run, or None.
    """
    if run.recipe["rounds"]:
        features.views_that_fit(run)  # a cache that is too small is reported before any work
    trained = None
    if state is None:
        state_path(run.args.model).unlink(missing_ok=True)
        scored = finish_round(run, None, 0, None)  # before the dense layers: only rounds need them
        head, rows = train_head(run)
        start = {"round": -1, "rounds_without_gain": 0, "best": None, "history": []}
        state = end_round(run, start, scored, rows, head)
    elif run.recipe["rounds"]:
        head, trained = None, restore_trained(run, state)
    if state["best"] is None:  # its files have gone
        state["best"], _ = finish_round(run, trained, state["round"], None)
    while not is_finished(run, state):
        trained = trained or build_trained(run, head)
        round_number = state["round"] + 1
        rows = train_top(run, trained, round_number)
        scored = finish_round(run, trained, round_number, state["best"])
        state = end_round(run, state, scored, rows, variables_of(trained))
    return state


def end_round(run, state, scored, rows, variables):
    """Save what --resume needs, and the history. Returns the state after the round.

    scored: what finish_round gave; rows: of the history; variables: arrays or Keras variables that
    a later round begins with.
    """
    best, accuracy = scored
    if rows:  # the first process has them
        rows[-1]["plain_accuracy"] = accuracy
    without_gain = 0 if best != state["best"] else state["rounds_without_gain"] + 1
    state = {
        "round": state["round"] + 1,
        "rounds_without_gain": without_gain,
        "best": best,
        "history": state["history"] + rows,
    }
    if run.args.process == 0:
        save_state(run, state, variables)
        # after it: on Windows a CSV that is open is an error
        write_history(run.args, state["history"])
    return state


def is_finished(run, state):
    """Say whether no further round is due: all made, none that improves, or nothing to gain."""
    recipe = run.recipe
    best = state["best"]
    if state["round"] >= recipe["rounds"]:
        return True
    if "rounds" in run.args:  # those that were asked for are made
        return False
    # where a class is one film, leave-one-out alone would say too much
    reached = min(best["loo"], 1 - best["score"][0] / len(run.data.validation))
    if best["score"][0] == 0 or (run.networks.cut is None and reached >= GOOD_ENOUGH):
        return True
    return bool(recipe["patience"] and state["rounds_without_gain"] >= recipe["patience"])


def finish_round(run, trained, number, best):
    """Print a round's line, save the model if it is the best yet, draw. In all processes.

    best: {"round", "score", "loo"} of the best so far, or None. Returns (the best now,
    accuracy of this round).
    """
    made = round_readout(run, number)
    return processes.from_first(run.args, lambda: score_round(run, trained, number, made, best))


def score_round(run, trained, number, made, best):
    """Do what `finish_round` says, in the first process."""
    data = run.data
    actual = data.targets[data.validation]
    plain = Candidate(run.networks.base, readout_numbers(made.fit), made.probabilities, 0.0)
    candidates = [plain]
    if number and not run.args.fit_all:  # that cannot fit what was trained
        mixed = trained_candidates(run, trained, made)
        candidates += [c for c in mixed if is_clearly_better(c, plain, actual)]
    chosen = min(candidates, key=lambda candidate: score(candidate, actual))
    found = score(chosen, actual)
    right = len(actual) - found[0]
    line = f"round {number}: validation accuracy {right / len(actual):.4f} ({right}/{len(actual)})"
    utils.print_line(line)
    if best is None or found < best["score"]:
        best = {"round": number, "score": found, "loo": made.fit.accuracy}
        save_candidate(run, number, right, made, chosen)
    draw_round(run, number, line, chosen.probabilities)
    return best, right / len(actual)


def is_clearly_better(candidate, plain, actual):
    """Say whether a Candidate has fewer mistakes than the plain one, by over one standard error.

    That of the difference (McNemar 1947): of several, the luckiest has fewer anyway.
    """
    right, before = (c.probabilities.argmax(1) == actual for c in (candidate, plain))
    gained, lost = (right & ~before).sum(), (before & ~right).sum()
    return gained - lost > np.sqrt(gained + lost)


def score(candidate, actual):
    """Return what is least for the best: [mistakes, log loss]."""
    wrong = int((candidate.probabilities.argmax(1) != actual).sum())
    return [wrong, readout.log_loss(candidate.probabilities, actual)]


def draw_round(run, number, title, probabilities):
    """Draw the confusion matrix of a round; a picture that cannot be drawn is a warning."""
    args, data = run.args, run.data
    path = Path(f"{number:03d}.png")
    if number == 0:
        for old in Path().glob(MATRICES):  # of an earlier run with the same prefix
            if is_same_prefix(report.matrix_maker(old), args.model):
                old.unlink()
    check_matrix(path, args.model)  # another run may have begun in this folder meanwhile
    with drawing(path):
        report.draw_confusion_matrix(
            path, args.model, title, data.labels, data.targets[data.validation],
            probabilities.argmax(1), lambda i: dataset.square_of(data, data.validation[i]),
        )  # fmt: skip


@contextlib.contextmanager
def drawing(path):
    """Turn what goes wrong while a picture is drawn into a warning; the model is safe already."""
    try:
        yield
    except Exception as error:
        is_systems = getattr(error, "errno", None)  # a full disk, say; Pillow's own have none
        if is_systems or isinstance(error, MemoryError):
            raise
        utils.warn(f"{utils.escape(path)}: could not be drawn ({utils.first_line(error)})")


def save_candidate(run, number, right, made, chosen):
    """Save a network with its new last layer, and what must travel with it."""
    args, data, networks = run.args, run.data, run.networks
    count = len(data.validation)
    strangers, promise, threshold = made.strangers, None, 0.5
    if strangers:
        threshold, promise = strangers.chosen, readout.shares_at(strangers, strangers.chosen)
    if strangers and chosen.trained_share:
        nobody, actual = dataset.unknown_class(data), data.targets[data.validation]
        threshold = readout.move_threshold(strangers, chosen.probabilities, actual, nobody)
    info = {
        "labels": data.labels,
        "base": model.describe(networks.use),
        "levels": networks.use,
        "image_size": data.pixels.rows.shape[1],
        "face_crops": dataset.share_of_face_crops(data),
        "round": number,
        "trained_share": chosen.trained_share,
        "threshold": threshold,
        "strangers": promise and {"friends": promise[0], "unknown": promise[1]},
        "weights": networks.weights,
        "accuracy": right / count,
        "validation": validation_fingerprint(data),
        "interval": readout.interval(right, count),
        "number_format": networks.number_format,
        "seed": args.seed,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": model.versions(),
    }
    save_network(args, chosen.network, chosen.numbers, info)


def validation_fingerprint(data):
    """Return what tells one set of validation pictures from another."""
    digests = sorted(data.pictures[i].digest + data.labels[data.targets[i]].encode()
                     for i in data.validation)  # fmt: skip
    return hashlib.sha256(b"".join(digests)).hexdigest()


def save_network(args, network, numbers, info):
    """Save a network with the numbers of a readout, see model.set_readout."""
    if not np.isfinite(numbers[0]).all():
        raise utils.UserError("training has led to numbers that are not finite: use --float32")
    model.set_readout(network, *numbers)
    model.save_model(network, info, args.model)


# ---------------------------------------------------------------- files


def check_outputs(args):
    """Raise UserError before any work where a file would be overwritten or cannot be written."""
    name, folder = utils.escape(args.model), Path(args.model).parent
    # Keras reads names in .weights.h5 as another format; `m-labels.json` belongs to the model `m`
    ends = (".weights", "-labels", "-resume", "-evaluate", "-review")
    problem = None
    if not folder.is_dir():
        name, problem = utils.escape(folder), "no such folder: make it or choose another prefix"
    elif args.model.encode(errors="ignore").decode() != args.model:  # bytes of another encoding
        problem = "no name in UTF-8: choose another prefix"
    elif args.model.endswith(("/", os.sep)) or Path(args.model).is_dir():
        problem = f"is a folder: give a prefix such as {name.rstrip('/')}/model"
    elif not args.evaluate and args.model.endswith(ends):
        problem = f"choose a prefix that does not end in {', '.join(ends)}"
    elif not args.evaluate and not model.may_replace_model(args.model):
        name, problem = f"{name}.h5 or {name}.json", "from elsewhere: choose another prefix"
    elif strange := strange_output(args):
        name, problem = strange, "not of such a model: move it away or choose another prefix"
    if problem:
        raise utils.UserError(f"{name}: {problem}")
    if args.dry_run:
        return
    if args.cache_dir:
        args.cache_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    for place in {folder, Path(), args.cache_dir or folder}:
        try:
            tempfile.TemporaryFile(dir=place).close()
        except OSError as error:
            error.filename = place.resolve()  # not the temporary file in it
            raise
    for path in [Path("evaluate.png")] if args.evaluate else sorted(Path().glob(MATRICES)):
        check_matrix(path, args.model)


def strange_output(args):
    """Return the name of a file or folder that lies where a new model's would, or None."""
    there = any(path.exists() for path in model.model_paths(args.model)[:2])
    is_new = not args.evaluate and not args.resume and not there
    paths = (Path(args.model + end) for end in OUTPUTS)
    return next((utils.escape(p) for p in paths if p.is_dir() or (is_new and p.exists())), None)


def check_matrix(path, prefix):
    """Raise UserError if there is a picture at `path` that no run with this prefix has made."""
    maker = report.matrix_maker(path)
    if path.exists() and not is_same_prefix(maker, prefix):
        what = "not a picture of this model"
        what += f" but of {utils.escape(maker)}" if maker else ""
        raise utils.UserError(f"{path}: {what}: move it away or run in another folder")


def is_same_prefix(one, other):
    """Say whether two prefixes, the first of which may be None, lead to the same files."""
    return one is not None and Path(one).resolve() == Path(other).resolve()


def remove_unfinished(args):
    """Remove the unfinished files of an earlier run that was killed: those of this prefix."""
    folder, name = Path(args.model).parent, glob.escape(Path(args.model).name)
    ends = [end.replace(".", "-unfinished-*.") for end in OUTPUTS]
    found = [path for end in ends for path in folder.glob(f".{name}{end}")]
    found += Path().glob(f".{MATRICES.replace('.', '-unfinished-*.')}")
    if args.cache_dir and args.processes == 1:  # else they may be another process's
        found += args.cache_dir.glob(".*-unfinished-*.features")
    for path in found:
        path.unlink()


def write_history(args, rows):
    """Write model-history.csv: a row an epoch, whose keys are the columns."""
    utils.write_csv(f"{args.model}-history.csv", list(rows[0]), [row.values() for row in rows])


def score_saved(args, network, data, indices, what):
    """Score a saved model, as anybody would read it. Returns Scores.

    what: begins the line that is printed, `evaluate: accuracy` say.
    """
    actual, side = data.targets[indices], data.pixels.rows.shape[1]
    size = features.inference_batch(side)
    chunks = dataset.in_batches([data.pictures[i].row for i in indices], size)
    shown = utils.progress(chunks, len(chunks), "scoring")
    parts = [model.predict(network, data.pixels.rows[chunk], size) for chunk in shown]
    probabilities = np.concatenate(parts)
    right = int((probabilities.argmax(1) == actual).sum())
    low, high = readout.interval(right, len(actual))
    line = f"{what} {right / len(actual):.4f} ({right}/{len(actual)})"
    utils.print_line(f"{line}, 95% interval {low:.4f} to {high:.4f}")
    predictions = [
        Prediction(
            file=dataset.file_name(args, data, i),
            actual=data.labels[data.targets[i]],
            predicted=data.labels[p.argmax()],
            probability=float(p.max()),
        )
        for i, p in zip(indices, probabilities)
    ]
    title = f"{utils.escape(Path(args.model).name)}, {line}"
    return Scores(probabilities, right / len(actual), predictions, title)


def write_predictions(path, predictions):
    """Write predictions as CSV, a row each."""
    rows = [p._replace(probability=f"{p.probability:.6f}") for p in predictions]
    utils.write_csv(path, Prediction._fields, rows)


def finish_run(run, state, made, before):
    """Score the saved files, write what is to be looked at, say what is next. Returns accuracy.

    before: what travelled with the earlier model that is replaced, or None.
    """
    args, data = run.args, run.data
    network, info = model.load_model(args.model, run.networks.base)
    what = f"best: round {info['round']}, validation accuracy"
    found = score_saved(args, network, data, data.validation, what)
    strangers = made.strangers
    if info["strangers"]:
        friends, unknown = info["strangers"].values()
        utils.print_line(f"strangers: threshold {info['threshold']:.3f}: {friends:.2f} of friends "
                         f"correct, {unknown:.2f} of strangers unknown")  # fmt: skip
    wrong = [p for p in found.predictions if p.predicted != p.actual]
    wrong.sort(key=lambda p: -p.probability)
    write_predictions(f"{args.model}-mistakes.csv", wrong)
    write_history(args, state["history"])  # again: a kill may have come between state and rows
    with drawing(f"{args.model}-report.png"):
        panel = strangers and (*strangers[:4], info["threshold"])
        report.draw_report(
            f"{args.model}-report.png", found.title, data.labels, data.targets[data.validation],
            found.probabilities, state["history"], panel,
        )  # fmt: skip
    everything = make_readout(run, made.views, None, np.arange(len(data.pictures)),
                              made.fit.strength)  # fmt: skip
    review = review_labels(data, everything)
    write_review(args, data, review)
    if args.cache_dir:
        features.trim_cache(args)
    if args.fit_all:
        fit_all(run, network, info, everything.fit._replace(temperature=made.fit.temperature))
    print_next_steps(args, info, found.predictions, strangers, len(review), before)
    state_path(args.model).unlink(missing_ok=True)
    return found.accuracy


def fit_all(run, network, info, fit):
    """Save the model once more with a readout of all pictures; its figures stay as they are."""
    info["fit_all"] = True
    save_network(run.args, network, readout_numbers(fit), info)
    utils.print_line(
        "fit-all: the saved model's readout knows all pictures now; every figure printed and "
        "stored is that of the model before"
    )


# ---------------------------------------------------------------- labels worth a look


def review_labels(data, everything):
    """Return rows (index, suggested label, probability, why) for labels that deserve a look.

    `label`: a readout that has not seen the picture gives its label less than another; `copy`:
    equal or near copies under two classes, judged by a readout that has seen neither. The least
    probable labels come first, as in confident learning (Northcutt et al. 2021).
    """
    fit = everything.fit
    doubts = {}  # {index: (probability of its own label, suggestion, its probability, why)}
    judged = everything.pictures[fit.judged].tolist()
    for i, p in zip(judged, readout.temper(fit, fit.answers, fit.variance.left_out)):
        if p.argmax() != data.targets[i]:
            own, suggestion = float(p[data.targets[i]]), data.labels[p.argmax()]
            doubts[i] = (own, suggestion, float(p.max()), "label")
    parts = [np.flatnonzero(np.isin(everything.pictures, pair)) for pair in data.copies]
    for pair, places, answers in zip(data.copies, parts, readout.answer_left_out(fit, parts)):
        # a picture as it is comes before its mirror image
        found = dict(zip(everything.pictures[places[::-1]].tolist(), answers[::-1]))
        for i, other in (pair, pair[::-1]):
            own, probability = found[i][data.targets[[i, other]]].tolist()
            doubts[i] = (own, data.pictures[other].label, probability, "copy")
    order = sorted(doubts, key=lambda i: (doubts[i][0], i))
    return [(i, *doubts[i][1:]) for i in order]


def write_review(args, data, review):
    """Write model-review.csv, and the first pictures of it as model-review.png."""
    header = ["file", "label", "suggested", "probability", "why"]
    rows = [[dataset.file_name(args, data, i), data.pictures[i].label, suggested, f"{p:.6f}", why]
            for i, suggested, p, why in review]  # fmt: skip
    utils.write_csv(f"{args.model}-review.csv", header, rows)
    path = Path(f"{args.model}-review.png")
    path.unlink(missing_ok=True)
    first = review[: report.REVIEW_PICTURES]
    if not first:
        return
    indices = [i for i, *_ in first]
    with drawing(path):
        dataset.read_others(args, data.pictures, data.pixels, indices)
        squares = [dataset.square_of(data, i) for i in indices]
        files, labels, suggested, *_ = zip(*rows)
        names = [utils.escape(Path(file).name) for file in files]
        report.draw_review_sheet(path, squares, names, labels, suggested)


def print_next_steps(args, info, predictions, strangers, doubtful, before):
    """Say on stderr how good the model is, what it confuses, what to look at and to run next."""
    name = utils.escape(args.model)
    confused = Counter((p.actual, p.predicted) for p in predictions if p.predicted != p.actual)
    right = len(predictions) - confused.total()
    low, high = info["interval"]
    when = " before --fit-all" if args.fit_all else ""
    lines = [
        f"{name}.h5 classifies {right} of {len(predictions)} pictures correctly that it was not "
        f"trained on{when}; on more pictures like these, expect {low:.0%} to {high:.0%}."
    ]
    if before and before.get("accuracy"):
        whose = "the same" if before.get("validation") == info["validation"] else "its own"
        lines.append(
            f"It replaces a model that classified {before['accuracy']:.4f} of {whose} validation "
            "pictures correctly."
        )
    if confused:
        pairs = ", ".join(f"{a} for {p} ({n})" for (a, p), n in confused.most_common(3))
        lines.append(f"Confused most often: {pairs}.")
    if doubtful:
        labels = utils.count(doubtful, "label deserves", "labels deserve")
        lines.append(f"{labels} a look: {name}-review.png and {name}-review.csv.")
    lines.append(f"Below a probability of {info['threshold']:.3f} the tagger says unknown.")
    if strangers and strangers.taken_for:
        labels = info["labels"]
        most = ", ".join(labels[number] for number, _ in strangers.taken_for.most_common(3))
        lines.append(f"Strangers are taken most often for: {most}.")
    if utils.UNKNOWN not in info["labels"]:
        lines.append("A class `unknown`, with pictures of many others, teaches it who is strange.")
    lines.append(f"Look at {info['round']:03d}.png, {name}-report.png, {name}-mistakes.csv. Then:")
    command = f"    python webcam.py {shlex.quote(name)}"
    lines.append(command if model.looks_at_faces(info) else f"{command} --source FOLDER_OF_PHOTOS")
    if args.cache_dir:
        files = utils.escape(args.cache_dir / "*.features")
        lines.append(f"The kept cache shows what your pictures show: {files}")
    print("\n".join(lines), file=sys.stderr)


# ---------------------------------------------------------------- stop and go on


def state_path(prefix):
    """Return the path of what --resume needs: facts, split and variables after a whole round."""
    return Path(f"{prefix}-resume.npz")


def resume_settings(args, recipe, data):
    """Return what must be the same when a run goes on, by the name to show; plain data."""
    names = "validation_split group_by_folder seed heavy_augmentation unfreeze class_weight "
    names += "float32 cache_gb fit_all processes"
    settings = {name: getattr(args, name) for name in names.split()}
    settings |= recipe | {"image_size": data.pixels.rows.shape[1], "labels": data.labels}
    # the script may have been edited meanwhile
    settings |= {"views_made_of": features.view_settings(args), "network": repr(model.BASE)}
    return settings | {"split": data.validation.tolist()}


def file_list(args, data):
    """Return a line for each picture used: the file below data_dir and its SHA-256."""
    digests = (picture.digest.hex() for picture in data.pictures)
    return [f"{utils.escape(dataset.file_name(args, data, i))} {d}" for i, d in enumerate(digests)]


def save_state(run, state, variables):
    """Save the state after a whole round, with the variables that the next one begins with."""
    facts = state | {
        "settings": resume_settings(run.args, run.recipe, run.data),
        "files": file_list(run.args, run.data),
        "number_format": run.networks.number_format,
        "weights": run.networks.weights,
    }
    arrays = {f"v{number}": np.asarray(variable) for number, variable in enumerate(variables)}
    with utils.atomic_write(state_path(run.args.model)) as part:
        np.savez(part, facts=np.frombuffer(json.dumps(facts).encode(), "uint8"), **arrays)


def read_state(args):
    """Return the state of an interrupted run as plain data, or None if there is none."""
    path = state_path(args.model)
    if not path.exists():
        utils.print_line("nothing to resume: starting from the beginning")
        return None
    with reading(path) as file:
        state = json.loads(file["facts"].tobytes())
        saved = model.read_info(args.model)
        if saved is None or saved.get("fit_all"):  # that one knows the validation pictures
            utils.warn(f"{utils.escape(args.model)}.h5: the best round is gone: the last is saved")
            state["best"] = None
        known = "round rounds_without_gain best history settings files weights number_format"
        if not {*known.split()} <= state.keys() or not state["history"]:
            raise ValueError
        return state


@contextlib.contextmanager
def reading(path):
    """Give the arrays of a saved state; what goes wrong with them becomes a UserError."""
    try:
        with np.load(path) as file:
            yield file
    except MemoryError:
        raise
    except Exception:  # NumPy's and zip's parsers raise much
        problem = "damaged or of another version: train without --resume"
        raise utils.UserError(f"{utils.escape(path)}: {problem}") from None


def check_state(args, state, recipe, data):
    """Raise UserError, with the reason, unless the interrupted run had these data and settings."""
    now = file_list(args, data)
    if state["files"] != now:  # reported first: other pictures can change the recipe, too
        changed = min(set(state["files"]) ^ set(now), default="the order of the files ")
        name = utils.escape(changed.rpartition(" ")[0])[:200]
        raise utils.UserError(f"--resume: the data has changed ({name}): train without --resume")
    for name, value in resume_settings(args, recipe, data).items():
        before = state["settings"].get(name)
        if before != value:
            shown = utils.escape(before)[:100]
            raise utils.UserError(
                f"--resume: the interrupted run had other {name.replace('_', ' ')} ({shown}): give "
                "it again, or train without --resume"
            )


def restore_trained(run, state):
    """Return Trained as it was after the last whole round. Raises UserError."""
    with reading(state_path(run.args.model)) as file:
        arrays = [file[f"v{number}"] for number in range(len(file.files) - 1)]
        if state["round"] == 0:
            return build_trained(run, arrays)  # weights of the new dense layers
        trained = build_trained(run)
        for variable, array in zip(variables_of(trained), arrays, strict=True):
            variable.assign(array)
        return trained


# ---------------------------------------------------------------- the program


def evaluate(args):
    """Score a saved model on all of data_dir. Writes evaluate.png, a CSV file and a report."""
    network, info = model.load_model(args.model)
    check_outputs(args)
    labels, side = info["labels"], info["image_size"]
    files = rename_strange(args, dataset.find_files(args.data_dir), labels)
    pictures, skipped, pixels = dataset.read_pictures(args, files, side)
    if not pictures:
        name = utils.escape(args.data_dir)
        raise utils.UserError(f"{name}: no pictures: give a folder with a folder for each class")
    utils.print_line(
        f"images: {len(pictures)} to evaluate, {len(labels)} classes, {skipped} skipped"
    )
    targets = np.array([labels.index(picture.label) for picture in pictures])
    everything = np.arange(len(pictures))
    data = dataset.Scored(pictures, pixels, labels, targets)
    found = score_saved(args, network, data, everything, "evaluate: accuracy")
    write_predictions(f"{args.model}-evaluate.csv", found.predictions)
    path = f"{args.model}-evaluate-report.png"
    with drawing(path):
        report.draw_report(path, found.title, labels, targets, found.probabilities)
    with drawing("evaluate.png"):
        report.draw_confusion_matrix(
            "evaluate.png", args.model, found.title, labels, targets,
            found.probabilities.argmax(1), lambda i: dataset.square_of(data, i))  # fmt: skip
    return gate(args, found.accuracy)


def rename_strange(args, files, labels):
    """Return files whose labels the model knows; others become `unknown`, or are left out."""
    for strange in sorted({label for _, label in files} - set(labels)):
        near = difflib.get_close_matches(strange.casefold(), [s.casefold() for s in labels], 1, 0.7)
        name = next((label for label in labels if [label.casefold()] == near), None)
        hint = f" (did you mean {name}?)" if name else ""
        what = "counts as unknown" if utils.UNKNOWN in labels else "is left out"
        utils.warn(f"{utils.escape(args.data_dir)}/{strange}: no class of the model{hint}: {what}")
    if utils.UNKNOWN in labels:
        return [(path, label if label in labels else utils.UNKNOWN) for path, label in files]
    kept = [(path, label) for path, label in files if label in labels]
    if not kept:
        name = utils.escape(args.data_dir)
        if {label.casefold() for _, label in files} & set().union(*dataset.DIVIDED):
            raise utils.UserError(f"{name}: divided: give one of its parts, {name}/test say")
        hint = f"to name photos: python webcam.py {shlex.quote(args.model)} --source {name}"
        raise utils.UserError(f"{name}: no folder is a class of the model; {hint}")
    return kept


def gate(args, accuracy):
    """Return the exit code: 3 if the accuracy that was asked for was not reached."""
    if args.min_accuracy is None or accuracy >= args.min_accuracy:
        return 0
    print(f"accuracy {accuracy:.4f} is below --min-accuracy {args.min_accuracy}", file=sys.stderr)
    return 3


def image_side(args, is_scratch):
    """Return the side of what the network sees, in pixels."""
    return args.image_size or (96 if is_scratch else 224)


def make_recipe(args, is_scratch, data):
    """Return the recipe for so many training pictures and classes, a dict."""
    defaults = FROM_SCRATCH if is_scratch else FINE_TUNING
    recipe = {name: getattr(args, name, value) for name, value in defaults.items()}
    if is_scratch and "round_epochs" not in args:
        steps = -(-len(data.train) // recipe["batch_size"])
        wanted = max(MIN_STEPS, MIN_STEPS_A_CLASS * len(data.labels))
        recipe["round_epochs"] = max(recipe["round_epochs"], -(-wanted // steps))
    recipe["fresh"] = recipe["round_epochs"] if is_scratch else 0  # new views a round
    if not is_scratch and not args.unfreeze:
        recipe["rounds"] = 0
    return recipe


def train(args):
    """Go all the way: folder → split → features → rounds → report. Returns the exit code."""
    state = read_state(args) if args.resume else None
    path, warnings = features.find_weights(args)
    for line in warnings:
        utils.warn(line)
    is_scratch = path is None
    if len(set(processes.all_gather(args, is_scratch))) > 1:
        raise utils.UserError(
            "--weights auto: one process could not get them: give all of them a FILE"
        )
    if is_scratch and args.unfreeze != UNFREEZE:
        utils.warn("--unfreeze is ignored: from scratch, every layer is trained")
    if state and state["weights"] != features.weights_fingerprint(path):
        shown = utils.escape(state["weights"])
        raise utils.UserError(f"--resume: the run had other --weights ({shown}): give them again")
    data = dataset.read_data(args, image_side(args, is_scratch))
    recipe = make_recipe(args, is_scratch, data)
    if state:
        check_state(args, state, recipe, data)
    networks = features.build_networks(args, path, data, recipe, state and state["number_format"])
    run = Run(args, recipe, data, networks, {}, {}, {})
    before = None if args.resume else model.read_info(args.model)
    state = run_rounds(run, state)
    made = round_readout(run, state["best"]["round"])  # all processes give their levels
    accuracy = processes.from_first(args, lambda: finish_run(run, state, made, before))
    for line in warnings:
        utils.warn(line)
    return gate(args, accuracy)


def train_alone(args):
    """Train where no other run is at work with the same prefix or cache. Returns the exit code."""
    try:
        dataset.check_folders(args)  # before any weights are fetched
        check_outputs(args)
        with contextlib.ExitStack() as locks:
            if args.process == 0:
                locks.enter_context(utils.file_lock(f"{args.model}.lock"))
            if args.cache_dir:
                lock = args.cache_dir / f"cache-{args.process}.lock"
                locks.enter_context(utils.file_lock(lock))
            if args.process == 0:
                remove_unfinished(args)
            return train(args)
    except (Exception, KeyboardInterrupt) as error:
        is_unread = isinstance(error, BrokenPipeError)
        # TensorFlow may turn a Ctrl-C into an error of its own
        if is_unread or isinstance(error, KeyboardInterrupt) or utils.interrupted.is_set():
            hint = "no whole round is saved yet"
            if state_path(args.model).exists():
                hint = "the best whole round is saved; the same command with --resume goes on"
            print(hint, file=sys.stderr)
        if is_unread:  # exit code 0 would say that there is a model
            raise utils.UserError("stopped, since nobody reads what is printed any more") from None
        if isinstance(error, RuntimeError) and args.processes > 1:  # JAX lost a connection
            raise utils.UserError(f"{processes.LOST} ({utils.escape(error)[:100]})") from None
        raise


def main():
    """Read the command line and do what it asks for. Returns the exit code."""
    args = parse_arguments()
    if not args.data_dir.is_dir():
        name = utils.escape(args.data_dir)
        raise utils.UserError(f"{name}: no such folder: give one with a folder for each class")
    if args.dry_run:
        check_outputs(args)
        dataset.check_folders(args)
        if args.weights not in ("auto", "imagenet"):
            features.find_weights(args)
        dataset.read_data(args, image_side(args, args.weights == "none"))
        return 0
    if args.evaluate:
        return evaluate(args)
    if args.processes > 1:
        if model.CHILD not in os.environ:
            return processes.watch()
        threading.Thread(target=processes.end_with_parent, daemon=True).start()
    if args.process:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")
    return train_alone(args)


if __name__ == "__main__":
    try:
        utils.run(main)
    except SystemExit as end:
        if end.code and model.CHILD in os.environ:  # JAX would first wait for the others
            os._exit(end.code)
        raise
