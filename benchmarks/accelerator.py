"""Claim: a GPU is kept busy by the frozen pass. And how many pictures a second each phase takes.

    KERAS_BACKEND=jax python benchmarks/accelerator.py DATA_DIR WEIGHTS_FILE

The pass is compared with a bare loop of the frozen part over one batch that lies in the device's memory, and with what
the cores can prepare for it: the pictures and the numbers by which the device changes them. These three take turns,
five times. The other phases follow, as train.py and webcam.py compute them, on what the pass has kept, and what the
cores do with the device's answers: checksums and writing. Options of train.py follow the weights; --number-format X,
first, takes a Keras dtype policy instead of what the trial finds. Takes up to 8 GB of disk.
"""

import functools
import sys
import tempfile
import time

import numpy as np
from common import machine, print_table, set_up, spread, train, utils

RUNS = 5
BATCHES = 64  # a pass
STEPS = 100  # of training


def rate(work, count):
    """Return how many pictures a second a function takes that works on so many."""
    start = time.perf_counter()
    work()
    return count / (time.perf_counter() - start)


def bare_loop(trunk, pixels):
    """Run the frozen part so many times on one batch that lies in the device's memory, and wait for the last."""
    for _ in range(BATCHES):
        found = utils.predict_batch(trunk, pixels)
    np.asarray(found)


def prepare(run, batches):
    """Make of the pictures what the device is given, ahead in threads, as the pass does."""
    rows, pictures = run.data.store.rows, run.data.pictures

    def inputs(batch):
        """Return the pictures and changes of a full batch."""
        keys = [(pictures[i].digest, view) for i, view in batch]
        return rows[[pictures[i].row for i, _ in batch]], train.draw_changes(run.args, rows.shape[1], keys)

    for _ in utils.in_order(inputs if run.nets.augmentation else lambda b: train.make_views(run, b), batches, 4):
        pass


def keep(run, features, count):
    """Do with features what the pass does with them: checksums in threads, and writing."""
    for n, _ in enumerate(utils.in_order(lambda f: [train.checksum(row) for row in f], [features] * count, 4)):
        train.write_rows(run.rings.views.features, range(n * len(features), (n + 1) * len(features)), features)


def phases(run, window):
    """Return {phase: function that works on some pictures, how many}, the pass done."""
    data, nets, ring = run.data, run.nets, run.rings.views
    count = STEPS * run.recipe["batch_size"]
    run = run._replace(data=data._replace(most=count))
    targets = np.eye(len(data.labels), dtype="float32")[data.targets]
    pooled, _ = train.predict_views(run, nets.fast.pool, ring, window)
    order = np.column_stack([train.find_slots(run, ring, window), [i for i, _ in window]])
    train.prepare(run, nets.fast.head)
    train.prepare(run, nets.fast.top)
    squares = data.store.rows[: run.nets.batch]
    one, many = (np.resize(squares, (size, *squares.shape[1:])) for size in (1, 8))
    network = utils.compiled(nets.network)

    def epoch(model, rows, order):
        model.optimizer.iterations.assign(0)  # else the schedule of rates ends
        return train.train_epoch(run, model, rows, order, targets, "epoch")

    places = np.column_stack([np.arange(len(window)), order[:, 1]])
    pool = functools.partial(train.predict_views, run, nets.fast.pool, ring, window)
    return {
        "pooling what it gave": (pool, len(window)),
        "training the dense layers": (functools.partial(epoch, nets.fast.head, pooled, places), count),
        "training the top blocks": (functools.partial(epoch, nets.fast.top, ring.features.rows, order), count),
        "scoring with the whole network": (
            functools.partial(utils.predict, network, squares, len(squares)),
            len(squares),
        ),
        "tagging 8 faces at once": (functools.partial(utils.predict, network, many, 8), 8),
        "tagging one face": (functools.partial(utils.predict, network, one, 1), 1),
    }


def main():
    """Time the pass beside its limits, then the other phases, and print the table."""
    options = sys.argv[1:]
    if options[0] == "--number-format":
        number_format, options = options[1], options[2:]
        train.fastest_format = lambda args: number_format
    folder = tempfile.TemporaryDirectory()
    run = set_up(options[0], folder.name, "--weights", options[1], "--views", 999, "--cache-gb", 8, *options[2:])
    size = BATCHES * run.nets.batch
    trunk, ring = run.nets.fast.trunk, run.rings.views
    keras = utils.import_keras()
    wanted = train.training_views(run.args.seed, run.data.train, 0, size)
    pixels = keras.ops.convert_to_tensor(train.make_views(run, wanted[: run.nets.batch]))
    bare_loop(trunk, pixels)
    train.fill_ring(run, ring, trunk, wanted, "views")
    found = {name: [] for name in ("bare loop", "prepare", "pass")}
    features = np.array(ring.features.rows[: run.nets.batch])
    for turn in range(1, RUNS + 1):
        wanted = train.training_views(run.args.seed, run.data.train, turn * size, (turn + 1) * size)
        batches = train.in_batches(wanted, run.nets.batch)
        found["bare loop"].append(rate(lambda: bare_loop(trunk, pixels), size))
        found["prepare"].append(rate(lambda b=batches: prepare(run, b), size))
        found["pass"].append(rate(lambda w=wanted: train.fill_ring(run, ring, trunk, w, "views"), size))
    for name, (work, count) in phases(run, wanted).items():
        work()
        found[name] = [rate(work, count) for _ in range(RUNS)]
    found["checksums and writing alone"] = [rate(lambda: keep(run, features, BATCHES), size) for _ in range(RUNS)]
    print(machine(), f"{keras.distribution.list_devices()}, {run.nets.number_format}, n = {RUNS}", sep="\n")
    print_table(["pictures/s", "median (smallest to largest)"], [[name, spread(v, 0)] for name, v in found.items()])
    limit = min(np.median(found["bare loop"]), np.median(found["prepare"]))
    print(f"pass / the lower of bare loop and prepare: {np.median(found['pass']) / limit:.2f}")


if __name__ == "__main__":
    main()
