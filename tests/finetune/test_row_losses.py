"""The loss of each row: a model's own of that row alone."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("peft")
pytest.importorskip("accelerate")
transformers = pytest.importorskip("transformers")

from finetune import RowsMixed, check_rows_apart  # noqa: E402
from finetune.transformers import row_losses  # noqa: E402
from tests.finetune.tiny_transformers import BERT, bert, gpt2, llama, made, rows_for  # noqa: E402

pytestmark = [
    pytest.mark.usefixtures("one_thread", "in_its_folder"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated"),  # of peft
]


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
