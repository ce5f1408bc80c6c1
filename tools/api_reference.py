"""Write docs/api.md from the docstrings of what users call, without importing anything.

python tools/api_reference.py            rewrite docs/api.md
python tools/api_reference.py --check    only say whether it is up to date
"""

import argparse
import ast
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
# File -> what is described: a name, or Class.* for its public methods too. In the order of the page.
PAGES = {
    "dbeta/models/dbeta.py": ("DBeta",),
    "dbeta/models/inference.py": ("Inference.*",),
    "dbeta/data/records.py": ("read_ecg", "read_record", "Record.*"),
    "dbeta/use/find.py": ("find_records",),
    "dbeta/use/embed.py": ("embed", "ask", "encode_files", "Encoded"),
    "dbeta/use/doctor.py": ("examine", "Survey.*"),
    "dbeta/use/export.py": ("export",),
    "dbeta/models/released.py": ("import_checkpoint",),
    "dbeta/models/card.py": ("model_card",),
    "dbeta/data/corpus.py": ("Corpus.*",),
    "dbeta/data/resample.py": ("resample",),
    "dbeta/data/reports.py": ("normalise",),
}
HEAD = """# API reference

Made from the docstrings by `python tools/api_reference.py`; a test holds that it is current. `from dbeta import DBeta,
read_ecg` are the two names most people need; the methods of `DBeta` that users call are listed under `Inference`.
"""


def described(path: Path, wanted: tuple[str, ...]) -> Iterator[str]:
    """Markdown of the wanted names of a module."""
    tree = ast.parse(path.read_text())
    nodes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef | ast.FunctionDef)}
    for name in wanted:
        node = nodes[name.removesuffix(".*")]
        yield entry(node, "###", node.name)
        if name.endswith(".*"):
            for part in node.body:
                if isinstance(part, ast.FunctionDef) and not part.name.startswith("_") and ast.get_docstring(part):
                    yield entry(part, "####", f"{node.name}.{part.name}")


def entry(node: ast.ClassDef | ast.FunctionDef, level: str, name: str) -> str:
    """Heading, signature and docstring of one thing."""
    signature = f"{name}({ast.unparse(_arguments(node))})" if isinstance(node, ast.FunctionDef) else f"class {name}"
    if isinstance(node, ast.FunctionDef) and node.returns:
        signature += f" -> {ast.unparse(node.returns)}"
    if any(isinstance(d, ast.Name) and "property" in d.id for d in node.decorator_list):
        signature = f"{name}: {ast.unparse(node.returns)}"
    text = ast.get_docstring(node) or ""
    lines = "\n".join(textwrap.wrap(signature, 116, subsequent_indent="    ", break_long_words=False))
    return f"{level} {name}\n\n```python\n{lines}\n```\n\n```text\n{text}\n```\n"


def _arguments(node: ast.FunctionDef) -> ast.arguments:
    """Without ``self`` and ``cls``."""
    arguments = node.args
    if arguments.args and arguments.args[0].arg in ("self", "cls"):
        arguments.args = arguments.args[1:]
    return arguments


def reference(root: Path = ROOT) -> str:
    """The whole page."""
    parts = [HEAD]
    for file, wanted in PAGES.items():
        module = file.removesuffix(".py").replace("/", ".")
        parts.append(f"## {module}\n")
        parts += described(root / file, wanted)
    return "\n".join(parts)


def main() -> None:
    """Rewrite or check docs/api.md."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true")
    page, new = ROOT / "docs" / "api.md", reference()
    if parser.parse_args().check:
        sys.exit(
            None if page.is_file() and page.read_text() == new else "docs/api.md is stale: run tools/api_reference.py"
        )
    page.parent.mkdir(exist_ok=True)
    page.write_text(new)


if __name__ == "__main__":
    main()
