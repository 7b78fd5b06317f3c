"""One of the ways that peers.py compares: the recipe of 2016, rebuilt on Keras 3.

    python benchmarks/peer_2016.py FOLDER WEIGHTS_FILE IMAGE_SIZE MAX_MINUTES

Every picture is in memory as float32, the whole network in every step, each epoch on freshly
augmented pictures (rotation 45 degrees, shifts 0.25, zoom 0.5 to 1.5, channel shift, flip): 20
epochs of new dense layers by RMSprop, then 10 rounds of 20 epochs of the top two inception blocks
by SGD (1e-4, momentum 0.9), in batches of 128. It gets what it did not have: pictures decoded in
parallel, a bare loop of `train_on_batch`, and the next batch prepared meanwhile.
"""

import sys
import time

import common
import numpy as np
from common import model, utils

START = time.monotonic()
HEAD_EPOCHS, EPOCHS = 20, 220


def augmented(pixels, rng):
    """Return a turned, shifted, zoomed, tinted, maybe flipped copy of float32 (side, side, 3)."""
    import cv2

    side, angle = len(pixels), np.deg2rad(rng.uniform(-45, 45))
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    matrix = turn @ np.diag(rng.uniform(0.5, 1.5, 2) * (rng.choice((-1, 1)), 1))
    middle = np.full(2, (side - 1) / 2)
    offset = middle - matrix @ (middle + rng.uniform(-0.25, 0.25, 2) * side)
    matrix, edge = np.column_stack([matrix, offset]), cv2.BORDER_REPLICATE
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    view = cv2.warpAffine(pixels, matrix, (side, side), flags=flags, borderMode=edge)
    return np.clip(view + rng.uniform(-25, 25, 3).astype("float32"), 0, 255)


def build(weights, side, class_count):
    """Return (whole network, its InceptionV3) with the dense layers of 2016: 1024, softmax."""
    keras = model.import_keras()
    layers, builder = keras.layers, keras.applications.InceptionV3
    base = builder(weights=weights, include_top=False, input_shape=(side, side, 3))
    pooled = layers.GlobalAveragePooling2D()(base.output)
    outputs = layers.Dense(class_count, "softmax")(layers.Dense(1024, "relu")(pooled))
    return keras.Model(base.input, outputs), base


def compile_epoch(network, base, epoch):
    """Choose what is trained, and how, where the recipe changes it."""
    optimizers, loss = model.import_keras().optimizers, "categorical_crossentropy"
    if epoch == 1:
        base.trainable = False
        model.compiled(network, optimizer=optimizers.RMSprop(), loss=loss)
    if epoch == HEAD_EPOCHS + 1:
        base.trainable = True
        for layer in base.layers[: base.layers.index(base.get_layer("mixed8")) + 1]:
            layer.trainable = False
        model.compiled(network, optimizer=optimizers.SGD(1e-4, momentum=0.9), loss=loss)


def main():
    """Train as in 2016, a line an epoch."""
    folder, weights, side, minutes = sys.argv[1:]
    pixels, actual, fit, held = common.read_parts(folder, int(side))
    targets = np.eye(actual.max() + 1, dtype="float32")[actual]
    pixels, scored = pixels[fit].astype("float32"), pixels[held].astype("float32") / 127.5 - 1
    model.import_keras().utils.set_random_seed(1)
    rng = np.random.default_rng(1)
    network, base = build(weights, int(side), targets.shape[1])

    def batch(indices):
        """Return augmented pictures, scaled, and their targets."""
        return np.stack([augmented(pixels[i], rng) for i in indices]) / 127.5 - 1, targets[indices]

    for epoch in range(1, EPOCHS + 1):
        compile_epoch(network, base, epoch)
        order = rng.permutation(len(pixels))
        steps = [order[i : i + 128] for i in range(0, len(order), 128)]
        for views, wanted in utils.ordered_parallel_map(batch, steps, workers=1):
            network.train_on_batch(views, wanted)
        accuracy = (model.predict(network, scored, 64).argmax(1) == actual[held]).mean()
        utils.print_line(f"epoch {epoch}: validation accuracy {accuracy:.4f}")
        if time.monotonic() - START > 60 * float(minutes):
            return


if __name__ == "__main__":
    main()
