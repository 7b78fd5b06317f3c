"""Claim: the first answer, read from several levels of the frozen network, is hard to beat.

    python benchmarks/readout.py WEIGHTS_FILE SET… [--seeds 5] [options of train.py]

For each set, a folder of classes: the nearest neighbour on 16 x 16 thumbnails, ridge regression on
`mixed8` of the same frozen network, train.py's round 0 and its end, all on the split of each seed.
Accuracy as median (least to largest); in how many seeds the best round uses what was trained; and
seconds from the command, of the first seed, whose features the others find in a kept cache. With
`SET:by-folder` the option --group-by-folder is given.
"""

import re
import tempfile
from pathlib import Path

import common
import numpy as np


def one_set(name, weights, seeds, options):
    """Return rows of a seed each, and (seconds to round 0, in all, rounds) of the first seed.

    A row: accuracies (pixels, mixed8, round 0, end), share of the trained part in the best round.
    """
    folder, _, kind = name.partition(":")
    options = [*options, *(["--group-by-folder"] if kind else [])]
    features, rows, seconds = None, [], None
    with tempfile.TemporaryDirectory() as work:
        for seed in range(1, seeds + 1):
            _, data = common.read_split(folder, work, "--seed", seed, *options)
            pixels = data.pixels.rows[[picture.row for picture in data.pictures]]
            if features is None:
                features = common.pooled_features(weights, "mixed8", pixels)
            split = data.targets, data.train, data.validation
            row = [common.nearest_neighbour(common.thumbnails(pixels), *split)]
            row.append(common.ridge_readout(features, *split))
            command = common.train_py(Path(folder).resolve(), "--weights", weights, "--seed", seed)
            outcome = common.run_command([*command, "--cache-dir", "cache", *options], work)
            curve = common.accuracies(outcome)
            share = common.model.read_info(f"{work}/m")["trained_share"]
            rows.append([*row, curve[0][1], max(accuracy for _, accuracy in curve), share])
            seconds = seconds or (curve[0][0], outcome.seconds, len(curve))
            strangers = [line for _, line in outcome.lines if line.startswith("strangers")]
            print(name, seed, [f"{x:.4f}" for x in rows[-1]], *strangers, flush=True)
    return np.array(rows), seconds


def main():
    """Run every set and print the table."""
    parser = common.make_parser(__doc__)
    parser.add_argument("weights", type=Path)
    parser.add_argument("sets", nargs="+")
    parser.add_argument("--seeds", type=int, default=5)
    args, options = parser.parse_known_args()
    options, weights = common.absolute(options), str(args.weights.resolve())
    common.print_machine(f"n = {args.seeds} seeds, options: {' '.join(options)}")
    table = []
    for name in args.sets:
        rows, (first, last, rounds) = one_set(name, weights, args.seeds, options)
        cells = [common.spread(column, 3) for column in rows.T[:4]]
        cells.append(f"{(rows[:, 4] > 0).sum()} of {len(rows)}")
        cells += [f"{first:.0f}", f"{last:.0f} ({rounds} rounds)"]
        table.append([re.sub(".*/", "", name), *cells])
    names = ["set", "pixels", "mixed8", "round 0", "end", "trained part used"]
    names += ["s to round 0", "s in all"]
    common.print_table(names, table)


if __name__ == "__main__":
    main()
