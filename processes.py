"""Several processes that train one model: what each of them is, and what they tell each other."""

import contextlib
import json
import os
import subprocess
import sys

import numpy as np

import model
import utils

LOST = "another process of this run has ended or cannot be reached: start all again with --resume"
DISTRIBUTION = "KERAS_DISTRIBUTION_"  # begins the variables of a run on several machines


def find_processes(args):
    """Set args.process and args.processes: which of how many processes of one run this is."""
    args.process, args.processes = 0, 1
    if args.evaluate or args.dry_run or not os.environ.get(f"{DISTRIBUTION}NUM_PROCESSES"):
        return
    try:
        args.processes = int(os.environ[f"{DISTRIBUTION}NUM_PROCESSES"])
        args.process = int(os.environ[f"{DISTRIBUTION}PROCESS_ID"])
        addresses = os.environ[f"{DISTRIBUTION}JOB_ADDRESSES"]
        known = 0 <= args.process < args.processes and addresses
    except (KeyError, ValueError):
        known = False
    if not known:
        names = f"{DISTRIBUTION}NUM_PROCESSES, _PROCESS_ID and _JOB_ADDRESSES"
        raise utils.UserError(f"{names}: set all three, see the README")
    if args.processes > 1 and os.environ.get("KERAS_BACKEND") != "jax":
        raise utils.UserError("several processes need JAX: pip install jax, set KERAS_BACKEND=jax")


def watch():
    """Run this process's part of the work as a child; return its exit code.

    JAX ends its process from C++ when another one is gone, so a parent stays to report it. The
    child reads a pipe from its parent and ends when that closes. Raises UserError.
    """
    environment = os.environ | {model.CHILD: "1"}
    command = [sys.executable, *sys.orig_argv[1:]]
    child = subprocess.Popen(command, stdin=subprocess.PIPE, env=environment)
    code = None
    while code is None:
        with contextlib.suppress(KeyboardInterrupt):  # the child has it too
            code = child.wait()
    if code in (0, 1, 2, 3, 130):
        return code
    raise utils.UserError(LOST)


def end_with_parent():
    """Wait, in a thread, until the parent's end of the pipe is closed, by a kill say; then end."""
    os.read(0, 1)
    os._exit(1)


def all_gather(args, value):
    """Return what every process gave, plain data, as a list in their order. All must call it."""
    if args.processes == 1:
        return [value]
    data = np.frombuffer(json.dumps(value).encode(), "uint8")
    sizes = gather_arrays(np.array([len(data)])).ravel()
    rows = gather_arrays(np.resize(data, max(sizes)))
    return [json.loads(row[:size].tobytes()) for row, size in zip(rows, sizes)]


def from_first(args, work):
    """Return, in all processes, what work() gives in the first one: plain data."""
    return all_gather(args, None if args.process else work())[0]


def gather_arrays(array):
    """Return the arrays of all processes, of one shape, as one with a first axis more."""
    model.import_keras()
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(array))
