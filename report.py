"""What is drawn after training: the confusion matrix made of pictures, and the report."""

import contextlib
import functools
import logging
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

import utils

TURNED = 8  # length of a class name that is turned by a quarter, in font sizes
MOSAIC_CLASSES = 40  # more would leave thumbnails too small to recognise
BLUE, ORANGE = (
    ("#0072b2", "#deebf5"),
    ("#d55e00", "#fae3d5"),
)  # right and wrong, strong and pale: told apart by all
INK, GREY, LINE = "#222222", "#666666", "#e4e4e4"


# ---------------------------------------------------------------- mosaic and report


@functools.cache
def import_matplotlib():
    """Import matplotlib with its own settings: it would read those of the current folder, whoever they are from."""
    logging.getLogger("matplotlib").setLevel("CRITICAL")
    import matplotlib

    matplotlib.rcdefaults()


@functools.cache
def font_file(text):
    """Return the path of a font that has every character of `text`: DejaVu Sans, else one of the system's."""
    import_matplotlib()
    from matplotlib import font_manager, ft2font

    first = font_manager.findfont("DejaVu Sans")

    def candidates():
        """Yield font files; looking through the system's takes long."""
        yield first
        yield from sorted(
            font_manager.findSystemFonts(),
            key=lambda path: ("CJK" not in path, "Bold" in path, path),
        )

    for path in candidates():
        with contextlib.suppress(RuntimeError, OSError):
            if set(map(ord, text)) <= set(ft2font.FT2Font(path).get_charmap()):
                return path
    return first


def draw_text(draw, xy, text, size, fill, anchor="la", width=None):
    """Write one line of any script on a PIL drawing, cut to `width` pixels with an ellipsis if given."""
    font = ImageFont.truetype(font_file(text), size)
    if width is not None and font.getlength(text) > width:
        while text and font.getlength(text + "…") > width:
            text = text[:-1]
        text += "…"
    draw.text(xy, text, fill, font, anchor)


