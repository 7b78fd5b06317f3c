"""One of the ways that peers.py compares: logistic regression on features of the frozen network.

    python benchmarks/peer_logistic.py FOLDER WEIGHTS_FILE IMAGE_SIZE LAYER

Trained on plain and flipped pictures of FOLDER/train, scored on FOLDER/validation. LAYER: mixed10
is the network's last, as `pooling="avg"` gives it. The weight decay is chosen on a quarter of the
training pictures.
"""

import sys

import numpy as np
from common import pooled_features, read_parts, utils

DECAYS = (10, 1, 0.1, 0.01, 1e-3, 1e-4)


def fit(x, hot, decay):
    """Return weights (columns, classes) of logistic regression. x: (n, columns). hot: one-hot."""
    from scipy.optimize import minimize
    from scipy.special import log_softmax

    shape = x.shape[1], hot.shape[1]

    def loss(flat):
        """Return the mean log loss with weight decay, and its slope."""
        weights = flat.reshape(shape)
        logs = log_softmax(x @ weights, axis=1)
        slope = x.T @ (np.exp(logs) - hot) / len(x) + decay * weights
        return -(hot * logs).sum() / len(x) + decay / 2 * (flat**2).sum(), slope.ravel()

    start, options = np.zeros(shape[0] * shape[1]), {"maxiter": 200}
    return minimize(loss, start, jac=True, method="L-BFGS-B", options=options).x.reshape(shape)


def main():
    """Choose the weight decay, fit, and print the line of the one epoch."""
    folder, weights, side, layer = sys.argv[1:]
    pixels, targets, plain, held = read_parts(folder, int(side))
    n, every = len(plain), len(targets)
    features = pooled_features(weights, layer, np.concatenate([pixels, pixels[plain, :, ::-1]]))
    seen = features[np.r_[plain, every : every + n]]
    features = np.c_[(features - seen.mean(0)) / (seen.std(0) + 1e-6), np.ones(len(features))]
    hot = np.eye(targets.max() + 1)[targets]

    def accuracy(use, test, decay):
        """Return the accuracy on `test` of a fit to `use` and its mirror images."""
        both = features[np.r_[use, use + every]]  # flipped pictures come last, in the same order
        weights = fit(both, hot[np.r_[use, use]], decay)
        return ((features[test] @ weights).argmax(1) == targets[test]).mean()

    order = np.random.default_rng(1).permutation(n)
    test, inner = order[: n // 4], order[n // 4 :]
    best = max(DECAYS, key=lambda decay: accuracy(inner, test, decay))
    utils.print_line(f"epoch 1: validation accuracy {accuracy(plain, held, best):.4f}")


if __name__ == "__main__":
    main()
