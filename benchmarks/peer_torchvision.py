"""One of the ways that peers.py compares: torchvision's InceptionV3 with the same weights.

    python benchmarks/peer_torchvision.py FOLDER WEIGHTS_FILE IMAGE_SIZE MAX_MINUTES

As in its tutorial: random crops and flips, all layers by SGD (1e-3, momentum 0.9), the rate divided by ten every
seven epochs, 25 epochs. Needs `pip install torch torchvision`, which the kit itself does not.
"""

import sys
import time
from pathlib import Path

import numpy as np
import torch
import torchvision
from common import utils
from torchvision.transforms import v2

BATCH, EPOCHS = 32, 25
LIKENESS = 0.9  # least correlation: torchvision counts the padding in its average pooling, Keras does not; mixed up: 0


def with_our_weights(weights, side, class_count):
    """Return torchvision's network with the numbers of a notop weights file; ends the program if they do not fit."""
    keras = utils.import_keras()
    keras.utils.clear_session()  # so that the layers are conv2d, conv2d_1… in the order in which both make them
    base = keras.applications.InceptionV3(weights=weights, include_top=False, input_shape=(side, side, 3))
    model = torchvision.models.inception_v3(weights=None, aux_logits=False, init_weights=False)
    blocks = [m for m in model.modules() if isinstance(m, torchvision.models.inception.BasicConv2d)]
    for number, block in enumerate(blocks):
        end = f"_{number}" if number else ""
        kernel = base.get_layer(f"conv2d{end}").get_weights()[0].transpose(3, 2, 0, 1)
        beta, mean, variance = base.get_layer(f"batch_normalization{end}").get_weights()
        arrays = {"conv.weight": kernel, "bn.bias": beta, "bn.running_mean": mean, "bn.running_var": variance}
        block.load_state_dict({name: torch.tensor(a) for name, a in arrays.items()}, strict=False)  # bn.weight is 1
    picture = np.random.default_rng(0).uniform(-1, 1, (1, side, side, 3)).astype("float32")
    ours, model.fc = base.predict_on_batch(picture).mean((0, 1, 2)), torch.nn.Identity()
    with torch.no_grad():
        theirs = model.eval()(torch.tensor(picture.transpose(0, 3, 1, 2))).numpy()[0]
    if np.corrcoef(ours, theirs)[0, 1] < LIKENESS:
        sys.exit("torchvision's features differ from Keras's: the weights were not carried over")
    model.fc = torch.nn.Linear(2048, class_count)
    return model


def main():
    """Fine-tune all layers, a line an epoch."""
    folder, weights, side, minutes = sys.argv[1:]
    start, side = time.monotonic(), int(side)
    torch.manual_seed(1)
    end = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize([0.5] * 3, [0.5] * 3)]
    shake = v2.Compose([v2.RandomResizedCrop(side), v2.RandomHorizontalFlip(), *end])
    plain = v2.Compose([v2.Resize(side), v2.CenterCrop(side), *end])
    train = torchvision.datasets.ImageFolder(Path(folder, "train"), shake)
    held = torchvision.datasets.ImageFolder(Path(folder, "validation"), plain)
    workers = {"batch_size": BATCH, "num_workers": utils.cores()}
    model = with_our_weights(weights, side, len(train.classes))
    optimizer = torch.optim.SGD(model.parameters(), 1e-3, momentum=0.9)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 7, 0.1)
    for epoch in range(1, EPOCHS + 1):
        model.train()
        for pixels, labels in torch.utils.data.DataLoader(train, shuffle=True, **workers):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(pixels), labels).backward()
            optimizer.step()
        schedule.step()
        model.eval()
        with torch.no_grad():
            batches = torch.utils.data.DataLoader(held, **workers)
            right = sum(int((model(pixels).argmax(1) == labels).sum()) for pixels, labels in batches)
        utils.say(f"epoch {epoch}: validation accuracy {right / len(held):.4f}")
        if time.monotonic() - start > 60 * float(minutes):
            return


if __name__ == "__main__":
    main()
