"""One network in PyTorch, Keras and Flax: does it learn the same thing in each?

A small network learns handwritten digits in the three frameworks, from the same initial weights
and with the same batches: first with each framework's own BatchNorm and LayerNorm as they come,
then with normkit's, built from one definition. At the end the state of the network trained in
PyTorch moves into the other two.

    python docs/examples/digits.py

The networks (digits_torch.py, digits_keras.py, digits_flax.py) have a smooth activation: with
ReLU a rounding error can switch a unit on or off, and any two runs part, whatever their layers.
"""

import argparse
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from sklearn.datasets import load_digits
from tqdm import tqdm

import normkit as nk

NORMS = {
    "norm1": nk.BatchNorm(16, axis=-1),
    "norm2": nk.BatchNorm(32, axis=-1),
    "norm3": nk.LayerNorm(64),
}
KERNELS = {"conv1": (3, 3, 1, 16), "conv2": (3, 3, 16, 32), "dense1": (32, 64), "dense2": (64, 10)}
CUT = 1437  # images for training; the rest are for the test
BATCH = 64
RATE = 0.1
EVALUATE_EVERY = 5  # steps

Data = tuple[np.ndarray, np.ndarray]


def frameworks() -> dict[str, ModuleType]:
    """The network's module for each framework; they run on the CPU and without their chatter."""
    os.environ.update(
        KERAS_BACKEND="tensorflow",
        CUDA_VISIBLE_DEVICES="",
        JAX_PLATFORMS="cpu",
        TF_CPP_MIN_LOG_LEVEL="3",
        TF_ENABLE_ONEDNN_OPTS="0",
        OMP_NUM_THREADS="1",  # PyTorch's threads would wait for each other on a busy machine
    )
    import digits_flax
    import digits_keras
    import digits_torch

    return {"PyTorch": digits_torch, "Keras": digits_keras, "Flax": digits_flax}


@dataclass(frozen=True)
class Trio:
    """One network trained in the three frameworks, which are in the order of ``frameworks()``."""

    networks: list[Any]
    states: list[dict[str, np.ndarray]]  # parameters and running statistics after training
    losses: np.ndarray  # (steps, 3), of the training batches
    evaluated: np.ndarray  # (evaluations,), the steps after which the test images were evaluated
    test_losses: np.ndarray  # (evaluations, 3)
    scores: np.ndarray  # (3, test images, classes), after training

    def running(self, kind: str) -> np.ndarray:
        """All running statistics, "mean" or "var", as (3, channels)."""
        names = [f"{name}.{kind}" for name, d in NORMS.items() if isinstance(d, nk.BatchNorm)]
        return np.stack([np.concatenate([state[n] for n in names]) for state in self.states])

    def predictions(self) -> np.ndarray:
        """The class of each test image, (3, test images)."""
        return self.scores.argmax(-1)


@dataclass(frozen=True)
class Results:
    """What :func:`run` found."""

    labels: np.ndarray  # of the test images
    native: Trio
    normkit: Trio
    moved: dict[str, np.ndarray]  # the test scores where the state trained in PyTorch moved to


def run(epochs: int = 10, seed: int = 4, max_steps: int | None = None) -> Results:
    """Train with native layers and with normkit's, and move the state trained in PyTorch."""
    rng = np.random.default_rng(seed)
    training, test = data(rng)
    weights = initial_weights(rng)
    steps = list(batches(training, epochs, rng))[:max_steps]
    native = train("native layers", None, weights, steps, test)
    normkit = train("normkit layers", NORMS, weights, steps, test)
    return Results(test[1], native, normkit, move(normkit.networks[0], test[0]))


def data(rng: np.random.Generator) -> tuple[Data, Data]:
    """Images (N, 8, 8, 1) from 0 to 1 and their labels: for training, and for the test."""
    digits = load_digits()
    order = rng.permutation(len(digits.target))
    images = (digits.images[order, :, :, None] / 16).astype("float32")
    labels = digits.target[order].astype("int64")
    return (images[:CUT], labels[:CUT]), (images[CUT:], labels[CUT:])


def initial_weights(rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Normal weights with variance 2 / inputs (He et al., 2015), and biases of zero."""
    weights = {}
    for name, shape in KERNELS.items():
        deviation = np.sqrt(2 / np.prod(shape[:-1]))
        weights[f"{name}.kernel"] = rng.normal(0, deviation, shape).astype("float32")
        if name.startswith("dense"):
            weights[f"{name}.bias"] = np.zeros(shape[-1], "float32")
    return weights


def batches(training: Data, epochs: int, rng: np.random.Generator) -> Iterator[Data]:
    """Batches of training images and labels, shuffled anew in each epoch."""
    images, labels = training
    for _ in range(epochs):
        order = rng.permutation(len(labels))
        for chosen in order[: len(order) // BATCH * BATCH].reshape(-1, BATCH):
            yield images[chosen], labels[chosen]


def train(
    title: str,
    norms: Mapping[str, nk.BatchNorm | nk.LayerNorm] | None,
    weights: Mapping[str, np.ndarray],
    steps: list[Data],
    test: Data,
) -> Trio:
    """Train the network in the three frameworks, step by step side by side."""
    twins = list(frameworks().values())
    networks = [twin.Network(norms) for twin in twins]
    pairs = list(zip(twins, networks, strict=True))
    for twin, network in pairs:
        twin.load(network, weights)
    runs = [twin.train(network, steps, RATE) for twin, network in pairs]

    def scores() -> np.ndarray:
        return np.stack([twin.predict(network, test[0]) for twin, network in pairs])

    losses, evaluated, test_losses = [], [], []
    with tqdm(zip(*runs, strict=True), f"{title:<14}", len(steps), mininterval=0.5) as progress:
        for step, loss in enumerate(progress, start=1):
            losses.append(loss)
            if step % EVALUATE_EVERY == 0 or step == len(steps):
                evaluated.append(step)
                test_losses.append(cross_entropy(scores(), test[1]))
                apart = np.ptp(test_losses, axis=1).max()
                progress.set_postfix_str(f"losses apart {apart:.0e}", refresh=False)
    states = [twin.read(network) for twin, network in pairs]
    found = (np.array(values) for values in (losses, evaluated, test_losses))
    return Trio(networks, states, *found, scores())


def cross_entropy(scores: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """The mean loss over the images for each framework, in float64."""
    scores = scores.astype("float64")
    right = scores[:, np.arange(len(labels)), labels]
    return (np.log(np.exp(scores).sum(-1)) - right).mean(-1)


def move(trained: Any, images: np.ndarray) -> dict[str, np.ndarray]:
    """Put the state of a network trained in PyTorch into new ones of the others; their scores."""
    twins = frameworks()
    state = twins.pop("PyTorch").read(trained)
    scores = {}
    for name, twin in twins.items():
        network = twin.Network(NORMS)
        twin.load(network, state)
        scores[name] = twin.predict(network, images)
    return scores


def main() -> None:
    from digits_report import draw, moved, table

    root = Path(__file__).resolve().parents[2]
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--out", type=Path, default=root / "build/demo", help="the picture's folder"
    )
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--seed", type=int, default=4)
    options = parser.parse_args()

    print("One network in PyTorch, Keras and Flax: same weights, same batches.", flush=True)
    results = run(options.epochs, options.seed)
    picture = draw(results, options.out / "agreement.png")
    print(f"\n{table(results)}\n\n{moved(results)}\n\nPicture: {picture}")


if __name__ == "__main__":
    main()
