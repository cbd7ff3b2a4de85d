"""Example inputs: those the user gives, brought to one form, or made from a transformers model's config.

Made by what the forward signature and the config say (`input_ids` and a vocabulary, `pixel_values` and an
image size, ...), never by architecture name: candidates are built and the first one the model runs on is
kept.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..cache.lookup import check_empty
from ..common.checks import excerpt
from ..common.given import check_names
from ..common.running import call, generates, quiet_run, without_cache
from ..errors import InputError
from ..mechanisms import available
from ..planning.config import LinearizeConfig

LENGTHS = (11, 23)
"""Token counts of the two example sizes, unlike each other and unlike usual head counts and sizes."""
BATCHES = (2, 3)


def example_inputs(model: nn.Module, inputs: Any = None) -> list[dict[str, Any]]:
    """Example inputs as keyword dicts (positional arguments under the names "0", "1", ...).

    Made inputs come at two sizes and, where the model takes an attention mask, padded on either side; the
    last one is the padded one. Raises InputError when `inputs` has an unusable form, or cannot be made.
    """
    if inputs is not None:
        examples = [_moved(model, example) for example in _given(inputs)]
        for example in examples:
            check_empty(example)
            check_names(model, example)
        return examples
    if not _is_of_transformers(model):
        raise InputError(
            "example inputs can be made for transformers models only; call linearize(model, inputs) with "
            f"inputs that {type(model).__name__}.forward takes"
        )
    made: list[dict[str, Any]] = []
    problems: list[str] = []
    for batch, length in zip(BATCHES, LENGTHS, strict=True):
        found = _first_that_runs(model, batch, length, problems)
        made += [] if found is None else [found]
    if not made:
        reason = problems[0] if problems else "no known input name in the forward signature"
        raise InputError(
            f"no example inputs could be made for {type(model).__name__} ({reason}); give them: "
            "linearize(model, inputs)"
        )
    padded = _padded(model, made[-1])
    return made + ([padded] if padded is not None else [])


def model_inside(model: Any, inputs: Any) -> Any:
    """The transformers model in a module around it, as a SentenceTransformer is; else `model` itself.

    Only where there is just one, and no inputs are given, which would be those of the module around it.
    """
    if inputs is not None or not isinstance(model, nn.Module) or _is_of_transformers(model):
        return model
    found = [module for module in model.modules() if _is_of_transformers(module)]
    inside = {id(part) for module in found for part in module.modules() if part is not module}
    outermost = [module for module in found if id(module) not in inside]
    return outermost[0] if len(outermost) == 1 else model


def _is_of_transformers(model: nn.Module) -> bool:
    return getattr(model, "config", None) is not None and hasattr(model, "main_input_name")


def _given(inputs: Any) -> list[dict[str, Any]]:
    if isinstance(inputs, Tensor):
        return [{"0": inputs}]
    if isinstance(inputs, Mapping):
        if not all(isinstance(name, str) for name in inputs):
            raise InputError("a dict of example inputs must have argument names as keys")
        settings = {field.name for field in dataclasses.fields(LinearizeConfig)}
        if inputs and settings.issuperset(inputs):
            raise InputError("inputs are those of the model, and these are settings: give them as config=")
        return [dict(inputs)]
    if isinstance(inputs, list) and inputs and all(isinstance(item, Mapping) for item in inputs):
        return [dict(item) for item in inputs]
    if isinstance(inputs, (tuple, list)) and inputs:
        return [{str(index): value for index, value in enumerate(inputs)}]
    wrong = excerpt(inputs) if isinstance(inputs, str) else type(inputs).__name__
    more = "; settings go by name, such as mechanism= or config=" if _is_setting(inputs) else ""
    raise InputError(
        "inputs must be a dict of keyword arguments, a tuple of positional ones, one tensor, or a list of "
        f"dicts; got {wrong}{more}"
    )


def _is_setting(inputs: Any) -> bool:
    return isinstance(inputs, LinearizeConfig) or (isinstance(inputs, str) and inputs in available())


def _first_that_runs(model: nn.Module, batch: int, length: int, problems: list[str]) -> dict[str, Any] | None:
    for candidate in _candidates(model, batch, length):
        example = _placed(model, candidate)
        try:
            with quiet_run(model):
                call(model, without_cache(model, example))
            return example
        except Exception as error:
            # Any exception means "not these inputs"; the first is reported when nothing runs.
            first = (str(error).strip() or type(error).__name__).splitlines()[0]
            problems.append(f"{', '.join(candidate)}: {type(error).__name__}: {first}")
    return None


def _moved(model: nn.Module, example: dict[str, Any]) -> dict[str, Any]:
    """Tensors on the model's device, where that is one."""
    devices = {tensor.device for tensor in (*model.parameters(), *model.buffers())}
    if len(devices) != 1:
        return example
    (device,) = devices
    return {name: x.to(device) if isinstance(x, Tensor) else x for name, x in example.items()}


