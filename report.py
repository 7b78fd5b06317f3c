"""What is drawn after training: the confusion matrix made of pictures, review sheet and report."""

import contextlib
import functools
import logging
import math
import os
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

import utils

KIT = "finetuning-kit"  # named in the pictures that are ours to remove
TURNED = 8  # length of a class name that is turned by a quarter, in font sizes
MATRIX_CLASSES = 40  # more would leave thumbnails too small to recognise
REVIEW_PICTURES, REVIEW_COLUMNS = 40, 8
RELIABILITY_BINS = 10
PANEL_HEIGHT = 3.4  # inches
# right and wrong, strong and pale: the colour-blind tell them apart, too
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
    settings = {"axes.titlelocation": "left", "axes.titlepad": 24}  # a legend lies below the title
    matplotlib.rcParams.update(settings | {"axes.grid": True, "grid.alpha": 0.3})


@functools.cache
def font_file(text):
    """Return the path of the font that has most of the characters of `text`.

    DejaVu Sans, which comes with matplotlib, where it has them all. What is lacking becomes a box.
    """
    import_matplotlib()
    from matplotlib import font_manager

    standard = font_manager.findfont("DejaVu Sans")
    if count_characters(standard, text) == len(set(text)):
        return standard
    others = font_manager.findSystemFonts()  # takes long
    others.sort(key=lambda path: ("CJK" not in path, "Bold" in path, path))
    return max([standard, *others], key=lambda path: count_characters(path, text))


def count_characters(path, text):
    """Return how many characters of `text` a font has; 0 if it is one of pictures, as of emoji."""
    from matplotlib import ft2font

    with contextlib.suppress(RuntimeError, OSError):
        font = ft2font.FT2Font(path)
        flags = getattr(font.face_flags, "value", font.face_flags)  # an int before matplotlib 3.11
        if font.scalable and not flags & COLOR_FONT:
            return len(set(map(ord, text)) & set(font.get_charmap()))
    return 0


def load_font(text, size):
    """Return a PIL font that has the characters of a text, `size` pixels high."""
    return ImageFont.truetype(font_file(text), size)


def draw_text(canvas, xy, text, size, fill, anchor="la", width=math.inf):
    """Write one line of any script on a PIL image, cut to `width` pixels."""
    font = load_font(text, size)
    if font.getlength(text) > width:
        while text and font.getlength(text + "…") > width:
            text = text[:-1]
        text += "…"
    ImageDraw.Draw(canvas).text(xy, text, fill, font, anchor)


# ---------------------------------------------------------------- confusion matrix


