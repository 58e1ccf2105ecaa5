"""Flash attention without a GPU: Transformers' own code with the kernel written out."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import modeling_flash_attention_utils
from transformers.integrations import flash_attention

from salsa_peft.models import base


def kernel(q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int,
           max_seqlen_k: int, dropout_p: float = 0.0, softmax_scale: float | None = None, causal: bool = False,
           window_size: tuple[int, int] = (-1, -1), softcap: float = 0.0, deterministic: bool = False) -> Tensor:  # fmt: skip
    """flash_attn_varlen_func, with its arguments and what they mean: q, k, v (N, heads, size)."""
    assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32 and dropout_p == 0.0 and causal
    bounds = cu_seqlens_q.tolist()
    lengths = [end - start for start, end in itertools.pairwise(bounds)]
    assert max(lengths) == max_seqlen_q == max_seqlen_k and bounds[-1] == len(q)
    k, v = (part.repeat_interleave(q.shape[1] // part.shape[1], dim=1) for part in (k, v))
    found = []
    for start, end in itertools.pairwise(bounds):
        scores = torch.einsum("qhd,khd->hqk", q[start:end], k[start:end]) * (softmax_scale or q.shape[-1] ** -0.5)
        scores = softcap * (scores / softcap).tanh() if softcap else scores
        back = torch.arange(end - start)[:, None] - torch.arange(end - start)
        seen = (back >= 0) & ((back <= window_size[0]) | (window_size[0] < 0))
        found.append(torch.einsum("hqk,khd->qhd", scores.masked_fill(~seen, -torch.inf).softmax(-1), v[start:end]))
    return torch.cat(found)


def dense(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    """flash_attn_func: q, k, v (B, L, heads, size)."""
    length = q.shape[1]
    bounds = torch.tensor([0, length], dtype=torch.int32)
    rows = [kernel(*row, bounds, bounds, length, length, **options) for row in zip(q, k, v, strict=True)]
    return torch.stack(rows)


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Flash attention is computed by `kernel`, and every model is taken to be on a GPU."""
    utils = modeling_flash_attention_utils
    functions = (dense, kernel, None, utils._pad_input, utils._unpad_input)
    process = utils._lazy_define_process_function(kernel)
    monkeypatch.setattr(utils, "lazy_import_flash_attention", lambda *_, **__: (functions, (process, dict)))
    monkeypatch.setattr(flash_attention, "get_target_dtype", lambda query, module: None)  # the kernel takes float32
    monkeypatch.setattr(base, "is_on_gpu", lambda lm: True)


def use_flash(model: Any) -> Any:
    """Let a model compute flash attention, without Transformers' check for the package."""
    for module in model.modules():
        if isinstance(module, nn.Module) and "config" in vars(module):
            module.config._attn_implementation_internal = "flash_attention_2"
    return model
