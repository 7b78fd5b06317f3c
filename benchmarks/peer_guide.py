"""One of the ways that peers.py compares: the transfer learning of Keras's guide.

    python benchmarks/peer_guide.py FOLDER WEIGHTS_FILE IMAGE_SIZE MAX_MINUTES

`image_dataset_from_directory` on FOLDER/train and FOLDER/validation, kept once decoded; random
flips and rotations; a frozen InceptionV3, dropout 0.2 and one dense layer by Adam (1e-3), 20
epochs; then all of it by Adam (1e-5).
"""

import sys
import time
from pathlib import Path

from common import model, utils

HEAD_EPOCHS, EPOCHS = 20, 25
BATCH = 32


def read(keras, folder, side):
    """Return training and validation pictures as tf.data sets."""
    size = {"image_size": (side, side), "crop_to_aspect_ratio": True}
    size |= {"batch_size": None, "verbose": False}
    read_part = keras.utils.image_dataset_from_directory
    train = read_part(Path(folder, "train"), seed=1, **size)
    held = read_part(Path(folder, "validation"), shuffle=False, **size)
    layers = keras.layers.RandomFlip("horizontal"), keras.layers.RandomRotation(0.1)
    shake = keras.Sequential(layers)
    train = train.cache().shuffle(1000).batch(BATCH).map(lambda x, y: (shake(x, training=True), y))
    return train.prefetch(2), held.batch(BATCH).cache().prefetch(2)


def build(keras, weights, side, class_count):
    """Return (whole network, its InceptionV3)."""
    layers, shape = keras.layers, (side, side, 3)
    builder = keras.applications.InceptionV3
    base = builder(weights=weights, include_top=False, input_shape=shape)
    inputs = keras.Input(shape)
    scaled = layers.Rescaling(1 / 127.5, offset=-1)(inputs)
    pooled = layers.GlobalAveragePooling2D()(base(scaled, training=False))
    outputs = layers.Dense(class_count)(layers.Dropout(0.2)(pooled))
    return keras.Model(inputs, outputs), base


def main():
    """Train the new layer, then all of it, a line an epoch."""
    folder, weights, side, minutes = sys.argv[1:]
    start, keras = time.monotonic(), model.import_keras()
    keras.utils.set_random_seed(1)
    train, held = read(keras, folder, int(side))
    network, base = build(keras, weights, int(side), len(list(Path(folder, "train").iterdir())))
    scores, network.stop_training = [], False

    def tell(_, logs):
        """Print an epoch's line, and stop when the time is up."""
        scores.append(logs["val_accuracy"])
        utils.print_line(f"epoch {len(scores)}: validation accuracy {scores[-1]:.4f}")
        network.stop_training = time.monotonic() - start > 60 * float(minutes)

    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    for trained, rate, epochs in ((False, 1e-3, HEAD_EPOCHS), (True, 1e-5, EPOCHS)):
        if not network.stop_training:
            base.trainable = trained
            network.compile(keras.optimizers.Adam(rate), loss, metrics=["accuracy"])
            teller = keras.callbacks.LambdaCallback(on_epoch_end=tell)
            network.fit(train, validation_data=held, epochs=epochs, callbacks=[teller], verbose=0)


if __name__ == "__main__":
    main()
