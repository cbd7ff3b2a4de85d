"""`nn.TransformerEncoder` with padding: in evaluation it may pack its input into nested tensors.

Rewritten layers do not take those. But what comes out tells: where padding was, the layers of a packed input
leave zeros, which a decoder behind it reads unless it is given the padding as well.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .owner import GraphOwner


def use_no_nested_tensors(model: nn.Module) -> None:
    """Keep the encoders of rewritten layers from packing, with the output that they had; idempotent."""
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoder) and any(
            isinstance(m, GraphOwner) for m in module.modules()
        ):
            if module.use_nested_tensor:
                module.register_forward_hook(_as_if_packed, with_kwargs=True)
            module.use_nested_tensor = False


def _as_if_packed(encoder: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
    """Zeros behind the last layer where padding is, in a call whose input torch would have packed."""
    given = dict(zip(("src", "mask", "src_key_padding_mask"), args, strict=False)) | kwargs
    source, padding = given["src"], given.get("src_key_padding_mask")
    if padding is None or not _packs(encoder, source, given.get("mask"), padding):
        return output
    nothing = output.new_zeros(output.shape[-1])
    nothing = nothing if encoder.norm is None else encoder.norm(nothing)
    return torch.where(padding.logical_not()[..., None], output, nothing)


def _packs(encoder: Any, source: Tensor, mask: Tensor | None, padding: Tensor) -> bool:
    """The conditions of torch's own forward, but for those that it checked when the encoder was made."""
    first = encoder.layers[0]
    if (
        not torch.backends.mha.get_fastpath_enabled()
        or first.training
        or source.dim() != 3
        or mask is not None
        or torch.is_autocast_enabled()
        or (torch.is_grad_enabled() and any(x.requires_grad for x in (source, *first.parameters())))
    ):
        return False
    if not getattr(encoder, "mask_check", True):
        return True
    if torch.compiler.is_compiling():
        return False
    return bool(torch._nested_tensor_from_mask_left_aligned(source, padding.logical_not()))
