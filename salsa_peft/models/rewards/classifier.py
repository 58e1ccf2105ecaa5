"""A sequence classifier as reward: any architecture with one label, its own tokenizer and its own chat template.

Responses are decoded and encoded anew, unless tokenizer and template are the policy's: then its token ids are scored as they are.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jinja2 import TemplateError
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer

from salsa_peft.config.rewards import WRITE_A_FUNCTION
from salsa_peft.data.chat.template_fields import messages_for_template, template_options
from salsa_peft.data.chat.templates import text_ids
from salsa_peft.data.chat.turn_ends import assistant_turn
from salsa_peft.data.message_formats import parse_messages
from salsa_peft.models.base import classifier_class, device, max_positions, resolve_dtype
from salsa_peft.models.responses import append_tokens, ends_turn
from salsa_peft.models.rewards.base import Reward, Rows, Tally
from salsa_peft.models.rewards.function import decode
from salsa_peft.utils.errors import SalsaError, require
from salsa_peft.utils.hub import readable_hub_errors
from salsa_peft.utils.oom import MicroBatchLimit

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from salsa_peft.models.responses import Responses

FILES = ["*.safetensors", "*.json", "*.model", "*.jinja", "*.txt"]


class ClassifierReward(Reward):
    """The classifier's one logit for prompt and response.

    Messages: the prompt and the response as an assistant's turn through the classifier's own chat template, which closes the turn
    also of a response that the limit cut. Token ids that are scored as they are: closed as the template does where a token that ends a
    turn was sampled. Text: prompt and response, with what its tokenizer puts around a text. Longer than the
    classifier can read: tokens after the first are left out until it fits, and counted (`rewards/<name>/truncated`). Raises
    SalsaError for more labels than one, and for messages without a template.
    """

    def __init__(self, classifier: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, policy_tokenizer: PreTrainedTokenizerBase,
                 micro_batch_size: int = 64, name: str = "classifier") -> None:  # fmt: skip
        embeddings: Any = classifier.get_input_embeddings().weight
        labels, rows = classifier.config.num_labels, len(embeddings)
        require(labels == 1, f"reward {name}: found a classifier of num_labels {labels}, expected 1: a score")
        require(
            len(tokenizer) <= rows,
            f"reward {name}: found a tokenizer of {len(tokenizer)} tokens over {rows} embeddings, expected its own",
        )
        self.classifier, self.tokenizer, self.policy_tokenizer = (
            classifier.eval().requires_grad_(False),
            tokenizer,
            policy_tokenizer,
        )
        self.micro_batch = MicroBatchLimit(micro_batch_size, f"reward {name}, rows scored at once")
        self.name, self.tally, self.noted = name, Tally(), False
        self.longest = min(int(tokenizer.model_max_length), max_positions(classifier.config) or sys.maxsize)
        self.as_they_are = (
            tokenizer.chat_template == policy_tokenizer.chat_template
            and tokenizer.get_vocab() == policy_tokenizer.get_vocab()
        )

    @torch.no_grad()
    def __call__(self, responses: Responses, rows: Rows) -> Tensor:
        """→ (B,), float32; micro-batches of like length."""
        sequences = self._fit(self.encode(responses, rows))
        with self.on_device():
            scores = self.micro_batch.run(lambda: self._scores(sequences), len(sequences))
        return scores.to(responses.response_ids.device)

    def weights(self) -> Iterable[Tensor]:
        """The classifier's parameters."""
        return self.classifier.parameters()

    def frozen_model(self) -> PreTrainedModel:
        """The classifier."""
        return self.classifier

    def take_figures(self) -> dict[str, tuple[float, int]]:
        """rewards/<name>/truncated: how many responses were cut with their prompts."""
        return self.tally.take()

    def _scores(self, sequences: Sequence[list[int]]) -> Tensor:
        order = sorted(range(len(sequences)), key=lambda row: len(sequences[row]))
        scores = torch.empty(len(sequences), device=self.classifier.device)
        for start in range(0, len(order), self.micro_batch.rows):
            part = order[start : start + self.micro_batch.rows]
            scores[part] = self._forward([sequences[row] for row in part])
        return scores

    def encode(self, responses: Responses, rows: Rows) -> list[list[int]]:
        """What the classifier reads of each response: token ids, whole."""
        if self.as_they_are:
            turn = assistant_turn(self.tokenizer)
            responses = append_tokens(responses, ends_turn(responses, rows, turn), turn.after)
            masks, ids = responses.attention_mask, responses.input_ids
            return [row[mask].tolist() for row, mask in zip(ids, masks, strict=True)]
        before = decode(self.policy_tokenizer, responses.prompt_ids, responses.prompt_mask)
        content = torch.cat([responses.prompt_mask, responses.content_mask], dim=1)
        whole = decode(self.policy_tokenizer, responses.input_ids, content)
        alone = decode(self.policy_tokenizer, responses.response_ids, responses.content_mask)
        sequences = []
        for row, prompt, both, answer in zip(rows, before, whole, alone, strict=True):
            require(
                "prompt" in row,
                f"reward {self.name}: found input_ids without `prompt`, expected one: its tokenizer is not the policy's",
            )
            if isinstance(row["prompt"], str):  # some tokenizers leave a text's first space out, so not `answer`
                text = row["prompt"] + (both[len(prompt) :] if both.startswith(prompt) else answer)
                sequences.append(text_ids(text, self.tokenizer))
            else:
                sequences.append(
                    self._chat([*row["prompt"], {"role": "assistant", "content": answer}], template_options(row))
                )
        return sequences

    def _chat(self, messages: list[dict[str, Any]], options: dict[str, Any]) -> list[int]:
        require(
            self.tokenizer.chat_template is not None,
            f"reward {self.name}: found messages, but its tokenizer has no chat template; expected text prompts, or a classifier"
            " with one",
        )
        try:
            encoded: Any = self.tokenizer.apply_chat_template(
                messages_for_template(parse_messages(messages, f"reward {self.name}"), self.tokenizer),
                return_dict=True,
                **options,
            )
        except TemplateError as error:
            raise SalsaError(f"reward {self.name}: its chat template refuses a conversation: {error}") from error
        return list(encoded["input_ids"])

    def _fit(self, sequences: list[list[int]]) -> list[list[int]]:
        over = sum(len(ids) > self.longest for ids in sequences)
        self.tally.add(f"rewards/{self.name}/truncated", over, len(sequences))
        if over and not self.noted:
            self.noted = True
            said = f"{over} of {len(sequences)} responses are longer with their prompts than the {self.longest} tokens it reads"
            print(f"reward {self.name}: {said}; the prompts' beginnings are cut off", file=sys.stderr, flush=True)
        return [ids if len(ids) <= self.longest else [*ids[:1], *ids[1 - self.longest :]] for ids in sequences]

    def _forward(self, sequences: Sequence[list[int]]) -> Tensor:
        """Token ids → (b,), float32, padded on the right."""
        config, width = self.classifier.config.get_text_config(), max(map(len, sequences))
        # Transformers scores the last token that is not the padding token's id: one that ends no sequence pads, also where pad = eos
        ends = {ids[-1] for ids in sequences} | {self.tokenizer.eos_token_id}
        fill = next(
            token for token in (self.tokenizer.pad_token_id, *range(len(ends) + 1)) if token not in (*ends, None)
        )
        config.pad_token_id = fill
        ids = torch.tensor([row + [fill] * (width - len(row)) for row in sequences], device=self.classifier.device)
        lengths = torch.tensor([len(row) for row in sequences], device=ids.device)
        mask = torch.arange(width, device=ids.device) < lengths[:, None]
        return self.classifier(input_ids=ids, attention_mask=mask.long()).logits.squeeze(-1).float()


