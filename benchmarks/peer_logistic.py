"""One of the ways that peers.py compares: logistic regression on pooled features of the frozen network.

    python benchmarks/peer_logistic.py FOLDER WEIGHTS_FILE IMAGE_SIZE LAYER

Trained on plain and flipped pictures of FOLDER/train, scored on FOLDER/validation. LAYER: mixed10 is the network's
last, as `pooling="avg"` gives it. The weight decay is chosen on a quarter of the training pictures.
"""

import sys

import numpy as np
from common import pooled_features, read_folder, utils

DECAYS = (10, 1, 0.1, 0.01, 1e-3, 1e-4)


def fit(x, hot, decay):
    """Return the weights (columns, classes) of multinomial logistic regression. x: (n, columns). hot: (n, classes)."""
    from scipy.optimize import minimize
    from scipy.special import log_softmax

    shape = x.shape[1], hot.shape[1]

    def loss(flat):
        """Return the mean log loss with weight decay, and its slope."""
        weights = flat.reshape(shape)
        logs = log_softmax(x @ weights, axis=1)
        slope = x.T @ (np.exp(logs) - hot) / len(x) + decay * weights
        return -(hot * logs).sum() / len(x) + decay / 2 * (flat**2).sum(), slope.ravel()

    found = minimize(
        loss, np.zeros(shape[0] * shape[1]), jac=True, method="L-BFGS-B", options={"maxiter": 200}
    )
    return found.x.reshape(shape)


def main():
    """Choose the weight decay, fit, and print the line of the one epoch."""
    folder, weights, side, layer = sys.argv[1:]
    pixels, labels, _ = read_folder(f"{folder}/train", int(side))
    held, actual, _ = read_folder(f"{folder}/validation", int(side))
    n, classes = len(pixels), np.unique(labels)
    features = pooled_features(weights, layer, np.concatenate([pixels, pixels[:, :, ::-1], held]))
    seen = features[: 2 * n]
    features = np.c_[(features - seen.mean(0)) / (seen.std(0) + 1e-6), np.ones(len(features))]
    hot = np.eye(len(classes))[np.searchsorted(classes, labels)]

    def guess(use, rows, decay):
        model = fit(features[np.r_[use, use + n]], hot[np.r_[use, use]], decay)
        return (features[rows] @ model).argmax(1)

    order = np.random.default_rng(1).permutation(n)
    test, inner = order[: n // 4], order[n // 4 :]
    right = [(guess(inner, test, decay) == hot[test].argmax(1)).mean() for decay in DECAYS]
    predicted = guess(order, slice(2 * n, None), DECAYS[int(np.argmax(right))])
    utils.print_line(f"epoch 1: validation accuracy {(classes[predicted] == actual).mean():.4f}")


if __name__ == "__main__":
    main()