def draw_confusion_matrix(path, prefix, title, labels, actual, predicted, pictures):
    """Draw the confusion matrix with the pictures themselves: a row a class, a column for what it was taken for.

    labels: class names. actual, predicted: int arrays (n,). pictures: a function from 0..n-1 to uint8
    (side, side, 3). With more than MOSAIC_CLASSES classes, those with the most mistakes are shown.
    """
    wrong = np.bincount(
        np.r_[actual[actual != predicted], predicted[actual != predicted]], minlength=len(labels)
    )
    shown = np.sort(np.argsort(-wrong, kind="stable")[:MOSAIC_CLASSES])
    cell = int(np.clip(2400 // len(shown), 93, 560))
    size = int(np.clip(cell // 15, 20, 32))  # of the class names, in pixels
    widest = max(ImageFont.truetype(font_file(labels[i]), size).getlength(labels[i]) for i in shown)
    left = round(np.clip(widest + 40, 6.5 * size, 17 * size))
    turned = cell - 8 <= widest and cell < TURNED * size  # by a quarter, to stand above the columns
    top = 120 + size * (TURNED if turned else 2)
    canvas = Image.new(
        "RGB", (left + cell * len(shown) + 20, top + cell * len(shown) + 20), "white"
    )
    draw, wide = ImageDraw.Draw(canvas), canvas.width - 40
    note = (
        ""
        if len(shown) == len(labels)
        else f", the {len(shown)} most confused of {len(labels)} classes"
    )
    draw_text(draw, (20, 18), title, 30, INK, width=wide)
    draw_text(
        draw,
        (20, 60),
        f"rows: what it is; columns: what it was taken for{note}",
        18,
        GREY,
        width=wide,
    )
    for row, a in enumerate(shown):
        y, x = top + row * cell, left + row * cell
        total, right = (actual == a).sum(), ((actual == a) & (predicted == a)).sum()
        draw_text(draw, (left - 12, y + cell // 2 - 2), labels[a], size, INK, "rs", left - 24)
        draw_text(
            draw, (left - 12, y + cell // 2 + size), f"{right} of {total}", size - 4, GREY, "rs"
        )
        draw_column_name(canvas, (x, top - 12), labels[a], size, cell, turned)
        for column, p in enumerate(shown):
            inside = np.flatnonzero((actual == a) & (predicted == p))
            draw_cell(canvas, (left + column * cell, y), cell, pictures, inside, a == p)
    chunk = PngInfo()
    chunk.add_text("Software", f"{utils.KIT}: {prefix}")
    with utils.atomic_write(path) as part:
        canvas.save(part, "PNG", pnginfo=chunk)


def draw_column_name(canvas, corner, name, size, cell, turned):
    """Write a class name above its column, upright or turned."""
    x, bottom = corner
    if not turned:
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
        picture = Image.fromarray(pictures(index)).resize(
            (thumb - 2, thumb - 2), Image.Resampling.LANCZOS
        )
        canvas.paste(picture, (x + 6 + n % across * thumb, y + 6 + n // across * thumb))
    text, size = str(len(inside)), int(np.clip(cell // 18, 13, 26))
    wide = size * len(text) * 0.65 + 8
    draw.rectangle((x + 1, y + 1, x + 1 + wide, y + 5 + size), fill=strong)
    draw_text(draw, (x + 1 + wide / 2, y + 3 + size // 2), text, size, "white", "mm")


def draw_report(path, title, labels, actual, probabilities, history=None):
    """Draw learning curves (if there is a history), scores of each class, and reliability as one PNG.

    actual: int (n,). probabilities: (n, classes). history: list of dicts, an epoch each, with the
    columns of `model-history.csv`. With over MOSAIC_CLASSES classes those with the lowest scores are shown.
    """
    import_matplotlib()
    from matplotlib.figure import Figure

    recall, precision = class_scores(actual, probabilities.argmax(1), len(labels))
    order = np.argsort(np.nan_to_num(recall + precision), kind="stable")[:MOSAIC_CLASSES]
    weakest = [labels[i] for i in order], recall[order], precision[order]
    panels = [  # (height in inches, function that plots it)
        (3.2, lambda axes: plot_reliability(axes, actual, probabilities)),
        (1.2 + 0.24 * len(order), lambda axes: plot_classes(axes, *weakest, len(labels))),
    ]
    if history:
        panels.insert(0, (3.2, lambda axes: plot_history(axes, history)))
    heights = [height for height, _ in panels]
    figure = Figure(figsize=(9, sum(heights) + 0.3), layout="constrained")
    figure.suptitle(title, parse_math=False, font=Path(font_file(title)))
    for axes, (_, plot) in zip(figure.subplots(len(panels), 1, height_ratios=heights), panels):
        plot(axes)
    with utils.atomic_write(path) as part:
        figure.savefig(part, dpi=110, metadata={"Software": utils.KIT})


def class_scores(actual, predicted, class_count):
    """Return recall and precision of each class, float (class_count,) each, NaN where undefined."""
    right = np.bincount(actual[actual == predicted], minlength=class_count).astype(float)
    with np.errstate(invalid="ignore"):
        recall = right / np.bincount(actual, minlength=class_count)
        return recall, right / np.bincount(predicted, minlength=class_count)


def plot_history(axes, history):
    """Plot accuracy against epochs: training, augmented validation, plain validation."""
    epochs = np.arange(1, len(history) + 1)
    curves = (
        ("accuracy", "training", BLUE[0], "-"),
        ("val_accuracy", "validation, augmented", "#e69f00", "--"),
    )
    for key, label, colour, line in (*curves, ("plain_accuracy", "validation", "#000000", "o")):
        points = [(e, row[key]) for e, row in zip(epochs, history) if row[key] != ""]
        axes.plot(*zip(*points), line, color=colour, label=label)
    axes.set(xlabel="epoch", ylabel="accuracy", ylim=(0, 1.03))
    axes.set_title("Learning curves", loc="left")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")


def plot_reliability(axes, actual, probabilities):
    """Plot how often the model is right against how sure it is, in ten bins of equally many pictures."""
    sure, right = probabilities.max(1), probabilities.argmax(1) == actual
    groups = np.array_split(np.argsort(sure), min(10, len(sure)))
    axes.plot([0, 1], [0, 1], color="#999999", linewidth=1, label="as sure as right")
    x, y, n = (
        [f(g) for g in groups] for f in (lambda g: sure[g].mean(), lambda g: right[g].mean(), len)
    )
    axes.plot(x, y, "o-", color=BLUE[0], label=f"bins of about {round(np.mean(n))} pictures")
    axes.set(
        xlabel="probability given", ylabel="share that is right", ylim=(-0.03, 1.03), xlim=(0, 1.02)
    )
    axes.set_title("Reliability of the probabilities", loc="left")
    axes.grid(alpha=0.3)
    axes.legend(loc="upper left")


def plot_classes(axes, labels, recall, precision, class_count):
    """Plot recall and precision of classes, the weakest on top."""
    y = np.arange(len(labels))
    axes.barh(y, recall, color="#56b4e9", height=0.7, label="recall (pictures found)")
    axes.plot(
        precision, y, "D", color=ORANGE[0], markersize=5, label="precision (tags that are right)"
    )
    axes.set_yticks(y, [label if len(label) < 30 else label[:29] + "…" for label in labels])
    for tick, label in zip(axes.get_yticklabels(), labels):
        tick.set(font=Path(font_file(label)), parse_math=False)
    axes.set(xlim=(0, 1.02), ylim=(len(labels) - 0.5, -0.5))
    title = (
        "Classes"
        if len(labels) == class_count
        else f"The weakest {len(labels)} of {class_count} classes"
    )
    axes.set_title(title, loc="left")
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2, frameon=False, borderaxespad=0.2)
