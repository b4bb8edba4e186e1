"""Builds and loads `guard.cpp`, before torch is imported: fake tensors then pass for CUDA's.

Only processes of their own do this (`stages.py`), never the one that runs the tests.
"""

import ctypes
import hashlib
import shutil
import subprocess
import tempfile
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

SOURCE = Path(__file__).with_name("guard.cpp")


def unavailable() -> str | None:
    """Why CUDA cannot be faked here, or None."""
    import torch

    if torch.version.cuda is not None or torch.version.hip is not None:
        return "this torch is built for GPUs: `make test-gpu` runs the real thing"
    if shutil.which("g++") is None:
        return "no C++ compiler (g++): CUDA cannot be faked"
    return None


def load() -> None:
    """Load the guard into this process, built when it is first needed."""
    root = Path(str(find_spec("torch").origin)).parent
    for name in ("libc10.so", "libtorch_cpu.so"):
        ctypes.CDLL(str(root / "lib" / name), mode=ctypes.RTLD_GLOBAL)
    ctypes.CDLL(str(_built(root)))


def _built(root: Path) -> Path:
    digest = hashlib.sha256(SOURCE.read_bytes() + version("torch").encode()).hexdigest()[:16]
    library = Path(tempfile.gettempdir()) / f"puzzle-fake-cuda-{digest}.so"
    if not library.exists():
        part = library.with_suffix(f".{tempfile.mkdtemp(prefix='x')[-6:]}")
        options = ["-O1", "-shared", "-fPIC", "-std=c++20", str(SOURCE), "-o", str(part)]
        places = ["-I", str(root / "include"), "-L", str(root / "lib")]
        libraries = ["-lc10", "-ltorch_cpu"]
        subprocess.run(["g++", *options, *places, *libraries], check=True)
        part.replace(library)
    return library
