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
from common import machine, print_table, set_up, train, utils
from PIL import Image


def nearest_neighbour(run):
    """Return the accuracy of the nearest neighbour on 16 x 16 thumbnails."""
    small = [np.asarray(Image.fromarray(row).resize((16, 16), Image.Resampling.BOX)) for row in run.data.store.rows]
    small, data = np.stack(small).reshape(len(small), -1).astype("float32"), run.data
    fit, held = small[data.train], small[data.validation]
    distance = (held**2).sum(1)[:, None] - 2 * held @ fit.T + (fit**2).sum(1)
    guess = data.targets[data.train][distance.argmin(1)]
    return float((guess == data.targets[data.validation]).mean())


def ridge_readout(run, layer):
    """Return the accuracy of a ridge regression on pooled features of a layer, its strength chosen in training."""
    keras, data = utils.import_keras(), run.data
    pooled = keras.layers.GlobalAveragePooling2D()(run.nets.network.get_layer(layer).output)
    model = utils.compiled(keras.Model(run.nets.network.input, pooled))
    features = train.predict_pictures(model, data.store, np.arange(len(data.pictures))).astype("float64")
    fit, targets = features[data.train], data.targets
    mean, scale = fit.mean(0), fit.std(0) + 1e-6
    features = np.c_[(features - mean) / scale, np.ones(len(features))]
    hot = np.eye(len(data.labels))[targets] - 1 / len(data.labels)

    def accuracy(use, test, strength):
        gram = features[use] @ features[use].T + strength * np.eye(len(use))
        weights = features[use].T @ np.linalg.solve(gram, hot[use])
        return float(((features[test] @ weights).argmax(1) == targets[test]).mean())

    inner = np.random.default_rng(0).permutation(data.train)
    half = len(inner) * 3 // 4
    best = max((accuracy(inner[:half], inner[half:], s), s) for s in 10.0 ** np.arange(1, 6))
    return accuracy(data.train, data.validation, best[1])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
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
                cut = f"mixed{10 - run.args.unfreeze}"
                row = [nearest_neighbour(run), ridge_readout(run, "mixed5"), ridge_readout(run, cut)]
                train.train_rounds(run, None)
            rounds = re.findall(r"^round \d+: validation accuracy (\S+)", output.getvalue(), re.M)
            rows.append([*row, max(map(float, rounds))])
    print(machine(), f"n = {args.seeds} seeds", sep="\n")
    names = ["seed", "pixels", "readout at mixed5", "readout at the cut", "train.py"]
    print_table(names, [[s + 1, *(f"{x:.4f}" for x in row)] for s, row in enumerate(rows)])
    mean = np.mean(rows, axis=0)
    print_table(names, [["mean", *(f"{x:.4f}" for x in mean)]])
    print(f"errors of train.py / errors of the better yardstick: {(1 - mean[3]) / max(1e-9, 1 - max(mean[:3])):.2f}")


if __name__ == "__main__":
    main()
