"""What decides a result is in its inputs, and a finished result of other inputs is made again."""

import json
import os
import shutil
from pathlib import Path

import pytest
from conftest import make_text, tiny_recipe

from puzzle import artifacts, config, pipeline
from puzzle.config import CorpusConfig
from puzzle.cost import COST
from puzzle.data import sources
from puzzle.errors import UserError
from puzzle.model import parent
from puzzle.progress import Progress
from puzzle.run import Run
from puzzle.stage import Job, Scope

# By stage: packages without which it would come out otherwise
DECIDING = {
    "library": {"puzzle-nas", "torch", "transformers", "tokenizers"},
    "score": {"puzzle-nas", "torch", "transformers", "tokenizers"},
    "cost": {"puzzle-nas"},
    "search": {"puzzle-nas", "highspy", "torch"},
    "assemble": {"puzzle-nas", "torch"},
    "uptrain": {"puzzle-nas", "torch", "transformers", "tokenizers"},
    "evaluate": {"puzzle-nas", "torch", "transformers", "tokenizers"},
    "report": {"puzzle-nas"},
}


@pytest.mark.training
@pytest.mark.parametrize("stage", pipeline.STAGES, ids=lambda stage: stage.name)
def test_another_version_of_what_decides_a_stage_makes_it_anew(finished_run, monkeypatch, stage):
    job = next(finished_run.recipe_jobs())
    manifest = artifacts.read_manifest(job.folder(stage))
    assert stage.inputs(job) == manifest.inputs
    assert set(manifest.inputs["versions"]) >= DECIDING[stage.name]
    real = artifacts.version
    for package in DECIDING[stage.name]:
        monkeypatch.setattr(
            artifacts,
            "version",
            lambda name, package=package: "9.9" if name == package else real(name),
        )
        assert stage.inputs(job) != manifest.inputs, package
        assert pipeline.stage_status(stage, job).state == "done"  # readable on other machines


@pytest.mark.training
def test_the_version_that_has_changed_is_said(tiny_run, monkeypatch):
    pipeline.execute_stage(COST, tiny_run.place_job())
    said, real = [], artifacts.version
    monkeypatch.setattr(
        artifacts, "version", lambda name: "9.9" if name == "puzzle-nas" else real(name)
    )
    monkeypatch.setattr(tiny_run.progress, "say", said.append)
    pipeline.execute_stage(COST, tiny_run.place_job())
    before = real("puzzle-nas")
    assert f"  made again: versions.puzzle-nas has changed from {before} to 9.9" in said


@pytest.fixture
def own_run(tiny_folder, tmp_path) -> Run:
    """A run whose parent and text are its own, to be changed."""
    shutil.copytree(tiny_folder, tmp_path / "parent")
    (tmp_path / "text").mkdir()
    recipe = tiny_recipe(tmp_path / "parent", make_text(tmp_path / "text"), tmp_path / "run")
    return Run(config.parse(recipe), tmp_path / "run", Progress(quiet=True))


def facts(run: Run, stage) -> dict:
    """As another process on the run would see them."""
    again = Run(run.recipe, run.folder, Progress(quiet=True))
    job = next(again.recipe_jobs()) if stage.scope is Scope.CHILD else Job(again)
    return stage.work().facts(job)


@pytest.mark.parametrize("name", ["library", "score", "uptrain"])
@pytest.mark.parametrize("changed", ["parent/model.safetensors", "parent/tokenizer.json", "text"])
def test_other_weights_tokenizer_or_text_are_other_inputs(own_run, name, changed):
    stage = next(stage for stage in pipeline.STAGES if stage.name == name)
    before = facts(own_run, stage)
    assert facts(own_run, stage) == before
    path = own_run.folder.parent / changed
    if path.is_dir():
        path = next(iter(sorted(path.iterdir())))
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    assert facts(own_run, stage) != before


