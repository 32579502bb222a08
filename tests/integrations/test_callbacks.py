from __future__ import annotations

import importlib
import logging
import sys
import warnings

import pytest
import torch
from conftest import tiny_batches, tiny_model
from torch import nn

from deadband.integrations.trainer import FILE, SparsifierTrainerCallback
from deadband.masks import aggregate, mask, reduce
from deadband.masks.schedule import Schedule
from deadband.masks.sparsifier import ActivationSparsifier, LayerError

ROWS, WIDTH, CLASSES = 20, 32, 3
BATCH = 4  # 5 batches an epoch


def data():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(ROWS, 8, generator=generator)
    return x, (x[:, 0] > 0).long() + (x[:, 1] > 0).long()


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, WIDTH), nn.ReLU(), nn.Linear(WIDTH, CLASSES))


class Recorder(ActivationSparsifier):
    """Writes down how many rows were seen before each step, and how sparse the mask is after it."""

    def step(self):
        if not hasattr(self, "rows"):
            self.rows, self.sparsities = [], []
        self.rows.append(next(iter(self.data_groups.values())).get("rows", 0))
        super().step()
        self.sparsities.append(1 - self.get_mask(self.layer).float().mean().item())


def sparsifier_of(model, layer, **schedule):
    sparsifier = Recorder(model, aggregate.mean_abs, reduce.mean, mask.magnitude, sparsity=0.25)
    sparsifier.register_layer(model.get_submodule(layer))
    sparsifier.layer = layer
    if schedule:
        sparsifier.schedule(**schedule)
    return sparsifier


def squashed(sparsifier):
    return all(config["hook_state"] == "sparsify" for config in sparsifier.data_groups.values())


def assert_same(one, other):
    """Two models with their sparsifiers: the same weights, masks, and schedule."""
    (model, sparsifier), (other_model, other_sparsifier) = one, other
    state, other_state = model.state_dict(), other_model.state_dict()
    assert state.keys() == other_state.keys()
    for name, tensor in state.items():
        assert torch.equal(tensor, other_state[name]), name
    assert torch.equal(sparsifier.get_mask(sparsifier.layer), other_sparsifier.get_mask(sparsifier.layer))
    schedules = [each.state_dict(portable=True)["schedule"] for each in (sparsifier, other_sparsifier)]
    assert schedules[0] == schedules[1]
    assert squashed(sparsifier) == squashed(other_sparsifier)


@pytest.mark.parametrize("every", [0, -1, 1.0, True, "epochs", None])
def test_bad_every_is_refused(every):
    with pytest.raises(ValueError, match=r"every=.*; expected a number of optimizer steps of at least 1, or 'epoch'"):
        SparsifierTrainerCallback(sparsifier_of(net(), "2"), every=every)


# ------------------------------------------------------------------------------------------------------- transformers


class Classifier(nn.Module):
    _keys_to_ignore_on_save = None  # Trainer looks at it where the model has a buffer that the checkpoint lacks

    def __init__(self):
        super().__init__()
        self.net = net()

    def forward(self, x, labels=None):
        logits = self.net(x)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


class Trainer:
    """transformers' Trainer on a fresh model, with a sparsifier."""

    def __init__(self, folder, *, every=1, squash=True, schedule=None, callbacks=(), **arguments):
        import transformers

        self.model = Classifier()
        self.sparsifier = sparsifier_of(self.model, "net.2", **(schedule or {}))
        examples = [{"x": x, "labels": label} for x, label in zip(*data(), strict=True)]
        defaults = {
            "per_device_train_batch_size": BATCH, "num_train_epochs": 2, "learning_rate": 0.05, "save_strategy": "no",
            "logging_strategy": "no", "report_to": "none", "disable_tqdm": True, "use_cpu": True,
        }  # fmt: skip
        callback = SparsifierTrainerCallback(self.sparsifier, every=every, squash=squash)
        self.trainer = transformers.Trainer(
            model=self.model,
            args=transformers.TrainingArguments(output_dir=str(folder), **{**defaults, **arguments}),
            train_dataset=examples,
            eval_dataset=examples[:7],
            callbacks=[callback, *callbacks],
        )

    def train(self, resume=None):
        self.trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
        return self.model, self.sparsifier


