"""A file on onnxruntime, used like a transformers model: `generate` with all it can do, and embeddings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from onnxruntime import OrtValue
from torch import Tensor
from transformers import AutoConfig, GenerationConfig, GenerationMixin, PreTrainedConfig
from transformers.modeling_outputs import BaseModelOutput, CausalLMOutputWithPast

from ..common.checks import excerpt
from ..common.files import is_file, reason, shown
from ..errors import ExportError, InputError
from . import folder, library

FILE = "model.onnx"
_CUDA, _CPU = "CUDAExecutionProvider", "CPUExecutionProvider"
_TYPES: Mapping[str, Any] = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(int64)": np.int64,
    "tensor(bool)": np.bool_,
}


class OrtStates:
    """What a decoder carries from call to call: `past.*` by name, and how many columns it has seen.

    Never changed: each call makes another, so that a prompt's states can be continued many times.
    """

    is_compileable = False

    def __init__(self, values: Mapping[str, OrtValue], columns: int) -> None:
        self.values, self.columns = dict(values), columns

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.columns

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Take the given rows of the batch, in that order: beam search."""
        rows = beam_idx.cpu().numpy()
        for name, value in self.values.items():
            taken = np.ascontiguousarray(value.numpy()[rows])
            self.values[name] = OrtValue.ortvalue_from_numpy(taken, value.device_name())

    @property
    def nbytes(self) -> int:
        return sum(value.tensor_size_in_bytes() for value in self.values.values())


