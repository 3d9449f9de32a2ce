"""normkit for NumPy: layers with state and a written-out backward pass.

For models in NumPy alone, and for reading: nothing here is hidden in a framework.

>>> import numpy as np, normkit as nk, normkit.numpy
>>> bn = nk.numpy.BatchNorm(3)
>>> y = bn(np.random.default_rng(0).normal(5, 2, (100, 3)).astype("float32"), training=True)
>>> bn.backward(np.ones_like(y)).shape, sorted(bn.grads)
((100, 3), ['bias', 'scale'])
"""

from normkit.numpy._batch_norm import BatchNorm
from normkit.numpy._group_norm import GroupNorm
from normkit.numpy._instance_norm import InstanceNorm
from normkit.numpy._layer_norm import LayerNorm
from normkit.numpy._portable import definition, layer
from normkit.numpy._rms_norm import RMSNorm

__all__ = [
    "BatchNorm",
    "GroupNorm",
    "InstanceNorm",
    "LayerNorm",
    "RMSNorm",
    "definition",
    "layer",
]
