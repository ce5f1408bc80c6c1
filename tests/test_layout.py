"""The shape of the project: import direction, file sizes, and no root package that shadows another."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Each package may import those to its left; nobody imports tests or tools.
ORDER = ("dbeta_kernels", "dbeta", "dbeta_bench")
HOME = {"dbeta_kernels": ROOT / "kernels", "dbeta": ROOT, "dbeta_bench": ROOT / "bench"}


def _sources():
    return [(package, path) for package in ORDER for path in sorted((HOME[package] / package).rglob("*.py"))]


def _imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("package", ORDER)
def test_imports_run_one_way(package):
    forbidden = {*ORDER[ORDER.index(package) + 1 :], "tests", "tools"}
    found = {path: _imported(path) & forbidden for owner, path in _sources() if owner == package}
    assert found, f"no sources of {package}"
    assert not any(found.values()), {str(path): names for path, names in found.items() if names}


def test_files_stay_small():
    kinds = (".py", ".cu", ".cc", ".cpp", ".h", ".cuh")
    rooms = [ROOT / name for name in ("dbeta", "kernels", "bench", "csrc", "tests", "tools")]
    sizes = {p: len(p.read_text().splitlines()) for room in rooms for p in room.rglob("*") if p.suffix in kinds}
    assert not {str(p): n for p, n in sizes.items() if n > 400}


def test_no_package_shadows_hugging_faces_kernels():
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert not (ROOT / "bench" / "__init__.py").exists()
