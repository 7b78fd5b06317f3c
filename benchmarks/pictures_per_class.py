"""Question: how many pictures of each class do I need?

    python benchmarks/pictures_per_class.py DATA_DIR [DATA_DIR...] WEIGHTS_FILE --figure pictures.png
    python benchmarks/pictures_per_class.py DATA_DIR WEIGHTS_FILE --seeds 1 --counts 5,20 --rounds 3

Of each class a fifth, drawn by a seed, is held out; of the others the first 5, 10, 20, 50 and all are given to
train.py, each set within the next one. The held-out pictures, the same for all counts, are scored with --evaluate.
Beside it, on the same pictures, the yardsticks: the nearest neighbour on 16 x 16 thumbnails, and the better of two
linear (ridge) readouts of the frozen network's pooled features, at `mixed5` and at the cut; these two always see
pictures of 224 pixels. Options of train.py follow the folders. The figure shows the median of the seeds and, shaded,
the smallest and largest.
"""

import argparse
import tempfile
from collections import defaultdict
from pathlib import Path

import numpy as np
from common import (
    held_out_accuracy,
    link_classes,
    machine,
    nearest_neighbour,
    pooled_features,
    print_table,
    read_folder,
    ridge_readout,
    run_command,
    save_figure,
    spread,
    train_py,
)

SIDE = 224  # of the pictures that the yardsticks see
COLOURS = {"train.py": "#0072b2", "linear readout": "#d55e00", "nearest neighbour": "#666666"}


def parse_arguments():
    """Read the command line. Returns (arguments, options for train.py)."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data_dirs", nargs="+", type=Path)
    parser.add_argument("weights", type=Path)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument(
        "--counts", default="5,10,20,50,all", help="pictures a class (default: %(default)s)"
    )
    parser.add_argument("--figure", help="PNG to draw (default: none)")
    return parser.parse_known_args()


def draw_lots(labels, counts, seed):
    """Return (indices held out, [indices of each count to train with]): a fifth of each class, and of the others."""
    rng, held, fit = np.random.default_rng(seed), [], [[] for _ in counts]
    for label in np.unique(labels):
        order = rng.permutation(np.flatnonzero(labels == label))
        fifth = max(1, round(len(order) / 5))
        held += order[:fifth].tolist()
        for indices, count in zip(fit, counts):
            indices += order[fifth:][:count].tolist()
    return np.array(held), [np.array(indices) for indices in fit]


def fine_tune(paths, labels, fit, held, folder, options):
    """Train on some of the pictures and score others, each in a process. Returns the accuracy."""
    for part, indices in (("fit", fit), ("held", held)):
        link_classes(paths, labels, indices, folder / part)
    run_command(train_py("fit", *options), folder)
    return held_out_accuracy("held", folder)


def one_set(args, data_dir, options):
    """Return {(count, way): [accuracy of each seed]} and the counts, mean pictures a class as numbers."""
    pixels, labels, paths = read_folder(data_dir, SIDE)
    classes, targets = np.unique(labels, return_inverse=True)
    features = [pooled_features(args.weights, layer, pixels) for layer in ("mixed5", "mixed8")]
    most = np.bincount(targets).max()
    counts = {most if count == "all" else int(count) for count in args.counts.split(",")}
    counts = sorted(count for count in counts if count == most or count < most * 4 // 5)
    found, sizes = defaultdict(list), {}
    for seed in range(1, args.seeds + 1):
        held, lots = draw_lots(labels, counts, seed)
        for count, fit in zip(counts, lots):
            sizes[count] = round(len(fit) / len(classes), 1)
            with tempfile.TemporaryDirectory() as folder:
                more = ["--weights", args.weights.resolve(), "--seed", seed, *options]
                accuracy = fine_tune(paths, labels, fit, held, Path(folder), more)
            found[sizes[count], "train.py"].append(accuracy)
            ridge = [ridge_readout(layer, targets, fit, held) for layer in features]
            found[sizes[count], "linear readout"].append(max(ridge))
            found[sizes[count], "nearest neighbour"].append(
                nearest_neighbour(pixels, targets, fit, held)
            )
    return found, list(sizes.values())


def draw(path, sets):
    """Draw accuracy against pictures a class, a panel for each set."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.2 * len(sets), 3.4), layout="constrained")
    for axes, (name, (found, sizes)) in zip(
        figure.subplots(1, len(sets), squeeze=False)[0], sets.items()
    ):
        for way, colour in COLOURS.items():
            values = np.array([found[size, way] for size in sizes])
            axes.plot(sizes, np.median(values, 1), "o-", color=colour, markersize=4, label=way)
            axes.fill_between(
                sizes, values.min(1), values.max(1), color=colour, alpha=0.15, linewidth=0
            )
        axes.set(xscale="log", xlabel="pictures a class", ylabel="accuracy, held out", title=name)
        axes.set_xticks(sizes, [f"{size:g}" for size in sizes])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    save_figure(figure, path, 100)


def main():
    """Measure each set, print its table, and draw them all."""
    args, options = parse_arguments()
    sets = {
        data_dir.name: one_set(args, data_dir.resolve(), options) for data_dir in args.data_dirs
    }
    print(
        machine(),
        f"n = {args.seeds} seeds, options of train.py: {' '.join(options) or 'none'}",
        sep="\n",
    )
    for name, (found, sizes) in sets.items():
        rows = [[f"{size:g}", *(spread(found[size, way], 3) for way in COLOURS)] for size in sizes]
        print_table([f"{name}: pictures a class", *COLOURS], rows)
    if args.figure:
        draw(args.figure, sets)


if __name__ == "__main__":
    main()
