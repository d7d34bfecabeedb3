"""DeepSpeed's ZeRO in two processes (gloo, CPU) trains what one process does, whatever the loop count of a step.

Stages 1 and 2 share out gradients and optimiser state. Stage 3 shares out the weights too, and fetches them by hooks
on modules, which a weight that is used in every loop, or by something else than its module, would escape.
"""

import json
from functools import partial
from pathlib import Path

import pytest
from distributed.launch import launch
from once import once_per_run

pytestmark = pytest.mark.slow

#: Where `make test` installs it: nothing but its worker is to find it.
PACKAGES = Path(__file__).parent.parent / ".cache" / "deepspeed"

CASES = (
    "1/plain",
    "2/plain",
    *(f"3/{name}" for name in ("plain", "concat", "tied", "lora", "late_lora", "gated", "norms")),
    *(f"3/{name}" for name in ("halting", "truncated", "hyperloop")),
)


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    if not PACKAGES.exists():
        raise FileNotFoundError(f"DeepSpeed is not in {PACKAGES}. `make test` installs it there.")
    folder = once_per_run(tmp_path_factory, "deepspeed", partial(launch, "zero.py", packages=PACKAGES))
    return json.loads((folder / "zero.json").read_text())


def test_every_case_is_tested(measured):
    assert set(measured) == set(CASES)


@pytest.mark.parametrize("case", CASES)
def test_two_processes_train_what_one_does(measured, case):
    result = measured[case]
    assert result["moved"] > 1e-5, "every parameter was trained"
    assert result["error"] <= 1e-6
    assert (result["held"] < result["parameters"]) == case.startswith("3")
