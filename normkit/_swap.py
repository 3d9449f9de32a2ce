"""What to say of a model whose layers are exchanged in place."""

from __future__ import annotations

import warnings


def nothing(which: str, model: object) -> None:
    """There was no layer to exchange: more likely a mistake than meant."""
    warnings.warn(
        f"no {which} normalization layer was found in this {type(model).__name__}, so it was left "
        f"as it is; subclasses of such layers, and layers that only exist once they are called, "
        f"are not exchanged.",
        UserWarning,
        stacklevel=3,
    )


def not_native(name: str, options: str) -> ValueError:
    """A layer that the framework's own class cannot stand for."""
    msg = (
        f"{name!r} has {options}, for which there is no native layer; nothing was changed. Leave "
        f"out the option, or exchange parts of the model."
    )
    return ValueError(msg)
