"""What the callbacks of all training frameworks have in common."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from deadband.masks.layers import LayerError, bare_name, some
from deadband.masks.sparsifier import ActivationSparsifier


class SteppingCallback:
    """When a training loop calls `sparsifier.step()`, and what it leaves behind; the base of the callbacks."""

    def __init__(
        self, sparsifier: ActivationSparsifier, *, every: int | Literal["epoch"] = 1, squash: bool = True
    ) -> None:
        """For one sparsifier.

        Args:
            sparsifier: with its layers registered.
            every: optimizer steps between two calls of `step()`; "epoch": at the end of each epoch.
            squash: without a schedule: whether to squash the masks at the end of training, after a last `step()` for
                what was seen since.

        Raises:
            ValueError: `every` is neither a number of at least 1 nor "epoch".
            LayerError: while training: no input has reached a layer since the last step.
        """
        if every != "epoch" and (isinstance(every, bool) or not isinstance(every, int) or every < 1):
            raise ValueError(f"every={every!r}; expected a number of optimizer steps of at least 1, or 'epoch'")
        self.sparsifier, self.every, self.squash = sparsifier, every, squash
        self._steps = 0  # optimizer steps up to the last call
        self._training_only: bool | None = None  # what the sparsifier had before training
        self._peers: list[SteppingCallback] = [self]  # all of the same trainer, in order

    def _layers(self) -> list[str]:
        return sorted(map(bare_name, self.sparsifier.data_groups))

    def _number(self) -> int:
        return next(number for number, each in enumerate(self._peers) if each is self)

    def _restore(self, states: Sequence[Mapping[str, Any]], where: str) -> None:
        """Take over this callback's state out of all that a checkpoint holds; a warning if there is none.

        It is the one of the same layers; where several callbacks have the same, of the same place in their order. If
        there is one alone, it may have more layers, or less.
        """
        layers = self._layers()
        saved = [sorted(map(bare_name, state["groups"])) for state in states]
        found = [state for state, names in zip(states, saved, strict=True) if names == layers]
        if len(states) == 1 and (set(layers) <= set(saved[0]) or set(layers) >= set(saved[0])):
            found = list(states)
        before = sum(each._layers() == layers for each in self._peers[: self._number()])
        if before < len(found):
            self.sparsifier.load_state_dict(found[before])
            return
        warnings.warn(
            f"the weights come from a checkpoint, but the masks of {some(layers)} stay as they are: there is no state "
            f"of these layers in {where}",
            stacklevel=3,
        )

    def _begin(self) -> None:
        if self._training_only is None:  # else the last training was broken off
            self._training_only = self.sparsifier.training_only
        self.sparsifier.training_only = True

    def _end(self) -> None:
        if self._training_only is not None:
            self.sparsifier.training_only, self._training_only = self._training_only, None

    def _after_step(self, steps: int, *, epoch_over: bool) -> None:
        """After an optimizer step (or several of them at once), `steps` in all; once more at the end of an epoch.

        Checkpoints of an epoch's last step are written before the end of the epoch, which is not repeated on resuming;
        so that step is where the epoch is taken to end. Only one that was broken off has no such step.
        """
        if self.every == "epoch":
            due = epoch_over and steps > self._steps
        else:
            due = steps // self.every > self._steps // self.every
        if due:
            self._step()
            self._steps = steps

    def _after_training(self) -> None:
        if self.squash and self.sparsifier._schedule is None and self._watching():
            if any("data" in config for config in self.sparsifier.data_groups.values()):
                self._step()  # the inputs since the last step have put its masks out of date: they are all ones
            self.sparsifier.squash_mask()

    def _watching(self) -> bool:
        """Whether masks are still to be made; not so once they are squashed."""
        return any(config.get("hook_state") == "aggregate" for config in self.sparsifier.data_groups.values())

    def _step(self) -> None:
        if not self._watching():
            return
        try:
            self.sparsifier.step()
        except LayerError as error:
            asleep = [name for name, config in self.sparsifier.data_groups.items() if not config["layer"].training]
            if not asleep:
                raise
            raise LayerError(
                f"{error}. While training, only layers in training mode are looked at, and {', '.join(asleep)} are in "
                "eval mode: call train() on the model"
            ) from error
