"""A NumPy layer: a definition, its arrays, and the gradients of its last call."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import DTypeLike, NDArray

from normkit import _checks
from normkit._definition import Definition, Params, State
from normkit._engine import derivative, with_rank
from normkit._statistics import averaging, cast, centre

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
        ndim, dtype = x.ndim, BACKEND.statistics_dtype(x.dtype)
        along, axes = self.definition.parameter_axes(ndim), self.definition.reduced_axes(ndim)
        weights = _checks.weights_for(x, mask, along[-1], BACKEND)

        if state is None:
            centred, used = centre(cast(x, dtype, BACKEND), axes, weights, BACKEND)
            variance = used.variance
        else:
            mean = with_rank(state["mean"], along, ndim, BACKEND)
            variance = with_rank(state["var"], along, ndim, BACKEND)
            centred = _select(x - mean, weights)
        rstd = 1 / np.sqrt(variance + self.definition.eps)
        standard = centred * rstd

        grad = cast(grad, dtype, BACKEND)
        others = tuple(axis for axis in range(ndim) if axis not in along)
        terms = {"scale": grad * standard, "bias": grad}
        self.grads = {
            name: cast(BACKEND.total(terms[name], others), p.dtype, BACKEND).reshape(p.shape)
            for name, p in self.params.items()
        }

        if "scale" in self.params:
            grad = grad * with_rank(
                cast(self.params["scale"], dtype, BACKEND), along, ndim, BACKEND
            )
        grad = _select(grad, weights)
        if state is not None:
            return cast(grad * rstd, x.dtype, BACKEND)
        _, average = averaging(grad, axes, weights, BACKEND, adjoint=True)
        return cast(derivative(grad, standard, rstd, average), x.dtype, BACKEND)

    def __repr__(self) -> str:
        return f"normkit.numpy.layer({self.definition!r})"


def _select(a: NDArray, weights: NDArray | None) -> NDArray:
    return a if weights is None else np.where(weights > 0, a, np.zeros_like(a))
