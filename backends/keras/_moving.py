"""Moving statistics in the weights of a layer."""

from __future__ import annotations

from typing import Any


def add_count(layer: Any) -> Any:
    """A weight of ``layer`` that counts the batches."""
    return layer.add_weight(
        name="count",
        initializer="zeros",
        dtype="int",
        trainable=False,
        aggregation="only_first_replica",
    )


def of(layer: Any) -> dict[str, Any]:
    """The weights of ``layer`` that are state, by the names that the core has for them."""
    named = {"mean": layer.moving_mean, "var": layer.moving_variance, "count": layer.count}
    return {name: variable for name, variable in named.items() if variable is not None}
