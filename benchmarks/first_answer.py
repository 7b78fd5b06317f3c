"""Claim: the first answer comes in little more than the time of one look at each picture.

    python benchmarks/first_answer.py WEIGHTS_FILE SET… [--image-size 224] [--repeats 3]

For each set, in turn and alone: a bare pass, a process that imports Keras, builds InceptionV3
without its top, and lets it predict the set's pictures, decoded before; then train.py with
defaults, from the command to the line `round 0`, and to its end. Medians, and their ratios.
"""

import statistics
import sys
import tempfile
from pathlib import Path

import common

BARE_PASS = """
import sys
import keras
import numpy as np
pixels = np.load(sys.argv[1])
base = keras.applications.InceptionV3(
    include_top=False, weights=sys.argv[2], input_shape=pixels.shape[1:], pooling="avg"
)
base.predict(pixels / 127.5 - 1, batch_size=16, verbose=0)
"""


def one_set(folder, weights, side, repeats):
    """Return the table's row of a set."""
    times = []
    for _ in range(repeats):
        with tempfile.TemporaryDirectory() as work:
            pixels, _, _ = common.read_folder(folder, side)
            common.np.save(f"{work}/pixels.npy", pixels)
            command = [sys.executable, "-c", BARE_PASS, f"{work}/pixels.npy", str(weights)]
            bare = common.run_command(command).seconds
            command = common.train_py(folder, "--weights", weights, "--image-size", side)
            outcome = common.run_command(command, work)
            first = common.accuracies(outcome)[0][0]
            times.append((bare, first, outcome.seconds))
            print(folder.name, [f"{second:.1f}" for second in times[-1]], flush=True)
    bare, first, whole = map(statistics.median, zip(*times))
    ratios = [f"{some / bare:.2f}" for some in (first, whole)]
    seconds = [f"{second:.1f}" for second in (bare, first, whole)]
    return [f"{folder.name}, {len(pixels)} of {side} px", *seconds, *ratios]


def main():
    """Measure every set and print the table."""
    parser = common.make_parser(__doc__)
    parser.add_argument("weights", type=Path)
    parser.add_argument("sets", nargs="+", type=Path)
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    common.print_machine(f"n = {args.repeats}, one after the other")
    sets, weights = [path.resolve() for path in args.sets], args.weights.resolve()
    rows = [one_set(folder, weights, args.image_size, args.repeats) for folder in sets]
    names = ["set", "bare pass", "round 0", "end", "round 0 / bare", "end / bare"]
    common.print_table(names, rows)


if __name__ == "__main__":
    main()
