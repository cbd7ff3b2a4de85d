"""`linearize(model)`: find, plan, apply exactly, prove, put the mechanism in, prove again.

Or leave the model as it was. The steps are functions of `pipeline.py`.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import nn

from .. import mechanisms
from ..calibration import calibrate as calibration
from ..common.checks import excerpt, unknown
from ..common.given import run_model
from ..common.progress import steps
from ..common.running import quiet_run, shortened, without_cache
from ..errors import ConfigError, InputError, InvalidModelError
from ..passes import find_attention
from ..passes.alike import find_alike
from ..passes.capture import capture
from ..passes.site import MatchReport
from ..planning.config import LinearizeConfig
from ..planning.plan import Plan, plan_sites
from ..planning.state import state_of
from ..rewrite.apply import check_unconverted, finish
from ..rewrite.snapshot import Snapshot
from .change import change, converted_here
from .given_masks import with_given_masks
from .inputs import example_inputs, model_inside
from .pipeline import apply_exact, apply_mechanism, prove_exact, prove_mechanism
from .proof import record

Model = TypeVar("Model", bound=nn.Module)


def linearize(
    model: Model,
    inputs: Any = None,
    config: LinearizeConfig | Mapping[str, Any] | None = None,
    calibrate: Iterable[Any] | None = None,
    *,
    progress: bool | None = None,
    **overrides: Any,
) -> Model:
    """Rewrite the softmax attention of a model to linear attention, in place, and return the model.

    The conversion is proved on the example inputs with exact softmax before the mechanism is put in. Whatever
    is raised, the model is as it was before.

    A converted model changes to other settings in place, for example `linearize(model, mechanism="hedgehog")`
    or `linearize(model, options={"window": 256})`. Where its attention is and what it means was found and
    proved by the conversion and is not asked again; only the attention modules are made anew. Settings that
    are not named stay, but those of the mechanism itself go back to their defaults with another mechanism,
    and `options` are replaced as a whole. New parameters start from their initial values: what was calibrated
    or trained of the old ones is gone, and so are stored evaluations. Layers can become softmax again this
    way; those that are softmax cannot be rewritten without the original.

    Args:
        model: a live `nn.Module` with values, on any device and in any floating-point dtype. Of a module
            around one transformers model, such as a SentenceTransformer, that model is converted; it is what
            other calls of this package take then.
        inputs: example inputs: a dict of keyword arguments, a tuple of positional ones, one tensor, or a list
            of such dicts, of which the last is captured and all are compared. Made from the config of
            transformers models when omitted.
        config: a `LinearizeConfig`, or its fields as a dict; the default one when omitted.
        calibrate: batches for `lz.calibrate`, which then follows at once.
        progress: whether to show a progress bar; on terminals and in notebooks by default.
        **overrides: fields of `LinearizeConfig`, which go before those of `config`.

    Returns:
        `model`. New are one child module per attention site, which holds the new parameters on the device of
        its owner, in float32 whatever the model's dtype (float64 in a float64 model), and the record
        `model._linearize`.

    Raises:
        InvalidModelError: the model is no module, is compiled or scripted, or holds no values; or it is
            converted and no setting is named, the settings rewrite a layer that is softmax, or an adapter
            trains its attention modules.
        InputError: the model does not run on the inputs, or cannot be captured.
        ConfigError: the config has an unknown field or a wrong value.
        NoAttentionError: the model holds no softmax attention.
        RefusedError: some attention cannot be rewritten and `on_refusal` is "error"; it names each and why.
        VerificationError: the rewritten model with exact softmax differs from the original.
    """
    inside = model_inside(model, inputs)
    if inside is not model:
        linearize(inside, None, config, calibrate, progress=progress, **overrides)
        return model
    if converted_here(model):
        check_live(model)
        change(model, inputs, changed_config(model, config, overrides))
        if calibrate is not None:
            calibration.calibrate(model, calibrate, progress=progress)
        return model
    settings = resolve_config(config, overrides)
    check_model(model)
    modules = dict(model.named_modules())
    examples = example_inputs(model, inputs)
    with Snapshot(model):
        with quiet_run(model), steps("linearize", 6, progress) as step:
            step("running")
            for example in examples:
                run_model(model, example)
            step("searching")
            report = search(model, examples)
            plan = plan_sites(model, report, settings)
            _check_lasting(model, plan, modules)
            step("recording")
            recording = record(model, list(plan.owners), examples)
            step("rewriting")
            plan = apply_exact(model, plan, recording, settings, report)
            step("proving")
            prove_exact(model, plan, recording)
            apply_mechanism(model, plan, settings)
            step("running the new attention")
            prove_mechanism(model, recording, settings)
        finish(model, plan, settings)
        if calibrate is not None:
            calibration.calibrate(model, calibrate, progress=progress)
    return model


def planned(
    model: nn.Module,
    inputs: Any = None,
    config: LinearizeConfig | Mapping[str, Any] | None = None,
    **overrides: Any,
) -> Plan:
    """The plan of what `linearize` would rewrite; the model is not changed and nothing is proved.

    Arguments and errors are those of `linearize`.
    """
    settings = resolve_config(config, overrides)
    check_model(model)
    examples = example_inputs(model, inputs)
    with quiet_run(model):
        run_model(model, examples[0])
        report = search(model, examples)
        return plan_sites(model, report, settings)


def changed_config(
    model: nn.Module, config: LinearizeConfig | Mapping[str, Any] | None, overrides: Mapping[str, Any]
) -> LinearizeConfig:
    """The settings that a converted model is to change to. Raises ConfigError, or InvalidModelError when none
    is named."""
    if config is not None:
        return resolve_config(config, overrides)
    if not overrides:
        raise InvalidModelError(
            f"{type(model).__name__} is already linearized; name the settings to change, such as mechanism= "
            "or options=, or load the original to convert it again"
        )
    base = state_of(model).config
    mechanism = overrides.get("mechanism", base.mechanism)
    if mechanism != base.mechanism:
        base = dataclasses.replace(base, mechanism=mechanism, options={}, layer_options={}, augmentation=None)
    return resolve_config(base, overrides)


def resolve_config(
    config: LinearizeConfig | Mapping[str, Any] | None, overrides: Mapping[str, Any]
) -> LinearizeConfig:
    """One `LinearizeConfig` from an object, a dict, keyword overrides, or nothing. Raises ConfigError."""
    if config is None:
        base = LinearizeConfig()
    elif isinstance(config, LinearizeConfig):
        base = config
    elif isinstance(config, Mapping):
        base = LinearizeConfig.from_dict(dict(config))
    else:
        mechanism = isinstance(config, str) and config in mechanisms.available()
        hint = f"; mechanism={config!r} names a mechanism" if mechanism else ""
        raise ConfigError(
            f"config must be a LinearizeConfig or a dict of its fields, got {type(config).__name__}{hint}"
        )
    known = [field.name for field in dataclasses.fields(LinearizeConfig)]
    for name in overrides:
        if name not in known:
            value = excerpt(overrides[name])
            option = name in mechanisms.get(overrides.get("mechanism", base.mechanism)).options
            hint = f'it is an option of the mechanism: options={{"{name}": {value}}}.' if option else ""
            raise ConfigError(unknown("setting", name, known, hint))
    return dataclasses.replace(base, **overrides) if overrides else base


def check_model(model: Any) -> None:
    """Raise InvalidModelError unless `model` is a live, unconverted `nn.Module` with values."""
    check_live(model)
    check_unconverted(model)


def check_live(model: Any) -> None:
    """Raise InvalidModelError unless `model` is a live `nn.Module` with values."""
    if not isinstance(model, nn.Module):
        raise InvalidModelError(f"linearize() works on an nn.Module, got {_got(model)}")
    if isinstance(model, torch.jit.ScriptModule):
        raise InvalidModelError(
            "linearize() cannot work on a TorchScript module; give the original nn.Module"
        )
    if isinstance(model, torch._dynamo.OptimizedModule):
        raise InvalidModelError("the model is compiled; linearize the original, then compile the result")
    _check_dense(model)
    if any(parameter.is_meta for parameter in model.parameters()):
        raise InvalidModelError("the model is on the meta device and holds no values; load its weights first")


def _check_lasting(model: nn.Module, plan: Plan, modules: Mapping[str, nn.Module]) -> None:
    """Raise InvalidModelError where a run put another module in an owner's place, as it would in ours.

    modules: of the model by their names, before it ran.
    """
    for path in plan.owners:
        if model.get_submodule(path) is not modules.get(path):
            raise InvalidModelError(
                f"{type(model).__name__} puts another module in the place of {path!r} when it runs, and "
                "would again once it is saved and loaded: make it in the form that it then has, by its "
                "config (such as attention_type='original_full' of BigBird)"
            )


def _got(model: Any) -> str:
    """What was given in a model's place, and where the model is."""
    kind = type(model).__name__
    if isinstance(getattr(model, "model", None), nn.Module):  # pipelines, trainers, wrappers
        return f"a {kind}; give its `.model`, which is changed in place"
    if isinstance(model, str | os.PathLike):
        return (
            f"{excerpt(os.fspath(model))}; load it first, such as by "
            "transformers.AutoModelForCausalLM.from_pretrained, or convert it on the command line: "
            "linearize convert"
        )
    if isinstance(model, type):
        return f"the class {model.__name__}; give an object of it, with its weights"
    if isinstance(model, tuple | list) and any(isinstance(item, nn.Module) for item in model):
        return f"a {kind} that holds one; give that alone"
    return kind


