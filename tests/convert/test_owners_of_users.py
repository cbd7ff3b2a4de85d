"""Models as users have them: inside other objects, quantised, with adapters of stock PEFT."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertModel,
    BigBirdConfig,
    BigBirdModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    pipeline,
)

import linearize as lz
from linearize.errors import InvalidModelError

IDS = torch.randint(3, 60, (4, 64), generator=torch.Generator().manual_seed(0))


def tiny() -> Any:
    torch.manual_seed(0)
    sizes = dict(vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=2)
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, initializer_range=0.2)).eval()


class Int8(nn.Module):
    """A linear layer whose weights are integers, without a floating tensor of its own."""

    def __init__(self, linear: nn.Linear, kept: type) -> None:
        super().__init__()
        weight = linear.weight.detach()
        self.scale = float(weight.abs().max()) / 127
        integers = (weight / self.scale).round().to(torch.int8)
        if kept is nn.Parameter:
            self.weight = nn.Parameter(integers, requires_grad=False)
        else:
            self.register_buffer("weight", integers)

    def forward(self, x: Tensor) -> Tensor:
        return x @ (self.weight.to(x.dtype) * self.scale).T


@pytest.mark.parametrize("kept", [nn.Parameter, Tensor])
def test_quantised_owners_get_floating_parameters(kept: type) -> None:
    model = tiny()
    for layer in model.model.layers:
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            setattr(layer.self_attn, name, Int8(getattr(layer.self_attn, name), kept))
    lz.linearize(model, mechanism="hedgehog")
    new = [p for name, p in model.named_parameters() if "linear_attention" in name]
    assert new and all(p.dtype == torch.float32 and p.device == model.device for p in new)
    (model(IDS).logits ** 2).mean().backward()
    assert all(p.grad is not None for p in new)


def test_a_stock_adapter_that_leaves_new_parameters_untrained_is_told_of() -> None:
    peft = pytest.importorskip("peft")
    stock = peft.LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM")
    with pytest.warns(UserWarning, match=r"512 new parameters.*lora_config"):
        peft.get_peft_model(lz.linearize(tiny(), mechanism="hedgehog"), stock)
    told = lz.linearize(tiny(), mechanism="hedgehog")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*new parameters")
        adapted = peft.get_peft_model(told, lz.lora_config(told, target_modules="all-linear"))
        peft.get_peft_model(lz.linearize(tiny(), mechanism="softmax"), stock)
    assert any("linear_attention" in n for n, p in adapted.named_parameters() if p.requires_grad)
    assert not hasattr(tiny(), "peft_config") and not hasattr(lz.linearize(tiny()), "peft_config")


def test_a_model_that_replaces_its_attention_is_refused_and_the_advice_works(tmp_path: Path) -> None:
    sizes = dict(vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=1)
    model = BigBirdModel(BigBirdConfig(**sizes, num_attention_heads=2)).eval()
    with pytest.raises(
        InvalidModelError, match="another module in the place.*attention_type='original_full'"
    ):
        lz.linearize(model)
    whole = BigBirdConfig(**sizes, num_attention_heads=2, attention_type="original_full")
    linear = lz.linearize(BigBirdModel(whole).eval())
    loaded = lz.load(lz.save(linear, tmp_path / "saved"))
    assert torch.equal(loaded(IDS).last_hidden_state, linear(IDS).last_hidden_state)


class Sentences(nn.Module):
    """As a SentenceTransformer is: a transformer, and pooling over its tokens."""

    def __init__(self, transformer: nn.Module) -> None:
        super().__init__()
        self.transformer = transformer

    def encode(self, ids: Tensor) -> Tensor:
        return self.transformer(input_ids=ids).last_hidden_state.mean(1)


def bert() -> Any:
    torch.manual_seed(0)
    sizes = dict(vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=2)
    return BertModel(BertConfig(**sizes, num_attention_heads=2)).eval()


def test_the_transformer_in_a_module_around_it_is_converted() -> None:
    whole = Sentences(bert())
    before = whole.encode(IDS)
    assert lz.linearize(whole, mechanism="softmax") is whole
    assert (whole.encode(IDS) - before).abs().max() < 1e-4
    lz.linearize(Sentences(bert()), mechanism="relu")


def test_a_sentence_transformer_encodes_after_its_conversion(tmp_path: Path) -> None:
    """The package itself, with a model made here."""
    pytest.importorskip("sentence_transformers")
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "a", "b", "c", "d"])}
    own = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    own.pre_tokenizer = pre_tokenizers.Whitespace()
    bert().save_pretrained(tmp_path)
    PreTrainedTokenizerFast(tokenizer_object=own, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(
        tmp_path
    )
    model = SentenceTransformer(modules=[Transformer(str(tmp_path)), Pooling(16)], device="cpu")
    texts = ["a b c", "d", "c a a b d d"]
    before = model.encode(texts)
    lz.linearize(model, mechanism="softmax")
    assert abs(model.encode(texts) - before).max() < 1e-4
    lz.linearize(model[0].model, mechanism="relu")
    assert abs(model.encode(texts) - before).max() > 1e-4 and model.encode(texts).shape == before.shape


def test_a_pipeline_is_told_where_its_model_is() -> None:
    tokenizer = lz.load_demo()[1]
    pipe = pipeline("text-generation", model=tiny(), tokenizer=tokenizer)
    with pytest.raises(InvalidModelError, match="`.model`, which is changed in place"):
        lz.linearize(pipe)
    assert lz.linearize(pipe.model) is pipe.model
