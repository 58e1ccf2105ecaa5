"""Rows one after another without padding have the states of each row by itself, in every architecture that packs them.

There is no GPU in these tests. Padded rows, and packed rows under SDPA or eager attention, are computed as they are
anywhere. Of flash attention everything but its kernel is Transformers' own code (flash_kernel.py).
"""

from __future__ import annotations

import functools
from typing import Any

import flash_kernel
import pytest
import torch
import transformers
from flash_kernel import use_flash
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.integrations import flash_attention

from salsa_peft.models.base import has_only_attention, hidden_states, keeps_rows_apart, packs_rows
from salsa_peft.models.logprobs import check_head
from salsa_peft.models.responses import Sequences, last_states, pad_responses
from salsa_peft.training.ppo.checks import check_noise
from salsa_peft.utils.errors import SalsaError

TARGET_DTYPE = flash_attention.get_target_dtype
SIZES: dict[str, Any] = {
    "vocab_size": 80, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "head_dim": 8, "initializer_range": 0.3,
}  # fmt: skip
SLIDING = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"], "query_pre_attn_scalar": 8}
EXPERTS = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
PACKED: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 4},
    "gemma2": {**SLIDING, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 5.0},
    "gemma3_text": SLIDING,
    "qwen2": {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
    "qwen3": {},
    "gpt2": {"n_positions": 64, "activation_function": "gelu"},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "gpt_neox": {},
    "gptj": {"rotary_dim": 4},
    "phi3": {},
    "cohere2": {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]},
    "granite": {"attention_multiplier": 0.5},
    "olmo2": {},
    "stablelm": {},
    "mixtral": EXPERTS,
    "qwen3_moe": {**EXPERTS, "decoder_sparse_step": 1},
}
"""Architectures whose rows are packed, with small sizes."""
RECURRENT: dict[str, dict[str, Any]] = {
    "mamba": {"state_size": 4},
    "mamba2": {"num_heads": 8, "state_size": 8, "n_groups": 1, "head_dim": 8},
    "qwen3_next": {**EXPERTS, "layer_types": ["linear_attention", "full_attention"], "linear_num_value_heads": 4,
                   "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
                   "shared_expert_intermediate_size": 16},
    "jamba": {**EXPERTS, "mamba_d_state": 4, "mamba_dt_rank": 4, "attn_layer_period": 2, "attn_layer_offset": 1,
              "use_mamba_kernels": False},
    "recurrent_gemma": {"block_types": ["recurrent", "attention"], "lru_width": 32},
    "falcon_h1": {"mamba_d_ssm": 64, "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "minimax": {**EXPERTS, "layer_types": ["linear_attention", "full_attention"]},
    "rwkv": {"attention_hidden_size": 32},
}  # fmt: skip
"""Architectures in which a row would run on into the next one."""
EAGER = ("gemma2", "mamba", "mamba2", "rwkv", "recurrent_gemma")
"""Architectures without SDPA."""
ROWS = [([5, 6, 7], [9, 8]), ([4], [11, 12, 13, 14, 15, 3]), ([10, 11, 12, 13, 14, 15, 16], [2]), ([7, 7], [7, 5])]


def make(kind: str, options: dict[str, Any]) -> Any:
    """A small random model."""
    attention = "eager" if kind in EAGER else "sdpa"
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **(SIZES | options))
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()
    for name, weight in model.named_parameters():  # or absolute positions would hardly matter
        if "wpe" in name or "embed_positions" in name:
            torch.nn.init.normal_(weight)
    return model


@pytest.fixture
def sequences() -> Sequences:
    """Four sequences of 4 to 8 tokens."""
    prompts, answers = zip(*ROWS, strict=True)
    return Sequences(pad_responses(prompts, answers, 0, (2,), torch.device("cpu")))


