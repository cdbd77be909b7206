"""The founding case, many times: Ollama loads 10.8 GB at a random moment of a run.

12 tests of 4 GB on a card of 24 GB under `--gpu-share`: no test may fail, and nothing of
the model may lie on the CPU.
"""

from __future__ import annotations

import argparse
import random
import subprocess
import threading
import time

from .scene import LIMIT, PYTEST, Scene, scene

SUITE = """
import time, gpusim, pytest
@pytest.mark.parametrize("i", range(12))
def test_model(i):
    with gpusim.alloc("4GB"):
        time.sleep(0.1)
"""


def main() -> None:
    """Print what happened; exit code 1 where a test failed or a model spilled."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--runs", type=int, default=100)
    parser.add_argument("--seed", type=int, default=20250607)
    options = parser.parse_args()
    moments = random.Random(options.seed)
    failed = spilled = during = 0
    for number in range(options.runs):
        with scene(SUITE, context="500MB") as here:
            failed_now, spilled_now, during_now = _once(here, moments.uniform(0.0, 3.0))
        failed, spilled, during = failed + failed_now, spilled + spilled_now, during + during_now
        print(f"\r{number + 1} runs", end="", flush=True)
    print(
        f"\r{options.runs} runs: tests failed in {failed}, Ollama spilled in {spilled}; "
        f"the model was loaded while tests held VRAM in {during}"
    )
    raise SystemExit(1 if failed or spilled else 0)


def _once(here: Scene, moment: float) -> tuple[bool, bool, bool]:
    held: list[int] = []

    def load() -> None:
        time.sleep(moment)
        held.append(here.machine.snapshot()[0].used)
        here.ollama.load("qwen2.5:14b")

    thread = threading.Thread(target=load)
    thread.start()
    done = subprocess.run(
        (*PYTEST, "--gpu-share"),
        cwd=here.path,
        env=here.environment,
        capture_output=True,
        timeout=LIMIT,
    )
    thread.join(LIMIT)
    (model,) = here.ollama.ps()
    whole = model["size_vram"] == model["size"]
    return done.returncode != 0, not whole, held[0] > 2 * 2**30


if __name__ == "__main__":
    main()
