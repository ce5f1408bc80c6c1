"""Fill the tables of README.md and docs/ from committed results, so that no figure is typed.

A table lies between ``<!-- table:FILE/BENCHMARK -->`` and ``<!-- /table -->``, where FILE is the stem of a JSON file in
bench/results; names of columns may follow BENCHMARK, to show only these. ``<!-- table:budgets -->`` is what the tuned
configurations compile to under the newest Triton known.

    python tools/readme_tables.py            rewrite README.md and docs/*.md
    python tools/readme_tables.py --check    only say whether they are up to date
"""

import argparse
import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
TABLE = re.compile(r"(<!-- table:(\S+)((?: \w+)*) -->\n).*?(<!-- /table -->)", re.DOTALL)
HIDDEN = ("median", "low", "high", "timed")  # seconds: shown in milliseconds


def cell(value) -> str:
    """A figure to four significant digits; anything else as it is."""
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return "" if value is None else str(value)


def markdown(rows: list[dict], shown: list[str]) -> str:
    """Rows of one benchmark as Markdown; a column for every field that some row has, or for those ``shown``."""
    columns = shown or [c for c in dict.fromkeys(key for row in rows for key in row) if c not in HIDDEN]
    columns = [c for c in columns if any(row.get(c) is not None for row in rows)]
    lines = [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    lines += [f"| {' | '.join(cell(row.get(c)) for c in columns)} |" for row in rows]
    return "\n".join(lines) + "\n"


def table(name: str, shown: list[str], root: Path = ROOT) -> str:
    """The text between a table's markers."""
    if name == "budgets":
        known = json.loads((root / "kernels" / "dbeta_kernels" / "budgets.json").read_text())
        newest = max(known, key=lambda version: tuple(map(int, version.split("."))))
        rows = [{"configuration": key, **row} for key, row in known[newest].items()]
        return f"sm_90, Triton {newest}, compiled without a GPU:\n\n{markdown(rows, shown)}"
    stem, _, benchmark = name.rpartition("/")
    path = root / "bench" / "results" / f"{stem}.json"
    if not path.exists():
        raise SystemExit(f"a document asks for table {name}, but {path.relative_to(root)} does not exist")
    results = json.loads(path.read_text())
    where = f"{results['device']}, {results['threads']} threads, torch {results['packages']['torch']}"
    rows = markdown(results["benchmarks"][benchmark], shown)
    return f"{where}, commit {results['commit']}, {results['date'][:10]}:\n\n{rows}"


def filled(text: str, root: Path = ROOT) -> str:
    """``text`` with every table made anew."""
    return TABLE.sub(lambda found: found[1] + table(found[2], found[3].split(), root) + found[4], text)


def main() -> None:
    """Rewrite or check README.md and docs/*.md."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true")
    check, stale = parser.parse_args().check, []
    for document in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        old = document.read_text()
        new = filled(old)
        if new != old:
            stale.append(document.name)
            if not check:
                document.write_text(new)
    sys.exit(f"{', '.join(stale)}: not what tools/readme_tables.py makes of bench/results" if check and stale else None)


if __name__ == "__main__":
    main()
