"""What to say of a model in which there is nothing to freeze."""

from __future__ import annotations

import warnings


def nothing(model: object, *, statistics: bool, parameters: bool) -> None:
    """No layer has what was named: more likely a mistake than meant."""
    kinds = {"parameters": parameters, "running statistics": statistics}
    which = " or ".join(kind for kind, named in kinds.items() if named) or "anything"
    warnings.warn(
        f"no normalization layer with {which} was found in this {type(model).__name__}, so it was "
        f"left as it is.",
        UserWarning,
        stacklevel=3,
    )
