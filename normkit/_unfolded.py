"""Why a BatchNorm of a model was not folded, in the words of every adapter's report."""

from __future__ import annotations

HEADS = ("layer", "folded into", "why not")

TRAINING = "it takes the statistics of its input: it is in training mode"
NO_STATISTICS = "it takes the statistics of its input: it has no running ones"
MASKED = "it is called with a mask"
NOT_FOUND = "no call of it was found"
OFTEN = "it is called more than once"
TRANSFORMED = "it is called in a function that is transformed by itself, such as nnx.remat's"
HOOKED = "it has hooks, or a forward of its own"
LOOKED_AT = "the model's own code looks at its layers, and would do something else without it"
SHARED = "it shares weights with another layer, or they are read or changed elsewhere"


def own_class(layer: object) -> str:
    """A class that somebody derived may do something else."""
    return f"it is a {type(layer).__name__}, which may do more than a BatchNorm"


def no_layer(before: str) -> str:
    """There is nothing to fold it into."""
    return f"what comes before it is {before}, which it cannot be folded into"


def layer_called_often(layer: str) -> str:
    return f"{layer!r} is called more than once"


def output_elsewhere(layer: str) -> str:
    return f"the output of {layer!r} is used elsewhere too"


def layer_hooked(layer: str) -> str:
    return f"{layer!r} has hooks, parametrizations or a forward of its own"


def layer_shared(layer: str) -> str:
    return f"{layer!r} shares weights with another layer, or they are read or changed elsewhere"


def activation(layer: str) -> str:
    return f"{layer!r} has an activation, which comes in between"


def special(layer: str, what: str) -> str:
    return f"{layer!r} has {what}"


def dtypes(layer: str, before: object, after: object) -> str:
    return f"it makes {after} of the {before} that {layer!r} puts out"


def narrow(layer: str, weights: object, computed: object) -> str:
    return (
        f"the folded weights of {layer!r} would be rounded to {weights}, but it puts out {computed}"
    )


def other_axis(axis: int, layer: str, channel: int) -> str:
    return (
        f"it normalizes axis {axis}, but the output channels of {layer!r} lie along axis {channel}"
    )


def unknown_rank(layer: str) -> str:
    return (
        f"whether its axis is that of the output channels of {layer!r} depends on the rank of the "
        f"input, which is not known; give fold example inputs"
    )
