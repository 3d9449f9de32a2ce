"""``python -m normkit info``: versions, frameworks, and the faster paths that are there."""

from __future__ import annotations

import argparse
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from normkit._commands import frameworks, machine, record


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", metavar="FILE", help="write all that was found")


def main(options: argparse.Namespace) -> int:
    here, missing = frameworks.divided(list(frameworks.FRAMEWORKS))
    with ThreadPoolExecutor(2) as pool:
        found = dict(zip(here, pool.map(_asked, here), strict=True))
    print(machine.described())
    for name, answer in found.items():
        print(f"\n{name}: {_described(answer)}")
        for path, takes in answer.get("paths", {}).items():
            print(f"  {path}: {takes}")
    for name, lacks in missing.items():
        print(f"\n{name}: not here, for lack of {lacks}")
    if options.json:
        everything = {"machine": machine.described(), "frameworks": found, "missing": missing}
        record.write(options.json, everything)
    return 1 if any("failed" in answer for answer in found.values()) else 0


def _asked(name: str) -> dict[str, Any]:
    try:
        [answer] = frameworks.run(name, "info")
    except RuntimeError as error:
        return {"failed": str(error)}
    return answer


def _described(answer: dict[str, Any]) -> str:
    if "failed" in answer:
        return str(answer["failed"])
    versions = ", ".join(f"{name} {version}" for name, version in answer["versions"].items())
    return f"{versions}; {answer['device']}"
