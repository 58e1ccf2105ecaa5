"""Log-probs without logits: the values and the gradient of the full formula, in chunks, and no (N, V) tensor on the way."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from random_masks import PROPERTY
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from salsa_peft.models import logprobs
from salsa_peft.models.base import hidden_states, trunk
from salsa_peft.models.logprobs import Head, LogitScaling, check_head, full_kl, head_of, token_logprobs
from salsa_peft.utils.errors import SalsaError

N, H, V, EOS = 11, 8, 13, 2


class Case:
    """N states of width H over a vocabulary of V; EOS forbidden at every third."""

    def __init__(
        self,
        temperature: float = 1.0,
        bias: bool = False,
        trained: bool = False,
        factor: float = 1.0,
        cap: float | None = None,
    ) -> None:
        generator = torch.Generator().manual_seed(0)
        self.hidden, self.other = torch.randn(2, N, H, generator=generator)
        self.labels = torch.randint(3, V, (N,), generator=generator)
        self.forbidden = torch.arange(N) % 3 == 0
        self.labels[1] = EOS
        weight = torch.randn(V, H, generator=generator).requires_grad_(trained)
        shift = torch.randn(V, generator=generator) if bias else None
        self.head = Head(weight, shift, temperature, (EOS,), LogitScaling(factor, cap))

    def distribution(self, hidden: Tensor) -> Tensor:
        """log π in double, by the formula: softmax(logits / temperature) over what could be sampled."""
        logits = hidden.double() @ self.head.weight.double().T
        if self.head.bias is not None:
            logits = logits + self.head.bias.double()
        factor, cap = self.head.scaling
        logits = logits * factor
        if cap is not None:
            logits = cap * torch.tanh(logits / cap)
        allowed = torch.ones(N, V, dtype=torch.bool)
        allowed[self.forbidden, EOS] = False
        return (logits / self.head.temperature).masked_fill(~allowed, -torch.inf).log_softmax(-1)

    def logprobs(self, hidden: Tensor) -> Tensor:
        """(N,) of the labels."""
        return self.distribution(hidden)[torch.arange(N), self.labels]


@pytest.fixture(params=[3, 256], ids=["four chunks", "one chunk"])
def chunk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Eleven rows in chunks of 3, 3, 3 and 2, or in one."""
    monkeypatch.setattr(logprobs, "CHUNK", request.param)
    return int(request.param)


