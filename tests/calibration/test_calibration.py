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
from linearize.calibration.calibrate import Calibration, _Fit, calibrate
from linearize.calibration.observers import Observation
from linearize.demo.walkthrough import encode, held_out_text, perplexity, training_text, windows
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
    names = [name for name in module.linear_parameters if getattr(module, name, None) is not None]
    with torch.no_grad():
        for name in names:
            getattr(wanted, name).normal_()
    site = SitePlan("layer", 0, "interface", spec, 0, "causal" if causal else "full")
    fit = _Fit(module, site, 1e-9)
    for length, start in ((40, 7), (1, 0)):  # the second call alone would say nothing about the taps
        query, key = torch.randn(2, 4, length, 8), torch.randn(2, 2, length, 8)
        value, mask = torch.randn(2, 2, length, 6), torch.ones(2, length, dtype=torch.bool)
        mask[1, :start] = False
        with torch.no_grad():
            target = wanted(query, key, value, key_mask=mask)
            # What stands at padding must not count.
            target = torch.where(mask[:, None, :, None], target, 1e3)
            fit.see(Observation(query, key, value, target, mask, None, module.spec.cross))
    solution, report = fit.solve()
    assert report.after < 1e-4 < report.before
    fit.assign(solution)
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
    lz.linearize(model)
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
        (lz.linearize(llama().bfloat16(), group_size=4, conv_taps=3), torch.float32),
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
