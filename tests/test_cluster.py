"""docs/cluster.md and examples/cluster: recipes fit, scripts are sound, what is quoted is true.

python tests/test_cluster.py      # writes the plans on the page anew
"""

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import kubernetes_validate
import pytest
import yaml

from puzzle import config, settings
from puzzle.commands import planning
from puzzle.model.architecture import Architecture
from puzzle.progress import Progress
from puzzle.run import Run

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples" / "cluster"
PAGE = ROOT / "docs" / "cluster.md"
RECIPES = sorted(EXAMPLES.glob("llama-*.yaml"))
SLURM, KUBERNETES = EXAMPLES / "slurm.sh", EXAMPLES / "kubernetes.yaml"
PARAMETERS = {  # as counted from the published checkpoints
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.1-70b": 70_553_706_496,
    "llama-3.1-405b": 405_853_388_800,
}


def planned_run(recipe: Path, device: str, devices: int) -> Run:
    """A recipe from the repository's root, planned for such devices."""
    parsed = config.parse(settings.read_yaml(recipe, "recipe"))
    return Run(
        parsed,
        Path(parsed.out),
        Progress(quiet=True),
        device=planning.device(device, devices=devices),
    )


def named_devices(recipe: Path) -> tuple[str, int]:
    """The devices that the comment of a recipe names, in its command."""
    command = re.search(
        r"#   puzzle plan (\S+) --device (\S+) --devices (\d+)\n", recipe.read_text()
    )
    assert command and command[1] == str(recipe.relative_to(ROOT))
    return command[2], int(command[3])


# ------------------------------------------------------------------------------------- the recipes


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_every_stage_of_a_recipe_fits_the_devices_it_names(recipe, monkeypatch):
    monkeypatch.chdir(ROOT)
    run = planned_run(recipe, *named_devices(recipe))
    shape = run.parent.shape
    assert Architecture.of_parent(shape).parameters(shape) == PARAMETERS[recipe.stem]
    assert {one.name: one.refusal for one in planning.plan(run) if one.refusal} == {}


def test_the_recipes_are_those_of_three_sizes_and_do_not_fit_everywhere(monkeypatch):
    monkeypatch.chdir(ROOT)
    assert {recipe.stem for recipe in RECIPES} == set(PARAMETERS)
    largest = EXAMPLES / "llama-3.1-405b.yaml"
    refused = {one.name for one in planning.plan(planned_run(largest, "L40S", 8)) if one.refusal}
    assert {"cost", "assemble", "uptrain", "evaluate"} <= refused


# ------------------------------------------------------------------------------------------- SLURM


def directives() -> dict[str, str]:
    """The options that sbatch reads: comments before the first command."""
    lines = SLURM.read_text().split("\nset ")[0].splitlines()
    found = [line.removeprefix("#SBATCH ") for line in lines if line.startswith("#SBATCH")]
    assert all(option.startswith("--") for option in found)
    return dict(option.removeprefix("--").partition("=")[::2] for option in found)


def test_the_slurm_script_is_clean():
    assert subprocess.run(["bash", "-n", SLURM]).returncode == 0
    shellcheck = shutil.which("shellcheck")
    if shellcheck is None:
        pytest.skip("no shellcheck here")
    checked = subprocess.run([shellcheck, SLURM], capture_output=True, text=True)
    assert (checked.returncode, checked.stdout) == (0, "")


def test_slurm_gives_one_task_a_machine_and_all_of_its_gpus():
    options = directives()
    known = "job-name nodes ntasks-per-node gpus-per-node cpus-per-task mem time requeue open-mode"
    assert set(options) == {*known.split(), "output"}
    assert "#SBATCH" not in SLURM.read_text().split("\nset ")[1]  # sbatch would not see it
    assert options["ntasks-per-node"] == "1"
    assert re.fullmatch(r"\d+:\d\d:\d\d", options["time"])
    assert f"--nproc-per-node {options['gpus-per-node']} " in SLURM.read_text()


def test_slurm_starts_torchrun_on_every_machine(tmp_path):
    """With stand-ins for SLURM's commands: what the tasks are asked to do."""
    (tmp_path / "scontrol").write_text("#!/bin/sh\necho node-a; echo node-b\n")
    (tmp_path / "srun").write_text('#!/bin/sh\nfor word; do echo "$word"; done\n')
    for command in ("scontrol", "srun"):
        (tmp_path / command).chmod(0o755)
    names = {"SLURM_JOB_NODELIST": "node-[a-b]", "SLURM_NNODES": "2", "SLURM_JOB_ID": "7"}
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin"} | names
    command = ["bash", SLURM, "my recipe.yaml"]
    started = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert started.stdout.splitlines() == [
        *("--kill-on-bad-exit=1", "torchrun", "--nnodes", "2", "--nproc-per-node", "8"),
        *("--rdzv-id", "7", "--rdzv-backend", "c10d", "--rdzv-endpoint", "node-a:29500"),
        *("-m", "puzzle.worker", "my recipe.yaml"),
    ]
    without = subprocess.run(command[:-1], env=environment, capture_output=True, text=True)
    assert without.returncode != 0 and "expected a recipe" in without.stderr