SIZES = {
    "vocab_size": 80, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
SCALED: dict[str, dict[str, Any]] = {
    "gemma2": {"head_dim": 8, "query_pre_attn_scalar": 8, "final_logit_softcapping": 5.0},
    "gemma3_text": {"head_dim": 8, "query_pre_attn_scalar": 8, "final_logit_softcapping": 3.0},
    "vaultgemma": {"head_dim": 8, "query_pre_attn_scalar": 8, "final_logit_softcapping": 5.0},
    "nanochat": {"final_logit_softcapping": 4.0},
    "recurrent_gemma": {"logits_soft_cap": 5.0, "block_types": ["recurrent", "attention"], "lru_width": 32},
    "cohere": {"logit_scale": 0.3},
    "cohere2": {"logit_scale": 0.3, "head_dim": 8},
    "granite": {"logits_scaling": 8.0},
    "hyperclovax": {"logits_scaling": 0.5},
    "falcon_h1": {
        "lm_head_multiplier": 0.3,
        "mamba_d_ssm": 64,
        "mamba_n_heads": 8,
        "mamba_d_head": 8,
        "mamba_d_state": 8,
    },
    "phi": {},  # its head has a bias
    "gptj": {"rotary_dim": 4},
}
CASES: list[dict[str, Any]] = [
    {}, {"temperature": 0.7}, {"temperature": 1.8, "bias": True}, {"factor": 0.4}, {"cap": 1.5},
    {"factor": 1.7, "cap": 2.0, "temperature": 0.7, "bias": True},
]  # fmt: skip


@pytest.mark.parametrize("options", CASES)
@pytest.mark.parametrize("trained", [False, True])
def test_values_and_entropy_are_the_formulas(chunk: int, options: dict[str, Any], trained: bool) -> None:
    case = Case(**options, trained=trained)
    found = token_logprobs(case.hidden, case.labels, case.forbidden, case.head)
    log_pi = case.distribution(case.hidden)
    entropy = -(log_pi.exp() * log_pi.clamp(min=-1e9)).sum(-1)
    assert found.logprobs.dtype == found.entropy.dtype == torch.float32
    torch.testing.assert_close(found.logprobs.double(), case.logprobs(case.hidden), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.entropy.double(), entropy, rtol=1e-5, atol=1e-5)
    assert not found.entropy.requires_grad
    assert found.logprobs.requires_grad is trained


def test_more_rows_than_the_real_chunk() -> None:
    """2 · 256 + 1 rows in three chunks."""
    generator = torch.Generator().manual_seed(1)
    hidden, weight = torch.randn(513, H, generator=generator), torch.randn(V, H, generator=generator)
    labels = torch.randint(0, V, (513,), generator=generator)
    found = token_logprobs(hidden, labels, torch.zeros(513, dtype=torch.bool), Head(weight, None, 1.0, (EOS,)))
    expected = (hidden @ weight.T).log_softmax(-1)[torch.arange(513), labels]
    torch.testing.assert_close(found.logprobs, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("options", CASES)
@pytest.mark.parametrize("trained", [False, True])
def test_the_gradient_is_that_of_the_full_formula(chunk: int, options: dict[str, Any], trained: bool) -> None:
    """To the states, and where the head is trained to the head; weighted differently at every token."""
    case, upstream = Case(**options, trained=trained), torch.linspace(-2, 3, N)
    grads = []
    for value in (lambda h: token_logprobs(h, case.labels, case.forbidden, case.head).logprobs, case.logprobs):
        hidden = case.hidden.clone().requires_grad_()
        case.head.weight.grad = None
        (value(hidden) * upstream).sum().backward()
        grads.append((hidden.grad, case.head.weight.grad))
    torch.testing.assert_close(grads[0][0], grads[1][0], rtol=1e-5, atol=1e-5)
    assert (grads[0][1] is not None) is trained
    if trained:
        torch.testing.assert_close(grads[0][1], grads[1][1], rtol=1e-5, atol=1e-5)


PRECISE = [LogitScaling(), LogitScaling(0.4), LogitScaling(1.7, 30.0)]


def likely_states(
    probability: float, weight: Tensor, scaling: LogitScaling, temperature: float
) -> tuple[Tensor, Tensor]:
    """Random states (100, H), moved along their labels' rows of the head until the labels have this probability; and labels."""
    generator = torch.Generator().manual_seed(1)
    start = torch.randn(100, weight.shape[1], generator=generator, dtype=torch.float64)
    labels = torch.randint(3, len(weight), (100,), generator=generator)
    direction = weight.double()[labels] / weight.double()[labels].square().sum(-1, keepdim=True)
    low, high = torch.full((100,), -50.0).double(), torch.full((100,), 50.0).double()
    for _ in range(50):
        middle = (low + high) / 2
        states = start + middle[:, None] * direction
        logits = scaling(states @ weight.double().T) / temperature
        found = logits.softmax(-1)[torch.arange(100), labels]
        low, high = torch.where(found < probability, middle, low), torch.where(found < probability, high, middle)
    return states.to(weight.dtype), labels


@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
@pytest.mark.parametrize("masked", [False, True], ids=["all tokens", "EOS forbidden"])
@pytest.mark.parametrize("scaling", PRECISE, ids=["plain", "factor", "soft cap"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "float32"])
def test_gradients_of_likely_tokens(dtype: torch.dtype, scaling: LogitScaling, masked: bool, trained: bool) -> None:
    """Against float64 they are as good as plain autograd's in the same dtype, for labels of p from .01 to .9999.

    W_label − bf16(p) · W was off by 26% at p = .99 and by 100% above .999, where plain autograd is off by 2 to 3%.
    """
    generator, temperature = torch.Generator().manual_seed(0), 0.9
    weight = (0.3 * torch.randn(400, 64, generator=generator)).to(dtype).requires_grad_(trained)
    forbidden = torch.arange(100) % 3 == 0 if masked else None
    upstream = torch.linspace(-2, 3, 100)

    def plain(states: Tensor, head: Tensor) -> Tensor:
        logits = nn.functional.linear(states, head)
        logits = scaling.factor * (logits if logits.dtype == torch.float64 else logits.float())
        logits = (logits if scaling.cap is None else scaling.cap * (logits / scaling.cap).tanh()) / temperature
        if forbidden is not None:
            logits = logits.index_fill(1, torch.tensor([EOS]), -torch.inf).where(forbidden[:, None], logits)
        return logits.log_softmax(-1)[torch.arange(100), labels]

    def ours(states: Tensor, head: Tensor) -> Tensor:
        return token_logprobs(states, labels, forbidden, Head(head, None, temperature, (EOS,), scaling)).logprobs

    def gradient(of: Callable[[Tensor, Tensor], Tensor], states: Tensor, head: Tensor) -> Tensor:
        states = states.clone().requires_grad_()
        (of(states, head) * upstream).sum().backward()
        assert states.grad is not None and states.grad.dtype == states.dtype
        return states.grad.double()

    for probability in (0.01, 0.1, 0.5, 0.9, 0.99, 0.999, 0.9999):
        states, labels = likely_states(probability, weight.detach(), scaling, temperature)
        exact = gradient(plain, states.double(), weight.detach().double())
        errors = [(gradient(of, states, weight) - exact).norm(dim=-1) / exact.norm(dim=-1) for of in (ours, plain)]
        medians, largest = ([float(function(one)) for one in errors] for function in (torch.median, torch.max))
        rounding = torch.finfo(dtype).eps / 4  # the product with `upstream` is rounded once more
        assert medians[0] <= 1.2 * medians[1] + rounding and largest[0] <= 1.2 * largest[1] + rounding, probability


def test_without_forbidden_tokens_nothing_is_compared_with_infinity(chunk: int) -> None:
    """None and a mask of False give the same figures to the bit; with None nothing waits for a device."""
    case = Case(trained=False)
    none = torch.zeros(N, dtype=torch.bool)
    for trained in (False, True):
        head = case.head._replace(weight=case.head.weight.detach().requires_grad_(trained))
        both = [token_logprobs(case.hidden, case.labels, mask, head) for mask in (None, none)]
        assert all(torch.equal(one, other) for one, other in zip(*both, strict=True))
    first, second = (full_kl(case.hidden, case.other, mask, case.head, case.head) for mask in (None, none))
    assert torch.equal(first, second)


@pytest.mark.parametrize("kind", sorted(SCALED))
@pytest.mark.parametrize("trained", [False, True])
def test_architectures_that_scale_or_cap_their_logits(kind: str, trained: bool) -> None:
    """Log-probs, entropy and both gradients against autograd through the model's own logits, in double, within 1e-6."""
    torch.manual_seed(0)
    lm = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **(SIZES | SCALED[kind]))).eval()
    for parameter in lm.parameters():
        parameter.data.normal_(std=0.3)
    check_head(lm)
    embeddings = lm.get_output_embeddings()
    embeddings.weight.requires_grad_(trained)
    ids, forbidden = torch.tensor([[5, 9, 12, 7, 30, 61]]), torch.zeros(5, dtype=torch.bool)
    states, upstream = hidden_states(lm, ids, torch.ones_like(ids)).detach()[0, :-1], torch.linspace(-2, 3, 5)
    found, expected = states.clone().requires_grad_(), states.double().requires_grad_()
    ours = token_logprobs(found, ids[0, 1:], forbidden, head_of(lm, 1.0, (2,)))
    (ours.logprobs * upstream).sum().backward()
    gradients = [embeddings.weight.grad]
    embeddings.weight.grad = None
    lm.double()
    with of_states(trunk(lm), expected[None]):
        logits = lm(input_ids=ids[:, :-1], use_cache=False).logits[0]
    assert logits.dtype == torch.float64
    plain = logits.log_softmax(-1)
    (plain[torch.arange(5), ids[0, 1:]] * upstream).sum().backward()
    gradients.append(embeddings.weight.grad)
    torch.testing.assert_close(ours.logprobs.double(), plain[torch.arange(5), ids[0, 1:]], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(ours.entropy.double(), -(plain.exp() * plain).sum(-1), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found.grad.double(), expected.grad, rtol=1e-6, atol=1e-6)
    if trained:
        torch.testing.assert_close(gradients[0].double(), gradients[1], rtol=1e-6, atol=2e-6)


@contextlib.contextmanager
def of_states(decoder: nn.Module, states: Tensor) -> Iterator[None]:
    """Within the context the trunk's last states are these."""

    def instead(_: nn.Module, __: Any, output: Any) -> Any:
        output.last_hidden_state = states
        return output

    hook = decoder.register_forward_hook(instead)
    try:
        yield
    finally:
        hook.remove()


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_gradcheck(chunk: int, temperature: float) -> None:
    """Against finite differences. The log-softmax is float32 by design, so the step is 1e-2 and the tolerance 1e-3."""
    case = Case(temperature, bias=True)
    head = case.head._replace(weight=case.head.weight.double(), bias=case.head.bias.double())  # type: ignore[union-attr]
    hidden = (0.3 * case.hidden.double()).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda h: token_logprobs(h, case.labels, case.forbidden, head).logprobs,
        (hidden,),
        eps=1e-2,
        atol=1e-3,
        rtol=1e-3,
    )


