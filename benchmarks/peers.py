"""Claim: ahead of what people would pick instead, in time to accuracy, on the same pictures.

    python benchmarks/peers.py DATA_DIR WEIGHTS_FILE
    python benchmarks/peers.py DATA_DIR WEIGHTS_FILE --runs 3 --max-minutes 30 --figure peers.png

The others are as peer_*.py say. Each is a process of its own, with the same weights and cores, in
turns, on one split; seconds count from the command. The curves of the first run, validation
accuracy against seconds, are drawn.
"""

import sys
import tempfile
from pathlib import Path

import common
from common import spread
from PIL import Image

READABLE = (".jpg", ".jpeg", ".png", ".bmp", ".gif")  # by image_dataset_from_directory
MARKS = (0.8, 0.9, 0.95)
# told apart by all
COLOURS = ("#0072b2", "#e69f00", "#d55e00", "#009e73", "#cc79a7", "#000000")


def make_readable(folder):
    """Turn pictures that Keras cannot read into PNG, before any clock runs."""
    for path in Path(folder).rglob("*.*"):
        if path.suffix not in READABLE:
            Image.open(path).convert("RGB").save(path.with_suffix(".png"))
            path.unlink()


def list_ways(args, folder, options):
    """Return {name: command} of all that are compared."""
    weights, side = str(args.weights.resolve()), args.image_size
    ours = common.train_py(args.data_dir.resolve(), "--weights", weights, "--image-size", side)
    ours += options

    def peer(name, last):
        script = common.ROOT / "benchmarks" / f"peer_{name}.py"
        return [sys.executable, str(script), folder, weights, side, last]

    return {
        "train.py": ours,
        "Keras's guide": peer("guide", args.max_minutes),
        "recipe of 2016": peer("2016", args.max_minutes),
        "logistic regression, last layer": peer("logistic", "mixed10"),
        "logistic regression, mixed8": peer("logistic", "mixed8"),
        "ridge regression, mixed8": peer("ridge", "mixed8"),
    }


def draw(path, curves):
    """Draw the first run of everybody."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator

    figure = Figure(figsize=(8, 3.6), layout="constrained")
    axes = figure.subplots()
    for (name, found), colour in zip(curves.items(), COLOURS):
        style, size = ("*-", 10) if len(found[0]) == 1 else ("o-", 4)
        axes.plot(*zip(*found[0]), style, color=colour, markersize=size, label=name)
    axes.set(xscale="log", xlabel="seconds from the command")
    axes.set(ylabel="validation accuracy", ylim=(0, 1.02))
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper")
    common.save_figure(figure, path, 110)


def main():
    """Run everybody in turns, print the table, draw the curves."""
    parser = common.make_parser(__doc__)
    parser.add_argument("data_dir", type=Path)
    parser.add_argument("weights", type=Path)
    parser.add_argument("--runs", type=int, default=1)
    parser.add_argument("--image-size", default="224")
    parser.add_argument("--max-minutes", default="15", help="cut the guide and 2016 (default: 15)")
    parser.add_argument("--figure", default="peers.png", help="(default: %(default)s)")
    args, options = parser.parse_known_args()
    options = common.absolute(options)
    with tempfile.TemporaryDirectory() as folder:
        common.divide(args.data_dir, folder, *options, "--image-size", args.image_size)
        make_readable(folder)
        ways = list_ways(args, folder, options)
        runs = {name: [] for name in ways}
        for _ in range(args.runs):
            for name, command in ways.items():
                runs[name].append(common.run_command(command, folder))
    curves = {name: [common.accuracies(run) for run in found] for name, found in runs.items()}
    common.print_machine(f"{args.image_size} px, n = {args.runs}, options: {' '.join(options)}")
    rows = []
    for name, found in curves.items():
        times = ([common.time_to(curve, mark) for curve in found] for mark in MARKS)
        best = spread([max(accuracy for _, accuracy in curve) for curve in found], 4)
        seconds = spread([run.seconds for run in runs[name]], 1)
        rows.append([name, *map(common.reached, times), best, seconds])
    marks = [f"s to {mark}" for mark in MARKS]
    common.print_table(["way", *marks, "best accuracy", "s in all"], rows)
    draw(args.figure, curves)


if __name__ == "__main__":
    main()
