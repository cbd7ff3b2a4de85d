"""The loss of tuning: what it equals, and that padding never counts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from live_models import VOCAB, activations, bert, llama, plain, t5, tokens
from torch import Tensor, nn

from linearize.errors import ConfigError, InputError
from linearize.training.objective import Objective, hidden_distance

LM = Objective(shifts=True)


def other(model: nn.Module) -> nn.Module:
    """The same model with other weights."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return model


def right_padded(ids: Tensor, more: int) -> dict[str, Tensor]:
    mask = torch.cat([torch.ones_like(ids), torch.zeros(len(ids), more, dtype=torch.long)], 1)
    return {"input_ids": F.pad(ids, (0, more), value=5), "attention_mask": mask}


def test_of_a_decoder_it_is_the_models_own_loss() -> None:
    model, ids = llama(), tokens(2, 13)
    torch.testing.assert_close(LM(model, {"input_ids": ids}), model(ids, labels=ids).loss)
    labels = ids.masked_fill(ids % 3 == 0, -100)
    torch.testing.assert_close(
        LM(model, {"input_ids": ids, "labels": labels}), model(ids, labels=labels).loss
    )


def test_of_an_encoder_decoder_it_is_the_models_own_loss() -> None:
    model, labels = t5(), tokens(2, 6)
    labels[1, 4:] = -100
    inputs = {"input_ids": tokens(2, 9), "labels": labels}
    torch.testing.assert_close(Objective(shifts=False)(model, inputs), model(**inputs).loss)


@pytest.mark.parametrize("weights", ((1.0, 0.0), (0.0, 1.0), (0.4, 0.6)))
def test_padding_does_not_count(weights: tuple[float, float]) -> None:
    model, teacher, ids = llama(), other(llama()), tokens(2, 13)
    objective = Objective(True, *weights, teacher=teacher)
    torch.testing.assert_close(
        objective(model, right_padded(ids, 8)), objective(model, {"input_ids": ids}), atol=1e-5, rtol=1e-5
    )


def test_distillation_is_the_divergence_at_its_temperature() -> None:
    model, teacher, ids = llama(), other(llama()), tokens(2, 13)
    with torch.no_grad():
        p = (teacher(ids).logits[:, :-1].double() / 2).log_softmax(-1)
        q = (model(ids).logits[:, :-1].double() / 2).log_softmax(-1)
    wanted = 4 * (p.exp() * (p - q)).sum(-1).mean()
    found = Objective(True, 0.0, 1.0, temperature=2.0, teacher=teacher)(model, {"input_ids": ids})
    torch.testing.assert_close(found.double(), wanted, atol=1e-5, rtol=1e-5)
    own = Objective(True, 0.0, 1.0, teacher=llama())(model, {"input_ids": ids})
    assert own.abs() < 1e-6
    both = Objective(True, 0.5, 0.25, temperature=2.0, teacher=teacher)(model, {"input_ids": ids})
    torch.testing.assert_close(both, 0.5 * LM(model, {"input_ids": ids}) + 0.25 * found)


def test_gradients_go_to_the_model_and_not_to_the_teacher() -> None:
    model, teacher = llama(), other(llama())
    Objective(True, 0.0, 1.0, teacher=teacher)(model, {"input_ids": tokens(2, 13)}).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_a_batch_in_which_nothing_counts_is_zero() -> None:
    model, ids = llama(), tokens(2, 5)
    loss = LM(model, {"input_ids": ids, "labels": torch.full_like(ids, -100)})
    loss.backward()
    assert loss == 0
    assert all(p.grad is None or bool(p.grad.isfinite().all()) for p in model.parameters())


def test_an_encoder_learns_the_teachers_states_and_mean() -> None:
    model, teacher, ids = bert(), other(bert()), tokens(2, 11)
    inputs = right_padded(ids, 4)
    objective = Objective(False, 1.0, 2.0, teacher=teacher)
    with torch.no_grad():
        real = inputs["attention_mask"].bool()
        a, b = (m(**inputs).last_hidden_state.double() for m in (model, teacher))
        mean_a, mean_b = a[:, :11].mean(1), b[:, :11].mean(1)
    distance = (a[real] - b[real]).square().sum() / b[real].square().sum()
    wanted = 2 * (distance + (1 - F.cosine_similarity(mean_a, mean_b)).mean())
    torch.testing.assert_close(objective(model, inputs).double(), wanted, atol=1e-5, rtol=1e-5)
    assert Objective(False, 1.0, 1.0, teacher=bert())(bert(), inputs).abs() < 1e-6


def test_states_at_padding_do_not_count() -> None:
    state, wanted = torch.randn(2, 6, 4), torch.randn(2, 6, 4)
    mask = torch.tensor([[1] * 6, [1] * 3 + [0] * 3])
    before = hidden_distance(state, wanted, mask)
    state[1, 3:], wanted[1, 3:] = 1e6, torch.nan
    torch.testing.assert_close(hidden_distance(state, wanted, mask), before)


def test_a_plain_module_learns_its_teachers_output() -> None:
    model, teacher, x = plain(), other(plain()), activations()
    found = Objective(True, 1.0, 1.0, teacher=teacher)(model, {"x": x})
    torch.testing.assert_close(found, hidden_distance(model(x), teacher(x), None))


@pytest.mark.parametrize(
    "settings, match",
    (
        (dict(lm_weight=0.0), "at least one of them above 0: got 0.0 and 0.0"),
        (dict(lm_weight=-1.0), "got -1.0"),
        (dict(distill_weight=1.0), "give teacher="),
        (dict(temperature=0.0), "temperature must be above 0, got 0.0"),
    ),
)
def test_settings_that_mean_nothing_are_refused(settings: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        Objective(True, **settings)


def test_a_loss_that_cannot_be_is_refused() -> None:
    with pytest.raises(ConfigError, match="BertModel has no logits.*give teacher="):
        Objective(False)(bert(), {"input_ids": tokens(1, 5)})
    with pytest.raises(ConfigError, match="no labels"):
        Objective(True)(llama(), {"inputs_embeds": torch.zeros(1, 5, 32)})
    stranger = llama(vocab_size=VOCAB + 4)
    with pytest.raises(InputError, match=f"the teacher has {VOCAB + 4} logits and the model {VOCAB}"):
        Objective(True, 0.0, 1.0, teacher=stranger)(llama(), {"input_ids": tokens(1, 5)})
    with pytest.raises(InputError, match="states are"):
        hidden_distance(torch.zeros(1, 2, 3), torch.zeros(1, 2, 4), None)
