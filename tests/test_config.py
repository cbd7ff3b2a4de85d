"""The configuration says what is wrong with itself, survives JSON, and knows the mechanisms."""

from __future__ import annotations

import dataclasses
import json

import pytest
from linearize.passes.site import Reason

from linearize import mechanisms
from linearize.attention import AttentionModule, SiteSpec, build_attention
from linearize.config import DROPPABLE, LinearizeConfig
from linearize.errors import ConfigError

SPEC = SiteSpec(num_heads=4, num_key_value_heads=2, head_dim=8, value_dim=8, causal=True)


def test_round_trip_through_json():
    config = LinearizeConfig(
        mechanism="local",
        group_size=16,
        conv_taps=3,
        local_scale=0.5,
        layers=(0, 2),
        keep_softmax=(1, "model.layers.3.self_attn"),
        on_refusal="keep",
        approximate=("softcap", "bias"),
    )
    assert LinearizeConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert config.to_dict()["version"] == 1
    changed = {f.name for f in dataclasses.fields(config) if getattr(config, f.name) != f.default}
    assert changed == {f.name for f in dataclasses.fields(config)}, "the round trip must cover every field"


def test_absent_fields_take_defaults_and_lists_become_tuples():
    assert LinearizeConfig.from_dict({}) == LinearizeConfig()
    config = LinearizeConfig(layers=[1, 2], keep_softmax=["a"], approximate=["bias"])
    assert (config.layers, config.keep_softmax, config.approximate) == ((1, 2), ("a",), ("bias",))
    assert hash(config) == hash(LinearizeConfig(layers=(1, 2), keep_softmax=("a",), approximate=("bias",)))


@pytest.mark.parametrize(
    "field, value",
    (
        ("group_size", 0),
        ("group_size", 64.0),
        ("group_size", True),
        ("conv_taps", 0),
        ("conv_taps", "32"),
        ("local_scale", "1"),
        ("local_scale", float("nan")),
        ("local_scale", float("inf")),
        ("layers", (-1,)),
        ("layers", 3),
        ("layers", ("a",)),
        ("keep_softmax", "model.layers.0"),
        ("keep_softmax", (1.5,)),
        ("on_refusal", "ignore"),
        ("approximate", ("everything",)),
        ("approximate", "bias"),
    ),
)
def test_a_bad_value_is_named(field, value):
    with pytest.raises(ConfigError, match=field):
        LinearizeConfig(**{field: value})


def test_an_unknown_mechanism_lists_the_known_ones():
    with pytest.raises(
        ConfigError, match="unknown mechanism 'augmentd'; known: augmented, grouped, local, softmax"
    ):
        LinearizeConfig(mechanism="augmentd")
    with pytest.raises(ConfigError, match="unknown mechanism"):
        LinearizeConfig(mechanism=None)


def test_unknown_fields_and_versions_say_what_to_do():
    with pytest.raises(ConfigError, match="did you mean 'group_size'"):
        LinearizeConfig.from_dict({"groupsize": 64})
    with pytest.raises(ConfigError, match="known fields: mechanism"):
        LinearizeConfig.from_dict({"zzz": 64})
    with pytest.raises(ConfigError, match="version 2"):
        LinearizeConfig.from_dict({"version": 2})
    with pytest.raises(ConfigError, match="mapping"):
        LinearizeConfig.from_dict([1])


@pytest.mark.parametrize("name", sorted(mechanisms.available()))
def test_every_mechanism_builds_what_it_says_it_supports(name):
    mechanism = mechanisms.get(name)
    assert mechanism.name == name and mechanism.formula
    kinds = {
        "causal": SPEC,
        "bidirectional": dataclasses.replace(SPEC, causal=False),
        "cross": dataclasses.replace(SPEC, causal=False, cross=True),
    }
    for kind, spec in kinds.items():
        assert (mechanism.refusal(spec) is None) == (kind in mechanism.supports)
        if kind in mechanism.supports:
            assert isinstance(build_attention(spec, LinearizeConfig(mechanism=name)), AttentionModule)


@pytest.mark.parametrize(
    "need, reason",
    (
        ("softcap", Reason.SOFTCAP_UNSUPPORTED),
        ("window", Reason.MASK_UNSUPPORTED),
        ("mask", Reason.MASK_UNSUPPORTED),
        ("bias", Reason.BIAS_UNSUPPORTED),
        ("alibi", Reason.BIAS_UNSUPPORTED),
        ("sinks", Reason.SINKS_UNSUPPORTED),
    ),
)
def test_what_a_mechanism_cannot_carry_is_refused_until_dropped_knowingly(need, reason):
    spec = dataclasses.replace(SPEC, **{need: 8}) if need in ("softcap", "window") else SPEC
    terms = () if need in ("softcap", "window") else (need,)
    augmented, softmax = mechanisms.get("augmented"), mechanisms.get("softmax")
    code, sentence = augmented.refusal(spec, terms)
    assert code is reason and need in sentence and "augmented" in sentence
    assert softmax.refusal(spec, terms) is None
    dropped = augmented.refusal(spec, terms, approximate=(need,))
    assert (dropped is None) == (need in DROPPABLE)


def test_site_spec_round_trip_and_errors():
    assert SiteSpec.from_dict(json.loads(json.dumps(SPEC.to_dict()))) == SPEC
    for wrong in (
        dict(num_heads=3),
        dict(head_dim=0),
        dict(cross=True),
        dict(kv_layout="x"),
        dict(dropout=2.0),
    ):
        with pytest.raises(ConfigError):
            dataclasses.replace(SPEC, **wrong)
    with pytest.raises(ConfigError, match="not a site spec"):
        SiteSpec.from_dict({"heads": 4})
