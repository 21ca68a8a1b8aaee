"""Hugging Face's Trainer under guard: whole runs of tiny models, with PEFT and without.

Each model is compared with its own loss, one row at a time: with next to no noise the clipped
sum of a step can be read off the weights.
"""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.data import IterableDataset, WeightedRandomSampler

peft = pytest.importorskip("peft")
pytest.importorskip("accelerate")
transformers = pytest.importorskip("transformers")

from transformers import Trainer, TrainerCallback, TrainingArguments  # noqa: E402

from accountant import Accountant  # noqa: E402
from dp import adaptive  # noqa: E402
from finetune import (  # noqa: E402
    NotPoissonSampled,
    RowsMixed,
    TrainingPlan,
    UnitsMixed,
    UnmarkedStep,
    UnsupportedModel,
    check_rows_apart,
    training_run,
)
from finetune.transformers import UnsupportedSetting, guarded, row_losses  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated"),  # of peft
]
ROWS, TOKENS, NOISELESS, CLIP = 12, 10, 5e-3, 0.5
PRIVATE = {"loss", "train_loss", "grad_norm", "total_flos"}
SIZES = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
BERT = SIZES | {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "num_labels": 3}


@pytest.fixture(autouse=True)
def one_thread(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def accountant(tmp_path):
    """A budget in which almost no noise fits."""
    with Accountant.open(tmp_path / "ledger.db") as accountant:
        accountant.create_budget("b", adaptive(1e6, 1e-5), unit="row")
        yield accountant


def llama():
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**SIZES, num_key_value_heads=2, max_position_embeddings=32)
    )


def gpt2():
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=40, n_embd=16, n_layer=2, n_head=2, n_positions=32, n_inner=16,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        )
    )  # fmt: skip


def bert(task="SequenceClassification"):
    return getattr(transformers, f"BertFor{task}")(transformers.BertConfig(**BERT))


def lora(model, task, *targets):
    config = peft.LoraConfig(r=2, target_modules=list(targets), task_type=task)
    wrapped = peft.get_peft_model(model, config)
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)  # of zeros, lora_A has no gradient
    return wrapped


def prompted(kind, model, task, **settings):
    """Return a model with three virtual tokens in front of each row."""
    config = getattr(peft, f"{kind}Config")(task_type=task, num_virtual_tokens=3, **settings)
    return peft.get_peft_model(model, config)


MODELS = {
    "llama lora": lambda: lora(llama(), "CAUSAL_LM", "q_proj", "v_proj"),
    "llama": llama,
    "gpt2": gpt2,
    "bert lora": lambda: lora(bert(), "SEQ_CLS", "query", "value"),
    "bert": bert,
}
PROMPTED = {
    "llama prompt tuning": lambda: prompted("PromptTuning", llama(), "CAUSAL_LM"),
    "llama p-tuning": lambda: prompted(
        "PromptEncoder", llama(), "CAUSAL_LM", encoder_hidden_size=8
    ),
    "llama prefix tuning": lambda: prompted("PrefixTuning", llama(), "CAUSAL_LM"),
}


def made(name):
    torch.manual_seed(1)
    return (MODELS | PROMPTED)[name]()


def rows_for(name, count=ROWS):
    """Rows whose losses are over 1 to 9 tokens, or one label."""
    generator = torch.Generator().manual_seed(3)
    rows = []
    for number in range(count):
        ids = torch.randint(1, 40, (TOKENS,), generator=generator)
        row = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if "bert" in name:
            rows.append(row | {"label": number % 3})
        else:
            labels = ids.clone()
            labels[2 + number % 9 :] = -100
            rows.append(row | {"labels": labels})
    return rows


def settings(**changes):
    values = {
        "output_dir": "out",
        "per_device_train_batch_size": 5,
        "learning_rate": 1.0,
        "lr_scheduler_type": "constant",
        "optim": "sgd",
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
        "use_cpu": True,
    }
    return TrainingArguments(**(values | changes))


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
    return torch.cat([part.detach().flatten() for part in trainable(model)])


