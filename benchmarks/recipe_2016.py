"""Claim: the accuracies of the recipe of 2016 in a small part of its time, and a better one in the end.

    python benchmarks/recipe_2016.py DATA_DIR WEIGHTS_FILE
    python benchmarks/recipe_2016.py DATA_DIR WEIGHTS_FILE --max-minutes 20
    ONEDNN_MAX_CPU_ISA=AVX2 python benchmarks/recipe_2016.py DATA_DIR WEIGHTS_FILE --float32

The recipe, rebuilt on Keras 3: every picture in memory as float32, the whole network in every step, each epoch on
freshly augmented pictures (rotation 45 degrees, shifts 0.25, zoom 0.5 to 1.5, channel shift, flip); 20 epochs of new
dense layers by RMSprop, then 10 rounds of 20 epochs of the top two inception blocks by SGD (1e-4, momentum 0.9), in
batches of 128. It gets what it did not have: pictures decoded in parallel, a bare loop of `train_on_batch`, and the
next batch prepared meanwhile. Both are scored after each epoch (train.py: each round) on the same plain validation
pictures, take turns, and are processes of their own; seconds count from the command. WEIGHTS_FILE `none`: from scratch.
train.py runs with --float32 and without, or, if --float32 is among its options here, only with it.
"""

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from common import (
    accuracies,
    divide,
    machine,
    model,
    print_table,
    reached,
    read_folder,
    run_command,
    spread,
    time_to,
    train_py,
    utils,
)

GOAL = 0.90


