"""Imports point one way: what must load without torch does, and rooms know only what they may know."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

import headgrid

ROOT = Path(headgrid.__file__).parent
WITHOUT_TORCH = (
    "spec",
    "layout",
    "planner",
    "report",
    "experiment/stats.py",
    "experiment/journal.py",
    "experiment/check",
    "experiment/breakdown/activities.py",
    "experiment/breakdown/calls.py",
    "experiment/breakdown/intervals.py",
    "experiment/breakdown/perfetto.py",
    "experiment/breakdown/summary.py",
    "errors.py",
)
SCRIPT = """
import importlib, json, sys
for name in sys.argv[1:]:
    importlib.import_module(name)
print(json.dumps(sorted(name for name in sys.modules if name.partition(".")[0] in ("torch", "triton", "transformers"))))
"""
# who: what it must not import, directly or through a parent package
FORBIDDEN = {
    "errors.py": ("headgrid.",),
    "spec": ("headgrid.layout", "headgrid.runtime", "headgrid.experiment", "headgrid.report", "headgrid.reference"),
    "layout": ("headgrid.runtime", "headgrid.experiment", "headgrid.report", "headgrid.reference", "torch"),
    "reference.py": ("headgrid.runtime", "headgrid.layout", "headgrid.experiment", "headgrid.report"),
    "runtime": ("headgrid.experiment", "headgrid.report", "headgrid.reference", "headgrid.cli"),
    "runtime/collectives.py": ("headgrid.layout",),
    "runtime/attention.py": ("torch.distributed",),
    "models": ("headgrid.experiment", "headgrid.report", "headgrid.reference", "headgrid.cli"),
    "models/config.py": ("torch", "transformers"),
    "models/names.py": ("torch", "transformers"),
    "models/safetensors.py": ("torch",),
    "models/chunks.py": ("torch",),
    "models/model.py": ("transformers",),
    "experiment": ("headgrid.report", "headgrid.cli"),
    "report": ("headgrid.runtime", "headgrid.cli", "torch"),
}


def sources(part: str) -> list[Path]:
    """The module, or all modules of the package; none if the part is not there yet."""
    path = ROOT / part
    return [path] if path.is_file() else sorted(path.rglob("*.py"))


def module_name(path: Path) -> str:
    return ".".join((ROOT.name, *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__")


def heavy_modules(names: list[str]) -> list[str]:
    """What a fresh interpreter has loaded of torch and its like after importing these modules."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *names], capture_output=True, text=True, check=True, timeout=60
    )
    return json.loads(done.stdout.splitlines()[-1])


def imported(source: str) -> set[str]:
    """Every module a source names in an import, and every name it takes from one, as dotted paths."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{'.' * node.level}{node.module or ''}"} | {
                f"{node.module}.{alias.name}" for alias in node.names
            }
    return found


def breaches(source: str, forbidden: tuple[str, ...]) -> set[str]:
    """The forbidden imports of a source. Relative ones are forbidden altogether: they would escape this check."""
    names = imported(source)
    return {
        n for n in names if n.startswith(".") or any(n == f or n.startswith(f.rstrip(".") + ".") for f in forbidden)
    }


def test_what_needs_no_torch_loads_without_it() -> None:
    names = [module_name(path) for part in WITHOUT_TORCH for path in sources(part)]
    assert {"headgrid.layout.traffic", "headgrid.spec.model", "headgrid.experiment.stats"} <= set(names)
    assert heavy_modules(names) == []


def test_the_check_for_torch_can_fail() -> None:
    assert "torch" in heavy_modules(["headgrid.runtime.collectives"])


@pytest.mark.parametrize("part", FORBIDDEN)
def test_imports_point_one_way(part: str) -> None:
    assert sources(part), "nothing to check"
    found = {module_name(path): breaches(path.read_text(encoding="utf-8"), FORBIDDEN[part]) for path in sources(part)}
    assert {name: wrong for name, wrong in found.items() if wrong} == {}


@pytest.mark.parametrize(
    "line",
    [
        "import headgrid.runtime",
        "import headgrid.runtime.mesh as m",
        "from headgrid import runtime",
        "from headgrid.runtime import stage",
        "from headgrid.runtime.stage import rotate",
        "def late():\n    from headgrid.runtime.stage import rotate",
        "from ..runtime import stage",
        "from . import stage",
    ],
)
def test_the_check_of_imports_can_fail(line: str) -> None:
    assert breaches(line, ("headgrid.runtime",))
    assert not breaches("import headgrid.runtimes\nfrom headgrid.spec.model import ModelSpec", ("headgrid.runtime",))
