"""normkit for Keras: drop-in layers, and any definition as a ``keras.layers.Layer``.

They run on each backend that Keras does: TensorFlow, JAX and PyTorch.

>>> import keras, normkit as nk, normkit.keras
>>> model = keras.Sequential([keras.Input((8, 8, 3)), nk.keras.BatchNormalization()])
>>> model.output_shape
(None, 8, 8, 3)
>>> nk.keras.layer(nk.LayerNorm.flax(16)).epsilon
1e-06
"""

from normkit._extras import require as _require

_require("keras", "normkit.keras", "keras")

from normkit.keras._batch_norm import BatchNormalization
from normkit.keras._convert import convert, revert
from normkit.keras._fold import fold
from normkit.keras._freeze import freeze, unfreeze
from normkit.keras._group_norm import GroupNormalization
from normkit.keras._instance_norm import InstanceNormalization
from normkit.keras._layer_norm import LayerNormalization
from normkit.keras._portable import definition, layer
from normkit.keras._recalibrate import recalibrate
from normkit.keras._rms_norm import RMSNormalization

__all__ = [
    "BatchNormalization",
    "GroupNormalization",
    "InstanceNormalization",
    "LayerNormalization",
    "RMSNormalization",
    "convert",
    "definition",
    "fold",
    "freeze",
    "layer",
    "recalibrate",
    "revert",
    "unfreeze",
]
