"""What every layer definition has in common: its parameters, its axes, and the checks of x."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import numpy

from normkit import _checks
from normkit._arrays import backend_of, backend_of_namespace
from normkit._backend import Array, Backend, DType, Namespace
from normkit._statistics import Axes

Params = dict[str, Array]
State = dict[str, Array]


class Definition(ABC):
    """A layer as a value of no framework; each kind of layer is a frozen dataclass.

    A layer says which shape its parameters have, along which axes of x they lie, and over which
    axes statistics are taken. Everything else follows.
    """

    scale: bool
    bias: bool

    @property
    @abstractmethod
    def parameter_shape(self) -> tuple[int, ...]:
        """The shape of ``scale`` and of ``bias``."""

    @abstractmethod
    def parameter_axes(self, ndim: int) -> Axes:
        """The axes of an ``ndim``-dimensional x along which ``scale`` and ``bias`` lie."""

    @abstractmethod
    def reduced_axes(self, ndim: int) -> Axes:
        """The axes of an ``ndim``-dimensional x over which statistics are taken."""

    @property
    def groups(self) -> int:
        """How many groups of channels have statistics of their own, if the channels are reduced."""
        return 1

    @property
    def first_scale(self) -> float:
        """What ``scale`` starts from."""
        return 1.0

    def init(
        self, xp: Namespace = None, dtype: DType = None, device: Any = None
    ) -> tuple[Params, State]:
        """The parameters and state to start from.

        Args:
            xp: the namespace to make arrays in: ``numpy`` (the default), ``torch``, ``jax.numpy``,
                ``tensorflow``, or any that follows the Array API.
            dtype: of the parameters, float32 if None. The state is in float32 at least.
            device: as the creation functions of ``xp`` take it.

        Returns:
            ``(params, state)``, dicts of arrays: ``scale`` (ones, unless the layer says
            otherwise) and ``bias`` (zeros), as far as the layer has them; and what the layer
            remembers, nothing unless it says so.
        """
        backend = backend_of_namespace(numpy if xp is None else xp)
        xp, place = backend.xp, {} if device is None else {"device": device}
        dtype = xp.float32 if dtype is None else dtype
        params = {}
        if self.scale:
            first = xp.ones if self.first_scale else xp.zeros
            params["scale"] = first(self.parameter_shape, dtype=dtype, **place)
        if self.bias:
            params["bias"] = xp.zeros(self.parameter_shape, dtype=dtype, **place)
        return params, self._initial_state(xp, backend.statistics_dtype(dtype), place)

    def _initial_state(self, xp: Namespace, dtype: DType, place: dict[str, Any]) -> State:
        return {}

    def _check(
        self, params: Params, x: Array, mask: Array | None
    ) -> tuple[Backend, Params, Array | None]:
        """Refuse what does not fit; the rest as arrays of the library of ``x``, ready to use."""
        backend = backend_of(x)
        _checks.floating(x, backend)
        axes = self.parameter_axes(len(x.shape))
        _checks.lengths(x, axes, self.parameter_shape, self)
        _checks.keys(params, {"scale": self.scale, "bias": self.bias}, "params")
        params = {
            name: _checks.parameter(p, x, self.parameter_shape, name, backend)
            for name, p in params.items()
        }
        return backend, params, _checks.weights_for(x, mask, axes[-1], backend)