def test_states_and_head_in_bfloat16_give_float32_figures() -> None:
    """The matrix product is bf16's, the softmax float32; the gradient comes back in the states' own type."""
    case = Case()
    head = case.head._replace(weight=case.head.weight.bfloat16())
    hidden = case.hidden.bfloat16().requires_grad_()
    found = token_logprobs(hidden, case.labels, case.forbidden, head)
    found.logprobs.sum().backward()
    assert found.logprobs.dtype == torch.float32
    assert hidden.grad is not None
    assert hidden.grad.dtype == torch.bfloat16
    logits = (hidden.detach() @ head.weight.T).float()
    logits[case.forbidden, EOS] = -torch.inf
    torch.testing.assert_close(
        found.logprobs.detach(), logits.log_softmax(-1)[torch.arange(N), case.labels], rtol=1e-5, atol=1e-5
    )


def test_a_forbidden_eos_has_no_probability() -> None:
    """And the others share what it had; where it is allowed nothing changes."""
    case = Case()
    case.labels[:] = EOS
    found = token_logprobs(case.hidden, case.labels, case.forbidden, case.head).logprobs
    assert found[case.forbidden].eq(-torch.inf).all()
    torch.testing.assert_close(
        found[~case.forbidden], (case.hidden @ case.head.weight.T).log_softmax(-1)[~case.forbidden, EOS]
    )


