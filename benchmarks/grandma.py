"""Claim: with --cache-dir, twenty pictures more cost a tenth of the frozen pass.

    python benchmarks/grandma.py DATA_DIR WEIGHTS_FILE
    python benchmarks/grandma.py DATA_DIR WEIGHTS_FILE --runs 1 --image-size 96

Runs train.py on DATA_DIR with an empty cache, then again after 20 drawn faces, as a class `grandma`, were added. Both
make the views of a whole run, with one short epoch a round; watched.py tells the seconds in which the main thread reads
pictures, looks through the kept cache and fills it (what is written while reading counts as filling).
"""

import argparse
import shutil
import tempfile
import time
from pathlib import Path

from common import (
    link_classes,
    machine,
    print_table,
    read_folder,
    run_command,
    spread,
    time_in_functions,
    train_py,
    watched_command,
)

ADDED = 20
ALL_VIEWS = "--head-epochs 1 --round-epochs 1 --patience 0".split()
PARTS = {  # the innermost functions of train.py that belong to each
    "reading": {"read_pictures"},
    "looking through the cache": {"open_ring", "checksum"},
    "frozen pass": {"fill_ring", "claim_slots", "write_rows"},
}


def one_run(folder, options):
    """Train once. Returns ({part: seconds}, size of the cache in GB)."""
    command = watched_command(train_py("people", "--cache-dir", "cache", *ALL_VIEWS, *options), folder / "notes")
    start = time.monotonic()
    done = run_command(command, folder)
    found = time_in_functions(folder / "notes", start, done.seconds)
    seconds = {}
    for part, functions in PARTS.items():
        seconds[part] = sum(s for name, s in found.items() if name.split(" > ")[0] in functions)
    size = sum(path.stat().st_blocks * 512 for path in (folder / "cache").iterdir()) / 1e9
    return seconds | {"together": sum(seconds.values()), "whole run": done.seconds}, size


def main():
    """Run both in turns and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data_dir", type=Path)
    parser.add_argument("weights", type=Path)
    parser.add_argument("--runs", type=int, default=3)
    args, options = parser.parse_known_args()
    options += ["--weights", args.weights.resolve()]
    import sample_faces

    _, labels, paths = read_folder(args.data_dir, 75)
    firsts, seconds = [], []
    for _ in range(args.runs):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            link_classes(paths, labels, range(len(paths)), folder / "people")
            firsts.append(one_run(folder, options)[0])
            sample_faces.draw_set(folder / "drawn", 1, ADDED)
            shutil.move(next((folder / "drawn").iterdir()), folder / "people" / "grandma")
            found, size = one_run(folder, options)
            seconds.append(found)
    print(machine(), f"{len(paths)} pictures and {ADDED} more, n = {args.runs}, cache {size:.2f} GB", sep="\n")
    rows = []
    for part in firsts[0]:
        before, after = [run[part] for run in firsts], [run[part] for run in seconds]
        ratios = [b / a if a else 0 for a, b in zip(before, after)]
        rows.append([part, spread(before, 1), spread(after, 1), spread(ratios, 3)])
    print_table(["seconds", "first run", f"with {ADDED} more", "ratio"], rows)


if __name__ == "__main__":
    main()
