"""The stage: what cannot work is refused, and what the plan says it will need."""

import pytest
from uptrainings import uptrained

from puzzle import config
from puzzle.errors import UserError
from puzzle.progress import Progress
from puzzle.run import Run
from puzzle.uptrain import memory
from puzzle.uptrain import stage as uptrain

pytestmark = pytest.mark.training


def test_the_plan_knows_what_saves_memory(finished_run, tmp_path):
    def planned(processes: int = 1, **settings) -> float:
        recipe = finished_run.recipe.model_dump(mode="json") | {"processes": processes}
        recipe["uptrain"] |= settings
        run = Run(config.parse(recipe), tmp_path, Progress(quiet=True))
        job = run.child_job("main")
        # on a CPU the memory is of all processes together
        return memory.Case.of(job).taken(memory.choose(job)).device / processes

    savings = {
        "micro_batch_sequences": 1,
        "activation_checkpointing": True,
        "optimizer_memory": "host",
        "lora_rank": 2,
        "processes": 2,
    }
    for name, value in savings.items():
        assert planned(**{name: value}) < planned(), name


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"freeze": ["model.layer.*"]}, "matches no weight"),
        ({"freeze": ["*"]}, "leave no weight to learn"),
        (
            {"stages": [{"sequence_length": 48, "share": 1.0}]},
            "a multiple of corpus.sequence_length",
        ),
        (
            {"stages": [{"sequence_length": 512, "share": 1.0}], "batch_sequences": 16},
            "at most 256",
        ),
        ({"stages": [{"sequence_length": 64, "share": 0.5}]}, "add up to 0.5; expected 1"),
        ({"processes": 3}, "cannot be shared by 3 processes"),
        ({"optimizer_memory": "host", "processes": 2}, "host is for one process"),
        ({"optimizer_memory": "host", "lora_rank": 4}, "host is for one process"),
        ({"cosine_weight": 0, "kl_weight": 0}, "nothing to learn"),
        ({"schedule": "wsd", "warmup_share": 0.5, "decay_share": 0.6}, "exceed 1"),
        ({"lora_rank": 4}, "pip install peft"),
        ({"wandb": True}, "pip install wandb"),
    ],
)
def test_what_cannot_work_is_refused_in_one_line(
    finished_run, tmp_path, monkeypatch, settings, words
):
    monkeypatch.setattr(uptrain, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=words) as error:
        uptrained(finished_run, tmp_path / "run", **settings)
    assert "\n" not in str(error.value)
