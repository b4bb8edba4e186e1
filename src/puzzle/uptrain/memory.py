"""What uptraining takes, and what is chosen so that it fits: one function for plan and stage.

What the recipe leaves to us (`micro_batch_sequences`, `activation_checkpointing`,
`optimizer_memory`) is chosen here, from the fastest to the smallest: everything on the device, then
layers that are computed twice, then the optimiser in the host's memory, then the parent's layers
there, too; within each the largest micro-batch.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from puzzle import artifacts
from puzzle.artifacts import Record
from puzzle.assemble import ASSEMBLE
from puzzle.config import UptrainConfig
from puzzle.model import child
from puzzle.model.architecture import Architecture
from puzzle.search import finalists
from puzzle.search.constraints import parse_quantity
from puzzle.stage import Bytes, Effort, Job, Need
from puzzle.training import launch, muon
from puzzle.training.losses import LOSS_ELEMENTS
from puzzle.uptrain import trained_weights

PROJECTIONS = 7  # of a layer: q, k, v, o, gate, up, down
CHOICE = "choice.json"
SUGGESTED_RANK = 16
# What the allocator takes for a micro-batch. glibc holds on to freed buffers between those that
# live: with the embedded parent 1.8 to 2.0 times as much, 3.4 where layers are computed again.
ALLOCATED = {"cpu": 1.9, "cuda": 1.0}
Place = Literal["device", "host"]


class Choice(Record):
    """How uptraining is done where several ways lead to the same child."""

    micro_batch_sequences: int  # of corpus.sequence_length, in each process
    activation_checkpointing: bool
    optimizer_memory: Place
    parent: Place

    def __str__(self) -> str:
        return (
            f"micro_batch_sequences {self.micro_batch_sequences}, activation_checkpointing "
            f"{str(self.activation_checkpointing).lower()}, optimizer on the "
            f"{self.optimizer_memory}, parent on the {self.parent}"
        )


class _Chosen(Record):
    """`choice.json`: what was asked, and chosen, when the uptraining began."""

    asked: dict[str, str]
    choice: Choice


def choose(job: Job, folder: Path | None = None) -> Choice:
    """What this uptraining does; with its `folder`, what it did when it began, if that still fits.

    The same on every machine with as much memory. Where nothing fits it is the smallest, which the
    stage's check refuses.
    """
    case = Case.of(job)
    if folder is None:
        return case.fitting() or case.choices()[-1]
    path = folder / artifacts.UNFINISHED / CHOICE
    keys = ("micro_batch_sequences", "activation_checkpointing", "optimizer_memory")
    asked = {key: str(getattr(job.child.uptrain, key)) for key in keys}
    asked["processes"] = str(case.processes)
    if path.exists():
        begun = _Chosen.read(path)
        if begun.asked == asked and case.fits(begun.choice):
            return begun.choice
    choice = choose(job)
    _Chosen(asked=asked, choice=choice).write(path)
    return choice


def is_shared(job: Job) -> bool:
    """Adapters are for one process."""
    return job.child.uptrain.lora_rank == 0


def processes(job: Job) -> int:
    """How many share the uptraining of this child."""
    return launch.processes(job.run) if is_shared(job) else 1


def most_parameters(job: Job) -> int:
    """Of the child: its own once it is assembled, before that the most that the wish allows."""
    shape, wish = job.run.parent.shape, job.child.search.parameters
    path = job.folder(ASSEMBLE) / "architecture.json"
    if path.exists():
        return child.read_architecture(path.parent).parameters(shape)
    parent = Architecture.of_parent(shape).parameters(shape)
    if wish is None:
        return parent
    texts = wish.values() if isinstance(wish, dict) else [wish]
    limits = [parse_quantity("parameters", text) for text in texts]
    return int(min(parent, *(q.number * (parent if q.is_relative else 1) for q in limits)))


def _trained_in_layers(job: Job) -> float:
    """Parameters of the child's layers, for its time: a faster child is smaller, about as much."""
    constant, wish = job.run.parent.shape.constant_parameters, job.child.search.throughput
    most = float(most_parameters(job) - constant)
    if wish is None or (job.folder(ASSEMBLE) / "architecture.json").exists():
        return most
    texts = wish.values() if isinstance(wish, dict) else [wish]
    asked = [parse_quantity("throughput", text) for text in texts]
    return most / max([1.0, *(ratio.number for ratio in asked if ratio.is_relative)])


