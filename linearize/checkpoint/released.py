"""The paper's released LLaMA-2 checkpoints (You et al., arXiv 2406.07368) as ordinary converted models.

The reference code (GATECH-EIC/Linearized-LLM at 273274e, `fine-tune.py` and `gen_model_answer_medusa.py`)
adds to every `self_attn` of a LLaMA:

| key             | shape        | meaning                                  | here                           |
|-----------------|--------------|------------------------------------------|--------------------------------|
| `dwconv.weight` | [H, 1, K, 1] | Conv2d over values, pad K // 2, K = 63   | `conv_weight` [H, (K + 1) / 2] |
| `conv_mask`     | [1, 1, K, 1] | zeros for the taps that look ahead       | applied once, not kept         |
| `global_factor` | [1]          | weight of the grouped part               | `alpha` [H], all the same      |
| `local_factor`  | [1]          | weight of the local part, in training    | `local_scale` [H], the same    |

Its kernel runs from the past to the future: tap i weights the value at t + i - K // 2, ours at t - i, so the
causal half is reversed.

What such a checkpoint does not say, because the reference reads it from environment variables: the group
size, whether there is a grouped part without a factor, and whether one of its other options (castling, YOSO,
norms, dilation) was set. The released models have none of those.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..common.files import read_json
from ..convert.linearize import linearize
from ..errors import CheckpointError, InvalidModelError
from ..planning.config import LinearizeConfig
from ..planning.state import state_of
from ..rewrite.apply import check_unconverted
from ..rewrite.lora import require_peft
from ..rewrite.snapshot import Snapshot
from .weight_files import Source, read

if TYPE_CHECKING:
    from transformers import PreTrainedModel

OWNER = "self_attn"
NEW = ("dwconv.weight", "conv_mask", "global_factor", "local_factor")
WRAPPED = "base_model.model."
ADAPTER_CONFIG = "adapter_config.json"


def load_released(
    source: Source,
    base: PreTrainedModel | str | os.PathLike[str] | None = None,
    *,
    extra: Source | None = None,
    group_size: int = 64,
    alpha: float | None = None,
    dtype: torch.dtype | None = None,
) -> PreTrainedModel:
    """Load one of the paper's released LLaMA checkpoints as a converted model; `save` writes it as any other.

    Whatever is raised, a given base is as it was.

    Args:
        source: A folder (whole weights, in shards or not, safetensors or .bin; or a PEFT LoRA adapter, which
            is merged), a file, or tensors by name.
        base: The LLaMA that the checkpoint was made from: a model, which is converted in place and returned,
            or a folder. Leave it out if `source` is a folder with whole weights and a config.json.
        extra: More tensors, in any form that `source` takes. The paper's code trains convolution and factors
            outside of the adapter, so a folder with an adapter does not hold them.
        group_size: Tokens per group, which the checkpoint does not say: 64 in the paper, 256 in its models
            for 8K tokens.
        alpha: Weight of the grouped part where the checkpoint has no `global_factor`: 1.0 for grouped
            attention without a factor, 0.0 for none.
        dtype: Floating dtype of a model that is loaded here; as stored by default.

    Returns:
        The converted model.

    Raises:
        CheckpointError: A tensor is missing, unknown, or of another shape than the model's; the message names
            it.
        InvalidModelError: The base cannot be converted.
        MissingExtraError: The checkpoint has LoRA matrices, and PEFT is not installed.
    """
    tensors = _sorted([*read(source), *(() if extra is None else read(extra))])
    model: Any = base if isinstance(base, nn.Module) else _model(source, base, tensors.weights, dtype)
    check_unconverted(model)
    found = _new_parameters(tensors.new, model, alpha)
    config = LinearizeConfig(
        mechanism="augmented_paper" if found.alpha else "local",
        group_size=group_size,
        conv_taps=found.taps,
        augmentation=bool(found.convolution),
    )
    with Snapshot(model, keep="tensors"):
        _place(model, tensors.weights)
        if tensors.lora:
            _merge_lora(model, tensors.lora, _adapter_config(source, extra))
        linearize(model, config=config)
        _fill(model, found)
    return model


@dataclass
class _Tensors:
    """What a checkpoint holds. weights: of the LLaMA, by its names. lora: as PEFT writes an adapter. new: by
    path of the owner and key."""

    weights: dict[str, Tensor] = field(default_factory=dict)
    lora: dict[str, Tensor] = field(default_factory=dict)
    new: dict[tuple[str, str], Tensor] = field(default_factory=dict)


def _sorted(files: Iterable[Mapping[str, Tensor]]) -> _Tensors:
    tensors = _Tensors()
    for file in files:
        for name, tensor in file.items():
            plain = name.removeprefix(WRAPPED).replace(".modules_to_save.default.", ".")
            plain = plain.replace(".base_layer.", ".")
            owner, dot, key = plain.partition(f".{OWNER}.")
            if plain.endswith("rotary_emb.inv_freq") or ".original_module." in plain:
                continue  # a table that transformers makes itself; what a trained copy stands for
            if ".lora_" in plain:
                _add(tensors.lora, WRAPPED + plain.replace(".default.", "."), tensor, name)
            elif dot and key in NEW:
                _add(tensors.new, (f"{owner}.{OWNER}", key), tensor, name)
            else:
                _add(tensors.weights, plain, tensor, name)
    return tensors


def _add(known: dict[Any, Tensor], key: Any, tensor: Tensor, name: str) -> None:
    if key in known and not torch.equal(known[key], tensor):
        raise CheckpointError(f"{name} is in the checkpoint twice, with different values")
    known[key] = tensor


def _model(
    source: Source, base: Any, weights: Mapping[str, Tensor], dtype: torch.dtype | None
) -> PreTrainedModel:
    """The model to convert, from the folder `base`, or from `source` itself."""
    from transformers import LlamaConfig, LlamaForCausalLM

    options: dict[str, Any] = dict(dtype=dtype or "auto", output_loading_info=True)
    try:
        if base is not None:
            if not (Path(base) / "config.json").is_file():
                raise CheckpointError(f"cannot load the base model: {base} is no folder with a config.json")
            model, info = LlamaForCausalLM.from_pretrained(base, local_files_only=True, **options)
        elif isinstance(source, Mapping) or not (Path(source) / "config.json").is_file():
            raise CheckpointError(
                "this checkpoint has no config.json: give the LLaMA that it was made from as `base`"
            )
        else:
            config = LlamaConfig.from_pretrained(source, local_files_only=True)
            with torch.device("meta"):
                _check_fit(LlamaForCausalLM(config), weights)
            model, info = LlamaForCausalLM.from_pretrained(
                None, config=config, state_dict=dict(weights), **options
            )
            model.config.name_or_path = str(source)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"cannot load {source if base is None else base}: {error}") from error
    if info["missing_keys"]:
        raise CheckpointError(f"{min(info['missing_keys'])} is missing from the checkpoint")
    return model


def _check_fit(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Raise CheckpointError unless every tensor is one of the model's, of its shape."""
    have = dict(model.named_parameters(remove_duplicate=False))
    for name, tensor in weights.items():
        if name not in have:
            raise CheckpointError(
                f"{name} is not a weight of {type(model).__name__}, nor one of {', '.join(NEW)} that the "
                "paper's code adds to an attention layer"
            )
        if have[name].shape != tensor.shape:
            hint = "; resize the base with resize_token_embeddings first" if "embed_tokens" in name else ""
            raise CheckpointError(
                f"{name} is {tuple(tensor.shape)} in the checkpoint and {tuple(have[name].shape)} in the "
                f"model{hint}"
            )


