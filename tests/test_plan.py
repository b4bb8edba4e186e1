"""`puzzle plan` for a GPU that is not here, from the config.json of Llama-3.1-8B alone."""

import re
from dataclasses import replace
from importlib.resources import files
from pathlib import Path

import pytest
import torch
import yaml

from puzzle import config, settings
from puzzle.assemble import ASSEMBLE
from puzzle.commands import planning
from puzzle.config import Recipe
from puzzle.device import USABLE
from puzzle.engines import roofline_engine
from puzzle.errors import UserError
from puzzle.library import memory as library_memory
from puzzle.progress import Progress
from puzzle.run import Run
from puzzle.stage import Effort, Job, Need
from puzzle.training.speed import Speed
from puzzle.uptrain import memory

PLANS = Path(__file__).parents[1] / "examples" / "cluster"
SMALL_GPU = ("search.parameters=4.8B", "uptrain.lora_rank=16", "cost.scenario.batch_size=8")


def recipe_8b(*assignments: str) -> Recipe:
    values = settings.read_yaml(PLANS / "llama-3.1-8b.yaml", "recipe")
    values["parent"] = str(PLANS / "llama-3.1-8b")
    return config.parse(settings.override(values, list(assignments)))


def run_8b(folder: Path, gpu_memory: str, *assignments: str) -> Run:
    device = planning.device("H100", device_memory=gpu_memory, host_memory="256GiB")
    return Run(recipe_8b(*assignments), folder, Progress(quiet=True), device=device)


@pytest.mark.parametrize(
    ("gpu_memory", "assignments"), [("24GiB", SMALL_GPU), ("80GiB", ()), ("141GiB", ())]
)
def test_every_stage_of_an_8b_parent_fits_by_what_is_chosen(tmp_path, gpu_memory, assignments):
    run = run_8b(tmp_path, gpu_memory, *assignments)
    planned = {one.stage: one for one in planning.plan(run)}
    assert not [one.refusal for one in planned.values() if one.refusal]
    for one in planned.values():
        assert one.need.memory_bytes <= USABLE * run.device.memory_bytes
    assert "streamed" in planned["library"].need.chosen


def test_weights_of_a_parent_alone_take_what_they_take(tmp_path):
    """A lower bound that no formula may miss: both models in bf16, and what the child learns by."""
    job = run_8b(tmp_path, "80GiB").child_job("main")
    case = memory.Case.of(job)
    assert case.parameters == 8_030_261_248  # as Meta's model card has it
    choice = memory.choose(job)
    assert (choice.optimizer_memory, choice.activation_checkpointing) == ("host", True)
    taken = case.taken(choice)
    assert taken.device > case.parameters * (2 + 2 + 4)
    constant = job.run.parent.shape.constant_parameters  # has two moments, matrices have one
    assert taken.host == 2 * (8 * case.parameters + 4 * constant)  # and a snapshot


def test_a_child_of_5_5b_parameters_can_be_uptrained_on_an_h100(tmp_path):
    job = run_8b(tmp_path, "79.6GiB", "search.parameters=5.5B").child_job("main")
    assert memory.Case.of(job).parameters == 5_500_000_000
    assert memory.Case.of(job).fits(memory.choose(job))
    on_device = memory.choose(job).model_copy(update={"optimizer_memory": "device"})
    assert not memory.Case.of(job).fits(on_device)  # otherwise this would show nothing


