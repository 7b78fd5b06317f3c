"""Question: how many wrong labels does the review list of train.py find?

    python benchmarks/wrong_labels.py WEIGHTS_FILE SET… [--draws 10] [--image-size 224]

In each set, a folder of classes, 2, 5 and 10 % of the pictures are given another class, both drawn
by lot, and train.py's own functions fit the readout of round 0 and list the labels that deserve a
look. The frozen network runs once over each set. Found is the share of the planted labels that is
in the list; precision, their share of the first m in the list, where m is how many were planted.
What was wrong in a set before counts as not planted. Mean of the draws (least).
"""

import re
import tempfile
from pathlib import Path

import common
import numpy as np
from common import dataset, train

import features

SHARES = (0.02, 0.05, 0.1)


def build_run(name, weights, side, folder):
    """Return train.py's Run for a set, without rounds of fine-tuning."""
    options = "--weights", weights, "--image-size", side, "--rounds", 0
    args, data = common.read_split(name, folder, *options)
    recipe = train.make_recipe(args, False, data)
    networks = features.build_networks(args, weights, data, recipe, None)
    return train.Run(args, recipe, data, networks, {}, {}, {})


def plant(args, data, share, rng):
    """Give a share of the pictures another class. Returns (Data, their indices).

    What stays together in leave-one-out, and what is a copy, follows from the new classes.
    """
    count, classes = max(1, round(share * len(data.pictures))), len(data.labels)
    wrong, targets = rng.permutation(len(data.pictures))[:count], data.targets.copy()
    targets[wrong] = (targets[wrong] + rng.integers(1, classes, count)) % classes
    pictures = [picture._replace(label=data.labels[target])
                for picture, target in zip(data.pictures, targets)]  # fmt: skip
    together, copies, _ = dataset.group_pictures(pictures, [args.data_dir], args.group_by_folder)
    groups = np.zeros(len(pictures), int)
    for number, group in enumerate(together):
        groups[list(group)] = number
    changed = {"pictures": pictures, "targets": targets, "groups": groups, "copies": copies}
    return data._replace(**changed), wrong


def review(run):
    """Return the indices of the pictures in the review list, as train.py makes it after round 0."""
    made = train.round_readout(run, 0)
    everything = np.arange(len(run.data.pictures))
    whole = train.make_readout(run, made.views, None, everything, made.fit.strength)
    review = train.review_labels(run.data, whole)
    return [index for index, *_ in review]


def one_draw(run, share, rng):
    """Return (share of the planted labels found, precision among the first) of one draw."""
    data, wrong = plant(run.args, run.data, share, rng)
    listed = review(run._replace(data=data, readouts={}))
    first = listed[: len(wrong)]
    return np.isin(wrong, listed).mean(), np.isin(first, wrong).sum() / max(1, len(first))


def main():
    """Plant and look in every set, and print the table."""
    parser = common.make_parser(__doc__)
    parser.add_argument("weights", type=Path)
    parser.add_argument("sets", nargs="+")
    parser.add_argument("--draws", type=int, default=10)
    parser.add_argument("--image-size", type=int, default=224)
    args = parser.parse_args()
    common.print_machine(f"{args.image_size} px, n = {args.draws} draws")
    table = []
    for name in args.sets:
        with tempfile.TemporaryDirectory() as folder:
            run = build_run(name, args.weights, args.image_size, folder)
            features.get_view(run, features.UNAUGMENTED)
            for share in SHARES:
                lots = (np.random.default_rng([n, round(100 * share)]) for n in range(args.draws))
                figures = np.array([one_draw(run, share, rng) for rng in lots])
                cells = [f"{column.mean():.3f} ({column.min():.3f})" for column in figures.T]
                table.append([re.sub(".*/", "", name.rstrip("/")), f"{share:.0%}", *cells])
    common.print_table(["set", "planted", "found", "precision"], table)


if __name__ == "__main__":
    main()
