"""Question: how long from the command to the first trained batch, and to the first tagged face, and what takes it?

    python benchmarks/start_up.py
    python benchmarks/start_up.py DATA_DIR WEIGHTS_FILE --runs 3 --image-size 224

train.py until the line of its first epoch (so the frozen pass over the pictures is in it), webcam.py until the first
line about a face in a film. Without arguments 30 faces are drawn and the weights are random: then little but start-up
is left. The runs take turns: each plainly for its seconds, and once more under watched.py, which looks a hundred times
a second which function of ours the main thread is in. `<module>` is what a script imports at its top.
"""

import argparse
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
from common import ROOT, machine, print_table, random_weights, run_command, spread, train_py

LEAST = 0.05  # seconds that deserve a row


def measure(command, folder, mark, watched):
    """Run a script. Returns the seconds to its first line that begins with `mark`, and {function: seconds} of these."""
    notes = Path(folder, "notes")
    if watched:
        command = [command[0], str(ROOT / "benchmarks/watched.py"), str(notes), *command[1:]]
    start = time.monotonic()
    end = next(seconds for seconds, line in run_command(command, folder).lines if line.startswith(mark))
    parts = Counter()
    if watched:
        before, name = 0.0, "Python itself"
        for line in notes.read_text().splitlines():
            moment, _, function = line.partition("\t")
            now = min(float(moment) - start, end)
            parts[name] += now - before
            before, name = now, function or "others"
    return end, parts


def prepare(args, folder):
    """Draw what was not given: faces, a film, random weights."""
    import sample_faces

    sample_faces.draw_clip(folder / "film.mp4", seconds=2)
    if not args.data_dir:
        args.data_dir, args.weights = folder / "people", folder / "x.weights.h5"
        sample_faces.draw_set(args.data_dir, pictures=6)
        random_weights(args.weights)
    args.data_dir, args.weights = args.data_dir.resolve(), args.weights.resolve()


def main():
    """Run both scripts in turns, plainly and watched, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data_dir", nargs="?", type=Path)
    parser.add_argument("weights", nargs="?", type=Path)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--image-size", default="224")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        prepare(args, Path(folder))
        options = ["--weights", args.weights, "--image-size", args.image_size, "--head-epochs", "1", "--rounds", "0"]
        webcam = [sys.executable, str(ROOT / "webcam.py"), "m", "--source", "film.mp4", "--no-display"]
        ways = {
            "train.py to its first epoch": (train_py(args.data_dir, *options), "round 0 epoch 1:"),
            "webcam.py to its first face": (webcam, tuple("0123456789")),
        }
        plain, parts = {name: [] for name in ways}, {name: [] for name in ways}
        for _ in range(args.runs):
            for name, (command, mark) in ways.items():
                plain[name].append(measure(command, folder, mark, False)[0])
                parts[name].append(measure(command, folder, mark, True)[1])
    print(machine(), f"{args.image_size} px, n = {args.runs}", sep="\n")
    for name in ways:
        print_table(
            [name, "s"],
            [
                ["in all", spread(plain[name])],
                ["in all, watched", spread([sum(part.values()) for part in parts[name]])],
            ],
        )
        medians = {key: float(np.median([part[key] for part in parts[name]])) for key in set().union(*parts[name])}
        rows = sorted(((s, key) for key, s in medians.items() if s >= LEAST), reverse=True)
        print_table(["of these in", "s"], [[key, f"{seconds:.2f}"] for seconds, key in rows])


if __name__ == "__main__":
    main()