@pytest.mark.parametrize("gpu_memory", ["24GiB", "40GiB", "56GiB"])
@pytest.mark.parametrize(
    "assignments", [(), ("uptrain.micro_batch_sequences=64",), ("uptrain.optimizer_memory=device",)]
)
def test_the_change_that_a_refusal_names_is_enough(tmp_path, gpu_memory, assignments):
    job = run_8b(tmp_path, gpu_memory, *assignments).child_job("main")
    need = memory.need(job)
    refusal = need.refusal(job.run.device.memory)
    assert refusal.startswith(f"{need.memory_bytes / 2**30:.1f} GiB of the device's memory")
    named = re.findall(r"(?:uptrain|search)\.\w+(?:=[\w.]+)?|processes=\d+", need.instead)
    assert named
    changed = [text for text in named if "=" in text]
    kept = [one for one in assignments if one.split("=")[0] not in named]
    gpus = next((int(t.split("=")[1]) for t in changed if "processes" in t), 1)
    run = run_8b(tmp_path, gpu_memory, *kept, *changed)
    run.given_device = planning.device(device_memory=gpu_memory, host_memory="256GiB", devices=gpus)
    changed_job = run.child_job("main")
    assert not memory.need(changed_job).refusal(run.device.memory), need.instead


def test_a_choice_is_repeated_when_the_uptraining_goes_on_if_it_still_fits(tmp_path):
    begun = run_8b(tmp_path, "80GiB").child_job("main")
    choice = memory.choose(begun, tmp_path)
    larger = run_8b(tmp_path, "141GiB").child_job("main")
    assert memory.choose(larger) != choice == memory.choose(larger, tmp_path)
    asked = run_8b(tmp_path, "141GiB", "uptrain.micro_batch_sequences=1").child_job("main")
    assert memory.choose(asked, tmp_path).micro_batch_sequences == 1


def test_variants_of_a_layer_are_trained_together_where_they_fit(tmp_path):
    run = run_8b(tmp_path, "80GiB")
    of_layer = [
        n
        for n, (i, _) in zip(
            library_memory.trained_parameters(run),
            library_memory.trained_variants(run),
            strict=True,
        )
        if i == 0
    ]
    assert library_memory.together(run) == sum(of_layer)
    small = library_memory.together(run_8b(tmp_path, "16GiB"))
    assert max(of_layer) <= small < sum(of_layer)


def test_the_plan_needs_no_weights_and_no_gpu(tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "load", lambda *_: pytest.fail("weights"))
    run = run_8b(tmp_path, "80GiB")
    assert run.parent.dtype == torch.bfloat16
    planning.plan(run)
    assert not list(tmp_path.iterdir())
    assert not (Job(run).run.folder / ASSEMBLE.folder).exists()


def test_a_plan_says_where_and_how_each_stage_is_done_or_why_not(tmp_path, capsys):
    run = run_8b(tmp_path, "24GiB")
    planning.print_plan(planning.plan(run), run.device)
    shown = capsys.readouterr().out
    assert "on H100 of 24 GiB in a machine of 256 GiB" in shown.replace("\n", " ")
    done, refused = shown.split("how it is done:\n")[1].split("what does not fit:\n")
    assert "  library: layer by layer from disk (streamed)" in done and "uptrain" not in done
    assert "  uptrain: 5" in refused and "library" not in refused


@pytest.mark.parametrize("text", ["80", "2x", "lots"])
def test_a_memory_without_a_unit_is_refused(text):
    with pytest.raises(UserError, match="--device-memory: got .*80GiB"):
        planning.device(device_memory=text)


# ------------------------------------------------------------------------ devices and their sheets


def known_devices() -> dict[str, dict[str, float]]:
    text = (files("puzzle") / "engines" / "devices.yaml").read_text(encoding="utf-8")
    return yaml.safe_load(text)


@pytest.mark.parametrize("name", known_devices())
def test_every_known_device_has_a_whole_sheet(name):
    device, figures = planning.device(name), known_devices()[name]
    assert set(figures) == set(roofline_engine.PLAN_KEYS)
    assert device.memory.device_bytes == figures["memory_bytes"]
    assert device.type == ("cpu" if name == "this-cpu" else "cuda")
    assert device.training_flops_per_s < figures["flops_per_s"] / 3


def test_costs_take_three_figures_of_a_sheet_wherever_it_comes_from(tmp_path):
    own = tmp_path / "mine.yaml"
    own.write_text(yaml.safe_dump(known_devices()["A100"] | {"memory_bytes": 40e9}))
    assert roofline_engine.sheet(str(own)) == roofline_engine.sheet("A100")
    assert set(roofline_engine.sheet("A100")) == set(roofline_engine.KEYS)
    device = planning.device(str(own), devices=2)
    assert (device.planned.name, device.memory.device_bytes) == ("mine", 40_000_000_000)


