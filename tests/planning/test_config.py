"""The configuration says what is wrong with itself, survives JSON, and knows the mechanisms."""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle

import numpy as np
import pytest
import torch
from linearize.passes.site import Reason

from linearize import mechanisms
from linearize.errors import ConfigError
from linearize.mechanisms.module import AttentionModule
from linearize.mechanisms.spec import SiteSpec
from linearize.planning.build import build_attention
from linearize.planning.config import DROPPABLE, LinearizeConfig

SPEC = SiteSpec(num_heads=4, num_key_value_heads=2, head_dim=8, value_dim=8, causal=True)


def test_round_trip_through_json():
    config = LinearizeConfig(
        mechanism="performer",
        augmentation=True,
        options={"seed": 3, "features": 16},
        layer_options={4: {"features": 8}, "model.layers.10": {"seed": 1}, 10: {"features": 4}},
        group_size=16,
        conv_taps=3,
        local_scale=0.5,
        layers=(0, 2),
        keep_softmax=(1, "model.layers.3.self_attn"),
        on_refusal="keep",
        approximate=("softcap", "bias"),
    )
    assert LinearizeConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert config.to_dict()["version"] == 3
    changed = {f.name for f in dataclasses.fields(config) if getattr(config, f.name) != f.default}
    assert changed == {f.name for f in dataclasses.fields(config)}, "the round trip must cover every field"


def test_absent_fields_take_defaults_and_lists_become_tuples():
    assert LinearizeConfig.from_dict({}) == LinearizeConfig()
    config = LinearizeConfig(layers=[1, 2], keep_softmax=["a"], approximate=["bias"])
    assert (config.layers, config.keep_softmax, config.approximate) == ((1, 2), ("a",), ("bias",))
    assert hash(config) == hash(LinearizeConfig(layers=(1, 2), keep_softmax=("a",), approximate=("bias",)))
    one = LinearizeConfig(layers=np.int64(1), keep_softmax="a", approximate="bias")
    assert one == LinearizeConfig(layers=(1,), keep_softmax=("a",), approximate=("bias",))
    for several in (np.arange(2), torch.arange(2), range(2), {0, 1}):
        assert LinearizeConfig(layers=several).layers == (0, 1)


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
        ("augmentation", 1),
        ("augmentation", "yes"),
        ("options", ("features", 3)),
        ("options", {3: 4}),
        ("layers", (-1,)),
        ("layers", "3"),
        ("layers", 1.5),
        ("layers", ("a",)),
        ("keep_softmax", {"model.layers.0": 1}),
        ("keep_softmax", (1.5,)),
        ("on_refusal", "ignore"),
        ("approximate", ("everything",)),
        ("approximate", "biases"),
    ),
)
def test_a_bad_value_is_named(field, value):
    with pytest.raises(ConfigError, match=field):
        LinearizeConfig(**{field: value})


def test_an_unknown_mechanism_lists_the_known_ones():
    known = "unknown mechanism 'augmentd'; did you mean 'augmented'. known: augmented, augmented_paper"
    with pytest.raises(ConfigError, match=known):
        LinearizeConfig(mechanism="augmentd")
    with pytest.raises(ConfigError, match="unknown mechanism"):
        LinearizeConfig(mechanism=None)


def test_unknown_fields_and_versions_say_what_to_do():
    with pytest.raises(ConfigError, match="did you mean 'group_size'"):
        LinearizeConfig.from_dict({"groupsize": 64})
    with pytest.raises(ConfigError, match="known: mechanism"):
        LinearizeConfig.from_dict({"zzz": 64})
    for version in (0, 4, "3", None, True):
        with pytest.raises(ConfigError, match=f"version {version!r}"):
            LinearizeConfig.from_dict({"version": version})
    with pytest.raises(ConfigError, match="mapping"):
        LinearizeConfig.from_dict([1])


def test_a_config_of_version_1_means_what_it_meant():
    """It knew neither augmentation nor options: `augmented` had its convolution, the ablations none."""
    for mechanism in ("augmented", "local", "grouped", "softmax"):
        config = LinearizeConfig.from_dict({"version": 1, "mechanism": mechanism, "group_size": 16})
        now = "augmented_paper" if mechanism == "augmented" else mechanism
        assert config == LinearizeConfig(mechanism=now, group_size=16)
        assert config.augments == (mechanism == "augmented")


def test_until_version_2_augmented_was_the_name_of_the_paper_s_form_and_the_default():
    for data in ({"version": 2, "mechanism": "augmented"}, {"version": 2}, {"version": 1}):
        assert LinearizeConfig.from_dict(data).mechanism == "augmented_paper"
    assert LinearizeConfig.from_dict({"version": 3, "mechanism": "augmented"}).mechanism == "augmented"
    assert LinearizeConfig.from_dict({"version": 3}) == LinearizeConfig()