# -------------------------------------------------------------------------------------- Kubernetes


def test_the_job_is_what_kubernetes_takes():
    documents = list(yaml.safe_load_all(KUBERNETES.read_text()))
    assert [document["kind"] for document in documents] == ["Service", "Job"]
    for document in documents:
        kubernetes_validate.validate(document, "1.30", strict=True)


def test_the_pods_of_the_job_find_one_another():
    service, job = yaml.safe_load_all(KUBERNETES.read_text())
    name, spec = service["metadata"]["name"], job["spec"]
    pod = spec["template"]["spec"]
    (container,) = pod["containers"]
    torchrun, *words = container["command"]
    options = dict(word.removeprefix("--").split("=", 1) for word in words if "=" in word)
    assert torchrun == "torchrun" and words[-3:-1] == ["-m", "puzzle.worker"]
    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["selector"] == {"batch.kubernetes.io/job-name": job["metadata"]["name"]}
    assert pod["subdomain"] == name
    assert options["master-addr"] == f"{job['metadata']['name']}-0.{name}"
    assert options["master-port"] == str(service["spec"]["ports"][0]["port"])
    assert spec["completionMode"] == "Indexed"
    assert options["nnodes"] == str(spec["completions"]) == str(spec["parallelism"])
    assert options["node-rank"] == "$(JOB_COMPLETION_INDEX)"
    assert "JOB_COMPLETION_INDEX" in {variable["name"] for variable in container["env"]}
    assert options["nproc-per-node"] == str(container["resources"]["limits"]["nvidia.com/gpu"])
    mounted = {mount["name"] for mount in container["volumeMounts"]}
    assert mounted == {volume["name"] for volume in pod["volumes"]}


# ---------------------------------------------------------------------------------------- the page


BLOCK = re.compile(r"^```([^\n]*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
PLAN = "$ puzzle plan "


def shown(command: str) -> str:
    """What `$ puzzle ...` prints in the repository's root, without spaces at the ends of lines."""
    words = [sys.executable, "-m", "puzzle.cli", *shlex.split(command.removeprefix("$ puzzle "))]
    printed = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert printed.returncode == 0, printed.stderr
    return "".join(line.rstrip() + "\n" for line in printed.stdout.splitlines())


def quoted() -> dict[str, str]:
    """Outputs of the plans on the page, by command."""
    contents = [content for _, content in BLOCK.findall(PAGE.read_text(encoding="utf-8"))]
    plans = [content.split("\n", 1) for content in contents if content.startswith(PLAN)]
    return dict(plans)  # type: ignore[arg-type]


@pytest.mark.training
@pytest.mark.parametrize("command", quoted())
def test_plans_on_the_page_are_what_is_printed(command):
    assert shown(command) == quoted()[command]


def test_the_page_shows_a_plan_of_every_recipe_and_quotes_the_scripts():
    text = PAGE.read_text(encoding="utf-8")
    for recipe in RECIPES:
        device, count = named_devices(recipe)
        plan = f"puzzle plan {recipe.relative_to(ROOT)} --device {device} --devices {count}"
        assert f"$ {plan}" in quoted()
    for script, kind in ((SLURM, "sh"), (KUBERNETES, "text")):
        (content,) = [content for after, content in BLOCK.findall(text) if after == kind]
        assert content in script.read_text(encoding="utf-8")
        assert str(script.relative_to(ROOT)) in text


@pytest.mark.training
def test_memory_of_a_served_8b_parent_is_what_others_publish():
    """Model-Optimizer's example: two H100, batch 96, 4,096 tokens in and out."""
    (command,) = [command for command in quoted() if "batch_size: 96" in command]
    stages = json.loads(shown(f"{command} --json").splitlines()[-1])["stages"]
    (assemble,) = [stage for stage in stages if stage["stage"] == "assemble"]
    of_two = 2 * (assemble["weights_bytes"] + assemble["cache_bytes"]) / 2**20
    assert of_two == pytest.approx(113_620.5, abs=0.05)


def main() -> None:
    """Write the plans on the page anew."""

    def renewed(block: re.Match[str]) -> str:
        command = block[2].split("\n", 1)[0]
        plan = f"{command}\n{shown(command)}" if command.startswith(PLAN) else block[2]
        return f"```{block[1]}\n{plan}```"

    PAGE.write_text(BLOCK.sub(renewed, PAGE.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
