"""How sparsity grows over the steps of a training run."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable


def linear(progress: float) -> float:
    """From 0 to 1 at an even pace."""
    return progress


def cubic(progress: float) -> float:
    """From 0 to 1, fast at first and ever slower: Zhu & Gupta 2017, arXiv 1710.01878, equation 1."""
    return 1 - (1 - progress) ** 3


CURVES: dict[str, Callable[[float], float]] = {"cubic": cubic, "linear": linear}


@dataclasses.dataclass(kw_only=True)
class Schedule:
    """The sparsity at each step: `initial` until step `begin`, the final one `steps` later.

    Example:
        >>> schedule = Schedule(sparsity=0.8, steps=4, curve="linear")
        >>> [round(schedule.at(step), 1) for step in range(6)]
        [0.0, 0.2, 0.4, 0.6, 0.8, 0.8]

    Attributes:
        sparsity: the final sparsity, or a function from the step (0, 1, ...) to a sparsity.
        steps: how many steps the way from `initial` takes. A function may go on for ever, with None.
        initial: sparsity up to step `begin`.
        begin: the first step that changes masks.
        every: steps between changes.
        curve: `cubic`, `linear`, or a function from progress (0 to 1) to the share of the way that is done.
        argument: the keyword of mask_fn that is set.
        step: how many steps were made.
    """

    sparsity: float | Callable[[int], float]
    steps: int | None = None
    initial: float = 0.0
    begin: int = 0
    every: int = 1
    curve: str | Callable[[float], float] = "cubic"
    argument: str = "sparsity"
    step: int = 0

    def __post_init__(self) -> None:
        if self.steps is None and not callable(self.sparsity):
            raise ValueError(f"steps is missing: over how many steps shall sparsity reach {self.sparsity}?")
        if (self.steps is not None and self.steps < 1) or self.every < 1 or self.begin < 0:
            raise ValueError(
                f"steps={self.steps}, every={self.every}, begin={self.begin}; expected steps and every of at least 1 "
                "and a begin that is not negative"
            )
        for name in ("sparsity", "initial"):
            value = getattr(self, name)
            if not callable(value):
                _check(value, name)
        if not callable(self.curve) and self.curve not in CURVES:
            raise ValueError(f"curve={self.curve!r} is not known; expected {', '.join(CURVES)} or a function")

    def at(self, step: int) -> float:
        """The sparsity at a step.

        Raises:
            ValueError: a function of the user's left the range from 0 to 1.
        """
        if callable(self.sparsity):
            return _check(self.sparsity(step), f"the schedule's sparsity at step {step}")
        assert self.steps is not None
        progress = min(max((step - self.begin) / self.steps, 0.0), 1.0)
        curve = self.curve if callable(self.curve) else CURVES[self.curve]
        value = self.initial + (self.sparsity - self.initial) * curve(progress)
        return _check(value, f"the schedule's sparsity at step {step}")

    def due(self) -> bool:
        """Whether this step changes the masks."""
        last = self.steps is not None and self.step == self.begin + self.steps
        return self.step >= self.begin and (last or (self.step - self.begin) % self.every == 0)

    @property
    def over(self) -> bool:
        """Whether the last step that changes masks was made."""
        return self.steps is not None and self.step > self.begin + self.steps


def _check(value: float, name: str) -> float:
    if not 0 <= value <= 1:
        raise ValueError(f"{name} is {value!r}; expected a fraction from 0 to 1")
    return float(value)
