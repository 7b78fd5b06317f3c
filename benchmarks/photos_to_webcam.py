"""Question: does heavy augmentation carry a model from photos to a webcam?

    python benchmarks/photos_to_webcam.py DATA_DIR WEIGHTS_FILE
    python benchmarks/photos_to_webcam.py DATA_DIR WEIGHTS_FILE --seeds 1 --pictures 8 --rounds 1

Of each class of photo crops a fifth, drawn by a seed, is held out, and train.py learns from the others, once with
--heavy-augmentation and once with --no-heavy-augmentation. The held-out pictures are scored with --evaluate as they
are, and made as bad as a webcam's: faces of 70 to 90 pixels, blurred, with another gamma, noisy, saved as JPEG of
quality 40. Both models see the same bad pictures. Other options are those of train.py.
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np
from common import held_out_accuracy, link_classes, machine, print_table, read_folder, run_command, train_py, utils
from pictures_per_class import draw_lots
from PIL import Image, ImageFilter

FACE = (70, 90)  # pixels: side of the face box in what a webcam sees
BLUR = (0.5, 1.5)  # pixels: standard deviation
GAMMA = (0.6, 1.6)
NOISE = (3, 10)  # grey levels: standard deviation
QUALITY = 40
WAYS = {"heavy": "--heavy-augmentation", "light": "--no-heavy-augmentation"}


def parse_arguments():
    """Read the command line. Returns (arguments, options for train.py)."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data_dir", type=Path)
    parser.add_argument("weights", type=Path)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--pictures", type=int, help="of each class to train with, at most (default: all)")
    parser.add_argument(
        "--context", type=float, default=2.0, help="side of a crop in face boxes (default: %(default)s)"
    )
    return parser.parse_known_args()


def as_seen_by_a_webcam(image, rng, context):
    """Return a PIL image as a webcam's crop: its centre square, small, blurred, with another gamma, noisy."""
    side = round(context * rng.uniform(*FACE))
    small = Image.fromarray(utils.square(image, side)).filter(ImageFilter.GaussianBlur(rng.uniform(*BLUR)))
    low, high = np.log(GAMMA)
    pixels = 255 * (np.asarray(small) / 255) ** np.exp(rng.uniform(low, high))
    pixels += rng.normal(0, rng.uniform(*NOISE), pixels.shape)
    return Image.fromarray(np.clip(pixels, 0, 255).astype("uint8"))


def divide(args, folder, seed):
    """Write fit/, photos/ and webcam/ with folders of classes: to train with, held out, and held out made bad."""
    _, labels, paths = read_folder(args.data_dir, 75)
    held, (fit,) = draw_lots(labels, [args.pictures], seed)
    for part, indices in (("fit", fit), ("photos", held)):
        link_classes(paths, labels, indices, folder / part)
    for i in held:
        target = folder / "webcam" / labels[i] / f"{i:06d}.jpg"
        target.parent.mkdir(parents=True, exist_ok=True)
        _, image = utils.read_picture(paths[i])
        bad = as_seen_by_a_webcam(image, np.random.default_rng([seed, int(i)]), args.context)
        bad.save(target, quality=QUALITY)


def one_seed(args, options, seed):
    """Train both ways. Returns accuracies: heavy on photos, on a webcam's; light on photos, on a webcam's."""
    found = []
    with tempfile.TemporaryDirectory() as folder:
        divide(args, Path(folder), seed)
        for way in WAYS.values():
            run_command(train_py("fit", way, "--weights", args.weights.resolve(), "--seed", seed, *options), folder)
            found += [held_out_accuracy(part, folder) for part in ("photos", "webcam")]
    return found


def main():
    """Train and score with every seed, and print the table."""
    args, options = parse_arguments()
    rows = [one_seed(args, options, seed) for seed in range(1, args.seeds + 1)]
    print(machine(), f"n = {args.seeds} seeds, options of train.py: {' '.join(options) or 'none'}", sep="\n")
    header = [f"{way}, {part}" for way in WAYS for part in ("held-out photos", "as a webcam's")]
    cells = {**dict(enumerate(rows, 1)), "mean": np.mean(rows, axis=0)}
    print_table(["seed", *header], [[name, *(f"{x:.3f}" for x in row)] for name, row in cells.items()])


if __name__ == "__main__":
    main()
