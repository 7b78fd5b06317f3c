"""Claim: nothing waits. The frozen pass runs at 95 % or more of what the cores can do.

    python benchmarks/frozen_pass.py DATA_DIR WEIGHTS_FILE

The ideal is pictures / ((network + augmentation core-seconds) / cores): the network's measured with a bare loop over
arrays in memory at the same batch size, the augmentation's in one thread. The pass, the loop and the augmentation take
turns, five times. For a GPU there is accelerator.py.
"""

import sys
import tempfile
import time

import numpy as np
from common import machine, print_table, set_up, spread, train, utils

RUNS = 5


def bare_loop(trunk, pixels, batches):
    """Return core-seconds and seconds a picture of a bare loop."""
    cpu, wall = time.process_time(), time.perf_counter()
    for _ in range(batches):
        utils.predict_batch(trunk, pixels)
    n = batches * len(pixels)
    return (time.process_time() - cpu) / n, (time.perf_counter() - wall) / n


def augmentation(run, count):
    """Return core-seconds a view, in one thread."""
    pairs = train.training_views(7, run.data.train, 0, count)
    start = time.thread_time()
    train.make_views(run, pairs)
    return (time.thread_time() - start) / count


def main():
    """Time network, augmentation and pass in turns, and print the table."""
    data_dir, weights = sys.argv[1:3]
    folder = tempfile.TemporaryDirectory()
    run = set_up(data_dir, folder.name, "--weights", weights, *sys.argv[3:])
    trunk, n = run.nets.fast.trunk, len(run.data.train)
    rows = [run.data.pictures[i].row for i in run.data.train[: run.nets.batch]]
    pixels = run.data.store.rows[rows].astype("float32")
    utils.predict_batch(trunk, pixels)
    network, walls, augment, passes = [], [], [], []
    for turn in range(RUNS):
        core, wall = bare_loop(trunk, pixels, 5)
        network.append(core)
        walls.append(1 / wall)
        augment.append(augmentation(run, 200))
        wanted = train.training_views(run.args.seed, run.data.train, turn * n, turn * n + n)
        start = time.perf_counter()
        train.fill_ring(run, run.rings.views, trunk, wanted, "views")
        passes.append(n / (time.perf_counter() - start))
    ideal = utils.cores() / (np.median(network) + np.median(augment))
    print(machine(), f"{run.nets.number_format}, n = {RUNS}, {n} views a pass", sep="\n")
    rows = [
        ["bare loop, pictures/s", spread(walls, 1)],
        ["network, core-ms a picture", spread([1e3 * x for x in network], 1)],
        ["augmentation, core-ms a view", spread([1e3 * x for x in augment])],
        ["frozen pass, pictures/s", spread(passes, 1)],
        ["ideal, pictures/s", f"{ideal:.1f}"],
        ["pass / ideal", f"{np.median(passes) / ideal:.3f}"],
    ]
    print_table(["what", "median (smallest to largest)"], rows)


if __name__ == "__main__":
    main()
