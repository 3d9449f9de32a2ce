"""Masks: those that come with the input, and those that are given."""

from __future__ import annotations

from functools import partial
from typing import Any

from keras import ops
from keras.src.backend import get_keras_mask

from normkit import _checks
from normkit._backend import Array, Backend

# The default of ``mask`` where the native layer takes none: the one that came with the input. If it
# were None, Keras would write a mask into the graph of a model, and so into files and into what
# ``revert`` leaves behind.
PROPAGATED = "propagated"


class Masked:
    """A layer that sees the mask of its input even where Keras hands it a copy of the input."""

    def rematerialized_call(self, layer_call: Any, *args: Any, **kwargs: Any) -> Any:
        call = super().rematerialized_call(layer_call, *args, **kwargs)  # type: ignore[misc]
        mask = get_keras_mask(args[0])
        if mask is None or len(args) > 1 or "mask" in kwargs:
            return call
        return partial(call, mask=_of_the_first_axes(mask, args[0]))


def weights(inputs: Any, mask: Any, x: Array, channel: int, backend: Backend) -> Array | None:
    """``mask`` as the core wants it for ``x``, which is ``inputs`` as a tensor.

    A mask that came with ``inputs`` belongs to its first axes: Keras makes one of the shape (batch,
    time). A mask of another origin may lack the ``channel`` axis; if it lacks more, it belongs to
    the first axes too.
    """
    propagated = get_keras_mask(inputs)
    if isinstance(mask, str):
        mask = propagated
    if mask is None:
        return None
    if mask is propagated or len(x.shape) - len(mask.shape) > 1:
        mask = _of_the_first_axes(mask, x)
    return _checks.weights_for(x, ops.convert_to_tensor(mask), channel, backend)


def _of_the_first_axes(mask: Any, x: Any) -> Any:
    for _ in range(len(x.shape) - len(mask.shape)):
        mask = ops.expand_dims(mask, -1)
    return mask
