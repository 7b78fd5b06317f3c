"""Claim: fine-tuning from the cache is over 3 times as fast as end to end, and gives the same result.

    python benchmarks/cached_fine_tuning.py DATA_DIR WEIGHTS_FILE [--seeds 3] [--rounds 4]

Both ways start from the same trained dense layers and see the same views in the same order; end to end, the frozen
part runs inside the graph in every step. Processes take turns, one a way and seed. Prints pictures per second within
epochs, the largest difference of the losses of the first ten steps (float32), and the accuracy.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from common import machine, print_table, set_up, spread, train


def end_to_end(run):
    """Return the run with the whole network as the model to train, its frozen part inside, and a ring of pictures."""
    top = run.nets.fast.top
    network = train.utils.import_keras().Model(run.nets.network.input, top.get_layer("trained").output)
    trained = set(map(id, top.layers))
    for layer in network.layers:
        layer.trainable = layer.trainable and id(layer) in trained
    slots, shape = len(run.rings.views.keys.rows), run.data.store.rows.shape[1:]
    ring = train.open_ring(run.args, "pictures", slots, shape, "uint8")
    fast = run.nets.fast._replace(top=network, trunk=None)
    return run._replace(rings=run.rings._replace(views=ring), nets=run.nets._replace(fast=fast))


def one_way(way, args):
    """Train the dense layers, then `--rounds` rounds one way, in this process. Returns the figures."""
    folder = tempfile.TemporaryDirectory()
    options = ["--weights", args.weights, "--seed", args.seed, "--float32", "--rounds", args.rounds]
    run = start = set_up(args.data_dir, folder.name, *options)
    run.recipe["rounds"] = 0
    train.train_rounds(run, None)  # the dense layers, the same for both
    if way == "end to end":
        run = end_to_end(run)
    model, ring, data = run.nets.fast.top, run.rings.views, run.data
    epochs, run.recipe["rounds"] = run.recipe["round_epochs"], args.rounds
    train.prepare(run, model)
    losses, seconds, step = [], [], model.train_on_batch

    def noted(*batch):
        losses.append(step(*batch))
        return losses[-1]

    model.train_on_batch = noted
    targets = np.eye(len(data.labels), dtype="float32")[data.targets]
    for number in range(1, args.rounds + 1):
        window = train.ring_window(run, number)
        train.fill_ring(run, ring, run.nets.fast.trunk, window, "views")
        slots = train.find_slots(run, ring, window)
        for epoch in range(1, epochs + 1):
            pairs = train.epoch_order(args.seed, window, slots, number, epoch)
            clock = time.perf_counter()
            train.train_epoch(run, model, ring.features.rows, pairs, targets, "epoch")
            seconds.append((time.perf_counter() - clock) / len(pairs))
    hidden, _, _ = train.last_units(start, start.rings.plain, data.validation, train.PLAIN)
    probabilities = train.answers(hidden, start.nets.full.top.get_layer("trained").get_weights())
    right = int((probabilities.argmax(1) == data.targets[data.validation]).sum())
    speed = 1 / float(np.median(seconds[1:]))  # the first epoch compiles
    return {"speed": speed, "right": right, "of": len(data.validation), "losses": [float(x[0]) for x in losses[:10]]}


def main():
    """Run both ways in turns, in processes of their own, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data_dir")
    parser.add_argument("weights")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--way", help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.way:
        print(json.dumps(one_way(args.way, args)))
        return
    results = {"cached": [], "end to end": []}
    for seed in range(1, args.seeds + 1):
        for way, found in results.items():
            options = ["--way", way, "--seed", str(seed), "--rounds", str(args.rounds)]
            files = [str(Path(path).resolve()) for path in (__file__, args.data_dir, args.weights)]
            with tempfile.TemporaryDirectory() as folder:  # where the mosaic of the first round lies
                command = [sys.executable, *files, *options]
                done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
            if done.returncode:
                sys.exit(done.stderr)
            found.append(json.loads(done.stdout.splitlines()[-1]))
    print(machine(), f"float32, n = {args.seeds} seeds, {args.rounds} rounds", sep="\n")
    print_table(
        ["way", "pictures/s in an epoch", "right, mean"],
        [[way, spread([r["speed"] for r in found], 1), f"{np.mean([r['right'] for r in found]):.2f}"]
         for way, found in results.items()],
    )  # fmt: skip
    pairs = list(zip(*results.values()))
    ratio = np.median([cached["speed"] / whole["speed"] for cached, whole in pairs])
    gap = max(np.abs(np.subtract(cached["losses"], whole["losses"])).max() for cached, whole in pairs)
    print(f"cached / end to end: {ratio:.2f}; largest difference of the first ten losses: {gap:.4f}")


if __name__ == "__main__":
    main()
