"""The network of ``digits.py`` in Keras on TensorFlow."""

from collections.abc import Iterable, Iterator, Mapping

import keras
import numpy as np
import tensorflow as tf
from keras import layers

import normkit as nk
import normkit.keras

NAMES = {"gamma": "scale", "beta": "bias", "moving_mean": "mean", "moving_variance": "var"}


class Network(keras.Model):
    """``norms`` defines the normalization layers; without it they are Keras' own."""

    def __init__(self, norms: Mapping[str, nk.BatchNorm | nk.LayerNorm] | None = None) -> None:
        super().__init__()
        self.conv1 = layers.Conv2D(16, 3, padding="same", use_bias=False)
        self.conv2 = layers.Conv2D(32, 3, use_bias=False)
        self.pool = layers.GlobalAveragePooling2D()
        self.dense1 = layers.Dense(64)
        self.dense2 = layers.Dense(10)
        if norms:
            self.norm1 = nk.keras.layer(norms["norm1"])
            self.norm2 = nk.keras.layer(norms["norm2"])
            self.norm3 = nk.keras.layer(norms["norm3"])
        else:
            self.norm1 = layers.BatchNormalization()
            self.norm2 = layers.BatchNormalization()
            self.norm3 = layers.LayerNormalization()
        self(np.zeros((1, 8, 8, 1), "float32"))  # makes the variables

    def call(self, x: tf.Tensor, training: bool = False) -> tf.Tensor:
        x = tf.nn.silu(self.norm1(self.conv1(x), training=training))
        x = tf.nn.silu(self.norm2(self.conv2(x), training=training))
        x = self.pool(x)
        x = tf.nn.silu(self.norm3(self.dense1(x)))
        return self.dense2(x)


def train(
    network: Network, batches: Iterable[tuple[np.ndarray, np.ndarray]], rate: float
) -> Iterator[float]:
    """Take a step of gradient descent for each batch of images and labels, and yield its loss."""
    optimizer = keras.optimizers.SGD(rate)
    cross_entropy = keras.losses.SparseCategoricalCrossentropy(from_logits=True)

    @tf.function
    def step(images: tf.Tensor, labels: tf.Tensor) -> tf.Tensor:
        with tf.GradientTape() as tape:
            loss = cross_entropy(labels, network(images, training=True))
        gradients = tape.gradient(loss, network.trainable_variables)
        optimizer.apply_gradients(zip(gradients, network.trainable_variables, strict=True))
        return loss

    for images, labels in batches:
        yield float(step(tf.constant(images), tf.constant(labels)))


def predict(network: Network, images: np.ndarray) -> np.ndarray:
    """The scores of each class, with the running statistics."""
    return network(images, training=False).numpy()


def read(network: Network) -> dict[str, np.ndarray]:
    """All parameters and running statistics, such as ``norm1.mean``."""
    return {name: variable.numpy() for name, variable in _variables(network).items()}


def load(network: Network, values: Mapping[str, np.ndarray]) -> None:
    """Set the parameters and running statistics that ``values`` has."""
    variables = _variables(network)
    for name, value in values.items():
        variables[name].assign(value)


def _variables(network: Network) -> dict[str, keras.Variable]:
    """The variables of the network, under the names that Flax uses."""
    return {
        f"{attribute}.{NAMES.get(variable.name, variable.name)}": variable
        for attribute, layer in vars(network).items()
        if isinstance(layer, layers.Layer)
        for variable in layer.variables
    }
