"""Makes `from_pretrained` restore converted models, and `save_pretrained` write them so that it can.

A converted transformers checkpoint holds the plan in `config.linearize`. The only public place where
transformers lets a checkpoint change its model before the weights are loaded is a quantizer, so the
checkpoint also names one, `linearize`, which quantizes nothing: it replays the plan and then removes every
trace of a quantized model.
"""

from __future__ import annotations

import contextlib
import functools
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..cache.adopt import state_layer
from ..common.checks import excerpt
from ..common.replacing import TRANSFORMERS, whole_checkpoint
from ..errors import CheckpointError, InputError
from ..planning.record import LinearizeHookConfig
from . import auto_map
from .adapters import warn_of_frozen
from .call import sole_child
from .graph.owner import GraphOwner, state_of

if TYPE_CHECKING:
    from torch import nn

    # What `SavesPlan` extends at run time is the model class that `saving_class` puts after it.
    from transformers import PreTrainedModel as _Model

else:
    _Model = object


class SavesPlan(_Model):
    """Mixin of a converted transformers model: its checkpoints name the load hook, its caches hold states."""

    config: Any
    _linearize: Any

    def generate(self, *args: Any, speculative: Any = None, **kwargs: Any) -> Any:
        """As transformers' `generate`; with `speculative`, a `TreeSpeculation`, by draft trees."""
        if speculative is not None:
            if not callable(speculative):
                raise InputError(
                    "speculative= takes a TreeSpeculation, such as TreeSpeculation(PromptLookup()), got "
                    f"{excerpt(speculative)}"
                )
            if kwargs.get("custom_generate") is not None or kwargs.get("assistant_model") is not None:
                raise InputError("speculative= stands alone: leave out custom_generate= and assistant_model=")
            strings = kwargs.pop("stop_strings", None)
            if strings is not None and kwargs.get("tokenizer") is not None:
                from transformers.generation import StoppingCriteriaList, StopStringCriteria

                # transformers takes the tokenizer away from a callable before it looks for these.
                own = StopStringCriteria(kwargs["tokenizer"], strings)
                kwargs["stopping_criteria"] = StoppingCriteriaList(
                    [*(kwargs.get("stopping_criteria") or ()), own]
                )
            elif strings is not None:
                raise InputError("stop_strings need their tokenizer: generate(..., tokenizer=tokenizer)")
            # transformers streams the prompt, and gives a callable no streamer for what it generates.
            streamer = kwargs.get("streamer")
            bound = {} if streamer is None else {"streamer": streamer}
            kwargs["custom_generate"] = functools.partial(speculative, **bound)
        return super().generate(*args, **kwargs)

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        """As transformers does, then the states take their places: `generate` asks the cache what it can do
        before the first layer runs."""
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)
        cache = model_kwargs.get("past_key_values")
        if cache is None:
            return
        for path, sites in self._linearize.plan.owners.items():
            owner: Any = self.get_submodule(path)
            if isinstance(owner, GraphOwner):
                state_of(owner, cache)
            else:
                longest = getattr(self, "_previous_max_cache_length", None)  # of the static cache just made
                state_layer(cache, sites[0].layer_index, sole_child(owner), longest)
        if generation_config.is_assistant:
            cache.activate_past_recording()

    @property
    def peft_config(self) -> Any:
        """What PEFT, and transformers' own adapters, note of the adapters in a model."""
        try:
            return self.__dict__["peft_config"]
        except KeyError:
            raise AttributeError(f"{type(self).__name__} has no adapter") from None

    @peft_config.setter
    def peft_config(self, adapters: Any) -> None:
        self.__dict__["peft_config"] = adapters
        warn_of_frozen(self, adapters)

    @peft_config.deleter
    def peft_config(self) -> None:
        del self.__dict__["peft_config"]

    def save_pretrained(
        self, save_directory: str | os.PathLike[str], is_main_process: bool = True, *args: Any, **kwargs: Any
    ) -> Any:
        """As `PreTrainedModel.save_pretrained`, and a model card, unless a README.md of someone else's is
        there. A checkpoint that is there already is replaced in one step. Raises CheckpointError when the
        model is also quantized, or something cannot be written; what was there then stays."""
        # Every process writes its part of a distributed checkpoint; the others write nothing of any other.
        if kwargs.get("distributed_checkpoint") or not self.should_save_on_this_rank(is_main_process):
            with self._naming_the_hook():
                super().save_pretrained(save_directory, is_main_process, *args, **kwargs)
            return
        with whole_checkpoint(save_directory, TRANSFORMERS) as folder:
            if kwargs.get("push_to_hub"):
                kwargs.setdefault("repo_id", Path(save_directory).name)
            self.write_into(folder, is_main_process, *args, **kwargs)
            drop_card(folder, Path(save_directory))

    def push_to_hub(
        self,
        repo_id: str,
        *,
        commit_message: str | None = None,
        commit_description: str | None = None,
        private: bool | None = None,
        token: bool | str | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        max_shard_size: int | str | None = "50GB",
        tags: list[str] | None = None,
    ) -> str:
        """As `PreTrainedModel.push_to_hub`, and with our card: one that somebody else wrote stays. Weights
        that the repository holds already, whole or in other shards, are replaced."""
        from huggingface_hub import HfApi

        from ..evaluation.card import NAME, is_ours, tag_card

        api = HfApi(token=token)
        name = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch)
            if api.file_exists(name, NAME, revision=revision):
                api.hf_hub_download(name, NAME, revision=revision, local_dir=folder)
            theirs = (folder / NAME).exists() and not is_ours(folder / NAME)
            self.save_pretrained(folder / "model", max_shard_size=max_shard_size)
            if theirs:
                (folder / "model" / NAME).unlink()
            else:
                tag_card(folder / "model" / NAME, tags or [])
            return api.upload_folder(
                repo_id=name,
                folder_path=folder / "model",
                commit_message=commit_message or "Upload a converted model",
                commit_description=commit_description,
                revision=revision,
                create_pr=create_pr,
                delete_patterns=["model*.safetensors", "model.safetensors.index.json"],
            )

    def write_into(self, folder: Path, *args: Any, **kwargs: Any) -> None:
        """Write all files, and the card, into a folder that nobody reads yet. Arguments: of
        `PreTrainedModel.save_pretrained`."""
        from ..evaluation.card import write_card

        with self._naming_the_hook() as entries:
            super().save_pretrained(folder, *args, **kwargs)
            if entries:
                auto_map.write(entries, folder)
        write_card(self, folder)

    @contextlib.contextmanager
    def _naming_the_hook(self) -> Iterator[dict[str, str]]:
        if getattr(self.config, "quantization_config", None) is not None:
            raise CheckpointError(
                "a converted model that is also quantized cannot be saved: a checkpoint has one place for a "
                "load hook; save the converted model before quantizing it"
            )
        self.config.quantization_config = LinearizeHookConfig()
        entries = {} if getattr(self.config, "auto_map", None) else auto_map.entries(self)
        if entries:
            self.config.auto_map = {auto: f"{auto_map.FILE}.{name}" for auto, name in entries.items()}
        try:
            yield entries
        finally:
            del self.config.quantization_config
            if entries:
                del self.config.auto_map


def drop_card(folder: Path, target: Path) -> None:
    """Leave the card out of new files where someone else's README.md stands."""
    from ..evaluation.card import NAME, is_ours

    if not is_ours(target / NAME):
        (folder / NAME).unlink(missing_ok=True)


def save_with_plan(model: nn.Module) -> None:
    """Let a converted transformers model write checkpoints that restore it; nothing for any other module."""
    from transformers import PreTrainedModel

    if isinstance(model, PreTrainedModel):
        base: type = type(model)
        model.__class__ = saving_class(base)


@functools.cache
def saving_class(base: type) -> type:
    """Subclass of `base`, by the same name, that saves with the plan; itself when it already does."""
    if issubclass(base, SavesPlan):
        return base

    def reduce(self: Any, protocol: Any) -> Any:
        return _rebuild, (base,), self.__dict__.copy()

    members = {
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
        "__reduce_ex__": reduce,
    }
    return type(base.__name__, (SavesPlan, base), members)


def _rebuild(base: type) -> Any:
    return object.__new__(saving_class(base))
