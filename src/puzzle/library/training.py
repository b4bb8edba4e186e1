"""Training the library: chunks of batches pass through the layers, every variant learns from each.

    for chunk of batches:
        for layer:                           # activations of the chunk pass from layer to layer
            for batch in chunk:  one parent block forward; every variant of the layer takes one step
            every variant: validation loss, checkpoint   # a kill loses at most this much

Resident, the parent and all trainers stay in memory. Streamed, one layer of the parent is read from
its files at a time, and as many of its trainers as fit come from disk together and go back to it:
the same arithmetic in the same order, so the same library. Of several processes each has layers of
its own (`relay.py`), and what a variant learns depends on nothing but its own data.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from puzzle import artifacts
from puzzle.device import return_freed_memory
from puzzle.library import initialization, memory, weights
from puzzle.library.bld import ParentBatch, VariantTrainer, mean
from puzzle.library.records import LossPoint, VariantRecord
from puzzle.library.relay import Relay
from puzzle.model import variants
from puzzle.model.architecture import Block, Slot
from puzzle.model.layers import ParentLayers
from puzzle.model.modeling_puzzle import LayerContext, PuzzleDecoderLayer
from puzzle.model.variants import State
from puzzle.run import Run
from puzzle.training import sharding

Batches = list[torch.Tensor]  # a layer's inputs, [B, S, D] each


class _Chunk(artifacts.Record):
    """`chunk.json`: batches that pass a layer before the next one starts."""

    steps: int


@dataclass
class Activations:
    """Inputs of one layer on their way through the parent."""

    batches: Batches
    validation: Batches
    context: LayerContext


@dataclass(frozen=True)
class LibraryTraining:
    """The training of this process's layers of a library in its folder."""

    run: Run
    folder: Path
    parent: ParentLayers
    trainers: list[VariantTrainer]  # of the relay's layers
    together: int | None  # parameters of variants in memory at a time; None: all, resident
    relay: Relay

    @property
    def resident(self) -> bool:
        """Whether all variants stay in memory."""
        return self.together is None

    # ------------------------------------------------------------------------------------- files

    def checkpoint(self, trainer: VariantTrainer) -> Path:
        """The checkpoint of a variant."""
        return self.folder / artifacts.UNFINISHED / f"{trainer.key}.safetensors"

    def no_ops(self) -> list[VariantRecord]:
        """What leaving out each subblock costs, for comparison."""
        return [VariantRecord.read(self._no_op_path(*place)) for place in self._no_op_places()]

    def _no_op_path(self, layer: int, slot: Slot) -> Path:
        """The record of a no-op, until it goes into the index."""
        return self.folder / artifacts.UNFINISHED / f"{layer:03d}.{slot}.no_op.json"

    def _no_op_places(self) -> list[tuple[int, Slot]]:
        return [
            (layer, variant.slot)
            for layer in self.relay.layers
            for variant in self.run.space.layers[layer].subblocks
            if variant.kind == "no_op"
        ]

    # ---------------------------------------------------------------------------- initialisation

    def initialise(self) -> None:
        """Give every variant its first weights and its first validation loss, layer by layer.

        What is on disk stays.
        """
        missing = [t for t in self.trainers if not self.checkpoint(t).exists()]
        places = self._no_op_places()
        missing_no_ops = [place for place in places if not self._no_op_path(*place).exists()]
        waiting = sharding.all_of(bool(missing or missing_no_ops))
        if any(waiting[sharding.rank() :]) and self.relay.layers:
            run, layers = self.run, self.relay.layers
            settings = run.recipe.library
            tokens_NS = run.corpus["train"].batch(0, settings.calibration_sequences)
            activations = self._enter(list(tokens_NS.split(settings.batch_sequences)))
            if any(waiting[sharding.rank() + 1 :]):
                self._hand_on(activations)
            with run.progress.task("initialising the library", len(layers), "layers") as task:
                for layer in layers:
                    trainers = [t for t in missing if t.layer == layer]
                    slots = [slot for at, slot in missing_no_ops if at == layer]
                    with self.parent.layer(layer) as module:
                        self._initialise_layer(module, trainers, activations)
                        for slot in slots:
                            self._record_no_op(layer, slot, module, activations)
                        self._advance(module, activations.batches, activations.context)
                        self._advance(module, activations.validation, activations.context)
                    task.advance()
        for trainer in self.trainers:
            if not trainer.history:
                trainer.read_progress(self.checkpoint(trainer))

    def _initialise_layer(
        self, module: PuzzleDecoderLayer, trainers: list[VariantTrainer], activations: Activations
    ) -> None:
        if not trainers:
            return
        least_squares = self.run.recipe.library.initialization == "least_squares"
        with self.run.device.autocast():
            batches = self.run.device.fetched(activations.batches)
            calibration = initialization.calibrate(
                module, batches, activations.context, least_squares
            )
        for trainer in trainers:
            layer_module = self._module(trainer)
            layer_module.load_state_dict(
                self._first_state(trainer, module.state_dict(), calibration)
            )
            trainer.begin(layer_module)
            errors = self._validation_errors([trainer], module, activations)
            trainer.history = [LossPoint(tokens=0, validation=errors[trainer.key])]
            trainer.save(self.checkpoint(trainer))
            if not self.resident:
                self._release([trainer])

    def _first_state(
        self,
        trainer: VariantTrainer,
        layer_state: State,
        calibration: initialization.Calibration,
    ) -> State:
        """Training-free weights of a subblock; a pair starts from the first run's library."""
        variant, run = trainer.variant, self.run
        if isinstance(variant, Block):
            assert run.first is not None
            state = weights.read_block(run.first, trainer.layer, variant, layer_state)
            return {name: tensor.float() for name, tensor in state.items()}
        return initialization.initial_state(layer_state, variant, run.parent.shape, calibration)

    def _record_no_op(
        self, layer: int, slot: Slot, module: PuzzleDecoderLayer, activations: Activations
    ) -> None:
        losses = []
        with torch.no_grad(), self.run.device.autocast():
            for x_BSD in self.run.device.fetched(activations.validation):
                batch = ParentBatch.from_layer(module, x_BSD, activations.context)
                losses.append(batch.no_op_error(slot))
        loss = mean(losses)
        record = VariantRecord(
            layer=layer, slot=slot, variant="no_op", file=None, nmse_before=loss, nmse_after=loss
        )
        record.write(self._no_op_path(layer, slot))

    # ---------------------------------------------------------------------------------- training

    def train(self) -> None:
        """BLD, chunk by chunk and layer by layer; goes on from the checkpoints in the folder."""
        run, settings = self.run, self.run.recipe.library
        chunks, counts = self._chunks(), sharding.all_of(len(self.trainers))
        waiting = sharding.all_of([bool(self._pending(*chunk)) for chunk in chunks])
        if not self.relay.layers:
            return
        batch_tokens = settings.batch_sequences * run.recipe.corpus.sequence_length
        tokens = sum(last - first for first, last in chunks) * batch_tokens
        waited_s = self.relay.waited_s
        with run.progress.task(f"BLD of {sum(counts)} variants", tokens, "tokens") as task:
            for number, (first, last) in enumerate(chunks):
                pending = self._pending(first, last)
                is_waited_for = any(of[number] for of in waiting[sharding.rank() + 1 :])
                comes = waiting[sharding.rank()][number] or is_waited_for
                if not pending and (not comes or (self.relay.is_first and not is_waited_for)):
                    task.skip((last - first) * batch_tokens)
                    continue
                activations = self._enter([self._tokens(step) for step in range(first, last)])
                if is_waited_for:
                    self._hand_on(activations)
                task.waited_s, done = self.relay.waited_s - waited_s, 0.0
                for layer in self._layers_of(pending):
                    trainers = [t for t in pending if t.layer == layer]
                    self._train_layer(layer, trainers, activations)
                    losses = [t.history[-1].validation for t in trainers]
                    error = f", mean nMSE {mean(losses):.4f}" if losses else ""
                    share = (last - first) * batch_tokens / len(self._layers_of(pending))
                    done += share
                    task.advance(share, f"layer {layer}{error}")
                task.advance((last - first) * batch_tokens - done)
        self.relay.finish()

    def _pending(self, first: int, last: int) -> list[VariantTrainer]:
        """What has not learned from all batches of a chunk."""
        return [t for t in self.trainers if not t.done and first < t.steps and t.step < last]

    def _layers_of(self, pending: list[VariantTrainer]) -> range:
        """This process's layers down to the last one with something to train."""
        last = max((trainer.layer for trainer in pending), default=-1)
        return range(self.relay.layers.start, last + 1)

    def _train_layer(
        self, layer: int, trainers: list[VariantTrainer], activations: Activations
    ) -> None:
        """One layer, one chunk. Streamed, variants that do not fit together take turns."""
        groups = self._groups(trainers)
        with self.parent.layer(layer) as module:
            for index, group in enumerate(groups):
                is_last = index == len(groups) - 1
                self._train_group(group, module, activations, hand_on=is_last)
                if not self.resident:
                    self._release(group)

    def _groups(self, trainers: list[VariantTrainer]) -> list[list[VariantTrainer]]:
        """In order; more than `together` parameters only where one variant has more."""
        groups: list[list[VariantTrainer]] = [[]]
        size, shape = 0, self.run.parent.shape
        for trainer in trainers:
            parameters = shape.parameters(trainer.variant)
            if self.together is not None and groups[-1] and size + parameters > self.together:
                groups.append([])
                size = 0
            groups[-1].append(trainer)
            size += parameters
        return groups

    def _chunks(self) -> list[tuple[int, int]]:
        """The first batch of every chunk, and the one after its last."""
        steps = max(sharding.all_of(max((t.steps for t in self.trainers), default=0)))
        size = sharding.shared(self._chunk_steps() if sharding.rank() == 0 else 0)
        return [(first, min(first + size, steps)) for first in range(0, steps, size)]

    def _chunk_steps(self) -> int:
        """As when the library was begun: a chunk's boundaries are those of the checkpoints."""
        path = self.folder / artifacts.UNFINISHED / "chunk.json"
        if not path.exists():
            steps = memory.chunk_steps(self.run, streamed=not self.resident)
            _Chunk(steps=steps).write(path)
        return _Chunk.read(path).steps

    def _train_group(
        self,
        group: list[VariantTrainer],
        module: PuzzleDecoderLayer,
        activations: Activations,
        *,
        hand_on: bool,
    ) -> None:
        """Every variant of the group learns from every batch. `hand_on`: inputs become outputs."""
        run, settings = self.run, self.run.recipe.library
        losses: dict[str, list[torch.Tensor]] = {trainer.key: [] for trainer in group}
        for trainer in group:
            if trainer.module is None:
                trainer.restore(self.checkpoint(trainer), self._module(trainer))
        batches = activations.batches
        for index, x_BSD in enumerate(self.run.device.fetched(batches)):
            with run.device.autocast():
                batch = ParentBatch.from_layer(module, x_BSD, activations.context)
                for trainer in group:
                    if not trainer.done:
                        losses[trainer.key].append(trainer.train_step(batch, settings))
            if hand_on:
                batches[index] = self._kept(batch.o_BSD)
        errors = self._validation_errors(group, module, activations)
        if hand_on:
            self._advance(module, activations.validation, activations.context)
        for trainer in group:
            train_loss = torch.stack(losses[trainer.key]).mean().item()
            self._end_chunk(trainer, train_loss, errors[trainer.key])

    def _end_chunk(self, trainer: VariantTrainer, train_loss: float, validation: float) -> None:
        run, settings = self.run, self.run.recipe.library
        tokens = trainer.step * settings.batch_sequences * run.recipe.corpus.sequence_length
        point = LossPoint(tokens=tokens, train=train_loss, validation=validation)
        trainer.end_chunk(point, settings)
        if trainer.stopped:
            run.progress.say(f"  {trainer.key}: stopped, {trainer.stopped}")
        trainer.save(self.checkpoint(trainer))
        figures = {"tokens": tokens, "train": train_loss, "validation": validation}
        run.metrics.log("library", trainer.step, {trainer.key: figures})

    def _validation_errors(
        self, group: Sequence[VariantTrainer], module: PuzzleDecoderLayer, activations: Activations
    ) -> dict[str, float]:
        """Validation loss of every variant of a layer: the mean over batches."""
        losses: dict[str, list[float]] = {trainer.key: [] for trainer in group}
        if group:
            with torch.no_grad(), self.run.device.autocast():
                for x_BSD in self.run.device.fetched(activations.validation):
                    batch = ParentBatch.from_layer(module, x_BSD, activations.context)
                    for trainer in group:
                        losses[trainer.key].append(trainer.error(batch).item())
        return {key: mean(values) for key, values in losses.items()}

    # ------------------------------------------------------------------------------- activations

    def _enter(self, batches: list[torch.Tensor]) -> Activations:
        """This process's first layer's inputs of these batches [B, S] and of the validation text.

        The context is that of a batch of one, which fits any other.
        """
        device = self.run.device.torch_device
        rows = [*batches, *self._validation_tokens()]
        with torch.no_grad(), self.run.device.autocast():
            _, context = self.parent.embed(batches[0][:1])
            if self.relay.is_first:
                embedded = (self.parent.embed(tokens_BS)[0] for tokens_BS in rows)
                states = [self._kept(x_BSD) for x_BSD in embedded]
            else:
                taken = self.relay.take([tokens_BS.shape for tokens_BS in rows])
                states = taken if self.parent.on_host else [x_BSD.to(device) for x_BSD in taken]
        return Activations(states[: len(batches)], states[len(batches) :], context)

    def _hand_on(self, activations: Activations) -> None:
        """Run the parent's own layers ahead, and send their outputs to the next owner."""
        states = [*activations.batches, *activations.validation]
        for layer in self.relay.layers:
            with self.parent.layer(layer) as module:
                self._advance(module, states, activations.context)
        self.relay.hand_on(states)

    @torch.no_grad()
    def _advance(self, module: PuzzleDecoderLayer, batches: Batches, context: LayerContext) -> None:
        """Replace a layer's inputs by its outputs."""
        with self.run.device.autocast():
            for index, x_BSD in enumerate(self.run.device.fetched(batches)):
                batches[index] = self._kept(module(x_BSD, **context))

    def _kept(self, x_BSD: torch.Tensor) -> torch.Tensor:
        return self.run.device.to_host(x_BSD) if self.parent.on_host else x_BSD

    def _tokens(self, step: int) -> torch.Tensor:
        return self.run.corpus["train"].batch(step, self.run.recipe.library.batch_sequences)

    def _validation_tokens(self) -> list[torch.Tensor]:
        settings = self.run.recipe.library
        rows_NS = self.run.corpus["validation"].head(settings.validation_sequences)
        return list(rows_NS.split(settings.batch_sequences))

    def _module(self, trainer: VariantTrainer) -> PuzzleDecoderLayer:
        attention = self.run.placement.attention
        with torch.device("meta"):  # what it holds comes from a checkpoint or the initialiser
            block = trainer.block
            module = variants.block_module(self.run.parent, trainer.layer, block, attention)
        return module.to_empty(device=self.run.device.torch_device)

    @staticmethod
    def _release(group: Sequence[VariantTrainer]) -> None:
        for trainer in group:
            trainer.release()
        return_freed_memory()
