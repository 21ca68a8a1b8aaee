"""Hugging Face models under the guard: a prompt's logits depend on that prompt alone."""

import logging
import sys
from importlib import import_module

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from accountant import Accountant
from dp import adaptive
from retrieval import InvalidQuery, PrivateIndex, RetrievalGuard
from retrieval.adapters.transformers import CausalLM
from retrieval.ensembles import Sampler

WORDS = ["<end>", *(f"w{at}" for at in range(63))]


def tokenizer(words=WORDS):
    made = Tokenizer(
        models.WordLevel({word: at for at, word in enumerate(words)}, unk_token=WORDS[0])
    )
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token=WORDS[0])


def llama(**changes):
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 32}
    return LlamaForCausalLM(LlamaConfig(**(sizes | heads | changes)))


def gpt2():
    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=64,
            bos_token_id=0,
            eos_token_id=0,
            n_positions=32,
            n_embd=32,
            n_layer=2,
            n_head=2,
        )
    )


def causal(model, **asked):
    return CausalLM(model, tokenizer(), **({"prompt_tokens": 16} | asked))


PROMPTS = [
    " ".join(f"w{(start * 7 + at * 3) % 63}" for at in range(9 + start)) for start in range(4)
]


def ids(prompt):
    return [WORDS.index(word) for word in prompt.split()]


@pytest.mark.parametrize("model", [llama, gpt2])
def test_logits_are_those_of_the_whole_text_over_the_whole_vocabulary(model):
    model = model()
    following = causal(model).begin(PROMPTS[0])
    found = [following(before) for before in (None, 5, 6, 7)]
    with torch.inference_mode():
        whole = model(input_ids=torch.tensor([[*ids(PROMPTS[0]), 5, 6, 7]])).logits[0, -4:]
    assert {(each.shape, each.dtype) for each in found} == {((64,), np.dtype(np.float32))}
    assert np.allclose(found, whole.numpy(), atol=1e-5)


def test_a_half_precision_model_gives_single_precision_logits():
    assert causal(llama().bfloat16()).begin("w1")(None).dtype == np.float32


def test_no_logit_depends_on_other_prompts():
    model = causal(llama())
    alone = model.begin(PROMPTS[0])
    expected = [alone(before) for before in (None, 5, 6)]
    beside = [model.begin(prompt) for prompt in PROMPTS]
    for before, logits in zip((None, 5, 6), expected, strict=True):
        first, *_ = [following(before) for following in beside]
        assert np.array_equal(first, logits)


def test_the_control_that_batches_prompts_depends_on_other_prompts():
    model, rows = llama(hidden_size=256).eval(), torch.arange(40)[:, None]
    with torch.inference_mode():
        logits = [model(input_ids=rows[:count]).logits[0].numpy() for count in (1, 2, 5, 17, 40)]
    assert any(not np.array_equal(logits[0], each) for each in logits[1:])


def test_dropout_is_off_whatever_the_model_was_left_in():
    model = gpt2()
    ours = causal(model)
    model.train()
    assert np.array_equal(*(ours.begin(PROMPTS[0])(None) for _ in range(2)))
    model.train()  # the control: as it was left
    tokens = torch.tensor([ids(PROMPTS[0])])
    assert not torch.equal(model(input_ids=tokens).logits, model(input_ids=tokens).logits)


def test_of_a_prompt_that_is_too_long_the_last_tokens_are_read():
    model = causal(llama(), prompt_tokens=8)
    cut = " ".join(PROMPTS[3].split()[-8:])
    assert np.array_equal(model.begin(PROMPTS[3])(None), model.begin(cut)(None))
    assert not np.array_equal(model.begin(PROMPTS[3])(None), model.begin(cut[3:])(None))