def test_options_belong_to_their_mechanism():
    config = LinearizeConfig(mechanism="performer", options={"features": 16})
    assert config.option("features") == 16 and config.option("seed") == 0
    with pytest.raises(KeyError):
        config.option("window")
    assert hash(config) == hash(LinearizeConfig(mechanism="performer", options={"features": 16}))
    assert copy.deepcopy(config) == config and pickle.loads(pickle.dumps(config)) == config
    with pytest.raises(ConfigError, match="'performer' has no option 'feature'; did you mean 'features'"):
        LinearizeConfig(mechanism="performer", options={"feature": 16})
    with pytest.raises(ConfigError, match="known: features, seed"):
        LinearizeConfig(mechanism="performer", options={"window": 16})
    with pytest.raises(ConfigError, match="'relu' has no option 'window': it has none"):
        LinearizeConfig(mechanism="relu", options={"window": 16})


@pytest.mark.parametrize("value", (0, -1, 1.0, True, "16"))
def test_an_option_out_of_range_says_what_it_takes(value):
    with pytest.raises(ConfigError, match="'window' of mechanism 'softmax_window' must be an int >= 1"):
        LinearizeConfig(mechanism="softmax_window", options={"window": value})
    with pytest.raises(ConfigError, match="must be 'relu2' or 'laplace'"):
        LinearizeConfig(mechanism="flash_local", options={"activation": value})


def test_augmentation_is_the_mechanisms_own_unless_said():
    assert LinearizeConfig().augments and not LinearizeConfig(augmentation=False).augments
    local = LinearizeConfig(mechanism="local")
    assert not local.augments and dataclasses.replace(local, augmentation=True).augments
    assert build_attention(SPEC, LinearizeConfig(augmentation=False)).conv_weight is None
    for name in ("local", "relu"):
        built = build_attention(SPEC, LinearizeConfig(mechanism=name, augmentation=True))
        assert built.conv_weight is not None and not built.conv_weight.any()
    with pytest.raises(ConfigError, match="'softmax' takes no convolution"):
        LinearizeConfig(mechanism="softmax", augmentation=True)


def test_the_exact_config_keeps_the_choice_of_sites():
    config = LinearizeConfig(mechanism="performer", options={"features": 8}, augmentation=True, layers=(1,))
    assert config.exact() == LinearizeConfig(mechanism="softmax", layers=(1,))


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
    augmented, softmax = mechanisms.get("augmented_paper"), mechanisms.get("softmax")
    code, sentence = augmented.refusal(spec, terms)
    assert code is reason and need in sentence and "augmented_paper" in sentence
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


@pytest.mark.parametrize("name", ("softmax_window", "power_window"))
def test_windows_of_older_versions_keep_no_first_tokens(name):
    older = LinearizeConfig.from_dict({"version": 2, "mechanism": name, "options": {"window": 8}})
    assert dict(older.options) == {"window": 8, "sinks": 0} and older.option("tail") == "linear"
    assert LinearizeConfig.from_dict({"mechanism": name}).option("sinks") == 4
    assert LinearizeConfig.from_dict(older.to_dict()) == older


def test_options_of_a_layer_go_before_those_of_all_and_a_path_before_an_index():
    config = LinearizeConfig(
        options={"window": 64, "sinks": 2},
        layer_options={"a.1": {"window": 8}, 1: {"window": 16, "salient": 4}, "a.1.b": {"salient": 5}},
    )

    def sizes(path, index):
        own = config.at(path, index)
        assert not own.layer_options
        return tuple(own.option(name) for name in ("window", "sinks", "salient"))

    assert sizes("a.0", 0) == (64, 2, 128)
    assert sizes("x.1", 1) == (16, 2, 4)
    assert sizes("a.1", 1) == (8, 2, 4)
    assert sizes("a.1.b", 1) == (8, 2, 5)
    assert sizes("a.10", 10) == (64, 2, 128)
    assert hash(config) == hash(LinearizeConfig.from_dict(config.to_dict()))
    assert config.exact().layer_options == {}


@pytest.mark.parametrize(
    "value",
    (
        3,
        {-1: {"window": 8}},
        {1.5: {"window": 8}},
        {0: 3},
        {0: {"windw": 8}},
        {0: {"window": -1}},
        [[0, {"window": 8}], [0, {"window": 9}]],
        [[0]],
        [[None, {}]],
    ),
)
def test_options_of_layers_that_make_no_sense_are_named(value):
    with pytest.raises(ConfigError, match="layer_options"):
        LinearizeConfig.from_dict({"layer_options": value})