@pytest.mark.parametrize(
    ("every", "rows"),
    [(1, [8, 8, 4, 8, 8, 4]), (2, [16, 12, 12]), (4, [28, 12]), (100, [40]), ("epoch", [20, 20])],
)
def test_trainer_counts_optimizer_steps_and_not_evaluation(tmp_path, every, rows):
    trainer = Trainer(tmp_path, every=every, gradient_accumulation_steps=2, eval_strategy="steps", eval_steps=1)
    model, sparsifier = trainer.train()
    assert sparsifier.rows == rows
    assert not sparsifier.training_only
    assert squashed(sparsifier)
    assert sparsifier.get_mask("net.2").sum() == WIDTH * 3 // 4
    assert model.net[2].activation_mask.sum() == WIDTH * 3 // 4


def test_trainer_steps_at_the_end_of_an_epoch_that_is_broken_off(tmp_path):
    _, sparsifier = Trainer(tmp_path, every="epoch", max_steps=7).train()
    assert sparsifier.rows == [20, 8]


def test_trainer_can_leave_the_masks_to_squash(tmp_path):
    model, sparsifier = Trainer(tmp_path, squash=False).train()
    assert not squashed(sparsifier)
    assert not hasattr(model.net[2], "activation_mask")
    assert sparsifier.get_mask("net.2").sum() == WIDTH * 3 // 4


def test_trainer_follows_the_schedule(tmp_path):
    schedule = {"sparsity": 0.5, "steps": 6, "begin": 1}
    _, sparsifier = Trainer(tmp_path, schedule=schedule).train()
    expected = [Schedule(**schedule).at(step) for step in range(10)]
    assert sparsifier.sparsities == pytest.approx(expected[:8], abs=1 / WIDTH)  # and then it is over
    assert sparsifier.sparsities[-1] == 0.5
    assert squashed(sparsifier)


def test_trainer_does_nothing_once_masks_are_squashed(tmp_path):
    trainer = Trainer(tmp_path)
    trainer.model.net(data()[0])
    trainer.sparsifier.step()
    trainer.sparsifier.squash_mask()
    before = trainer.sparsifier.get_mask("net.2").clone()
    _, sparsifier = trainer.train()
    assert len(sparsifier.rows) == 1
    assert torch.equal(sparsifier.get_mask("net.2"), before)


def test_trainer_names_a_layer_that_nothing_reaches(tmp_path):
    trainer = Trainer(tmp_path)
    trainer.model.unused = nn.Linear(4, 4)
    trainer.sparsifier.register_layer(trainer.model.unused)
    with pytest.raises(LayerError, match="no input has reached 'unused'"):
        trainer.train()
    assert trainer.trainer.state.global_step == 1


RESUMED = [
    {"every": 1},
    {"every": 3},
    {"every": "epoch"},
    {"every": 1, "schedule": {"sparsity": 0.5, "steps": 7}},
    {"every": 2, "schedule": {"sparsity": 0.5, "steps": 4, "curve": "linear", "every": 2}},
    {"every": "epoch", "schedule": {"sparsity": 0.5, "steps": 1}},
]


@pytest.mark.slow
@pytest.mark.parametrize("options", RESUMED, ids=str)
def test_trainer_resumes(tmp_path, options):
    options = {"num_train_epochs": 3, "save_strategy": "steps", "save_steps": 1, **options}
    whole = Trainer(tmp_path, **options).train()
    for steps in (3, 5, 8, 10, 15):  # within an epoch, at its end, with masks in force, when squashed, when all is done
        assert (tmp_path / f"checkpoint-{steps}" / FILE).is_file()
        resumed = Trainer(tmp_path, **options)
        resumed.model.net[0].weight.data.zero_()  # comes from the checkpoint
        assert_same(resumed.train(tmp_path / f"checkpoint-{steps}"), whole)


