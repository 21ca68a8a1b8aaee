"""What a guarded Trainer refuses of its settings, its subclasses and its rows, before a step."""

from __future__ import annotations

import pytest
import torch
from torch.utils.data import IterableDataset, WeightedRandomSampler

pytest.importorskip("peft")
pytest.importorskip("accelerate")
pytest.importorskip("transformers")

from transformers import Trainer, TrainingArguments

from finetune import NotPoissonSampled, UnmarkedStep, training_run
from finetune.transformers import UnsupportedSetting, guarded
from tests.finetune.tiny_transformers import ROWS, llama, made, plan, rows_for, settings, weights

pytestmark = [
    pytest.mark.usefixtures("one_thread", "in_its_folder"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated"),  # of peft
]


SETTINGS = {
    "gradient_accumulation_steps": 2,
    "fp16": True,
    "bf16": True,
    "n_gpu": 2,
    "world_size": 2,
    "gradient_checkpointing": True,
    "activation_checkpointing": True,
    "torch_compile": True,
    "use_liger_kernel": True,
    "neftune_noise_alpha": 5.0,
    "auto_find_batch_size": True,
    "include_num_input_tokens_seen": "all",
    "skip_memory_metrics": False,
    "train_sampling_strategy": "group_by_length",
    "optim": "adalomo",
    "resume_from_checkpoint": "out/checkpoint-1",
}


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_that_break_the_guarantee_are_named_before_a_step(accountant, monkeypatch, name):
    model = made("llama lora")
    before = weights(model)
    with training_run(accountant, "b", plan(), unit="row") as run:
        trainer = guarded(Trainer, run)(
            model=model, args=settings(), train_dataset=rows_for("llama")
        )
        if isinstance(getattr(TrainingArguments, name, None), property):
            monkeypatch.setattr(TrainingArguments, name, property(lambda _: SETTINGS[name]))
        else:
            setattr(trainer.args, name, SETTINGS[name])
        with pytest.raises(UnsupportedSetting, match=f"{name}=.* cannot be used") as refusal:
            trainer.train()
        assert run.reservation.marked == 0
    assert (refusal.value.name, refusal.value.value) == (name, SETTINGS[name])
    assert len(refusal.value.advice) > 10
    assert torch.equal(weights(model), before)


LAUNCHED = {"mixed_precision": "bf16", "distributed_type": "FSDP", "gradient_accumulation_steps": 2}


@pytest.mark.parametrize("name", LAUNCHED)
def test_settings_of_the_launcher_are_named_before_a_step(accountant, monkeypatch, name):
    with training_run(accountant, "b", plan(), unit="row") as run:
        trainer = guarded(Trainer, run)(
            model=made("llama lora"), args=settings(), train_dataset=rows_for("llama")
        )
        kind = type(trainer.accelerator)
        monkeypatch.setattr(kind, name, property(lambda _: LAUNCHED[name]))
        with pytest.raises(UnsupportedSetting, match=f"{name}=.* cannot be used"):
            trainer.train()
        assert run.reservation.marked == 0


def test_they_are_named_when_a_trainer_is_made(accountant):
    rows = rows_for("llama")
    with training_run(accountant, "b", plan(), unit="row") as run:
        with pytest.raises(UnsupportedSetting, match="per_device_train_batch_size"):
            guarded(Trainer, run)(
                model=made("llama"),
                args=settings(gradient_accumulation_steps=4),
                train_dataset=rows,
            )
        with pytest.raises(UnsupportedSetting, match="model_init"):
            guarded(Trainer, run)(model_init=llama, args=settings(), train_dataset=rows)
        with pytest.raises(UnsupportedSetting, match=r"training_run\(\.\.\., checkpoint=path\)"):
            guarded(Trainer, run)(model=llama(), args=settings(), train_dataset=rows).train(
                resume_from_checkpoint=True
            )
        assert run.reservation.marked == 0


def test_a_training_step_of_a_subclass_is_refused(accountant):
    """It would compute a loss of its own, and could publish it once for each part."""

    class Own(Trainer):
        def training_step(self, model, inputs, *_):
            loss = model(**inputs).loss
            self.accelerator.backward(loss)
            return loss

    with (
        training_run(accountant, "b", plan(), unit="row") as run,
        pytest.raises(UnsupportedSetting, match="training_step="),
    ):
        guarded(Own, run)


def test_rows_that_cannot_be_poisson_sampled_are_named_before_a_step(accountant):
    class Stream(IterableDataset):
        def __iter__(self):
            return iter(rows_for("llama"))

    class Weighs(Trainer):
        def _get_train_sampler(self, *_):
            return WeightedRandomSampler([1.0] * ROWS, ROWS)

    with training_run(accountant, "b", plan(), unit="row") as run:
        for trainer, rows, words in (
            (Trainer, Stream(), "map-style"),
            (Weighs, rows_for("llama"), "draws by WeightedRandomSampler"),
        ):
            with pytest.raises(NotPoissonSampled, match=words):
                guarded(trainer, run)(
                    model=made("llama lora"), args=settings(max_steps=2), train_dataset=rows
                ).train()
        assert run.reservation.marked == 0


def test_a_run_that_ended_trains_nothing(accountant):
    with training_run(accountant, "b", plan(), unit="row") as run:
        trainer = guarded(Trainer, run)(
            model=made("llama lora"), args=settings(), train_dataset=rows_for("llama")
        )
    with pytest.raises(UnmarkedStep, match="the run has ended"):
        trainer.train()


def test_an_optimizer_that_is_made_by_hand_is_named(accountant):
    with training_run(accountant, "b", plan(), unit="row") as run:
        trainer = guarded(Trainer, run)(
            model=made("llama lora"), args=settings(), train_dataset=rows_for("llama")
        )
        with pytest.raises(UnsupportedSetting, match=r"create_optimizer=.*train\(\) does that"):
            trainer.create_optimizer()


def test_evaluation_on_the_private_rows_is_refused(accountant):
    rows = rows_for("llama")
    with training_run(accountant, "b", plan(), unit="row") as run:
        for evaluated in (rows, {"public": rows_for("llama"), "private": rows}):
            with pytest.raises(UnsupportedSetting, match="losses of the private rows"):
                guarded(Trainer, run)(
                    model=made("llama lora"),
                    args=settings(),
                    train_dataset=rows,
                    eval_dataset=evaluated,
                )


def test_neither_evaluate_nor_predict_takes_the_private_rows(accountant):
    rows = rows_for("llama")
    with training_run(accountant, "b", plan(), unit="row") as run:
        trainer = guarded(Trainer, run)(
            model=made("llama lora"), args=settings(), train_dataset=rows
        )
        for takes in (trainer.evaluate, trainer.predict):
            with pytest.raises(UnsupportedSetting, match="losses of the private rows"):
                takes(torch.utils.data.Subset(rows, [0, 1]))


def test_a_clipping_norm_of_the_arguments_is_said_to_have_no_effect(accountant):
    with (
        training_run(accountant, "b", plan(), unit="row") as run,
        pytest.warns(UserWarning, match=r"max_grad_norm=0\.3 of the arguments has no effect"),
    ):
        guarded(Trainer, run)(
            model=made("llama lora"),
            args=settings(max_grad_norm=0.3),
            train_dataset=rows_for("llama"),
        )
