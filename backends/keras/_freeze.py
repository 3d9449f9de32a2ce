"""Freeze normalization layers: their moving statistics, their parameters, or both."""

from __future__ import annotations

from typing import Any

import keras

from normkit import _freeze

from . import _portable
from ._batch_norm import BatchNormalization
from ._convert import _become, _layers, forget_compiled
from ._instance_norm import InstanceNormalization
from ._masks import PROPAGATED

Layer = keras.layers.Layer

STATISTICS, PARAMETERS = _BOTH = ("statistics", "parameters")


class _HalfFrozen:
    """A layer of which one part is frozen, as ``frozen`` says, and the other is not."""

    frozen: str

    def build(self, input_shape: Any) -> None:
        super().build(input_shape)  # type: ignore[misc]
        hold(self)

    @property
    def trainable(self) -> bool:
        return bool(super().trainable)  # type: ignore[misc]

    @trainable.setter
    def trainable(self, value: bool) -> None:
        Layer.trainable.fset(self, value)
        hold(self)

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "frozen": self.frozen}  # type: ignore[misc]


@keras.saving.register_keras_serializable(package="normkit")
class FrozenBatchNormalization(_HalfFrozen, BatchNormalization):
    """A :class:`BatchNormalization` of which one part is frozen: see :func:`freeze`.

    Args:
        frozen: ``"statistics"`` if it normalizes with the moving statistics in training too, and
            leaves them as they are; ``"parameters"`` if gamma and beta are not trained.
        args, options: those of :class:`BatchNormalization`.
    """

    def __init__(self, *args: Any, frozen: str = STATISTICS, **options: Any) -> None:
        self.frozen = _checked(frozen)
        super().__init__(*args, **options)

    def call(self, inputs: Any, training: bool | None = None, mask: Any = None) -> Any:
        training = training and self.frozen != STATISTICS
        return super().call(inputs, training=training, mask=mask)


@keras.saving.register_keras_serializable(package="normkit")
class FrozenInstanceNormalization(_HalfFrozen, InstanceNormalization):
    """An :class:`InstanceNormalization` of which one part is frozen: see :func:`freeze`.

    Args:
        frozen: ``"statistics"`` if it normalizes with the moving statistics in training too, and
            leaves them as they are; ``"parameters"`` if gamma and beta are not trained.
        args, options: those of :class:`InstanceNormalization`.
    """

    def __init__(self, *args: Any, frozen: str = STATISTICS, **options: Any) -> None:
        self.frozen = _checked(frozen)
        super().__init__(*args, **options)

    def call(self, inputs: Any, training: bool | None = None, mask: Any = PROPAGATED) -> Any:
        training = training and self.frozen != STATISTICS
        return super().call(inputs, training=training, mask=mask)


_FROZEN: dict[type[Layer], type[Layer]] = {
    BatchNormalization: FrozenBatchNormalization,
    InstanceNormalization: FrozenInstanceNormalization,
}
_THAWED = {frozen: layer for layer, frozen in _FROZEN.items()}


def freeze(model: Layer, *, statistics: bool = True, parameters: bool = True) -> Layer:
    """Freeze the normalization layers in ``model``, native ones or normkit's, in place.

    With both, that is ``trainable = False`` for each of them, as Keras has it: a layer with moving
    statistics then uses these in training too, and leaves them as they are. ``trainable = True``
    for the whole model undoes it. Where just one of them is frozen, a layer with moving statistics
    becomes a :class:`FrozenBatchNormalization` or :class:`FrozenInstanceNormalization`, with the
    same weights, which stays so whatever ``trainable`` is set to. Either way it is saved with the
    model, and cloned. Call ``compile`` again, and freeze after ``convert``.

    Args:
        model: any model or layer; it may itself be a normalization layer.
        statistics: freeze the moving statistics.
        parameters: freeze ``gamma`` and ``beta``.

    Returns:
        ``model``.

    Raises:
        ValueError: just one of them is to be frozen, and a layer with moving statistics is Keras'
            own or a subclass; nothing is changed.

    Warns:
        UserWarning: no layer has what is to be frozen.

    >>> model = keras.Sequential([keras.Input((8,)), BatchNormalization()])
    >>> [w.name for w in freeze(model, parameters=False).trainable_weights]
    ['gamma', 'beta']
    >>> freeze(model).trainable_weights
    []
    """
    return _set(model, statistics, parameters, frozen=True)


