"""The network of ``digits.py`` in PyTorch."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace

import numpy as np
import torch
from torch import nn

import normkit as nk
import normkit.torch

NAMES = {"running_mean": "mean", "running_var": "var", "bias": "bias"}


class Network(nn.Module):
    """``norms`` defines the normalization layers; without it they are PyTorch's own."""

    def __init__(self, norms: Mapping[str, nk.BatchNorm | nk.LayerNorm] | None = None) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 16, 3, padding=1, bias=False)
        self.conv2 = nn.Conv2d(16, 32, 3, bias=False)
        self.dense1 = nn.Linear(32, 64)
        self.dense2 = nn.Linear(64, 10)
        if norms:
            # The definitions have the channels last; PyTorch has them at axis 1.
            self.norm1 = nk.torch.layer(replace(norms["norm1"], axis=1))
            self.norm2 = nk.torch.layer(replace(norms["norm2"], axis=1))
            self.norm3 = nk.torch.layer(norms["norm3"])
        else:
            self.norm1 = nn.BatchNorm2d(16)
            self.norm2 = nn.BatchNorm2d(32)
            self.norm3 = nn.LayerNorm(64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = nn.functional.silu(self.norm1(self.conv1(x)))
        x = nn.functional.silu(self.norm2(self.conv2(x)))
        x = x.mean(dim=(2, 3))
        x = nn.functional.silu(self.norm3(self.dense1(x)))
        return self.dense2(x)


def train(
    network: Network, batches: Iterable[tuple[np.ndarray, np.ndarray]], rate: float
) -> Iterator[float]:
    """Take a step of gradient descent for each batch of images and labels, and yield its loss."""
    optimizer = torch.optim.SGD(network.parameters(), lr=rate)
    for images, labels in batches:
        network.train()
        optimizer.zero_grad()
        scores = network(channels_first(images))
        loss = nn.functional.cross_entropy(scores, torch.from_numpy(labels))
        loss.backward()
        optimizer.step()
        yield loss.item()


@torch.no_grad()
def predict(network: Network, images: np.ndarray) -> np.ndarray:
    """The scores of each class, with the running statistics."""
    network.eval()
    return network(channels_first(images)).numpy()


def channels_first(images: np.ndarray) -> torch.Tensor:
    """Images as PyTorch wants them: (N, H, W, C) becomes (N, C, H, W)."""
    return torch.from_numpy(images).permute(0, 3, 1, 2)


def read(network: Network) -> dict[str, np.ndarray]:
    """All parameters and running statistics, such as ``norm1.mean``."""
    return {name: tensor.numpy().copy() for name, tensor in _tensors(network).items()}


def load(network: Network, values: Mapping[str, np.ndarray]) -> None:
    """Set the parameters and running statistics that ``values`` has."""
    tensors = _tensors(network)
    for name, value in values.items():
        tensors[name].copy_(torch.from_numpy(value))


def _tensors(network: Network) -> dict[str, torch.Tensor]:
    """The tensors of the state dict, with the names and the order of axes that Flax uses."""
    tensors = {}
    for key, tensor in network.state_dict().items():
        layer, name = key.split(".")
        if name == "num_batches_tracked":
            continue
        if tensor.ndim == 4:
            tensor = tensor.permute(2, 3, 1, 0)  # (out, in, H, W) to (H, W, in, out)
        elif tensor.ndim == 2:
            tensor = tensor.permute(1, 0)  # (out, in) to (in, out)
        weight = "scale" if layer.startswith("norm") else "kernel"
        tensors[f"{layer}.{NAMES.get(name, weight)}"] = tensor
    return tensors