def _check_dense(model: nn.Module) -> None:
    """Raise InvalidModelError for a model from a GGUF file that transformers still calls quantized.

    Its weights are dense and it would convert, but nothing made of it could be saved.
    """
    record = getattr(getattr(model, "config", None), "quantization_config", None)
    method = getattr(record, "quant_method", None)
    if getattr(method, "value", method) == "gguf":
        raise InvalidModelError(
            "this model was read from a GGUF file and its config calls it quantized, though its weights are "
            "dense, so it could not be saved later. Read it with linearize.load_gguf(path), or before "
            "converting:\n"
            "    del model.config.quantization_config\n"
            "    model.hf_quantizer = None\n"
            "    model.is_quantized = False"
        )


def search(model: nn.Module, examples: Sequence[Mapping[str, Any]]) -> MatchReport:
    """Capture the model on the last example (the padded one, where there is one) and find its attention.

    Masks that are inputs have the pattern that they say there.
    """
    example = without_cache(model, examples[-1])
    positional = tuple(example[name] for name in sorted((n for n in example if n.isdigit()), key=int))
    keywords = {name: value for name, value in example.items() if not name.isdigit()}
    found = find_alike(model, positional, keywords)
    if found is None:
        try:
            graph = capture(model, positional, keywords)
        except Exception as error:
            raise InputError(
                f"{type(model).__name__} could not be captured by torch.export: {shortened(error)}"
            ) from error
        found = find_attention(graph)
    return with_given_masks(found, model, positional, keywords)
