"""An ActivationSparsifier in transformers' Trainer."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from deadband.integrations.stepping import SteppingCallback
from deadband.masks.portable import load

FILE = "sparsifier.safetensors"
"""What is written into each checkpoint folder of Trainer; by a second callback, `sparsifier-2.safetensors`."""
_PEERS = "_sparsifier_callbacks"  # an attribute of the state of one training, which all callbacks are given


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

    Its arguments are those of `SteppingCallback`.

    Example:
        >>> from torch import nn
        >>> from deadband import ActivationSparsifier, aggregate, mask, reduce
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