def test_trainer_resumes_in_the_same_process(tmp_path):
    trainer = Trainer(tmp_path, save_strategy="steps", save_steps=1, schedule={"sparsity": 0.5, "steps": 8, "begin": 3})
    trainer.train()
    before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    trainer.train(tmp_path / "checkpoint-2")  # when no masks were in force
    assert all(torch.equal(tensor, before[name]) for name, tensor in trainer.model.state_dict().items())


def test_trainer_resumes_a_pretrained_model(tmp_path):
    import transformers

    def train(folder, resume=None):
        model = tiny_model("llama")
        sparsifier = sparsifier_of(model, "model.layers.1.mlp.down_proj", sparsity=0.5, steps=3)
        arguments = transformers.TrainingArguments(
            str(folder), per_device_train_batch_size=2, num_train_epochs=1, save_steps=1, report_to="none",
            use_cpu=True, disable_tqdm=True, logging_strategy="no", resume_from_checkpoint=resume,
        )  # fmt: skip
        rows = torch.cat([batch["input_ids"] for batch in tiny_batches(6)])
        examples = [{"input_ids": row, "labels": row} for row in rows]
        callback = SparsifierTrainerCallback(sparsifier)
        transformers.Trainer(model, arguments, train_dataset=examples, callbacks=[callback]).train(resume)
        return model, sparsifier

    whole = train(tmp_path / "a")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert_same(train(tmp_path / "b", str(tmp_path / "a" / "checkpoint-2")), whole)  # from another folder


def test_trainer_warns_of_a_checkpoint_without_masks(tmp_path):
    trainer = Trainer(tmp_path, save_strategy="steps", save_steps=4)
    trainer.train()
    (tmp_path / "checkpoint-4" / FILE).unlink()
    with pytest.warns(UserWarning, match=rf"there is no {FILE} in .*checkpoint-4"):
        Trainer(tmp_path).train(tmp_path / "checkpoint-4")


def test_trainer_brings_back_the_masks_of_the_best_model(tmp_path):
    trainer = Trainer(
        tmp_path, schedule={"sparsity": 0.75, "steps": 9}, save_strategy="steps", save_steps=1, eval_strategy="steps",
        eval_steps=1, load_best_model_at_end=True, metric_for_best_model="eval_loss", greater_is_better=True,
    )  # fmt: skip
    model, sparsifier = trainer.train()
    best = trainer.trainer.state.best_model_checkpoint
    assert not best.endswith("-10")
    other = ActivationSparsifier(Classifier())
    other.load(f"{best}/{FILE}")
    assert torch.equal(other.get_mask("net.2"), sparsifier.get_mask("net.2"))
    assert torch.equal(other.get_mask("net.2"), model.net[2].activation_mask)
    assert not squashed(sparsifier)
    assert not sparsifier.training_only


PAIRS = {
    "other layers": (("net.0", {"sparsity": 0.25}), ("net.2", {"sparsity": 0.75})),
    "the same layer": (("net.2", {"sparsity": 0.25}), ("net.2", {"sparsity": 0.75})),
    "three, one scheduled": (
        ("net.2", {"sparsity": 0.25}), ("net.0", {"sparsity": 0.5}),
        ("net.2", {"schedule": {"sparsity": 0.5, "steps": 4, "begin": 1}}),
    ),
}  # fmt: skip


def several(model, pair, callback_class, **options):
    """One sparsifier with a callback of its own for each entry."""
    callbacks = []
    for layer, given in pair:
        sparsifier = sparsifier_of(model, layer, **given.get("schedule", {}))
        if "sparsity" in given:
            sparsifier.data_groups[layer]["sparse_config"]["sparsity"] = given["sparsity"]
        callbacks.append(callback_class(sparsifier, **options))
    return callbacks


