"""Runs jobs that come in on standard input, on the backend named on the command line."""

import importlib
import os
import pickle
import sys
import traceback
from pathlib import Path

sys.path[0] = str(Path(__file__).parents[1])


def main(name: str) -> None:
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever a framework prints must not get among the answers
    from harness.backends import BACKENDS

    run = importlib.import_module(f"harness.{BACKENDS[name][0]}").runner(name)
    while True:
        try:
            job = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        try:
            answer = True, run(job)
        except Exception:
            answer = False, traceback.format_exc()
        pickle.dump(answer, answers)
        answers.flush()


main(sys.argv[1])