@pytest.mark.training
def test_every_byte_of_large_weights_counts(own_run):
    """A sparse file of more than a gibibyte, changed where no window at its ends would see it."""
    folder = Path(own_run.recipe.parent)
    path = folder / "model.safetensors"
    with path.open("wb") as file:
        file.truncate((1 << 30) + (8 << 20))
    before = parent.describe(str(folder)).fingerprint
    with path.open("r+b") as file:
        file.seek(900 << 20)
        file.write(b"\1")
    assert parent.describe(str(folder)).fingerprint != before


def test_weights_are_fingerprinted_once_a_run(own_run, monkeypatch):
    before = own_run.parent.fingerprint
    assert (own_run.folder / "checksums.jsonl").exists()
    reads, real = [], artifacts.file_fingerprint
    monkeypatch.setattr(
        artifacts, "file_fingerprint", lambda path: (reads.append(path), real(path))[1]
    )
    again = Run(own_run.recipe, own_run.folder, Progress(quiet=True))
    assert again.parent.fingerprint == before
    assert not [path for path in reads if path.suffix == ".safetensors"]


def test_costs_depend_on_engine_version_and_machine(tiny_run):
    job = tiny_run.place_job()
    before = COST.work().facts(job)
    for key, value in (("engine", "vllm"), ("version", "0.0"), ("device", "a phone"), ("count", 3)):
        other = tiny_run.place_job()
        engine = job.engine
        changed = engine.facts.model_copy(update={key: value})
        other.__dict__["engine"] = type(engine)(**(vars(engine) | {"facts": changed}))
        assert COST.work().facts(other) != before, key
    sheet = dict(job.engine.facts.sheet)
    sheet[next(iter(sheet))] *= 2
    other = tiny_run.place_job()
    changed = job.engine.facts.model_copy(update={"sheet": sheet})
    other.__dict__["engine"] = type(job.engine)(**(vars(job.engine) | {"facts": changed}))
    assert COST.work().facts(other) != before


# ---------------------------------------------------------------------------------------- datasets


def test_a_run_keeps_the_revision_of_a_dataset_that_it_began_with(tmp_path, monkeypatch):
    commits = iter(["a1", "b2"])
    monkeypatch.setattr(sources, "hub_commit", lambda source: next(commits))
    corpus = CorpusConfig(sources=[{"dataset": "org/text"}, "stdlib"])
    first = sources.pinned(corpus, tmp_path / "datasets.json")
    assert first.sources[0].revision == "a1" and first.sources[1] == corpus.sources[1]
    assert sources.pinned(corpus, tmp_path / "datasets.json") == first
    other = sources.pinned(corpus, tmp_path / "another.json")
    fingerprints = sources.source_fingerprints
    assert fingerprints(other) != fingerprints(first) != fingerprints(corpus)


def test_the_rows_of_a_dataset_are_those_of_its_revision(monkeypatch):
    import datasets

    asked = {}

    def load(name, subset, **options):
        asked.update(options)
        raise OSError("no network")

    monkeypatch.setattr(datasets, "load_dataset", load)
    source = CorpusConfig(sources=[{"dataset": "org/text", "revision": "a1"}]).sources[0]
    with pytest.raises(UserError, match="org/text"):
        list(sources.documents(source, None, 0))
    assert asked["revision"] == "a1"


def test_a_dataset_that_cannot_be_asked_for_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    corpus = CorpusConfig(sources=[{"dataset": "org/text-that-is-not-there"}])
    with pytest.raises(UserError, match="neither a folder here nor reachable on the hub"):
        sources.pinned(corpus, tmp_path / "datasets.json")
    assert not (tmp_path / "datasets.json").exists()


def test_another_file_in_a_dataset_folder_is_another_source(tmp_path):
    (tmp_path / "rows.csv").write_text("text\nhello\n")
    corpus = CorpusConfig(sources=[{"dataset": str(tmp_path)}])
    assert sources.pinned(corpus, tmp_path / "datasets.json") == corpus
    before = sources.source_fingerprints(corpus)
    os.utime(tmp_path / "rows.csv", ns=(1, 1))
    assert sources.source_fingerprints(corpus) != before
    assert json.dumps(before)
