"""normkit for Flax Linen: drop-in layers, and any definition as an ``flax.linen.Module``.

>>> import jax, jax.numpy as jnp, normkit as nk, normkit.flax.linen
>>> bn = nk.flax.linen.BatchNorm(use_running_average=False)
>>> x = jnp.ones((8, 3))
>>> variables = bn.init(jax.random.key(0), x)
>>> y, changed = bn.apply(variables, x, mutable=["batch_stats"])
>>> y.shape, sorted(changed["batch_stats"])
((8, 3), ['mean', 'var'])
>>> nk.flax.linen.layer(nk.LayerNorm(16)).epsilon
1e-05
"""

from normkit.flax.linen._batch_norm import BatchNorm
from normkit.flax.linen._freeze import labels
from normkit.flax.linen._group_norm import GroupNorm
from normkit.flax.linen._instance_norm import InstanceNorm
from normkit.flax.linen._layer_norm import LayerNorm
from normkit.flax.linen._portable import definition, layer
from normkit.flax.linen._recalibrate import recalibrate
from normkit.flax.linen._rms_norm import RMSNorm

__all__ = [
    "BatchNorm",
    "GroupNorm",
    "InstanceNorm",
    "LayerNorm",
    "RMSNorm",
    "definition",
    "labels",
    "layer",
    "recalibrate",
]