def check_states(model: Any, sequences: Sequences, packed: bool) -> None:
    """Each row's last state is that of the row by itself, in a forward pass over all rows."""
    with torch.no_grad():
        found = last_states(model, sequences.forward_batch([2, 0, 3, 1], packed=packed))
        for state, row in zip(found, [2, 0, 3, 1], strict=True):
            prompt, answer = ROWS[row]
            ids = torch.tensor([[*prompt, *answer]])
            expected = hidden_states(model, ids, torch.ones_like(ids))[0, -1]
            torch.testing.assert_close(state, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", PACKED)
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_states_under_sdpa_or_eager_attention(kind: str, packed: bool, sequences: Sequences) -> None:
    model = make(kind, PACKED[kind])
    assert has_only_attention(model) and not packs_rows(model)  # no GPU
    if packed and kind == "opt":
        pytest.skip("OPT builds its mask without position ids, so that packed rows need flash attention")
    check_states(model, sequences, packed)


@pytest.mark.parametrize("kind", RECURRENT)
def test_other_layers_are_never_packed(kind: str, sequences: Sequences) -> None:
    """And have the right states where rows are padded."""
    model = make(kind, RECURRENT[kind])
    assert not has_only_attention(model)
    check_states(model, sequences, packed=False)


@pytest.fixture
def flash(monkeypatch: pytest.MonkeyPatch) -> None:
    """Flash attention as on a GPU."""
    flash_kernel.install(monkeypatch)


def flash_model(kind: str, options: dict[str, Any]) -> Any:
    """A small random model with flash attention."""
    return use_flash(make(kind, options))


@pytest.mark.parametrize("kind", PACKED)
def test_states_under_flash_attention(kind: str, sequences: Sequences, flash: None) -> None:
    """Packed and padded rows against plain attention over each row by itself."""
    model, plain = flash_model(kind, PACKED[kind]), make(kind, PACKED[kind])
    assert packs_rows(model)
    for packed in (True, False):
        with torch.no_grad():
            found = last_states(model, sequences.forward_batch([2, 0, 3, 1], packed=packed))
            expected = last_states(plain, sequences.forward_batch([2, 0, 3, 1]))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    check_states(plain, sequences, packed=False)


def test_probes_of_float32_weights_run_in_16_bits(flash: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Flash attention refuses float32, in which full weights are trained under autocast."""
    checked, kernel = [], flash_kernel.kernel

    @functools.wraps(kernel)  # Transformers reads its arguments' names
    def half(q: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        checked.append(q.dtype)
        return kernel(q, *args, **options)

    monkeypatch.setattr(flash_kernel, "kernel", half)
    flash_kernel.install(monkeypatch)
    monkeypatch.setattr(flash_attention, "get_target_dtype", TARGET_DTYPE)
    model = flash_model("llama", {})
    assert model.dtype == torch.float32 and packs_rows(model)
    check_head(model)
    check_noise(model)
    assert set(checked) == {torch.bfloat16}


def test_a_row_without_tokens_is_refused() -> None:
    """It has no last token, and would get the score of the row before it."""
    responses = pad_responses([[3], []], [[4, 2], []], 0, (2,), torch.device("cpu"))
    with pytest.raises(SalsaError, match="no tokens together"):
        Sequences(responses)


@pytest.mark.parametrize("kind", RECURRENT)
def test_flash_attention_beside_other_layers_is_padded(kind: str, flash: None) -> None:
    assert not packs_rows(flash_model(kind, RECURRENT[kind]))


def test_a_model_that_loses_the_bounds_of_rows_is_padded(flash: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """As an architecture whose layers do not pass further arguments on to the attention."""
    model = flash_model("llama", {})
    assert keeps_rows_apart(model)
    attention = transformers.models.llama.modeling_llama.LlamaAttention
    forward = attention.forward
    kept = ("hidden_states", "position_embeddings", "attention_mask")
    monkeypatch.setattr(
        attention,
        "forward",
        lambda self, *args, **given: forward(self, *args, **{name: given.get(name) for name in kept}),
    )
    assert not keeps_rows_apart(model) and not packs_rows(model)
    assert packs_rows(flash_model("mistral", {}))
