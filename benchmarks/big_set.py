"""Claim: 110,000 small pictures are read and divided in under a minute; time grows linearly, memory hardly.

    python benchmarks/big_set.py
    python benchmarks/big_set.py --pictures 20000 --train

Draws that many different JPEGs of 96 x 96 pixels in 200 classes (and 1,000, 10,000 and 100,000 before), and
runs `train.py --dry-run` on them: seconds until the `images:` line, start-up included, and the largest `RssAnon`.
With --train, also a short training from scratch on the largest set (one epoch, no rounds, one view): its time, its
memory, and its mosaic. Linux only. 110,000 pictures take about 0.5 GB of disk, and training on them 5 GB more.
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np
from common import machine, print_table, run_command, train_py, utils
from PIL import Image

SIZES = (1_000, 10_000, 100_000)
SIDE = 96
QUICK = "--head-epochs 1 --rounds 0 --views 1".split()


def parse_arguments():
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--pictures", type=int, default=110_000, help="of the largest set (default: %(default)s)"
    )
    parser.add_argument("--classes", type=int, default=200, help="(default: %(default)s)")
    parser.add_argument("--image-size", type=int, default=75, help="(default: %(default)s)")
    parser.add_argument(
        "--train", action="store_true", help="train on the largest set, too (default: off)"
    )
    return parser.parse_args()


def draw(folder, count, classes):
    """Draw `count` pictures: a class has colours and the size of a disc, each picture its own noise and place."""
    import cv2

    cv2.setNumThreads(1)  # the pictures themselves are drawn side by side
    for number in range(classes):
        (folder / f"class{number:03d}").mkdir(parents=True)

    def picture(number):
        """Write one picture."""
        kind = np.random.default_rng(number % classes)
        ground, colour, radius = (
            kind.integers(30, 200, 3),
            kind.integers(30, 226, 3).tolist(),
            int(kind.integers(8, 30)),
        )
        rng = np.random.default_rng([1, number])
        pixels = (ground + rng.integers(0, 40, (SIDE, SIDE, 3))).astype("uint8")
        cv2.circle(pixels, tuple(rng.integers(20, SIDE - 20, 2).tolist()), radius, colour, -1)
        (folder / f"class{number % classes:03d}" / f"{number:06d}.jpg").write_bytes(
            cv2.imencode(".jpg", pixels)[1]
        )

    for _ in utils.ordered_parallel_map(picture, range(count)):
        pass


def main():
    """Draw and read sets of growing size, train on the largest if asked to, and print the table."""
    args = parse_arguments()
    sizes = [size for size in SIZES if size < args.pictures] + [args.pictures]
    options = ["--weights", "none", "--image-size", args.image_size]
    print(machine(), f"{args.classes} classes, {args.image_size} px, n = 1", sep="\n")
    rows = []
    for size in sizes:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            draw(folder / "pictures", size, args.classes)
            done = run_command(train_py("pictures", *options, "--dry-run"), folder)
            seconds, line = next((s, line) for s, line in done.lines if line.startswith("images:"))
            rows.append(
                [f"{size:,}", f"{seconds:.1f}", f"{size / seconds:.0f}", f"{done.peak:.0f}"]
            )
            if args.train and size == args.pictures:
                trained = run_command(train_py("pictures", *options, *QUICK), folder)
                with Image.open(folder / "000.png") as mosaic:
                    picture = f"mosaic {mosaic.width} x {mosaic.height}"
                files = ", ".join(
                    f"{p.name} {p.stat().st_size / 1e6:.1f} MB"
                    for p in sorted(folder.glob("[0m]*.*"))
                )
    print_table(["pictures", "s until read and divided", "pictures/s", "largest RssAnon, MB"], rows)
    print(f"largest set: {line}")
    if args.train:
        print(
            f"training ({' '.join(QUICK)}): {trained.seconds:.0f} s, largest RssAnon {trained.peak:.0f} MB, {picture}"
        )
        print(*(f"  {seconds:7.1f} s  {line}" for seconds, line in trained.lines), files, sep="\n")


if __name__ == "__main__":
    main()
