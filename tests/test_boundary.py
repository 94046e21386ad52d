"""Only rae_xla/xla imports torch_xla, and tools answer --help without torch."""

from __future__ import annotations

import re
import time
from pathlib import Path

import pytest
from conftest import ROOT, run_python

TOOLS = sorted((ROOT / "tools").glob("*.py"))

IMPORT_ALL = """
import importlib, pkgutil, sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch_xla", "jax", "torchax"):
            raise ImportError(name + " is blocked")
sys.meta_path.insert(0, Block())
import rae_xla
names = [m.name for m in pkgutil.walk_packages(rae_xla.__path__, "rae_xla.") if not m.name.startswith("rae_xla.xla")]
for name in names:
    importlib.import_module(name)
print(len(names))
"""


def test_everything_outside_xla_imports_without_torch_xla() -> None:
    done = run_python("-c", IMPORT_ALL)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 30


def test_no_file_outside_xla_names_torch_xla_in_an_import() -> None:
    pattern = re.compile(r"^\s*(import|from) (torch_xla|jax|torchax)", re.MULTILINE)
    outside = [p for p in (ROOT / "rae_xla").rglob("*.py") if "xla" not in p.relative_to(ROOT / "rae_xla").parts[:1]]
    assert len(outside) > 30
    assert [p for p in outside if pattern.search(p.read_text())] == []


@pytest.mark.parametrize("tool", TOOLS, ids=lambda tool: tool.name)
def test_help_does_not_import_torch(tool: Path) -> None:
    program = (
        "import sys, runpy; sys.argv = ['tool', '--help']\ntry: runpy.run_path(%r, run_name='__main__')\nfinally: "
    )
    program += "assert 'torch' not in sys.modules and 'yaml' not in sys.modules"
    start = time.perf_counter()
    done = run_python("-c", program % str(tool))
    assert done.returncode == 0, done.stderr
    assert "usage" in done.stdout
    # Under a second on an idle machine; what is tested above is why.
    assert time.perf_counter() - start < 5
