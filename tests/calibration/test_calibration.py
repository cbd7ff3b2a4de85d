"""Calibration: the fitted weights are the best ones, and nothing is half fitted."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from live_models import VOCAB, activations, converted, llama, tokens
from rich.console import Console
from torch import nn

import linearize as lz
from linearize.calibration.calibrate import Calibration, calibrate, forward
from linearize.calibration.held_out import settle
from linearize.calibration.observers import Observation
from linearize.calibration.regression import Regression
from linearize.calibration.site_fit import Fit, fitted_parameters
from linearize.demo.small_decoder import held_out_text, perplexity, training_text, windows
from linearize.demo.steps import encode
from linearize.errors import InputError, InvalidModelError
from linearize.mechanisms.module import AttentionModule
from linearize.mechanisms.spec import SiteSpec
from linearize.planning.build import build_attention
from linearize.planning.config import LinearizeConfig
from linearize.planning.plan import SitePlan


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def errors(report: Calibration) -> list[tuple[float, float]]:
    return [(site.before, site.after) for site in report.sites]


@pytest.mark.parametrize("causal", (True, False))
@pytest.mark.parametrize("mechanism", ("augmented_paper", "relu", "local"))
def test_weights_that_made_the_target_are_found_again(mechanism: str, causal: bool) -> None:
    """Grouped heads, padding, two calls of other lengths; a target that the mechanism can reach exactly."""
    spec = SiteSpec(num_heads=4, num_key_value_heads=2, head_dim=8, value_dim=6, causal=causal)
    config = LinearizeConfig(mechanism=mechanism, augmentation=True, group_size=16, conv_taps=3)
    torch.manual_seed(0)
    wanted, module = build_attention(spec, config), build_attention(spec, config)
    names = fitted_parameters(module)
    with torch.no_grad():
        for name in names:
            getattr(wanted, name).normal_()
    site = SitePlan("layer", 0, "interface", spec, 0, "causal" if causal else "full")
    fit = Fit(module, site, 1e-9)
    for length, start in ((40, 7), (1, 0)):  # the second call alone would say nothing about the taps
        query, key = torch.randn(2, 4, length, 8), torch.randn(2, 2, length, 8)
        value, mask = torch.randn(2, 2, length, 6), torch.ones(2, length, dtype=torch.bool)
        mask[1, :start] = False
        with torch.no_grad():
            target = wanted(query, key, value, key_mask=mask)
            # What stands at padding must not count.
            target = torch.where(mask[:, None, :, None], target, 1e3)
            fit.see(Observation(query, key, value, target, mask, None, module.spec.cross))
    fit.finish()
    for name in names:
        torch.testing.assert_close(getattr(module, name), getattr(wanted, name), atol=1e-3, rtol=1e-3)


def test_what_the_batches_say_nothing_about_stays_as_it_was() -> None:
    """Sequences of one token show the tap on the present token alone, and no earlier group."""
    model = converted("llama")
    module: Any = model.get_submodule("model.layers.0.self_attn.linear_attention")
    before = {name: parameter.clone() for name, parameter in module.named_parameters()}
    calibrate(model, [tokens(8, 1)])
    assert torch.equal(module.alpha, before["alpha"])
    assert torch.equal(module.conv_weight[:, 1:], before["conv_weight"][:, 1:])
    assert not torch.equal(module.conv_weight[:, 0], before["conv_weight"][:, 0])


def test_the_demo_decoder_gets_most_of_its_perplexity_back() -> None:
    model, tokenizer = lz.load_demo()
    held_out = windows(encode(tokenizer, held_out_text()[1]))[:6]
    original = perplexity(model, held_out)
    lz.linearize(model, mechanism="augmented_paper")
    raw = perplexity(model, held_out)
    report = lz.calibrate(model, windows(encode(tokenizer, training_text()))[:12].split(2))
    fitted = perplexity(model, held_out)
    assert math.log(raw / fitted) > 0.6 * math.log(raw / original)
    assert all(after < before for before, after in errors(report))
    assert report.tokens == 12 * 512


def test_it_stops_at_max_tokens() -> None:
    batches = iter([tokens(2, 30) for _ in range(5)])
    assert calibrate(converted("llama"), batches, max_tokens=100).tokens == 120
    assert len(list(batches)) == 3


def test_padding_changes_nothing() -> None:
    ids = tokens(1, 40)
    padded = torch.cat([torch.zeros(1, 9, dtype=torch.long), ids], 1)
    mask = (torch.arange(49) >= 9).long()[None]
    plain, left = converted("llama"), converted("llama")
    calibrate(plain, [ids])
    calibrate(left, [{"input_ids": padded, "attention_mask": mask}])
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(left.state_dict()[name], value, atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize(
    "name, batch",
    (
        ("bert", tokens(2, 40)),
        ("bart", {"input_ids": tokens(2, 40), "decoder_input_ids": tokens(2, 30)}),
        ("gptj", tokens(2, 40)),
        ("plain", {"x": activations(2, 40)}),
    ),
)
def test_encoders_both_halves_of_an_encoder_decoder_and_grafts(name: str, batch: Any) -> None:
    model = converted(name)
    old = {n: v for n, v in weights(model).items() if "linear_attention" not in n}
    children = {n: m for n, m in model.named_modules() if isinstance(m, AttentionModule)}
    report = calibrate(model, [batch])
    assert len(report.sites) == len(children)
    assert all(after < 0.9 * before for before, after in errors(report))
    assert {n: m for n, m in model.named_modules() if isinstance(m, AttentionModule)} == children
    now = model.state_dict()
    assert all(torch.equal(now[n], v) for n, v in old.items()), "only new parameters are fitted"


def test_in_one_call() -> None:
    batches = [tokens(2, 40)]
    once, twice = lz.linearize(llama(), calibrate=batches), lz.linearize(llama())
    calibrate(twice, batches)
    assert all(torch.equal(a, b) for a, b in zip(once.parameters(), twice.parameters(), strict=True))
    model = llama()
    with pytest.raises(InputError, match="never called"):
        lz.linearize(model, calibrate=[])
    assert not hasattr(model, "_linearize")


def test_the_same_result_in_bfloat16() -> None:
    for model, kept in (
        (converted("llama").bfloat16(), torch.bfloat16),
        (lz.linearize(llama().bfloat16(), mechanism="augmented_paper", group_size=4), torch.float32),
    ):
        report = calibrate(model, [tokens(2, 40)])
        assert all(after < 0.9 * before for before, after in errors(report))
        new = {p.dtype for name, p in model.named_parameters() if "linear_attention" in name}
        assert new == {kept}


@pytest.mark.parametrize(
    "make, batches, error, match",
    (
        (llama, [tokens(2, 8)], InvalidModelError, "not converted"),
        (lambda: converted("llama", mechanism="softmax"), [tokens(2, 8)], InvalidModelError, "nothing"),
        (lambda: converted("llama", mechanism="relu"), [tokens(2, 8)], InvalidModelError, "augmentation"),
        (lambda: converted("llama"), [], InputError, "never called"),
        (lambda: converted("llama"), ["text"], InputError, "token ids"),
        (lambda: converted("llama"), [torch.zeros(0, 4, dtype=torch.long)], InputError, "empty"),
        (lambda: converted("llama"), [tokens(2, 8), tokens(2, 8) + VOCAB], InputError, "does not run"),
    ),
)
def test_what_cannot_be_fitted_is_refused_and_changes_nothing(
    make: Any, batches: Any, error: type[Exception], match: str
) -> None:
    model = make()
    before, modules = weights(model), dict(model.named_modules())
    with pytest.raises(error, match=match):
        calibrate(model, batches)
    assert dict(model.named_modules()) == modules
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())


def test_values_that_are_not_finite_are_refused() -> None:
    model = converted("llama")
    with torch.no_grad():
        model.model.layers[0].self_attn.v_proj.weight[0, 0] = torch.inf  # type: ignore[union-attr, index, operator]
    before = weights(model)
    with pytest.raises(InputError, match="layers.0.*not finite"):
        calibrate(model, [tokens(2, 40)])
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())


def test_the_report_is_a_table_of_sites() -> None:
    console = Console(record=True, width=120)
    console.print(calibrate(converted("llama"), [tokens(2, 40)]))
    text = console.export_text()
    assert "model.layers.1.self_attn.linear_attention" in text and "80 tokens" in text


# --- what does not help is not kept


def test_the_tail_that_made_the_target_is_found_again() -> None:
    spec = SiteSpec(num_heads=4, num_key_value_heads=2, head_dim=8, value_dim=6, causal=True)
    config = LinearizeConfig(
        mechanism="augmented", options={"window": 8, "sinks": 1, "salient": 3}, conv_taps=4
    )
    torch.manual_seed(0)
    wanted, module = build_attention(spec, config), build_attention(spec, config)
    with torch.no_grad():
        wanted.tail_weight.normal_(std=0.2)
    fit = Fit(module, SitePlan("layer", 0, "interface", spec, 0, "causal"), 1e-9)
    for length in (300, 200):
        query, key = torch.randn(2, 4, length, 8), torch.randn(2, 2, length, 8)
        value, mask = torch.randn(2, 2, length, 6), torch.ones(2, length, dtype=torch.bool)
        mask[1, :40] = False
        with torch.no_grad():
            target = wanted(query, key, value, key_mask=mask)
            passed_on = fit.see(Observation(query, key, value, target, mask, None, False))
            torch.testing.assert_close(passed_on, module(query, key, value, key_mask=mask))
    fit.finish()
    torch.testing.assert_close(module.tail_weight, wanted.tail_weight, atol=1e-3, rtol=1e-3)


def test_a_head_whose_target_cannot_be_predicted_stays_as_it_was() -> None:
    generator = torch.Generator().manual_seed(0)
    regression = Regression()
    truth = torch.randn(5, 3, generator=generator)
    for _ in range(4):
        columns = torch.randn(2, 20, 5, generator=generator)
        noise = torch.randn(1, 20, 3, generator=generator) * 30
        regression.add(columns, torch.cat([columns[:1] @ truth, noise]))
    found = regression.weights(last=True)
    torch.testing.assert_close(found[0].float(), truth, atol=1e-2, rtol=1e-2)
    assert (found[1] == 0).all()
    before, after = regression.errors()
    assert after < before


class Change:
    """Stands for a fit: `put` adds `amount` to one layer's local part."""

    def __init__(self, module: Any, amount: float, gain: float) -> None:
        self.module, self.amount, self.gain = module, amount, gain
        self.before = module.local_scale.detach().clone()
        self.put()

    def put(self) -> None:
        self.module.local_scale.data.copy_(self.before + self.amount)

    def restore(self) -> None:
        self.module.local_scale.data.copy_(self.before)


