"""What the benchmarks share: the machine in one line, a table, a train.py run set up as train.py does it."""

import os
import platform
import statistics
import sys
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import train  # noqa: E402
import utils  # noqa: E402


def machine():
    """Return processor, cores and versions as one line."""
    name = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), name)
    packages = ", ".join(f"{p} {version(p)}" for p in ("keras", "tensorflow", "pillow", "opencv-python"))
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA")
    return f"{name}, {utils.cores()} cores, Python {platform.python_version()}, {packages}" + (
        f", ONEDNN_MAX_CPU_ISA={limit}" if limit else ""
    )


def spread(values, digits=2):
    """Return median, smallest and largest as text."""
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def print_table(header, rows):
    """Print a Markdown table."""
    for row in (header, ["---"] * len(header), *rows):
        print("| " + " | ".join(map(str, row)) + " |", flush=True)


def set_up(data_dir, folder, *options):
    """Read data and build networks and rings as train.py does; prefix `m` in `folder`. Returns its Run."""
    sys.argv = ["train.py", str(data_dir), str(Path(folder) / "m"), *map(str, options)]
    args = train.parse_arguments()
    path, _ = train.find_weights(args)
    recipe = train.FROM_SCRATCH if path is None else train.FINE_TUNING
    recipe = {name: getattr(args, name, value) for name, value in recipe.items()}
    recipe["fresh"] = recipe["round_epochs"] if path is None else 1
    side = args.image_size or (96 if path is None else 224)
    data = train.read_data(args, side)
    nets = train.build_networks(args, path, len(data.labels), side, None)
    return train.Run(args, recipe, data, nets, train.open_rings(args, data, nets, recipe))
