"""A whole port: a network trained in Keras goes on training in PyTorch and in Flax.

A small network learns handwritten digits in Keras, with Keras' own normalization layers. Then it is
ported to the other two frameworks, twice: its normalization layers through normkit, and as it is
done by hand, into the framework's own layers with gamma, beta, moving mean and variance copied.
All five networks then take the same ten steps on the same batches.

    python docs/examples/port_cnn.py

The networks (port_cnn_models.py) have a smooth activation: with ReLU a rounding error can switch a
unit on or off, and any two runs part, whatever their layers.
"""

import argparse
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# The frameworks read these when they are imported: all on the CPU and without their chatter.
os.environ.setdefault("KERAS_BACKEND", "tensorflow")
os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
os.environ["TF_ENABLE_ONEDNN_OPTS"] = "0"
os.environ["OMP_NUM_THREADS"] = "1"  # more threads would wait for each other on a busy machine

import keras
import numpy as np
import torch
from port_cnn_models import FlaxNetwork, TorchNetwork, keras_network
from sklearn.datasets import load_digits

import normkit as nk
import normkit.torch

# What each normalization layer of the PyTorch and the Flax network is called in Keras.
NORMS = {"norm1": "bn1", "norm2": "gn", "norm3": "bn2"}
CUT = 1437  # images for training; the rest are for the test
BATCH = 64


def port_to_torch(trained: keras.Model) -> TorchNetwork:
    """With a network that is written with normkit's layers: all of them at once.

    PyTorch's own layers cannot take over all of Keras' definitions: their running variance is the
    unbiased one, whatever one sets. normkit's can (``adopt``). Each layer keeps its axis, for the
    channels are at axis 1 in PyTorch and last in Keras (``keep``).
    """
    network = TorchNetwork(nk.torch)
    copy_kernels_to_torch(trained, network)
    bundle = nk.extract(trained)
    # names="order" would do here too: the layers come in the same order in both networks.
    print(nk.restore(network, bundle, names=NORMS, adopt=True, keep=["axis"]))
    return network


def port_to_flax(trained: keras.Model) -> FlaxNetwork:
    """Layer by layer, which needs no layers of normkit in the network before.

    The channels are last in Flax as well, so that each layer can be taken as it is.
    """
    network = FlaxNetwork()
    copy_kernels_to_flax(trained, network)
    for name, keras_name in NORMS.items():
        setattr(network, name, nk.port(trained.get_layer(keras_name), "flax.nnx"))
    return network


@torch.no_grad()
def copy_kernels_to_torch(trained: keras.Model, network: TorchNetwork) -> None:
    """Convolutions and dense layers: same numbers, other order of the axes."""
    for name in ("conv1", "conv2"):
        kernel = values(trained.get_layer(name).kernel)  # (H, W, in, out) to (out, in, H, W)
        getattr(network, name).weight.copy_(torch.tensor(kernel.transpose(3, 2, 0, 1)))
    for name in ("dense1", "dense2"):
        kernel = values(trained.get_layer(name).kernel)  # (in, out) to (out, in)
        getattr(network, name).weight.copy_(torch.tensor(kernel.T))
    network.dense2.bias.copy_(torch.tensor(values(trained.get_layer("dense2").bias)))


def copy_kernels_to_flax(trained: keras.Model, network: FlaxNetwork) -> None:
    """Convolutions and dense layers: Flax has the order of axes that Keras has."""
    for name in ("conv1", "conv2", "dense1", "dense2"):
        getattr(network, name).kernel[...] = values(trained.get_layer(name).kernel)
    network.dense2.bias[...] = values(trained.get_layer("dense2").bias)


@torch.no_grad()
def copy_by_hand_to_torch(trained: keras.Model) -> TorchNetwork:
    """The same into PyTorch's own layers: all weights are copied, but not what they mean."""
    network = TorchNetwork(torch.nn)
    copy_kernels_to_torch(trained, network)
    for name, keras_name in NORMS.items():
        layer, source = getattr(network, name), trained.get_layer(keras_name)
        layer.weight.copy_(torch.tensor(values(source.gamma)))
        layer.bias.copy_(torch.tensor(values(source.beta)))
        if hasattr(source, "moving_mean"):  # a BatchNorm
            layer.running_mean.copy_(torch.tensor(values(source.moving_mean)))
            layer.running_var.copy_(torch.tensor(values(source.moving_variance)))
    return network