@pytest.mark.parametrize(("gains", "stay"), (((0.1, 0.2), {1}), ((0.2, 0.1), set())))
def test_layers_whose_fit_makes_held_out_text_worse_are_put_back_and_said(
    gains: tuple[float, float], stay: set[int]
) -> None:
    """The first layer's fit is bad. Those that helped least go first, until nothing is worse."""
    model: Any = converted("llama")
    modules = [layer.self_attn.linear_attention for layer in model.model.layers]
    with torch.no_grad():  # text that the model finds likely as it is
        ids = torch.cat([tokens(2, 1), model(tokens(2, 40), use_cache=False).logits.argmax(-1)[:, :-1]], 1)
        ids = torch.cat([ids[:, :1], model(ids, use_cache=False).logits.argmax(-1)[:, :-1]], 1)
        start = model(ids, labels=ids, use_cache=False).loss.exp()
        amounts = (30.0, 0.0)
        fits = {str(n): Change(modules[n], amounts[n], gains[n]) for n in range(2)}
        worse, (row,) = settle(model, [{"input_ids": ids}], fits, forward)  # type: ignore[arg-type]
        end = model(ids, labels=ids, use_cache=False).loss.exp()
    assert set(worse) == {"0", "1"} - set(map(str, stay)) and all("worse" in why for why in worse.values())
    assert torch.equal(modules[0].local_scale, fits["0"].before)
    assert (row.first, row.last) == (0, 511) and row.after == row.before
    assert row.before == pytest.approx(float(start), rel=1e-5) and end == start


def test_every_fifth_batch_is_held_out_and_has_no_part_in_the_fit() -> None:
    batches, other = [tokens(2, 40) for _ in range(4)], torch.full((2, 40), 7)
    alone, report = calibrate(converted("llama"), batches), calibrate(converted("llama"), [*batches, other])
    (row,) = report.held_out
    assert not alone.held_out and row.after <= row.before
    assert report.tokens == 5 * 80 and errors(report) == errors(alone)


def test_downstream_layers_see_what_the_fitted_ones_give() -> None:
    """The second layer is fitted on the converted model's own activations: the first layer's parameters
    change what it finds."""
    found = []
    for scale in (0.0, 3.0):
        model = converted("llama")
        first: Any = model.get_submodule("model.layers.0.self_attn.linear_attention")
        first.linear_parameters = ()  # not fitted: gives what its parameters say
        with torch.no_grad():
            first.local_scale.fill_(scale)
        report = calibrate(model, [tokens(2, 40)])
        assert report.sites[0].left_out
        second: Any = model.get_submodule("model.layers.1.self_attn.linear_attention")
        found.append(second.conv_weight.clone())
    assert not torch.allclose(*found)