@pytest.mark.parametrize("trained", [False, True])
def test_the_whole_logits_never_exist(monkeypatch: pytest.MonkeyPatch, trained: bool) -> None:
    """No operation of forward or backward makes a tensor of more than CHUNK · V numbers (or the head's own V · H)."""
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    monkeypatch.setattr(logprobs, "CHUNK", 3)
    rows, vocabulary, width = 64, 40, 4
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            result = func(*args, **(kwargs or {}))
            largest = max([largest, *(leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, Tensor))])
            return result

    hidden, other = torch.randn(2, rows, width)
    hidden.requires_grad_()
    head = Head(torch.randn(vocabulary, width, requires_grad=trained), None, 1.0, (EOS,))
    labels, forbidden = torch.full((rows,), 5), torch.zeros(rows, dtype=torch.bool)
    with Watch():
        token_logprobs(hidden, labels, forbidden, head).logprobs.sum().backward()
        full_kl(hidden, other, forbidden, head, head)
    assert rows * width <= largest <= max(vocabulary * width, rows * width)
    assert largest < rows * vocabulary / 8


def test_nothing_is_kept_for_the_backward_that_is_vocabulary_wide() -> None:
    """A trained head would keep probabilities of every chunk without the checkpoint; a frozen one keeps (N, H)."""
    for trained in (False, True):
        case, kept = Case(trained=trained), []

        def pack(tensor: Tensor, kept: list[Any] = kept) -> Tensor:
            kept.append(tuple(tensor.shape))
            return tensor

        hidden = case.hidden.requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            token_logprobs(hidden, case.labels, case.forbidden, case.head)
        assert (N, V) not in kept, (trained, kept)
        assert kept.count((N, H)) == 1 if not trained else True


@pytest.mark.parametrize("options", CASES)
def test_full_kl_is_exact(chunk: int, options: dict[str, Any]) -> None:
    """Against torch's kl_div in double; 0 to itself, never negative, no gradient."""
    case = Case(**options)
    found = full_kl(case.hidden.requires_grad_(), case.other, case.forbidden, case.head, case.head)
    policy, other = (case.distribution(states).masked_fill(case.forbidden[:, None] & (torch.arange(V) == EOS), -1e4)
                     for states in (case.hidden, case.other))  # fmt: skip
    expected = nn.functional.kl_div(other, policy, reduction="none", log_target=True).sum(-1)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    assert found.min() > 0.01
    assert not found.requires_grad
    assert full_kl(case.hidden, case.hidden, case.forbidden, case.head, case.head).abs().max() < 1e-6


def test_kl_has_a_direction() -> None:
    """KL(π ‖ ref) is not KL(ref ‖ π): by hand with two tokens, log-odds 0 and ln 3.

    π = (½, ½), ref = (¾, ¼): KL(π ‖ ref) = ½ ln(⅔) + ½ ln 2 = ½ ln(4/3).
    """
    head = Head(torch.tensor([[1.0], [0.0]]), None, 1.0, (0,))
    policy, reference = torch.tensor([[0.0]]), torch.tensor([[3.0]]).log()
    found = full_kl(policy, reference, torch.tensor([False]), head, head)
    torch.testing.assert_close(found, torch.tensor([4 / 3]).log() / 2)