def copy_by_hand_to_flax(trained: keras.Model) -> FlaxNetwork:
    """The same into Flax' own layers."""
    network = FlaxNetwork()
    copy_kernels_to_flax(trained, network)
    for name, keras_name in NORMS.items():
        layer, source = getattr(network, name), trained.get_layer(keras_name)
        layer.scale[...] = values(source.gamma)
        layer.bias[...] = values(source.beta)
        if hasattr(source, "moving_mean"):
            layer.mean[...] = values(source.moving_mean)
            layer.var[...] = values(source.moving_variance)
    return network


def values(variable: keras.Variable) -> np.ndarray:
    """A copy of a variable of Keras."""
    return np.array(keras.ops.convert_to_numpy(variable))


@dataclass(frozen=True)
class Distances:
    """How far a ported network is from the one in Keras: after the port and after each step.

    Attributes:
        scores: the largest difference of a score of a test image, by the largest score in Keras.
        var: the largest difference of a running variance, by that variance in Keras.
        unlike: how many test images it does not predict as Keras does.
    """

    scores: list[float] = field(default_factory=list)
    var: list[float] = field(default_factory=list)
    unlike: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Results:
    """What :func:`run` found; the keys of ``distances`` are as ``("normkit", "PyTorch")``."""

    images: int  # for the test
    accuracy: float  # of the network trained in Keras
    distances: dict[tuple[str, str], Distances]


def run(epochs: int = 20, steps: int = 10, seed: int = 0) -> Results:
    """Train in Keras, port, and train on in all networks side by side."""
    keras.utils.set_random_seed(seed)
    digits = load_digits()
    order = np.random.default_rng(seed).permutation(len(digits.target))
    images = (digits.images[order, :, :, None] / 16).astype("float32")
    labels = digits.target[order].astype("int64")
    test = images[CUT:]

    network = keras_network()
    network.fit(images[:CUT], labels[:CUT], BATCH, epochs, verbose=0)
    accuracy = float((network.predict_on_batch(test).argmax(-1) == labels[CUT:]).mean())

    ported = {
        ("native", "PyTorch"): copy_by_hand_to_torch(network),
        ("native", "Flax"): copy_by_hand_to_flax(network),
        ("normkit", "PyTorch"): port_to_torch(network),
        ("normkit", "Flax"): port_to_flax(network),
    }
    distances = {key: Distances() for key in ported}
    for step in range(steps + 1):
        if step:
            chosen = np.arange((step - 1) * BATCH, step * BATCH) % CUT
            for each in (network, *ported.values()):
                each.train_on_batch(images[chosen], labels[chosen])
        scores, var = network.predict_on_batch(test), running_variance(network)
        for key, each in ported.items():
            found, found_var = each.predict_on_batch(test), running_variance(each)
            apart = distances[key]
            apart.scores.append(float(abs(found - scores).max() / abs(scores).max()))
            apart.var.append(float((abs(found_var - var) / var).max()))
            apart.unlike.append(int((found.argmax(-1) != scores.argmax(-1)).sum()))
    return Results(len(test), accuracy, distances)


def running_variance(network: Any) -> np.ndarray:
    """Those of all layers; ``extract`` reads them in every framework, from native layers too."""
    found = [entry.arrays.get("var", []) for entry in nk.extract(network).values()]
    return np.concatenate(found)


def main() -> None:
    from port_cnn_report import draw, table

    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    picture = Path(__file__).with_suffix(".png")
    parser.add_argument("--picture", type=Path, default=picture, help="where it is saved")
    parser.add_argument("--epochs", type=int, default=20, help="in Keras, before the port")
    parser.add_argument("--steps", type=int, default=10, help="after the port")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    print("A network trained in Keras, ported to PyTorch. What the layers took over:", flush=True)
    results = run(options.epochs, options.steps, options.seed)
    draw(results, options.picture)
    print(f"\n{table(results)}\n\nPicture: {options.picture}")


if __name__ == "__main__":
    main()