def test_more_devices_than_a_machine_has_are_on_several():
    eight, sixteen = (planning.device("H100", devices=n) for n in (8, 16))
    assert (sixteen.memory.devices, sixteen.memory.machines) == (16, 2)
    assert sixteen.memory.host_bytes == eight.memory.host_bytes == 8 * 256 * 2**30
    assert sixteen.planned.network_bytes < eight.planned.network_bytes
    given = planning.device("H100", devices=16, device_memory="64GiB", host_memory="1TiB")
    assert (given.memory.device_bytes, given.memory.host_bytes) == (64 * 2**30, 2**40)


def uptraining_8b(folder: Path, devices: int, optimizer: str) -> Need:
    recipe = recipe_8b(
        "uptrain.activation_checkpointing=true",
        "uptrain.micro_batch_sequences=1",
        f"uptrain.optimizer={optimizer}",
    )
    device = planning.device("B200", devices=devices)
    run = Run(recipe, folder, Progress(quiet=True), device=device)
    return memory.need(run.child_job("main"))


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_several_devices_share_weights_work_and_what_they_send(tmp_path, optimizer):
    """Sharded, all that does not pass a device with the text is divided."""
    one, four, eight = (uptraining_8b(tmp_path, devices, optimizer) for devices in (1, 4, 8))
    assert one.effort.network == 0
    assert four.memory.optimizer == pytest.approx(one.memory.optimizer / 4)
    assert eight.memory.optimizer == pytest.approx(one.memory.optimizer / 8)
    assert eight.effort.training == pytest.approx(one.effort.training / 8)
    assert one.flops == four.flops == eight.flops
    # as many micro-batches in each of twice as many, of which all but one's share is sent
    half = four.effort.network * (7 / 8) / (3 / 4) / 2
    if optimizer == "adamw":
        assert eight.effort.network == pytest.approx(half)
    else:  # every step sends matrices, however many micro-batches it has
        assert half < eight.effort.network < 1.05 * half


def test_what_muon_takes_instead_of_adamw(tmp_path):
    """One moment instead of two; products for every step; matrices to one process and back."""
    shape = run_8b(tmp_path, "80GiB").parent.shape
    muon, adamw = (uptraining_8b(tmp_path, 4, optimizer) for optimizer in ("muon", "adamw"))
    layers = 8_030_261_248 - shape.constant_parameters
    assert adamw.memory.optimizer - muon.memory.optimizer == pytest.approx(4 * layers / 4)
    settings, length = recipe_8b().uptrain, recipe_8b().corpus.sequence_length
    steps = settings.tokens / (settings.batch_sequences * length)
    sent = steps * 2 * 2 * layers * 3 / 4
    assert muon.effort.network - adamw.effort.network == pytest.approx(sent)
    # q, o: 4096 x 4096; k, v: 4096 x 1024; gate, up, down: 4096 x 14336
    wide = 4 * 4096**2 * 14336 + 2 * 4096**3
    square, narrow = 6 * 4096**3, 4 * 1024**2 * 4096 + 2 * 1024**3
    of_layer = 5 * (3 * wide + 2 * square + 2 * narrow)
    assert muon.flops - adamw.flops == pytest.approx(steps * 32 * of_layer, rel=1e-3)


@pytest.mark.parametrize("slowest", ["network", "link", "files", "forward"])
def test_a_stage_takes_as_long_as_the_slowest_of_what_goes_on_together(slowest):
    speed = Speed(forward_s=1, training_s=1, judged_s=1, loss_s=1, network_s=1, link_s=1, file_s=1)
    effort = Effort(network=1, link=1, files=1, forward=1, beside_s=5)
    assert replace(effort, **{slowest: 3}).seconds(speed) == 3 + 5
