"""Makes the pictures of the README, docs/*.png and docs/tagged.jpg: a few minutes.

    python tests/docs_pictures.py
    python tests/docs_pictures.py docs how-it-works

The second command draws the network only. All else shows what the programs make of cartoon faces:
six people with twenty pictures each, three of which lie in a wrong folder on purpose.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

import av
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
WIDTH = 900  # pixels, of what is scaled down
SAMPLE = "cartoons --people 6 --pictures 20 --clip film.mp4"
TRAIN = "cartoons model --weights none --image-size 75 --validation-split 0.6 --rounds 0"
TAG = "model --source film.mp4 --output tagged.mp4 --no-display --threshold 0"
COLOURS = 256  # of a palette: as good as all, at a quarter of the size
FILM_FRAME = 60  # of tagged.mp4: both people face the camera
MOVED = ("Ann/003.jpg", "Ben"), ("Dan/005.jpg", "Eva"), ("Mihály/002.jpg", "Cleo")  # file, folder
FROZEN, FITTED, TRAINED, PLAIN = "#cfe3f3", "#ffd9a8", "#d8ecd2", "#eeeeee"

# x, y, width, height, colour and text of the boxes of how-it-works.png
BOXES = (
    (0.1, 3.2, 1.3, 1.0, PLAIN, "picture\n224 x 224 RGB"),
    (1.9, 3.2, 1.1, 1.0, FROZEN, "mixed0\nto mixed3"),
    (3.2, 3.2, 1.1, 1.0, FROZEN, "mixed4\nmixed5"),
    (4.5, 3.2, 1.1, 1.0, FROZEN, "mixed6\nmixed7"),
    (5.8, 3.2, 1.1, 1.0, FROZEN, "mixed8"),
    (7.1, 3.2, 1.1, 1.0, FROZEN, "mixed9\nmixed10"),
    (7.1, 4.75, 1.1, 0.9, TRAINED, "mixed9\nmixed10\ntrained"),
    (8.7, 4.75, 1.5, 0.9, TRAINED, "dense layers\n(only if they help)"),
    (1.9, 1.75, 6.3, 0.65, PLAIN,
     "levels: means of feature maps, those of mixed3 and 5 in 3 x 3 cells"),
    (1.9, 0.3, 2.6, 0.8, FITTED, "readout:\nridge regression"),
    (5.0, 0.3, 2.2, 0.8, FITTED, "temperature by\nvariance; softmax"),
    (7.7, 0.3, 2.5, 0.8, FITTED, "threshold:\na name or unknown"),
)  # fmt: skip
# from, to: corners of the arrows
ARROWS = (
    ((1.4, 3.7), (1.9, 3.7)),
    ((3.0, 3.7), (3.2, 3.7)),
    ((4.3, 3.7), (4.5, 3.7)),
    ((5.6, 3.7), (5.8, 3.7)),
    ((6.9, 3.7), (7.1, 3.7)),
    ((6.4, 4.2), (7.1, 5.2)),
    ((8.2, 5.2), (8.7, 5.2)),
    ((3.2, 1.75), (3.2, 1.1)),
    ((4.5, 0.7), (5.0, 0.7)),
    ((7.2, 0.7), (7.7, 0.7)),
    ((5.4, 1.75), (5.4, 1.1)),
)
LEVELS = (2.45, 3.75, 6.35, 7.65)  # x of the arrows from a block to its level


def draw_network(path):
    """Draw how a picture becomes a name."""
    figure = Figure(figsize=(10.4, 5.9))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, 10.4), ylim=(0, 5.9))
    axes.set_axis_off()
    for x, y, width, height, colour, text in BOXES:
        axes.add_patch(FancyBboxPatch((x, y), width, height, "round,pad=0,rounding_size=0.1",
                                      facecolor=colour, edgecolor="#444444"))  # fmt: skip
        axes.text(x + width / 2, y + height / 2, text, ha="center", va="center", fontsize=11)
    levels = [((x, 3.2), (x, 2.4)) for x in LEVELS]
    style = {"arrowstyle": "->", "color": "#444444", "linewidth": 1.3}
    for start, end in (*ARROWS, *levels):
        axes.annotate("", end, start, arrowprops=style)
    # what is trained has logits of its own, which are averaged with those of the readout
    axes.plot((9.45, 9.45, 6.1), (4.75, 1.45, 1.45), color="#444444", linewidth=1.3, linestyle="--")
    axes.annotate("", (6.1, 1.1), (6.1, 1.45), arrowprops=style | {"linestyle": "--"})
    keys = ((FROZEN, "frozen: InceptionV3 as it came"), (FITTED, "fitted in closed form"),
            (TRAINED, "trained by gradient steps"))  # fmt: skip
    for n, (colour, text) in enumerate(keys):
        axes.plot(0.3, 5.6 - 0.36 * n, "s", color=colour, markeredgecolor="#444444", markersize=12)
        axes.text(0.5, 5.6 - 0.36 * n, text, va="center", fontsize=11)
    figure.savefig(path, dpi=90)


def run(folder, script, *words):
    """Run one of the programs in a folder."""
    subprocess.run([sys.executable, str(ROOT / script), *words], cwd=folder, check=True)


def make_model(folder):
    """Draw cartoon faces, put three into wrong folders, train on all, and tag a film."""
    run(folder, "tests/sample_faces.py", *SAMPLE.split())
    for file, other in MOVED:
        path = folder / "cartoons" / file
        path.rename(folder / "cartoons" / other / f"moved-{path.name}")
    run(folder, "train.py", *TRAIN.split())
    run(folder, "webcam.py", *TAG.split())


def save_small(image, path):
    """Save a picture as a small PNG, no wider than WIDTH."""
    if image.width > WIDTH:
        height = round(image.height * WIDTH / image.width)
        image = image.resize((WIDTH, height), Image.Resampling.LANCZOS)
    way = Image.Quantize.MAXCOVERAGE  # keeps thin lines in their colours
    image.quantize(COLOURS, way, dither=Image.Dither.NONE).save(path, optimize=True)


def frame_of(path, index):
    """Return one frame of a film as a picture."""
    with av.open(str(path)) as film:
        for number, frame in enumerate(film.decode(video=0)):
            if number == index:
                return frame.to_image()


def main():
    """Make all pictures, or those that are named."""
    target, *names = [Path(word) for word in sys.argv[1:]] or [ROOT / "docs"]
    target.mkdir(exist_ok=True)
    draw_network(target / "how-it-works.png")
    with Image.open(target / "how-it-works.png") as image:
        save_small(image.convert("RGB"), target / "how-it-works.png")
    if names:
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_model(folder)
        for source, picture in (
            ("000", "mosaic"),
            ("model-report", "report"),
            ("model-review", "review"),
        ):
            with Image.open(folder / f"{source}.png") as image:
                save_small(image.convert("RGB"), target / f"{picture}.png")
        frame_of(folder / "tagged.mp4", FILM_FRAME).save(target / "tagged.jpg", quality=85)


if __name__ == "__main__":
    main()
