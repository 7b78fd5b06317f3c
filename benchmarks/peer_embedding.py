"""Question: how far ahead is a network that was made for faces, on faces?

    pip install dlib-bin face_recognition_models
    python benchmarks/peer_embedding.py SET… [--seeds 5] [options of train.py]

dlib's embedding, 128 numbers from a network trained on three million faces, and the nearest
neighbour among the training pictures, on the split of each seed as train.py makes it. Where dlib
finds no face, the middle half of the picture is taken for its box, as in the tagger's crops. The
two packages are for this script alone.
"""

import importlib.util
import tempfile
from pathlib import Path

import common
import numpy as np


def load_embedding():
    """Return a function: uint8 (side, side, 3) → (embedding float64 (128,), was a face found)."""
    import dlib

    [folder] = importlib.util.find_spec("face_recognition_models").submodule_search_locations
    models = Path(folder, "models")
    detect = dlib.get_frontal_face_detector()
    landmarks = dlib.shape_predictor(str(models / "shape_predictor_5_face_landmarks.dat"))
    network = dlib.face_recognition_model_v1(
        str(models / "dlib_face_recognition_resnet_model_v1.dat")
    )

    def embed(picture):
        """Return the embedding of a picture's largest face, and whether dlib has found one."""
        boxes = detect(picture, 1)
        quarter = len(picture) // 4
        middle = dlib.rectangle(quarter, quarter, 3 * quarter, 3 * quarter)
        box = max(boxes, key=lambda box: box.area(), default=middle)
        shape = landmarks(picture, box)
        return np.array(network.compute_face_descriptor(picture, shape)), bool(boxes)

    return embed


def one_set(folder, seeds, options, embed):
    """Return the table's row of a set: name, pictures, share with a face, accuracy."""
    accuracies, table = [], None
    with tempfile.TemporaryDirectory() as work:
        for seed in range(1, seeds + 1):
            _, data = common.read_split(folder, work, "--seed", seed, *options)
            pixels = data.pixels.rows
            if table is None:  # the order of the pictures is that of every seed
                found = [embed(np.array(pixels[picture.row])) for picture in data.pictures]
                table, has_face = map(np.array, zip(*found))
            split = data.targets, data.train, data.validation
            accuracies.append(common.nearest_neighbour(table, *split))
    return [folder, len(table), f"{has_face.mean():.2f}", common.spread(accuracies, 3)]


def main():
    """Embed each set once, score every split, print the table."""
    parser = common.make_parser(__doc__)
    parser.add_argument("sets", nargs="+")
    parser.add_argument("--seeds", type=int, default=5)
    args, options = parser.parse_known_args()
    embed = load_embedding()
    rows = [one_set(folder, args.seeds, options, embed) for folder in args.sets]
    common.print_machine(f"n = {args.seeds} seeds, options: {' '.join(options)}")
    common.print_table(["set", "pictures", "with a face", "accuracy: median (all)"], rows)


if __name__ == "__main__":
    main()
