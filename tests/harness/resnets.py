"""ResNet-20 for CIFAR (He et al., "Deep Residual Learning for Image Recognition", CVPR 2016), as
people write it in each framework, with its own layers; projections where the shape changes.

Convolutions and norms are called ``stem``, ``norm``, ``stage<s>.<b>.conv1``, ``norm1``, ``conv2``,
``norm2``, ``project`` and ``project_norm``, with ``_`` for ``.`` where a framework wants that.
"""

from __future__ import annotations

import numpy as np

STAGES = [(s, b, width) for s, width in enumerate((16, 32, 64), 1) for b in range(3)]
CONVS = ["stem"] + [
    f"stage{s}.{b}.{name}"
    for s, b, _ in STAGES
    for name in ("conv1", "conv2", *(["project"] if b == 0 and s > 1 else []))
]
NORMS = [name.replace("conv", "norm").replace("stem", "norm") for name in CONVS]
NORMS = [name.replace("project", "project_norm") for name in NORMS]


def torch_resnet():
    import torch
    from torch import nn
    from torch.nn import functional as F

    class Block(nn.Module):
        def __init__(self, width_in, width, stride):
            super().__init__()
            self.conv1 = nn.Conv2d(width_in, width, 3, stride, 1, bias=False)
            self.norm1 = nn.BatchNorm2d(width)
            self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
            self.norm2 = nn.BatchNorm2d(width)
            self.shape_changes = width_in != width
            if self.shape_changes:
                self.project = nn.Conv2d(width_in, width, 1, stride, bias=False)
                self.project_norm = nn.BatchNorm2d(width)

        def forward(self, x):
            y = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
            return F.relu(y + (self.project_norm(self.project(x)) if self.shape_changes else x))

    class ResNet(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
            self.norm = nn.BatchNorm2d(16)
            width_in = 16
            for s in (1, 2, 3):
                blocks = []
                for _, b, width in (each for each in STAGES if each[0] == s):
                    blocks.append(Block(width_in, width, 2 if b == 0 and s > 1 else 1))
                    width_in = width
                setattr(self, f"stage{s}", nn.Sequential(*blocks))
            self.head = nn.Linear(64, 10)

        def forward(self, x):
            x = F.relu(self.norm(self.stem(x)))
            x = self.stage3(self.stage2(self.stage1(x)))
            return self.head(x.mean((2, 3)))

    torch.manual_seed(0)
    return ResNet()


def keras_resnet():
    import keras
    from keras import layers

    def conv(name, width, size=3, stride=1):
        def call(x):
            if size == 3:
                x = layers.ZeroPadding2D(1)(x)
            return layers.Conv2D(width, size, stride, use_bias=False, name=name)(x)

        return call

    inputs = x = keras.Input((32, 32, 3))
    x = layers.ReLU()(layers.BatchNormalization(name="norm")(conv("stem", 16)(x)))
    for s, b, width in STAGES:
        name, stride = f"stage{s}_{b}", 2 if b == 0 and s > 1 else 1
        y = conv(f"{name}_conv1", width, 3, stride)(x)
        y = layers.ReLU()(layers.BatchNormalization(name=f"{name}_norm1")(y))
        y = layers.BatchNormalization(name=f"{name}_norm2")(conv(f"{name}_conv2", width)(y))
        if stride > 1:
            x = conv(f"{name}_project", width, 1, stride)(x)
            x = layers.BatchNormalization(name=f"{name}_project_norm")(x)
        x = layers.ReLU()(layers.Add()([x, y]))
    x = layers.GlobalAveragePooling2D()(x)
    return keras.Model(inputs, layers.Dense(10, name="head")(x))


def nnx_resnet():
    import jax
    from flax import nnx

    rngs = nnx.Rngs(0)

    def conv(a, b, size=3, stride=1):
        padding = ((1, 1), (1, 1)) if size == 3 else "VALID"
        options = {"strides": stride, "padding": padding, "use_bias": False, "rngs": rngs}
        return nnx.Conv(a, b, (size, size), **options)

    class Block(nnx.Module):
        def __init__(self, width_in, width, stride):
            self.conv1, self.norm1 = conv(width_in, width, 3, stride), norm(width)
            self.conv2, self.norm2 = conv(width, width), norm(width)
            self.shape_changes = width_in != width
            if self.shape_changes:
                self.project = conv(width_in, width, 1, stride)
                self.project_norm = norm(width)

        def __call__(self, x):
            y = self.norm2(self.conv2(jax.nn.relu(self.norm1(self.conv1(x)))))
            return jax.nn.relu(
                y + (self.project_norm(self.project(x)) if self.shape_changes else x)
            )

    class ResNet(nnx.Module):
        def __init__(self):
            self.stem, self.norm = conv(3, 16), norm(16)
            width_in = 16
            for s in (1, 2, 3):
                blocks = []
                for _, b, width in (each for each in STAGES if each[0] == s):
                    blocks.append(Block(width_in, width, 2 if b == 0 and s > 1 else 1))
                    width_in = width
                setattr(self, f"stage{s}", nnx.List(blocks))
            self.head = nnx.Linear(64, 10, rngs=rngs)

        def __call__(self, x):
            x = jax.nn.relu(self.norm(self.stem(x)))
            for block in (*self.stage1, *self.stage2, *self.stage3):
                x = block(x)
            return self.head(x.mean((1, 2)))

    def norm(width):
        return nnx.BatchNorm(width, rngs=rngs)

    return ResNet()


def linen_resnet(**of_norms):
    import jax
    from flax import linen as nn

    class ResNet(nn.Module):
        @nn.compact
        def __call__(self, x, train=False):
            def conv(name, width, size=3, stride=1):
                padding = ((1, 1), (1, 1)) if size == 3 else "VALID"
                options = {"strides": stride, "padding": padding, "use_bias": False, "name": name}
                return nn.Conv(width, (size, size), **options)

            def norm(name):
                return nn.BatchNorm(use_running_average=not train, name=name, **of_norms)

            x = jax.nn.relu(norm("norm")(conv("stem", 16)(x)))
            for s, b, width in STAGES:
                name, stride = f"stage{s}_{b}", 2 if b == 0 and s > 1 else 1
                y = norm(f"{name}_norm1")(conv(f"{name}_conv1", width, 3, stride)(x))
                y = norm(f"{name}_norm2")(conv(f"{name}_conv2", width)(jax.nn.relu(y)))
                if stride > 1:
                    x = norm(f"{name}_project_norm")(conv(f"{name}_project", width, 1, stride)(x))
                x = jax.nn.relu(x + y)
            return nn.Dense(10, name="head")(x.mean((1, 2)))

    return ResNet()


def kernels(seed: int) -> dict[str, np.ndarray]:
    """Convolutions (height, width, in, out) and the head (in, out) by name."""
    rng = np.random.default_rng(seed)
    shapes = {"stem": (3, 3, 3, 16)}
    width_in = 16
    for s, b, width in STAGES:
        name = f"stage{s}.{b}"
        shapes[f"{name}.conv1"] = (3, 3, width_in, width)
        shapes[f"{name}.conv2"] = (3, 3, width, width)
        if width_in != width:
            shapes[f"{name}.project"] = (1, 1, width_in, width)
        width_in = width
    found = {}
    for name, shape in (shapes | {"head": (64, 10)}).items():
        spread = np.sqrt(2 / np.prod(shape[:-1]))
        found[name] = rng.normal(0, spread, shape).astype(np.float32)
    return found
