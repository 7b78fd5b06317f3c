"""Question: how many pictures of each class do I need?

    python benchmarks/pictures_per_class.py DATA_DIR… WEIGHTS_FILE --figure pictures.png
    python benchmarks/pictures_per_class.py DATA_DIR WEIGHTS_FILE --seeds 1 --counts 5,20 --rounds 3

Of each class a fifth, drawn by a seed, is held out; of the others the first 5, 10, 20, 50 and all
are given to train.py, each set within the next one; all are scored on the held-out pictures.
Beside it, on the same pictures at 224 pixels, the yardsticks: the nearest neighbour on 16 x 16
thumbnails, and the better of two ridge regressions on the frozen network's pooled features, at
`mixed5` and at `mixed8`. Options of train.py follow the folders. The figure shows the median of the
seeds and, shaded, the smallest and largest.
"""

import tempfile
from collections import defaultdict
from pathlib import Path

import common
import numpy as np

SIDE = 224  # of the pictures that the yardsticks see
COLOURS = {"train.py": "#0072b2", "linear readout": "#d55e00", "nearest neighbour": "#666666"}


def draw_lots(labels, counts, seed):
    """Return (indices of a fifth of each class, [those of each count of the others])."""
    rng, held, fit = np.random.default_rng(seed), [], [[] for _ in counts]
    for label in np.unique(labels):
        order = rng.permutation(np.flatnonzero(labels == label))
        fifth = max(1, round(len(order) / 5))
        held += order[:fifth].tolist()
        for indices, count in zip(fit, counts):
            indices += order[fifth:][:count].tolist()
    return np.array(held), [np.array(indices) for indices in fit]


def fine_tune(paths, labels, fit, held, options):
    """Train on some of the pictures and score others. Returns the accuracy."""
    with tempfile.TemporaryDirectory() as folder:
        common.copy_classes(paths, labels, fit, Path(folder, "fit"))
        common.copy_classes(paths, labels, held, Path(folder, "held"))
        _, [(probabilities, actual)] = common.train_and_score(folder, options)
    return float((probabilities.argmax(1) == actual).mean())


def one_set(args, data_dir, options):
    """Return {(pictures a class, way): [accuracy of each seed]}, and the pictures a class."""
    pixels, labels, paths = common.read_folder(data_dir, SIDE)
    classes, targets = np.unique(labels, return_inverse=True)
    features = [common.pooled_features(args.weights, layer, pixels)
                for layer in ("mixed5", "mixed8")]  # fmt: skip
    most = np.bincount(targets).max()
    counts = {most if count == "all" else int(count) for count in args.counts.split(",")}
    counts = sorted(count for count in counts if count == most or count < most * 4 // 5)
    found, sizes = defaultdict(list), {}
    for seed in range(1, args.seeds + 1):
        held, lots = draw_lots(labels, counts, seed)
        for count, fit in zip(counts, lots):
            size = sizes[count] = round(len(fit) / len(classes), 1)
            more = ["--weights", args.weights.resolve(), "--seed", seed, *options]
            found[size, "train.py"].append(fine_tune(paths, labels, fit, held, more))
            ridge = [common.ridge_readout(layer, targets, fit, held) for layer in features]
            found[size, "linear readout"].append(max(ridge))
            nearest = common.nearest_neighbour(pixels, targets, fit, held)
            found[size, "nearest neighbour"].append(nearest)
    return found, list(sizes.values())


def draw(path, sets):
    """Draw accuracy against pictures a class, a panel for each set."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.2 * len(sets), 3.4), layout="constrained")
    panels = figure.subplots(1, len(sets), squeeze=False)[0]
    for axes, (name, (found, sizes)) in zip(panels, sets.items()):
        for way, colour in COLOURS.items():
            values = np.array([found[size, way] for size in sizes])
            axes.plot(sizes, np.median(values, 1), "o-", color=colour, markersize=4, label=way)
            ends = values.min(1), values.max(1)
            axes.fill_between(sizes, *ends, color=colour, alpha=0.15, linewidth=0)
        axes.set(xscale="log", xlabel="pictures a class", ylabel="accuracy, held out", title=name)
        axes.set_xticks(sizes, [f"{size:g}" for size in sizes])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    common.save_figure(figure, path, 100)


def main():
    """Measure each set, print its table, and draw them all."""
    parser = common.make_parser(__doc__)
    parser.add_argument("data_dirs", nargs="+", type=Path)
    parser.add_argument("weights", type=Path)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--counts", default="5,10,20,50,all", help="(default: %(default)s)")
    parser.add_argument("--figure", help="PNG to draw (default: none)")
    args, options = parser.parse_known_args()
    options = common.absolute(options)
    sets = {folder.name: one_set(args, folder.resolve(), options) for folder in args.data_dirs}
    common.print_machine(f"n = {args.seeds} seeds, options of train.py: {' '.join(options)}")
    for name, (found, sizes) in sets.items():
        rows = [[f"{size:g}", *(common.spread(found[size, way], 3) for way in COLOURS)]
                for size in sizes]  # fmt: skip
        common.print_table([f"{name}: pictures a class", *COLOURS], rows)
    if args.figure:
        draw(args.figure, sets)


if __name__ == "__main__":
    main()
