"""Live metrics for people: `RUN/logs`, as JSON lines, in TensorBoard and in Weights & Biases.

Nothing reads them back: curves that results depend on are records of their stage.
"""

import contextlib
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from puzzle import artifacts

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter
    from wandb import Run as WandbRun

Values = dict[str, dict[str, float]]  # by what was measured, then by figure


class Metrics:
    """Where a run's stages log their losses. JSON lines always; TensorBoard where installed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._writers = contextlib.ExitStack()

    def log(self, stage: str, step: int, values: Values, *, wandb: bool = False) -> None:
        """Log the values of one step. `wandb`: to Weights & Biases, too."""
        line: artifacts.Inputs = {"step": step}
        line.update({name: dict(figures) for name, figures in values.items()})
        artifacts.append_line(self.folder / f"{stage}.jsonl", line)
        if self._tensorboard is not None:
            for name, figures in values.items():
                for figure, value in figures.items():
                    if figure != "tokens":
                        self._tensorboard.add_scalar(f"{stage}/{name}/{figure}", value, step)
        if wandb:
            self._wandb.log(
                {
                    f"{name}/{key}": v
                    for name, figures in values.items()
                    for key, v in figures.items()
                },
                step=step,
            )

    def close(self) -> None:
        """Send what TensorBoard and Weights & Biases still hold back.

        They do so by themselves when an interpreter goes down; `sharding.leave` skips that.
        """
        self._writers.close()

    @cached_property
    def _tensorboard(self) -> "SummaryWriter | None":
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            return None
        writer = SummaryWriter(str(self.folder / "tensorboard"))
        self._writers.callback(writer.close)
        return writer

    @cached_property
    def _wandb(self) -> "WandbRun":
        import wandb  # `uptrain` has checked that it is installed

        run_folder = self.folder.resolve().parent
        run = wandb.init(
            project="puzzle",
            name=run_folder.name,
            id=artifacts.fingerprint(str(run_folder)),
            resume="allow",
            dir=str(run_folder),
        )
        self._writers.callback(run.finish)
        return run
