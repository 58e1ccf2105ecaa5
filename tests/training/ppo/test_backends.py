"""Backends of the rollout: the same responses compiled or not, the right distribution from each sampler, a base that stays as it was."""

from __future__ import annotations

import http.server
import json
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from scipy.stats import chisquare
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, CompileConfig

from salsa_peft.config.options.rollout import BACKEND_OPTIONS
from salsa_peft.models.adapters import lora as adapters
from salsa_peft.models.adapters.merged import merged_parameters
from salsa_peft.models.generation import Recording
from salsa_peft.models.logprobs import head_of
from salsa_peft.models.responses import Responses, Sequences, response_logprobs, response_states
from salsa_peft.training.ppo import backends
from salsa_peft.training.ppo import backends as vllm_backend
from salsa_peft.training.ppo.backends import BACKENDS, HF, VLLM, CompiledHF, Paged
from salsa_peft.training.ppo.config import SalsaPPOConfig
from salsa_peft.utils.errors import SalsaError

PAD, BOS, EOS = 0, 1, 2
CPU = torch.device("cpu")


@pytest.fixture
def options(tmp_path: Path) -> Callable[..., SalsaPPOConfig]:
    """Fields → the trainer's arguments, 8 tokens a response unless said otherwise."""

    def make(**fields: Any) -> SalsaPPOConfig:
        return SalsaPPOConfig(
            output_dir=str(tmp_path), use_cpu=True, report_to="none", **({"max_new_tokens": 8} | fields)
        )

    return make


@pytest.fixture
def paged_options(options: Any) -> Callable[..., SalsaPPOConfig]:
    """The same for paged, with pages of 16 tokens; fields that are its own go into rollout_options."""

    def make(**fields: Any) -> SalsaPPOConfig:
        own = {"page_size": 16, **{name: fields.pop(name) for name in BACKEND_OPTIONS["paged"] if name in fields}}
        return options(rollout_backend="paged", rollout_options=own, **fields)

    return make


@pytest.fixture
def two_adapters(make_base: Any, make_adapter: Any) -> PeftModel:
    """A base with `policy`, which is active, and `other`."""
    return make_adapter(make_adapter(make_base(), "policy", 1), "other", 2)


def same(found: Responses, expected: Responses) -> bool:
    """Whether the prompts and responses are the same tokens."""
    rows = range(len(expected.finished))
    pairs = ((found.prompt_ids, found.prompt_mask, expected.prompt_ids, expected.prompt_mask),
             (found.response_ids, found.response_mask, expected.response_ids, expected.response_mask))  # fmt: skip
    tokens = all(a[row][m[row]].tolist() == b[row][n[row]].tolist() for a, m, b, n in pairs for row in rows)
    return tokens and len(found.finished) == len(rows) and torch.equal(found.finished, expected.finished)