def load_classifier_reward(path: str, policy_tokenizer: PreTrainedTokenizerBase, micro_batch_size: int, *, name: str | None = None,
                           dtype: str = "auto") -> ClassifierReward:  # fmt: skip
    """A folder or Hub id of a sequence classifier, safetensors only, on the stage's device. Raises SalsaError for one without a head."""
    folder = classifier_folder(path)
    name = name or path.rstrip("/").rsplit("/", 1)[-1]
    require((folder / "config.json").is_file(), f"{path}: found no config.json, expected a sequence classifier")
    require(
        any(folder.glob("*.safetensors")),
        f"{path}: found no safetensors file, expected the classifier's weights in one (other formats are not read)"
        "; load the model with Transformers, if you trust the file, and save it again (save_pretrained writes safetensors)",
    )
    with readable_hub_errors(str(folder)):
        config = AutoConfig.from_pretrained(str(folder), trust_remote_code=False)
        loaded, told = classifier_class(config).from_pretrained(
            str(folder),
            dtype=resolve_dtype(dtype),
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
        )
    labels, missing = loaded.config.num_labels, sorted(told["missing_keys"])
    require(
        labels == 1,
        f"{path}: found a classifier of num_labels {labels}, and a reward is one number (1). {WRITE_A_FUNCTION}",
    )
    require(
        not missing, f"{path}: found no weights for {', '.join(missing[:2])}, expected a trained sequence classifier"
    )
    loaded.config.get_text_config().use_cache = False
    with readable_hub_errors(str(folder)):
        tokenizer = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
    return ClassifierReward(loaded.to(device()), tokenizer, policy_tokenizer, micro_batch_size, name)


def classifier_folder(path: str) -> Path:
    """A folder as it is; a Hub id → its files in the Hub's cache."""
    if Path(path).is_dir():
        return Path(path)
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(path, allow_patterns=FILES))