def trainable(model):
    return [part for part in model.parameters() if part.requires_grad]


def marks(accountant):
    return sum(each.uses for each in accountant.statement("b").activities)


def by_hand(name, steps=2, max_grad_norm=CLIP, rows=None, rate=1.0):
    """Return the weights after clipped steps with the model's own loss of one row at a time."""
    model = made(name).train()
    for _ in range(steps):
        total = [torch.zeros_like(part) for part in trainable(model)]
        for row in rows or rows_for(name):
            inputs = {
                key.replace("label", "labels").replace("ss", "s"): torch.as_tensor(value)[None]
                for key, value in row.items()
            }
            gradients = torch.autograd.grad(model(**inputs).loss, trainable(model))
            norm = torch.cat([part.flatten() for part in gradients]).norm()
            for summed, gradient in zip(total, gradients, strict=True):
                summed.add_(gradient * min(1.0, max_grad_norm / norm))
        with torch.no_grad():
            for weight, summed in zip(trainable(model), total, strict=True):
                weight.sub_(rate * summed / ROWS)
    return weights(model)


def close(one, other):
    return torch.allclose(one, other, atol=6 * NOISELESS * CLIP / ROWS * 2)


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


def test_rows_padded_on_the_left_are_refused(accountant):
    """The longest row of a batch would shift the positions of the others."""
    rows = rows_for("gpt2")
    rows[3]["attention_mask"][:2] = 0
    model = made("gpt2")
    before = weights(model)
    with training_run(accountant, "b", plan(), unit="row") as run:
        trainer = guarded(Trainer, run)(model=model, args=settings(), train_dataset=rows)
        with pytest.raises(UnitsMixed, match="padded on the left"):
            trainer.train()
    assert torch.equal(weights(model), before)


def on_the_left(rows):
    """Return rows that begin with up to two tokens of padding, and the same without."""
    padded, own = [], []
    for number, row in enumerate(rows):
        padding = number % 3
        kept = {name: values[: TOKENS - padding] for name, values in row.items()}
        front = {"input_ids": 0, "attention_mask": 0, "labels": -100}
        padded.append(
            {
                name: torch.cat([torch.full((padding,), front[name]), values])
                for name, values in kept.items()
            }
        )
        own.append(kept)
    return padded, own


def test_rows_padded_on_the_left_of_rotary_models_count_as_if_they_were_not(accountant):
    padded, own = on_the_left(rows_for("llama"))
    model = made("llama")
    with training_run(accountant, "b", plan(), unit="row") as run:
        guarded(Trainer, run)(model=model, args=settings(), train_dataset=padded).train()
    assert close(weights(model), by_hand("llama", rows=own))


def dynamic_llama():
    """Its frequencies depend on the longest row."""
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**SIZES, max_position_embeddings=32, rope_parameters=rope)
    )


@pytest.mark.parametrize("make", [dynamic_llama, PROMPTED["llama prompt tuning"]])
def test_rotary_models_in_which_padding_shifts_something_are_refused(accountant, make):
    padded, _ = on_the_left(rows_for("llama"))
    with training_run(accountant, "b", plan(), unit="row") as run:
        trainer = guarded(Trainer, run)(model=make(), args=settings(), train_dataset=padded)
        with pytest.raises(UnitsMixed, match="padded on the left"):
            trainer.train()


def test_a_model_as_from_pretrained_leaves_it_is_trained(accountant):
    model = made("bert").eval()
    with training_run(accountant, "b", plan(), unit="row") as run:
        guarded(Trainer, run)(model=model, args=settings(), train_dataset=rows_for("bert")).train()
    assert marks(accountant) == 2
    assert close(weights(model), by_hand("bert"))


