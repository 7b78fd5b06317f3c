"""Claim: train.py makes at most half the errors of the better of two plain yardsticks.

    python benchmarks/yardsticks.py DATA_DIR WEIGHTS_FILE [--seeds 3]

Yardsticks, on the same splits: the nearest neighbour on 16 x 16 pixel thumbnails, and a linear (ridge) readout of
average-pooled features of the frozen network at `mixed5` and at the cut.
"""

import argparse
import contextlib
import io
import os
import re
import tempfile

import numpy as np
from common import (
    machine,
    nearest_neighbour,
    pooled_features,
    print_table,
    ridge_readout,
    set_up,
    train,
)


def main():
    """Score yardsticks and train.py on the split of every seed, and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data_dir")
    parser.add_argument("weights")
    parser.add_argument("--seeds", type=int, default=3)
    args, options = parser.parse_known_args()
    data_dir, weights, rows = os.path.abspath(args.data_dir), os.path.abspath(args.weights), []
    for seed in range(1, args.seeds + 1):
        with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
            output = io.StringIO()
            with contextlib.redirect_stdout(output), contextlib.redirect_stderr(io.StringIO()):
                run = set_up(data_dir, folder, "--weights", weights, "--seed", seed, *options)
                data = run.data
                pixels = data.store.rows[[picture.row for picture in data.pictures]]
                row = [nearest_neighbour(pixels, data.targets, data.train, data.validation)]
                for layer in ("mixed5", f"mixed{10 - run.args.unfreeze}"):
                    features = pooled_features(weights, layer, pixels)
                    row.append(ridge_readout(features, data.targets, data.train, data.validation))
                train.train_rounds(run, None)
            rounds = re.findall(r"^round \d+: validation accuracy (\S+)", output.getvalue(), re.M)
            rows.append([*row, max(map(float, rounds))])
    print(machine(), f"n = {args.seeds} seeds", sep="\n")
    names = ["seed", "pixels", "readout at mixed5", "readout at the cut", "train.py"]
    print_table(names, [[s + 1, *(f"{x:.4f}" for x in row)] for s, row in enumerate(rows)])
    mean = np.mean(rows, axis=0)
    print_table(names, [["mean", *(f"{x:.4f}" for x in mean)]])
    print(
        f"errors of train.py / errors of the better yardstick: {(1 - mean[3]) / max(1e-9, 1 - max(mean[:3])):.2f}"
    )


if __name__ == "__main__":
    main()