def masks_of(callbacks):
    return [callback.sparsifier.get_mask(callback.sparsifier.layer).clone() for callback in callbacks]


def assert_restored(callbacks, masks, states):
    for callback, expected, state in zip(callbacks, masks, states, strict=True):
        sparsifier = callback.sparsifier
        assert list(sparsifier.data_groups) == [sparsifier.layer]
        assert torch.equal(sparsifier.get_mask(sparsifier.layer), expected)
        found = sparsifier.state_dict(portable=True)
        assert (found["groups"], found["schedule"]) == (state["groups"], state["schedule"])


@pytest.mark.parametrize("pair", PAIRS.values(), ids=PAIRS)
@pytest.mark.parametrize("swapped", [False, True])
def test_several_callbacks_in_one_trainer(tmp_path, pair, swapped):
    def run(pair, resume=None, **arguments):
        trainer = Trainer(tmp_path, save_strategy="steps", save_steps=10, **arguments)
        trainer.trainer.pop_callback(SparsifierTrainerCallback)
        callbacks = several(trainer.model, pair, SparsifierTrainerCallback)
        for callback in callbacks:
            trainer.trainer.add_callback(callback)
        trainer.train(resume)
        return callbacks

    first = run(pair)
    expected, states = masks_of(first), [each.sparsifier.state_dict(portable=True) for each in first]
    files = sorted(path.name for path in (tmp_path / "checkpoint-10").glob("sparsifier*"))
    assert files == sorted([FILE, *(f"sparsifier-{number}.safetensors" for number in range(2, len(pair) + 1))])
    order = [1, 0, *range(2, len(pair))] if swapped and pair[0][0] != pair[1][0] else list(range(len(pair)))
    again = run([pair[each] for each in order], tmp_path / "checkpoint-10")  # nothing is left to train
    assert_restored(again, [expected[each] for each in order], [states[each] for each in order])


def test_trainer_warns_where_a_callback_finds_no_state_of_its_layers(tmp_path):
    trainer = Trainer(tmp_path, save_strategy="steps", save_steps=4)
    trainer.train()
    trainer = Trainer(tmp_path)
    other = several(trainer.model, [("net.0", {"sparsity": 0.5})], SparsifierTrainerCallback)[0]
    trainer.trainer.add_callback(other)
    with pytest.warns(UserWarning, match=r"masks of 'net.0' stay as they are: there is no state of these layers .*-4"):
        trainer.train(tmp_path / "checkpoint-4")


def test_trainer_callback_after_training_was_broken_off(tmp_path):
    import transformers

    class Break(transformers.TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 2:
                raise KeyboardInterrupt

    trainer = Trainer(tmp_path, callbacks=[callback := Break()])
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    trainer.trainer.remove_callback(callback)
    _, sparsifier = trainer.train()
    assert not sparsifier.training_only
    assert squashed(sparsifier)


# ---------------------------------------------------------------------------------------------------------- Lightning


@pytest.fixture
def lightning():
    pytest.importorskip("lightning")
    for name in ("lightning.pytorch", "lightning.fabric", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="lightning")
        yield importlib.import_module("lightning.pytorch")


class Fit:
    """Lightning's Trainer on a fresh model, with a sparsifier."""

    def __init__(self, lightning, folder, *, every=1, squash=True, schedule=None, callbacks=(), **arguments):
        from deadband.integrations.lightning import SparsifierLightningCallback

        class Module(lightning.LightningModule):
            def __init__(self):
                super().__init__()
                self.net = net()
                self.breaks_at = None

            def training_step(self, batch, index):
                if self.global_step == self.breaks_at:
                    raise RuntimeError("broken off")
                return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

            def validation_step(self, batch, index):
                self.log("loss", nn.functional.cross_entropy(self.net(batch[0]), batch[1]))

            test_step = validation_step

            def configure_optimizers(self):
                return torch.optim.AdamW(self.parameters(), 0.05)

        self.model = Module()
        self.sparsifier = sparsifier_of(self.model, "net.2", **(schedule or {}))
        self.loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*data()), BATCH)
        defaults = {
            "max_epochs": 2, "accelerator": "cpu", "logger": False, "enable_checkpointing": False, "devices": 1,
            "enable_progress_bar": False, "enable_model_summary": False, "default_root_dir": folder,
        }  # fmt: skip
        self.callback = SparsifierLightningCallback(self.sparsifier, every=every, squash=squash)
        self.trainer = lightning.Trainer(callbacks=[self.callback, *callbacks], **{**defaults, **arguments})

    def fit(self, checkpoint=None, **arguments):
        self.trainer.fit(self.model, self.loader, self.loader, ckpt_path=checkpoint, **arguments)
        return self.model, self.sparsifier