def unfreeze(model: Layer, *, statistics: bool = True, parameters: bool = True) -> Layer:
    """Undo :func:`freeze`, in place. Call ``compile`` again.

    Args:
        model: any model or layer; it may itself be a normalization layer.
        statistics: let the moving statistics follow the batches again.
        parameters: train ``gamma`` and ``beta`` again.

    Returns:
        ``model``.

    Raises:
        ValueError: just one of them is to be thawed, and a layer with moving statistics is Keras'
            own or a subclass; nothing is changed.

    Warns:
        UserWarning: no layer has what is to be thawed.
    """
    return _set(model, statistics, parameters, frozen=False)


def _set(model: Layer, statistics: bool, parameters: bool, *, frozen: bool) -> Layer:
    wanted = {}
    for layer in _layers(model):
        if not isinstance(layer, _portable.KINDS):
            continue
        remembers = _remembers(layer)
        if not (parameters or (statistics and remembers)):
            continue
        parts = frozen_parts(layer)
        named = {STATISTICS} if statistics else set()
        named |= {PARAMETERS} if parameters else set()
        parts = parts | named if frozen else parts - named
        if remembers and len(parts) == 1 and type(layer) not in _FROZEN | _THAWED:
            raise _convert_first(layer, parts)
        wanted[layer] = parts
    for layer, parts in wanted.items():
        _freeze_parts(layer, parts)
    if not wanted:
        _freeze.nothing(model, statistics=statistics, parameters=parameters)
    forget_compiled(model)
    return model


def _remembers(layer: Any) -> bool:
    """Whether ``layer`` has moving statistics, or will have once it is built."""
    if isinstance(layer, keras.layers.BatchNormalization):
        return bool(getattr(layer, "track_running_stats", True))
    return isinstance(layer, InstanceNormalization) and bool(layer.track_running_stats)


def frozen_parts(layer: Any) -> set[str]:
    """Which parts of ``layer`` are frozen."""
    if not layer.trainable:
        return set(_BOTH)
    return {layer.frozen} if type(layer) in _THAWED else set()


def _freeze_parts(layer: Any, parts: set[str]) -> None:
    """Freeze these ``parts`` of ``layer``, and no other."""
    half = len(parts) == 1 and _remembers(layer)
    kind = _THAWED.get(type(layer), type(layer))
    if half:
        kind = _FROZEN[kind]
    if kind is not type(layer):
        _become(layer, kind)
    if half:
        (layer.frozen,) = parts
    # Not layer.trainable = ..., which does nothing on TensorFlow if that is what it is already.
    Layer.trainable.fset(layer, half or PARAMETERS not in parts)
    if half:
        hold(layer)


def hold(layer: Any) -> None:
    """The parameters of a layer in which they are frozen, at rest."""
    if layer.frozen == PARAMETERS:
        for variable in (getattr(layer, "gamma", None), getattr(layer, "beta", None)):
            if variable is not None:
                variable.trainable = False


def _checked(frozen: str) -> str:
    if frozen not in _BOTH:
        msg = f"frozen must be one of {_BOTH}, but got {frozen!r}; for both set trainable=False."
        raise ValueError(msg)
    return frozen


def _convert_first(layer: Layer, parts: set[str]) -> ValueError:
    (part,) = parts
    msg = (
        f"in {layer.name!r}, a {type(layer).__name__} that is not normkit's own, only the {part} "
        f"would be frozen, for which Keras has no means; nothing was changed. Call "
        f"normkit.keras.convert(model) first, or freeze both."
    )
    return ValueError(msg)