def parse_arguments():
    """Read the command line. Returns (arguments, options for train.py)."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data_dir", type=Path)
    parser.add_argument("weights")
    for name, value in (("head-epochs", 20), ("rounds", 10), ("round-epochs", 20)):
        parser.add_argument(
            f"--{name}", type=int, default=value, help=f"of the recipe of 2016 (default: {value})"
        )
    parser.add_argument("--image-size", type=int, default=224, help="of both (default: 224)")
    parser.add_argument(
        "--max-minutes", type=float, default=1e9, help="cut the recipe of 2016 (default: never)"
    )
    parser.add_argument("--runs", type=int, default=1, help="of the recipe of 2016 (default: 1)")
    parser.add_argument(
        "--ours", type=int, default=3, help="runs of train.py for each of these (default: 3)"
    )
    parser.add_argument("--seed", type=int, default=1337, help="of the split (default: 1337)")
    parser.add_argument("--recipe", metavar="FOLDER", help=argparse.SUPPRESS)
    return parser.parse_known_args()


def augmented(pixels, rng):
    """Return a turned, shifted, zoomed, tinted and maybe flipped copy of float32 (side, side, 3)."""
    import cv2

    side, angle = len(pixels), np.deg2rad(rng.uniform(-45, 45))
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    matrix = turn @ np.diag(rng.uniform(0.5, 1.5, 2) * (rng.choice((-1, 1)), 1))
    middle = np.full(2, (side - 1) / 2)
    offset = middle - matrix @ (middle + rng.uniform(-0.25, 0.25, 2) * side)
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    matrix = np.column_stack([matrix, offset])
    view = cv2.warpAffine(
        pixels, matrix, (side, side), flags=flags, borderMode=cv2.BORDER_REPLICATE
    )
    return np.clip(view + rng.uniform(-25, 25, 3).astype("float32"), 0, 255)


def build(weights, side, class_count):
    """Return (whole network, its InceptionV3) with the dense layers of 2016: 1024, softmax."""
    keras = model.import_keras()
    weights = None if weights == "none" else weights
    base = keras.applications.InceptionV3(
        weights=weights, include_top=False, input_shape=(side, side, 3)
    )
    hidden = keras.layers.Dense(1024, activation="relu")(
        keras.layers.GlobalAveragePooling2D()(base.output)
    )
    return keras.Model(
        base.input, keras.layers.Dense(class_count, activation="softmax")(hidden)
    ), base


def recipe_of_2016(args, start):
    """Train as in 2016, a line an epoch."""
    pixels, labels, _ = read_folder(f"{args.recipe}/train", args.image_size)
    held, actual, _ = read_folder(f"{args.recipe}/validation", args.image_size)
    pixels, held, classes = (
        pixels.astype("float32"),
        held.astype("float32") / 127.5 - 1,
        np.unique(labels),
    )
    targets = np.eye(len(classes), dtype="float32")[np.searchsorted(classes, labels)]
    keras, rng = model.import_keras(), np.random.default_rng(args.seed)
    keras.utils.set_random_seed(args.seed)
    network, base = build(args.weights, args.image_size, len(classes))

    def batch(indices):
        return np.stack([augmented(pixels[i], rng) for i in indices]) / 127.5 - 1, targets[indices]

    for epoch in range(1, args.head_epochs + args.rounds * args.round_epochs + 1):
        if epoch == 1:
            base.trainable = False
            model.compiled(
                network, optimizer=keras.optimizers.RMSprop(), loss="categorical_crossentropy"
            )
        if epoch == args.head_epochs + 1:
            top, base.trainable = [layer.name for layer in base.layers].index("mixed8") + 1, True
            for layer in base.layers[:top]:
                layer.trainable = False
            optimizer = keras.optimizers.SGD(1e-4, momentum=0.9)
            model.compiled(network, optimizer=optimizer, loss="categorical_crossentropy")
        order = rng.permutation(len(pixels))
        steps = [order[i : i + 128] for i in range(0, len(order), 128)]
        for views, wanted in utils.ordered_parallel_map(batch, steps, workers=1):
            network.train_on_batch(views, wanted)
        accuracy = float((classes[model.predict(network, held, 64).argmax(1)] == actual).mean())
        utils.print_line(f"epoch {epoch}: validation accuracy {accuracy:.4f}")
        if time.monotonic() - start > 60 * args.max_minutes:
            return


def whole_schedule(curve, epochs):
    """Return the seconds that the recipe takes in all: where it was cut, by the median of its epochs."""
    return curve[-1][0] + (epochs - len(curve)) * statistics.median(
        np.diff([seconds for seconds, _ in curve])
    )


def report(args, runs):
    """Print the table, and how our medians stand to those of 2016."""
    curves = {name: [accuracies(run) for run in found] for name, found in runs.items()}
    old, epochs = curves["recipe of 2016"], args.head_epochs + args.rounds * args.round_epochs
    dense = [curve[: args.head_epochs][-1] for curve in old]  # (seconds, accuracy)
    mark, done = statistics.median(accuracy for _, accuracy in dense), min(map(len, old))
    whole = statistics.median(whole_schedule(curve, epochs) for curve in old)
    rows = []
    for name, found in curves.items():
        first = (
            [seconds for seconds, _ in dense]
            if found is old
            else [time_to(curve, mark) for curve in found]
        )
        goal, best = (
            [time_to(curve, GOAL) for curve in found],
            [max(a for _, a in curve) for curve in found],
        )
        row = [
            name,
            reached(first),
            reached(goal),
            spread(best, 4),
            spread([run.seconds for run in runs[name]], 1),
        ]
        parts = ["", ""]
        if None not in first:
            parts[0] = (
                f"{statistics.median(seconds for seconds, _ in dense) / statistics.median(first):.1f}"
            )
        if None not in goal:
            parts[1] = f"{whole / statistics.median(goal):.1f}"
        rows.append([*row, *parts])
    print(
        machine(),
        f"{args.image_size} px, n = {args.runs} for 2016, else {args.ours * args.runs}",
        sep="\n",
    )
    print(
        f"recipe of 2016: {done} of {epochs} epochs run; the whole schedule takes {whole / 60:.1f} minutes"
    )
    marks = f"s to {mark:.4f} (dense layers of 2016)", f"s to {GOAL}"
    ratios = "times as fast to that", f"whole schedule of 2016 / s to {GOAL}"
    print_table(["way", *marks, "best accuracy", "s in all", *ratios], rows)


def main():
    """Run both in turns and report; with --recipe, be one of these runs."""
    (args, options), start = parse_arguments(), time.monotonic()
    if args.recipe:
        recipe_of_2016(args, start)
        return
    theirs = [sys.executable, __file__, *sys.argv[1:], "--recipe"]
    runs = {"recipe of 2016": [], "train.py --float32": []} | (
        {} if "--float32" in options else {"train.py": []}
    )
    with tempfile.TemporaryDirectory() as folder:
        options += ["--seed", str(args.seed)]
        divide(args.data_dir, folder, *options)
        weights = args.weights if args.weights == "none" else Path(args.weights).resolve()
        options += ["--weights", str(weights), "--image-size", str(args.image_size)]
        ours = train_py(args.data_dir.resolve(), *options)
        for _ in range(args.runs):
            runs["recipe of 2016"].append(run_command([*theirs, folder]))
            for _ in range(args.ours):
                for name in list(runs)[1:]:
                    runs[name].append(run_command([*ours, *name.split()[1:]], folder))
    report(args, runs)


if __name__ == "__main__":
    main()
