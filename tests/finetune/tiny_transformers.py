"""Tiny models, adapters and rows of Hugging Face, and clipped sums by hand, for tests of its Trainer.

Each model is compared with its own loss, one row at a time: with next to no noise the clipped
sum of a step can be read off the weights.
"""

from __future__ import annotations

import peft
import torch
import transformers
from transformers import TrainingArguments

from finetune import TrainingPlan

ROWS, TOKENS, NOISELESS, CLIP = 12, 10, 5e-3, 0.5
SIZES = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
BERT = SIZES | {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "num_labels": 3}


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
