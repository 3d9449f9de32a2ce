"""What was found, as a file of JSON."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any


def write(path: str, found: Any) -> None:
    """JSON has no NaN and no infinity: they are written as null."""
    Path(path).write_text(json.dumps(_finite(found), indent=1, allow_nan=False) + "\n")


def _finite(value: Any) -> Any:
    match value:
        case dict():
            return {name: _finite(each) for name, each in value.items()}
        case list():
            return [_finite(each) for each in value]
        case float():
            return value if math.isfinite(value) else None
    return value
