"""The three files of a model, and other files of weights: what loads, and what people are told."""

import os
import shutil

import h5py
import numpy as np
import pytest
import tiny_network

import model
import utils

LABELS = ["Ann", "Ben", "Cleo"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Save a tiny network with random weights as a model. Returns (folder, network)."""
    folder = tmp_path_factory.mktemp("saved")
    with tiny_network.installed():
        network = model.build_network(3, 75)
        model.save_model(network, {"labels": LABELS, "image_size": 75, "round": 2}, folder / "m")
    return folder, network


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved[0], tmp_path / "copy")


def have_same_weights(one, other):
    pairs = zip(one.get_weights(), other.get_weights(), strict=True)
    return all(np.array_equal(a, b) for a, b in pairs)


def test_a_saved_model_comes_back(saved, folder, tiny):
    loaded, info = model.load_model(folder / "m")
    assert have_same_weights(loaded, saved[1])
    assert (info["labels"], info["image_size"], info["threshold"]) == (LABELS, 75, 0.5)
    for name in ("a/m.h5", "a/m.json", "a/m-labels.json", "a/m"):
        assert model.prefix_of(name) == "a/m"
    assert model.prefix_of("a/.h5") == "a/.h5"  # a name of nothing else is no ending


def test_a_model_of_an_edited_network_is_refused(folder, tiny, monkeypatch):
    """Its layers may have the same names and shapes."""
    network = model.build_network(3, 75)
    info = {"labels": LABELS, "image_size": 75, "round": 2, "base": model.describe("learned")}
    model.save_model(network, info, folder / "m")
    assert model.load_model(folder / "m")[1]["base"].startswith("Tiny, ")
    monkeypatch.setattr(model, "BASE", model.BASE._replace(offset=-0.5))
    with pytest.raises(utils.UserError, match=r"m\.h5: of another network \(Tiny, .*train again"):
        model.load_model(folder / "m")


@pytest.mark.slow
def test_weights_of_inception_load_as_keras_loads_them(weights_file, tmp_path):
    """As offered for download; as weights alone, whose layers Keras numbers in another order; and
    as Keras 2 named them, in 16 bits and packed."""
    import keras

    keras.utils.set_random_seed(3)
    part, expected = (model.backbone_of(model.build_network(3, 75)) for _ in range(2))
    expected.load_weights(weights_file)
    model.load_arrays(part, weights_file)
    assert have_same_weights(part, expected)

    other = model.build_network(3, 75)
    other.save_weights(tmp_path / "all.weights.h5")
    loaded = model.build_network(3, 75)
    model.load_arrays(loaded, tmp_path / "all.weights.h5")
    assert have_same_weights(loaded, other)
    model.backbone_of(other).save_weights(tmp_path / "notop.weights.h5")
    model.load_arrays(part, tmp_path / "notop.weights.h5")
    assert have_same_weights(part, model.backbone_of(other))

    path = shutil.copy(weights_file, tmp_path / "old.h5")
    with h5py.File(path, "a") as file:
        for name in file:
            for key in list(file[name].get(name, ())):
                numbers = file[name][name].pop(key)[()].astype("float16")
                options = {"compression": "gzip", "shuffle": True} if numbers.ndim == 4 else {}
                file[name][name].create_dataset(f"{key}:0", data=numbers, **options)
    model.load_arrays(part, path)
    for array, numbers in zip(part.get_weights(), expected.get_weights(), strict=True):
        assert np.array_equal(array, numbers.astype("float16"))


def test_weights_of_another_network_are_told(tmp_path, tiny):
    import keras

    other = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)])
    other.save_weights(tmp_path / "other.weights.h5")
    part = model.backbone_of(model.build_network(2, 75))
    with pytest.raises(utils.UserError, match=r"other\.weights\.h5: .*another network \(0 layers"):
        model.load_arrays(part, tmp_path / "other.weights.h5")


def test_only_our_own_models_may_be_replaced(saved, folder, tmp_path):
    assert model.may_replace_model(folder / "m") and model.may_replace_model(folder / "none")
    (folder / "m.h5").unlink()  # a kill during the first save
    assert model.may_replace_model(folder / "m")
    (folder / "m.json").write_text('{"my": "settings"}')
    assert not model.may_replace_model(folder / "m")
    saved[1].save(tmp_path / "plain.h5")
    (tmp_path / "text.h5").write_text("not HDF5")
    (tmp_path / "folder.h5").mkdir()
    for name in ("plain", "text", "folder"):
        assert not model.may_replace_model(tmp_path / name)


@pytest.mark.parametrize("backend", ["torch", "numpy", "openvino"])
def test_other_backends_are_told_in_one_line(monkeypatch, backend):
    monkeypatch.setenv("KERAS_BACKEND", backend)
    with pytest.raises(utils.UserError, match=f"KERAS_BACKEND={backend}: choose .*tensorflow, jax"):
        model.import_keras.__wrapped__()


RANGES = {"gamma": (0.5, 2), "beta": (0, 1), "moving_mean": (-1, 1), "moving_variance": (0.5, 2)}
RANGES |= {"bias": (0, 1)}


def test_folding_the_normalisation_changes_nothing():
    """What cannot be folded stays."""
    import keras
    from keras.layers import BatchNormalization, Conv2D, Dense, DepthwiseConv2D

    norm, plain, rng = BatchNormalization, {"use_bias": False}, np.random.default_rng(0)
    for staying, *layers in (
        (0, Conv2D(4, 3, **plain), norm()),
        (1, Conv2D(4, 3), norm()),
        (1, Conv2D(4, 3, activation="relu", **plain), norm()),
        (1, DepthwiseConv2D(3, **plain), norm(), Conv2D(4, 1, **plain), Dense(2)),
        (2, norm(), Conv2D(4, 3, **plain), norm(), norm(), Dense(2)),
    ):
        inputs = outputs = keras.Input((75, 75, 3))
        for layer in layers:
            outputs = layer(outputs)
        network = model.compiled(keras.Model(inputs, outputs))
        for weight in network.weights:
            if weight.name in RANGES:
                weight.assign(rng.uniform(*RANGES[weight.name], weight.shape))
        folded = model.fold_normalisation(network)
        pixels = rng.integers(0, 255, (4, 75, 75, 3)).astype("uint8")
        before, after = (model.predict(one, pixels, 4) for one in (network, folded))
        assert before.std() > 0.1 and np.allclose(before, after, atol=1e-4 * np.abs(before).max())
        assert sum(isinstance(layer, norm) for layer in folded.layers) == staying


def test_a_convolution_that_others_read_keeps_its_normalisation():
    import keras

    inputs = keras.Input((8, 8, 3))
    plain = keras.layers.Conv2D(3, 1, use_bias=False)(inputs)
    normal = keras.layers.BatchNormalization(beta_initializer="ones")(plain)
    network = model.compiled(keras.Model(inputs, keras.layers.Add()([plain, normal])))
    pixels = np.ones((4, 8, 8, 3), "float32")
    before, after = (
        model.predict(one, pixels, 4) for one in (network, model.fold_normalisation(network))
    )
    assert np.allclose(before, after, atol=1e-5)


def test_what_other_threads_print_while_the_network_is_built_is_not_lost(capfd):
    with model.silence_output():
        os.write(1, b"a line that a program reads\n")
        os.write(2, b"chatter of a library\n")
    assert capfd.readouterr() == ("a line that a program reads\n", "")
