"""Plant mutants and say what caught each: see the package."""

from __future__ import annotations

import subprocess
import sys
import traceback

from sgl_flowprefill.model import embedded_model_path
from tests.chaos import Rounds
from tests.engine import PrefillEngine
from tests.mutants import MUTANTS, nothing
from tests.reference import Comparison, Reference

ROUNDS = 12


def plant(name: str) -> str:
    """Play rounds in this process with one mutant, or with none; the error that ended them, or an empty text."""
    path = embedded_model_path()
    engine = PrefillEngine(str(path))
    strikes = 0

    def struck() -> None:
        nonlocal strikes
        strikes += 1

    MUTANTS.get(name, nothing)(engine, struck)
    rounds = Rounds(engine, Comparison(Reference(path)))
    error = ""
    try:
        rounds.run(ROUNDS)
    except Exception as caught:
        error = str(caught) if isinstance(caught, AssertionError) and str(caught) else traceback.format_exc(limit=-3)
    print(f"{name}: struck {strikes} times; {rounds}")
    return error


def main(names: list[str]) -> int:
    if len(names) == 1:
        [name] = names
        error = plant(name)
        print(f"caught by\n{error}" if error else "nothing differs")
        return 0 if bool(error) == (name in MUTANTS) else 1
    failed = []
    for name in names or [nothing.__name__, *MUTANTS]:
        print(f"---- {name}", flush=True)
        done = subprocess.run(
            [sys.executable, "-m", "tests.mutants", name], stderr=subprocess.DEVNULL, timeout=600, check=False
        )
        if done.returncode:
            failed.append(name)
    print(f"not as it should be: {', '.join(failed)}" if failed else "all mutants are caught")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
