"""Shows that collect_apple_photos.py uses two cores, little memory, and hardly more time than decoding takes.

    python benchmarks/collect_speed.py
    python benchmarks/collect_speed.py --pictures 40 --runs 1

Draws a library of 500 twelve-megapixel JPEGs with four faces each (a few different pictures, linked many times)
and runs, in turns: the collector on one core, the collector on two, and a bare loop of two threads that only decodes
the same files with Pillow on two cores. Prints medians over the runs, the ratios, and the largest memory (resident,
the whole process tree) of the collector. Linux only: cores are chosen by their affinity.
"""

import argparse
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image
from PIL import __version__ as pillow_version

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))
from photos_library import Photos10, jpeg  # noqa: E402

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
            pixels = np.asarray(Image.fromarray(coarse).resize(SIZE, Image.Resampling.BICUBIC)) // 4 * 3 + noise
            originals.append(jpeg(Image.fromarray(pixels), 6 if number % 2 else 1))
            file.write_bytes(originals[-1])
            originals[-1] = file
        else:
            os.link(originals[number % DIFFERENT], file)
        size = SIZE if number % DIFFERENT % 2 == 0 else SIZE[::-1]
        for place, person in enumerate(persons):
            library.face(photo, person, size, (size[0] * (place + 1) / 5, size[1] / 2, 300))
    return library.finish()


def run(command, cores):
    """Run a command on these cores; return seconds, and the largest resident memory of all its processes in MB."""
    start, peak = time.monotonic(), 0
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, preexec_fn=lambda: os.sched_setaffinity(0, cores)
    )
    while process.poll() is None:
        peak = max(peak, sum(map(resident, family(process.pid))))
        time.sleep(0.02)
    if process.returncode:
        sys.exit(f"failed: {command}")
    return time.monotonic() - start, peak


def family(pid):
    """Return the process and all its children."""
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return []
    return [pid, *(grandchild for child in children for grandchild in family(int(child)))]


def resident(pid):
    """Return the resident memory of a process in MB, 0 when it has ended."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6
    except OSError:
        return 0


def main():
    """Draw the library, run everything in turns, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=500, help="(default: 500)")
    parser.add_argument("--runs", type=int, default=3, help="(default: 3)")
    args = parser.parse_args()
    two = sorted(os.sched_getaffinity(0))[:2]
    if len(two) < 2:
        sys.exit("needs two cores")
    with tempfile.TemporaryDirectory(dir=ROOT.parent if os.access(ROOT.parent, os.W_OK) else None) as folder:
        library, out = draw_library(Path(folder, "Test.photoslibrary"), args.pictures), Path(folder, "people")
        collector = [sys.executable, ROOT / "collect_apple_photos.py", library, out]
        decoder = [sys.executable, "-c", DECODE, library]
        times, peaks = {"collect, 1 core": [], "collect, 2 cores": [], "decode only, 2 cores": []}, []
        run(decoder, two)  # the files come from memory in every run that counts
        for _ in range(args.runs):
            for name, command, cores in zip(times, (collector, collector, decoder), (two[:1], two, two)):
                seconds, peak = run(command, cores)
                times[name].append(seconds)
                if command is collector:
                    peaks.append(peak)
                    shutil.rmtree(out)
    one, both, decoding = (statistics.median(values) for values in times.values())
    print(f"{platform.platform()}, {os.cpu_count()} cores, Python {platform.python_version()}, Pillow {pillow_version}")
    print(f"{args.pictures} pictures of {SIZE[0]} x {SIZE[1]}, {args.pictures * len(PEOPLE)} faces, {args.runs} runs")
    print(f"{'':22} {'median':>8} {'least':>8} {'most':>8}  seconds")
    for name, values in times.items():
        print(f"{name:22} {statistics.median(values):8.2f} {min(values):8.2f} {max(values):8.2f}")
    print(f"two cores against one: {one / both:.2f} times as fast (goal: at least 1.7)")
    print(f"against decoding alone: {both / decoding:.2f} times its time (goal: less than 2)")
    print(f"largest memory: {max(peaks):.0f} MB (goal: at most 300)")


if __name__ == "__main__":
    main()
