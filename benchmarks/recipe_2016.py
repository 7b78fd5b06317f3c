"""Claim: the accuracies of the recipe of 2016 in a small part of its time, and a better end.

    python benchmarks/recipe_2016.py DATA_DIR WEIGHTS_FILE [options of train.py]
    ONEDNN_MAX_CPU_ISA=AVX2 python benchmarks/recipe_2016.py DATA_DIR none --max-minutes 20

The recipe, rebuilt on Keras 3: every picture in memory as float32, the whole network in every
step, each epoch on freshly augmented pictures (rotation 45 degrees, shifts 0.25, zoom 0.5 to 1.5,
channel shift, flip); 20 epochs of new dense layers by RMSprop, then 10 rounds of 20 epochs of the
top two inception blocks by SGD (1e-4, momentum 0.9), in batches of 128. It gets what it did not
have: pictures decoded in parallel, a bare loop of `train_on_batch`, and the next batch prepared
meanwhile. Both are scored after each epoch (train.py: each round) on the same validation pictures,
take turns, and are processes of their own; seconds count from the command. `none`: from scratch.
"""

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

import common
import numpy as np
from common import model, reached, spread, time_to, utils

GOAL = 0.90
START = time.monotonic()
HEAD_EPOCHS, EPOCHS = 20, 220


def augmented(pixels, rng):
    """Return a turned, shifted, zoomed, tinted, maybe flipped copy of float32 (side, side, 3)."""
    import cv2

    side, angle = len(pixels), np.deg2rad(rng.uniform(-45, 45))
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    matrix = turn @ np.diag(rng.uniform(0.5, 1.5, 2) * (rng.choice((-1, 1)), 1))
    middle = np.full(2, (side - 1) / 2)
    offset = middle - matrix @ (middle + rng.uniform(-0.25, 0.25, 2) * side)
    matrix, edge = np.column_stack([matrix, offset]), cv2.BORDER_REPLICATE
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    view = cv2.warpAffine(pixels, matrix, (side, side), flags=flags, borderMode=edge)
    return np.clip(view + rng.uniform(-25, 25, 3).astype("float32"), 0, 255)


def build(weights, side, class_count):
    """Return (whole network, its InceptionV3) with the dense layers of 2016: 1024, softmax."""
    keras = model.import_keras()
    layers, builder = keras.layers, keras.applications.InceptionV3
    weights = None if weights == "none" else weights
    base = builder(weights=weights, include_top=False, input_shape=(side, side, 3))
    pooled = layers.GlobalAveragePooling2D()(base.output)
    outputs = layers.Dense(class_count, "softmax")(layers.Dense(1024, "relu")(pooled))
    return keras.Model(base.input, outputs), base


def compile_epoch(network, base, epoch):
    """Choose what is trained, and how, where the recipe changes it."""
    optimizers, loss = model.import_keras().optimizers, "categorical_crossentropy"
    if epoch == 1:
        base.trainable = False
        model.compiled(network, optimizer=optimizers.RMSprop(), loss=loss)
    if epoch == HEAD_EPOCHS + 1:
        base.trainable = True
        for layer in base.layers[: base.layers.index(base.get_layer("mixed8")) + 1]:
            layer.trainable = False
        model.compiled(network, optimizer=optimizers.SGD(1e-4, momentum=0.9), loss=loss)


def recipe_of_2016(args):
    """Train as in 2016, a line an epoch."""
    pixels, actual, fit, held = common.read_parts(args.recipe, args.image_size)
    targets = np.eye(actual.max() + 1, dtype="float32")[actual]
    pixels, scored = pixels[fit].astype("float32"), pixels[held].astype("float32") / 127.5 - 1
    model.import_keras().utils.set_random_seed(1)
    rng = np.random.default_rng(1)
    network, base = build(args.weights, args.image_size, targets.shape[1])

    def batch(indices):
        return np.stack([augmented(pixels[i], rng) for i in indices]) / 127.5 - 1, targets[indices]

    for epoch in range(1, EPOCHS + 1):
        compile_epoch(network, base, epoch)
        order = rng.permutation(len(pixels))
        steps = [order[i : i + 128] for i in range(0, len(order), 128)]
        for views, wanted in utils.ordered_parallel_map(batch, steps, workers=1):
            network.train_on_batch(views, wanted)
        accuracy = (model.predict(network, scored, 64).argmax(1) == actual[held]).mean()
        utils.print_line(f"epoch {epoch}: validation accuracy {accuracy:.4f}")
        if time.monotonic() - START > 60 * args.max_minutes:
            return


