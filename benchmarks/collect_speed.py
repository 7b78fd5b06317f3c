"""Claim: collect_apple_photos.py uses two cores, little memory, and hardly more time than decoding takes.

    python benchmarks/collect_speed.py
    python benchmarks/collect_speed.py --pictures 40 --runs 1

Draws a library of 500 twelve-megapixel JPEGs with four faces each (a few different pictures, linked many times) and
runs, in turns: the collector on one core, the collector on two, and a bare loop of two threads that only decodes the
same files with Pillow on two cores. Works in a temporary folder beside the kit. Prints seconds, their ratios, and the
largest memory (resident, the whole process tree) of the collector. Linux only: cores are chosen by their affinity.
"""

import argparse
import functools
import os
import shutil
import statistics
import sys
import tempfile
from pathlib import Path

import numpy as np
from common import ROOT, machine, print_table, run_command, spread
from photos_library import Photos10, jpeg
from PIL import Image

SIZE = (4032, 3024)  # pixels of a telephone's picture
DIFFERENT = 8  # pictures that are drawn; the others are links to them
PEOPLE = ("Ann", "Ben", "Cleo", None)
DECODE = """
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from PIL import Image
def decode(path):
    Image.open(path).load()
with ThreadPoolExecutor(2) as pool:
    list(pool.map(decode, Path(sys.argv[1]).rglob("*.jpeg")))
"""


def draw_library(path, pictures):
    """Make a library of `pictures` twelve-megapixel photos, each with the four people."""
    library, rng = Photos10(path), np.random.default_rng(1)
    persons = [name and library.person(name) for name in PEOPLE]
    originals = []
    for number in range(pictures):
        photo = library.photo()
        file = library.path / f"originals/{library.uuid(photo)[0]}/{library.uuid(photo)}.jpeg"
        file.parent.mkdir(parents=True, exist_ok=True)
        if number < DIFFERENT:
            coarse = rng.integers(0, 256, (SIZE[1] // 48, SIZE[0] // 48, 3), dtype=np.uint8)
            noise = rng.integers(0, 24, (SIZE[1], SIZE[0], 3), dtype=np.uint8)
            pixels = (
                np.asarray(Image.fromarray(coarse).resize(SIZE, Image.Resampling.BICUBIC)) // 4 * 3
                + noise
            )
            file.write_bytes(jpeg(Image.fromarray(pixels), 6 if number % 2 else 1))
            originals.append(file)
        else:
            os.link(originals[number % DIFFERENT], file)
        size = SIZE if number % DIFFERENT % 2 == 0 else SIZE[::-1]
        for place, person in enumerate(persons):
            library.face(photo, person, size, (size[0] * (place + 1) / 5, size[1] / 2, 300))
    return library.finish()


def main():
    """Run collector and decoder in turns, and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pictures", type=int, default=500, help="(default: 500)")
    parser.add_argument("--runs", type=int, default=3, help="(default: 3)")
    args = parser.parse_args()
    two = sorted(os.sched_getaffinity(0))[:2]
    if len(two) < 2:
        sys.exit("needs two cores")
    with tempfile.TemporaryDirectory(
        dir=ROOT.parent if os.access(ROOT.parent, os.W_OK) else None
    ) as folder:
        library, out = (
            draw_library(Path(folder, "Test.photoslibrary"), args.pictures),
            Path(folder, "people"),
        )
        collector = [sys.executable, ROOT / "collect_apple_photos.py", library, out]
        decoder = [sys.executable, "-c", DECODE, library]
        seconds, peaks = (
            {"collect, 1 core": [], "collect, 2 cores": [], "decode only, 2 cores": []},
            [],
        )
        run_command(decoder)  # the files come from memory in every run that counts
        for _ in range(args.runs):
            for name, command, cores in zip(
                seconds, (collector, collector, decoder), (two[:1], two, two)
            ):
                pin = functools.partial(os.sched_setaffinity, 0, cores)
                done = run_command(command, field="VmRSS", preexec_fn=pin)
                seconds[name].append(done.seconds)
                if command is collector:
                    peaks.append(done.peak)
                    shutil.rmtree(out)
    one, both, decoding = (statistics.median(values) for values in seconds.values())
    print(
        machine(),
        f"{args.pictures} pictures of {SIZE[0]} x {SIZE[1]}, {args.pictures * len(PEOPLE)} faces",
        sep="\n",
    )
    print_table(
        ["way", f"s, n = {args.runs}"], [[name, spread(values)] for name, values in seconds.items()]
    )
    print(f"two cores against one: {one / both:.2f} times as fast (goal: at least 1.7)")
    print(f"against decoding alone: {both / decoding:.2f} times its time (goal: less than 2)")
    print(f"largest memory: {max(peaks):.0f} MB (goal: at most 300)")


if __name__ == "__main__":
    main()