def test_head_of_a_model(make_base: Callable[..., Any], tokenizer: Any) -> None:
    """Its output embeddings; log π from it and the trunk is log_softmax of the model's logits."""
    lm = make_base()
    head = head_of(lm, 0.7, (int(tokenizer.eos_token_id),))
    assert head.weight is lm.lm_head.weight
    assert (head.bias, head.temperature, head.eos) == (None, 0.7, (tokenizer.eos_token_id,))
    ids = torch.tensor([[5, 9, 12, 7]])
    with torch.no_grad():
        states = lm.model(ids)[0][0, :-1]
        expected = (lm(ids).logits[0] / 0.7).log_softmax(-1)[torch.arange(3), ids[0, 1:]]
        found = token_logprobs(states, ids[0, 1:], torch.zeros(3, dtype=torch.bool), head)
    torch.testing.assert_close(found.logprobs, expected, rtol=1e-5, atol=1e-5)


def test_a_head_with_adapters_is_refused(make_base: Callable[..., Any], make_adapter: Callable[..., Any]) -> None:
    """Policy and references are read through one head: LoRA on lm_head would be left out of the log-probs in silence."""
    model = make_adapter(make_base(), "policy", 0, target_modules=["q_proj", "lm_head"])
    with pytest.raises(SalsaError, match="the adapter is on the output embeddings"):
        head_of(model.get_base_model(), 1.0, (EOS,))
    model = make_adapter(make_base(), "policy", 0, target_modules=["q_proj"], modules_to_save=["lm_head"])
    with pytest.raises(SalsaError, match="the adapter is on the output embeddings"):
        head_of(model.get_base_model(), 1.0, (EOS,))


def log_softmax_loop(logits: list[float], temperature: float, forbidden: int | None) -> list[float]:
    """In Python floats."""
    scaled = [-math.inf if v == forbidden else logit / temperature for v, logit in enumerate(logits)]
    norm = math.log(math.fsum(math.exp(value) for value in scaled))
    return [value - norm for value in scaled]


@PROPERTY
@given(st.integers(1, 9), st.integers(2, 7), st.integers(0, 999), st.floats(0.3, 3), st.booleans())
def test_everything_equals_the_plain_loop(
    rows: int, vocabulary: int, seed: int, temperature: float, bias: bool
) -> None:
    """Log-prob, entropy and exact KL to a reference with a head of its own, one token after another, EOS (0) forbidden at some."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    states, others = normal(2, rows, 4)
    heads = [Head(normal(vocabulary, 4), normal(vocabulary) if bias else None, temperature, (0,)) for _ in range(2)]
    labels = torch.randint(1, vocabulary, (rows,), generator=generator)
    forbidden = torch.rand(rows, generator=generator) < 0.4
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(logprobs, "CHUNK", 4)
        found = token_logprobs(states, labels, forbidden, heads[0])
        kl = full_kl(states, others, forbidden, *heads)
    for n in range(rows):
        tables = []
        for state, head in ((states[n], heads[0]), (others[n], heads[1])):
            shift = [0.0] * vocabulary if head.bias is None else head.bias.tolist()
            logits = [sum(w * h for w, h in zip(row, state.tolist(), strict=True)) for row in head.weight.tolist()]
            logits = [logit + b for logit, b in zip(logits, shift, strict=True)]
            tables.append(log_softmax_loop(logits, temperature, 0 if forbidden[n] else None))
        terms = [(p, q) for p, q in zip(*tables, strict=True) if p > -math.inf]
        assert found.logprobs[n].item() == pytest.approx(tables[0][labels[n]], rel=1e-4, abs=1e-4)
        assert found.entropy[n].item() == pytest.approx(-sum(math.exp(p) * p for p, _ in terms), rel=1e-4, abs=1e-4)
        assert kl[n].item() == pytest.approx(sum(math.exp(p) * (p - q) for p, q in terms), rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("broken", ["policy", "reference"])
def test_full_kl_of_states_that_are_no_numbers_is_none(broken: str) -> None:
    """A reference of NaN must not pass for one that agrees with the policy; where EOS is forbidden nothing else is hidden."""
    case = Case()
    (case.hidden if broken == "policy" else case.other)[1] = float("nan")
    found = full_kl(case.hidden, case.other, case.forbidden, case.head, case.head)
    assert found.isnan().tolist() == [row == 1 for row in range(N)]
