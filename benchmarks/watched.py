"""Run a script, and note a hundred times a second which function of ours its main thread is in.

    python benchmarks/watched.py NOTES SCRIPT [its arguments]

start_up.py and grandma.py use it. A line of NOTES: the time (`time.monotonic`), a tab, `function of the script >
function of utils.py`.
"""

import runpy
import sys
import threading
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
INTERVAL = 0.01
PASSED_OVER = ("in_order", "progress", "<lambda>", "<genexpr>", "run", "main")


def watch(notes):
    """Write the lines, until the process ends."""
    main = threading.main_thread().ident
    with open(notes, "w", buffering=1) as file:
        while True:
            frame, innermost = sys._current_frames().get(main), {}
            while frame:
                path, function = Path(frame.f_code.co_filename), frame.f_code.co_name
                if path.parent == ROOT and function not in PASSED_OVER:
                    innermost.setdefault(path.name, function)
                frame = frame.f_back
            shared = innermost.pop("utils.py", None)
            file.write(f"{time.monotonic()}\t{' > '.join(filter(None, [*innermost.values(), shared]))}\n")
            time.sleep(INTERVAL)


if __name__ == "__main__":
    threading.Thread(target=watch, args=[sys.argv[1]], daemon=True).start()
    sys.argv = sys.argv[2:]
    sys.path[0] = str(ROOT)
    runpy.run_path(sys.argv[0], run_name="__main__")
