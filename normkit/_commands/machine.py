"""What normkit runs on."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import normkit


def described() -> str:
    """In one line."""
    return (
        f"normkit {normkit.__version__}, Python {platform.python_version()}, "
        f"{platform.system()}, {_processor()}, {os.cpu_count()} cores"
    )


def _processor() -> str:
    listed = Path("/proc/cpuinfo")
    if listed.exists():
        for line in listed.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
