"""normkit for JAX: the core's functions and definitions on ``jax.Array``.

>>> import jax, jax.numpy as jnp, normkit as nk
>>> bn = nk.BatchNorm.flax(3)
>>> params, state = bn.init(xp=jnp)
>>> x = jax.random.normal(jax.random.key(0), (8, 3))
>>> step = jax.jit(lambda state, x: bn.apply(params, state, x, training=True))
>>> y, state = step(state, x)
>>> y.shape, int(state["count"])
((8, 3), 1)

``namespace`` is ``jax.numpy``, to make arrays in.

Layers are those of a library over JAX: see ``normkit.flax.nnx`` and ``normkit.flax.linen``.
"""

from normkit._extras import require as _require

_require("jax", "normkit.jax", "jax")

import jax.numpy as namespace  # noqa: F401