def test_losses_that_may_mix_rows_are_refused(accountant):
    class Mixes(Trainer):
        def compute_loss(self, model, inputs, *_, **__):
            return model(**inputs).loss

    model = made("llama lora")
    before = weights(model)
    with training_run(accountant, "b", plan(), unit="row") as run:
        with pytest.raises(UnsupportedSetting, match="compute_loss_func"):
            guarded(Mixes, run)
        trainer = guarded(Trainer, run)(
            model=model,
            args=settings(),
            train_dataset=rows_for("llama"),
            compute_loss_func=lambda outputs, *_, **__: outputs.logits.mean(),
        )
        with pytest.raises(UnitsMixed, match=r"rows, and losses have the shape \(\)"):
            trainer.train()
    assert torch.equal(weights(model), before)


def test_a_loss_of_ones_own_by_row(accountant):
    def loss(outputs, labels, num_items_in_batch=None):
        return torch.nn.functional.cross_entropy(outputs.logits, labels, reduction="none")

    for chosen in (loss, None):
        model = made("bert")
        with training_run(accountant, "b", plan(), unit="row") as run:
            guarded(Trainer, run)(
                model=model,
                args=settings(),
                train_dataset=rows_for("bert"),
                compute_loss_func=chosen,
            ).train()
        assert close(weights(model), by_hand("bert"))  # two noisy ones may be farther apart


def test_models_that_cannot_be_trained_are_named_before_a_step(accountant):
    half = made("llama").to(torch.bfloat16)
    with training_run(accountant, "b", plan(), unit="row") as run:
        with pytest.raises(UnsupportedModel, match=r"dtype=torch\.float32"):
            guarded(Trainer, run)(model=half, args=settings(), train_dataset=rows_for("llama"))
        with pytest.raises(UnsupportedModel, match="BertForQuestionAnswering; pass compute_loss_f"):
            guarded(Trainer, run)(
                model=bert("QuestionAnswering"), args=settings(), train_dataset=rows_for("bert")
            )
        assert run.reservation.marked == 0


def adapted(kind, *targets, **settings):
    config = getattr(peft, f"{kind}Config")(
        task_type="CAUSAL_LM", target_modules=list(targets), **settings
    )
    return peft.get_peft_model(llama(), config)


@pytest.mark.parametrize(
    "make",
    [
        lambda: adapted("IA3", "k_proj", feedforward_modules=[]),
        lambda: adapted("Vera", "q_proj", r=2),
        lambda: adapted("Lora", "q_proj", r=2, use_dora=True),
        lambda: adapted("Lora", "q_proj", "embed_tokens", r=2),
    ],
)
def test_adapters_outside_of_layers_are_named_when_a_trainer_is_made(accountant, make):
    with training_run(accountant, "b", plan(), unit="row") as run:
        with pytest.raises(UnsupportedModel, match="use LoRA on linear layers"):
            guarded(Trainer, run)(model=make(), args=settings(), train_dataset=rows_for("llama"))
        assert run.marked == 0


def t5():
    return transformers.T5ForConditionalGeneration(
        transformers.T5Config(
            vocab_size=40, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, dropout_rate=0.0
        )
    )


def bart():
    return transformers.BartForConditionalGeneration(
        transformers.BartConfig(
            vocab_size=40, d_model=16, encoder_layers=1, decoder_layers=1, dropout=0.0,
            encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=16,
            decoder_ffn_dim=16, max_position_embeddings=32, forced_eos_token_id=None,
        )
    )  # fmt: skip


