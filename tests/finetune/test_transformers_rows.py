"""Rows apart in a guarded Trainer: padding, positions, adapters and losses that would mix them."""

from __future__ import annotations

import pytest
import torch

peft = pytest.importorskip("peft")
pytest.importorskip("accelerate")
transformers = pytest.importorskip("transformers")

from transformers import Trainer  # noqa: E402

from finetune import RowsMixed, UnitsMixed, UnsupportedModel, training_run  # noqa: E402
from finetune.transformers import UnsupportedSetting, guarded  # noqa: E402
from tests.finetune.tiny_transformers import (  # noqa: E402
    PROMPTED,
    SIZES,
    TOKENS,
    bert,
    by_hand,
    close,
    llama,
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