def _place(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Put the checkpoint's weights in place of the model's; the old tensors stay as they are."""
    _check_fit(model, weights)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, tensor in weights.items():
        parameters[name].data = torch.empty_like(parameters[name].data).copy_(tensor)


@dataclass
class _Found:
    """The new parameters by path of their owner, in our form; an empty mapping where there are none.

    convolution [H, taps], alpha and local [1].
    """

    taps: int
    convolution: dict[str, Tensor]
    alpha: dict[str, Tensor]
    local: dict[str, Tensor]


def _new_parameters(new: Mapping[tuple[str, str], Tensor], model: nn.Module, alpha: float | None) -> _Found:
    """Check what the checkpoint adds and bring it to our form. Raises CheckpointError."""
    owners = [name for name, _ in model.named_modules() if name.rpartition(".")[2] == OWNER]
    if not owners:
        raise InvalidModelError(f"{type(model).__name__} is no LLaMA: it has no module named {OWNER}")
    for path, key in new:
        if path not in owners:
            raise CheckpointError(f"{path}.{key}: the model has no such layer, its last one is {owners[-1]}")
    present = {key: [path for path in owners if (path, key) in new] for key in NEW}
    for key, paths in present.items():
        lost = [path for path in owners if path not in paths]
        if paths and lost:
            raise CheckpointError(f"{lost[0]}.{key} is missing, though {paths[0]} has one")
    if present["conv_mask"] and not present["dwconv.weight"]:
        raise CheckpointError(f"{owners[0]}.dwconv.weight is missing, though there is a conv_mask")
    if not present["global_factor"] and alpha is None:
        raise CheckpointError(
            f"{owners[0]}.global_factor is missing: give `extra`, a file with the keys {', '.join(NEW)} (a "
            "LoRA adapter never holds them), or alpha=0.0 for no grouped part, alpha=1.0 for one as it is"
        )
    if present["global_factor"] and alpha is not None:
        raise CheckpointError(f"the checkpoint has {owners[0]}.global_factor: leave `alpha` out")
    if present["local_factor"] and alpha == 0.0:
        raise CheckpointError(
            f"{owners[0]}.local_factor stands without a grouped part, where the reference does not read it: "
            "leave the key out"
        )
    settings: Any = model.config
    heads = int(settings.num_attention_heads)
    convolution = {
        path: _causal_taps(new[path, "dwconv.weight"], new.get((path, "conv_mask")), path, heads)
        for path in present["dwconv.weight"]
    }
    sizes = {path: taps.shape[1] for path, taps in convolution.items()}
    for path, size in sizes.items():
        if size != sizes[owners[0]]:
            raise CheckpointError(
                f"{path}.dwconv.weight has {2 * size - 1} taps and {owners[0]} has {2 * sizes[owners[0]] - 1}"
            )
    if present["global_factor"]:
        alphas = {path: _number(new, path, "global_factor") for path in owners}
    else:
        alphas = {path: torch.full((1,), alpha) for path in owners} if alpha else {}
    local = {path: _number(new, path, "local_factor") for path in present["local_factor"]}
    return _Found(sizes.get(owners[0], LinearizeConfig.conv_taps), convolution, alphas, local)


def _causal_taps(weight: Tensor, mask: Tensor | None, path: str, heads: int) -> Tensor:
    """A Conv2d kernel [H, 1, K, 1] -> [H, (K + 1) / 2], from the present into the past."""
    name = f"{path}.dwconv.weight"
    size = weight.shape[2] if weight.dim() == 4 else 0
    if weight.dim() != 4 or weight.shape[1] != 1 or weight.shape[3] != 1 or size % 2 == 0:
        raise CheckpointError(f"{name} must be [heads, 1, odd number of taps, 1], got {tuple(weight.shape)}")
    if weight.shape[0] != heads:
        raise CheckpointError(f"{name} is for {weight.shape[0]} heads, the model has {heads}")
    if mask is not None:
        if mask.shape != (1, 1, size, 1) or not bool(((mask == 0) | (mask == 1)).all()):
            raise CheckpointError(
                f"{path}.conv_mask must be zeros and ones of shape {(1, 1, size, 1)}, got {tuple(mask.shape)}"
            )
        weight = weight * mask.to(weight.dtype)
    weight = weight[:, 0, :, 0]
    if bool(weight[:, size // 2 + 1 :].any()):
        hint = " (the conv_mask that would clear them is missing)" if mask is None else " after the conv_mask"
        raise CheckpointError(
            f"{name} looks ahead: its taps {size // 2 + 1} to {size - 1} must be zero{hint}"
        )
    if not bool(weight.isfinite().all()):
        raise CheckpointError(f"{name} holds values that are not finite")
    return weight[:, : size // 2 + 1].flip(1)


def _number(new: Mapping[tuple[str, str], Tensor], path: str, key: str) -> Tensor:
    """A factor as [1], finite."""
    tensor = new[path, key]
    if tensor.numel() != 1 or not bool(tensor.isfinite().all()):
        raise CheckpointError(f"{path}.{key} must be one finite number, got shape {tuple(tensor.shape)}")
    return tensor.reshape(1)


def _fill(model: nn.Module, found: _Found) -> None:
    """Give the new modules the checkpoint's values."""
    with torch.no_grad():
        for site in state_of(model).plan.sites:
            child: Any = model.get_submodule(site.name)
            if found.convolution:
                child.conv_weight.copy_(found.convolution[site.path])
            if found.alpha:
                child.alpha.copy_(found.alpha[site.path])
            if found.local:
                child.local_scale.copy_(found.local[site.path])


def _adapter_config(*sources: Source | None) -> Path:
    folders = [Path(source) for source in sources if source is not None and not isinstance(source, Mapping)]
    for folder in folders:
        if (folder / ADAPTER_CONFIG).is_file():
            return folder
    raise CheckpointError(
        f"the checkpoint holds LoRA matrices, whose scale is in {ADAPTER_CONFIG}: give the folder that has it"
    )


def _merge_lora(model: nn.Module, lora: dict[str, Tensor], folder: Path) -> None:
    """Add low-rank updates to the weights they belong to. Raises CheckpointError."""
    peft = require_peft()
    kind = read_json(folder / ADAPTER_CONFIG).get("peft_type")
    if kind != "LORA":
        raise CheckpointError(f"{folder / ADAPTER_CONFIG} describes an adapter of type {kind!r}, not LORA")
    try:
        config = peft.LoraConfig.from_pretrained(folder)
        config.modules_to_save = None  # such weights are in place already
        adapted = peft.get_peft_model(model, config)
        result = peft.set_peft_model_state_dict(adapted, lora)
        wrong = [*result.unexpected_keys, *(key for key in result.missing_keys if ".lora_" in key)]
        if wrong:
            raise CheckpointError(f"{wrong[0]}: the LoRA matrices and {folder / ADAPTER_CONFIG} do not match")
        adapted.merge_and_unload(safe_merge=True)
    except (ValueError, RuntimeError, TypeError) as error:
        raise CheckpointError(f"the adapter of {folder} cannot be merged: {error}") from error
