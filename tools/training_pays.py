"""What `make pretrain` buys: the trained model beside the same network untrained, on synthetic records of another seed.

    python tools/training_pays.py              train the smoke preset, evaluate, write bench/results/training.json
    python tools/training_pays.py --run RUN    the same with a run that is there

``tools/readme_tables.py`` puts the table into README.md.
"""

import argparse
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / part) for part in ("", "kernels", "bench")]  # this checkout, whatever is installed

from dbeta.evaluation.evaluate import Options, evaluate  # noqa: E402
from dbeta.evaluation.results import Result  # noqa: E402

RECORDS, SEED = 2000, 1  # another seed than training's: other subjects
# Six epochs at a rate that suits the small network; the paper's 100 at 5e-5 suit the full one.
TASKS = {"zero-shot": {}, "linear-probe": {}, "finetune": {"epochs": 6, "lr": 1e-3, "leads": ("12",)}}


def train(out: Path) -> Path:
    """`make pretrain` into ``out``."""
    from dbeta.config import Config
    from dbeta.pretrain import run

    run(Config.load("smoke", ["runtime.device=cpu"]), data=None, out=out, resume=False)
    return out


def measure(run: Path, scratch: Path, *, bootstrap: int = 1000) -> list[tuple[Result, Result]]:
    """(trained, untrained) for every task and share of the training records, each with its interval."""
    from dbeta.data.prepare import prepare

    corpus, pairs = scratch / "synthetic", []
    if not (corpus / "corpus.json").is_file():
        prepare("synthetic", None, corpus, limit=RECORDS, workers=2, seed=SEED)
    for task, given in TASKS.items():
        sides = []
        for untrained in (False, True):
            options = Options(derive=True, untrained=untrained, bootstrap=bootstrap, device="cpu", **given)
            found = evaluate(task, run, corpus, scratch / ("untrained" if untrained else "trained"), options)
            sides.append([result for result in found if result.fraction is None or result.seed is None])
        pairs += zip(*sides, strict=True)
    return pairs


def row(trained: Result, untrained: Result) -> dict[str, object]:
    """A row of the table."""
    columns: dict[str, object] = {
        "task": trained.task,
        "training records": "none" if trained.task == "zero-shot" else f"{100 * (trained.fraction or 1):g} %",
    }
    for name, result in (("trained", trained), ("untrained", untrained)):
        columns |= {f"{name}, macro AUC": result.value, f"{name}, 95 %": f"{result.low:.3f} to {result.high:.3f}"}
    return columns


def main() -> None:
    """Measure and write the results."""
    from dbeta_bench import results

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, help="run folder of a trained smoke model")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "training.json")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        run = given.run or train(Path(scratch) / "run")
        pairs = measure(run, Path(scratch))
    results.save(given.out, results.document("cpu", {"training": [row(*pair) for pair in pairs]}))
    overlapping = [pair[0].task for pair in pairs if pair[0].low <= pair[1].high]
    if overlapping:
        sys.exit(f"training does not pay outside the intervals in {', '.join(overlapping)}; see {given.out}")


if __name__ == "__main__":
    main()
