"""What is drawn after training: the confusion matrix made of pictures, review sheet and report."""

import contextlib
import functools
import logging
import os
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

import utils

TURNED = 8  # length of a class name that is turned by a quarter, in font sizes
MATRIX_CLASSES = 40  # more would leave thumbnails too small to recognise
REVIEW_PICTURES, REVIEW_COLUMNS = 40, 8
RELIABILITY_BINS = 10
# right and wrong, strong and pale: told apart by all
BLUE, ORANGE = ("#0072b2", "#deebf5"), ("#d55e00", "#fae3d5")
COLOR_FONT = 2**14  # FreeType's flag
INK, GREY, LINE = "#222222", "#666666", "#e4e4e4"


# ---------------------------------------------------------------- text


@functools.cache
def import_matplotlib():
    """Import matplotlib with its own settings, not those of the current folder or a notebook."""
    os.environ["MPLBACKEND"] = "Agg"
    logging.getLogger("matplotlib").setLevel("CRITICAL")
    warnings.filterwarnings("ignore", "Glyph .* missing")  # it is drawn as a box
    import matplotlib

    matplotlib.rcdefaults()


@functools.cache
def font_file(text):
    """Return the path of the font that has most of the characters of `text`.

    DejaVu Sans, which comes with matplotlib, where it has them all. What is lacking becomes a box.
    """
    import_matplotlib()
    from matplotlib import font_manager

    best = font_manager.findfont("DejaVu Sans")
    most = count_characters(best, text)
    if most == len(set(text)):
        return best
    paths = font_manager.findSystemFonts()  # takes long
    for path in sorted(paths, key=lambda path: ("CJK" not in path, "Bold" in path, path)):
        count = count_characters(path, text)
        if count > most:
            best, most = path, count
    return best


def count_characters(path, text):
    """Return how many characters of `text` a font has; 0 if it is one of pictures, as of emoji."""
    from matplotlib import ft2font

    with contextlib.suppress(RuntimeError, OSError):
        font = ft2font.FT2Font(path)
        flags = getattr(font.face_flags, "value", font.face_flags)  # an int before matplotlib 3.11
        if font.scalable and not flags & COLOR_FONT:
            return len(set(map(ord, text)) & set(font.get_charmap()))
    return 0


def draw_text(draw, xy, text, size, fill, anchor="la", width=None):
    """Write one line of any script on a PIL drawing, cut to `width` pixels if given."""
    font = ImageFont.truetype(font_file(text), size)
    if width is not None and font.getlength(text) > width:
        while text and font.getlength(text + "…") > width:
            text = text[:-1]
        text += "…"
    draw.text(xy, text, fill, font, anchor)


def save_png(image, path, maker):
    """Save a PIL image whole, with a note of what made it."""
    note = PngInfo()
    note.add_text("Software", maker)
    with utils.atomic_write(path) as part:
        image.save(part, "PNG", pnginfo=note)


# ---------------------------------------------------------------- confusion matrix


