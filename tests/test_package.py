"""The package as a whole: what importing it does, what it exports, who may import whom."""

import ast
import importlib.metadata
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import torchfast

ROOT = Path(torchfast.__file__).parent
PRIMITIVES = ("_channels_last", "_loader", "_teacher", "_estimate", "_monitor", "_oom")
OPTIONAL = (
    "gradio",
    "IPython",
    "matplotlib",
    "numpy",
    "prometheus_client",
    "pynvml",
    "safetensors",
    "tensorboard",
    "timm",
    "torchvision",
    "transformers",
)

# Prints what `import torchfast` brought in beyond `import torch`, and whether CUDA was initialised.
PROBE = f"""
import sys, torch
before = set(sys.modules)
import torchfast
{{extra}}
new = {{{{name.partition(".")[0] for name in set(sys.modules) - before}}}}
print(sorted(new & set({OPTIONAL!r})), torch.cuda.is_initialized())
"""


def probe(extra: str = "") -> str:
    """Run the probe in a fresh interpreter and return what it prints."""
    code = PROBE.format(extra=extra)
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.strip()


def test_import_is_light() -> None:
    """Importing torchfast imports no optional package and does not initialise CUDA."""
    assert probe() == "[] False"


def test_the_import_check_can_fail() -> None:
    """The probe notices an optional package that is imported."""
    assert probe("import safetensors") == "['safetensors'] False"


@pytest.mark.cuda
def test_the_cuda_check_can_fail() -> None:
    """The probe notices that CUDA was initialised."""
    assert probe("torch.cuda.init()") == "[] True"


def test_public_names() -> None:
    """The package exports its six primitives, their result types and errors."""
    six = {"DeviceLoader", "GPUTeacher", "VRAMMonitor", "estimate_vram", "oom_guard", "to_channels_last"}
    assert six <= set(torchfast.__all__)
    assert all(getattr(torchfast, name).__doc__ for name in torchfast.__all__)


def test_every_public_name_has_a_home() -> None:
    """What is exported, what is imported on demand and what type checkers see are the same names."""
    tree = ast.parse((ROOT / "__init__.py").read_text())
    (for_checkers,) = [node for node in tree.body if isinstance(node, ast.If)]
    seen = {
        alias.name for node in for_checkers.body if isinstance(node, ast.ImportFrom) for alias in node.names
    }
    assert set(torchfast.__all__) == set(torchfast._HOMES) == seen


@pytest.mark.parametrize("name", torchfast.__all__)
def test_every_public_name_shows_itself(name: str) -> None:
    """Each public name's docstring has an example, which the test run executes with all the others."""
    assert ">>> " in (inspect.getdoc(getattr(torchfast, name)) or "")


def test_version_is_the_one_installed() -> None:
    """The version is stated once, in the package's metadata."""
    assert torchfast.__version__ == importlib.metadata.version("torchfast")


def imported_by(path: Path) -> set[str]:
    """Return the parts of torchfast that a file imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("torchfast"):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names if alias.name.startswith("torchfast.")}
    return {name.split(".")[1] for name in names}


@pytest.mark.parametrize("primitive", PRIMITIVES)
def test_primitives_do_not_import_one_another(primitive: str) -> None:
    """Each primitive stands on the ground floor alone."""
    place = ROOT / primitive
    files = list(place.rglob("*.py")) if place.is_dir() else [place.with_suffix(".py")]
    assert files
    for path in files:
        assert not imported_by(path) & (set(PRIMITIVES) - {primitive}), path.name


def test_the_ground_floor_imports_no_primitive() -> None:
    """What the primitives share uses none of them."""
    shared = [path for path in ROOT.glob("_*.py") if path.stem not in PRIMITIVES and path.stem != "__init__"]
    assert {"_tree", "_bytes", "_device", "_layout", "_memory", "_oom_errors"} <= {
        path.stem for path in shared
    }
    for path in shared:
        assert not imported_by(path) & set(PRIMITIVES), path.name


def test_nobody_is_sent_to_the_other_torchfast() -> None:
    """No text tells people to `pip install torchfast`: on PyPI that name is an unrelated package."""
    repository = ROOT.parent
    pages = [*ROOT.rglob("*.py"), *repository.glob("*.md"), *(repository / "docs").rglob("*.md")]
    wrong = re.compile(r"pip install [\"']?torchfast")
    assert [str(page) for page in pages if wrong.search(page.read_text())] == []
