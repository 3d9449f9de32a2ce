"""A NumPy layer: a definition, its arrays, and the gradients of its last call."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import DTypeLike, NDArray

from normkit import RMSNorm, _checks
from normkit._definition import Definition, Params, State
from normkit._engine import derivative, epsilon, with_rank
from normkit._explain import declined, settled
from normkit._statistics import Axes, averaging, cast, centre, select, spread

from ._backend import BACKEND


class _Call(NamedTuple):
    """What the backward pass needs of a call."""

    x: NDArray
    mask: NDArray | None
    state: State | None  # the statistics that were used; None for those of x


class Layer:
    """A normalization layer that keeps its own parameters, state and gradients.

    Args:
        definition: such as ``nk.BatchNorm(64)``.
        dtype: of the parameters, float32 if None.

    Attributes:
        definition: as given.
        params: ``scale`` and ``bias``, as far as the layer has them.
        state: what the layer remembers; empty for most.
        grads: gradients of ``params``, from the last :meth:`backward`.
    """

    params: Params
    state: State
    grads: Params

    def __init__(self, definition: Definition, dtype: DTypeLike = None) -> None:
        self.definition = definition
        self.params, self.state = definition.init(dtype=None if dtype is None else np.dtype(dtype))
        self.grads = {}
        self._call: _Call | None = None

    def __call__(
        self, x: NDArray, *, training: bool = False, mask: NDArray | None = None
    ) -> NDArray:
        """Normalize ``x``; in training the state moves. Errors: see the definition's ``apply``."""
        y, state = self.definition.apply(self.params, self.state, x, training=training, mask=mask)
        own = training or not self.state
        self._call = _Call(x, mask, None if own else self.state)
        self.state = state
        return y

    def backward(self, grad: NDArray) -> NDArray:
        """The gradient of x, given the gradient of the last result; ``grads`` gets the rest.

        The x and mask of that call must not have been written to since.

        Raises:
            RuntimeError: nothing has been called yet.
            ValueError: ``grad`` has not the shape of the last result.
        """
        if self._call is None:
            msg = "backward needs a call to go back through: call the layer first."
            raise RuntimeError(msg)
        x, mask, state = self._call
        _checks.same_shape(grad, x, "grad")
        d, ndim, shape = self.definition, x.ndim, x.shape
        along, axes = d.parameter_axes(ndim), d.reduced_axes(ndim)
        weights = _checks.weights_for(x, mask, along[-1], BACKEND)
        given = {name: with_rank(p, along, ndim, BACKEND) for name, p in self.params.items()}
        for name in () if state is None else ("mean", "var"):
            given[name] = with_rank(state[name], along, ndim, BACKEND)
        if d.groups > 1:
            # With an axis for the groups of channels, and another for those of one group.
            channel = along[0]
            axes = tuple(a if a < channel else a + 1 for a in axes)
            along = (channel, channel + 1)

            def split(a: NDArray) -> NDArray:
                return BACKEND.split(a, channel, d.groups if a.shape[channel] > 1 else 1)

            x, grad = split(x), split(grad)
            given = {name: split(p) for name, p in given.items()}
            weights = None if weights is None else split(weights)
        if "scale" in given and d.first_scale != 1:
            scale = given["scale"]
            given["scale"] = cast(scale, BACKEND.statistics_dtype(scale.dtype), BACKEND) + (
                1 - d.first_scale
            )
        eps = epsilon(d.eps, BACKEND.statistics_dtype(x.dtype), BACKEND)
        found = None
        if weights is None:
            along = along if self.params else ()
            found = BACKEND.backward(x, grad, axes, along, given, eps, self._centers())
        else:
            declined("a mask or weights are given")
        settled("backward", BACKEND.library, found is not None)
        if found is None:
            found = self._backward(x, grad, axes, along, given, eps, weights)
        dx, *found = found
        self.grads = {
            name: cast(gradient, self.params[name].dtype, BACKEND).reshape(d.parameter_shape)
            for name, gradient in zip(("scale", "bias"), found, strict=True)
            if name in self.params
        }
        return dx.reshape(shape)

    def _backward(
        self,
        x: NDArray,
        grad: NDArray,
        axes: Axes,
        along: Axes,
        given: Params,
        eps: float,
        weights: NDArray | None,
    ) -> tuple[NDArray, NDArray, NDArray]:
        """The gradients of x, scale and bias, as the formulas have it."""
        dtype, ndim = x.dtype, x.ndim
        x, grad = (cast(a, BACKEND.statistics_dtype(dtype), BACKEND) for a in (x, grad))
        if "var" in given:
            rstd = 1 / np.sqrt(given["var"] + eps)
            standard = select(x - given["mean"], weights, BACKEND) * rstd
        else:
            standard, rstd = self._standardized(x, axes, weights)
        others = tuple(axis for axis in range(ndim) if axis not in along)
        dscale, dbias = (BACKEND.total(terms, others) for terms in (grad * standard, grad))
        u = grad * cast(given["scale"], x.dtype, BACKEND) if "scale" in given else grad
        u = select(u, weights, BACKEND)
        if "var" in given:
            return cast(u * rstd, dtype, BACKEND), dscale, dbias
        _, average = averaging(u, axes, weights, BACKEND, adjoint=True)
        dx = derivative(u, standard, rstd, average, centered=self._centers())
        return cast(dx, dtype, BACKEND), dscale, dbias

    def _centers(self) -> bool:
        return not isinstance(self.definition, RMSNorm)

    def _standardized(
        self, x: NDArray, axes: Axes, weights: NDArray | None
    ) -> tuple[NDArray, NDArray]:
        """The standardized values of ``x``, and what its differences were multiplied by."""
        if self._centers():
            found, _ = centre(x, axes, weights, BACKEND)
        else:
            x = select(x, weights, BACKEND)
            found = spread(x, averaging(x, axes, weights, BACKEND)[1], BACKEND)
        rstd = found.rstd(epsilon(self.definition.eps, x.dtype, BACKEND), BACKEND)
        return found.values * rstd, rstd * found.per_unit

    def __repr__(self) -> str:
        return f"normkit.numpy.layer({self.definition!r})"
