"""Take the pictures of a run's report.html for the README: docs/curves.png, docs/original.png, docs/reconstructed.png.

make pretrain ARGS="--seed 1 --out runs/readme" && python tools/readme_picture.py runs/readme
"""

import base64
import re
import sys
from pathlib import Path

NAMES = ("curves", "original", "reconstructed")


def main(run: Path, folder: Path = Path(__file__).parents[1] / "docs") -> None:
    """Write the pictures of ``run``.

    Raises:
        ValueError: its report does not hold exactly those three (a run on real records hides them).
    """
    images = re.findall(r"data:image/png;base64,([^\"]+)", (run / "report.html").read_text())
    if len(images) != len(NAMES):
        raise ValueError(f"{run}/report.html has {len(images)} pictures, not 3: take a run of `make pretrain`")
    folder.mkdir(exist_ok=True)
    for name, image in zip(NAMES, images):
        (folder / f"{name}.png").write_bytes(base64.b64decode(image))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
