"""What train.py, webcam.py and collect_apple_photos.py share: messages, names and files."""

import argparse
import collections
import contextlib
import csv
import errno
import os
import re
import shlex
import signal
import sys
import threading
import time
import unicodedata
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

INSTALL = "run `pip install -r requirements.txt` in the folder of this script"
if not (3, 11) <= sys.version_info[:2] <= (3, 13):
    sys.exit(
        f"error: this is Python {sys.version_info[0]}.{sys.version_info[1]}: "
        "install Python 3.11, 3.12 or 3.13, which TensorFlow and Keras have packages for"
    )


def missing(error):
    """Return one line for an ImportError: what is missing, and what to do."""
    if ".so" in str(error):  # OpenCV's, in a bare container
        packages = "`apt-get install libgl1 libglib2.0-0`, or what your system calls these packages"
        return f"{error}: run {packages}"
    return f"{error}: {INSTALL}"


def show_exception(kind, error, trace):
    """Tell in one line of a Ctrl-C (exit code 130) or a missing package (1) during the imports."""
    if issubclass(kind, KeyboardInterrupt):
        print("stopped", file=sys.stderr)
    elif issubclass(kind, ImportError):
        print(f"error: {missing(error)}", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


sys.excepthook = show_exception  # packages take a second to import
import tqdm  # noqa: E402

UNKNOWN = "unknown"  # the class of faces without a name; webcam.py knows it
FEW_PICTURES = 20  # of a class; with fewer a model is often wrong
# What systems, NAS and recycle bins leave behind, in small letters.
SKIPPED_NAMES = {"thumbs.db", "desktop.ini", "__macosx", "lost+found", "$recycle.bin", "recycler"}
SKIPPED_NAMES |= {"#recycle", "@recycle", "@recently-snapshot", "#snapshot", "~snapshot", "@tmp"}
SKIPPED_NAMES |= {"@eadir", "@synoresource", "system volume information", "network trash folder"}
SKIPPED_NAMES |= {"temporary items"}
RESERVED_NAMES = {f"{port}{n}" for port in ("com", "lpt") for n in range(1, 10)}
RESERVED_NAMES |= {"con", "prn", "aux", "nul"}
# As TensorFlow and JAX say it; they have no class in common for it.
OUT_OF_MEMORY = re.compile("^ResourceExhaustedError|RESOURCE_EXHAUSTED")

interrupted = threading.Event()
tqdm.tqdm.set_lock(threading.RLock())  # its own stays locked after a Ctrl-C at the wrong moment


# ---------------------------------------------------------------- messages


class UserError(Exception):
    """Something a user can mend: one line that names the file or option and says what to do."""


class UsageError(UserError):
    """A wrong use of the command line that argparse cannot see: one line, exit code 2."""


def count(number, one, many=None):
    """Return a number with its noun: `1 picture`, `2 pictures`."""
    return f"{number} {one if number == 1 else many or one + 's'}"


def print_line(text):
    """Print one line on stdout at once, so that a program reading it never waits."""
    # on a terminal a progress bar makes room for the line
    put = tqdm.tqdm.write if sys.stdout.isatty() else print
    put(text)
    sys.stdout.flush()


def warn(text):
    """Print one line on stderr that begins `warning: `."""
    tqdm.tqdm.write(f"warning: {text}", file=sys.stderr)


def escape(name):
    """Return `name` (str or path) with control characters and lone surrogates as \\x escapes."""
    return "".join(c if is_shown(c) else c.encode("unicode_escape").decode() for c in str(name))


def is_shown(character):
    """Say whether a terminal may show a character: printable, a space, or what joins letters."""
    is_space = unicodedata.category(character) == "Zs"
    return character.isprintable() or is_space or character in "\u200c\u200d"


def first_line(error):
    """Return the first line of what a library says about an error, escaped, 200 characters."""
    return escape(str(error).partition("\n")[0] or type(error).__name__)[:200]


def csv_cell(name):
    """Return `name` escaped, behind an apostrophe if a spreadsheet took it for a formula."""
    text = escape(name)
    return "'" + text if text[:1] in ("=", "+", "-", "@") else text


def advice(error):
    """Return one line for an OSError: what failed with which file, and what to do."""
    space = "free some space or choose another folder"
    permission = "check the permissions or choose another folder"
    hints = {
        errno.ENOSPC: space,
        errno.EEXIST: "something else is there: choose another folder",
        errno.ENAMETOOLONG: "choose a shorter one",
        errno.EDQUOT: space,
        errno.EFBIG: "files may not be so large here: choose another folder",
        errno.EACCES: permission,
        errno.EPERM: permission,
        errno.EROFS: "choose a folder that can be written",
        errno.ENOENT: "check that the path is right and was not moved meanwhile",
        errno.EMFILE: "close other programs or raise `ulimit -n`",
    }
    # the second file of a renaming is the one that people know
    file = error.filename if error.filename2 is None else error.filename2
    name = f"{escape(file)}: " if file is not None else ""
    hint = hints.get(error.errno, "check the disk and try again")
    return f"{name}{error.strerror or error}: {hint}"


def explain(error):
    """Return one line for an exception that a user can do something about, None for a bug."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, OSError):
        return advice(error)
    if isinstance(error, ImportError):
        return missing(error)
    if isinstance(error, MemoryError) or OUT_OF_MEMORY.search(f"{type(error).__name__}: {error}"):
        remedy = "close other programs, or train with a smaller --batch-size or --image-size"
        return f"out of memory: {remedy}"
    return None


def interrupt(*_):
    """Handle a signal as Ctrl-C, and note it: libraries in C++ may lose the exception."""
    interrupted.set()
    raise KeyboardInterrupt


def run(main):
    """Call a script's `main()` and leave with its exit code.

    0 (or None) done, 1 an expected failure, reported in one line, 2 wrong usage, 3 from the
    accuracy gate, 130 Ctrl-C.
    Text that leaves the process is UTF-8, save on a terminal, which gets escapes for what it lacks.
    """
    if signal.getsignal(signal.SIGINT) == signal.default_int_handler:  # else it is ignored
        signal.signal(signal.SIGINT, interrupt)
    nowhere = open(os.devnull, "w")
    # None where it was closed, by `>&-` say
    sys.stdout, sys.stderr = sys.stdout or nowhere, sys.stderr or nowhere
    for stream in (sys.stdout, sys.stderr):
        encoding = stream.encoding if stream.isatty() else "utf-8"
        stream.reconfigure(encoding=encoding, errors="backslashreplace")
    try:
        code = main() or 0
    except BrokenPipeError:  # the reader of our output, `head` say, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    except (Exception, KeyboardInterrupt) as error:
        is_stop = isinstance(error, KeyboardInterrupt) or interrupted.is_set()
        line = None if is_stop else explain(error)
        if line is None and not is_stop:
            raise
        print("stopped" if is_stop else f"error: {line}", file=sys.stderr)
        code = 130 if is_stop else 2 if isinstance(error, UsageError) else 1
    interrupted.clear()  # whatever a notebook or a test runs next
    sys.exit(code)


def progress(items, total, label):
    """Yield from `items`, showing on stderr how far it is and the time left.

    A bar on a terminal; elsewhere a plain line every ten seconds, so that a log stays short.
    """
    is_terminal = sys.stderr.isatty()
    told = time.monotonic()
    with tqdm.tqdm(
        total=total, desc=label, leave=False, dynamic_ncols=True, disable=not is_terminal
    ) as bar:
        for done, item in enumerate(items, 1):
            yield item
            if interrupted.is_set():
                raise KeyboardInterrupt
            now = time.monotonic()
            if done == 1:  # what it takes to start up is not the rate of the others
                bar.unpause()
                begin = now
            elif not is_terminal and now - told > 10 and done < total:
                told, left = now, (now - begin) / (done - 1) * (total - done)
                line = f"{label}: {done} of {total}, about {left:.0f} s left"
                print(line, file=sys.stderr, flush=True)
            bar.update()


def number(kind, low, high):
    """Return an argparse type: an int or float (`kind`) from `low` to `high`."""

    def value(text):
        """Turn what was typed into a number in the range."""
        if not low <= kind(text) <= high:
            raise argparse.ArgumentTypeError(f"{text} is not between {low} and {high}")
        return kind(text)

    value.__name__ = kind.__name__  # argparse says: invalid int value
    return value


def cores():
    """Return how many processor cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def to_path(text):
    """Read a path for argparse. An empty one, of an unset variable, would be the current folder."""
    if not text:
        raise argparse.ArgumentTypeError("is empty: give a path")
    return Path(text)


def ordered_parallel_map(function, items, workers=None):
    """Yield function(item) for every item, in order, computed ahead in threads.

    Only a few results wait at a time, so memory stays flat. workers: threads, else one a core.
    """
    workers = workers or cores()
    pool = ThreadPoolExecutor(workers)
    waiting = collections.deque()
    try:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > 2 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def print_people(counts, skipped, nobody, folder, before=""):
    """Print a table of persons, why faces were skipped, the sum, and on stderr what to do next.

    counts: Counter {person: faces}; skipped: Counter {reason: faces}. nobody: the first line where
    both are empty. folder: where the faces are; before: what is to be done before training.
    """
    if not counts and not skipped:
        print_line(nobody)
    print_line("images  person")
    for name in sorted(counts, key=lambda name: (name == UNKNOWN, name.casefold())):
        print_line(f"{counts[name]:6}  {escape(name)}")
    for reason, number in sorted(skipped.items()):
        print_line(f"{number} skipped: {reason}")
    unknown, left_out = counts[UNKNOWN], skipped.total()
    named = f"{counts.total() - unknown} named ({len(counts.keys() - {UNKNOWN})} persons)"
    total = counts.total() + left_out
    print_line(f"{total} faces: {named}, {unknown} unknown, {left_out} skipped")
    print(next_training_step(counts, folder, before), file=sys.stderr)


def next_training_step(counts, folder, before):
    """Return whether so many faces are enough to train on, and with which command."""
    few = sum(number < FEW_PICTURES for number in counts.values())
    if len(counts) < 2 or max(counts.values()) < 2:
        remedy = "name more faces, or collect others with webcam.py --save-faces"
        return f"not enough to train on, which takes two persons with several faces each: {remedy}"
    less = f", but {few} of {len(counts)} have fewer than {FEW_PICTURES} pictures: more would help"
    command = f"python train.py {shlex.quote(escape(folder))} model"
    return f"enough to train on{less if few else ''}\nnext: {before}{command}"


# ---------------------------------------------------------------- names and files


def folder_names(names, taken=()):
    """Return {name: folder name}: readable, safe on Linux, macOS and Windows, distinct even there.

    NFC; separators and control characters become `_`; no leading dot, trailing dot or space; at
    most 80 characters and 200 bytes; names that fall together by case or normalisation get ` (2)`,
    ` (3)`… `taken`: folder names that are in use already.
    """
    used = {unicodedata.normalize("NFC", name).casefold() for name in taken}
    folders = {}
    for name in sorted(set(names)):
        text = unicodedata.normalize("NFC", name)
        text = "".join("_" if c in '/\\:*?"<>|' or not is_shown(c) else c for c in text)[:80]
        text = text.encode()[:200].decode(errors="ignore").strip(" ").rstrip(". ")
        if text.startswith("."):
            text = "_" + text[1:]
        if not text or text.split(".")[0].rstrip().lower() in RESERVED_NAMES:
            text = "_" + text
        folder, number = text, 1
        while folder.casefold() in used:
            number += 1
            folder = f"{text} ({number})"
        used.add(folder.casefold())
        folders[name] = folder
    return folders


def folder_name(text):
    """Return a text as a name that all systems allow."""
    return folder_names([text])[text]


def is_inside(path, place):
    """Say whether `path` is or lies in `place`, also where names differ in case or spelling."""
    path = Path(os.path.realpath(path))
    return any(one.exists() and one.samefile(place) for one in (path, *path.parents))


def list_files(root):
    """Return the files below the folder `root`, any depth, sorted, as paths.

    Left out: dot files and dot folders, what systems leave behind, links that leave `root` or loop;
    of these links, and of what is in iCloud only, it warns. A folder that is reached twice keeps
    its own name: links are followed last.
    """
    inside, found, seen = Path(root).resolve(), [], set()
    outside, clouded = [], 0  # links; files
    # folders in front, links to folders behind them
    queue = collections.deque([Path(root)] if os.path.isdir(root) else ())
    while queue:
        folder = queue.popleft()
        real = folder.resolve()
        if real in seen or not real.is_relative_to(inside):
            outside.append(folder)
            continue
        seen.add(real)
        try:
            everything = os.listdir(folder)
        except OSError as error:
            warn(advice(error))
            continue
        # a hidden file stands for one that macOS has not downloaded
        clouded += sum(name.startswith(".") and name.endswith(".icloud") for name in everything)
        for path in (folder / name for name in sorted(everything) if not is_ignored(name)):
            if os.path.isdir(path):  # False where it cannot be looked at; Path.is_dir would raise
                (queue.append if os.path.islink(path) else queue.appendleft)(path)
            elif not os.path.islink(path) or leads_into(path, inside):
                found.append(path)
            else:
                outside.append(path)
    warn_about_left_out(root, outside, clouded)
    return sorted(found)


def leads_into(link, folder):
    """Say whether a link leads to something in `folder`, a resolved path, and not to itself."""
    with contextlib.suppress(OSError, RuntimeError):
        return link.resolve(strict=True).is_relative_to(folder)
    return False


def warn_about_left_out(folder, outside, clouded):
    """Warn of links that are not followed, and of so many pictures that are in iCloud only."""
    name = escape(folder)
    if outside:
        links = count(len(outside), "link leads", "links lead")
        warn(f"{name}: {links} out of it or in a circle: not followed: {escape(outside[0])}")
    if clouded:
        there = count(clouded, "picture is", "pictures are")
        warn(f"{name}: {there} in iCloud only: download them first")


def is_ignored(name):
    """Say whether a file or folder of this name is ignored: hidden, or left behind by a system."""
    return name.startswith(".") or name.lower() in SKIPPED_NAMES


@contextlib.contextmanager
def file_lock(path):
    """Hold a lock, the empty file `path`, while the block runs. A killed process holds it no more.

    Raises UserError if another run holds it, or if something else is there.
    """
    import filelock  # takes a tenth of a second

    path = Path(path)
    is_empty = path.is_file() and path.stat().st_size == 0
    if path.is_symlink() or (path.exists() and not is_empty):
        raise UserError(f"{escape(path)}: not a lock of this kit: delete it")
    lock = filelock.FileLock(path, timeout=0)
    try:
        lock.acquire()
    except filelock.Timeout:
        problem = "another run is at work here: wait for it or choose another name"
        raise UserError(f"{escape(path)}: {problem}") from None
    try:
        yield
    finally:
        lock.release()
        with contextlib.suppress(OSError):  # somebody else may have opened it already
            path.unlink()


@contextlib.contextmanager
def naming(path):
    """Let an OSError in the block name a file or folder, if it names none: a full disk does not."""
    try:
        yield
    except OSError as error:
        with contextlib.suppress(AttributeError):  # PyAV's cannot be changed
            error.filename = error.filename or path
        raise


@contextlib.contextmanager
def atomic_write(path):
    """Give a path to write to, which becomes `path` when the block ends without error."""
    path = Path(path)
    # a name has at most 255 bytes
    stem = path.stem if len(os.fsencode(path.stem)) <= 200 else path.stem[:50]
    part = path.with_name(f".{stem}-unfinished-{os.urandom(4).hex()}{path.suffix}")
    open(part, "x").close()  # unlike mkstemp's, with the permissions that new files have here
    try:
        with naming(path):
            yield part
            # on the disk before its name is: a power cut leaves old or new
            with open(part, "rb+") as file:
                os.fsync(file.fileno())
            os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def write_csv(path, header, rows):
    """Write a CSV file whole: `header` a list of names, `rows` lists of cells."""
    with atomic_write(path) as part, open(part, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows([csv_cell(c) if isinstance(c, str) else c for c in row] for row in rows)
