"""Claim: collect_apple_photos.py uses two cores, little memory, and hardly more time than decoding.

    python benchmarks/collect_speed.py
    python benchmarks/collect_speed.py --pictures 40 --runs 1

Draws a library of 500 twelve-megapixel JPEGs with four faces each (a few different pictures,
linked many times) and runs, in turns: the collector on one core, the collector on two, and two
threads that only decode the same files with Pillow. Memory is the largest resident one of the
collector. Linux only: cores are chosen by their affinity.
"""

import functools
import os
import shutil
import statistics
import sys
import tempfile
from pathlib import Path

import common
import numpy as np
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
with ThreadPoolExecutor(2) as pool:
    list(pool.map(lambda path: Image.open(path).load(), Path(sys.argv[1]).rglob("*.jpeg")))
"""


def draw_picture(rng):
    """Return a picture of coloured clouds with noise, an RGB image of SIZE."""
    coarse = rng.integers(0, 256, (SIZE[1] // 48, SIZE[0] // 48, 3), dtype=np.uint8)
    clouds = np.asarray(Image.fromarray(coarse).resize(SIZE, Image.Resampling.BICUBIC))
    noise = rng.integers(0, 24, (SIZE[1], SIZE[0], 3), dtype=np.uint8)
    return Image.fromarray(clouds // 4 * 3 + noise)


def draw_library(path, pictures):
    """Make a library of `pictures` twelve-megapixel photos, each with the four people."""
    library, rng = Photos10(path), np.random.default_rng(1)
    persons = [name and library.person(name) for name in PEOPLE]
    originals = []
    for number in range(pictures):
        photo, is_turned = library.photo(), number % DIFFERENT % 2
        file = library.path / f"originals/{library.uuid(photo)[0]}/{library.uuid(photo)}.jpeg"
        file.parent.mkdir(parents=True, exist_ok=True)
        if number < DIFFERENT:
            file.write_bytes(jpeg(draw_picture(rng), 6 if is_turned else 1))
            originals.append(file)
        else:
            os.link(originals[number % DIFFERENT], file)
        size = SIZE[::-1] if is_turned else SIZE
        for place, person in enumerate(persons):
            library.face(photo, person, size, (size[0] * (place + 1) / 5, size[1] / 2, 300))
    return library.finish()


def measure(folder, pictures, runs, cores):
    """Run collector and decoder in turns. Returns ({way: [seconds]}, largest memory in MB)."""
    library, out = draw_library(folder / "Test.photoslibrary", pictures), folder / "people"
    collector = [sys.executable, common.ROOT / "collect_apple_photos.py", library, out]
    decoder = [sys.executable, "-c", DECODE, library]
    ways = {"collect, 1 core": (collector, cores[:1]), "collect, 2 cores": (collector, cores)}
    ways["decode only, 2 cores"] = decoder, cores
    seconds, peak = {name: [] for name in ways}, 0
    common.run_command(decoder)  # the files come from memory in every run that counts
    for _ in range(runs):
        for name, (command, some) in ways.items():
            pin = functools.partial(os.sched_setaffinity, 0, some)
            done = common.run_command(command, field="VmRSS", preexec_fn=pin)
            seconds[name].append(done.seconds)
            if command is collector:
                peak = max(peak, done.peak)
                shutil.rmtree(out)
    return seconds, peak


def main():
    """Measure, and print the table."""
    parser = common.make_parser(__doc__)
    parser.add_argument("--pictures", type=int, default=500, help="(default: 500)")
    parser.add_argument("--runs", type=int, default=3, help="(default: 3)")
    args = parser.parse_args()
    cores = sorted(os.sched_getaffinity(0))[:2]
    if len(cores) < 2:
        sys.exit("needs two cores")
    with tempfile.TemporaryDirectory() as folder:
        seconds, peak = measure(Path(folder), args.pictures, args.runs, cores)
    one, both, decoding = map(statistics.median, seconds.values())
    faces = f"{args.pictures * len(PEOPLE)} faces"
    common.print_machine(f"{args.pictures} pictures of {SIZE[0]} x {SIZE[1]}, {faces}")
    rows = [[name, common.spread(values)] for name, values in seconds.items()]
    common.print_table(["way", f"s, n = {args.runs}"], rows)
    print(f"two cores against one: {one / both:.2f} times as fast (goal: at least 1.7)")
    print(f"against decoding alone: {both / decoding:.2f} times its time (goal: less than 2)")
    print(f"largest memory: {peak:.0f} MB (goal: at most 300)")


if __name__ == "__main__":
    main()
