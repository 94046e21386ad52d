"""Every way to compute an update gives the same update: devices, meshes, scan, rematerialisation, microbatches."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import run_python
from mesh_cases import CASES, OPTIMIZER, Case, run, small_model

from rae_xla.training.update import initial_state


@pytest.fixture(scope="module")
def plain() -> dict:
    return run(Case(), "eager")


@pytest.mark.parametrize("num_devices", list(CASES))
def test_ten_updates_equal_those_of_plain_pytorch(num_devices: int, plain: dict, tmp_path: Path) -> None:
    file = tmp_path / "results.pt"
    done = run_python("tests/mesh_cases.py", str(file), CPU_NUM_DEVICES=str(num_devices), PJRT_DEVICE="CPU")
    assert done.returncode == 0, done.stderr[-4000:]
    results = torch.load(file, weights_only=True)
    assert len(results) == len(CASES[num_devices])
    start = initial_state(small_model(), OPTIMIZER)["parameters"]
    for name, found in results.items():
        case = Case(**json.loads(name))
        losses, expected = torch.tensor(found["losses"]), torch.tensor(plain["losses"])
        if case.precision == "bf16":
            assert 0 < (losses - expected).abs().max() < 0.05, (case, losses)
            continue
        torch.testing.assert_close(losses, expected, rtol=0, atol=1e-5)
        for part in ("parameters", "ema", "ema_0.5"):
            for key, value in plain["state"][part].items():
                difference, moved = (found["state"][part][key] - value).abs(), (value - start[key]).abs()
                # AdamW makes updates of full size from gradients near zero, and so from their rounding: the largest
                # difference is that of a few such elements.
                largest, mean = difference.max().item(), difference.mean().item()
                assert largest <= 1e-5 and mean <= 1e-7, (case, part, key, largest, mean)
                assert moved.mean() > 1e-4, (part, key)
