"""Claim: the memory a training run itself holds grows with neither the pictures nor the views.

    python benchmarks/memory.py

Draws 400 and 4,000 pictures, trains on both with few and many views at 75 px (random weights for the frozen part),
and prints the largest `RssAnon` from the first picture read to the end. Linux only.
"""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from common import ROOT, machine, print_table
from PIL import Image


def draw(folder, count):
    """Draw `count` noisy pictures in four classes."""
    rng = np.random.default_rng(0)
    for i in range(count):
        path = folder / f"class{i % 4}" / f"{i:05d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        color = np.eye(4)[i % 4][:3] * 100 + 60
        Image.fromarray((color + rng.random((120, 120, 3)) * 90).astype("uint8")).save(path)


def peak(folder, data, weights, views):
    """Train and return the largest RssAnon in MB."""
    command = [sys.executable, str(ROOT / "train.py"), str(data), "m", "--weights", str(weights), "--image-size", "75",
               "--rounds", "2", "--round-epochs", "1", "--head-epochs", "2", "--views", str(views)]  # fmt: skip
    process = subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    largest = 0
    while process.poll() is None:
        status = Path(f"/proc/{process.pid}/status").read_text()
        found = [int(line.split()[1]) for line in status.splitlines() if line.startswith("RssAnon")]
        largest = max([largest, *found])
        time.sleep(0.05)
    if process.returncode:
        sys.exit("the run failed")
    return largest / 1024


def random_weights(path):
    """Save the random weights of InceptionV3 without its top."""
    program = (
        "import keras; keras.applications.InceptionV3(weights=None, include_top=False, "
        f"input_shape=(75, 75, 3)).save_weights({str(path)!r})"
    )
    subprocess.run([sys.executable, "-c", program], check=True, stderr=subprocess.DEVNULL, env=os.environ)


def main():
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        random_weights(folder / "x.weights.h5")
        rows = []
        for count in (400, 4000):
            draw(folder / str(count), count)
            for views in (2, 8):
                rows.append([count, views, f"{peak(folder, folder / str(count), folder / 'x.weights.h5', views):.0f}"])
    print(machine(), "n = 1", sep="\n")
    print_table(["pictures", "views at the start", "largest RssAnon, MB"], rows)


if __name__ == "__main__":
    main()