def _placed(model: nn.Module, example: Mapping[str, Any]) -> dict[str, Any]:
    """Tensors on the model's device, floating ones in its dtype."""
    reference = next((p for p in model.parameters() if p.is_floating_point()), None)
    if reference is None:
        return dict(example)
    return {
        name: value.to(reference.device, reference.dtype if value.is_floating_point() else value.dtype)
        if isinstance(value, Tensor)
        else value
        for name, value in example.items()
    }


def _candidates(model: nn.Module, batch: int, length: int) -> Iterator[dict[str, Any]]:
    """Plausible inputs for the forward signature, most likely first."""
    names = inspect.signature(model.forward).parameters
    config: Any = model.config
    generator = torch.Generator().manual_seed(length)
    optional: dict[str, Any] = {}
    text = "input_ids" in names and _vocabulary(config) is not None
    if text:
        optional["input_ids"] = _tokens(config, batch, length, generator)
        if "attention_mask" in names:
            optional["attention_mask"] = torch.ones(batch, length, dtype=torch.long)
        if "bbox" in names:
            optional["bbox"] = torch.zeros(batch, length, 4, dtype=torch.long)
    decoder: dict[str, Any] = {}
    if getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" in names:
        decoder["decoder_input_ids"] = _tokens(config, batch, length - 4, generator)
        if "decoder_attention_mask" in names:
            decoder["decoder_attention_mask"] = torch.ones(batch, length - 4, dtype=torch.long)
    media = list(_media(config, names, batch, length, generator))
    for medium in media:
        if text:
            yield {**optional, **medium, **decoder}
        yield {**medium, **decoder}
    if text:
        yield {**optional, **decoder}
    if "inputs_embeds" in names and hasattr(config, "hidden_size"):
        yield {
            "inputs_embeds": torch.randn(batch, length, int(config.hidden_size), generator=generator),
            **decoder,
        }
    dummy = getattr(model, "dummy_inputs", None)
    if isinstance(dummy, Mapping):
        yield dict(dummy)


def _media(
    config: Any, names: Any, batch: int, length: int, generator: torch.Generator
) -> Iterator[dict[str, Any]]:
    """Images, videos and sound by the argument names the forward has."""
    vision = _field_owner(config, "image_size", "patch_size")
    if "pixel_values" in names and "spatial_shapes" in names and vision is not None:
        yield _patches_in_rows(vision, names, batch, generator)
    elif "pixel_values" in names and vision is not None:
        size = getattr(vision, "image_size", 224)
        height, width = (size, size) if isinstance(size, int) else tuple(size)[:2]
        channels = getattr(vision, "num_channels", 3)
        frames = getattr(vision, "num_frames", None)
        if frames:
            yield {"pixel_values": torch.randn(batch, frames, channels, height, width, generator=generator)}
        yield {"pixel_values": torch.randn(batch, channels, height, width, generator=generator)}
    elif "pixel_values" in names:
        channels = getattr(config, "num_channels", 3)
        for side in (64, 224):
            yield {"pixel_values": torch.randn(batch, channels, side, side, generator=generator)}
    grid = next((name for name in ("grid_thw", "image_grid_thw") if name in names), None)
    if grid is not None and not _vocabulary(config):
        yield from _patches(config, names, grid, batch, generator)
    if "query_embeds" in names and isinstance(getattr(config, "hidden_size", None), int):
        queries = {"query_embeds": torch.randn(batch, length, config.hidden_size, generator=generator)}
        width = getattr(config, "encoder_hidden_size", None) if "encoder_hidden_states" in names else None
        if width:
            seen = torch.randn(batch, 2 * length, width, generator=generator)
            yield {**queries, "encoder_hidden_states": seen}
        yield queries
    if "input_features" in names:
        sound = (
            _field_owner(config, "num_mel_bins", "input_feat_per_channel", "feature_projection_input_dim")
            or config
        )
        bins = getattr(sound, "num_mel_bins", None)
        positions = getattr(sound, "max_source_positions", None)
        masks = [name for name in ("input_features_mask", "feature_attention_mask") if name in names]
        for frames in (2 * positions if positions else None, 8 * length):
            if bins and frames:
                whole = torch.ones(batch, frames, dtype=torch.long)
                sound_of = torch.randn(batch, bins, frames, generator=generator)
                yield {"input_features": sound_of, **dict.fromkeys(masks, whole)}
        for name in ("input_feat_per_channel", "feature_projection_input_dim", "num_mel_bins", "hidden_size"):
            width = getattr(sound, name, None)
            if isinstance(width, int):
                yield {"input_features": torch.randn(batch, 8 * length, width, generator=generator)}
    if "input_values" in names:
        bins, frames = getattr(config, "num_mel_bins", None), getattr(config, "max_length", None)
        if bins and frames:
            yield {"input_values": torch.randn(batch, frames, bins, generator=generator)}
        strides = getattr(config, "conv_stride", None) or [320]
        hop = 1
        for stride in strides:
            hop *= stride
        yield {"input_values": torch.randn(batch, hop * (length + 4), generator=generator)}
        yield {"input_values": torch.randn(batch, 1, hop * (length + 4), generator=generator)}


