"""Hugging Face's Trainer under guard: whole runs of tiny models, with PEFT and without."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

peft = pytest.importorskip("peft")
pytest.importorskip("accelerate")
transformers = pytest.importorskip("transformers")

from transformers import Trainer, TrainerCallback  # noqa: E402

from finetune import UnmarkedStep, training_run  # noqa: E402
from finetune.transformers import guarded  # noqa: E402
from tests.finetune.tiny_transformers import (  # noqa: E402
    CLIP,
    MODELS,
    PROMPTED,
    ROWS,
    by_hand,
    close,
    llama,
    lora,
    made,
    marks,
    plan,
    rows_for,
    settings,
    weights,
)

pytestmark = [
    pytest.mark.usefixtures("one_thread", "in_its_folder"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated"),  # of peft
]


CASES = [
    (name, mode)
    for name in MODELS
    for mode in ("hooks", "ghost")
    if (name, mode) != ("gpt2", "ghost")
]  # GPT-2's embeddings are tied, which ghost clipping does not support


@pytest.mark.parametrize(("name", "mode"), CASES)
def test_a_step_is_the_sum_of_clipped_gradients_of_rows(accountant, name, mode):
    model = made(name)
    with training_run(accountant, "b", plan(), unit="row") as run:
        trainer = guarded(Trainer, run, mode=mode)(
            model=model, args=settings(), train_dataset=rows_for(name)
        )
        trainer.train()
        assert run.remaining == 0
    assert trainer.state.global_step == marks(accountant) == 2
    expected = by_hand(name)
    assert close(weights(model), expected)
    assert not close(weights(model), by_hand(name, max_grad_norm=0.8 * CLIP))  # it would be seen
    assert not close(expected, by_hand(name, steps=0))


@pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated")  # of peft
@pytest.mark.parametrize("mode", ["hooks", "ghost"])
@pytest.mark.parametrize("name", PROMPTED)
def test_prompts_get_the_sum_of_clipped_gradients_of_rows(accountant, name, mode):
    """They are small, so they are clipped to less; the rate makes up for it."""
    model, clip = made(name), CLIP / 100
    with training_run(accountant, "b", plan(max_grad_norm=clip), unit="row") as run:
        guarded(Trainer, run, mode=mode)(
            model=model, args=settings(learning_rate=100.0), train_dataset=rows_for(name)
        ).train()
    assert close(weights(model), by_hand(name, max_grad_norm=clip, rate=100.0))
    assert not close(weights(model), by_hand(name, max_grad_norm=0.8 * clip, rate=100.0))


def watched(run, events):
    """Note marks, updates and what is read of the rows; return a collator and how to stop."""
    mark = run.reservation.mark

    def marked():
        mark()
        events.append("mark")

    def collate(rows):
        events.append("rows")
        return transformers.default_data_collator(rows)

    run.reservation.mark = marked
    hook = register_optimizer_step_post_hook(lambda *_: events.append("update"))
    return collate, hook.remove


def paid_before(events):
    """Whether each sample is read after a mark of its own, if not empty, and updated with once."""
    steps = "".join(event[0] for event in events).split("u")
    return steps.pop() == "" and all(
        step.startswith("m") and step.count("m") == 1 for step in steps
    )


@pytest.mark.parametrize("physical", [2, 50])
def test_each_sample_is_marked_before_it_is_read(accountant, physical):
    events, asked = [], plan(sampling_probability=0.4, steps=9)
    with training_run(accountant, "b", asked, unit="row") as run:
        collate, stop = watched(run, events)
        trainer = guarded(Trainer, run)(
            model=made("llama lora"),
            args=settings(per_device_train_batch_size=physical, num_train_epochs=7),
            train_dataset=rows_for("llama"),
            data_collator=collate,
        )
        trainer.train()
        stop()
    assert events[:3] == ["rows"] * 3  # one row, for its form, and made-up rows of that form
    assert paid_before(events[3:])
    assert events.count("update") == events.count("mark") == marks(accountant) == 9
    assert (events.count("rows") > 12) == (physical == 2)
    assert trainer.state.global_step == 9  # and no number of parts, which is private


def test_control_a_callback_pays_too_late(accountant):
    events = []

    class Pays(TrainerCallback):
        def on_step_end(self, *_, **__):
            run.reservation.mark()

    with training_run(accountant, "b", plan(steps=3), unit="row") as run:
        collate, stop = watched(run, events)
        Trainer(
            model=made("llama lora"),
            args=settings(max_steps=3),
            train_dataset=rows_for("llama"),
            data_collator=collate,
            callbacks=[Pays()],
        ).train()
        stop()
    assert events.count("update") == events.count("mark") == 3
    assert not paid_before(events)


@pytest.mark.parametrize("mode", ["hooks", "ghost"])
def test_samples_without_rows_move_nothing_but_by_noise(accountant, mode):
    model = made("bert lora")
    before = weights(model)
    asked = plan(sampling_probability=1e-9, steps=3)
    with training_run(accountant, "b", asked, unit="row") as run:
        guarded(Trainer, run, mode=mode)(
            model=model,
            args=settings(),
            train_dataset=rows_for("bert"),
            data_collator=lambda rows: transformers.BatchEncoding(
                transformers.default_data_collator(rows)
            ),
        ).train()
    assert marks(accountant) == 3
    assert close(weights(model), before)
    assert not torch.equal(weights(model), before)


PRIVATE = {"loss", "train_loss", "grad_norm", "total_flos"}


def logged(trainer, output, said):
    """Return which names of private numbers appear anywhere."""
    path = Path("out/checkpoint-2/trainer_state.json")
    state = json.loads(path.read_text(encoding="utf-8"))
    entries = [*trainer.state.log_history, *state["log_history"], output.metrics]
    found = {name for entry in entries for name in entry} | {
        name for name in PRIVATE if f"'{name}'" in said
    }
    return (found | ({"total_flos"} if state["total_flos"] else set())) & PRIVATE


@pytest.mark.parametrize("mode", ["hooks", "ghost"])
def test_no_loss_nor_norm_is_logged(accountant, capsys, mode):
    rows, args = rows_for("llama"), settings(save_strategy="steps", save_steps=1)
    with training_run(accountant, "b", plan(), unit="row") as run:
        trainer = guarded(Trainer, run, mode=mode)(
            model=made("llama lora"), args=args, train_dataset=rows, eval_dataset=[*rows]
        )
        output = trainer.train()
    assert logged(trainer, output, capsys.readouterr().out) == set()
    assert math.isnan(output.training_loss)
    assert trainer.state.log_history[0].keys() == {"learning_rate", "epoch", "step"}
    assert output.metrics["train_samples_per_second"] == pytest.approx(
        2 * ROWS / output.metrics["train_runtime"], rel=0.02
    )
    assert trainer.evaluate()["eval_loss"] > 0  # of rows that the caller chose


def test_control_a_trainer_of_its_own_logs_them(capsys):
    trainer = Trainer(
        model=made("llama lora"),
        args=settings(save_strategy="steps", save_steps=1, max_steps=2),
        train_dataset=rows_for("llama"),
    )
    assert logged(trainer, trainer.train(), capsys.readouterr().out) == PRIVATE


def test_the_trainer_clips_nothing_and_its_settings_are_left_as_they_were(accountant):
    class Sees(TrainerCallback):
        def on_step_end(self, args, *_, **__):
            seen.append((args.max_grad_norm, args.max_steps))

    seen, args = [], settings(max_grad_norm=1.0)
    with training_run(accountant, "b", plan(), unit="row") as run:
        trainer = guarded(Trainer, run)(
            model=made("llama lora"),
            args=args,
            train_dataset=rows_for("llama"),
            callbacks=[Sees()],
        )
        trainer.train()
    assert seen == [(0.0, 2)] * 2
    assert trainer.args is args
    assert (args.max_grad_norm, args.max_steps) == (1.0, -1)


def test_a_model_as_from_pretrained_leaves_it_is_trained(accountant):
    model = made("bert").eval()
    with training_run(accountant, "b", plan(), unit="row") as run:
        guarded(Trainer, run)(model=model, args=settings(), train_dataset=rows_for("bert")).train()
    assert marks(accountant) == 2
    assert close(weights(model), by_hand("bert"))


def test_a_model_can_be_copied_by_callbacks_while_it_is_trained(accountant):
    class Copies(TrainerCallback):
        def on_train_begin(self, *_, model=None, **__):
            copies.append(copy.deepcopy(model))

        on_step_end = on_train_begin

    copies, model = [], made("llama prompt tuning")
    with training_run(accountant, "b", plan(), unit="row") as run:
        guarded(Trainer, run)(
            model=model, args=settings(), train_dataset=rows_for("llama"), callbacks=[Copies()]
        ).train()
    assert len(copies) == 3
    assert torch.equal(weights(copies[-1]), weights(model))
    assert copies[-1].get_prompt.__self__ is copies[-1]
    assert "get_prompt" not in vars(model)


def test_frozen_weights_may_be_coarse(accountant):
    model = lora(made("llama").to(torch.bfloat16), "CAUSAL_LM", "q_proj")
    assert {part.dtype for part in model.parameters()} == {torch.bfloat16, torch.float32}
    with training_run(accountant, "b", plan(), unit="row") as run:
        guarded(Trainer, run)(model=model, args=settings(), train_dataset=rows_for("llama")).train()
    assert marks(accountant) == 2


def test_fewer_steps_than_planned_and_then_more(accountant):
    model = made("llama lora")
    with training_run(accountant, "b", plan(steps=6), unit="row") as run:
        trainer = guarded(Trainer, run)(
            model=model, args=settings(max_steps=2), train_dataset=rows_for("llama")
        )
        trainer.train()
        assert run.remaining == 4
        trainer.args.max_steps = 3
        assert trainer.train().global_step == 3
        assert run.remaining == 3
    assert marks(accountant) == 3  # the others were returned
    before = weights(model)
    trainer.args.max_steps = -1
    with pytest.raises(UnmarkedStep, match="no step of the plan is left"):
        trainer.train()
    assert torch.equal(weights(model), before)


def test_a_sample_that_was_left_half_way_joins_no_other(accountant):
    calls = []

    def collate(rows):
        calls.append(len(rows))
        if len(calls) == 5:  # three for the form of a row, two parts of the first sample
            raise OSError("lost")
        return transformers.default_data_collator(rows)

    model = made("bert")
    with training_run(accountant, "b", plan(steps=3), unit="row") as run:
        trainer = guarded(Trainer, run)(
            model=model, args=settings(), train_dataset=rows_for("bert"), data_collator=collate
        )
        with pytest.raises(OSError, match="lost"):
            trainer.train()
        trainer.train()
    assert marks(accountant) == 3
    assert close(weights(model), by_hand("bert", steps=2))


def test_a_run_that_died_goes_on_with_its_schedule(accountant, tmp_path):
    class Dies(TrainerCallback):
        def on_step_begin(self, _args, state, *_, **__):
            if state.global_step == 5:
                raise KeyboardInterrupt

    def rates(checkpoint, *callbacks):
        args = settings(
            lr_scheduler_type="linear", optim="adamw_torch", save_strategy="steps", save_steps=2
        )
        model = made("llama lora")
        trainer = None
        try:
            asked = plan(steps=8)
            with training_run(accountant, "b", asked, unit="row", checkpoint=checkpoint) as run:
                trainer = guarded(Trainer, run)(
                    model=model, args=args, train_dataset=rows_for("llama"), callbacks=[*callbacks]
                )
                trainer.train()
        except KeyboardInterrupt:
            pass
        history = trainer.state.log_history
        return {each["step"]: each["learning_rate"] for each in history if "learning_rate" in each}

    whole = rates(tmp_path / "whole.pt")
    assert sorted(whole) == [*range(1, 9)]
    assert marks(accountant) == 8
    first = rates(tmp_path / "run.pt", Dies())
    second = rates(tmp_path / "run.pt")
    assert sorted(first) == [*range(1, 6)]
    assert sorted(second) == [7, 8]  # the sixth was marked, and its process died
    assert {**first, **second} == pytest.approx({k: v for k, v in whole.items() if k != 6})
    assert marks(accountant) == 16
    saved = torch.load(tmp_path / "run.pt", weights_only=True)
    assert any("lora" in name for name in saved["model"])


@pytest.mark.parametrize("name", ["llama lora", "bert"])
def test_the_model_is_saved_as_ever(accountant, tmp_path, name):
    model = made(name)
    with training_run(accountant, "b", plan(), unit="row") as run:
        trainer = guarded(Trainer, run)(model=model, args=settings(), train_dataset=rows_for(name))
        trainer.train()
        trainer.save_model(tmp_path / "one")
    model.save_pretrained(tmp_path / "two")
    for folder in ("one", "two"):
        if "lora" in name:
            torch.manual_seed(1)
            loaded = peft.PeftModel.from_pretrained(llama(), tmp_path / folder, is_trainable=True)
        else:
            loaded = type(model).from_pretrained(tmp_path / folder)
        assert torch.equal(weights(loaded), weights(model))
