"""Training and its benchmarks import no optional package: their imports, where those packages cannot be imported."""

import subprocess
import sys

IMPORT = """
import importlib, sys

absent = {"wfdb", "faiss", "nvidia", "flash_attn", "scipy", "sklearn", "h5py", "matplotlib"}

class Without:
    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] in absent else self.finder.find_spec(name, path, target)

sys.meta_path[:] = map(Without, sys.meta_path)
for name in sys.argv[1:]:
    importlib.import_module(name)
"""
MODULES = (
    "dbeta.pretrain", "dbeta.trainer", "dbeta.report", "dbeta.data.prepare", "dbeta.data.loader", "dbeta.data.farthest",
    "dbeta_bench.step", "dbeta_bench.kernels", "dbeta_bench.attention", "dbeta_bench.negatives", "dbeta_bench.loader",
)  # fmt: skip


def test_training_imports_no_optional_package():
    done = subprocess.run([sys.executable, "-c", IMPORT, *MODULES], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