def _patches(
    config: Any, names: Any, grid: str, images: int, generator: torch.Generator
) -> Iterator[dict[str, Any]]:
    """Images as rows of patches that lie end to end, and how many patches each has in time, height, width."""
    side: Any = getattr(config, "patch_size", None)
    frames: Any = getattr(config, "temporal_patch_size", 1)
    channels: Any = getattr(config, "in_channels", None) or getattr(config, "num_channels", 3)
    name = next((name for name in ("hidden_states", "pixel_values") if name in names), None)
    if name is None or not isinstance(side, int):
        return
    merged = 2 * int(getattr(config, "spatial_merge_size", 2))
    for time in (frames, 1):
        width = channels * time * side**2
        yield {
            name: torch.randn(images * merged**2, width, generator=generator),
            grid: torch.tensor([[1, merged, merged]] * images),
        }


def _patches_in_rows(vision: Any, names: Any, batch: int, generator: torch.Generator) -> dict[str, Any]:
    """Images as one row of patches for each, padded to one length, and their height and width in patches."""
    height, width = 4, 3
    features = getattr(vision, "num_channels", 3) * vision.patch_size**2
    masks = [name for name in ("pixel_attention_mask",) if name in names]
    return {
        "pixel_values": torch.randn(batch, height * width, features, generator=generator),
        "spatial_shapes": torch.tensor([[height, width]] * batch),
        **dict.fromkeys(masks, torch.ones(batch, height * width, dtype=torch.long)),
    }


def _field_owner(config: Any, *names: str) -> Any | None:
    """The config or sub-config that has one of the fields, the outermost first."""
    parts = [config, *(getattr(config, key, None) for key in getattr(config, "sub_configs", {}))]
    parts += [getattr(config, key, None) for key in ("vision_config", "audio_config", "encoder")]
    return next(
        (part for part in parts if part is not None and any(hasattr(part, name) for name in names)), None
    )


def _vocabulary(config: Any) -> int | None:
    for part in (config, _text_config(config)):
        size = getattr(part, "vocab_size", None)
        if isinstance(size, int) and size > 0:
            return size
    return None


def _text_config(config: Any) -> Any:
    try:
        return config.get_text_config()
    except (AttributeError, ValueError):
        return getattr(config, "text_config", config)


def _tokens(config: Any, batch: int, length: int, generator: torch.Generator) -> Tensor:
    """Ordinary tokens `[batch, length]`: no id that the config gives a special meaning."""
    size = _vocabulary(config) or 2
    special: set[int] = set()
    for part in (config, _text_config(config)):
        for name, value in vars(part).items():
            if name.endswith(("token_id", "token_index")):
                special.update(
                    v for v in (value if isinstance(value, list) else [value]) if isinstance(v, int)
                )
    ordinary = torch.tensor([i for i in range(size) if i not in special] or [0])
    return ordinary[torch.randint(len(ordinary), (batch, length), generator=generator)]


def _padded(model: nn.Module, example: Mapping[str, Any]) -> dict[str, Any] | None:
    """`example` with some rows padded, on the left for models that generate and on the right for others."""
    result = dict(example)
    changed = False
    for name, mask in example.items():
        if (
            name.endswith("attention_mask")
            and isinstance(mask, Tensor)
            and mask.ndim == 2
            and mask.shape[1] > 6
        ):
            padded = mask.clone()
            left = not getattr(model.config, "is_encoder_decoder", False) and generates(model)
            if left:
                padded[0, :4] = 0
                padded[-1, :1] = 0
            else:
                padded[0, -4:] = 0
                padded[-1, -1:] = 0
            result[name] = padded
            changed = True
    return result if changed else None
