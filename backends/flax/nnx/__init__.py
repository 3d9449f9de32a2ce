"""normkit for Flax NNX: drop-in layers, and any definition as an ``nnx.Module``.

>>> import jax.numpy as jnp, normkit as nk, normkit.flax.nnx
>>> from flax import nnx
>>> bn = nk.flax.nnx.BatchNorm(3, rngs=nnx.Rngs(0))
>>> bn(jnp.ones((8, 3))).shape, list(nnx.state(bn, nnx.BatchStat))
((8, 3), ['mean', 'var'])
>>> nk.flax.nnx.layer(nk.LayerNorm(16)).epsilon
1e-05
"""

from normkit.flax.nnx._batch_norm import BatchNorm
from normkit.flax.nnx._convert import convert, revert
from normkit.flax.nnx._fold import fold
from normkit.flax.nnx._freeze import freeze, trainable, unfreeze
from normkit.flax.nnx._group_norm import GroupNorm
from normkit.flax.nnx._instance_norm import InstanceNorm
from normkit.flax.nnx._layer_norm import LayerNorm
from normkit.flax.nnx._portable import definition, layer
from normkit.flax.nnx._recalibrate import recalibrate
from normkit.flax.nnx._rms_norm import RMSNorm

__all__ = [
    "BatchNorm",
    "GroupNorm",
    "InstanceNorm",
    "LayerNorm",
    "RMSNorm",
    "convert",
    "definition",
    "fold",
    "freeze",
    "layer",
    "recalibrate",
    "revert",
    "trainable",
    "unfreeze",
]
