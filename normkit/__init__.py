"""Normalization layers that mean the same thing in every framework.

A layer is one operation: choose the axes to reduce, standardize over them, scale and shift along
the parameter axes, and (BatchNorm) remember the statistics. It is written once, against the Array
API (``_engine.py``, ``_statistics.py``); a layer is a short description over it
(``_batch_norm.py``, ``_layer_norm.py``); an adapter makes that a layer of its framework:
``normkit.numpy``, ``normkit.torch``, ``normkit.keras``, ``normkit.flax.nnx``,
``normkit.flax.linen``, each imported by whoever uses it.
"""

from importlib.metadata import version as _version

from normkit._batch_norm import BatchNorm as BatchNorm
from normkit._batch_norm import batch_norm as batch_norm
from normkit._layer_norm import LayerNorm as LayerNorm
from normkit._layer_norm import layer_norm as layer_norm
from normkit._normalize import normalize as normalize
from normkit._statistics import Moments as Moments
from normkit._statistics import moments as moments

__version__ = _version("normkit")