class OrtModel(GenerationMixin):
    """An exported file on onnxruntime: `OrtModel(path).generate(**tokenizer(text, return_tensors="pt"))`.

    Inputs and outputs are torch tensors on the CPU. A decoder takes padding on either side and everything
    that transformers' `generate` takes: sampling, beams, `streamer=`, stopping criteria. An encoder has
    `embed`.

    Args:
        path: The file, or a folder with `model.onnx`. `config.json` and `generation_config.json` beside it
            are read if they are there.
        providers: Of onnxruntime; by default CUDA's when onnxruntime has it, else the CPU's.
        options: A session's options, to be used for this model alone.
        library: Let nodes run by our kernels where `obstacle` is None.
        piece: A decoder reads more tokens than this in pieces, which gives the same and takes less memory.

    Attributes:
        obstacle: Why our kernels do not run the nodes, in one sentence; None when they do.
        providers: Those in use.
        inputs: The file's inputs by name.
        outputs: Names of the file's outputs.

    Raises:
        ExportError: The file cannot be run.
        InputError: `piece` is not positive.
    """

    main_input_name = "input_ids"
    base_model_prefix = ""
    _is_stateful = True
    _supports_cache_class = False
    device = torch.device("cpu")
    dtype = torch.float32
    hf_quantizer = None

    def __init__(
        self,
        path: str | PathLike[str],
        *,
        providers: Sequence[str] | None = None,
        options: onnxruntime.SessionOptions | None = None,
        library: bool = True,
        piece: int = 1024,
    ) -> None:
        if piece < 1:
            raise InputError(f"piece must be at least 1 token, got {piece}")
        self.piece = piece
        file = Path(path)
        file = file if is_file(file) or file.suffix == ".onnx" else file / FILE
        available = onnxruntime.get_available_providers()
        self.providers = [name for name in providers or (_CUDA, _CPU) if name in available]
        if providers and set(providers) - set(self.providers):
            raise ExportError(f"onnxruntime has {', '.join(available)} here, not all of {list(providers)}")
        chosen = options or onnxruntime.SessionOptions()
        self.obstacle: str | None = "it was not asked for"
        folder.undisturbed(file, lambda found: self._open(found, chosen, library))
        self._place = "cuda" if self.providers[0] == _CUDA else "cpu"
        self.inputs = {node.name: node for node in self.session.get_inputs()}
        outputs = self.session.get_outputs()
        self.outputs = [node.name for node in outputs]
        self._last_alone = outputs[0].shape[1:2] == [1]  # a decoder's file with the last token's logits

    def _open(self, file: Path, options: onnxruntime.SessionOptions, library: bool) -> None:
        """A session of the file, and the configurations beside it."""
        if not is_file(file):
            raise ExportError(f"{shown(file)} is not there; `lz.export_onnx` writes such files")
        if library and self.obstacle is not None:  # or it was given to a session of files that are gone
            self.obstacle = _give_library(options, file, self.providers)
        try:
            self.session = onnxruntime.InferenceSession(file, options, providers=self.providers)
        except Exception as error:  # onnxruntime's errors share no base of their own
            raise ExportError(f"onnxruntime cannot run {shown(file)}: {reason(error)}") from error
        try:
            self.config = _config(file.parent)
            self.generation_config = _generation_config(file.parent, self.config)
            check_ids(self.generation_config)
        # A configuration from anywhere can make any line of transformers raise anything.
        except Exception as error:
            raise ExportError(
                f"the configuration beside {shown(file)} cannot be read: {reason(error)}"
            ) from error

    @property
    def state_names(self) -> list[str]:
        """Inputs that carry the past; each has an output `present` of the same name."""
        return [name for name in self.inputs if name.startswith("past")]

    def empty_states(self, batch_size: int) -> OrtStates:
        """The states before the first token of `batch_size` sequences: zeros."""
        values = {}
        for name in self.state_names:
            node = self.inputs[name]
            # The first dimension is the batch; another open one is the length of a softmax layer's cache.
            sizes = [size if isinstance(size, int) else 0 for size in node.shape[1:]]
            zeros = np.zeros((batch_size, *sizes), _TYPES[node.type])
            values[name] = OrtValue.ortvalue_from_numpy(zeros, self._place)
        return OrtStates(values, 0)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.forward(*args, **kwargs)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: OrtStates | None = None,
        **others: Any,
    ) -> CausalLMOutputWithPast | BaseModelOutput:
        """One call of the file.

        Args:
            input_ids: int64 [B, T], the tokens after `past_key_values`.
            attention_mask: [B, past + T], 1 for real tokens; None: all are.
            past_key_values: The states before the call; None for empty ones.
            others: Further inputs of the file by name, as tensors; those of a decoder are [B, T, ...].

        Returns:
            A decoder's `logits` [B, T, V] ([B, 1, V] where the file was exported so) and the states after the
            call; an encoder's `last_hidden_state` [B, T, hidden].

        Raises:
            InputError: The mask has another shape, or an input is missing.
        """
        batch, length = input_ids.shape
        states = past_key_values
        if self.state_names and states is None:
            states = self.empty_states(batch)
        columns = length + (states.columns if states else 0)
        if attention_mask is None:
            attention_mask = torch.ones(batch, columns, dtype=torch.int64)
        if attention_mask.shape != (batch, columns):
            shape = list(attention_mask.shape)
            raise InputError(f"attention_mask must be [{batch}, {columns}], the past included, not {shape}")
        given = {"input_ids": input_ids, "attention_mask": attention_mask, **others}
        if "position_ids" in self.inputs and "position_ids" not in others:
            positions = attention_mask.long().cumsum(1).sub(1).clamp_min(0)
            given["position_ids"] = positions[:, -length:]
        if "token_type_ids" in self.inputs and "token_type_ids" not in others:
            given["token_type_ids"] = torch.zeros_like(input_ids)
        if states is None:
            return BaseModelOutput(last_hidden_state=self._run(given, None, columns)[0])
        outs, before = [], states.columns
        for start in range(0, length, self.piece):
            end = min(start + self.piece, length)
            part = {name: value[:, start:end] for name, value in given.items() if name in self.inputs}
            part["attention_mask"] = attention_mask[:, : before + end]
            out, states = self._run(part, states, before + end)
            outs.append(out)
        logits = outs[-1] if self._last_alone else torch.cat(outs, 1)
        return CausalLMOutputWithPast(logits=logits, past_key_values=states)

    def _run(
        self, given: Mapping[str, Any], states: OrtStates | None, columns: int
    ) -> tuple[Tensor, OrtStates | None]:
        missing = set(self.inputs) - set(given) - set(self.state_names)
        if missing:
            raise InputError(f"the file needs the inputs {', '.join(sorted(missing))} too")
        binding = self.session.io_binding()
        for name, value in given.items():
            if name in self.inputs:
                array = np.ascontiguousarray(torch.as_tensor(value).numpy(), _TYPES[self.inputs[name].type])
                binding.bind_cpu_input(name, array)
        for name, held in states.values.items() if states else ():
            binding.bind_ortvalue_input(name, held)
        for name in self.outputs:
            binding.bind_output(name, self._place if name.startswith("present") else "cpu")
        self.session.run_with_iobinding(binding)
        results = dict(zip(self.outputs, binding.get_outputs(), strict=True))
        if states is not None:
            states = OrtStates({name: results[_present(name)] for name in self.state_names}, columns)
        return torch.from_numpy(results[self.outputs[0]].numpy()), states

    @torch.no_grad()
    def embed(self, input_ids: Tensor, attention_mask: Tensor | None = None, **others: Any) -> Tensor:
        """An encoder's sentence embeddings: the mean over real tokens, divided by its norm.

        Args:
            input_ids: int64 [B, T].
            attention_mask: [B, T], 1 for real tokens; None: all are.
            others: Further inputs of the file by name.

        Returns:
            float32 [B, hidden].

        Raises:
            InputError: The file gives no hidden states.
        """
        if "logits" in self.outputs:
            raise InputError("the file gives logits; embeddings need an encoder's hidden states")
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        hidden = self.forward(input_ids, attention_mask, **others).last_hidden_state.float()
        real = attention_mask[:, :, None].to(hidden.dtype)
        mean = (hidden * real).sum(1) / real.sum(1).clamp_min(1)
        return torch.nn.functional.normalize(mean, dim=-1)

    # What transformers' `generate` asks of a model.

    def can_generate(self) -> bool:
        return "logits" in self.outputs

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False

    def _optimize_model_for_decode(self) -> AbstractContextManager[None]:
        return nullcontext()

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        next_sequence_length: int | None = None,
        past_key_values: OrtStates | None = None,
        attention_mask: Tensor | None = None,
        **others: Any,
    ) -> dict[str, Any]:
        if next_sequence_length is not None:
            input_ids = input_ids[:, -next_sequence_length:]
        return dict(input_ids=input_ids, attention_mask=attention_mask, past_key_values=past_key_values)


def _present(past: str) -> str:
    """`past.0.recurrent` -> `present.0.recurrent`, `past_key_values.0.key` -> `present.0.key`."""
    return "present." + past.split(".", 1)[1]


def _give_library(options: onnxruntime.SessionOptions, file: Path, providers: Sequence[str]) -> str | None:
    obstacle = library.obstacle(file, providers)
    if obstacle is None:
        library.register(options, file, providers)
    return obstacle


def _config(folder: Path) -> PreTrainedConfig:
    if (folder / "config.json").is_file():
        return AutoConfig.from_pretrained(folder, local_files_only=True)
    return PreTrainedConfig()


def check_ids(config: GenerationConfig) -> None:
    """Raise ValueError for special tokens that are none: transformers would stumble over them later."""
    for name in ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id"):
        value = getattr(config, name, None)
        values = value if isinstance(value, list) else [value]
        if not all(x is None or (type(x) is int and x >= 0) for x in values):
            raise ValueError(f"{name} is {excerpt(value)}, which is no token")


def _generation_config(folder: Path, config: PreTrainedConfig) -> GenerationConfig:
    if (folder / "generation_config.json").is_file():
        return GenerationConfig.from_pretrained(folder, local_files_only=True)
    return GenerationConfig.from_model_config(config)
