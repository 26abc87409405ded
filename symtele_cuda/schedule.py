"""When a `Teleporter` teleports, and where it is."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace

from torch import Tensor

from .checks import check_int
from .plasticity import Plasticity

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Schedule:
    """When to teleport: `teleports_per_epoch` times at the start of each of `epochs`, and after every so many steps.

    Args:
        epochs: counted from 0: epochs=[1] means after one whole epoch of training. They are kept sorted, each once.
        teleports_per_epoch: so many in each of them.
        every: one more teleport after every so many calls of `Teleporter.step`, in any epoch; None for none.
        when: with `every`, only where this holds of the `plasticity` on the samples gathered, as `Plasticity.lost` may.

    Raises:
        TypeError, ValueError: an argument is not what is said above.
    """

    epochs: Collection[int] = ()
    teleports_per_epoch: int = 1
    every: int | None = None
    when: Callable[[Plasticity], bool] | None = None

    def __post_init__(self) -> None:
        if isinstance(self.epochs, (str, bytes)) or not isinstance(self.epochs, Collection):
            raise TypeError(f"epochs must be a collection of ints >= 0, got {self.epochs!r}")
        epochs = {check_int("epochs", epoch, at_least=0) for epoch in self.epochs}
        object.__setattr__(self, "epochs", tuple(sorted(epochs)))
        count = check_int("teleports_per_epoch", self.teleports_per_epoch, at_least=1)
        object.__setattr__(self, "teleports_per_epoch", count)
        if self.every is not None:
            object.__setattr__(self, "every", check_int("every", self.every, at_least=1))
        if self.when is not None and not callable(self.when):
            raise TypeError(f"when must be callable as when(plasticity), got {type(self.when).__name__}")
        if self.when is not None and self.every is None:
            raise ValueError("when must be given together with every, got no every")

    def __str__(self) -> str:
        epochs = ", ".join(map(str, self.epochs))
        often = "" if self.every is None else f" and every {self.every} steps"
        return f"{self.teleports_per_epoch} × in epochs [{epochs}]{often}"


@dataclass(frozen=True)
class Progress:
    """Where a teleporter is: in this epoch the teleports done, and the batches gathered for the next one.

    waited: whether the next one was put off as gradients were pending. calls: of `step`, in all epochs. owed: whether
    a teleport of `Schedule.every` is due.
    """

    epoch: int | None = None
    done: int = 0
    gathered: tuple[Batch, ...] = ()
    waited: bool = False
    calls: int = 0
    owed: bool = False

    def called(self, epoch: int, schedule: Schedule) -> Progress:
        """The same one call later, in this epoch."""
        kept = self if epoch == self.epoch else Progress(epoch, calls=self.calls, owed=self.owed)
        calls = self.calls + 1
        comes_due = schedule.every is not None and calls % schedule.every == 0
        return replace(kept, calls=calls, owed=self.owed or comes_due)

    def is_of_epoch(self, schedule: Schedule) -> bool:
        """Whether the next teleport is one of its epoch's, and not one of `Schedule.every`."""
        return self.epoch in schedule.epochs and self.done < schedule.teleports_per_epoch

    def is_due(self, schedule: Schedule) -> bool:
        return self.owed or self.is_of_epoch(schedule)

    def finished(self, schedule: Schedule) -> Progress:
        """The same after the teleport that was due, or after it was found not to be needed."""
        if self.is_of_epoch(schedule):
            return Progress(self.epoch, self.done + 1, calls=self.calls, owed=self.owed)
        return Progress(self.epoch, self.done, calls=self.calls)
