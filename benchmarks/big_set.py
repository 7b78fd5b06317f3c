"""Claim: 110,000 small pictures are read and divided in under a minute, in little memory.

    python benchmarks/big_set.py
    python benchmarks/big_set.py --pictures 20000 --train

Draws that many different JPEGs of 96 x 96 pixels in 200 classes (and 1,000, 10,000 and 100,000
before), and runs `train.py --dry-run` on them: seconds until the `images:` line, start-up
included, and the largest `RssAnon`. With --train, also a short training from scratch on the
largest set (one epoch, no rounds, one view). Linux only. 110,000 pictures take about 0.5 GB of
disk, and training on them 5 GB more.
"""

import tempfile
from pathlib import Path

import common
import numpy as np

SIZES = (1_000, 10_000, 100_000)
SIDE, CLASSES = 96, 200
OPTIONS = "--weights none --image-size 75".split()
QUICK = "--head-epochs 1 --rounds 0 --views 1".split()


def draw(folder, count):
    """Draw pictures of discs: a class has colours and a radius, each picture its own noise."""
    import cv2

    cv2.setNumThreads(1)  # the pictures themselves are drawn side by side
    for number in range(CLASSES):
        (folder / f"class{number:03d}").mkdir(parents=True)

    def picture(number):
        """Draw one picture."""
        kind = np.random.default_rng(number % CLASSES)
        ground, colour = kind.integers(30, 200, 3), kind.integers(30, 226, 3).tolist()
        radius = int(kind.integers(8, 30))
        rng = np.random.default_rng([1, number])
        pixels = (ground + rng.integers(0, 40, (SIDE, SIDE, 3))).astype("uint8")
        cv2.circle(pixels, tuple(rng.integers(20, SIDE - 20, 2).tolist()), radius, colour, -1)
        path = folder / f"class{number % CLASSES:03d}" / f"{number:06d}.jpg"
        path.write_bytes(cv2.imencode(".jpg", pixels)[1])

    for _ in common.utils.ordered_parallel_map(picture, range(count)):
        pass


def train_on(folder):
    """Train from scratch, and print seconds, memory, and the lines that it prints."""
    done = common.run_command(common.train_py("pictures", *OPTIONS, *QUICK), folder)
    facts = f"{done.seconds:.0f} s, largest RssAnon {done.peak:.0f} MB"
    print(f"training ({' '.join(QUICK)}): {facts}")
    print(*(f"  {seconds:7.1f} s  {line}" for seconds, line in done.lines), sep="\n")


def main():
    """Draw and read sets of growing size, train on the largest if asked to, and print the table."""
    parser = common.make_parser(__doc__)
    parser.add_argument("--pictures", type=int, default=110_000, help="(default: %(default)s)")
    parser.add_argument("--train", action="store_true", help="on the largest set (default: off)")
    args = parser.parse_args()
    common.print_machine(f"{CLASSES} classes, n = 1, {' '.join(OPTIONS)}")
    rows = []
    for size in [size for size in SIZES if size < args.pictures] + [args.pictures]:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            draw(folder / "pictures", size)
            done = common.run_command(common.train_py("pictures", *OPTIONS, "--dry-run"), folder)
            seconds, line = next((s, line) for s, line in done.lines if line.startswith("images:"))
            print(line, flush=True)
            rate, memory = f"{size / seconds:.0f}", f"{done.peak:.0f}"
            rows.append([f"{size:,}", f"{seconds:.1f}", rate, memory])
            if args.train and size == args.pictures:
                train_on(folder)
    names = ["pictures", "s until read and divided", "pictures/s", "largest RssAnon, MB"]
    common.print_table(names, rows)


if __name__ == "__main__":
    main()