@pytest.mark.filterwarnings("ignore:In CPU autocast")  # of Opacus, for layers it does not know
@pytest.mark.parametrize(
    ("make", "tables"), [(t5, "relative_attention_bias"), (bart, "embed_positions")]
)
def test_tables_that_are_not_looked_up_for_each_row_have_to_be_frozen(accountant, make, tables):
    """With as many tokens as rows, T5's pass for one look-up for each row."""

    def loss(outputs, labels, **_):
        losses = torch.nn.functional.cross_entropy(
            outputs.logits.transpose(1, 2), labels, reduction="none"
        )
        return losses.mean(1)

    rows = [
        {"input_ids": row["input_ids"], "decoder_input_ids": row["input_ids"]}
        | {"labels": row["input_ids"]}
        for row in rows_for("llama")
    ]
    model, args = make(), settings(per_device_train_batch_size=TOKENS)
    with training_run(accountant, "b", plan(), unit="row") as run:
        trainer = guarded(Trainer, run)(
            model=model, args=args, train_dataset=rows, compute_loss_func=loss
        )
        with pytest.raises(UnsupportedModel, match=f"{tables} is a .* freeze it: model"):
            trainer.train()
        assert run.marked == 0
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(tables not in name)
        trainer.train()
    assert marks(accountant) == 2


def test_a_loss_function_that_mixes_rows_is_named_before_a_step(accountant):
    """It returns one loss for each row, so its shape does not tell."""

    def balanced(outputs, labels, **_):
        weights = torch.tensor([1.0, 50.0])[labels.clamp(max=1)]
        losses = torch.nn.functional.cross_entropy(outputs.logits, labels, reduction="none")
        return losses * weights / weights.mean()

    with training_run(accountant, "b", plan(), unit="row") as run:
        trainer = guarded(Trainer, run)(
            model=made("bert"),
            args=settings(),
            train_dataset=rows_for("bert"),
            compute_loss_func=balanced,
        )
        with pytest.raises(RowsMixed, match="the loss of one row depends on the others"):
            trainer.train()
        assert run.marked == 0


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


def test_positions_are_looked_up_for_each_row(accountant, monkeypatch):
    """Without that, a table of positions has one gradient for the batch."""
    with training_run(accountant, "b", plan(), unit="row") as run:
        trainer = guarded(Trainer, run)(
            model=made("gpt2"), args=settings(), train_dataset=rows_for("gpt2")
        )
        monkeypatch.setattr(trainer, "_hook_embeddings", lambda _: None)
        with pytest.raises((UnsupportedModel, RowsMixed)):
            trainer.train()

    class Tokens(torch.nn.Module):
        """Looks up as many positions as there are rows; nothing else would notice."""

        def __init__(self):
            super().__init__()
            self.table, self.head = torch.nn.Embedding(TOKENS, 4), torch.nn.Linear(4, 2)

        def forward(self, input_ids):
            return {"logits": self.head(self.table(torch.arange(len(input_ids)))).sum((0, 1))}

    with training_run(accountant, "b", plan(), unit="row") as run:
        trainer = guarded(Trainer, run)(
            model=Tokens(),
            args=settings(),
            train_dataset=rows_for("llama"),
            compute_loss_func=lambda outputs, *_, **__: outputs["logits"],
        )
        with pytest.raises(UnsupportedModel, match=r"table looks up \(4,\) entries for 4 rows"):
            trainer.train()


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


def test_a_loss_function_may_take_outputs_and_labels_alone(accountant):
    def loss(outputs, labels):
        return torch.nn.functional.cross_entropy(outputs.logits, labels, reduction="none")

    model = made("bert")
    with training_run(accountant, "b", plan(), unit="row") as run:
        guarded(Trainer, run)(
            model=model, args=settings(), train_dataset=rows_for("bert"), compute_loss_func=loss
        ).train()
    assert close(weights(model), by_hand("bert"))


def test_a_mean_over_tokens_is_named_before_a_step(accountant):
    """Of rows that are all alike it is the mean over rows; one that is shorter tells."""

    def over_tokens(outputs, labels, **_):
        losses = torch.nn.functional.cross_entropy(
            outputs.logits[:, :-1].transpose(1, 2), labels[:, 1:], reduction="none"
        )
        return losses.sum(1) * len(losses) / (labels[:, 1:] != -100).sum()

    rows = [row | {"labels": row["input_ids"]} for row in rows_for("llama")]
    with training_run(accountant, "b", plan(), unit="row") as run:
        trainer = guarded(Trainer, run)(
            model=made("llama lora"),
            args=settings(),
            train_dataset=rows,
            compute_loss_func=over_tokens,
        )
        with pytest.raises(RowsMixed, match="mean within each row"):
            trainer.train()
        assert run.marked == 0


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


