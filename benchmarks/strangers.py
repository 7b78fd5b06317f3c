"""Claim: with its own threshold and no option, the model keeps what it promises about strangers.

    python benchmarks/strangers.py DATA_DIR [--friends 30] [--seeds 5] [options of train.py]
    python benchmarks/strangers.py DATA_DIR --by-folder [options of train.py]

Trains on `--friends` classes drawn by lot, all but a fifth of each; scores the fifth kept out,
which no choice has seen, and all pictures of the other classes. With --by-folder the classes are
strangers by turns, and the last folder (a film, say) of the others is kept out.
"""

import shutil
import tempfile
from pathlib import Path

import common
import numpy as np


def divide(data_dir, folder, friends, seed):
    """Copy the pictures of DATA_DIR into fit/, held/ and strangers/ of `folder`."""
    _, labels, paths = common.read_folder(data_dir, 75)
    rng = np.random.default_rng(seed)
    for n, name in enumerate(rng.permutation(np.unique(labels))):
        order = rng.permutation(np.flatnonzero(labels == name))
        fifth = max(1, round(len(order) / 5))
        parts = {"held": order[:fifth], "fit": order[fifth:]}
        if n >= friends:
            parts = {"strangers": order}
        for part, indices in parts.items():
            common.copy_classes(paths, labels, indices, folder / part)


def divide_by_folder(data_dir, folder, seed):
    """Copy one class into strangers/; of the others the last folder into held/, else fit/."""
    classes = sorted(common.dataset.list_folders(data_dir))
    stranger = classes[(seed - 1) % len(classes)]
    for path in classes:
        inner = sorted(common.dataset.list_folders(path))
        for place in inner:
            is_held = len(inner) > 1 and place == inner[-1]
            part = "strangers" if path == stranger else "held" if is_held else "fit"
            shutil.copytree(place, folder / part / path.name / place.name)


def area_under_curve(friends, strangers):
    """Return how often a friend's probability is above a stranger's; ties count half."""
    from scipy.stats import mannwhitneyu

    return float(mannwhitneyu(friends, strangers).statistic / len(friends) / len(strangers))


def one_seed(args, options, seed):
    """Train and score once. Returns the figures of a row, the promised ones last."""
    with tempfile.TemporaryDirectory() as name:
        if args.by_folder:
            divide_by_folder(args.data_dir, Path(name), seed)
        else:
            divide(args.data_dir, Path(name), args.friends, seed)
        options = ["--seed", seed, *options]
        info, found = common.train_and_score(name, options, ("held", "strangers"))
    (held, actual), (others, _) = found
    friends, strangers = held.max(1), others.max(1)
    correct = (held.argmax(1) == actual) & (friends >= info["threshold"])
    shares = correct.mean(), (strangers < info["threshold"]).mean()
    return [*shares, area_under_curve(friends, strangers), *info["strangers"].values()]


def main():
    """Train and score with every seed, and print the table."""
    parser = common.make_parser(__doc__)
    parser.add_argument("data_dir", type=Path)
    parser.add_argument("--friends", type=int, default=30)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--by-folder", action="store_true")
    args, options = parser.parse_known_args()
    options = common.absolute(options)
    rows = [one_seed(args, options, seed) for seed in range(1, args.seeds + 1)]
    common.print_machine(f"n = {args.seeds} seeds, options: {' '.join(options)}")
    names = ["seed", "friends correct", "strangers unknown", "area under the curve"]
    names += ["promised: friends", "promised: strangers"]
    rows = dict(enumerate(rows, 1)) | {"mean": np.mean(rows, axis=0)}
    common.print_table(names, [[n, *(f"{x:.3f}" for x in row)] for n, row in rows.items()])


if __name__ == "__main__":
    main()
