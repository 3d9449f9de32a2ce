"""The demo, for some steps: native layers part, normkit's stay together, and the state moves."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from harness import backends

EXAMPLES = Path(__file__).parents[1] / "docs" / "examples"
# In a process of its own: it chooses the backend of Keras, and the number of threads.
CODE = """
import json, sys
sys.path.insert(0, {examples!r})
import digits
from digits_report import draw
from pathlib import Path
results = digits.run(max_steps=30)
draw(results, Path({picture!r}))
print(json.dumps({{
    name: {{
        "losses": trio.losses.tolist(),
        "predictions": trio.predictions().tolist(),
        "mean": trio.running("mean").tolist(),
        "var": trio.running("var").tolist(),
    }}
    for name, trio in (("native", results.native), ("normkit", results.normkit))
}} | {{"moved": {{name: s.argmax(-1).tolist() for name, s in results.moved.items()}}}}))
"""

if {"torch", "keras-tensorflow", "flax-nnx"} <= set(backends.chosen()):

    @pytest.fixture(scope="module")
    def results(tmp_path_factory):
        picture = tmp_path_factory.mktemp("demo") / "agreement.png"
        code = CODE.format(examples=str(EXAMPLES), picture=str(picture))
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        return json.loads(done.stdout.splitlines()[-1]) | {"picture": picture}

    def apart(values) -> float:
        values = np.array(values)
        return float(np.max(np.ptp(values, axis=-1)))

    def test_losses(results):
        assert apart(results["normkit"]["losses"]) < 1e-4
        assert apart(results["native"]["losses"]) > 1e-2

    def test_running_statistics(results):
        for name in ("mean", "var"):
            assert apart(np.transpose(results["normkit"][name])) < 1e-4
            assert apart(np.transpose(results["native"][name])) > 1e-2

    def test_predictions(results):
        first, *others = results["normkit"]["predictions"]
        assert all(other == first for other in others)
        assert len(first) == 360

    def test_the_state_moves(results):
        trained = results["normkit"]["predictions"][0]
        assert results["moved"] == {"Keras": trained, "Flax": trained}

    def test_the_picture(results):
        assert results["picture"].read_bytes().startswith(b"\x89PNG")
