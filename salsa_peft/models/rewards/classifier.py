"""A sequence classifier of any architecture as reward, with its own tokenizer and chat template.

A classifier with the policy's tokenizer and chat template scores the policy's token ids. For any other classifier,
responses are decoded and tokenized again.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from jinja2 import TemplateError
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer
from transformers.modeling_layers import GenericForSequenceClassification

from salsa_peft.config.rewards import WRITE_A_FUNCTION
from salsa_peft.data.chat.template_fields import messages_for_template, template_options
from salsa_peft.data.chat.templates import text_ids
from salsa_peft.data.chat.turn_ends import assistant_turn
from salsa_peft.data.message_formats import parse_messages
from salsa_peft.models import precision
from salsa_peft.models.base import (
    classifier_class,
    device,
    max_positions,
    resolve_dtype,
    trunk,
    use_float32_head,
)
from salsa_peft.models.batches import split_by_length
from salsa_peft.models.generation import masks_without_sync
from salsa_peft.models.responses import append_turn_end, pad_responses, pad_tokens, token_lists
from salsa_peft.models.rewards.base import Reward, Rows
from salsa_peft.models.rewards.function import decode
from salsa_peft.models.rewards.last_tokens import in_rows_order, last_token_scores
from salsa_peft.utils.console import say
from salsa_peft.utils.errors import SalsaError, require
from salsa_peft.utils.hub import local_folder, readable_hub_errors
from salsa_peft.utils.oom import MicroBatchLimit

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from salsa_peft.models.responses import Responses


class ClassifierReward(Reward):
    """A classifier's single logit for prompt and response as the score.

    - Messages: the classifier's chat template renders the prompt with the response as assistant turn. The template
      closes this turn even if the length limit cut the response.
    - Text: the classifier's tokenizer encodes prompt and response, and adds its special tokens.
    - If policy and classifier have the same tokenizer and chat template, the sampled token ids are scored, and also
      the tokens that the template writes after a turn's end token.

    A sequence longer than the classifier's maximum keeps only its first and its last tokens; `rewards/<name>/truncated`
    is the share of such sequences. Raises SalsaError if the classifier has more than one label, or if prompts are
    messages but its tokenizer has no chat template.
    """

    def __init__(self, classifier: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, policy_tokenizer: PreTrainedTokenizerBase,
                 micro_batch_size: int = 64, name: str = "classifier") -> None:  # fmt: skip
        embeddings: Any = classifier.get_input_embeddings().weight
        labels, rows = classifier.config.num_labels, len(embeddings)
        require(
            labels == 1,
            f"reward {name}: the classifier has {labels} labels, but a reward needs a single number (num_labels 1)."
            f" {WRITE_A_FUNCTION}",
        )
        require(
            len(tokenizer) <= rows,
            f"reward {name}: the tokenizer has {len(tokenizer)} tokens, but the classifier has only {rows} embeddings;"
            " use the classifier's own tokenizer",
        )
        self.classifier, self.tokenizer, self.policy_tokenizer = classifier.eval(), tokenizer, policy_tokenizer
        self.classifier.requires_grad_(False)
        self.micro_batch = MicroBatchLimit(micro_batch_size, f"reward {name}, rows scored at once")
        self.name, self.truncation_reported = name, False
        self.longest = min(int(tokenizer.model_max_length), max_positions(classifier.config) or sys.maxsize)
        self.causal = scores_last_token(classifier)
        self.shares_tokenizer = (
            tokenizer.chat_template == policy_tokenizer.chat_template
            and tokenizer.get_vocab() == policy_tokenizer.get_vocab()
        )

    @torch.no_grad()
    def __call__(self, responses: Responses, rows: Rows) -> Tensor:
        sequences = self._truncate(self.encode(responses, rows))
        with self.on_device(), precision.autocast(self.classifier):
            scores = self.micro_batch.run(lambda: self._scores(sequences), len(sequences))
        return scores.to(responses.response_ids.device)

    def weights(self) -> Iterable[Tensor]:
        """The parameters of the classifier."""
        return self.classifier.parameters()

    def frozen_model(self) -> PreTrainedModel:
        """The frozen classifier."""
        return self.classifier

    def _scores(self, sequences: Sequence[list[int]]) -> Tensor:
        """Score token ids in forward passes over sequences of similar length; float32."""
        rows, most = self.micro_batch.rows, self.micro_batch_tokens
        if self.causal:  # the sequences stand for responses to empty prompts
            device, score = self.classifier.device, self.classifier.score
            responses = pad_responses([[]] * len(sequences), sequences, 0, (), device)
            return last_token_scores(self.classifier, score, responses, rows, most).float()
        batches = split_by_length([len(ids) for ids in sequences], rows, most)
        return in_rows_order([self._forward([sequences[row] for row in batch]) for batch in batches], batches)

    def encode(self, responses: Responses, rows: Rows) -> list[list[int]]:
        """Token ids of each prompt with its response for the classifier, before truncation."""
        if self.shares_tokenizer:
            responses = append_turn_end(responses, rows, assistant_turn(self.tokenizer))
            return token_lists(responses.input_ids, responses.attention_mask)
        prompts = decode(self.policy_tokenizer, responses.prompt_ids, responses.prompt_mask)
        content = torch.cat([responses.prompt_mask, responses.content_mask], dim=1)
        whole = decode(self.policy_tokenizer, responses.input_ids, content)
        answers = decode(self.policy_tokenizer, responses.response_ids, responses.content_mask)
        sequences = []
        for row, prompt, both, answer in zip(rows, prompts, whole, answers, strict=True):
            require(
                "prompt" in row,
                f"reward {self.name}: the data has the column input_ids but not `prompt`, which this reward needs"
                " because its tokenizer or chat template is not the policy's; add a column `prompt`",
            )
            if isinstance(row["prompt"], str):
                # not prompt + answer, because some tokenizers drop the first space of a decoded text
                text = row["prompt"] + (both[len(prompt) :] if both.startswith(prompt) else answer)
                sequences.append(text_ids(text, self.tokenizer))
            else:
                messages = [*row["prompt"], {"role": "assistant", "content": answer}]
                sequences.append(self._chat(messages, template_options(row)))
        return sequences

    def _chat(self, messages: list[dict[str, Any]], options: dict[str, Any]) -> list[int]:
        where = f"reward {self.name}"
        require(
            self.tokenizer.chat_template is not None,
            f"{where}: the prompts are messages, but the classifier's tokenizer has no chat template; use text prompts,"
            " or a classifier whose tokenizer has a chat template",
        )
        chat = messages_for_template(parse_messages(messages, where), self.tokenizer)
        try:
            encoded: Any = self.tokenizer.apply_chat_template(chat, return_dict=True, **options)
        except TemplateError as error:
            raise SalsaError(f"{where}: the classifier's chat template rejects a conversation: {error}") from error
        return list(encoded["input_ids"])

    def metric_names(self) -> list[str]:
        """The name of the share of sequences that are cut."""
        return [f"rewards/{self.name}/truncated"]

    def _truncate(self, sequences: list[list[int]]) -> list[list[int]]:
        over = sum(len(ids) > self.longest for ids in sequences)
        self.add_metric(f"rewards/{self.name}/truncated", over, len(sequences))
        if over and not self.truncation_reported:
            self.truncation_reported = True
            say(
                f"reward {self.name}: {over} of {len(sequences)} prompts with their responses are longer than"
                f" {self.longest} tokens, the classifier's maximum; only their first and their last tokens are scored"
            )
        return [ids if len(ids) <= self.longest else [*ids[:1], *ids[1 - self.longest :]] for ids in sequences]

    def _forward(self, sequences: Sequence[list[int]]) -> Tensor:
        """Score token ids in one forward; returns one float32 number for each sequence."""
        # Transformers scores the last token that is not the padding token; no sequence may end with the padding token
        ends = {None, self.tokenizer.eos_token_id, *(ids[-1] for ids in sequences)}
        pad = next(token for token in (self.tokenizer.pad_token_id, *range(len(ends))) if token not in ends)
        self.classifier.config.get_text_config().pad_token_id = pad
        ids, mask = pad_tokens(sequences, pad, self.classifier.device)
        padded = len(set(map(len, sequences))) > 1
        with masks_without_sync(padded):
            output = self.classifier(input_ids=ids, attention_mask=mask.long() if padded else None)
        return output.logits.squeeze(-1).float()


def scores_last_token(classifier: PreTrainedModel) -> bool:
    """Whether a classifier is a causal decoder with Transformers' generic score head on each sequence's last token.

    No token then depends on padding after it, and the decoder can be called without the head.
    """
    config = classifier.config.get_text_config().to_dict()
    causal = config.get("is_causal", True) and not config.get("use_bidirectional_attention")
    generic = type(classifier).forward is GenericForSequenceClassification.forward
    return bool(generic and causal and trunk(classifier) is classifier.base_model)


def load_classifier_reward(path: str, policy_tokenizer: PreTrainedTokenizerBase, micro_batch_size: int, *, name: str | None = None,
                           dtype: str = "auto") -> ClassifierReward:  # fmt: skip
    """Load a sequence classifier from a folder or Hub id. Raises SalsaError if weights are missing."""
    folder = local_folder(path)
    require((folder / "config.json").is_file(), f"{path}: there is no config.json; use a sequence classifier")
    with readable_hub_errors(str(folder)):
        config = AutoConfig.from_pretrained(str(folder), trust_remote_code=False)
        loaded, report = classifier_class(config).from_pretrained(
            str(folder),
            dtype=resolve_dtype(dtype),
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
        )
        tokenizer = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
    missing = sorted(report["missing_keys"])
    require(not missing, f"{path}: the weights {', '.join(missing[:2])} are missing; use a trained sequence classifier")
    use_float32_head(loaded)
    loaded.config.get_text_config().use_cache = False
    name = name or path.rstrip("/").rsplit("/", 1)[-1]
    return ClassifierReward(loaded.to(device()), tokenizer, policy_tokenizer, micro_batch_size, name)
