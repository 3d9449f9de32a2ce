"""normkit for TensorFlow: the package's functions on ``tf.Tensor``.

``nk.moments``, ``nk.normalize``, ``nk.batch_norm``, ``nk.layer_norm`` and the ``apply`` of every
definition take tensors and variables as they are, eagerly, in ``tf.function`` and compiled by
XLA, and are differentiable to any order. For layers with weights of their own, see
``normkit.keras``.

>>> import tensorflow as tf, normkit as nk
>>> bn = nk.BatchNorm(2, decay=0.5)
>>> params, state = bn.init(xp=tf)
>>> x = tf.constant([[1.0, 10.0], [3.0, 30.0]])
>>> y, state = bn.apply(params, state, x, training=True)
>>> y.numpy().round(2).tolist(), state["mean"].numpy().tolist()
([[-1.0, -1.0], [1.0, 1.0]], [1.0, 10.0])

``namespace`` is the part of the Array API standard that those functions need, over ``tf.Tensor``.
"""

from normkit._extras import require as _require

_require("tensorflow", "normkit.tensorflow", "tensorflow")

from normkit.tensorflow import _namespace as namespace

__all__ = ["namespace"]
