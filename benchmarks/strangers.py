"""Claim: with its own threshold and no option, the model knows its friends and calls most strangers unknown.

    python benchmarks/strangers.py DATA_DIR [--friends 30] [--seeds 5] [options of train.py]
    python benchmarks/strangers.py DATA_DIR --by-folder [options of train.py]

Trains on `--friends` classes drawn by lot, all but two pictures of each; scores the two kept out, which no choice has
seen, and all pictures of the other classes. Beside it the nearest neighbour on 16 x 16 thumbnails, its limit set so
that as many friends keep their name. With --by-folder each of the first `--seeds` classes is the stranger once, and the
last folder (a film, say) of each other class is kept out.
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
    thumbnails,
    train_py,
)


def divide(data_dir, folder, friends, seed):
    """Link the pictures of DATA_DIR into known/, held/ and strangers/ of `folder`."""
    _, labels, paths = read_folder(data_dir, 75)
    rng = np.random.default_rng(seed)
    for n, name in enumerate(rng.permutation(np.unique(labels))):
        order = rng.permutation(np.flatnonzero(labels == name))
        parts = {"strangers": order} if n >= friends else {"held": order[:2], "known": order[2:]}
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


def nearest(folder, share):
    """Return the share of strangers that the nearest neighbour rejects where `share` of friends keep their name."""
    sets = {}
    for part in ("known", "held", "strangers"):
        squares, labels, _ = read_folder(folder / part, 64)
        sets[part] = thumbnails(squares), labels
    found = {}
    for part in ("held", "strangers"):
        distance = np.sqrt(((sets[part][0][:, None] - sets["known"][0][None]) ** 2).sum(-1))
        found[part] = distance.min(1), sets["known"][1][distance.argmin(1)] == sets[part][1]
    near, right = found["held"]
    limits = [limit for limit in np.sort(near) if (right & (near <= limit)).mean() >= share]
    return float((found["strangers"][0] > (limits[0] if limits else near.max())).mean())


def one_seed(args, options, seed):
    """Train and score once. Returns friends right, strangers unknown, and that of the nearest neighbour."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if args.by_folder:
            divide_by_folder(Path(args.data_dir), folder, seed)
        else:
            divide(Path(args.data_dir), folder, args.friends, seed)
        run_command(train_py("known", "--seed", seed, *options), folder)
        network, info = model.load_model(folder / "m")
        answers = []
        for part in ("held", "strangers"):
            squares, labels, _ = read_folder(folder / part, info["image_size"])
            p = model.predict(network, squares, 32)
            answers.append(
                (p.max(1) >= info["threshold"], np.array(info["labels"])[p.argmax(1)] == labels)
            )
        friends = float((answers[0][0] & answers[0][1]).mean())
        return friends, float((~answers[1][0]).mean()), nearest(folder, friends)


def main():
    """Train and score with every seed, and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data_dir")
    parser.add_argument("--friends", type=int, default=30)
    parser.add_argument(
        "--seeds", type=int, default=5, help="with --by-folder: how many of the classes"
    )
    parser.add_argument("--by-folder", action="store_true")
    args, options = parser.parse_known_args()
    options = absolute(options)
    rows = [one_seed(args, options, seed) for seed in range(1, args.seeds + 1)]
    print(machine(), f"n = {args.seeds} seeds, options: {' '.join(options)}", sep="\n")
    names = ["seed", "friends right", "strangers unknown", "nearest neighbour: strangers unknown"]
    print_table(names, [[s + 1, *(f"{x:.3f}" for x in row)] for s, row in enumerate(rows)])
    print_table(names, [["mean", *(f"{x:.3f}" for x in np.mean(rows, axis=0))]])


if __name__ == "__main__":
    main()