@dataclass(frozen=True)
class Case:
    """An uptraining whose memory is asked for: of a child of so many parameters, in processes."""

    job: Job
    parameters: int
    processes: int

    @classmethod
    def of(cls, job: Job) -> "Case":
        """As the recipe has it."""
        return cls(job, most_parameters(job), processes(job))

    def fitting(self) -> Choice | None:
        """The fastest way that fits; None where none does."""
        return next((choice for choice in self.choices() if self.fits(choice)), None)

    def fits(self, choice: Choice) -> bool:
        """Whether device and host have as much."""
        return not self.taken(choice).lacking(self.job.run.device.memory)

    def choices(self) -> list[Choice]:
        """What the settings allow, from the fastest to the smallest."""
        return list(self._choices())

    def _choices(self) -> Iterator[Choice]:
        settings = self.job.child.uptrain
        rows = max(1, settings.batch_sequences // self.processes)
        micro = settings.micro_batch_sequences
        sizes = [min(micro, rows)] if micro else [rows >> n for n in range(rows.bit_length())]
        again = settings.activation_checkpointing
        has_host = not self.job.run.device.memory.is_shared
        optimizers: list[Place] = ["device"]
        if settings.optimizer_memory != "auto":
            optimizers = [settings.optimizer_memory]
        elif has_host and not refuses_host(settings, self.processes):
            optimizers.append("host")
        parents: list[Place] = ["device"]
        if has_host and self.processes == 1:
            parents.append("host")
        ways = itertools.product(
            parents, optimizers, (False, True) if again == "auto" else (again,), sizes
        )
        for parent, optimizer, checkpointing, size in ways:
            yield Choice(
                micro_batch_sequences=size,
                activation_checkpointing=checkpointing,
                optimizer_memory=optimizer,
                parent=parent,
            )

    def taken(self, choice: Choice) -> Bytes:
        """Peak memory of models, optimiser and one micro-batch.

        A parameter that learns takes, on the device, 8 bytes with Muon (weight, momentum) and 12
        with AdamW (two moments), those of layers a copy in the dtype of products; with the
        optimiser on the host the weight in that dtype, and 8 or 12 bytes on the host. Its float32
        gradient is there after the backward pass, beside a micro-batch that is not the step's
        first, and beside what Muon makes orthogonal. Sharded models divide by the processes, and a
        layer, or the head, of each is there in full.
        """
        run, settings = self.job.run, self.job.child.uptrain
        shape = run.parent.shape
        parent = Architecture.of_parent(shape).parameters(shape)
        frozen, product = run.placement.dtype.itemsize, self._product
        learning, host, optimizer = float(self.parameters), 0.0, 0.0
        models: float = frozen * parent / self.processes
        if choice.parent == "host":
            layer = shape.parameters(shape.widest_block)
            models, host = frozen * (shape.constant_parameters + 2.0 * layer), frozen * parent
        if settings.lora_rank:
            widths = shape.hidden_size + shape.intermediate_size
            learning = settings.lora_rank * widths * PROJECTIONS * shape.num_hidden_layers
            models += frozen * self.parameters
        if choice.optimizer_memory == "host":
            models += product * learning
            host += self._state(learning)
        else:
            optimizer = self._state(learning) / self.processes
        if self.processes > 1:
            head = shape.vocab_size * shape.hidden_size
            largest = max(shape.parameters(shape.widest_block), head)
            models += largest * 2 * (frozen + product + 4)
        elif self._casts(choice):
            models += product * max(0.0, learning - shape.constant_parameters)
        host += self._state(learning)  # of a snapshot
        gradients = 4.0 * learning / self.processes
        step = self._step()
        passing = self._micro_batch(choice) * ALLOCATED[run.device.type]
        rows = settings.batch_sequences // self.processes
        is_whole = self._tokens(choice) >= rows * run.recipe.corpus.sequence_length
        if is_whole:  # the one is gone when the other is there
            stepping = gradients + step > passing
            gradients, passing = (gradients, step) if stepping else (0.0, passing)
        else:
            passing = max(passing, step)
        peak = Bytes(weights=models, optimizer=optimizer + gradients, activations=passing)
        memory = self.job.run.device.memory
        # where processes share one memory it is that of all
        beside = self.processes if memory.is_shared else 1
        return replace(peak.times(beside), host=host / memory.machines)

    @property
    def kept(self) -> float:
        """Bytes of a checkpoint of whole weights."""
        return self._state(self.parameters)

    def _steps(self, tokens: int) -> float:
        length = self.job.run.recipe.corpus.sequence_length
        return tokens / (self.job.child.uptrain.batch_sequences * length)

    @property
    def _stepped(self) -> float:
        """Parameters that Muon makes orthogonal."""
        layers = self.parameters - self.job.run.parent.shape.constant_parameters
        return float(layers) if trained_weights.has_muon(self.job.child.uptrain) else 0.0

    def _state(self, learning: float) -> float:
        """Bytes of float32 weights that learn, and of what the optimisers keep of them."""
        return 12.0 * learning - 4.0 * self._stepped

    def _step(self) -> float:
        """Bytes beside the gradients while Muon makes matrices orthogonal.

        The momentum in float32 and in the dtype of products, two of the same size that take turns,
        and two squares at most as large; of several processes each keeps its part of all.
        """
        if not trained_weights.has_muon(self.job.child.uptrain):
            return 0.0
        shape = self.job.run.parent.shape
        largest = shape.hidden_size * max(shape.intermediate_size, shape.hidden_size)
        own = 0.0
        if self.processes > 1:
            own = self._product * self._stepped / self.processes
        return largest * (4.0 + 5 * self._product) + own

    def sent(self, choice: Choice, tokens: int) -> float:
        """Bytes that each process sends to the others.

        With every micro-batch the layers' weights are gathered twice, forward and backward, those
        of embedding and head once, and float32 gradients are added up. So are the parent's weights,
        which no gradient needs: FSDP2 fetches ahead what came before in the forward pass. With
        every step Muon gathers matrices and sends them back. Of all that a process sends its share
        to every other one (ring).
        """
        run, constant = self.job.run, self.job.run.parent.shape.constant_parameters
        parent = Architecture.of_parent(run.parent.shape).parameters(run.parent.shape)
        child = self._product * (2.0 * self.parameters - constant) + 4.0 * self.parameters
        passed = child + run.placement.dtype.itemsize * (2.0 * parent - constant)
        micro_batches = tokens / (self._tokens(choice) * self.processes)
        stepped = self._steps(tokens) * 2 * self._product * self._stepped
        return (micro_batches * passed + stepped) * (self.processes - 1) / self.processes

    def crossing(self, choice: Choice, tokens: int) -> float:
        """Bytes between device and host: what each step, and each micro-batch, brings over."""
        run = self.job.run
        shape, total = run.parent.shape, 0.0
        if choice.optimizer_memory == "host":  # float32 gradients there, weights for products back
            steps = self._steps(tokens)
            total += steps * (4.0 + self._product) * self.parameters
            total += steps * 2 * self._product * self._stepped
        if choice.parent == "host":
            layers = Architecture.of_parent(shape).parameters(shape) - shape.constant_parameters
            total += tokens / self._tokens(choice) * run.placement.dtype.itemsize * layers
        return total

    @property
    def _product(self) -> int:
        """Bytes of an element of products."""
        return 2 if self.job.run.device.bfloat16 else 4

    def _casts(self, choice: Choice) -> bool:
        """Whether layers have float32 weights in full, which autocast rounds for products."""
        has_float32 = choice.optimizer_memory == "device" and self.processes == 1
        if self.job.child.uptrain.lora_rank:
            has_float32 = self.job.run.placement.dtype.itemsize == 4
        return has_float32 and self._product < 4

    def _tokens(self, choice: Choice) -> int:
        """Of a micro-batch; at least one of the longest sequences."""
        length = self.job.run.recipe.corpus.sequence_length
        return max(choice.micro_batch_sequences * length, self._longest)

    @property
    def _longest(self) -> int:
        length = self.job.run.recipe.corpus.sequence_length
        return max([stage.sequence_length for stage in self.job.child.uptrain.stages] or [length])

    def _micro_batch(self, choice: Choice) -> float:
        """What a micro-batch keeps for its backward pass, and the most that is there beside it.

        By layer and token: the inputs of both subblocks, with rounded copies for each of the five
        projections that they go into; queries, keys and values, what attention gives, its
        probabilities where they are made; four intermediates of the FFN; the cosine's two sides in
        float32. Or only the inputs of what is computed again, and all of one layer. Beside it: the
        loss over the vocabulary, or a layer's gradients.
        """
        device, shape = self.job.run.device, self.job.run.parent.shape
        product, D = self._product, shape.hidden_size
        stream = 4 if self._casts(choice) else product  # of an element between layers
        eager = device.attention_for(self._longest) == "eager"
        probabilities = 10 * shape.num_attention_heads * self._longest if eager else 0
        inputs = 2 * stream * D + (5 if self._casts(choice) else 2) * product * D
        attention = product * (2 * D + shape.kv_elements_per_token(shape.widest_block))
        ffn = 4 * product * shape.intermediate_size
        cosine = bool(self.job.child.uptrain.cosine_weight) * (8 + 4 * (stream < 4)) * D
        layer = inputs + attention + probabilities + ffn + cosine
        tokens, layers = self._tokens(choice), shape.num_hidden_layers
        backward = tokens * shape.passing_elements * product
        if choice.activation_checkpointing:
            kept = tokens * layers * (stream + product) * D
            return kept + max(self._loss(choice), tokens * layer + backward)
        return tokens * layers * layer + max(self._loss(choice), backward)

    def _loss(self, choice: Choice) -> float:
        """Of the loss over the vocabulary.

        Hidden states of both sides and a gradient; four buffers of a chunk of logits; the head in
        the dtype of products, its gradient and what a chunk adds to that.
        """
        shape, device, tokens = self.job.run.parent.shape, self.job.run.device, self._tokens(choice)
        head = shape.vocab_size * shape.hidden_size
        buffers = 4 * 4 * min(tokens * shape.vocab_size, LOSS_ELEMENTS[device.type])
        states = tokens * shape.hidden_size * (4 + 4 * self._product)
        if self.job.child.uptrain.lora_rank:
            return float(buffers + states)
        cast = 2 * (device.bfloat16 + self._casts(choice))
        return buffers + states + head * (4.0 + cast)


def refuses_host(settings: UptrainConfig, processes: int) -> bool:
    """Whether the optimiser cannot be on the host: that is for one process and whole weights."""
    return processes > 1 or settings.lora_rank > 0


def smallest_change(case: Case) -> str:
    """What would make an uptraining fit that does not, the least first; empty where nothing would.

    It is made by trying: every answer is a case that fits.
    """
    job, settings = case.job, case.job.child.uptrain

    def changed(**changes: object) -> Case:
        wish = replace(job.child, uptrain=settings.model_copy(update=changes))
        return replace(case, job=replace(job, wish=wish))

    free = {
        "micro_batch_sequences": None,
        "activation_checkpointing": "auto",
        "optimizer_memory": "auto",
    }
    given = [f"uptrain.{key}" for key, ours in free.items() if getattr(settings, key) != ours]
    if given and changed(**free).fitting():
        return f"leave out {', '.join(given)}"
    first = f"leave out {', '.join(given)}, and " if given else ""
    if not (job.folder(ASSEMBLE) / "architecture.json").exists():
        for percent in range(95, 45, -5):
            smaller = case.parameters * percent // 100
            if replace(changed(**free), parameters=smaller).fitting():
                return f"{first}ask for a smaller child: search.parameters={smaller / 1e9:.2f}B"
    adapted = changed(**free, lora_rank=SUGGESTED_RANK)
    adapters = f"uptrain.lora_rank={SUGGESTED_RANK}"
    if not settings.lora_rank and adapted.fitting():
        return f"{first}train adapters: {adapters}"
    smaller = case.parameters * 3 // 5
    if not settings.lora_rank and replace(adapted, parameters=smaller).fitting():
        small = f"search.parameters={smaller / 1e9:.2f}B"
        return f"{first}train adapters of a smaller child: {adapters}, {small}"
    for number in (2, 4, 8, 16, 32, 64):
        if replace(changed(**free, lora_rank=0), processes=number).fitting():
            return f"{first}share the work among such devices: processes={number}"
    return ""


def step_flops(job: Job) -> float:
    """Of an optimiser step, for each parameter of the parent's layers: what Muon takes."""
    shape = job.run.parent.shape
    if not trained_weights.has_muon(job.child.uptrain):
        return 0.0
    width, query = shape.hidden_size, shape.num_attention_heads * shape.head_dim
    key = shape.kv_elements_per_token(shape.widest_block) // 2
    columns = [query, query, key, key, *3 * [shape.intermediate_size]]
    return sum(muon.flops(width, each) for each in columns) / (width * sum(columns))


def need(job: Job) -> Need:
    """What the stage will take, for the child that there is or the largest that may come."""
    run, settings, shape = job.run, job.child.uptrain, job.run.parent.shape
    case, choice = Case.of(job), choose(job)
    parameters = case.parameters
    tokens = round(settings.tokens * (1 + finalists.SHARE * len(finalists.children(job))))
    forward = Architecture.of_parent(shape).parameters(shape)
    per_token = (4.0 if settings.lora_rank else 6.0) + 2.0 * choice.activation_checkpointing
    per_step, batch = step_flops(job), settings.batch_sequences * run.recipe.corpus.sequence_length
    layers = parameters - shape.constant_parameters
    flops = tokens * (2.0 * forward + per_token * parameters + per_step / batch * layers)
    trained = _trained_in_layers(job)
    effort = Effort(
        forward=forward - shape.constant_parameters,
        training=trained * (per_token + per_step / batch) / 6,
        loss=1.0,
    ).times(tokens)
    if run.device.type == "cuda":  # side by side; processes on a CPU share its cores
        effort = effort.times(1 / case.processes)
    effort = replace(effort, network=case.sent(choice, tokens), link=case.crossing(choice, tokens))
    checkpoints = case.kept + 4.0 * (settings.keep == "best") * parameters
    if settings.lora_rank:
        checkpoints *= 0.02
    return Need(
        tokens=tokens,
        flops=flops,
        memory=case.taken(choice),
        disk_bytes=finalists.rounds(job) * parameters * run.parent.dtype.itemsize + checkpoints,
        effort=effort,
        chosen=f"for a child of up to {parameters / 1e6:,.0f}M parameters: {choice}",
        instead="" if case.fits(choice) else smallest_change(case),
    )
