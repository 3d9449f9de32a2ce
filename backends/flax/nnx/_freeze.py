"""Freeze normalization layers: their running statistics, their parameters, or both."""

from __future__ import annotations

from typing import Any

from flax import nnx
from jax import Array

from normkit import _freeze

from . import _portable
from ._batch_norm import BatchNorm
from ._convert import _become, _modules
from ._instance_norm import InstanceNorm

_MARK = "frozen"


def _note(layer: Any, value: bool | None) -> None:
    vars(layer)["use_running_average"] = value


# True, whatever it is set to: that is noted down for when the layer is thawed.
_ALWAYS = property(lambda layer: True, _note)


class FrozenNativeBatchNorm(nnx.BatchNorm):
    """A ``flax.nnx.BatchNorm`` of which the running statistics are frozen: see :func:`freeze`."""

    use_running_average = _ALWAYS

    def __call__(
        self, x: Array, use_running_average: bool | None = None, *, mask: Array | None = None
    ) -> Array:
        return super().__call__(x, use_running_average=True, mask=mask)


class FrozenBatchNorm(BatchNorm):
    """A :class:`BatchNorm` of which the running statistics are frozen: see :func:`freeze`."""

    use_running_average = _ALWAYS

    def __call__(
        self, x: Array, use_running_average: bool | None = None, *, mask: Array | None = None
    ) -> Array:
        return super().__call__(x, use_running_average=True, mask=mask)


class FrozenInstanceNorm(InstanceNorm):
    """An :class:`InstanceNorm` of which the running statistics are frozen: see :func:`freeze`."""

    use_running_average = _ALWAYS

    def __call__(
        self, x: Array, *, mask: Array | None = None, use_running_average: bool | None = None
    ) -> Array:
        return super().__call__(x, use_running_average=True, mask=mask)


_FROZEN: dict[type[nnx.Module], type[nnx.Module]] = {
    nnx.BatchNorm: FrozenNativeBatchNorm,
    BatchNorm: FrozenBatchNorm,
    InstanceNorm: FrozenInstanceNorm,
}
_THAWED = {frozen: layer for layer, frozen in _FROZEN.items()}


def trainable(path: tuple[Any, ...], variable: Any) -> bool:
    """A filter: the parameters that are not frozen, for optimizers and gradients.

    Args:
        path: where a variable is in the model.
        variable: it, or whatever else is there.

    Returns:
        Whether it is an ``nnx.Param`` that :func:`freeze` has not frozen.

    >>> rngs = nnx.Rngs(0)
    >>> model = nnx.Sequential(nnx.Linear(2, 3, rngs=rngs), nnx.BatchNorm(3, rngs=rngs))
    >>> state = nnx.state(freeze(model), trainable)
    >>> [path for path, _ in nnx.to_flat_state(state)]
    [('layers', 0, 'bias'), ('layers', 0, 'kernel')]
    """
    return isinstance(variable, nnx.Param) and not variable.get_metadata(_MARK, False)


def freeze(model: nnx.Module, *, statistics: bool = True, parameters: bool = True) -> nnx.Module:
    """Freeze the normalization layers in ``model``, native ones or normkit's, in place.

    Frozen statistics are those that a layer with running statistics uses from then on, and they
    stay as they are, whatever ``model.train()`` and ``use_running_average`` say: the layer becomes
    a :class:`FrozenBatchNorm` or the like, with the same variables. Frozen parameters bear a mark,
    and the filter :func:`trainable` leaves them out::

        optimizer = nnx.Optimizer(model, tx, wrt=normkit.flax.nnx.trainable)
        grads = nnx.grad(loss, argnums=nnx.DiffState(0, normkit.flax.nnx.trainable))(model)

    ``nnx.clone``, ``nnx.split`` and ``nnx.merge`` keep both. The mark is metadata of the variable,
    so ``nnx.update`` with an ``nnx.State`` of before takes it away. Freeze after ``convert``.

    Args:
        model: any module; it may itself be a normalization layer.
        statistics: freeze the running statistics.
        parameters: freeze ``scale`` and ``bias``.

    Returns:
        ``model``.

    Raises:
        ValueError: statistics are to be frozen, and a layer is of a class that is derived from
            BatchNorm; nothing is changed.

    Warns:
        UserWarning: no layer has what is to be frozen.

    >>> bn = freeze(nnx.BatchNorm(3, rngs=nnx.Rngs(0)))
    >>> bn.train()
    >>> bn.use_running_average, bn.scale.get_metadata("frozen")
    (True, True)
    """
    return _set(model, statistics, parameters, frozen=True)


def unfreeze(model: nnx.Module, *, statistics: bool = True, parameters: bool = True) -> nnx.Module:
    """Undo :func:`freeze`, in place. The layers are then in the mode that was set last.

    Args:
        model: any module; it may itself be a normalization layer.
        statistics: let the running statistics follow the batches again.
        parameters: let :func:`trainable` take in ``scale`` and ``bias`` again.

    Returns:
        ``model``.

    Warns:
        UserWarning: no layer has what is to be thawed.
    """
    return _set(model, statistics, parameters, frozen=False)


def _set(model: nnx.Module, statistics: bool, parameters: bool, *, frozen: bool) -> nnx.Module:
    layers = [
        (path, layer) for path, layer in _modules(model) if isinstance(layer, _portable.KINDS)
    ]
    remembering = [
        (path, layer) for path, layer in layers if getattr(layer, "mean", None) is not None
    ]
    marked = [
        variable
        for _, layer in layers
        for variable in (getattr(layer, "scale", None), getattr(layer, "bias", None))
        if variable is not None
    ]
    kinds = _FROZEN if frozen else _THAWED
    if statistics:
        for path, layer in remembering:
            if type(layer) not in _FROZEN | _THAWED and frozen:
                raise _derived(".".join(map(str, path)), layer)
        for _, layer in remembering:
            if type(layer) in kinds:
                _become(layer, kinds[type(layer)])
    if parameters:
        for variable in marked:
            if frozen:
                variable.set_metadata(_MARK, True)
            elif variable.has_metadata(_MARK):
                variable.del_metadata(_MARK)
    if not (statistics and remembering) and not (parameters and marked):
        _freeze.nothing(model, statistics=statistics, parameters=parameters)
    return model


def _derived(name: str, layer: nnx.Module) -> ValueError:
    bases = " or ".join(f"{kind.__module__}.{kind.__name__}" for kind in _FROZEN)
    msg = (
        f"{name!r} is a {type(layer).__name__}, and only layers of exactly {bases} can be told to "
        f"keep their statistics; nothing was changed. Call it with use_running_average=True."
    )
    return ValueError(msg)
