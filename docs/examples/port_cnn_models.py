"""The network of ``port_cnn.py`` in Keras, PyTorch and Flax, as one writes it in each.

All have the methods of Keras to train on a batch and to predict, so that they can be trained side
by side: plain gradient descent on the mean cross entropy, and scores as NumPy arrays.
"""

from typing import Any

import jax
import keras
import numpy as np
import optax
import torch
from flax import nnx
from keras import layers
from torch import nn
from torch.nn import functional as F

RATE = 0.1


def keras_network() -> keras.Model:
    """The network as it is trained first, with Keras' own layers and their defaults."""
    network = keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            layers.Conv2D(16, 3, padding="same", use_bias=False, name="conv1"),
            layers.BatchNormalization(name="bn1"),
            layers.Activation("silu"),
            layers.AveragePooling2D(2),
            layers.Conv2D(32, 3, padding="same", use_bias=False, name="conv2"),
            layers.GroupNormalization(8, name="gn"),
            layers.Activation("silu"),
            layers.GlobalAveragePooling2D(),
            layers.Dense(64, use_bias=False, name="dense1"),
            layers.BatchNormalization(name="bn2"),
            layers.Activation("silu"),
            layers.Dense(10, name="dense2"),
        ]
    )
    cross_entropy = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    network.compile(keras.optimizers.SGD(RATE), cross_entropy)
    return network


class TorchNetwork(nn.Module):
    """``norms`` has the normalization layers: it is ``torch.nn`` or ``normkit.torch``."""

    def __init__(self, norms: Any) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 16, 3, padding=1, bias=False)
        self.norm1 = norms.BatchNorm2d(16)
        self.conv2 = nn.Conv2d(16, 32, 3, padding=1, bias=False)
        self.norm2 = norms.GroupNorm(8, 32)
        self.dense1 = nn.Linear(32, 64, bias=False)
        self.norm3 = norms.BatchNorm1d(64)
        self.dense2 = nn.Linear(64, 10)
        self.optimizer = torch.optim.SGD(self.parameters(), lr=RATE)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.avg_pool2d(F.silu(self.norm1(self.conv1(x))), 2)
        x = F.silu(self.norm2(self.conv2(x))).mean(dim=(2, 3))
        return self.dense2(F.silu(self.norm3(self.dense1(x))))

    def train_on_batch(self, images: np.ndarray, labels: np.ndarray) -> float:
        self.train()
        self.optimizer.zero_grad()
        loss = F.cross_entropy(self(channels_first(images)), torch.from_numpy(labels))
        loss.backward()
        self.optimizer.step()
        return loss.item()

    @torch.no_grad()
    def predict_on_batch(self, images: np.ndarray) -> np.ndarray:
        self.eval()
        return self(channels_first(images)).numpy()


def channels_first(images: np.ndarray) -> torch.Tensor:
    """Images as PyTorch wants them: (N, H, W, C) becomes (N, C, H, W)."""
    return torch.from_numpy(images).permute(0, 3, 1, 2)


class FlaxNetwork(nnx.Module):
    """The channels are last, as in Keras."""

    def __init__(self) -> None:
        rngs = nnx.Rngs(0)
        self.conv1 = nnx.Conv(1, 16, (3, 3), use_bias=False, rngs=rngs)
        self.norm1 = nnx.BatchNorm(16, rngs=rngs)
        self.conv2 = nnx.Conv(16, 32, (3, 3), use_bias=False, rngs=rngs)
        self.norm2 = nnx.GroupNorm(32, num_groups=8, rngs=rngs)
        self.dense1 = nnx.Linear(32, 64, use_bias=False, rngs=rngs)
        self.norm3 = nnx.BatchNorm(64, rngs=rngs)
        self.dense2 = nnx.Linear(64, 10, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = nnx.avg_pool(nnx.silu(self.norm1(self.conv1(x))), (2, 2), strides=(2, 2))
        x = nnx.silu(self.norm2(self.conv2(x))).mean(axis=(1, 2))
        return self.dense2(nnx.silu(self.norm3(self.dense1(x))))

    def train_on_batch(self, images: np.ndarray, labels: np.ndarray) -> float:
        self.train()
        return float(_flax_step(self, images, labels))

    def predict_on_batch(self, images: np.ndarray) -> np.ndarray:
        self.eval()
        return np.asarray(_flax_scores(self, images))


@nnx.jit
def _flax_step(network: FlaxNetwork, images: jax.Array, labels: jax.Array) -> jax.Array:
    def loss_of(network: FlaxNetwork) -> jax.Array:
        scores = network(images)
        return optax.softmax_cross_entropy_with_integer_labels(scores, labels).mean()

    loss, gradients = nnx.value_and_grad(loss_of)(network)
    # Plain gradient descent has no state, so a new optimizer does what an old one would.
    nnx.Optimizer(network, optax.sgd(RATE), wrt=nnx.Param).update(network, gradients)
    return loss


@nnx.jit
def _flax_scores(network: FlaxNetwork, images: jax.Array) -> jax.Array:
    return network(images)
