"""normkit for Flax: ``normkit.flax.nnx`` and ``normkit.flax.linen``, each imported by itself.

>>> import normkit as nk, normkit.flax.linen, normkit.flax.nnx
>>> layer = nk.flax.nnx.layer(nk.LayerNorm.flax(8))
>>> nk.flax.nnx.definition(layer) == nk.flax.linen.definition(nk.flax.linen.LayerNorm(shape=8))
True
"""

from normkit._extras import require as _require

_require("flax", "normkit.flax", "flax")
