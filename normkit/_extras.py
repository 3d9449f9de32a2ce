"""What an adapter says when its framework is not installed."""

from __future__ import annotations

from importlib.util import find_spec


def require(module: str, adapter: str, extra: str) -> None:
    """Refuse to import ``adapter`` without ``module``, naming the extra that installs it."""
    if find_spec(module) is None:
        msg = (
            f"{adapter} needs the package {module!r}, which is not installed; "
            f"install it with: pip install 'normkit[{extra}]'"
        )
        raise ImportError(msg)
