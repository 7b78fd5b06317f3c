"""Claim: the memory a training run itself holds grows with neither the pictures nor the views.

    python benchmarks/memory.py

Draws 400 and 4,000 pictures, trains on both with few and many views at 75 px (random weights for the frozen part),
and prints the largest `RssAnon` of the whole process, start-up included. Linux only.
"""

import tempfile
from pathlib import Path

import numpy as np
from common import machine, print_table, random_weights, run_command, train_py
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
    options = "--image-size 75 --rounds 2 --round-epochs 1 --head-epochs 2".split()
    return run_command(train_py(data, "--weights", weights, "--views", views, *options), folder).peak


def main():
    """Train on few and many pictures with few and many views, and print the table."""
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
