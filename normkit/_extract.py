"""Take the normalization layers out of a model."""

from __future__ import annotations

from typing import Any

from normkit._bundle import Bundle, Entry
from normkit._models import slots_of
from normkit._slot import Slot


def extract(model: Any, variables: Any = None, inputs: Any = None) -> Bundle:
    """The normalization layers of a model: their definitions, parameters and state.

    The layers may be the framework's own or normkit's. What is returned are copies; nothing is
    changed, and nothing of it is a framework's.

    Args:
        model: a ``torch.nn.Module``, a Keras layer or model, an ``nnx.Module``, a Linen module, or
            a layer of ``normkit.numpy``; it may be a normalization layer itself.
        variables: those of a Linen module, as ``init`` returns them.
        inputs: what a Linen module is called with: a tuple of arguments, a dict of them by name,
            or an array. Needed unless the module is a normalization layer itself; of arrays
            nothing but their shapes is used.

    Returns:
        A mapping from names, which are the framework's paths (``"layer1.0.bn2"`` in PyTorch,
        ``"stage/bn_2"`` in Keras, ``"stage.bn2"`` in Flax), to entries with ``definition``,
        ``arrays``, ``training`` and ``aliases``, in the order of the model. A layer that is shared
        comes once, with its other names as aliases.

    Raises:
        TypeError: ``model`` is none.
        ValueError: a layer does what no definition describes, or has not been built yet.

    >>> import normkit as nk, normkit.numpy
    >>> bundle = nk.extract(nk.numpy.layer(nk.BatchNorm(3)))
    >>> bundle[""].definition.eps, sorted(bundle[""].arrays)
    (1e-05, ['bias', 'count', 'mean', 'scale', 'var'])
    """
    slots = slots_of(model, variables=variables, inputs=inputs)
    return Bundle({slot.name: named_entry(slot) for slot in slots})


def named_entry(slot: Slot) -> Entry:
    """The layer as a value; errors say which layer it was."""
    try:
        return slot.entry()
    except (TypeError, ValueError) as error:
        if not slot.name:
            raise
        msg = f"{slot.name}: {error}"
        raise ValueError(msg) from error
