"""The three files of a model, and other files of weights: what loads, and what people are told."""

import json
import shutil

import h5py
import numpy as np
import pytest

import model
import utils

LABELS = ["Ann", "Ben", "Cleo"]


@pytest.fixture(scope="module")
def network():
    """Return a network with random weights."""
    import keras

    keras.utils.set_random_seed(3)
    return model.build_network(3, 75)


@pytest.fixture(scope="module")
def saved(network, tmp_path_factory):
    """Save it as a model; tests use copies. Returns the folder."""
    folder = tmp_path_factory.mktemp("saved")
    model.save_model(network, {"labels": LABELS, "image_size": 75, "round": 2}, folder / "m")
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "copy")


def backbone(network):
    """Return the part of a network that a file of weights without a top fits."""
    import keras

    return keras.Model(network.get_layer("scaled").output, network.get_layer("mixed10").output)


def have_same_weights(one, other):
    pairs = zip(one.get_weights(), other.get_weights(), strict=True)
    return all(np.array_equal(a, b) for a, b in pairs)


def test_a_saved_model_comes_back(network, folder):
    loaded, info = model.load_model(folder / "m")
    assert have_same_weights(loaded, network)
    assert (info["labels"], info["image_size"], info["threshold"]) == (LABELS, 75, 0.5)


@pytest.mark.slow
def test_weights_alone_load_as_keras_loads_them(network, tmp_path):
    """Keras numbers the layers of a `.weights.h5` in another order than their names."""
    network.save_weights(tmp_path / "all.weights.h5")
    other = model.build_network(3, 75)
    model.load_arrays(other, tmp_path / "all.weights.h5")
    assert have_same_weights(other, network)
    backbone(network).save_weights(tmp_path / "notop.weights.h5")
    part = backbone(model.build_network(3, 75))
    model.load_arrays(part, tmp_path / "notop.weights.h5")
    assert have_same_weights(part, backbone(network))


def test_the_layout_that_keras_offers_for_download(weights_file):
    part, expected = (backbone(model.build_network(3, 75)) for _ in range(2))
    expected.load_weights(weights_file)
    model.load_arrays(part, weights_file)
    assert have_same_weights(part, expected)


@pytest.mark.slow
def test_packed_halves_and_names_of_keras_2_load(weights_file, tmp_path):
    """Names end in `:0`; arrays may be 16-bit and packed."""
    path = shutil.copy(weights_file, tmp_path / "w.h5")
    with h5py.File(path, "a") as file:
        for name in file:
            for key in list(file[name].get(name, ())):
                numbers = file[name][name].pop(key)[()]
                options = {"compression": "gzip", "shuffle": True} if numbers.ndim == 4 else {}
                inner = file[name][name]
                inner.create_dataset(f"{key}:0", data=numbers.astype("float16"), **options)
    part, expected = (backbone(model.build_network(3, 75)) for _ in range(2))
    expected.load_weights(weights_file)
    model.load_arrays(part, path)
    for array, numbers in zip(part.get_weights(), expected.get_weights(), strict=True):
        assert np.array_equal(array, numbers.astype("float16"))


def test_weights_of_another_network_are_told(tmp_path):
    import keras

    other = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)])
    other.save_weights(tmp_path / "other.weights.h5")
    with pytest.raises(utils.UserError, match=r"other\.weights\.h5: .*another network \(0 layers"):
        model.load_arrays(backbone(model.build_network(2, 75)), tmp_path / "other.weights.h5")


def test_a_prefix_with_its_ending_is_that_model(folder):
    assert model.check_model(folder / "m.h5") == model.check_model(folder / "m")


def test_a_lone_h5_says_what_is_missing(folder):
    (folder / "m.json").unlink()
    with pytest.raises(utils.UserError, match=r"m\.h5: m\.json missing beside it"):
        model.check_model(folder / "m.h5")
    (folder / "m-labels.json").unlink()
    with pytest.raises(utils.UserError, match=r"m\.json and m-labels\.json missing beside it"):
        model.check_model(folder / "m")
    with pytest.raises(utils.UserError, match="no such file"):
        model.check_model(folder / "n")


