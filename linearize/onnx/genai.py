"""`genai_config.json` beside an exported decoder: what onnxruntime-genai needs to open the folder."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from transformers import GenerationConfig, PreTrainedConfig

from ..common.files import write_whole
from ..errors import CheckpointError, ExportError
from . import library as operators
from .file import read_graph

CONFIG = "genai_config.json"
_TYPE = "decoder"
"""genai's plainest kind of model: tokens in, logits out, whatever states there are."""
_SAMPLING = ("temperature", "top_k", "top_p", "repetition_penalty", "do_sample", "num_beams")


def write_genai(
    file: str | os.PathLike[str],
    config: PreTrainedConfig,
    generation: GenerationConfig,
    *,
    library: bool = False,
) -> Path:
    """Write `genai_config.json` beside an exported decoder.

    genai also reads a tokenizer: `tokenizer.save_pretrained(folder)`.

    Args:
        file: The decoder.
        config: The model's configuration.
        generation: The model's generation configuration.
        library: Have genai run the file by our operators, from where they lie on this machine.

    Returns:
        The path of the configuration.

    Raises:
        ExportError: The file is no decoder, or genai cannot name its states; with `library`, the file would
            not run by the library.
    """
    path = Path(file)
    settings = genai_config(path, config, generation)
    if library:
        reason = operators.obstacle(path)
        if reason is not None:
            raise ExportError(f"genai cannot run {path} by the library: {reason}")
        settings["model"]["decoder"]["session_options"]["custom_ops_library"] = str(operators.LIBRARY)
    target = path.with_name(CONFIG)
    try:
        write_whole(target, json.dumps(settings, indent=2) + "\n")
    except CheckpointError as error:
        raise ExportError(str(error)) from error
    return target


def genai_config(path: Path, config: PreTrainedConfig, generation: GenerationConfig) -> dict[str, Any]:
    """The contents of `genai_config.json` for the decoder in `path`."""
    graph = read_graph(path).graph
    inputs, outputs = ([value.name for value in values] for values in (graph.input, graph.output))
    if "logits" not in outputs or "attention_mask" not in inputs:
        raise ExportError(f"{path} is no decoder that onnxruntime-genai could run")
    text = config.get_text_config(decoder=True)
    context = getattr(text, "max_position_embeddings", None) or 2**20
    heads = text.num_attention_heads
    decoder = {
        "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
        "filename": path.name,
        "head_size": getattr(text, "head_dim", None) or text.hidden_size // heads,
        "hidden_size": text.hidden_size,
        "num_attention_heads": heads,
        "num_key_value_heads": getattr(text, "num_key_value_heads", None) or heads,
        "num_hidden_layers": text.num_hidden_layers,
        "inputs": {
            **{name: name for name in inputs if not name.startswith("past")},
            **_templates(inputs, "past"),
        },
        "outputs": {"logits": "logits", **_templates(outputs, "present")},
    }
    eos = generation.eos_token_id if generation.eos_token_id is not None else text.eos_token_id
    pad = generation.pad_token_id if generation.pad_token_id is not None else text.pad_token_id
    ends = [] if eos is None else eos if isinstance(eos, list) else [eos]
    if pad is None:
        pad = ends[0] if ends else 0
    chosen = {name: getattr(generation, name, None) for name in _SAMPLING}
    return {
        "model": {
            "type": _TYPE,
            "bos_token_id": text.bos_token_id if text.bos_token_id is not None else pad,
            "eos_token_id": ends,
            "pad_token_id": pad,
            "context_length": context,
            "vocab_size": text.vocab_size,
            "decoder": decoder,
        },
        "search": {
            **{name: value for name, value in chosen.items() if value is not None},
            "max_length": context,
            # A state is read while its successor is written.
            "past_present_share_buffer": False,
        },
    }


def _templates(names: Iterable[str], side: str) -> dict[str, str]:
    """Names of states with `%d` for the layer, by what genai calls them: {"past_conv_names": ...}."""
    found: dict[str, set[str]] = {}
    for name in names:
        match = re.fullmatch(rf"({side}[a-z_]*\.)\d+(\.(key|value|conv|recurrent))(\..*)?", name)
        if match:
            if match[4]:
                raise ExportError(f"onnxruntime-genai knows one state for a layer; {name} is another")
            found.setdefault(f"{side}_{match[3]}_names", set()).add(f"{match[1]}%d{match[2]}")
    return {kind: template for kind, (template,) in found.items()}
