"""A NumPy layer: a definition, its arrays, and the gradients of its last call."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import DTypeLike, NDArray

from normkit import RMSNorm, _checks
from normkit._definition import Definition, Params, State
from normkit._engine import derivative, epsilon, with_rank
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
        d = self.definition
        along, axes = d.parameter_axes(x.ndim), d.reduced_axes(x.ndim)
        weights = _checks.weights_for(x, mask, along[-1], BACKEND)
        dtype = x.dtype
        x, grad = (cast(a, BACKEND.statistics_dtype(dtype), BACKEND) for a in (x, grad))
        params = {name: with_rank(p, along, x.ndim, BACKEND) for name, p in self.params.items()}
        scale = params.get("scale")
        if scale is not None:
            scale = cast(scale, x.dtype, BACKEND) + (1 - d.first_scale)

        def split(a: NDArray) -> NDArray:
            """With an axis for the groups of channels, if there are any."""
            if d.groups == 1:
                return a
            return BACKEND.split(a, along[0], d.groups if a.shape[along[0]] > 1 else 1)

        def join(a: NDArray) -> NDArray:
            return a if d.groups == 1 else BACKEND.join(a, along[0])

        if d.groups > 1:
            axes = tuple(a if a < along[0] else a + 1 for a in axes)
        weights = None if weights is None else split(weights)
        if state is None:
            standard, rstd = self._standardized(split(x), axes, weights)
        else:
            mean, var = (with_rank(state[name], along, x.ndim, BACKEND) for name in ("mean", "var"))
            rstd = 1 / np.sqrt(var + d.eps)
            standard = select(x - mean, weights, BACKEND) * rstd

        terms = {"scale": grad * join(standard), "bias": grad}
        others = tuple(axis for axis in range(grad.ndim) if axis not in along)
        self.grads = {
            name: cast(BACKEND.total(terms[name], others), p.dtype, BACKEND).reshape(p.shape)
            for name, p in self.params.items()
        }
        u = select(split(grad if scale is None else grad * scale), weights, BACKEND)
        if state is not None:
            return cast(u * rstd, dtype, BACKEND)
        _, average = averaging(u, axes, weights, BACKEND, adjoint=True)
        dx = derivative(u, standard, rstd, average, centered=self._centers())
        return cast(join(dx), dtype, BACKEND)

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
