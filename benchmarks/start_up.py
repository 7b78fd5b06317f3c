"""Question: how long from the command to round 0, to the first tagged face, to a camera's picture?

    python benchmarks/start_up.py
    python benchmarks/start_up.py DATA_DIR WEIGHTS_FILE --runs 3 --image-size 224

train.py until the line of its round 0 (so the frozen pass over the pictures is in it); webcam.py
until the first line about a face in a film and, where a window can be opened, until a camera,
played by that film, is first shown. Without data 30 faces are drawn and the weights are random:
then little but start-up is left. The ways take turns.
"""

import os
import sys
import tempfile
from pathlib import Path

import common
import sample_faces

CAMERA = """
import os, runpy, sys
import cv2
film, window = cv2.VideoCapture, cv2.imshow
cv2.VideoCapture = lambda *_: film("film.mp4")
cv2.imshow = lambda *image: (window(*image), print("shown", flush=True), os._exit(0))
sys.argv = sys.argv[1:]
sys.path.insert(0, sys.argv[0].rpartition("/")[0])
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def prepare(args, folder):
    """Draw what was not given: faces, a film, random weights."""
    sample_faces.draw_clip(folder / "film.mp4", seconds=2)
    if not args.weights:
        args.data_dir, args.weights = folder / "people", folder / "x.weights.h5"
        sample_faces.draw_set(args.data_dir, pictures=6)
        builder = common.model.import_keras().applications.InceptionV3
        builder(weights=None, include_top=False).save_weights(args.weights)


def list_ways(args):
    """Return {what is measured: (command, what its last line begins with)}.

    The first one makes the model of the others.
    """
    webcam, recipe = str(common.ROOT / "webcam.py"), ["--image-size", args.image_size]
    recipe += ["--weights", args.weights.resolve(), "--rounds", 0]
    film = [sys.executable, webcam, "m", "--source", "film.mp4", "--no-display"]
    ways = {
        "train.py to round 0": (common.train_py(args.data_dir.resolve(), *recipe), "round 0: "),
        "webcam.py to a film's first face": (film, tuple("0123456789")),
    }
    if os.environ.get("DISPLAY"):
        camera = [sys.executable, "-c", CAMERA, webcam, "m"]
        ways["webcam.py to a camera's first frame"] = camera, "shown"
    return ways


def main():
    """Run all ways in turns, and print the table."""
    parser = common.make_parser(__doc__)
    parser.add_argument("data_dir", nargs="?", type=Path)
    parser.add_argument("weights", nargs="?", type=Path)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--image-size", default="224")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        prepare(args, Path(folder))
        ways = list_ways(args)
        seconds = {name: [] for name in ways}
        for _ in range(args.runs):
            for name, (command, mark) in ways.items():
                lines = common.run_command(command, folder).lines
                seconds[name].append(next(s for s, line in lines if line.startswith(mark)))
    common.print_machine(f"{args.image_size} px, n = {args.runs}")
    rows = [[name, common.spread(values)] for name, values in seconds.items()]
    common.print_table(["from the command", "s"], rows)


if __name__ == "__main__":
    main()