class TestCompiled:
    @pytest.mark.parametrize("minimum", [0, 3])
    def test_a_static_cache_gives_the_same_responses(
        self, two_adapters: Any, tokenizer: Any, options: Any, prompts: list[list[int]], minimum: int
    ) -> None:
        """Call after call in the same cache, with fewer rows, narrower and wider ones, under either adapter."""
        args = options(min_new_tokens=minimum)
        static, plain = CompiledHF(two_adapters, args, tokenizer, None), HF(two_adapters, args, tokenizer)
        for rows in (range(12), range(3, 8), [5], range(12)):
            for name in ("policy", "other"):
                given = [prompts[row] for row in rows], [100 + row for row in rows]
                with adapters.active(two_adapters, name):
                    assert same(static(*given), plain(*given))

    def test_one_cache_until_more_rows_or_tokens_come(
        self, make_base: Any, tokenizer: Any, options: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """CUDA graphs are recorded for its addresses; 3 + 8 tokens need 16, and 9 + 8 need 32, where it grows by 16."""
        monkeypatch.setattr(backends, "BUCKET", 16)
        backend, caches, addresses = CompiledHF(make_base(), options(), tokenizer, None), [], []
        for asked in ([[1, 5, 6]] * 2, [[1]], [[1, 5, 6, 7]], [[1] * 9], [[1]] * 2, [[1]] * 3):
            backend(asked, range(len(asked)))
            caches.append(backend.cache)
            addresses.append(backend.cache.layers[0].keys.data_ptr())
        assert [caches[0] is cache for cache in caches] == [True, True, True, False, False, False]
        assert [caches[3] is cache for cache in caches[3:]] == [True, True, False]
        assert len(set(addresses[:3])) == len(set(addresses[3:5])) == 1
        assert [cache.layers[0].keys.shape[0] for cache in caches] == [2, 2, 2, 2, 2, 3]
        assert [cache.layers[0].keys.shape[2] for cache in caches] == [16, 16, 16, 32, 32, 32]

    def test_max_prompt_length_sizes_it_at_once(self, make_base: Any, tokenizer: Any, options: Any) -> None:
        backend = CompiledHF(make_base(), options(max_prompt_length=300), tokenizer, None)
        backend([[1, 5]], [0])
        assert backend.cache.layers[0].keys.shape[2] == 512

    def test_the_decoding_step_is_compiled_once_for_each_adapter(
        self, make_base: Any, make_adapter: Any, tokenizer: Any, options: Any, prompts: list[list[int]]
    ) -> None:
        """Whatever the rows and widths; traced by Dynamo here, not built by Inductor."""
        from torch._dynamo.utils import counters

        torch._dynamo.reset()
        counters.clear()
        two_adapters = make_adapter(make_adapter(make_base(num_hidden_layers=1), "policy", 1), "other", 2)
        config = CompileConfig(backend="eager", mode=None)
        config._compile_all_devices = True
        compiled = CompiledHF(two_adapters, options(), tokenizer, config)
        plain = HF(two_adapters, options(), tokenizer)
        graphs = []
        for name, rows in (
            ("policy", range(12)),
            ("policy", [5, 7]),
            ("policy", [0]),
            ("other", range(6)),
            ("policy", [3, 4]),
        ):
            given = [prompts[row] for row in rows], list(rows)
            with adapters.active(two_adapters, name):
                assert same(compiled(*given), plain(*given))
            graphs.append(counters["stats"]["unique_graphs"])
        assert graphs == [1, 1, 1, 2, 2]
        assert not counters["graph_break"]

    def test_what_is_refused(
        self, make_base: Any, tokenizer: Any, options: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(backends, "device", lambda: CPU)
        with pytest.raises(SalsaError, match="rollout_compile: this needs CUDA"):
            BACKENDS["hf"](make_base(), options(rollout_compile=True), tokenizer, None)
        recording = Recording(torch.nn.Linear(32, 1))
        with pytest.raises(SalsaError, match="rollout_compile: log-probs cannot be recorded while sampling"):
            CompiledHF(make_base(), options(), tokenizer, None)([[1]], [0], recording=recording)
        monkeypatch.setattr(backends, "device", lambda: torch.device("cuda"))
        assert isinstance(BACKENDS["hf"](make_base(), options(rollout_compile=True), tokenizer, None), CompiledHF)
        assert type(BACKENDS["hf"](make_base(), options(), tokenizer, None)) is HF


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rollout_options": {"page_size": 4}}, r"rollout_options: rollout_backend hf has no option page_size; it takes no options"),
        ({"rollout_backend": "paged", "rollout_options": {"return_logprobs": True}}, r"rollout_options: rollout_backend paged has no option return_logprobs; its options are page_size"),
        ({"rollout_backend": "vllm", "rollout_options": {"temperature": 0.5}}, r"rollout_options: rollout_backend vllm has no option temperature; its options are sync, mode"),
        ({"rollout_backend": "vllm", "rollout_options": {"sync": "lora"}}, r"rollout_options\.sync: must be merged or adapter, not 'lora'"),
        ({"rollout_backend": "vllm", "rollout_options": {"mode": "remote"}}, r"rollout_options\.mode: must be colocate or server, not 'remote'"),
        ({"rollout_backend": "vllm", "rollout_options": {"mode": "server", "sync": "adapter"}}, r"rollout_options\.sync: adapter works in mode colocate only; use merged"),
        ({"rollout_backend": "vllm", "rollout_options": {"mode": "server", "enable_sleep_mode": True, "max_num_seqs": 4}}, r"rollout_options: a server does not read enable_sleep_mode, max_num_seqs; remove it here"),
        ({"rollout_backend": "paged", "rollout_compile": True}, r"rollout_compile: rollout_backend paged cannot be compiled; set rollout_compile=false or use hf"),
        ({"rollout_compile": True, "old_logprobs": "rollout"}, r"old_logprobs: rollout does not work with rollout_compile, because a compiled step records no log-probs"),
        ({"rollout_backend": "paged", "old_logprobs": "rollout"}, r"old_logprobs: rollout does not work with rollout_backend paged, because only hf computes log-probs"),
    ],
)  # fmt: skip
def test_options_that_a_backend_does_not_have(options: Any, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(SalsaError, match=message):
        options(**fields)


class TestPaged:
    @pytest.mark.parametrize("attention", ["sdpa", "eager"])
    def test_responses_keep_the_rules_and_everything_is_as_before(
        self,
        make_base: Any,
        make_adapter: Any,
        tokenizer: Any,
        paged_options: Any,
        prompts: list[list[int]],
        attention: str,
    ) -> None:
        """Prompts come back in order; each response ends with its EOS or at the limit. Mode, attention, settings and random state."""
        base = make_base(attn_implementation=attention)
        model = make_adapter(base, "policy", 1).train()
        settings = base.generation_config
        torch.manual_seed(5)
        state = torch.random.get_rng_state()
        found = BACKENDS["paged"](model, paged_options(), tokenizer, None)(prompts, range(12))
        assert torch.equal(torch.random.get_rng_state(), state)
        assert (base.config._attn_implementation, base.training, base.generation_config) == (attention, True, settings)
        assert len(set(found.lengths.tolist())) > 2
        assert 0 < found.finished.sum() < 12
        for row, prompt in enumerate(prompts):
            assert found.prompt_ids[row][found.prompt_mask[row]].tolist() == prompt
            tokens = found.response_ids[row][found.response_mask[row]].tolist()
            assert (EOS in tokens) is bool(found.finished[row])
            assert tokens[-1] == EOS if found.finished[row] else len(tokens) == 8
            assert EOS not in tokens[:-1]

    @pytest.mark.parametrize("blocks", [{}, {"num_blocks": 3}])
    def test_next_to_temperature_0_it_is_hf(
        self, two_adapters: Any, tokenizer: Any, paged_options: Any, prompts: list[list[int]], blocks: dict[str, int]
    ) -> None:
        """The likeliest token of the active adapter, row by row, also where most requests must wait for room."""
        args = paged_options(temperature=1e-4, **blocks)
        paged, plain = Paged(two_adapters, args, tokenizer, None), HF(two_adapters, args, tokenizer)
        answers = []
        for name in ("policy", "other", None):
            with adapters.active(two_adapters, name):
                answers.append(paged(prompts, range(12)))
                assert same(answers[-1], plain(prompts, range(12)))
        assert not same(answers[0], answers[1])
        assert not same(answers[0], answers[2])

    @pytest.mark.parametrize("temperature", [1.0, 0.6])
    def test_what_is_sampled_is_what_is_scored(
        self, two_adapters: Any, tokenizer: Any, paged_options: Any, prompts: list[list[int]], temperature: float
    ) -> None:
        """Continuous batching's own log-probs of its samples, as recorded, are those that the update uses."""
        recording = Recording()
        paged = Paged(two_adapters, paged_options(temperature=temperature), tokenizer, None)
        found = paged(prompts, range(12), recording=recording)
        sequences = Sequences(found)
        batch, head = sequences.forward_batch(range(12)), head_of(two_adapters.get_base_model(), temperature, (EOS,))
        with torch.no_grad():
            states = response_states(two_adapters, batch)
        logprobs = sequences.table(batch.cells, response_logprobs(states, batch, head).logprobs)
        (sampled,) = recording.stacked(found.response_mask)
        assert sampled.lt(0).equal(found.response_mask)
        torch.testing.assert_close(sampled, logprobs, rtol=1e-4, atol=1e-4)

    def test_first_tokens_have_the_models_distribution(
        self, make_base: Any, tokenizer: Any, paged_options: Any
    ) -> None:
        """Chi-square of 500 first tokens each of two prompts of other lengths, sampled side by side at temperature 0.7; the
        distribution at temperature 1 is far off."""
        model, asked = make_base(), [[1, 5, 6], [1, 9, 3, 4, 8]]
        args = paged_options(max_new_tokens=1, temperature=0.7, max_requests_per_batch=200)
        found = Paged(model, args, tokenizer, None)(asked * 500, range(1000))
        for place, prompt in enumerate(asked):
            drawn = torch.bincount(found.response_ids[place::2, 0], minlength=len(tokenizer))
            assert distribution_test(drawn, model, prompt, 0.7) > 1e-3
            assert distribution_test(drawn, model, prompt, 1.0) < 1e-6
            assert distribution_test(drawn, model, asked[1 - place], 0.7) < 1e-6

    def test_the_seeds_decide_on_a_cpu(
        self, make_base: Any, tokenizer: Any, paged_options: Any, prompts: list[list[int]]
    ) -> None:
        paged = Paged(make_base(), paged_options(), tokenizer, None)
        first = paged(prompts, range(12))
        torch.manual_seed(9)
        assert same(paged(prompts, range(12)), first)
        assert not same(paged(prompts, [*range(11), 99]), first)
        equal = paged([prompts[0]] * 12, range(12))
        assert len({tuple(row) for row in equal.response_ids.tolist()}) > 6

    def test_min_new_tokens_is_refused(self, make_base: Any, tokenizer: Any, paged_options: Any) -> None:
        """Transformers drops it without a word: EOS would come first."""
        with pytest.raises(SalsaError, match="min_new_tokens: paged ignores it"):
            Paged(make_base(), paged_options(min_new_tokens=3), tokenizer, None)

    def test_an_older_transformers_is_refused(
        self, make_base: Any, tokenizer: Any, paged_options: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """As it comes with vLLM 0.31."""
        monkeypatch.setattr(backends.transformers, "__version__", "5.17.0")
        with pytest.raises(SalsaError, match=r"paged needs transformers 5\.19 or newer, not 5\.17\.0"):
            Paged(make_base(), paged_options(), tokenizer, None)

    def test_a_failure_is_one_line_and_leaves_nothing_behind(
        self,
        make_base: Any,
        tokenizer: Any,
        paged_options: Any,
        prompts: list[list[int]],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """An error in the thread that generates, one that `check` raises, and a model that it does not run."""
        base = make_base(attn_implementation="eager").train()
        paged, threads = Paged(base, paged_options(), tokenizer, None), threading.active_count()

        def unchanged() -> bool:
            return (base.config._attn_implementation, base.training, threading.active_count()) == (
                "eager",
                True,
                threads,
            )

        def fail(*_: Any, **__: Any) -> None:
            raise RuntimeError("out of paper")

        def refuse(*_: Any) -> None:
            base.set_attn_implementation("paged|eager")
            raise ValueError("no such attention")

        hook = base.model.layers[1].register_forward_pre_hook(fail)
        with pytest.raises(SalsaError, match=r"paged failed: .*out of paper"):
            paged(prompts, range(12))
        hook.remove()
        assert unchanged()
        with pytest.raises(KeyboardInterrupt):
            paged(prompts, range(12), check=lambda: (_ for _ in ()).throw(KeyboardInterrupt))
        assert unchanged()
        assert paged(prompts, range(12)).lengths.min() > 0
        monkeypatch.setattr(base, "init_continuous_batching", refuse)
        with pytest.raises(SalsaError, match="paged does not support this model: no such attention"):
            paged(prompts, range(12))
        assert unchanged()

    def test_an_interruption_does_not_wait_for_the_responses(
        self, make_base: Any, tokenizer: Any, paged_options: Any, prompts: list[list[int]]
    ) -> None:
        """Some would go on for 40 tokens, at 50 ms a token here."""
        base, steps = make_base(), []
        base.lm_head.weight.data[EOS] = 0.0  # seldom drawn
        paged = Paged(base, paged_options(max_new_tokens=40), tokenizer, None)
        assert paged(prompts, range(12)).lengths.max() == 40

        def slowly(*_: Any) -> None:
            steps.append(time.sleep(0.05))

        def check() -> None:
            if steps:
                raise KeyboardInterrupt

        base.register_forward_pre_hook(slowly)
        with pytest.raises(KeyboardInterrupt):
            paged(prompts, range(12), check=check)
        assert 0 < len(steps) < 30

    def test_mixed_precision_reaches_the_thread_that_generates(
        self, make_base: Any, tokenizer: Any, paged_options: Any, prompts: list[list[int]]
    ) -> None:
        """Autocast is a thread's own. To another precision than the base's it is refused: the paged cache has the base's."""
        seen: list[bool] = []
        base = make_base().bfloat16()
        base.model.layers[0].register_forward_pre_hook(lambda *_: seen.append(torch.is_autocast_enabled("cpu")))
        paged = Paged(base, paged_options(max_new_tokens=2), tokenizer, None)
        with torch.autocast("cpu", torch.bfloat16):
            paged(prompts, range(12))
        assert seen
        assert all(seen)
        seen.clear()
        paged(prompts, range(12))
        assert "forward" not in vars(base)
        assert not any(seen)
        with (
            torch.autocast("cpu", torch.bfloat16),
            pytest.raises(
                SalsaError, match=r"needs a base in torch\.bfloat16, the dtype of mixed precision, but this base is in"
            ),
        ):
            Paged(make_base(), paged_options(), tokenizer, None)(prompts, range(12))


def distribution_test(drawn: Tensor, model: Any, prompt: list[int], temperature: float) -> float:
    """p of the counts (V,) under the model's next-token distribution; tokens that are expected fewer than 5 times stand together."""
    with torch.no_grad():
        expected = (model(torch.tensor([prompt])).logits[0, -1].double() / temperature).softmax(-1) * drawn.sum()
    common = expected >= 5
    pairs = [torch.cat([t[common].double(), t[~common].sum().double()[None]]) for t in (drawn, expected)]
    return float(chisquare(*pairs).pvalue)


class FakeTransfer:
    """Stands in for vLLM's NCCL engine: keeps what the trainer sends, in order."""

    sent: list[tuple[str, Tensor]]

    @classmethod
    def trainer_send_weights(cls, iterator: Iterator[tuple[str, Tensor]], trainer_args: Any) -> None:
        cls.sent = [(name, tensor.clone()) for name, tensor in iterator]


class Server(http.server.ThreadingHTTPServer):
    """Speaks what TRL's client asks of `vllm serve`: answers of other lengths, and a record of what was posted."""

    logprobs_mode = "processed_logprobs"

    def __init__(self) -> None:
        self.posted: list[tuple[str, Any]] = []
        super().__init__(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def bodies(self, path: str) -> list[Any]:
        return [body for there, body in self.posted if there == path]


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        mode = {"model_config": {"logprobs_mode": self.server.logprobs_mode}}
        self._reply({"vllm_config": mode} if self.path.startswith("/server_info") else {"data": [{"id": "tiny"}]})

    def do_POST(self) -> None:
        text = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = json.loads(text) if text else {}
        self.server.posted.append((self.path, body))
        answers = [answer(prompt) for prompt in body.get("prompt", [])]
        choices = [
            {"prompt_token_ids": p, "token_ids": a, "logprobs": None if body["logprobs"] is None else reported(a)}
            for p, a in zip(body.get("prompt", []), answers, strict=True)
        ]
        self._reply({"choices": choices})

    def _reply(self, body: dict[str, Any]) -> None:
        text = json.dumps(body).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_: Any) -> None: ...


def answer(prompt: list[int]) -> list[int]:
    """The server's: its prompt's last token once or twice, then EOS, or cut."""
    return [prompt[-1]] * (1 + len(prompt) % 2) + [EOS] * (len(prompt) % 3 > 0)


def logprobs_of(tokens: list[int]) -> list[float]:
    """The log-probs that vLLM reports of an answer: −1/8 of the token, −1/16 more at each place."""
    return [-token / 8 - place / 16 for place, token in enumerate(tokens)]


def reported(tokens: list[int]) -> dict[str, Any]:
    """As the server reports them; the second of two candidates at the first place is the sampled token."""
    names = [f"token_id:{token}" for token in tokens]
    tops: list[Any] = [{"token_id:3": -0.01}, *[None] * (len(tokens) - 1)]
    return {"tokens": names, "token_logprobs": logprobs_of(tokens), "top_logprobs": tops}


@pytest.fixture
def with_vllm(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """TRL's own client and engine as if vLLM and a GPU were here; only NCCL is a stand-in."""
    import trl.generation.vllm_client as client
    import trl.generation.vllm_generation as generation
    import trl.import_utils as utils

    for module in (client, generation, utils):
        monkeypatch.setattr(module, "is_vllm_available", lambda *_: True)
    monkeypatch.setattr(client, "NCCLWeightTransferEngine", FakeTransfer, raising=False)
    monkeypatch.setattr(client, "NCCLTrainerSendWeightsArgs", lambda **fields: fields, raising=False)
    monkeypatch.setattr(
        client.VLLMClient, "init_communicator", lambda self, device: setattr(self, "communicator", None)
    )
    monkeypatch.setattr(vllm_backend, "device", lambda: torch.device("cuda"))
    server = Server()
    yield server
    server.shutdown()
    server.server_close()


class FakeLLM:
    """Stands in for vllm.LLM: records how it is made, what it loads, what is asked, and the order of the calls."""

    made: list[FakeLLM]
    error: Exception | None

    def __init__(self, **fields: Any) -> None:
        if self.error is not None:
            raise self.error
        self.fields, self.calls, self.asleep = fields, [], set()  # type: ignore[var-annotated]
        self.loaded: list[tuple[str, Tensor]] = []
        self.asked: list[dict[str, Any]] = []
        self.adapters: list[SimpleNamespace] = []
        runner = SimpleNamespace(model_runner=SimpleNamespace(model=SimpleNamespace(load_weights=self._load)))
        self.llm_engine = SimpleNamespace(model_executor=SimpleNamespace(driver_worker=runner))
        self.made.append(self)

    def _load(self, pairs: list[tuple[str, Tensor]]) -> None:
        assert "weights" not in self.asleep
        self.calls += ["load"] if self.calls[-1:] != ["load"] else []
        self.loaded.extend((name, tensor.clone()) for name, tensor in pairs)

    def sleep(self, level: int) -> None:
        assert self.fields["enable_sleep_mode"]
        self.asleep = {"weights", "kv_cache"}
        self.calls.append(f"sleep {level}")

    def wake_up(self, tags: list[str]) -> None:
        assert set(tags) <= self.asleep
        self.asleep -= set(tags)
        self.calls.append(f"wake {' '.join(tags)}")

    def reset_prefix_cache(self) -> None: ...

    def generate(
        self, given: Any, sampling_params: Any, use_tqdm: bool, lora_request: SimpleNamespace | None = None
    ) -> list[Any]:
        assert not self.asleep
        self.calls.append("generate")
        self.asked.append(sampling_params)
        if lora_request is not None:  # vLLM reads the folder at the first request that names it
            folder = Path(lora_request.path)
            tensors, config = (
                load_file(folder / "adapter_model.safetensors"),
                json.loads((folder / "adapter_config.json").read_text()),
            )
            self.adapters.append(
                SimpleNamespace(name=lora_request.name, id=lora_request.id, tensors=tensors, config=config)
            )
        results = []
        for row in given:
            tokens = answer(row["prompt_token_ids"])
            chosen = [{t: SimpleNamespace(logprob=p, rank=1)} for t, p in zip(tokens, logprobs_of(tokens), strict=True)]
            output = SimpleNamespace(token_ids=tokens, logprobs=None if sampling_params["logprobs"] is None else chosen)
            results.append(SimpleNamespace(prompt_token_ids=row["prompt_token_ids"], outputs=[output]))
        return results


@pytest.fixture
def colocated(with_vllm: Server, monkeypatch: pytest.MonkeyPatch) -> type[FakeLLM]:
    """vLLM's package as if it were installed, with FakeLLM; requests and sampling parameters are plain objects."""
    import trl.generation.vllm_generation as generation

    def request(name: str, number: int, path: str) -> SimpleNamespace:
        assert number > 0
        return SimpleNamespace(name=name, id=number, path=path)

    package = SimpleNamespace(LLM=FakeLLM, SamplingParams=lambda **fields: fields)
    monkeypatch.setitem(sys.modules, "vllm", package)  # type: ignore[misc]
    monkeypatch.setitem(sys.modules, "vllm.lora", SimpleNamespace())  # type: ignore[misc]
    monkeypatch.setitem(sys.modules, "vllm.lora.request", SimpleNamespace(LoRARequest=request))  # type: ignore[misc]
    monkeypatch.setattr(generation, "LLM", FakeLLM, raising=False)
    monkeypatch.setattr(generation, "SamplingParams", lambda **fields: fields, raising=False)
    FakeLLM.made, FakeLLM.error = [], None
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "0")  # the engines set them; monkeypatch takes back what it has seen
        monkeypatch.delenv(name)
    return FakeLLM


def vllm_options(options: Any, server: Server, **fields: Any) -> SalsaPPOConfig:
    """A server's."""
    return options(rollout_backend="vllm", rollout_options={"mode": "server", "server_base_url": server.url}, **fields)


def weights(model: Any) -> dict[str, Tensor]:
    """A copy of every parameter."""
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    """The same names in the same order, equal to the bit."""
    return list(found) == list(expected) and all(torch.equal(found[name], expected[name]) for name in expected)


class TestMerged:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize(
        "kind",
        [{}, {"use_rslora": True}, {"use_dora": True}, {"target_modules": ["q_proj", "down_proj"]},
         {"target_modules": ["v_proj", "embed_tokens"]}],
        ids=["lora", "rslora", "dora", "some", "embeddings"],
    )  # fmt: skip
    def test_as_peft_merges_and_the_base_is_untouched(
        self, make_base: Any, make_adapter: Any, dtype: torch.dtype, kind: dict[str, Any]
    ) -> None:
        """Names and values of PEFT's merge_and_unload of the policy alone, to the bit, under whichever adapter is active."""
        expected = weights(
            make_adapter(make_base().to(dtype), "policy", 1, **kind).merge_and_unload(adapter_names=["policy"])
        )
        model = make_adapter(make_adapter(make_base().to(dtype), "policy", 1, **kind), "other", 2)
        before, plain = weights(model), list(weights(make_base()))
        for active in ("policy", "other", None):
            with adapters.active(model, active):
                found = dict(merged_parameters(model, "policy"))
            assert equal(found, expected)
        assert list(found) == plain
        assert equal(weights(model), before)
        assert not equal(found, dict(zip(plain, weights(make_base().to(dtype)).values(), strict=True)))

    def test_pefts_own_merging_in_place_would_change_the_base(self, make_base: Any, make_adapter: Any) -> None:
        """Which is why TRL's way is not taken: bf16 rounds on the way in and on the way out."""
        model = make_adapter(make_base().bfloat16(), "policy", 1)
        before = weights(model)
        model.merge_adapter()
        model.unmerge_adapter()
        assert not equal(weights(model), before)

    def test_tied_weights_come_once(self, make_base: Any, make_adapter: Any) -> None:
        model = make_adapter(make_base(tie_word_embeddings=True), "policy", 1)
        names = [name for name, _ in merged_parameters(model, "policy")]
        assert "model.embed_tokens.weight" in names
        assert "lm_head.weight" not in names
        assert len(names) == len(set(names))

    def test_what_a_merged_base_can_not_say_is_refused(self, make_base: Any, make_adapter: Any) -> None:
        """An adapter on one of two tied embeddings; a module trained as a copy; adapters that are not the policy's do not matter."""
        on_embeddings = {"target_modules": ["embed_tokens"]}
        tied = make_adapter(make_base(tie_word_embeddings=True), "policy", 1, **on_embeddings)
        with pytest.raises(SalsaError, match="tied to the output embeddings"):
            list(merged_parameters(tied, "policy"))
        assert list(merged_parameters(make_adapter(tied, "plain", 2), "plain"))
        copied = make_adapter(make_base(), "policy", 1, target_modules=["q_proj"], modules_to_save=["o_proj"])
        with pytest.raises(SalsaError, match="o_proj: this layer has a trained copy"):
            list(merged_parameters(copied, "policy"))


class TestVLLM:
    def test_without_vllm_one_line_names_the_extra(
        self, make_base: Any, tokenizer: Any, options: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        import trl.import_utils as utils

        monkeypatch.setattr(utils, "is_vllm_available", lambda: False)
        with pytest.raises(SalsaError, match=r"vllm is not installed.*salsa-peft\[vllm\]"):
            BACKENDS["vllm"](make_base(), options(rollout_backend="vllm"), tokenizer, Accelerator(cpu=True))

    def test_weights_and_requests_of_an_adapter(
        self, two_adapters: Any, tokenizer: Any, options: Any, prompts: list[list[int]], with_vllm: Server
    ) -> None:
        """What TRL's client sends over the wire: the policy merged, under the base's names; no top-p, no top-k, no seed; EOS ours alone."""
        backend = VLLM(
            two_adapters,
            vllm_options(options, with_vllm, temperature=0.7, min_new_tokens=2),
            tokenizer,
            Accelerator(cpu=True),
        )
        before, merged = weights(two_adapters), dict(merged_parameters(two_adapters, "policy"))
        backend.sync_weights()
        assert equal(dict(FakeTransfer.sent), merged)
        (announced,) = with_vllm.bodies("/update_weights")
        assert announced["update_info"]["names"] == list(merged)
        assert announced["update_info"]["shapes"] == [list(tensor.shape) for tensor in merged.values()]
        assert set(announced["update_info"]["dtype_names"]) == {"float32"}
        assert [path for path, _ in with_vllm.posted] == [
            "/start_weight_update", "/update_weights", "/finish_weight_update", "/reset_prefix_cache",
        ]  # fmt: skip
        assert equal(weights(two_adapters), before)

        recording = Recording()
        found = backend(prompts, range(12), recording=recording)
        (body,) = with_vllm.bodies("/v1/completions")
        expected = {"temperature": 0.7, "max_tokens": 8, "min_tokens": 2, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "n": 1,
                    "repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0, "logprobs": 0,
                    "ignore_eos": True, "stop_token_ids": [EOS], "prompt": prompts}  # fmt: skip
        assert body.items() >= expected.items()
        assert "seed" not in body
        answers = [answer(prompt) for prompt in prompts]
        assert same(found, pad(prompts, answers))
        (sampled,) = recording.stacked(found.response_mask)
        for row, tokens in zip(sampled, answers, strict=True):
            assert row.tolist() == [*logprobs_of(tokens), *[0.0] * (len(row) - len(tokens))]

    def test_changed_weights_are_pushed_again_and_none_are_forgotten(
        self, two_adapters: Any, tokenizer: Any, options: Any, with_vllm: Server
    ) -> None:
        """The first rollout needs them too: vLLM starts with the base's."""
        backend = VLLM(two_adapters, vllm_options(options, with_vllm), tokenizer, Accelerator(cpu=True))
        backend([[1, 5]], [0])
        assert equal(dict(FakeTransfer.sent), dict(merged_parameters(two_adapters, "policy")))
        with torch.no_grad():
            for parameter in adapters.parameters(two_adapters, "policy"):
                parameter.mul_(1.5)
        backend.sync_weights()
        backend([[1, 5]], [0])
        assert equal(dict(FakeTransfer.sent), dict(merged_parameters(two_adapters, "policy")))
        assert len(with_vllm.bodies("/update_weights")) == 2

    def test_full_weights_go_as_they_are(self, make_base: Any, tokenizer: Any, options: Any, with_vllm: Server) -> None:
        model = make_base()
        VLLM(model, vllm_options(options, with_vllm), tokenizer, Accelerator(cpu=True)).sync_weights()
        assert equal(dict(FakeTransfer.sent), weights(model))

    @pytest.mark.parametrize("corrected", [True, False])
    def test_in_this_process(
        self, two_adapters: Any, tokenizer: Any, options: Any, colocated: type[FakeLLM], corrected: bool
    ) -> None:
        """Mode colocate: how the engine is made, what it loads, how it samples; log-probs only if they are used."""
        args = options(rollout_backend="vllm", rollout_options={"max_num_seqs": 4}, max_prompt_length=20,
                       importance_sampling_correction=corrected)  # fmt: skip
        backend = VLLM(two_adapters, args, tokenizer, Accelerator(cpu=True))
        recording = Recording() if corrected else None
        found = backend([[1, 5], [1, 6, 7]], [0, 1], recording=recording)
        (engine,) = colocated.made
        assert (engine.fields["gpu_memory_utilization"], engine.fields["max_model_len"]) == (0.3, 28)
        assert (engine.fields["max_num_seqs"], engine.fields["logprobs_mode"]) == (4, "processed_logprobs")
        assert equal(dict(engine.loaded), dict(merged_parameters(two_adapters, "policy")))
        plain = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "max_tokens": 8, "min_tokens": 0, "stop_token_ids": [EOS],
                 "logprobs": 0 if corrected else None}  # fmt: skip
        assert engine.asked[0].items() >= plain.items()
        assert "seed" not in engine.asked[0]
        answers = [answer([1, 5]), answer([1, 6, 7])]
        assert same(found, pad([[1, 5], [1, 6, 7]], answers))
        if recording is not None:
            (sampled,) = recording.stacked(found.response_mask)
            assert sampled[found.response_mask].tolist() == [*logprobs_of(answers[0]), *logprobs_of(answers[1])]

    @pytest.mark.parametrize("sync", ["merged", "adapter"])
    def test_it_sleeps_while_the_policy_is_trained(
        self, two_adapters: Any, tokenizer: Any, options: Any, colocated: type[FakeLLM], sync: str
    ) -> None:
        """Weights wake up before they are sent, the KV cache after; batches of one rollout share one sync; then sleep."""
        args = options(rollout_backend="vllm", rollout_options={"sync": sync})
        backend = VLLM(two_adapters, args, tokenizer, Accelerator(cpu=True))
        (engine,) = colocated.made
        load, level = (["load"], 2) if sync == "merged" else ([], 1)
        cycle = ["wake weights", *load, "wake kv_cache", "generate", "generate", f"sleep {level}"]
        assert engine.fields["enable_sleep_mode"] is True
        assert engine.calls == [f"sleep {level}"]
        for rollouts in (1, 2):
            backend.sync_weights()
            backend([[1, 5]], [0])
            backend([[1, 6]], [0])
            backend.rest()
            assert engine.calls == [f"sleep {level}", *cycle * rollouts]
        backend.rest()  # after an error before the sync, too
        assert engine.calls[-2:] == ["generate", f"sleep {level}"]

    @pytest.mark.parametrize("sync", ["merged", "adapter"])
    def test_the_base_has_the_same_bits_after_1000_syncs(
        self, make_base: Any, make_adapter: Any, tokenizer: Any, options: Any, colocated: type[FakeLLM], sync: str
    ) -> None:
        """A bf16 base; the policy changes before each sync. What merging in place does to such a base is tested in
        test_trl_reference.py."""
        model = make_adapter(
            make_base(num_hidden_layers=1).bfloat16(), "policy", 1, target_modules=["q_proj", "v_proj"]
        )
        base = {name: tensor for name, tensor in weights(model).items() if ".policy." not in name}
        backend = VLLM(
            model, options(rollout_backend="vllm", rollout_options={"sync": sync}), tokenizer, Accelerator(cpu=True)
        )
        (engine,) = colocated.made
        for _ in range(1000):
            engine.loaded.clear()
            with torch.no_grad():
                for parameter in adapters.parameters(model, "policy"):
                    parameter.mul_(1.0005)
            backend.sync_weights()
        after = weights(model)
        assert equal({name: after[name] for name in base}, base)
        if sync == "merged":
            sent = dict(engine.loaded)
            assert not torch.equal(
                sent["model.layers.0.self_attn.q_proj.weight"],
                base["base_model.model.model.layers.0.self_attn.q_proj.base_layer.weight"],
            )

    @pytest.mark.parametrize("sync", ["merged", "adapter"])
    def test_it_stays_awake_on_request(
        self, two_adapters: Any, tokenizer: Any, options: Any, colocated: type[FakeLLM], sync: str
    ) -> None:
        args = options(rollout_backend="vllm", rollout_options={"sync": sync, "enable_sleep_mode": False})
        backend = VLLM(two_adapters, args, tokenizer, Accelerator(cpu=True))
        backend.sync_weights()
        backend([[1, 5]], [0])
        backend.rest()
        (engine,) = colocated.made
        assert engine.calls == (["load", "generate"] if sync == "merged" else ["generate"])
        assert engine.fields["enable_sleep_mode"] is False

    def test_memory_that_vllm_cannot_take_back_is_refused(
        self, two_adapters: Any, tokenizer: Any, options: Any, colocated: type[FakeLLM], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Its allocator does not work with expandable segments; without sleep it is not used."""
        monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "max_split_size_mb:64,expandable_segments:True")
        args = options(rollout_backend="vllm")
        with pytest.raises(SalsaError, match=r"enable_sleep_mode: vLLM cannot sleep with PYTORCH_CUDA_ALLOC_CONF"):
            VLLM(two_adapters, args, tokenizer, Accelerator(cpu=True))
        args = options(rollout_backend="vllm", rollout_options={"enable_sleep_mode": False})
        VLLM(two_adapters, args, tokenizer, Accelerator(cpu=True))

    def test_the_adapter_alone(
        self, two_adapters: Any, tokenizer: Any, options: Any, colocated: type[FakeLLM], prompts: list[list[int]]
    ) -> None:
        """Each sync: a new name and id, and the policy's current weights as PEFT saves them; never a weight of the base."""
        args = options(rollout_backend="vllm", rollout_options={"sync": "adapter", "max_num_seqs": 4}, temperature=0.7,
                       min_new_tokens=2, max_prompt_length=20)  # fmt: skip
        before = weights(two_adapters)
        backend = VLLM(two_adapters, args, tokenizer, Accelerator(cpu=True))
        (engine,) = colocated.made
        fields = {"enable_lora": True, "max_lora_rank": 8, "max_model_len": 28, "max_num_seqs": 4, "quantization": None,
                  "gpu_memory_utilization": 0.3, "logprobs_mode": "processed_logprobs", "seed": 0}  # fmt: skip
        assert engine.fields.items() >= fields.items()
        assert engine.fields["model"] == two_adapters.get_base_model().name_or_path
        assert not {"sync", "mode", "max_model_length"} & set(engine.fields)
        recording = Recording()
        found = backend(prompts, range(12), recording=recording)
        assert same(found, pad(prompts, [answer(prompt) for prompt in prompts]))
        (sampled,) = recording.stacked(found.response_mask)
        assert sampled[0].tolist()[: found.lengths[0]] == logprobs_of(answer(prompts[0]))
        expected = {"n": 1, "temperature": 0.7, "max_tokens": 8, "min_tokens": 2, "top_p": 1.0, "top_k": 0, "min_p": 0.0,
                    "repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0, "logprobs": 0,
                    "ignore_eos": True, "stop_token_ids": [EOS]}  # fmt: skip
        assert engine.asked[0] == expected
        with torch.no_grad():
            for parameter in adapters.parameters(two_adapters, "policy"):
                parameter.mul_(1.5)
        backend.sync_weights()
        backend([[1, 5]], [0])
        backend([[1, 5]], [0])
        first, second, third = engine.adapters
        assert (first.name, second.name, third.name) == ("policy-1", "policy-2", "policy-2")
        assert (first.id, second.id, third.id) == (1, 2, 2)
        now = weights(two_adapters)
        for request, state in ((first, before), (second, now)):
            saved = {name.replace(".weight", ".policy.weight"): tensor for name, tensor in request.tensors.items()}
            assert saved
            assert all(torch.equal(tensor, state[name]) for name, tensor in saved.items())
            assert sorted(saved) == sorted(name for name in state if ".policy." in name)
        assert (first.config["r"], first.config["peft_type"]) == (two_adapters.peft_config["policy"].r, "LORA")
        assert equal(
            {name: now[name] for name in now if ".policy." not in name},
            {name: before[name] for name in before if ".policy." not in name},
        )
        assert not engine.loaded

    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"r": 1024}, "adapter works up to rank 512, not 1024"),
            ({"use_dora": True}, "does not work with the policy's use_dora, because vLLM ignores or refuses this"),
            ({"rank_pattern": {"q_proj": 2}}, "the policy's rank_pattern"),
            ({"alpha_pattern": {"q_proj": 2}}, "the policy's alpha_pattern"),
            ({"bias": "lora_only"}, "the policy's bias"),
            ({"lora_bias": True}, "the policy's lora_bias"),
            ({"target_modules": ["q_proj"], "modules_to_save": ["o_proj"]}, "the policy's modules_to_save"),
            ({"target_modules": ["q_proj"], "trainable_token_indices": [3]}, "the policy's trainable_token_indices"),
            ({"target_modules": ["embed_tokens"]}, "an adapter on the input or output embeddings"),
            ({"target_modules": ["lm_head"]}, "an adapter on the input or output embeddings"),
            ({"init_lora_weights": "pissa"}, "init_lora_weights pissa, which changes the base"),
        ],
        ids=lambda value: next(reversed(value)) if isinstance(value, dict) else "",
    )  # fmt: skip
    def test_adapters_that_vllm_would_not_run_as_they_are(
        self,
        make_base: Any,
        tokenizer: Any,
        options: Any,
        colocated: type[FakeLLM],
        fields: dict[str, Any],
        message: str,
    ) -> None:
        """Refused before vLLM starts, in one line that names the other way."""
        policy = get_peft_model(
            make_base(), LoraConfig(task_type="CAUSAL_LM", **({"target_modules": ["q_proj"]} | fields))
        )
        args = options(rollout_backend="vllm", rollout_options={"sync": "adapter"})
        with pytest.raises(SalsaError, match=message) as error:
            VLLM(policy, args, tokenizer, Accelerator(cpu=True))
        assert str(error.value).startswith("rollout_options.sync: adapter ")
        assert str(error.value).endswith("Set rollout_options.sync to merged")
        assert not colocated.made

    @pytest.mark.parametrize(("rank", "most"), [(1, 8), (8, 8), (9, 16), (24, 32), (300, 320)])
    def test_the_rank_that_vllm_reserves(
        self, make_base: Any, tokenizer: Any, options: Any, colocated: type[FakeLLM], rank: int, most: int
    ) -> None:
        """The smallest of those that vLLM allows which holds the policy's; rsLoRA, some layers and dropout are fine."""
        lora = LoraConfig(task_type="CAUSAL_LM", r=rank, use_rslora=True, lora_dropout=0.1, target_modules=["q_proj"],
                          layers_to_transform=[0], init_lora_weights="gaussian")  # fmt: skip
        args = options(rollout_backend="vllm", rollout_options={"sync": "adapter"})
        VLLM(get_peft_model(make_base(), lora), args, tokenizer, Accelerator(cpu=True))
        assert colocated.made[0].fields["max_lora_rank"] == most

    def test_a_base_in_4_bits(
        self, make_base: Any, make_adapter: Any, tokenizer: Any, options: Any, colocated: type[FakeLLM], tmp_path: Path
    ) -> None:
        """vLLM quantises its own copy in the same way; merging is refused, and so is another quantization."""
        pytest.importorskip("bitsandbytes", reason="needs bitsandbytes: pip install 'salsa-peft[qlora]'")
        make_base(hidden_size=64, intermediate_size=128).save_pretrained(tmp_path / "base")
        four = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
        base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", quantization_config=four, dtype=torch.float32)
        model = make_adapter(base, "policy", 1, target_modules=["q_proj"])
        backend = VLLM(
            model,
            options(rollout_backend="vllm", rollout_options={"sync": "adapter"}),
            tokenizer,
            Accelerator(cpu=True),
        )
        backend([[1, 5]], [0])
        (engine,) = colocated.made
        assert engine.fields["quantization"] == "bitsandbytes"
        assert len(engine.adapters) == 1
        merged = VLLM(model, options(rollout_backend="vllm"), tokenizer, Accelerator(cpu=True))
        with pytest.raises(
            SalsaError, match=r"quantised weights, .* with a quantised base rollout_options\.sync=adapter"
        ):
            merged.sync_weights()
        base.config.quantization_config = None
        with pytest.raises(SalsaError, match=r"sync: adapter works with an unquantised base or one in 4 bits"):
            VLLM(
                model,
                options(rollout_backend="vllm", rollout_options={"sync": "adapter"}),
                tokenizer,
                Accelerator(cpu=True),
            )

    def test_full_weights_have_no_adapter(
        self, make_base: Any, tokenizer: Any, options: Any, colocated: type[FakeLLM]
    ) -> None:
        args = options(rollout_backend="vllm", rollout_options={"sync": "adapter"})
        with pytest.raises(SalsaError, match=r"sync: adapter needs a policy that is a LoRA adapter"):
            VLLM(make_base(), args, tokenizer, Accelerator(cpu=True))

    @pytest.mark.parametrize("sync", ["merged", "adapter"])
    def test_an_engine_that_does_not_start_is_one_line(
        self, two_adapters: Any, tokenizer: Any, options: Any, colocated: type[FakeLLM], sync: str
    ) -> None:
        colocated.error = ValueError("No available memory\nfor the cache blocks.")
        args = options(rollout_backend="vllm", rollout_options={"sync": sync})
        with pytest.raises(SalsaError, match=r"vllm does not start: No available memory for the cache blocks\."):
            VLLM(two_adapters, args, tokenizer, Accelerator(cpu=True))

    def test_what_is_refused(
        self,
        make_base: Any,
        tokenizer: Any,
        options: Any,
        with_vllm: Server,
        monkeypatch: pytest.MonkeyPatch,
        tmp_path: Path,
    ) -> None:
        """No GPU; several processes with a server; a temperature that vLLM changes; EOS tokens that it would forbid besides ours; no
        server."""
        model = make_base()

        def make(args: SalsaPPOConfig, processes: Accelerator | SimpleNamespace | None = None) -> VLLM:
            return VLLM(model, args, tokenizer, processes or Accelerator(cpu=True))  # type: ignore[arg-type]

        with pytest.raises(SalsaError, match=r"temperature: vllm needs a temperature from 0\.01 to 2, not 3"):
            make(vllm_options(options, with_vllm, temperature=3.0))
        with pytest.raises(SalsaError, match="mode: server works with one process only, not with 2"):
            make(vllm_options(options, with_vllm), SimpleNamespace(num_processes=2))
        model.config.eos_token_id = [EOS, 9]
        make(vllm_options(options, with_vllm))
        with pytest.raises(SalsaError, match=r"has the EOS tokens \[9\] besides .*, the tokens that end a response"):
            make(vllm_options(options, with_vllm, min_new_tokens=2))
        model.config.eos_token_id, model.name_or_path = EOS, str(tmp_path)
        (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [EOS, 8]}))
        with pytest.raises(SalsaError, match=r"has the EOS tokens \[8\] besides"):
            make(vllm_options(options, with_vllm, min_new_tokens=2))
        with_vllm.logprobs_mode = "raw_logprobs"
        make(vllm_options(options, with_vllm, importance_sampling_correction=False))
        with pytest.raises(
            SalsaError,
            match=r"^importance_sampling_correction: the vLLM server reports raw_logprobs, which leave out the temperature",
        ):
            make(vllm_options(options, with_vllm))
        nobody = {"mode": "server", "server_base_url": "http://127.0.0.1:9", "server_timeout": 0.0}
        with pytest.raises(
            SalsaError, match=r"vllm does not start: The vLLM server can't be reached at http://127.0.0.1:9"
        ):
            make(options(rollout_backend="vllm", rollout_options=nobody))
        monkeypatch.setattr(vllm_backend, "device", lambda: CPU)
        with pytest.raises(SalsaError, match="vllm needs a CUDA device"):
            make(vllm_options(options, with_vllm))


