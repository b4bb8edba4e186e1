"""A run: a recipe, its directory, and what every stage needs of both (device, parent, corpus).

    RUN/ run.yaml                        the recipe
         parent/                         all that a place needs of the parent: no weights
         checksums.jsonl datasets.json   of its files; revisions of the hub's datasets
         corpus/ library/ score/         of the parent, made once
         places/<place>/ place.yaml      where children are served, and what costs there
         children/<name>/ child.yaml     a wish at a place, and all that was made for it
         first/                          with library.coupled: the decoupled run before it
         logs/

Expensive things are made once, when first asked for; what needs torch is imported then.
"""

import contextlib
import gc
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from puzzle import artifacts, config, locks, settings
from puzzle.artifacts import Inputs, Record
from puzzle.config import ChildConfig, CorpusConfig, PlaceConfig, Recipe
from puzzle.errors import UserError
from puzzle.metrics import Metrics
from puzzle.progress import Progress
from puzzle.stage import Child, Job, Place

if TYPE_CHECKING:
    from puzzle.data.sequences import Sequences, Split
    from puzzle.data.tasks import QuestionBatch
    from puzzle.device import Device, Placement
    from puzzle.model.layers import ParentLayers
    from puzzle.model.modeling_puzzle import PuzzleForCausalLM
    from puzzle.model.parent import Parent
    from puzzle.model.space import SearchSpace
    from puzzle.training.speed import Speed


NARROWED = "space.json"


class NarrowedSpace(Record):
    """`RUN/space.json`: with `library.coupled`, the blocks that each layer may use."""

    layers: list[list[str]]


