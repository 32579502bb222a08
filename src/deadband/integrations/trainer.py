"""An ActivationSparsifier in transformers' Trainer; and what the callbacks of all frameworks have in common."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from deadband.masks.layers import bare_name, some
from deadband.masks.portable import load
from deadband.masks.sparsifier import ActivationSparsifier, LayerError

FILE = "sparsifier.safetensors"
"""What is written into each checkpoint folder of Trainer; by a second callback, `sparsifier-2.safetensors`."""
_PEERS = "_sparsifier_callbacks"  # an attribute of the state of one training, which all callbacks are given


class SteppingCallback:
    """When a training loop calls `sparsifier.step()`, and what it leaves behind; the base of the callbacks.

    Attributes:
        sparsifier: whose masks are made.
        every: optimizer steps between two calls, or "epoch".
        squash: whether to squash the masks at the end of training, if no schedule does it.
    """

    def __init__(
        self, sparsifier: ActivationSparsifier, *, every: int | Literal["epoch"] = 1, squash: bool = True
    ) -> None:
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


class SparsifierTrainerCallback(SteppingCallback, TrainerCallback):
    """Calls `sparsifier.step()` while transformers' Trainer trains; what evaluation feeds the model does not count.

    With a `sparsifier.schedule(...)`, masks come into force and are squashed as it says. Without one, masks are made at
    each call, and squashed at the end of training. Once they are squashed, nothing happens any more.

    Each checkpoint gets a file `sparsifier.safetensors`. Training that resumes takes it from
    `args.resume_from_checkpoint`, if that is a path, or from `args.output_dir`; and with `load_best_model_at_end`, the
    masks of the best model come back with its weights. (Trainer may warn of unexpected keys `...activation_mask`: it
    loads the model before this callback can bring the masks.)

    A Trainer may have several of these callbacks, each with a sparsifier of its own (and a file:
    `sparsifier-2.safetensors`): a checkpoint gives each the state of its layers back and, where several have the same
    layers, in the order of the callbacks.

    Args:
        sparsifier: with its layers registered.
        every: optimizer steps between two calls of `step()`; "epoch": at the end of each epoch.
        squash: without a schedule: whether to squash the masks at the end of training, after a last `step()` for what
            was seen since.

    Raises:
        ValueError: `every` is neither a number of at least 1 nor "epoch".
        LayerError: while training: no input has reached a layer since the last step.

    Example:
        >>> from torch import nn
        >>> from deadband import aggregate, mask, reduce
        >>> model = nn.Sequential(nn.Linear(4, 10), nn.ReLU(), nn.Linear(10, 2))
        >>> sparsifier = ActivationSparsifier(model, aggregate.mean_abs, reduce.mean, mask.magnitude)
        >>> sparsifier.register_layer(model[2])
        >>> sparsifier.schedule(0.5, steps=100)
        >>> callback = SparsifierTrainerCallback(sparsifier, every=10)  # at its final sparsity after 1010 steps
        >>> # Trainer(model, args, train_dataset=data, callbacks=[callback]).train()
    """

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Look at training only; where it resumes, go on with the checkpoint's masks."""
        self._peers = vars(state).setdefault(_PEERS, [])
        self._peers.append(self)
        if state.global_step:
            given = args.resume_from_checkpoint
            folders = [Path(given)] if isinstance(given, str) else []
            self._load([*folders, _checkpoint(args, state)])
        self._steps = state.global_step
        self._begin()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """After an optimizer step, and before evaluation and saving."""
        self._after_step(state.global_step, epoch_over=state.epoch is not None and float(state.epoch).is_integer())

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """At the end of an epoch."""
        self._after_step(state.global_step, epoch_over=True)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write the sparsifier beside the model."""
        if args.should_save:  # on the main process
            self.sparsifier.save(_checkpoint(args, state) / _file(self._number()))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Squash, unless a schedule does it, and look at all inputs again."""
        try:
            if args.load_best_model_at_end and state.best_model_checkpoint is not None:
                self._load([Path(state.best_model_checkpoint)])
            self._after_training()
        finally:
            self._end()

    def _load(self, folders: list[Path]) -> None:
        for folder in folders:
            if (folder / FILE).is_file():
                paths = [folder / _file(number) for number in range(len(list(folder.glob(f"{Path(FILE).stem}*"))))]
                self._restore([load(path) for path in paths if path.is_file()], str(folder))
                return
        warnings.warn(
            f"the weights come from a checkpoint, but the masks stay as they are: there is no {FILE} in "
            f"{' or '.join(map(str, folders))}. If the checkpoint is elsewhere, name it in args.resume_from_checkpoint",
            stacklevel=2,
        )


def _file(number: int) -> str:
    return FILE if not number else FILE.replace(".", f"-{number + 1}.")


def _checkpoint(args: TrainingArguments, state: TrainerState) -> Path:
    return Path(str(args.output_dir)) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