@pytest.mark.parametrize("labels", [["Ann", "Ben"], ["Ben", "Ann", "Cleo"]])
def test_labels_of_another_model_are_told(folder, labels):
    (folder / "m-labels.json").write_text(json.dumps(labels))
    with pytest.raises(
        utils.UserError, match=r"m-labels\.json: not the class names that m\.h5 was"
    ):
        model.check_model(folder / "m")


def test_an_architecture_of_another_training_is_told(folder):
    with open(folder / "m.json", "a") as file:
        file.write(" ")
    with pytest.raises(utils.UserError, match=r"m\.h5: does not belong to the \.json"):
        model.check_model(folder / "m")


def test_only_our_own_models_may_be_replaced(folder, network, tmp_path):
    assert model.may_replace_model(folder / "m") and model.may_replace_model(folder / "none")
    (folder / "m.h5").unlink()  # a kill during the first save
    assert model.may_replace_model(folder / "m")
    (folder / "m.json").write_text('{"my": "settings"}')
    assert not model.may_replace_model(folder / "m")
    network.save(tmp_path / "plain.h5")
    assert not model.may_replace_model(tmp_path / "plain")
    (tmp_path / "text.h5").write_text("not HDF5")
    assert not model.may_replace_model(tmp_path / "text")
    (tmp_path / "folder.h5").mkdir()
    assert not model.may_replace_model(tmp_path / "folder")


@pytest.mark.parametrize("backend", ["torch", "numpy", "openvino"])
def test_other_backends_are_told_in_one_line(monkeypatch, backend):
    monkeypatch.setenv("KERAS_BACKEND", backend)
    with pytest.raises(utils.UserError, match=f"KERAS_BACKEND={backend}: choose .*tensorflow, jax"):
        model.import_keras.__wrapped__()


def with_random_norms(network):
    """Give a network's normalisations numbers, as training would. Returns it."""
    import keras

    rng = np.random.default_rng(0)
    for layer in network.layers:
        if isinstance(layer, keras.layers.BatchNormalization):
            ranges = {"gamma": (0.5, 2), "beta": (0, 1), "moving_mean": (-1, 1)}
            drawn = [rng.uniform(*ranges.get(w.name, (0.5, 2)), w.shape) for w in layer.weights]
            layer.set_weights(drawn)
    return network


def folded_as_before(network, pixels):
    """Say whether folding changes nothing that a network gives, and takes its normalisations out."""
    import keras

    folded = model.fold_normalisation(network)
    kinds = {type(layer) for layer in folded.layers}
    before, after = (model.predict(m, pixels, 4) for m in (model.compiled(network), folded))
    assert before.std() > 0.1 and keras.layers.BatchNormalization not in kinds
    return np.allclose(before, after, atol=1e-4 * np.abs(before).max())


@pytest.mark.slow
def test_folding_the_normalisation_of_inception_changes_nothing():
    import keras

    network = with_random_norms(model.build_network(2, 75))
    part = keras.Model(network.input, network.get_layer("mixed8").output)
    pixels = np.random.default_rng(0).integers(0, 255, (4, 75, 75, 3)).astype("uint8")
    assert folded_as_before(part, pixels)


def chain(*layers):
    import keras

    inputs = outputs = keras.Input((9, 9, 3))
    for layer in layers:
        outputs = layer(outputs)
    return keras.Model(inputs, outputs)


def test_a_normalisation_with_all_its_numbers_is_folded():
    from keras.layers import BatchNormalization, Conv2D

    network = chain(Conv2D(4, 3, use_bias=False), BatchNormalization())
    pixels = np.random.default_rng(0).uniform(-1, 1, (4, 9, 9, 3)).astype("float32")
    assert folded_as_before(with_random_norms(network), pixels)


def test_what_folding_does_not_understand_is_an_error():
    from keras import layers

    norm = layers.BatchNormalization
    for unknown in (
        [layers.Conv2D(4, 3, use_bias=False, name="odd")],
        [layers.Conv2D(4, 3, name="odd"), norm()],
        [layers.DepthwiseConv2D(3, use_bias=False, name="odd"), norm()],
        [layers.Conv2D(4, 3, use_bias=False), norm(), layers.Dense(2, name="odd")],
    ):
        with pytest.raises(ValueError, match="odd: "):
            model.fold_normalisation(chain(*unknown))