def test_bad_every_is_refused_by_lightning_callback(lightning):
    from deadband.integrations.lightning import SparsifierLightningCallback

    with pytest.raises(ValueError, match="every=0; expected"):
        SparsifierLightningCallback(sparsifier_of(net(), "2"), every=0)


@pytest.mark.parametrize(
    ("every", "rows"),
    [(1, [8, 8, 4, 8, 8, 4]), (2, [16, 12, 12]), (4, [28, 12]), (100, [40]), ("epoch", [20, 20])],
)
def test_lightning_counts_optimizer_steps_and_not_validation(lightning, tmp_path, every, rows):
    fit = Fit(lightning, tmp_path, every=every, accumulate_grad_batches=2, val_check_interval=1)
    model, sparsifier = fit.fit()
    assert sparsifier.rows == rows
    assert not sparsifier.training_only
    assert squashed(sparsifier)
    assert model.net[2].activation_mask.sum() == WIDTH * 3 // 4
    assert "on_load_checkpoint" not in vars(model)


def test_lightning_steps_once_a_batch_with_two_optimizers(lightning, tmp_path):
    fit = Fit(lightning, tmp_path, every=3)

    def training_step(batch, batch_idx):
        for optimizer in fit.model.optimizers():
            optimizer.zero_grad()
            nn.functional.cross_entropy(fit.model.net(batch[0]), batch[1]).backward()
            optimizer.step()

    fit.model.automatic_optimization = False
    fit.model.training_step = training_step
    fit.model.configure_optimizers = lambda: [torch.optim.SGD(fit.model.net[i].parameters(), 0.1) for i in (0, 2)]
    _, sparsifier = fit.fit()
    assert sparsifier.rows == [16, 8, 16, 8, 16, 8, 8]  # steps 4, 6, 10, 12, 16, 18, and at the end, 20


@pytest.mark.parametrize("limit", [{"max_steps": 7}, {"limit_train_batches": 3, "max_epochs": 2}])
def test_lightning_steps_at_the_end_of_epochs_that_are_shorter(lightning, tmp_path, limit):
    _, sparsifier = Fit(lightning, tmp_path, every="epoch", **limit).fit()
    assert sparsifier.rows == ([20, 8] if "max_steps" in limit else [12, 12])


def test_lightning_follows_the_schedule(lightning, tmp_path):
    schedule = {"sparsity": 0.5, "steps": 6, "begin": 1}
    _, sparsifier = Fit(lightning, tmp_path, schedule=schedule).fit()
    expected = [Schedule(**schedule).at(step) for step in range(10)]
    assert sparsifier.sparsities == pytest.approx(expected[:8], abs=1 / WIDTH)
    assert squashed(sparsifier)