def pad(prompts: list[list[int]], answers: list[list[int]]) -> Responses:
    """Responses by hand."""
    width, length = max(map(len, prompts)), max(map(len, answers))
    return Responses(
        torch.tensor([[PAD] * (width - len(p)) + p for p in prompts]),
        torch.tensor([[False] * (width - len(p)) + [True] * len(p) for p in prompts]),
        torch.tensor([a + [PAD] * (length - len(a)) for a in answers]),
        torch.tensor([[True] * len(a) + [False] * (length - len(a)) for a in answers]),
        torch.tensor([a[-1] == EOS for a in answers]),
    )


class TestTrainer:
    """Whole updates with another backend than the plain one."""

    def test_paged(self, make_trainer: Any) -> None:
        """Two updates; the old log-probs are recomputed, so that the first ratio is 1 whatever sampled."""
        trainer = make_trainer(rollout_backend="paged", rollout_options={"page_size": 16}, max_steps=2)
        trainer.train()
        rows = [row for row in trainer.state.log_history if "val/ratio" in row]
        assert len(rows) == 2
        assert all(abs(row["val/ratio"] - 1) < 1e-4 for row in rows)
        assert all(0 < row["objective/response_length"] <= 7 for row in rows)

    def test_a_static_cache_trains_the_same_policy(
        self, make_trainer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """rollout_compile as if there were a GPU; without one Transformers takes the static cache and does not compile."""
        policies = []
        for compiled in (False, True):
            with monkeypatch.context() as patch:
                patch.setattr(backends, "device", lambda: torch.device("cuda"))
                trainer = make_trainer(folder=tmp_path / str(compiled), rollout_compile=compiled, max_steps=2)
            assert isinstance(trainer.rollout_maker.backend, CompiledHF) is compiled
            trainer.train()
            policies.append(
                torch.cat([p.detach().flatten() for p in adapters.parameters(trainer.model.policy, "policy")])
            )
        torch.testing.assert_close(*policies)

    def test_vllm(self, make_trainer: Any, with_vllm: Server) -> None:
        """Weights go to the server once before each rollout, each time others, and the base that the references share is untouched."""
        options = {"mode": "server", "server_base_url": with_vllm.url}
        trainer = make_trainer(rollout_backend="vllm", rollout_options=options, max_steps=2)
        base = {name: tensor for name, tensor in weights(trainer.model.policy).items() if ".policy." not in name}
        sent = []
        receive = FakeTransfer.trainer_send_weights
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                FakeTransfer,
                "trainer_send_weights",
                lambda *args, **rest: sent.append(receive(*args, **rest) or FakeTransfer.sent),
            )
            trainer.train()
        assert [path for path, _ in with_vllm.posted].count("/v1/completions") == len(sent) == 2
        assert not equal(*map(dict, sent))
        after = weights(trainer.model.policy)
        assert equal({name: after[name] for name in base}, base)

    @pytest.mark.parametrize("sync", ["merged", "adapter"])
    def test_vllm_in_this_process(self, make_trainer: Any, colocated: type[FakeLLM], sync: str) -> None:
        """Two updates with two batches of prompts each: vLLM wakes up, gets other weights each time, and sleeps while the
        policy is trained. The weights of the loss come from vLLM's log-probs, and the base is untouched."""
        trainer = make_trainer(
            rollout_backend="vllm",
            rollout_options={"sync": sync},
            max_steps=2,
            rollout_batch_size=4,
            learning_rate=1e-2,
        )
        base = {name: tensor for name, tensor in weights(trainer.model.policy).items() if ".policy." not in name}
        (engine,) = colocated.made
        asleep, step = [], trainer.training_step
        trainer.training_step = lambda *args: asleep.append(set(engine.asleep)) or step(*args)  # type: ignore[func-returns-value]
        rollouts, end = [], trainer.end_update
        trainer.end_update = lambda: rollouts.append(trainer.ppo.rollout) or end()  # type: ignore[func-returns-value]
        trainer.train()
        load, level = (["load"], 2) if sync == "merged" else ([], 1)
        cycle = ["wake weights", *load, "wake kv_cache", "generate", "generate", f"sleep {level}"]
        assert engine.calls == [f"sleep {level}", *cycle, *cycle]
        assert asleep[1:] == [{"weights", "kv_cache"}] * (len(asleep) - 1)
        after = weights(trainer.model.policy)
        assert equal({name: after[name] for name in base}, base)
        if sync == "adapter":
            assert [request.name for request in engine.adapters] == ["policy-1"] * 2 + ["policy-2"] * 2
            assert not equal(engine.adapters[0].tensors, engine.adapters[2].tensors)
        for rollout in rollouts:
            mask = rollout.responses.response_mask
            for row, sampled in enumerate(rollout.sampling_logprobs):
                tokens = rollout.responses.response_ids[row][mask[row]].tolist()
                assert sampled[mask[row]].tolist() == logprobs_of(tokens)
            expected = (rollout.logprobs - rollout.sampling_logprobs).exp().clamp(max=3.0)
            torch.testing.assert_close(rollout.importance_weights[mask], expected[mask])
        rows = [row for row in trainer.state.log_history if "val/ratio" in row]
        assert all(row["sampling/importance_sampling_ratio/max"] <= 3 for row in rows)
        assert len(rows) == len(rollouts) == 2
