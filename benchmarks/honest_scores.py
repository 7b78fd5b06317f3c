"""Question: are the probabilities right, and how much does choosing the best round flatter it?

    python benchmarks/honest_scores.py DATA_DIR [--fit 24] [--seeds 40] [options of train.py]

Trains on `--fit` pictures of each class, drawn by lot, of which train.py keeps a fifth to choose
the round with. All other pictures, which no choice has seen, are then scored:
the accuracy beside that of the validation pictures; the log loss; and the calibration error of the
largest probability in 15 bins of equally many pictures, all seeds together.
"""

import tempfile
from pathlib import Path

import common
import numpy as np

BINS = 15


def one_seed(args, labels, paths, options, seed):
    """Return (validation accuracy, probabilities (n, classes), actual classes (n,)) of one run."""
    rng = np.random.default_rng(seed)
    with tempfile.TemporaryDirectory() as name:
        for label in np.unique(labels):
            order = rng.permutation(np.flatnonzero(labels == label))
            common.copy_classes(paths, labels, order[: args.fit], Path(name, "fit"))
            common.copy_classes(paths, labels, order[args.fit :], Path(name, "held"))
        info, [held] = common.train_and_score(name, ["--seed", seed, *options])
    return info["accuracy"], *held


def calibration_error(sure, right):
    """Return the mean difference between how sure and how often right, over BINS equal bins."""
    groups = np.array_split(np.argsort(sure), BINS)
    return sum(len(g) * abs(sure[g].mean() - right[g].mean()) for g in groups) / len(sure)


def main():
    """Train and score with every seed, and print the tables."""
    parser = common.make_parser(__doc__)
    parser.add_argument("data_dir", type=Path)
    parser.add_argument("--fit", type=int, default=24)
    parser.add_argument("--seeds", type=int, default=40)
    args, options = parser.parse_known_args()
    options, gains, losses, sure, right = common.absolute(options), [], [], [], []
    _, labels, paths = common.read_folder(args.data_dir.resolve(), 75)
    for seed in range(1, args.seeds + 1):
        chosen, p, actual = one_seed(args, labels, paths, options, seed)
        sure.append(p.max(1))
        right.append(p.argmax(1) == actual)
        gains.append((chosen, right[-1].mean(), chosen - right[-1].mean()))
        losses.append(common.train.readout.log_loss(p, actual))
    chosen, held, gain = np.mean(gains, axis=0)
    error = np.std(gains, axis=0, ddof=1)[2] / np.sqrt(len(gains)) if len(gains) > 1 else 0
    facts = f"{args.fit} pictures a class, options: {' '.join(options)}"
    common.print_machine(f"n = {args.seeds} seeds, {facts}")
    names = "validation accuracy of the best round", "of pictures kept out", "flattered by (error)"
    common.print_table(names, [[f"{chosen:.4f}", f"{held:.4f}", f"{gain:.4f} ({error:.4f})"]])
    sure, right = np.concatenate(sure), np.concatenate(right)
    row = [len(sure), f"{calibration_error(sure, right):.4f}", f"{np.mean(losses):.4f}"]
    common.print_table(["pictures", "calibration error", "log loss"], [row])


if __name__ == "__main__":
    main()
