"""Claim: ahead of what people would pick instead, in time to accuracy, on the same pictures, weights and cores.

    python benchmarks/peers.py DATA_DIR WEIGHTS_FILE
    python benchmarks/peers.py DATA_DIR WEIGHTS_FILE --runs 3 --max-minutes 30 --figure peers.png

train.py in the number format that it chooses and in float32, the transfer learning of Keras's guide, logistic
regression on features of the frozen network (after its last layer, and at `mixed8`), and fine-tuned torchvision where
that is installed: peer_*.py say what each does. Each in a process of its own, in turns, on one split; seconds count
from the command. The curves of the first run, validation accuracy against seconds, are drawn into one picture.
"""

import argparse
import importlib.util
import sys
import tempfile
from pathlib import Path

from common import (
    ROOT,
    accuracies,
    divide,
    machine,
    print_table,
    reached,
    run_command,
    save_figure,
    spread,
    time_to,
    train_py,
)
from PIL import Image

READABLE = (".jpg", ".jpeg", ".png", ".bmp", ".gif")  # by image_dataset_from_directory
MARKS = (0.8, 0.9, 0.95)
COLOURS = ("#0072b2", "#56b4e9", "#e69f00", "#009e73", "#cc79a7", "#000000")  # told apart by all


def parse_arguments():
    """Read the command line. Returns (arguments, options for train.py)."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data_dir", type=Path)
    parser.add_argument("weights", type=Path)
    parser.add_argument("--runs", type=int, default=1)
    parser.add_argument("--image-size", default="224")
    parser.add_argument(
        "--max-minutes",
        default="15",
        help="cut the guide and torchvision after so long (default: 15)",
    )
    parser.add_argument("--figure", default="peers.png", help="(default: %(default)s)")
    return parser.parse_known_args()


def make_readable(folder):
    """Turn pictures that Keras cannot read into PNG, before any clock runs."""
    for path in Path(folder).rglob("*.*"):
        if path.suffix not in READABLE:
            Image.open(path).convert("RGB").save(path.with_suffix(".png"))
            path.unlink()


def draw(path, curves):
    """Draw the first run of everybody."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator

    figure = Figure(figsize=(8, 3.6), layout="constrained")
    axes = figure.subplots()
    for (name, found), colour in zip(curves.items(), COLOURS):
        marker = "*-" if len(found[0]) == 1 else "o-"
        axes.plot(
            *zip(*found[0]),
            marker,
            color=colour,
            markersize=10 if marker == "*-" else 4,
            label=name,
        )
    axes.set(
        xscale="log",
        xlabel="seconds from the command",
        ylabel="validation accuracy",
        ylim=(0, 1.02),
    )
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper")
    save_figure(figure, path, 110)


def main():
    """Run everybody in turns, print the table, draw the curves."""
    args, options = parse_arguments()
    with tempfile.TemporaryDirectory() as folder:
        divide(args.data_dir, folder, *options)
        make_readable(folder)
        weights = str(args.weights.resolve())
        ours = train_py(
            args.data_dir.resolve(), *options, "--weights", weights, "--image-size", args.image_size
        )

        def peer(name, *more):
            return [
                sys.executable,
                str(ROOT / f"benchmarks/peer_{name}.py"),
                folder,
                weights,
                args.image_size,
                *more,
            ]

        ways = {
            "train.py": ours,
            "train.py --float32": [*ours, "--float32"],
            "Keras's guide": peer("guide", args.max_minutes),
            "logistic regression, last layer": peer("logistic", "mixed10"),
            "logistic regression, mixed8": peer("logistic", "mixed8"),
        }
        if importlib.util.find_spec("torchvision"):
            ways["torchvision"] = peer("torchvision", args.max_minutes)
        else:
            print("torchvision is not installed: left out")
        runs = {name: [] for name in ways}
        for _ in range(args.runs):
            for name, command in ways.items():
                runs[name].append(run_command(command, folder))
    curves = {name: [accuracies(run) for run in found] for name, found in runs.items()}
    print(
        machine(),
        f"{args.image_size} px, n = {args.runs}, the others cut after {args.max_minutes} min",
        sep="\n",
    )
    rows = []
    for name, found in curves.items():
        times = [reached([time_to(curve, mark) for curve in found]) for mark in MARKS]
        best = spread([max(accuracy for _, accuracy in curve) for curve in found], 4)
        rows.append([name, *times, best, spread([run.seconds for run in runs[name]], 1)])
    print_table(["way", *(f"s to {mark}" for mark in MARKS), "best accuracy", "s in all"], rows)
    for name, found in curves.items():
        print(
            f"{name}: "
            + ", ".join(f"{seconds:.1f} s {accuracy:.4f}" for seconds, accuracy in found[0])
        )
    draw(args.figure, curves)


if __name__ == "__main__":
    main()
