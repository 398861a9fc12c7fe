"""Plant mutants and say what caught each: see the package."""

from __future__ import annotations

import subprocess
import sys

from sgl_flowprefill.model import embedded_model_path
from tests.chaos import Rounds
from tests.engine import PrefillEngine
from tests.mutants import MUTANTS, nothing
from tests.mutants.outcome import Outcome, raise_crashes
from tests.reference import Comparison, Reference

ROUNDS = 12
PLANTS = {nothing.__name__: nothing, **MUTANTS}


def plant(name: str) -> Outcome:
    """Play rounds in this process with one mutant, or with none."""
    path = embedded_model_path()
    engine = PrefillEngine(str(path))
    raise_crashes(engine.scheduler.role)
    strikes = 0

    def struck() -> None:
        nonlocal strikes
        strikes += 1

    PLANTS[name](engine, struck)
    rounds = Rounds(engine, Comparison(Reference(path)))
    error = None
    try:
        rounds.run(ROUNDS)
    except Exception as caught:
        error = caught
    print(f"{name}: struck {strikes} times; {rounds}")
    return Outcome(strikes, error)


def main(names: list[str]) -> int:
    if len(names) == 1:
        [name] = names
        outcome = plant(name)
        print(outcome)
        return 0 if outcome.is_as_it_should_be(name in MUTANTS) else 1
    failed = []
    for name in names or PLANTS:
        print(f"---- {name}", flush=True)
        done = subprocess.run(
            [sys.executable, "-m", "tests.mutants", name], stderr=subprocess.DEVNULL, timeout=600, check=False
        )
        if done.returncode:
            failed.append(name)
    print(f"not as it should be: {', '.join(failed)}" if failed else "all mutants strike and are caught")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
