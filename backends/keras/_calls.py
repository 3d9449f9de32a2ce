"""Which layers a model calls, and what is done with their outputs: its graph says so."""

from __future__ import annotations

from collections import Counter
from typing import Any, NamedTuple

import keras

Layer = keras.layers.Layer


class Call(NamedTuple):
    """One call of a layer."""

    node: Any
    graph: int
    training: bool


class Calls:
    """Which layers a model calls, how often, and in which order."""

    def __init__(self, model: keras.Model) -> None:
        self.often: Counter[int] = Counter()
        self.calls: dict[int, Call] = {}
        self.names: dict[int, str] = {}
        # Of tensors: how often they are used in a graph, as an output too.
        self.uses: Counter[tuple[int, ...]] = Counter()
        self._seen: dict[int, bool] = {}
        self._walk(model, "", False)
        self.owners = Counter(id(v) for layer in layers_of(model) for v in _own(layer))

    def _walk(self, model: keras.Model, prefix: str, training: bool) -> None:
        if id(model) in self._seen:
            if training and not self._seen[id(model)]:
                self._retrain(model)
            return
        self._seen[id(model)] = training
        graph = graph_of(model)
        for nodes in graph._nodes_by_depth.values():
            for node in nodes:
                layer = node.operation
                self.often[id(layer)] += 1
                self.calls[id(layer)] = Call(node, id(graph), training)
                self.names.setdefault(id(layer), prefix + layer.name)
                self.uses.update((id(graph), *place(x)) for x in node.input_tensors)
                if isinstance(layer, keras.Model) and graph_of(layer) is not None:
                    trains = training or bool(node.arguments.kwargs.get("training"))
                    self._walk(layer, f"{prefix}{layer.name}/", trains)
        self.uses.update((id(graph), *place(x)) for x in graph.outputs)

    def _retrain(self, model: keras.Model) -> None:
        """One call of ``model`` at least is in training mode."""
        self._seen[id(model)] = True
        for layer in model._flatten_layers():
            if id(layer) in self.calls:
                self.calls[id(layer)] = self.calls[id(layer)]._replace(training=True)

    def shares(self, layer: Layer) -> bool:
        """Whether someone else uses the weights of ``layer``."""
        return any(self.owners[id(v)] > 1 for v in _own(layer))


def layers_of(model: Layer) -> list[Layer]:
    """``model`` and every layer in it, however deep, each once."""
    return list({id(layer): layer for layer in model._flatten_layers()}.values())


def _own(layer: Layer) -> list[Any]:
    """The weights of ``layer`` itself."""
    return [*layer._trainable_variables, *layer._non_trainable_variables]


def graph_of(model: Any) -> Any:
    """The graph of calls that is all that ``model`` does; None if there is none."""
    if not isinstance(model, keras.Model) or type(model).__call__ is not Layer.__call__:
        return None
    caller = next(kind for kind in type(model).__mro__ if "call" in vars(kind))
    graph = getattr(model, "_functional", model)
    own = not caller.__module__.startswith("keras.")
    return None if own or not hasattr(graph, "_nodes_by_depth") else graph


def place(x: Any) -> tuple[int, int, int]:
    """Which output of which call ``x`` is."""
    history = x._keras_history
    return id(history.operation), history.node_index, history.tensor_index
