"""Claim: with its own threshold and no option, the model keeps what it promises about strangers.

    python benchmarks/strangers.py DATA_DIR [--friends 30] [--seeds 5] [options of train.py]
    python benchmarks/strangers.py DATA_DIR --by-folder [options of train.py]

Trains on `--friends` classes drawn by lot, all but a fifth of each; scores the fifth kept out, which
no choice has seen, and all pictures of the other classes. With --by-folder each of the first
`--seeds` classes is the stranger once, and the last folder (a film, say) of the others is kept out.
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np
from common import (
    absolute,
    link,
    link_classes,
    machine,
    model,
    print_table,
    read_folder,
    run_command,
    train_py,
)


def divide(data_dir, folder, friends, seed):
    """Link the pictures of DATA_DIR into known/, held/ and strangers/ of `folder`."""
    _, labels, paths = read_folder(data_dir, 75)
    rng = np.random.default_rng(seed)
    for n, name in enumerate(rng.permutation(np.unique(labels))):
        order = rng.permutation(np.flatnonzero(labels == name))
        fifth = max(1, round(len(order) / 5))
        parts = {"held": order[:fifth], "known": order[fifth:]}
        if n >= friends:
            parts = {"strangers": order}
        for part, indices in parts.items():
            link_classes(paths, labels, indices, folder / part)


def divide_by_folder(data_dir, folder, number):
    """Link class `number` of DATA_DIR into strangers/, the last folder of the others into held/, else into known/."""
    classes = sorted(path.name for path in data_dir.iterdir() if path.is_dir())
    for name in classes:
        inner = sorted(path for path in (data_dir / name).iterdir() if path.is_dir())
        for path in inner:
            part = (
                "strangers"
                if name == classes[number - 1]
                else "held"
                if inner[0] != path == inner[-1]
                else "known"
            )
            for picture in path.iterdir():
                link(picture, folder / part / name / path.name / picture.name)


def area_under_curve(friends, strangers):
    """Return how often a friend's probability is above a stranger's; ties count half."""
    from scipy.stats import mannwhitneyu

    return float(mannwhitneyu(friends, strangers).statistic / len(friends) / len(strangers))


def one_seed(args, options, seed):
    """Train and score once. Returns the figures of a row, the promised ones last."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if args.by_folder:
            divide_by_folder(Path(args.data_dir), folder, seed)
        else:
            divide(Path(args.data_dir), folder, args.friends, seed)
        run_command(train_py("known", "--seed", seed, *options), folder)
        network, info = model.load_model(folder / "m")
        found = {}
        for part in ("held", "strangers"):
            squares, labels, _ = read_folder(folder / part, info["image_size"])
            p = model.predict(network, squares, 32)
            found[part] = p.max(1), np.array(info["labels"])[p.argmax(1)] == labels
    (friends, right), (strangers, _) = found["held"], found["strangers"]
    threshold, promise = info["threshold"], info["strangers"]
    return [
        float((right & (friends >= threshold)).mean()),
        float((strangers < threshold).mean()),
        area_under_curve(friends, strangers),
        promise["friends"],
        promise["unknown"],
    ]


def main():
    """Train and score with every seed, and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data_dir")
    parser.add_argument("--friends", type=int, default=30)
    parser.add_argument("--seeds", type=int, default=5, help="or how many classes, by folder")
    parser.add_argument("--by-folder", action="store_true")
    args, options = parser.parse_known_args()
    options = absolute(options)
    rows = [one_seed(args, options, seed) for seed in range(1, args.seeds + 1)]
    print(machine(), f"n = {args.seeds} seeds, options: {' '.join(options)}", sep="\n")
    names = ["seed", "friends correct", "strangers unknown", "area under the curve"]
    names += ["promised: friends", "promised: strangers"]
    print_table(names, [[s + 1, *(f"{x:.3f}" for x in row)] for s, row in enumerate(rows)])
    print_table(names, [["mean", *(f"{x:.3f}" for x in np.mean(rows, axis=0))]])


if __name__ == "__main__":
    main()
