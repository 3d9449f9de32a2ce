"""The network of ``digits.py`` in Flax on JAX."""

from collections.abc import Iterable, Iterator, Mapping

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import normkit as nk
import normkit.flax.nnx


class Network(nnx.Module):
    """``norms`` defines the normalization layers; without it they are Flax' own."""

    def __init__(self, norms: Mapping[str, nk.BatchNorm | nk.LayerNorm] | None = None) -> None:
        rngs = nnx.Rngs(0)
        self.conv1 = nnx.Conv(1, 16, (3, 3), use_bias=False, rngs=rngs)
        self.conv2 = nnx.Conv(16, 32, (3, 3), padding="VALID", use_bias=False, rngs=rngs)
        self.dense1 = nnx.Linear(32, 64, rngs=rngs)
        self.dense2 = nnx.Linear(64, 10, rngs=rngs)
        if norms:
            self.norm1 = nk.flax.nnx.layer(norms["norm1"])
            self.norm2 = nk.flax.nnx.layer(norms["norm2"])
            self.norm3 = nk.flax.nnx.layer(norms["norm3"])
        else:
            self.norm1 = nnx.BatchNorm(16, rngs=rngs)
            self.norm2 = nnx.BatchNorm(32, rngs=rngs)
            self.norm3 = nnx.LayerNorm(64, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = nnx.silu(self.norm1(self.conv1(x)))
        x = nnx.silu(self.norm2(self.conv2(x)))
        x = x.mean(axis=(1, 2))
        x = nnx.silu(self.norm3(self.dense1(x)))
        return self.dense2(x)


def train(
    network: Network, batches: Iterable[tuple[np.ndarray, np.ndarray]], rate: float
) -> Iterator[float]:
    """Take a step of gradient descent for each batch of images and labels, and yield its loss."""
    optimizer = nnx.Optimizer(network, optax.sgd(rate), wrt=nnx.Param)
    for images, labels in batches:
        network.train()
        yield float(_step(network, optimizer, images, labels))


@nnx.jit
def _step(
    network: Network, optimizer: nnx.Optimizer, images: jax.Array, labels: jax.Array
) -> jax.Array:
    def loss_of(network: Network) -> jax.Array:
        scores = network(images)
        return optax.softmax_cross_entropy_with_integer_labels(scores, labels).mean()

    loss, gradients = nnx.value_and_grad(loss_of)(network)
    optimizer.update(network, gradients)
    return loss


def predict(network: Network, images: np.ndarray) -> np.ndarray:
    """The scores of each class, with the running statistics."""
    network.eval()
    return np.asarray(_scores(network, images))


@nnx.jit
def _scores(network: Network, images: jax.Array) -> jax.Array:
    return network(images)


def read(network: Network) -> dict[str, np.ndarray]:
    """All parameters and running statistics, such as ``norm1.mean``."""
    return {
        f"{layer}.{name}": np.asarray(value)
        for layer, values in nnx.to_pure_dict(nnx.state(network)).items()
        for name, value in values.items()
    }


def load(network: Network, values: Mapping[str, np.ndarray]) -> None:
    """Set the parameters and running statistics that ``values`` has."""
    for name, value in values.items():
        layer, variable = name.split(".")
        getattr(getattr(network, layer), variable)[...] = jnp.asarray(value)