@pytest.mark.parametrize("options", RESUMED, ids=str)
@pytest.mark.parametrize("when", ["step", "epoch", "validation"])
def test_lightning_resumes(lightning, tmp_path, options, when):
    moments = {
        "step": {"every_n_train_steps": 1},
        "epoch": {"every_n_epochs": 1, "save_on_train_epoch_end": True},
        "validation": {"every_n_epochs": 1, "save_on_train_epoch_end": False},
    }

    def fit():
        saving = lightning.callbacks.ModelCheckpoint(tmp_path, filename="{step}", save_top_k=-1, **moments[when])
        return Fit(lightning, tmp_path, max_epochs=3, callbacks=[saving], enable_checkpointing=True, **options)

    whole = fit().fit()
    # within an epoch the data do not continue (a plain DataLoader does not know where it was), so nor do the weights
    for steps in (5, 10):
        resumed = fit()
        resumed.model.net[0].weight.data.zero_()
        assert_same(resumed.fit(tmp_path / f"step={steps}.ckpt", weights_only=True), whole)
        assert not resumed.sparsifier.training_only
        assert "on_load_checkpoint" not in vars(resumed.model)


def test_lightning_tests_a_checkpoint_with_its_own_masks(lightning, tmp_path):
    saving = lightning.callbacks.ModelCheckpoint(tmp_path, filename="{step}", save_top_k=-1, every_n_train_steps=1)
    schedule = {"sparsity": 0.5, "steps": 8, "begin": 3}
    fit = Fit(lightning, tmp_path, callbacks=[saving], enable_checkpointing=True, schedule=schedule)
    model, sparsifier = fit.fit()
    for steps in (10, 6, 2, 8):  # the masks of 2 were not in force yet
        path = tmp_path / f"step={steps}.ckpt"
        fit.trainer.test(fit.model, fit.loader, ckpt_path=path, verbose=False)
        saved = torch.load(path, weights_only=True)["state_dict"]
        assert saved.keys() == model.state_dict().keys()
        assert all(torch.equal(tensor, saved[name]) for name, tensor in model.state_dict().items())
        kept = saved.get("net.2.activation_mask", torch.ones(WIDTH, dtype=torch.bool))
        assert torch.equal(sparsifier.get_mask("net.2"), kept)
        assert "on_load_checkpoint" not in vars(model)
        assert not sparsifier.training_only


def test_lightning_module_still_sees_the_checkpoint(lightning, tmp_path):
    saving = lightning.callbacks.ModelCheckpoint(tmp_path, filename="{step}", save_top_k=-1, every_n_train_steps=1)
    fit = Fit(lightning, tmp_path, callbacks=[saving], enable_checkpointing=True)
    seen = []
    type(fit.model).on_load_checkpoint = lambda self, checkpoint: seen.append(checkpoint["global_step"])
    fit.fit()
    fit.trainer.test(fit.model, fit.loader, ckpt_path=tmp_path / "step=4.ckpt", verbose=False)
    assert seen == [4]


@pytest.mark.parametrize("pair", PAIRS.values(), ids=PAIRS)
@pytest.mark.parametrize("swapped", [False, True])
def test_several_callbacks_in_one_lightning_trainer(lightning, tmp_path, pair, swapped):
    from deadband.integrations.lightning import SparsifierLightningCallback

    def prepare(pair, max_epochs):
        fit = Fit(lightning, tmp_path)
        callbacks = several(fit.model, pair, SparsifierLightningCallback)
        defaults = {
            "accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False,
            "enable_checkpointing": False, "default_root_dir": tmp_path,
        }  # fmt: skip
        fit.trainer = lightning.Trainer(callbacks=callbacks, max_epochs=max_epochs, **defaults)
        return fit, callbacks

    fit, first = prepare(pair, 2)
    model, _ = fit.fit()
    path = tmp_path / "several.ckpt"
    fit.trainer.save_checkpoint(path)
    expected, states = masks_of(first), [each.sparsifier.state_dict(portable=True) for each in first]
    assert len(torch.load(path, weights_only=True)["callbacks"]) == len(pair)
    order = [1, 0, *range(2, len(pair))] if swapped and pair[0][0] != pair[1][0] else list(range(len(pair)))
    for run in ("fit", "test"):
        fit, again = prepare([pair[each] for each in order], 2)
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*callbacks used to create the checkpoint")
            if run == "fit":
                fit.fit(path, weights_only=True)
            else:
                fit.trainer.test(fit.model, fit.loader, ckpt_path=path, verbose=False, weights_only=True)
        assert_restored(again, [expected[each] for each in order], [states[each] for each in order])
        assert fit.model.state_dict().keys() == model.state_dict().keys()
        assert len({each.state_key for each in again}) == len(pair)
        assert "on_load_checkpoint" not in vars(fit.model)


