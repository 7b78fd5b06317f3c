"""One of the ways that peers.py compares: ridge regression on features of the frozen network.

    python benchmarks/peer_ridge.py FOLDER WEIGHTS_FILE IMAGE_SIZE LAYER

One pass of the network up to LAYER over the pictures as they are, in FOLDER/train and
FOLDER/validation, and the pooled features of that layer. The strength is chosen on a quarter of
the training pictures.
"""

import sys

from common import pooled_features, read_parts, ridge_readout, utils


def main():
    """Fit, and print the line of the one epoch."""
    folder, weights, side, layer = sys.argv[1:]
    pixels, targets, fit, held = read_parts(folder, int(side))
    accuracy = ridge_readout(pooled_features(weights, layer, pixels), targets, fit, held)
    utils.print_line(f"epoch 1: validation accuracy {accuracy:.4f}")


if __name__ == "__main__":
    main()