class Run:
    """A recipe and its directory."""

    def __init__(
        self,
        recipe: Recipe,
        folder: Path,
        progress: Progress,
        *,
        corpus_folder: Path | None = None,
        wait: bool = False,
        device: "Device | None" = None,
    ) -> None:
        """A run in its directory.

        Args:
            recipe: what is to be done.
            folder: where.
            progress: who hears of it.
            corpus_folder: that of another run, whose text is shared.
            wait: for folders that another process writes, instead of giving up.
            device: to plan for, instead of the recipe's.
        """
        self.recipe, self.folder, self.progress, self.wait = recipe, folder, progress, wait
        self.corpus_folder = corpus_folder or folder / "corpus"
        self.metrics = Metrics(folder / "logs")
        self.given_device = device

    @classmethod
    def open(
        cls,
        folder: Path,
        progress: Progress,
        *,
        wait: bool = False,
        corpus_folder: Path | None = None,
    ) -> "Run":
        """An existing run directory. Raises `UserError` where there is none."""
        folder = config.expanded(folder)
        path = folder / "run.yaml"
        if not path.is_file():
            raise UserError(
                f"run {folder}: no run.yaml there; expected the directory of a `puzzle run`"
            )
        recipe = config.parse(settings.read_yaml(path, "run"), str(path))
        return cls(recipe, folder, progress, wait=wait, corpus_folder=corpus_folder)

    def write(self) -> None:
        """Write the recipe, the parent's description, places and children into the directory."""
        from puzzle.model import parent

        with self._writing():
            parent.write_description(self.parent, self.folder / "parent")
            artifacts.write_text(self.folder / "run.yaml", settings.to_yaml(self.recipe))
            for name, place in self.recipe.all_places().items():
                self.write_place(name, place)
            for name, child in self.recipe.all_children().items():
                self.write_child(name, child)

    def _writing(self) -> contextlib.AbstractContextManager[None]:
        """Held while settings are written, which takes moments: another process waits."""
        return locks.hold(self.folder / "run.yaml", wait=True, say=self.progress.say)

    # ------------------------------------------------------------------------- places and children

    def write_place(self, name: str, place: PlaceConfig) -> None:
        """Write `places/<name>/place.yaml`."""
        path = self.folder / "places" / name / "place.yaml"
        with self._writing():
            artifacts.write_text(path, settings.to_yaml(place))

    def write_child(self, name: str, child: ChildConfig) -> None:
        """Write `children/<name>/child.yaml`."""
        path = self.folder / "children" / name / "child.yaml"
        with self._writing():
            artifacts.write_text(path, settings.to_yaml(child))

    def place_config(self, name: str) -> PlaceConfig:
        """The settings of a place of this run. Raises `UserError` for an unknown one."""
        config.check_name("place", name)
        path = self.folder / "places" / name / "place.yaml"
        if path.exists():
            return settings.validate(PlaceConfig, settings.read_yaml(path, "place"), str(path))
        places = self.recipe.all_places()
        if name not in places:
            names = dict.fromkeys([*places, *self._names("places", "place.yaml")])
            raise UserError(
                f"run {self.folder}: no place {name!r}; expected one of {', '.join(names)}, or "
                f"make it with `puzzle cost {self.folder} --place {name}`"
            )
        return places[name]

    def child_config(self, name: str) -> ChildConfig:
        """The settings of a child of this run. Raises `UserError` for an unknown one."""
        config.check_name("child", name)
        path = self.folder / "children" / name / "child.yaml"
        if path.exists():
            return settings.validate(ChildConfig, settings.read_yaml(path, "child"), str(path))
        children = self.recipe.all_children()
        if name not in children:
            names = self.child_names()
            raise UserError(
                f"run {self.folder}: no child {name!r}; expected one of {', '.join(names)}, or "
                f"make it with `puzzle child {self.folder} --name {name} --throughput 2x`"
            )
        return children[name]

    def child_names(self) -> list[str]:
        """The children of this run: the recipe's first, then those made since."""
        made = self._names("children", "child.yaml")
        recipe = [name for name in self.recipe.all_children() if not made or name in made]
        return list(dict.fromkeys([*recipe, *made]))

    def place_names(self) -> list[str]:
        """The places of this run: `here` first."""
        return list(
            dict.fromkeys([*self.recipe.all_places(), *self._names("places", "place.yaml")])
        )

    def _names(self, kind: str, file: str) -> list[str]:
        names = (path.parent.name for path in (self.folder / kind).glob(f"*/{file}"))
        return sorted(filter(config.is_name, names))  # others are half removed, or not ours

    def place_job(self, name: str = "here", place: PlaceConfig | None = None) -> Job:
        """A job at a place, without a child; `place`: its settings instead of those written."""
        return Job(self, self._place(name, place or self.place_config(name)))

    def child_job(self, name: str) -> Job:
        """A job for a child at its place."""
        return self._job(name, self.child_config(name))

    def job_of(self, name: str, child: ChildConfig) -> Job:
        """A job for a child with these settings, whatever is written in its folder."""
        return self._job(name, child)

    def recipe_jobs(self) -> Iterator[Job]:
        """A job for every child of the recipe, with the recipe's own settings."""
        places = self.recipe.all_places()
        for name, child in self.recipe.all_children().items():
            yield self._job(name, child, places[child.place])

    def _job(self, name: str, child: ChildConfig, place: PlaceConfig | None = None) -> Job:
        place = place or self.place_config(child.place)
        wish = Child(
            name=name,
            folder=self.folder / "children" / name,
            place=child.place,
            search=child.search,
            uptrain=child.uptrain,
            evaluate=child.evaluate,
        )
        return Job(self, self._place(child.place, place), wish)

    def _place(self, name: str, place: PlaceConfig) -> Place:
        return Place(name, self.folder / "places" / name, place.deploy, place.cost)

    # -------------------------------------------------------------------------- device and parent

    @cached_property
    def device(self) -> "Device":
        """Where this process computes. Raises `UserError` for a device that does not work here."""
        from puzzle.device import Device

        if self.given_device is not None:
            return self.given_device
        return Device.choose(self.recipe.device, self.recipe.precision)

    @cached_property
    def parent(self) -> "Parent":
        """The parent, described without its weights."""
        from puzzle.model import parent

        description = self.folder / "parent"
        if (description / parent.DESCRIPTION).exists() and not parent.is_here(self.recipe.parent):
            return parent.read_description(description)  # this machine has no weights of it
        checksums = artifacts.Checksums(self.folder / "checksums.jsonl")
        return parent.describe(self.recipe.parent, checksums)

    @property
    def placement(self) -> "Placement":
        """How the frozen parent is loaded for the corpus's sequences."""
        return self.device.frozen(self.parent.dtype, self.recipe.corpus.sequence_length)

    @cached_property
    def parent_model(self) -> "PuzzleForCausalLM":
        """The frozen parent in memory."""
        placement = self.placement
        return self.parent.load(placement.dtype, placement.device, placement.attention)

    def parent_layers(self, *, streamed: bool, some: bool = False) -> "ParentLayers":
        """The frozen parent layer by layer.

        In memory; with `some` those layers that are asked for; `streamed`: read from its files
        whenever it is used.
        """
        from puzzle.model.architecture import Architecture
        from puzzle.model.layers import KeptLayers, ParentLayers, StreamedLayers

        if not streamed and not some:
            return ParentLayers(self.parent_model)
        config = self.parent.child_config(Architecture.of_parent(self.parent.shape))
        kind = StreamedLayers if streamed else KeptLayers
        return kind(config, self.parent.weights, self.placement)

    @contextlib.contextmanager
    def parent_streamed(self) -> Iterator[None]:
        """Meanwhile `parent_model` reads every layer from its files when it computes."""
        from puzzle.model.layers import StreamedLayers

        layers = self.parent_layers(streamed=True)
        assert isinstance(layers, StreamedLayers)
        self.__dict__["parent_model"] = layers.whole()
        try:
            yield
        finally:
            self.__dict__.pop("parent_model", None)

    @cached_property
    def speed(self) -> "Speed":
        """How fast the parent's layers run here, timed when first asked for."""
        from puzzle.training import speed

        return speed.measure(self.parent, self.device, self.recipe.corpus.sequence_length)

    def make_room(self) -> None:
        """From now on keep the parent's layers on the host, and each on the device in its turn."""
        import torch

        from puzzle.training import offload

        placement = self.placement
        self.__dict__.pop("parent_model", None)
        host = self.parent.load(placement.dtype, torch.device("cpu"), placement.attention)
        self.__dict__["parent_model"] = offload.fetch_layers(host, placement.device)

    def release_models(self) -> None:
        """Give a GPU's memory back before an engine is started on it."""
        if self.device.type == "cuda":
            import torch

            self.__dict__.pop("parent_model", None)
            gc.collect()
            torch.cuda.empty_cache()

    # --------------------------------------------------------------------------------- search space

    @cached_property
    def full_space(self) -> "SearchSpace":
        """The variants that the recipe allows and that some place of it can serve."""
        from puzzle.model import space

        library, shape = self.recipe.library, self.parent.shape
        deploys = [place.deploy for place in self.recipe.all_places().values()]
        spaces = [space.build(library, shape, deploy) for deploy in deploys]
        return space.union(spaces, space.build(library, shape, []))

    @property
    def space(self) -> "SearchSpace":
        """What the library holds: with `library.coupled`, what the first search has left.

        Before that search it is the full space, which is what can be planned with.
        """
        if not self.recipe.library.coupled or not (self.folder / NARROWED).exists():
            return self.full_space
        return self._narrowed_space

    @cached_property
    def _narrowed_space(self) -> "SearchSpace":
        return self.full_space.restricted(NarrowedSpace.read(self.folder / NARROWED).layers)

    @cached_property
    def first(self) -> "Run | None":
        """With `library.coupled`, the decoupled run before this one, in `RUN/first`."""
        if not self.recipe.library.coupled:
            return None
        library = self.recipe.library.model_copy(update={"coupled": 0})
        recipe = self.recipe.model_copy(update={"library": library})
        return Run(
            recipe,
            self.folder / "first",
            self.progress,
            corpus_folder=self.corpus_folder,
            wait=self.wait,
            device=self.given_device,
        )

    # ----------------------------------------------------------------------------------------- data

    @cached_property
    def corpus_settings(self) -> CorpusConfig:
        """The recipe's, with datasets of the hub at the revisions that this run began with."""
        from puzzle.data import sources

        return sources.pinned(self.recipe.corpus, self.corpus_folder.with_name("datasets.json"))

    @cached_property
    def corpus(self) -> "dict[Split, Sequences]":
        """The packed text, made when first asked for."""
        from puzzle.data import corpus, written

        return corpus.build(
            written.with_files(self, self.corpus_settings),
            self.parent.tokenizer,
            self.corpus_folder,
            tokenizer_fingerprint=self.parent.tokenizer_fingerprint,
            progress=self.progress,
        )

    def questions(self, split: "Split") -> "list[QuestionBatch]":
        """The questions of `score.task`: those that `score` or those that `test` is given.

        None where there is no task.
        """
        from puzzle.data import tasks

        if self.recipe.score.task is None:
            return []
        return tasks.batches(
            self.recipe.score.task,
            self.parent.tokenizer,
            self.corpus[split],
            tasks.TaskSettings.of(self.recipe, split),
        )

    @cached_property
    def data_facts(self) -> Inputs:
        """What decides the tokens and the arithmetic of a training or evaluation stage."""
        from puzzle.data import sources

        return {
            "parent": self.parent.fingerprint,
            "tokenizer": self.parent.tokenizer_fingerprint,
            "sources": dict(sources.source_fingerprints(self.corpus_settings)),
            "device": self.device.type,
            "bfloat16": self.device.bfloat16,
        }
