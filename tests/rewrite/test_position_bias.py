"""T5's relative position bias inside the groups of a rewritten model, as the paper's T5 has it."""

from __future__ import annotations

import pytest
import torch
from linearize.kernels import naive as oracle
from transformers import T5Config, T5ForConditionalGeneration

import linearize as lz
from linearize.errors import InputError


def tiny() -> T5ForConditionalGeneration:
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=40, d_model=16, d_kv=4, d_ff=32, num_layers=2, num_heads=3, decoder_start_token_id=0
    )
    model = T5ForConditionalGeneration(config).eval()
    for name, parameter in model.named_parameters():
        if "relative_attention_bias" in name:
            torch.nn.init.normal_(parameter)
    return model


def inputs(length: int = 21) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    return {
        "input_ids": torch.randint(1, 40, (2, length)),
        "decoder_input_ids": torch.randint(1, 40, (2, length)),
    }


def convert(model: T5ForConditionalGeneration, where: str = "local") -> T5ForConditionalGeneration:
    return lz.linearize(
        model,
        inputs(),
        mechanism="augmented_paper",
        group_size=8,
        conv_taps=3,
        approximate=("bias",),
        options={"position_bias": where},
    )


@pytest.mark.parametrize("part", ("encoder", "decoder"))
def test_weights_inside_a_group_are_the_oracle_s(part):
    model = convert(tiny())
    owner = getattr(model, part).block[0].layer[0].SelfAttention
    hidden = torch.randn(2, 21, 16)
    causal = part == "decoder"
    mask = None
    if causal:
        mask = torch.ones(21, 21, dtype=torch.bool).tril()[None, None]
    with torch.no_grad():
        got = owner(hidden, mask=mask)[0]
        q, k, v = (getattr(owner, n)(hidden).view(2, 21, 3, 4).transpose(1, 2) for n in "qkv")
        bias = owner.compute_bias(21, 21)[0]
        lags = range(8) if causal else range(-7, 8)
        table = torch.stack([bias[:, 10, 10 - lag] for lag in lags], 1)
        out = oracle.augmented_attention(
            q, k, v, alpha=None, conv_weight=None, local_bias=table, group_size=8, causal=causal
        )
        wanted = owner.o(out.float().transpose(1, 2).flatten(2))
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)
    dropped = getattr(convert(tiny(), "drop"), part).block[0].layer[0].SelfAttention
    with torch.no_grad():
        assert not torch.allclose(dropped(hidden, mask=mask)[0], got, atol=1e-3)


def test_decoding_with_a_cache_reads_the_same_bias():
    model = convert(tiny())
    batch = inputs()
    with torch.no_grad():
        whole = model(**batch, use_cache=False).logits
        encoded = model.encoder(batch["input_ids"])
        cache = None
        for t in range(21):
            step = model(
                encoder_outputs=encoded,
                decoder_input_ids=batch["decoder_input_ids"][:, t : t + 1],
                past_key_values=cache,
                use_cache=True,
            )
            cache = step.past_key_values
            torch.testing.assert_close(step.logits[:, 0], whole[:, t], atol=1e-4, rtol=1e-4)


def test_padding_and_gradients(tmp_path):
    model = convert(tiny())
    batch = inputs()
    mask = torch.ones(2, 21, dtype=torch.long)
    mask[1, 15:] = 0
    with torch.no_grad():
        padded = model(**batch, attention_mask=mask).logits[1]
        short = {
            "input_ids": batch["input_ids"][1:, :15],
            "decoder_input_ids": batch["decoder_input_ids"][1:],
        }
        torch.testing.assert_close(padded, model(**short).logits[0], atol=1e-4, rtol=1e-4)
    model(**batch, labels=batch["input_ids"]).loss.backward()
    for part in (model.encoder, model.decoder):
        table = part.block[0].layer[0].SelfAttention.relative_attention_bias.weight
        assert table.grad.abs().sum() > 0
    model.save_pretrained(tmp_path)
    again = lz.load(tmp_path)
    with torch.no_grad():
        assert torch.equal(again(**batch).logits, model(**batch).logits)


def test_a_bias_that_is_not_relative_or_not_there_is_an_error():
    model = convert(tiny())
    module = model.encoder.block[0].layer[0].SelfAttention.linear_attention
    query = torch.randn(2, 3, 9, 4)
    with pytest.raises(InputError, match="distance alone"):
        module(query, query, query, bias=torch.randn(1, 3, 9, 9))
    with pytest.raises(InputError, match="needs a site that hands its bias"):
        module(query, query, query)
