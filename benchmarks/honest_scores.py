"""Question: are the probabilities right, and how much does choosing the best round flatter its accuracy?

    python benchmarks/honest_scores.py DATA_DIR [--fit 24] [--seeds 40] [options of train.py]

Trains on `--fit` pictures of each class, drawn by lot, of which train.py keeps a fifth to choose the round, the
temperature and the threshold with. All other pictures, which no choice has seen, are then scored: the accuracy beside
that of the validation pictures, the calibration error of the largest probability in 15 bins of equally many pictures
(all seeds together), and the log loss with and without the temperature.
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np
from common import (
    absolute,
    link_classes,
    machine,
    model,
    print_table,
    read_folder,
    run_command,
    train,
    train_py,
)

BINS = 15


def one_seed(args, labels, paths, options, seed):
    """Train and score once. Returns (validation accuracy, probabilities (n, classes), actual (n,), temperature)."""
    rng = np.random.default_rng(seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for label in np.unique(labels):
            order = rng.permutation(np.flatnonzero(labels == label))
            for part, indices in (("fit", order[: args.fit]), ("held", order[args.fit :])):
                link_classes(paths, labels, indices, folder / part)
        run_command(train_py("fit", "--seed", seed, *options), folder)
        network, info = model.load_model(folder / "m")
        squares, held, _ = read_folder(folder / "held", info["image_size"])
        probabilities = model.predict(network, squares, 32)
    return (
        info["accuracy"],
        probabilities,
        np.searchsorted(info["labels"], held),
        info["temperature"],
    )


def calibration_error(sure, right):
    """Return the mean difference between how sure and how often right, over BINS bins of equal mass."""
    groups = np.array_split(np.argsort(sure), BINS)
    return sum(len(g) * abs(sure[g].mean() - right[g].mean()) for g in groups) / len(sure)


def main():
    """Train and score with every seed, and print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data_dir", type=Path)
    parser.add_argument("--fit", type=int, default=24)
    parser.add_argument("--seeds", type=int, default=40)
    args, options = parser.parse_known_args()
    options = absolute(options)
    rows, (_, labels, paths) = [], read_folder(args.data_dir, 75)
    for seed in range(1, args.seeds + 1):
        accuracy, p, actual, temperature = one_seed(args, labels, paths, options, seed)
        before = train.soften(p, 1 / temperature)
        losses = train.log_loss(before, actual), train.log_loss(p, actual)
        rows.append((accuracy, p.max(1), p.argmax(1) == actual, *losses))
    chosen, held = np.array([row[0] for row in rows]), np.array([row[2].mean() for row in rows])
    gain, error = (
        (chosen - held).mean(),
        (chosen - held).std(ddof=1) / np.sqrt(len(rows)) if len(rows) > 1 else 0,
    )
    sure, right = np.concatenate([row[1] for row in rows]), np.concatenate([row[2] for row in rows])
    print(
        machine(),
        f"n = {args.seeds} seeds, {args.fit} pictures a class, options: {' '.join(options)}",
        sep="\n",
    )
    print_table(
        [
            "validation accuracy of the best round",
            "of pictures kept out",
            "flattered by (standard error)",
        ],
        [[f"{chosen.mean():.4f}", f"{held.mean():.4f}", f"{gain:.4f} ({error:.4f})"]],
    )
    before, after = np.mean([row[3:] for row in rows], axis=0)
    print_table(
        ["pictures", "calibration error", "log loss without temperature", "with"],
        [[len(sure), f"{calibration_error(sure, right):.4f}", f"{before:.4f}", f"{after:.4f}"]],
    )


if __name__ == "__main__":
    main()
