"""Lightning under guard: whole fits of a tiny module, and the settings that it refuses."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset

lightning = pytest.importorskip("lightning.pytorch")

from lightning.pytorch import (  # noqa: E402
    Callback,
    LightningDataModule,
    LightningModule,
    Trainer,
)
from lightning.pytorch.callbacks import (  # noqa: E402
    BatchSizeFinder,
    EarlyStopping,
    GradientAccumulationScheduler,
    LearningRateFinder,
    ModelCheckpoint,
    StochasticWeightAveraging,
    ThroughputMonitor,
)

from finetune import (  # noqa: E402
    NotPoissonSampled,
    RowsMixed,
    SkippedStep,
    TrainingPlan,
    training_run,
)
from finetune.lightning import UnsupportedSetting, fit  # noqa: E402

pytestmark = [
    pytest.mark.usefixtures("one_thread", "in_its_folder"),
    pytest.mark.filterwarnings("ignore:The '.*dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated"),
]
ROWS, NOISELESS, CLIP = 12, 5e-3, 0.5


@pytest.fixture(autouse=True)
def quiet():
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


class Rows(Dataset):
    def __init__(self, events=None):
        generator = torch.Generator().manual_seed(0)
        self.features = torch.randn(ROWS, 5, generator=generator)
        self.labels = torch.randint(0, 3, (ROWS,), generator=generator)
        self.events = [] if events is None else events

    def __len__(self):
        return ROWS

    def __getitem__(self, row):
        self.events.append("rows")
        return self.features[row], self.labels[row]


class Module(LightningModule):
    def __init__(self, run=None, *, scheduled=False):
        super().__init__()
        torch.manual_seed(1)
        self.net = torch.nn.Sequential(
            torch.nn.Linear(5, 7), torch.nn.Tanh(), torch.nn.Linear(7, 3)
        )
        self.run, self.scheduled, self.parts = run, scheduled, 0

    def on_train_start(self):
        self.parts = 0  # and not those of the trial before

    def training_step(self, batch):
        self.parts += 1
        return torch.nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=1.0)
        if not self.scheduled:
            return optimizer
        linear = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=10)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": linear, "interval": "step"}}


class Validated(Module):
    def validation_step(self, batch):
        self.log("val_loss", torch.nn.functional.cross_entropy(self.net(batch[0]), batch[1]))


def trainer(**changes):
    values = {
        "accelerator": "cpu",
        "max_epochs": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return Trainer(**(values | changes))


def plan(**changes):
    values = {
        "noise_multiplier": NOISELESS,
        "sampling_probability": 1.0,
        "steps": 2,
        "expected_batch_size": ROWS,
        "max_grad_norm": CLIP,
    }
    return TrainingPlan(**(values | changes))


def weights(model):
    return torch.cat([part.detach().flatten() for part in model.parameters()])


def marks(accountant):
    return sum(each.uses for each in accountant.statement("b").activities)


def by_hand(steps=2, max_grad_norm=CLIP):
    """Return the weights after clipped steps without noise, one row at a time."""
    model, rows = Module(), Rows()
    for _ in range(steps):
        total = [torch.zeros_like(part) for part in model.parameters()]
        for features, label in zip(rows.features, rows.labels, strict=True):
            loss = torch.nn.functional.cross_entropy(model.net(features[None]), label[None])
            gradients = torch.autograd.grad(loss, list(model.parameters()))
            norm = torch.cat([part.flatten() for part in gradients]).norm()
            for summed, gradient in zip(total, gradients, strict=True):
                summed.add_(gradient * min(1.0, max_grad_norm / norm))
        with torch.no_grad():
            for weight, summed in zip(model.parameters(), total, strict=True):
                weight.sub_(summed / ROWS)
    return weights(model)


def close(one, other):
    return torch.allclose(one, other, atol=6 * NOISELESS * CLIP / ROWS * 2)


@pytest.mark.parametrize("mode", ["hooks", "ghost"])
@pytest.mark.parametrize(("physical", "parts"), [(None, 2), (5, 6)])
def test_a_step_is_the_sum_of_clipped_gradients_of_rows(accountant, mode, physical, parts):
    used = trainer(max_epochs=9)
    with training_run(accountant, "b", plan(), unit="row") as run:
        module = Module(run)
        fit(used, run, module, DataLoader(Rows()), physical=physical, mode=mode)
        assert run.remaining == 0
    assert used.global_step == marks(accountant) == 2
    assert module.parts == parts
    assert close(weights(module), by_hand())
    assert not close(weights(module), by_hand(max_grad_norm=0.8 * CLIP))  # it would be seen


def watched(run, events):
    """Note marks and updates; return how to stop."""
    mark = run.reservation.mark

    def marked():
        mark()
        events.append("mark")

    run.reservation.mark = marked
    return register_optimizer_step_post_hook(lambda *_: events.append("update")).remove


def paid_before(events):
    """Whether each sample is read after a mark of its own, if not empty, and updated with once."""
    steps = "".join(event[0] for event in events).split("u")
    return steps.pop() == "" and all(
        step.startswith("m") and step.count("m") == 1 for step in steps
    )


def test_each_sample_is_marked_before_it_is_read(accountant):
    events, used = [], trainer(num_sanity_val_steps=1)
    asked = plan(sampling_probability=0.6, steps=9)
    with training_run(accountant, "b", asked, unit="row") as run:
        stop = watched(run, events)
        fit(used, run, Validated(), DataLoader(Rows(events)), DataLoader(Rows()), physical=3)
        stop()
    assert events[0] == "rows"  # one row, for its form
    assert paid_before(events[1:])
    assert events.count("update") == events.count("mark") == marks(accountant) == 9
    assert used.global_step == 9  # and no number of parts, which is private
    assert used.callback_metrics["val_loss"] > 0


def test_control_a_callback_pays_too_late(accountant):
    class Pays(Callback):
        def on_train_batch_end(self, *_):
            run.reservation.mark()

    events = []
    with training_run(accountant, "b", plan(steps=3), unit="row") as run:
        stop = watched(run, events)
        loader = DataLoader(Rows(events), batch_size=4)
        trainer(callbacks=[Pays()]).fit(Module(), loader)
        stop()
    assert events.count("update") == events.count("mark") == 3
    assert not paid_before(events)


@pytest.mark.parametrize("mode", ["hooks", "ghost"])
def test_samples_without_rows_move_nothing_but_by_noise(accountant, mode):
    asked = plan(sampling_probability=1e-9, steps=3)
    with training_run(accountant, "b", asked, unit="row") as run:
        module = Module(run)
        before = weights(module)
        fit(trainer(), run, module, DataLoader(Rows()), mode=mode)
    assert marks(accountant) == 3
    assert close(weights(module), before)
    assert not torch.equal(weights(module), before)


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"accumulate_grad_batches": 2}, "accumulate_grad_batches"),
        ({"gradient_clip_val": 1.0}, "gradient_clip_val"),
        ({"precision": "bf16-mixed"}, "precision"),
        ({"precision": "bf16-true"}, "precision"),
        ({"devices": 2}, "num_devices"),
        ({"overfit_batches": 1}, "overfit_batches"),
        ({"strategy": "ddp"}, "strategy"),
        ({"callbacks": [GradientAccumulationScheduler({0: 2})]}, "callbacks"),
        ({"callbacks": [ThroughputMonitor(len)]}, "callbacks"),
        ({"callbacks": [LearningRateFinder()]}, "callbacks"),
        ({"callbacks": [BatchSizeFinder()]}, "callbacks"),
    ],
)
def test_settings_that_break_the_guarantee_are_named_before_a_step(accountant, settings, name):
    module = Module()
    before = weights(module)
    with training_run(accountant, "b", plan(), unit="row") as run:
        with pytest.raises(UnsupportedSetting, match=f"{name}=.* cannot be used") as refusal:
            fit(trainer(**settings), run, module, DataLoader(Rows()))
        assert run.reservation.marked == 0
    assert refusal.value.name == name
    assert len(refusal.value.advice) > 10
    assert torch.equal(weights(module), before)


def test_half_precision_is_refused_however_it_is_named(accountant):
    used = trainer()
    for precision in ("16-mixed", "16-true", "transformer-engine"):
        used.strategy.precision_plugin.precision = precision
        with (
            training_run(accountant, "b", plan(), unit="row") as run,
            pytest.raises(UnsupportedSetting, match="precision='32-true'"),
        ):
            fit(used, run, Module(), DataLoader(Rows()))


def test_trainers_of_another_package_are_named(accountant):
    with training_run(accountant, "b", plan(), unit="row") as run:
        with pytest.raises(TypeError, match="not of pytorch_lightning"):
            fit(object(), run, Module(), DataLoader(Rows()))
        assert run.reservation.marked == 0


class Manual(Module):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False


class Clips(Module):
    def configure_gradient_clipping(self, *_, **__):
        pass


class Idle(Module):
    def configure_optimizers(self):
        return None


class Picks(Module):
    def training_step(self, batch):
        super().training_step(batch)


class Several(Module):
    def configure_optimizers(self):
        return [torch.optim.SGD(part.parameters(), lr=1.0) for part in (self.net[0], self.net[2])]


class Searches(Module):
    def configure_optimizers(self):
        return torch.optim.LBFGS(self.parameters())


class Sums(Module):
    def training_step(self, batch):
        self.log("loss", 0.0)
        return torch.nn.functional.cross_entropy(self.net(batch[0]), batch[1], reduction="sum")


class Skips(Module):
    def on_train_batch_start(self, *_):
        return -1


def test_callbacks_that_replace_weights_are_refused(accountant):
    with (
        training_run(accountant, "b", plan(), unit="row") as run,
        pytest.raises(UnsupportedSetting, match="average those of saved models"),
    ):
        averaging = trainer(callbacks=[StochasticWeightAveraging(swa_lrs=0.1)])
        fit(averaging, run, Module(), DataLoader(Rows()))


@pytest.mark.filterwarnings("ignore:`LightningModule.configure_optimizers` returned `None`")
@pytest.mark.parametrize(
    ("made", "error", "words"),
    [
        (Manual, UnsupportedSetting, "iterate over run.batches"),
        (Clips, UnsupportedSetting, "configure_gradient_clipping='Clips'"),
        (Idle, UnsupportedSetting, "return one optimizer"),
        (Several, UnsupportedSetting, "return one optimizer, with a group of parameters for each"),
        (Searches, UnsupportedSetting, "LBFGS.* use one that needs one"),
        (Skips, SkippedStep, "on_train_batch_start returned -1"),
        (Sums, RowsMixed, "gradient of one of them changed"),
        (Picks, SkippedStep, "return one for every batch"),
    ],
)
def test_modules_that_cannot_be_guarded_change_no_weight(accountant, made, error, words):
    module = made()
    before = weights(module)
    with (
        training_run(accountant, "b", plan(), unit="row") as run,
        pytest.raises(error, match=words),
    ):
        fit(trainer(), run, module, DataLoader(Rows()))
    assert torch.equal(weights(module), before)


def test_optimizers_of_several_gradients_or_parts_are_named_before_a_step(accountant):
    for made in (Several, Searches):
        with training_run(accountant, "b", plan(), unit="row") as run:
            with pytest.raises(UnsupportedSetting):
                fit(trainer(), run, made(), DataLoader(Rows()))
            assert run.marked == 0


class Logs(Validated):
    def training_step(self, batch):
        loss = super().training_step(batch)
        self.log("private", loss, on_step=True, on_epoch=True)
        self.log_dict({"rows": float(len(batch[0]))})
        return {"loss": loss}


def test_what_training_step_logs_is_dropped_with_one_warning(accountant):
    used = trainer()
    with (
        training_run(accountant, "b", plan(), unit="row") as run,
        pytest.warns(UserWarning, match="training_step logs 'private'") as warned,
    ):
        fit(used, run, Logs(), DataLoader(Rows()), DataLoader(Rows()), physical=5)
    assert {*used.callback_metrics, *used.logged_metrics} == {"val_loss"}
    assert [each.filename for each in warned if "private" in str(each.message)] == [__file__]
    assert marks(accountant) == 2


def test_control_a_trainer_of_its_own_logs_it():
    used = trainer(max_steps=1)
    used.fit(Logs(), DataLoader(Rows(), batch_size=4), DataLoader(Rows()))
    assert {"private", "rows"} < {*used.callback_metrics}


class Sees(Callback):
    def __init__(self):
        self.losses = []

    def on_train_batch_end(self, _trainer, _module, outputs, *_):
        self.losses.append(float(outputs["loss"]))


def test_callbacks_see_a_loss_of_zero(accountant):
    sees = Sees()
    with training_run(accountant, "b", plan(), unit="row") as run:
        fit(trainer(callbacks=[sees]), run, Module(), DataLoader(Rows()), physical=5)
    assert sees.losses == [0.0, 0.0]
    trainer(callbacks=[sees], max_steps=1).fit(Module(), DataLoader(Rows(), batch_size=4))
    assert sees.losses.pop() > 0  # of a trainer of its own


class Copies(Callback):
    """Keeps copies of the module and of a part of it, as averages of weights need."""

    def __init__(self):
        self.copies = []

    def setup(self, _trainer, pl_module, **_):
        self.copies += copy.deepcopy(pl_module), copy.deepcopy(pl_module.net)

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.setup(trainer, pl_module)


def test_callbacks_may_copy_the_module(accountant):
    copies, module = Copies(), Module()
    with training_run(accountant, "b", plan(), unit="row") as run:
        fit(trainer(callbacks=[copies]), run, module, DataLoader(Rows()))
    assert len(copies.copies) == 6
    assert all(torch.equal(weights(each), weights(module)) for each in copies.copies[-2:])
    assert not torch.equal(weights(copies.copies[0]), weights(module))


class Data(LightningDataModule):
    def __init__(self):
        super().__init__()
        self.sizes = []

    def setup(self, **_):
        self.rows = Rows()

    def train_dataloader(self):
        return DataLoader(self.rows, batch_size=4)

    def val_dataloader(self):
        return DataLoader(Rows())

    def on_before_batch_transfer(self, batch, *_):
        assert batch[0].dtype == self.trainer.lightning_module.net[0].weight.dtype
        self.sizes.append(len(batch[0]))
        return batch


@pytest.mark.parametrize("precision", ["32-true", "64-true"])
def test_a_data_module_s_rows_and_hooks_are_used_of_all_parts(accountant, precision):
    data, module = Data(), Validated()
    used = trainer(precision=precision, num_sanity_val_steps=0)
    with training_run(accountant, "b", plan(), unit="row") as run:
        fit(used, run, module, data, physical=5)
    assert data.sizes[data.sizes.index(5) :][:6] == [5, 5, 2] * 2  # after those of the trial
    assert used.callback_metrics["val_loss"] > 0
    assert close(weights(module).float(), by_hand())
    assert data.train_dataloader().batch_size == 4


def test_several_loaders_are_named_before_a_step(accountant):
    for loader in ([DataLoader(Rows())], {"one": DataLoader(Rows())}):
        with training_run(accountant, "b", plan(), unit="row") as run:
            with pytest.raises(UnsupportedSetting, match="pass one DataLoader over all rows"):
                fit(trainer(), run, Module(), loader)
            assert run.marked == 0


def test_rows_that_cannot_be_poisson_sampled_are_named_before_a_step(accountant):
    class Stream(IterableDataset):
        def __iter__(self):
            return iter(Rows())

    with training_run(accountant, "b", plan(), unit="row") as run:
        with pytest.raises(NotPoissonSampled, match="map-style"):
            fit(trainer(), run, Module(), DataLoader(Stream()))
        assert run.reservation.marked == 0


def test_the_trainer_and_the_module_are_left_as_they_were(accountant):
    used, module = trainer(max_epochs=7, max_steps=3), Module()
    mine, callbacks = module.training_step, list(used.callbacks)
    with training_run(accountant, "b", plan(steps=9), unit="row") as run:
        fit(used, run, module, DataLoader(Rows()))
        assert run.remaining == 6
    assert marks(accountant) == 3  # the others were returned
    assert module.training_step == mine
    assert used.callbacks == callbacks
    assert used.fit_loop.max_epochs == 7


def test_a_run_that_died_goes_on_with_its_schedule(accountant, tmp_path):
    class Rates(Callback):
        def __init__(self, dies_after=99):
            self.seen, self.dies_after = [], dies_after

        def on_train_batch_end(self, trainer, *_):
            self.seen.append(trainer.optimizers[0].param_groups[0]["lr"])
            if len(self.seen) == self.dies_after:
                raise RuntimeError("died")

    def rates(name, callback):
        saves = ModelCheckpoint(tmp_path / name, every_n_train_steps=2)
        used = trainer(callbacks=[saves, callback], enable_checkpointing=True)
        path, module = tmp_path / f"{name}.pt", Module(scheduled=True)
        with training_run(accountant, "b", plan(steps=8), unit="row", checkpoint=path) as run:
            fit(used, run, module, DataLoader(Rows()))
        return callback.seen, module

    whole, _ = rates("whole", Rates())
    assert len(whole) == marks(accountant) == 8
    dies = Rates(dies_after=5)
    with pytest.raises(RuntimeError, match="died"):
        rates("run", dies)
    rest, module = rates("run", Rates())
    assert [*dies.seen, *rest] == pytest.approx(whole)
    assert marks(accountant) == 16
    saved = torch.load(tmp_path / "run.pt", weights_only=True)
    assert all(
        torch.equal(saved["model"][name], part) for name, part in module.state_dict().items()
    )
    files = list((tmp_path / "whole").glob("*.ckpt"))
    assert Module.load_from_checkpoint(files[0], weights_only=True).net[0].weight.shape == (7, 5)


def test_validation_on_the_private_rows_is_refused(accountant):
    rows = Rows()
    for evaluated in (DataLoader(rows), DataLoader(Subset(rows, [0]))):
        with (
            training_run(accountant, "b", plan(), unit="row") as run,
            pytest.raises(UnsupportedSetting, match="metrics of the private rows"),
        ):
            fit(trainer(), run, Validated(), DataLoader(rows), evaluated)


def test_a_callback_that_waits_for_the_private_loss_is_named_before_a_step(accountant):
    for monitor in ("private", "private_epoch"):
        stopping = trainer(callbacks=[EarlyStopping(monitor)])
        with training_run(accountant, "b", plan(), unit="row") as run:
            with pytest.raises(UnsupportedSetting, match=r"EarlyStopping\(monitor=...\)='private"):
                fit(stopping, run, Logs(), DataLoader(Rows()), DataLoader(Rows()))
            assert run.marked == 0