def own_loss(model, inputs):
    """The model's own, which is the mean over the tokens of the batch."""
    return model(**inputs).loss


def vit():
    return transformers.ViTForImageClassification(
        transformers.ViTConfig(**BERT, image_size=8, patch_size=4)
    )


def ast():
    return transformers.ASTForAudioClassification(
        transformers.ASTConfig(
            **BERT, num_mel_bins=8, max_length=8, patch_size=4, time_stride=4, frequency_stride=4
        )
    )


@pytest.mark.parametrize(
    ("model", "name", "shape"), [(vit, "pixel_values", (3, 8, 8)), (ast, "input_values", (8, 8))]
)
def test_images_and_audio_are_classified_without_a_loss_of_ones_own(model, name, shape):
    torch.manual_seed(4)
    model, one, label = model().eval(), torch.randn(1, *shape), torch.tensor([2])
    losses = row_losses(model)(model(one.expand(3, *shape)), label.expand(3))
    assert torch.allclose(losses, own_loss(model, {name: one, "labels": label}).expand(3))


@pytest.mark.parametrize(
    ("model", "labels"),
    [
        (gpt2, lambda: torch.randint(0, 40, (1, 6))),
        (llama, lambda: torch.tensor([[-100, -100, 3, 4, -100, 5]])),
        (lambda: bert("MaskedLM"), lambda: torch.tensor([[-100, 7, -100, 4, -100, -100]])),
        (lambda: bert("TokenClassification"), lambda: torch.tensor([[0, 1, 2, -100, 1, 1]])),
        (bert, lambda: torch.tensor([2])),
        (bert, lambda: torch.tensor([[1.0, 0.0, 1.0]])),
        (
            lambda: transformers.BertForSequenceClassification(
                transformers.BertConfig(**(BERT | {"num_labels": 1}))
            ),
            lambda: torch.tensor([0.3]),
        ),
    ],
)
def test_the_loss_of_a_row_is_the_model_s_own_of_that_row_alone(model, labels):
    torch.manual_seed(4)
    model = model().eval()
    one, ids = labels(), torch.randint(1, 40, (1, 6))
    batch = {"input_ids": ids.expand(3, -1), "labels": one.expand(3, *one.shape[1:])}
    losses = row_losses(model)(model(batch["input_ids"]), batch["labels"])
    assert losses.shape == (3,)
    assert torch.allclose(losses, own_loss(model, {"input_ids": ids, "labels": one}), atol=1e-6)


def test_smoothed_labels_are_the_trainer_s():
    from transformers.trainer_pt_utils import LabelSmoother

    torch.manual_seed(5)
    logits, labels = torch.randn(1, 6, 40), torch.tensor([[3, 1, -100, 4, 5, -100]])
    found = row_losses(llama(), 0.2)({"logits": logits}, labels)
    expected = LabelSmoother(0.2)({"logits": logits}, labels, shift_labels=True)
    assert torch.allclose(found, expected[None])


def test_a_row_without_labelled_tokens_has_no_loss():
    losses = row_losses(llama())({"logits": torch.randn(2, 6, 40)}, torch.full((2, 6), -100))
    assert losses.tolist() == [0.0, 0.0]


def test_rows_are_apart_and_under_the_models_own_loss_they_are_not():
    model = made("llama lora")
    rows = rows_for("llama", 10)
    of_rows = row_losses(model)

    def loss(wrapped, batch):
        return of_rows(wrapped(input_ids=batch["input_ids"]), batch["labels"]).mean()

    assert check_rows_apart(model, loss, rows) < 1e-4
    with pytest.raises(RowsMixed):
        check_rows_apart(model, own_loss, rows)