def draw_confusion_matrix(path, prefix, title, labels, actual, predicted, pictures):
    """Draw a confusion matrix of pictures: a row a class, a column for what it was taken for.

    labels: class names. actual, predicted: int arrays (n,). pictures: a function from 0..n-1 to
    uint8 (side, side, 3). With over MATRIX_CLASSES classes, those with most mistakes are shown.
    """
    wrong = actual != predicted
    mistakes = np.bincount(np.r_[actual[wrong], predicted[wrong]], minlength=len(labels))
    shown = np.sort(np.argsort(-mistakes, kind="stable")[:MATRIX_CLASSES])
    cell = int(np.clip(2400 // len(shown), 93, 560))
    size = int(np.clip(cell // 15, 20, 32))  # of the class names, in pixels
    widest = max(text_width(labels[i], size) for i in shown)
    is_turned = cell - 8 <= widest and cell < TURNED * size  # to stand above the columns
    left = round(np.clip(widest + 40, 6.5 * size, 17 * size))
    top = 120 + size * (TURNED if is_turned else 2)
    span = cell * len(shown) + 20
    canvas = Image.new("RGB", (left + span, top + span), "white")
    draw_heading(canvas, title, len(shown), len(labels))
    for row, a in enumerate(shown):
        y, x = top + row * cell, left + row * cell
        right, total = ((actual == a) & ~wrong).sum(), (actual == a).sum()
        draw_row_name(canvas, (left - 12, y + cell // 2), labels[a], f"{right} of {total}", size)
        draw_column_name(canvas, (x, top - 12), labels[a], size, cell, is_turned)
        for column, p in enumerate(shown):
            inside = np.flatnonzero((actual == a) & (predicted == p))
            draw_cell(canvas, (left + column * cell, y), cell, pictures, inside, a == p)
    save_png(canvas, path, f"{utils.KIT}: {prefix}")


def text_width(text, size):
    """Return the width of one line of text in pixels."""
    return ImageFont.truetype(font_file(text), size).getlength(text)


def draw_heading(canvas, title, shown, classes):
    """Write the title, and what rows and columns are."""
    draw, width = ImageDraw.Draw(canvas), canvas.width - 40
    note = "" if shown == classes else f", the {shown} most confused of {classes} classes"
    line = f"rows: what it is; columns: what it was taken for{note}"
    draw_text(draw, (20, 18), title, 30, INK, width=width)
    draw_text(draw, (20, 60), line, 18, GREY, width=width)


def draw_row_name(canvas, corner, name, score, size):
    """Write a class name, and its score below, to the left of its row."""
    draw, (x, y) = ImageDraw.Draw(canvas), corner
    draw_text(draw, (x, y - 2), name, size, INK, "rs", x - 12)
    draw_text(draw, (x, y + size), score, size - 4, GREY, "rs")


def draw_column_name(canvas, corner, name, size, cell, is_turned):
    """Write a class name above its column, upright or turned."""
    x, bottom = corner
    if not is_turned:
        draw_text(ImageDraw.Draw(canvas), (x + cell // 2, bottom), name, size, INK, "ms", cell - 8)
        return
    length = TURNED * size
    strip = Image.new("RGB", (length, 2 * size), "white")
    draw_text(ImageDraw.Draw(strip), (0, size), name, size, INK, "lm", length)
    canvas.paste(strip.rotate(90, expand=True), (x + cell // 2 - size, bottom - length))


def draw_cell(canvas, corner, cell, pictures, inside, correct):
    """Fill one cell with the pictures whose indices are `inside`, their number on a badge."""
    draw, (x, y) = ImageDraw.Draw(canvas), corner
    frame, (strong, pale) = (x + 1, y + 1, x + cell - 2, y + cell - 2), BLUE if correct else ORANGE
    if not len(inside):
        draw.rectangle(frame, fill=pale if correct else "white", outline=LINE)
        return
    draw.rectangle(frame, fill=pale, outline=strong, width=3)
    across = min(int(np.ceil(np.sqrt(len(inside)))), max(1, cell // 40))
    thumb = (cell - 10) // across
    for n, index in enumerate(inside[: across * across]):
        place = (x + 6 + n % across * thumb, y + 6 + n // across * thumb)
        canvas.paste(thumbnail(pictures(index), thumb - 2), place)
    text, size = str(len(inside)), int(np.clip(cell // 18, 13, 26))
    width = size * len(text) * 0.65 + 8
    draw.rectangle((x + 1, y + 1, x + 1 + width, y + 5 + size), fill=strong)
    draw_text(draw, (x + 1 + width / 2, y + 3 + size // 2), text, size, "white", "mm")


def thumbnail(picture, side):
    """Return uint8 (n, n, 3) as a PIL image of another side."""
    return Image.fromarray(picture).resize((side, side), Image.Resampling.LANCZOS)


def draw_review_sheet(path, pictures, labels, suggested):
    """Draw the first REVIEW_PICTURES pictures, each with its label and the label suggested.

    pictures: list of uint8 (side, side, 3). labels, suggested: lists of class names as long.
    """
    pictures = pictures[:REVIEW_PICTURES]
    side, height, gap = 160, 220, 12
    columns = min(REVIEW_COLUMNS, max(1, len(pictures)))
    rows = -(-len(pictures) // columns)
    size = (gap + columns * (side + gap), gap + max(1, rows) * (height + gap))
    canvas = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(canvas)
    for n, (picture, label, other) in enumerate(zip(pictures, labels, suggested)):
        x, y = gap + n % columns * (side + gap), gap + n // columns * (height + gap)
        canvas.paste(thumbnail(picture, side), (x, y))
        draw_text(draw, (x, y + side + 6), label, 18, INK, width=side)
        draw_text(draw, (x, y + side + 30), f"{other}?", 18, ORANGE[0], width=side)
    save_png(canvas, path, utils.KIT)


# ---------------------------------------------------------------- report


def draw_report(path, title, labels, actual, probabilities, history=None, strangers=None):
    """Draw learning curves, scores of each class, reliability and strangers as one PNG.

    actual: int (n,). probabilities: (n, classes). history: list of dicts, an epoch each, with the
    columns of `model-history.csv`. strangers: the arguments of `plot_strangers` after the axes.
    Without these two there is no such panel. With over MATRIX_CLASSES classes, the weakest show.
    """
    import_matplotlib()
    from matplotlib.figure import Figure

    recall, precision = class_scores(actual, probabilities.argmax(1), len(labels))
    order = np.argsort(np.nan_to_num(recall + precision), kind="stable")[:MATRIX_CLASSES]
    weakest = [labels[i] for i in order], recall[order], precision[order]
    panels = [  # (height in inches, function that plots it, arguments)
        (3.2, plot_reliability, (actual, probabilities)),
        (1.2 + 0.24 * len(order), plot_classes, (*weakest, len(labels))),
    ]
    if strangers:
        panels.insert(1, (3.2, plot_strangers, strangers))
    if history:
        panels.insert(0, (3.2, plot_history, (history,)))
    heights = [height for height, _, _ in panels]
    figure = Figure(figsize=(9, sum(heights) + 0.3), layout="constrained")
    figure.suptitle(title, parse_math=False, font=Path(font_file(title)))
    rows = figure.subplots(len(panels), 1, height_ratios=heights)
    for axes, (_, plot, arguments) in zip(rows, panels):
        plot(axes, *arguments)
        axes.grid(alpha=0.3)
    with utils.atomic_write(path) as part:
        figure.savefig(part, dpi=110, metadata={"Software": utils.KIT})


def class_scores(actual, predicted, class_count):
    """Return recall and precision of each class, float (class_count,) each, NaN where undefined."""
    right = np.bincount(actual[actual == predicted], minlength=class_count).astype(float)
    with np.errstate(invalid="ignore"):
        recall = right / np.bincount(actual, minlength=class_count)
        return recall, right / np.bincount(predicted, minlength=class_count)


def plot_history(axes, history):
    """Plot accuracy against epochs: training, validation augmented and as it is."""
    epochs = np.arange(1, len(history) + 1)
    curves = (
        ("accuracy", "training, augmented", BLUE[0], "-"),
        ("val_accuracy", "validation, augmented like training", "#e69f00", "--"),
        ("plain_accuracy", "validation, unaugmented: what is reported", "#000000", "o"),
    )
    for key, label, color, line in curves:
        points = [(e, row[key]) for e, row in zip(epochs, history) if row[key] != ""]
        axes.plot(*zip(*points), line, color=color, label=label)
    axes.set(xlabel="epoch", ylabel="accuracy", ylim=(0, 1.03))
    axes.set_title("Learning curves", loc="left")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend(loc="best")


def plot_reliability(axes, actual, probabilities):
    """Plot the share that is correct against the probability given, in bins of as many pictures.

    The axes begin where the points do, for those of a good model lie in one corner.
    """
    sure, right = probabilities.max(1), probabilities.argmax(1) == actual
    bins = np.array_split(np.argsort(sure), np.clip(len(sure) // 10, 1, RELIABILITY_BINS))
    x, y = ([values[some].mean() for some in bins] for values in (sure, right))
    error = [np.sqrt(max(p * (1 - p), 0.01) / len(some)) for p, some in zip(y, bins)]
    low = max(0, min(*x, *(p - e for p, e in zip(y, error)), 0.9) - 0.02)
    label = f"bins of about {round(len(sure) / len(bins))} pictures, one standard error"
    axes.plot([0, 1], [0, 1], color="#999999", linewidth=1, label="as sure as correct")
    axes.errorbar(x, y, error, fmt="o-", color=BLUE[0], capsize=3, label=label)
    margin = (1 - low) / 30
    axes.set(xlim=(low, 1 + margin), ylim=(low, 1 + margin))
    axes.set(xlabel="probability given", ylabel="share that is correct")
    axes.set_title("Reliability of the probabilities", loc="left")
    axes.legend(loc="upper left")


def plot_strangers(axes, thresholds, friends, strangers, chosen):
    """Plot shares against the threshold: friends correctly classified, strangers told as unknown.

    thresholds, friends, strangers: arrays (n,). chosen: the threshold of the model, marked.
    """
    axes.plot(thresholds, friends, color=BLUE[0], label="friends correct")
    axes.plot(thresholds, strangers, "--", color=ORANGE[0], label="strangers unknown")
    axes.axvline(chosen, color="#999999", linewidth=1, label=f"the model's own, {chosen:.3f}")
    axes.set(xlabel="threshold", ylabel="share", xlim=(0, 1), ylim=(0, 1.03))
    axes.set_title("Strangers", loc="left")
    axes.legend(loc="best")


def plot_classes(axes, labels, recall, precision, class_count):
    """Plot recall and precision of classes, the weakest on top."""
    y = np.arange(len(labels))
    axes.barh(y, recall, color="#56b4e9", height=0.7, label="recall (pictures found)")
    marks = {"color": ORANGE[0], "markersize": 5, "label": "precision (labels that are correct)"}
    axes.plot(precision, y, "D", **marks)
    axes.set_yticks(y, [label if len(label) < 30 else label[:29] + "…" for label in labels])
    for tick, label in zip(axes.get_yticklabels(), labels):
        tick.set(font=Path(font_file(label)), parse_math=False)
    axes.set(xlim=(0, 1.02), ylim=(len(labels) - 0.5, -0.5))
    is_whole = len(labels) == class_count
    title = "Classes" if is_whole else f"The weakest {len(labels)} of {class_count} classes"
    axes.set_title(title, loc="left")
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2, frameon=False, borderaxespad=0.2)