def whole_schedule(curve):
    """Return the seconds of all epochs of the recipe: where it was cut, by the median of them."""
    seconds = [second for second, _ in curve]
    return seconds[-1] + (EPOCHS - len(curve)) * statistics.median(np.diff(seconds))


def times_as_fast(seconds, times):
    """Return as text how often the median of our times goes into seconds of 2016."""
    return "" if None in times else f"{seconds / statistics.median(times):.1f}"


def report(args, options, runs):
    """Print the table, and how our medians stand to those of 2016."""
    curves = {name: [common.accuracies(run) for run in found] for name, found in runs.items()}
    old = curves["recipe of 2016"]
    dense = [curve[:HEAD_EPOCHS][-1] for curve in old]  # (seconds, accuracy)
    dense_seconds = [seconds for seconds, _ in dense]
    mark, done = statistics.median(accuracy for _, accuracy in dense), min(map(len, old))
    whole = statistics.median(whole_schedule(curve) for curve in old)
    rows = []
    for name, found in curves.items():
        first = dense_seconds if found is old else [time_to(curve, mark) for curve in found]
        goal = [time_to(curve, GOAL) for curve in found]
        best = spread([max(accuracy for _, accuracy in curve) for curve in found], 4)
        seconds = spread([run.seconds for run in runs[name]], 1)
        parts = times_as_fast(statistics.median(dense_seconds), first), times_as_fast(whole, goal)
        rows.append([name, reached(first), reached(goal), best, seconds, *parts])
    counts = f"n = {args.runs} for 2016, else {args.ours * args.runs}"
    common.print_machine(f"{args.image_size} px, {counts}, options: {' '.join(options)}")
    print(f"recipe of 2016: {done} of {EPOCHS} epochs run; all take {whole / 60:.1f} minutes")
    marks = f"s to {mark:.4f} (dense layers of 2016)", f"s to {GOAL}"
    ratios = "times as fast to that", f"whole schedule of 2016 / s to {GOAL}"
    common.print_table(["way", *marks, "best accuracy", "s in all", *ratios], rows)


def main():
    """Run both in turns and report; with --recipe, be one of these runs."""
    parser = common.make_parser(__doc__)
    parser.add_argument("data_dir", type=Path)
    parser.add_argument("weights")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--max-minutes", type=float, default=1e9, help="cut the recipe of 2016")
    parser.add_argument("--runs", type=int, default=1, help="of the recipe of 2016")
    parser.add_argument("--ours", type=int, default=3, help="runs of train.py for each of these")
    parser.add_argument("--recipe", metavar="FOLDER", help=argparse.SUPPRESS)
    args, options = parser.parse_known_args()
    if args.recipe:
        recipe_of_2016(args)
        return
    theirs = [sys.executable, __file__, *sys.argv[1:], "--recipe"]
    runs = {"recipe of 2016": [], "train.py": []}
    options = common.absolute([*options, "--image-size", str(args.image_size)])
    with tempfile.TemporaryDirectory() as folder:
        common.divide(args.data_dir, folder, *options)
        weights = args.weights if args.weights == "none" else Path(args.weights).resolve()
        ours = common.train_py(args.data_dir.resolve(), *options, "--weights", weights)
        for _ in range(args.runs):
            runs["recipe of 2016"].append(common.run_command([*theirs, folder]))
            for _ in range(args.ours):
                runs["train.py"].append(common.run_command(ours, folder))
    report(args, options, runs)


if __name__ == "__main__":
    main()
