"""An ActivationSparsifier in Lightning's Trainer."""

from __future__ import annotations

import importlib
import sys
from typing import Any

from deadband.integrations.stepping import SteppingCallback
from deadband.masks.portable import FORMAT


def _lightning() -> Any:
    """`lightning.pytorch` or `pytorch_lightning`: the one in use, as neither takes callbacks made for the other."""
    for name in sorted(("lightning.pytorch", "pytorch_lightning"), key=lambda name: name not in sys.modules):
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name not in (name, name.partition(".")[0]):
                raise  # Lightning is there, but something that it needs is not
    raise ImportError("SparsifierLightningCallback needs Lightning: pip install lightning")


_Callback: Any = _lightning().Callback


class SparsifierLightningCallback(SteppingCallback, _Callback):
    """Calls `sparsifier.step()` while Lightning's Trainer trains; what validation feeds the model does not count.

    With a `sparsifier.schedule(...)`, masks come into force and are squashed as it says. Without one, masks are made at
    each call, and squashed at the end of training. Once they are squashed, nothing happens any more.

    Checkpoints hold `sparsifier.state_dict(portable=True)` among the states of callbacks. Wherever the Trainer is given
    a `ckpt_path`, the sparsifier takes it over before the model's weights are loaded, which hold the masks as buffers.
    (Weights alone, saved with `save_weights_only` or read with `load_from_checkpoint`, need a model whose masks are in
    force already.)

    A Trainer may have several of these callbacks, each with a sparsifier of its own: a checkpoint gives each the state
    of its layers back and, where several have the same layers, in the order of the callbacks.

    Its arguments are those of `SteppingCallback`.

    Example:
        >>> from torch import nn
        >>> from deadband import ActivationSparsifier, aggregate, mask, reduce
        >>> module = nn.Sequential(nn.Linear(4, 10), nn.ReLU(), nn.Linear(10, 2))  # a LightningModule, really
        >>> sparsifier = ActivationSparsifier(module, aggregate.mean_abs, reduce.mean, mask.magnitude)
        >>> sparsifier.register_layer(module[2])
        >>> sparsifier.schedule(0.5, steps=20)
        >>> callback = SparsifierLightningCallback(sparsifier, every="epoch")  # at its final sparsity after 21 epochs
        >>> # lightning.Trainer(max_epochs=30, callbacks=[callback]).fit(module, data)
    """

    # Lightning loads callbacks after the model, strictly, for which the buffers of the masks have to be there; the only
    # one to see the checkpoint earlier is the module itself. `state_dict` is left alone, as Lightning asks callbacks
    # that have it for a key of their own before they can know each other.
    _hooked: tuple[Any, dict[str, Any]] | None = None  # the module whose on_load_checkpoint is ours, and what it had

    @property
    def state_key(self) -> str:
        """The name of the state in checkpoints."""
        layers = self._layers()
        number = sum(each._layers() == layers for each in self._peers[: self._number()])
        return self._generate_state_key(layers=layers, **{"number": number} if number else {})

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """See to it that the masks of a checkpoint are restored before its weights."""
        self._unhook()
        self._peers = [each for each in trainer.callbacks if isinstance(each, SparsifierLightningCallback)]
        if self._peers[0] is not self:  # the first does it for all
            return
        theirs, had = pl_module.on_load_checkpoint, vars(pl_module)

        def on_load_checkpoint(checkpoint: dict[str, Any]) -> None:
            saved = checkpoint.get("callbacks", {}).values()
            states = [state for state in saved if isinstance(state, dict) and state.get("format") == FORMAT]
            for each in self._peers if states else ():
                each._restore(states, "the checkpoint")
            theirs(checkpoint)

        self._hooked = pl_module, {name: had[name] for name in ("on_load_checkpoint",) if name in had}
        pl_module.on_load_checkpoint = on_load_checkpoint

    def _unhook(self) -> None:
        if self._hooked is not None:
            module, had = self._hooked
            vars(module).pop("on_load_checkpoint", None)
            vars(module).update(had)
            self._hooked = None

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Put the sparsifier's portable state into the checkpoint."""
        checkpoint["callbacks"][self.state_key] = self.sparsifier.state_dict(portable=True)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take a state out of a checkpoint over."""
        self.sparsifier.load_state_dict(state_dict)

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Look at training only: the first validation comes before `on_train_start`."""
        self._begin()

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Begin to count, at the step that a checkpoint was taken at."""
        self._unhook()
        self._steps = trainer.global_step

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """After a batch, which may have been an optimizer step; before validation and saving."""
        self._after_step(trainer.global_step, epoch_over=trainer.is_last_batch)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """At the end of an epoch."""
        self._after_step(trainer.global_step, epoch_over=True)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Squash, unless a schedule does it."""
        self._after_training()

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        """Look at all inputs again."""
        self._end()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Look at all inputs again; Lightning calls neither `on_fit_end` nor `teardown` then."""
        self._unhook()
        self._end()

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Leave the module as it was."""
        self._unhook()
