"""Question: how long from the command to the first trained batch, and to the first tagged face, and what takes it?

    python benchmarks/start_up.py
    python benchmarks/start_up.py DATA_DIR WEIGHTS_FILE --runs 3 --image-size 224
    python benchmarks/start_up.py --before ../earlier

train.py until the line of its first epoch (so the frozen pass over the pictures is in it), also from scratch at 75
pixels; webcam.py until the first line about a face in a film and, where a window can be opened, until a camera, played
by that film, is first shown. --before: the folder of an earlier version, which runs beside. Without data 30 faces are
drawn and the weights are random: then little but start-up is left. The runs take turns: each plainly for its seconds,
and our scripts once more under watched.py, which notes a hundred times a second which function of ours the main thread
is in. `<module>` is what a script imports at its top.
"""

import argparse
import os
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
from common import (
    ROOT,
    machine,
    print_table,
    random_weights,
    run_command,
    spread,
    time_in_functions,
    watched_command,
)

LEAST = 0.05  # seconds that deserve a row
CAMERA = """
import runpy, sys
import cv2
film, window = cv2.VideoCapture, cv2.imshow
cv2.VideoCapture = lambda *_: film("film.mp4")
cv2.imshow = lambda *image: (window(*image), print("shown", flush=True))
sys.argv = sys.argv[1:]
sys.path.insert(0, sys.argv[0].rpartition("/")[0])
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def measure(command, folder, mark, watched):
    """Run a script. Returns the seconds to its first line that begins with `mark`, and {function: seconds} of these."""
    notes = Path(folder, "notes")
    if watched:
        command = watched_command(command, notes)
    start = time.monotonic()
    end = next(
        seconds for seconds, line in run_command(command, folder).lines if line.startswith(mark)
    )
    return end, time_in_functions(notes, start, end) if watched else Counter()


def prepare(args, folder):
    """Draw what was not given: faces, a film, random weights."""
    import sample_faces

    sample_faces.draw_clip(folder / "film.mp4", seconds=2)
    if not args.data_dir:
        args.data_dir, args.weights = folder / "people", folder / "x.weights.h5"
        sample_faces.draw_set(args.data_dir, pictures=6)
        random_weights(args.weights)
    args.data_dir, args.weights = args.data_dir.resolve(), args.weights.resolve()


def commands(args, root):
    """Return {what is measured: (command, what its last line begins with)} for the scripts in a folder."""
    train, webcam = ([sys.executable, str(root / name)] for name in ("train.py", "webcam.py"))
    short = "--head-epochs 1 --rounds 1 --round-epochs 1".split()
    film = ["m", "--source", "film.mp4", "--no-display"]
    learned = [
        str(args.data_dir),
        "m",
        "--weights",
        str(args.weights),
        "--image-size",
        args.image_size,
        *short,
    ]
    scratch = [str(args.data_dir), "m", "--weights", "none", "--image-size", "75", *short]
    ways = {
        "train.py to its first epoch": ([*train, *learned], "round 0 epoch 1:"),
        "webcam.py to its first face": ([*webcam, *film], tuple("0123456789")),
    }
    if os.environ.get("DISPLAY"):
        ways["webcam.py to a camera's first frame"] = (
            [webcam[0], "-c", CAMERA, *webcam[1:], "m"],
            "shown",
        )
    return ways | {
        "train.py from scratch, to its first epoch": ([*train, *scratch], "round 0 epoch 1:")
    }


def main():
    """Run both scripts in turns, plainly and watched, and print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data_dir", nargs="?", type=Path)
    parser.add_argument("weights", nargs="?", type=Path)
    parser.add_argument("--before", type=Path, metavar="FOLDER")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--image-size", default="224")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        prepare(args, Path(folder))
        ways = commands(args, ROOT)
        if args.before:
            ways |= {
                f"{name}, before": way
                for name, way in commands(args, args.before.resolve()).items()
            }
        plain, parts = {name: [] for name in ways}, {name: [] for name in ways}
        for _ in range(args.runs):
            for name, (command, mark) in ways.items():
                plain[name].append(measure(command, folder, mark, False)[0])
                if command[1] != "-c" and not name.endswith("before"):
                    parts[name].append(measure(command, folder, mark, True)[1])
    print(machine(), f"{args.image_size} px, n = {args.runs}", sep="\n")
    print_table(
        ["from the command", "s"], [[name, spread(seconds)] for name, seconds in plain.items()]
    )
    for name in ways:
        if not parts[name]:
            continue
        print_table(
            [name, "s"], [["in all, watched", spread([sum(part.values()) for part in parts[name]])]]
        )
        medians = {
            key: float(np.median([part[key] for part in parts[name]]))
            for key in set().union(*parts[name])
        }
        rows = sorted(((s, key) for key, s in medians.items() if s >= LEAST), reverse=True)
        print_table(["of these in", "s"], [[key, f"{seconds:.2f}"] for seconds, key in rows])


if __name__ == "__main__":
    main()
