"""What is said when a package is not installed."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any


def require(module: str, adapter: str, extra: str) -> None:
    """Refuse to import ``adapter`` without ``module``, naming the extra that installs it."""
    if find_spec(module) is None:
        msg = (
            f"{adapter} needs the package {module!r}, which is not installed; "
            f"install it with: pip install 'normkit[{extra}]'"
        )
        raise ImportError(msg)


def bfloat16() -> Any:
    """NumPy's dtype of that name, which is that of a package."""
    require("ml_dtypes", "bfloat16 in NumPy", "files")
    import ml_dtypes

    return ml_dtypes.bfloat16