def test_nothing_says_how_long_a_private_prompt_is(capfd, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    made = tokenizer()
    made.model_max_length = 4
    CausalLM(llama(), made, prompt_tokens=8).begin(PROMPTS[3])
    assert "longer" not in caplog.text + "".join(capfd.readouterr())
    made(PROMPTS[3])  # the control
    assert "longer" in caplog.text + "".join(capfd.readouterr())


def test_a_text_that_outgrows_the_context_is_an_error():
    following = causal(llama()).begin(PROMPTS[3])
    for before in (None, *range(20)):
        following(before)
    with pytest.raises(InvalidQuery, match="outgrown the model's 32 tokens"):
        following(20)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("top_k", 20),
        ("top_k", 1),
        ("top_p", 0.9),
        ("min_p", 0.05),
        ("typical_p", 0.9),
        ("epsilon_cutoff", 1e-4),
        ("repetition_penalty", 1.1),
        ("no_repeat_ngram_size", 3),
        ("min_new_tokens", 4),
        ("bad_words_ids", [[3]]),
        ("suppress_tokens", [3]),
        ("sequence_bias", [[[3], -5.0]]),
        ("forced_eos_token_id", 0),
        ("guidance_scale", 1.5),
    ],
)
def test_a_decoder_that_cuts_after_the_private_draw_is_refused(name, value):
    model = llama()
    model.generation_config = GenerationConfig(do_sample=True, **{name: value})
    with pytest.raises(InvalidQuery, match=f"{name}=.* after the private draw"):
        causal(model)


def test_settings_without_effect_are_taken():
    model = llama()
    model.generation_config = GenerationConfig(top_p=1.0, repetition_penalty=1.0)
    assert causal(model).end == 0
    model.generation_config = None
    assert causal(model).end == 0


def test_a_model_that_cannot_continue_prompts_is_refused():
    sizes = {"d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2}
    with pytest.raises(InvalidQuery, match="not a causal language model"):
        causal(T5ForConditionalGeneration(T5Config(vocab_size=64, **sizes)))
    with pytest.raises(InvalidQuery, match="leave no room"):
        causal(llama(), prompt_tokens=32)
    with pytest.raises(InvalidQuery, match="no tokens"):
        causal(llama()).begin("")


@pytest.fixture
def guard(location):
    vectors = np.eye(4, dtype=np.float32)[[0, 0, 0, 1]]
    with Accountant.open(location) as accountant:
        accountant.create_budget("b", adaptive(20.0, 1e-6), unit="article")
        index = PrivateIndex(vectors, units=["u0", "u1", "u2", "u3"])
        yield RetrievalGuard(accountant, "b", index, unit="article")


def generate(guard, model, prompts, tokens=6):
    def prompt(unit):
        return prompts.get(unit, "w1 w2")

    asked = {"threshold": 0.5, "most": 3, "sampler": Sampler(1.0, 3.0)}
    return guard.generate([1, 0, 0, 0], model, prompt, tokens=tokens, **asked)


def test_a_text_is_generated_whatever_the_private_prompts_are(guard):
    model = causal(llama())
    answer = generate(guard, model, {"u0": PROMPTS[0] * 20, "u1": "", "u2": "\x00"})
    assert answer.text.split() == [WORDS[token] for token in answer.tokens]


def test_fewer_logits_than_tokens_are_refused_before_anything_is_paid(guard):
    model = CausalLM(llama(), tokenizer([*WORDS, "w63"]), prompt_tokens=16)
    with pytest.raises(InvalidQuery, match="64 logits for 65 tokens"):
        generate(guard, model, {})
    assert not guard._charges.accountant.statement("b").spent


def test_rows_of_the_embedding_that_are_no_tokens_are_not_drawn():
    assert causal(llama(vocab_size=80)).begin("w1")(None).shape == (64,)


def test_a_missing_package_names_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.delitem(sys.modules, "retrieval.adapters.transformers")
    with pytest.raises(ImportError, match=r"epsledger\[transformers\]"):
        import_module("retrieval.adapters.transformers")