def draw_confusion_matrix(path, prefix, title, labels, actual, predicted, pictures):
    """Draw a confusion matrix of pictures: a row a class, a column for what it was taken for.

    labels: class names. actual, predicted: int arrays (n,). pictures: a function from 0..n-1 to
    uint8 (side, side, 3). With over MATRIX_CLASSES classes, those with most mistakes are shown.
    """
    shown = most_confused(actual, predicted, len(labels))
    cell = int(np.clip(2400 // len(shown), 93, 560))
    size = int(np.clip(cell // 15, 20, 32))  # of the class names, in pixels
    widest = max(load_font(labels[i], size).getlength(labels[i]) for i in shown)
    is_turned = cell < min(widest + 8, TURNED * size)  # names stand above the columns
    left = round(np.clip(widest + 40, 6.5 * size, 17 * size))
    top = 120 + size * (TURNED if is_turned else 2)
    span = cell * len(shown) + 20
    canvas = Image.new("RGB", (left + span, top + span), "white")
    draw_heading(canvas, title, len(shown), len(labels))
    for row, a in enumerate(shown):
        of_class = actual == a
        y = top + row * cell
        score = f"{(predicted[of_class] == a).sum()} of {of_class.sum()}"
        draw_row_name(canvas, (left - 12, y + cell // 2), labels[a], score, size)
        draw_column_name(canvas, (left + row * cell, top - 12), labels[a], size, cell, is_turned)
        for column, p in enumerate(shown):
            inside = np.flatnonzero(of_class & (predicted == p))
            drawn = draw_cell(cell, pictures, inside, a == p)
            canvas.paste(drawn, (left + column * cell, y))
    note = PngInfo()
    note.add_text("Software", f"{KIT}: {prefix}")
    with utils.atomic_write(path) as part:
        canvas.save(part, "PNG", pnginfo=note)


def matrix_maker(path):
    """Return the prefix of the run that has drawn a confusion matrix, None for any other file."""
    if not path.is_file():  # a named pipe would wait for ever
        return None
    try:
        with Image.open(path, formats=["PNG"]) as image:
            kit, _, prefix = image.info.get("Software", "").partition(": ")
            return prefix if kit == KIT else None
    except Exception:  # Pillow's parsers raise much
        return None


def most_confused(actual, predicted, class_count):
    """Return the classes, at most MATRIX_CLASSES, that have a part in most mistakes, in order."""
    wrong = actual != predicted
    mistakes = np.bincount(np.r_[actual[wrong], predicted[wrong]], minlength=class_count)
    return np.sort(np.argsort(-mistakes, kind="stable")[:MATRIX_CLASSES])


def draw_heading(canvas, title, shown, classes):
    """Write the title, and what rows and columns are."""
    width = canvas.width - 40
    note = "" if shown == classes else f", the {shown} most confused of {classes} classes"
    line = f"rows: what it is; columns: what it was taken for{note}"
    draw_text(canvas, (20, 18), title, 30, INK, width=width)
    draw_text(canvas, (20, 60), line, 18, GREY, width=width)


def draw_row_name(canvas, corner, name, score, size):
    """Write a class name, and its score below, to the left of its row."""
    x, y = corner
    draw_text(canvas, (x, y - 2), name, size, INK, "rs", x - 12)
    draw_text(canvas, (x, y + size), score, size - 4, GREY, "rs")


def draw_column_name(canvas, corner, name, size, cell, is_turned):
    """Write a class name above its column, upright or turned."""
    x, bottom = corner
    strip = Image.new("RGB", (TURNED * size if is_turned else cell - 8, 2 * size), "white")
    if is_turned:
        draw_text(strip, (0, size), name, size, INK, "lm", strip.width)
        strip = strip.rotate(90, expand=True)
    else:
        draw_text(strip, (strip.width // 2, size), name, size, INK, "mm", strip.width)
    canvas.paste(strip, (x + (cell - strip.width) // 2, bottom - strip.height))


def draw_cell(side, pictures, inside, is_correct):
    """Return a cell: the pictures whose indices are `inside`, and their number on a badge."""
    cell = Image.new("RGB", (side, side), "white")
    draw = ImageDraw.Draw(cell)
    frame = (1, 1, side - 2, side - 2)
    strong, pale = BLUE if is_correct else ORANGE
    if not len(inside):
        draw.rectangle(frame, fill=pale if is_correct else "white", outline=LINE)
        return cell
    draw.rectangle(frame, fill=pale, outline=strong, width=3)
    across = min(math.ceil(math.sqrt(len(inside))), side // 40)
    thumb = (side - 10) // across
    for n, index in enumerate(inside[: across * across]):
        row, column = divmod(n, across)
        cell.paste(thumbnail(pictures(index), thumb - 2), (6 + column * thumb, 6 + row * thumb))
    text = str(len(inside))
    size = int(np.clip(side // 18, 13, 26))
    width = size * len(text) * 0.65 + 8
    draw.rectangle((1, 1, 1 + width, 5 + size), fill=strong)
    draw_text(cell, (1 + width / 2, 3 + size // 2), text, size, "white", "mm")
    return cell


def thumbnail(picture, side):
    """Return uint8 (n, n, 3) as a PIL image of another side."""
    return Image.fromarray(picture).resize((side, side), Image.Resampling.LANCZOS)


def draw_review_sheet(path, pictures, files, labels, suggested):
    """Draw pictures, each with its file, its label and the label suggested.

    pictures: at most REVIEW_PICTURES of uint8 (side, side, 3). files, labels, suggested: texts.
    """
    side, step_x, step_y, gap = 160, 172, 246, 12
    columns = min(REVIEW_COLUMNS, len(pictures))
    rows = math.ceil(len(pictures) / columns)
    canvas = Image.new("RGB", (gap + columns * step_x, gap + rows * step_y), "white")
    for n, (picture, file, label, other) in enumerate(zip(pictures, files, labels, suggested)):
        row, column = divmod(n, columns)
        x, y = gap + column * step_x, gap + row * step_y
        canvas.paste(thumbnail(picture, side), (x, y))
        draw_text(canvas, (x, y + side + 6), label, 18, INK, width=side)
        draw_text(canvas, (x, y + side + 30), f"{other}?", 18, ORANGE[0], width=side)
        draw_text(canvas, (x, y + side + 56), file, 12, GREY, width=side)
    with utils.atomic_write(path) as part:
        canvas.save(part, "PNG")


# ---------------------------------------------------------------- report


def draw_report(path, title, labels, actual, probabilities, history=None, strangers=None):
    """Draw learning curves, reliability, strangers and scores of each class as one PNG.

    actual: int (n,). probabilities: (n, classes). history: list of dicts, an epoch each, with the
    columns of `model-history.csv`. strangers: the arguments of `plot_strangers` after the axes.
    Without these two there is no such panel. With over MATRIX_CLASSES classes, the weakest show.
    """
    import_matplotlib()
    from matplotlib.figure import Figure

    plots = []  # (height in inches, function, its arguments after the axes), from top to bottom
    if history:
        plots.append((PANEL_HEIGHT, plot_history, (history,)))
    plots.append((PANEL_HEIGHT, plot_reliability, (actual, probabilities)))
    if strangers:
        plots.append((PANEL_HEIGHT, plot_strangers, strangers))
    height = 1.6 + 0.24 * min(len(labels), MATRIX_CLASSES)
    plots.append((height, plot_classes, (labels, actual, probabilities.argmax(1))))
    inches = [height for height, *_ in plots]
    figure = Figure(figsize=(9, sum(inches) + 0.3), layout="constrained")
    figure.suptitle(title, parse_math=False, font=Path(font_file(title)))
    panels = figure.subplots(len(plots), 1, height_ratios=inches)
    for axes, (_, plot, arguments) in zip(panels, plots):
        plot(axes, *arguments)
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=3, frameon=False, fontsize=9)
    with utils.atomic_write(path) as part:
        figure.savefig(part, dpi=110)


def plot_history(axes, history):
    """Plot accuracy against epochs: training, validation augmented and as it is."""
    epochs = np.arange(1, len(history) + 1)
    curves = (
        ("accuracy", "training", BLUE[0], "-"),
        ("val_accuracy", "validation, augmented", "#e69f00", "--"),
        ("plain_accuracy", "validation: what is reported", "#000000", "o"),
    )
    for key, label, color, line in curves:
        points = [(e, row[key]) for e, row in zip(epochs, history) if row[key] != ""]
        axes.plot(*zip(*points), line, color=color, label=label)
    axes.set(title="Learning curves", xlabel="epoch", ylabel="accuracy", ylim=(0, 1.03))
    axes.xaxis.get_major_locator().set_params(integer=True)


def plot_reliability(axes, actual, probabilities):
    """Plot the share that is correct against the probability given, in bins of as many pictures.

    The axes begin where the points do, for those of a good model lie in one corner.
    """
    sure = probabilities.max(1)
    right = probabilities.argmax(1) == actual
    bins = np.array_split(np.argsort(sure), np.clip(len(sure) // 10, 1, RELIABILITY_BINS))
    x = np.array([sure[some].mean() for some in bins])
    y = np.array([right[some].mean() for some in bins])
    error = np.sqrt(np.maximum(y * (1 - y), 0.01) / [len(some) for some in bins])
    low = max(0, min(x.min(), (y - error).min(), 0.9) - 0.02)
    limits = (low, 1 + (1 - low) / 30)
    label = f"bins of about {round(len(sure) / len(bins))} pictures, one standard error"
    axes.plot([0, 1], [0, 1], color="#999999", linewidth=1, label="as sure as correct")
    axes.errorbar(x, y, error, fmt="o-", color=BLUE[0], capsize=3, label=label)
    axes.set(title="Reliability of the probabilities", xlim=limits, ylim=limits)
    axes.set(xlabel="probability given", ylabel="share that is correct")


def plot_strangers(axes, thresholds, friends, strangers, chosen, threshold):
    """Plot shares against the threshold: friends correctly classified, strangers called unknown.

    thresholds, friends, strangers: arrays (n,), of the readout. chosen: its threshold, marked.
    threshold: of the saved model, another one where it averages the readout with what was trained.
    """
    title = "Strangers"
    label = f"threshold {chosen:.3f}"
    if abs(threshold - chosen) > 5e-4:
        title += f" before fine-tuning (after it the threshold is {threshold:.3f})"
    axes.plot(thresholds, friends, color=BLUE[0], label="friends correct")
    axes.plot(thresholds, strangers, "--", color=ORANGE[0], label="strangers unknown")
    axes.axvline(chosen, color="#999999", linewidth=1, label=label)
    axes.set(title=title, xlabel="threshold", ylabel="share", xlim=(0, 1), ylim=(0, 1.03))


def plot_classes(axes, labels, actual, predicted):
    """Plot recall and precision of the classes, at most MATRIX_CLASSES, the weakest on top."""
    some = actual[actual == predicted], actual, predicted
    right, there, called = (np.bincount(each, minlength=len(labels)) for each in some)
    with np.errstate(invalid="ignore"):  # NaN where there is none
        recall, precision = right / there, right / called
    order = np.argsort(np.nan_to_num(recall + precision), kind="stable")[:MATRIX_CLASSES]
    names = [labels[i] for i in order]
    y = np.arange(len(order))
    axes.barh(y, recall[order], color="#56b4e9", height=0.7, label="recall (pictures found)")
    marks = {"color": ORANGE[0], "markersize": 5, "label": "precision (labels that are correct)"}
    axes.plot(precision[order], y, "D", **marks)
    axes.set_yticks(y, [name if len(name) < 30 else name[:29] + "…" for name in names])
    for tick, name in zip(axes.get_yticklabels(), names):
        tick.set(font=Path(font_file(name)), parse_math=False)
    is_whole = len(order) == len(labels)
    title = "Classes" if is_whole else f"The weakest {len(order)} of {len(labels)} classes"
    axes.set(title=title, xlabel="share", xlim=(0, 1.02), ylim=(len(order) - 0.5, -0.5))