def test_lightning_warns_where_a_callback_finds_no_state_of_its_layers(lightning, tmp_path):
    from deadband.integrations.lightning import SparsifierLightningCallback

    fit = Fit(lightning, tmp_path)
    fit.fit()
    fit.trainer.save_checkpoint(tmp_path / "x.ckpt")
    fit = Fit(lightning, tmp_path)
    other = several(fit.model, [("net.0", {"sparsity": 0.5})], SparsifierLightningCallback)
    fit.trainer.callbacks += other
    with pytest.warns(UserWarning, match="masks of 'net.0' stay as they are: .* in the checkpoint"):
        fit.trainer.test(fit.model, fit.loader, ckpt_path=tmp_path / "x.ckpt", verbose=False, weights_only=True)


def test_a_module_with_its_own_way_to_load_keeps_it(lightning, tmp_path):
    fit = Fit(lightning, tmp_path)
    seen = []
    fit.model.on_load_checkpoint = own = seen.append
    fit.fit()
    fit.trainer.save_checkpoint(tmp_path / "x.ckpt")
    assert fit.model.on_load_checkpoint is own
    fit.trainer.test(fit.model, fit.loader, ckpt_path=tmp_path / "x.ckpt", verbose=False, weights_only=True)
    assert len(seen) == 1
    assert fit.model.on_load_checkpoint is own


def test_lightning_callback_after_training_was_broken_off(lightning, tmp_path):
    fit = Fit(lightning, tmp_path)
    fit.model.breaks_at = 3
    with pytest.raises(RuntimeError, match="broken off"):
        fit.fit()
    assert not fit.sparsifier.training_only
    assert "on_load_checkpoint" not in vars(fit.model)
    assert len(fit.sparsifier.rows) == 3


def test_lightning_says_that_layers_in_eval_mode_are_not_looked_at(lightning, tmp_path):
    fit = Fit(lightning, tmp_path)
    fit.model.net.eval()  # as from_pretrained leaves models; Lightning trains them so
    with pytest.raises(LayerError, match=r"no input has reached 'net.2'.*net.2 are in eval mode: call train\(\)"):
        fit.fit()


def test_lightning_package_in_use_comes_first(lightning, monkeypatch):
    import deadband.integrations.lightning as module

    imported = []

    def missing(name):
        imported.append(name)
        raise ModuleNotFoundError(name, name=name)

    monkeypatch.setattr(module.importlib, "import_module", missing)
    with pytest.raises(ImportError, match="pip install lightning"):
        module._lightning()
    assert imported == ["lightning.pytorch", "pytorch_lightning"]
    monkeypatch.setitem(sys.modules, "pytorch_lightning", lightning)
    monkeypatch.delitem(sys.modules, "lightning.pytorch")
    with pytest.raises(ImportError, match="pip install lightning"):
        module._lightning()
    assert imported[2:] == ["pytorch_lightning", "lightning.pytorch"]


def test_lightning_that_is_broken_is_not_called_missing(lightning, monkeypatch):
    import deadband.integrations.lightning as module

    def broken(name):
        raise ModuleNotFoundError("torchmetrics", name="torchmetrics")

    monkeypatch.setattr(module.importlib, "import_module", broken)
    with pytest.raises(ModuleNotFoundError, match="torchmetrics"):
        module._lightning()
