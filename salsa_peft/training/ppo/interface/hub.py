"""HubTrainer: a transformers.Trainer whose model card and pushes to the Hub are those of salsa_peft."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import HTTPError, OfflineModeIsEnabled
from transformers import Trainer
from transformers.trainer_utils import HubStrategy

from salsa_peft.training.ppo.interface import card
from salsa_peft.utils.console import say
from salsa_peft.utils.errors import SalsaError
from salsa_peft.utils.files import write_atomic
from salsa_peft.utils.hub import check_secrets, model_files
from salsa_peft.utils.messages import one_line

if TYPE_CHECKING:
    from salsa_peft.models.rewards.base import Reward
    from salsa_peft.models.value_head import PolicyWithValueHead
    from salsa_peft.training.ppo.config import SalsaPPOConfig
    from salsa_peft.training.ppo.state import PPOState
    from salsa_peft.training.references import FrozenReference

CARD = "README.md"


class HubTrainer(Trainer):
    """Publishes a policy as `salsa hub` does: one commit of its own files, without logs, optimizer or local paths.

    Trainer's own push uploads everything in output_dir, which here includes prompts and responses.
    """

    args: SalsaPPOConfig
    model: PolicyWithValueHead  # type: ignore[assignment]
    reward: Reward
    references: list[FrozenReference]
    ppo: PPOState

    def create_model_card(  # type: ignore[override]
        self, model_name: str | None = None, dataset_name: str | None = None, tags: str | Sequence[str] | None = None
    ) -> None:
        """Write README.md in output_dir. The arguments are those of TRL's trainers."""
        if self.is_world_process_zero():
            write_atomic(Path(str(self.args.output_dir)) / CARD, self.model_card(model_name, dataset_name, tags))

    def model_card(
        self, model_name: str | None = None, dataset_name: str | None = None, tags: str | Sequence[str] | None = None,
        *, online: bool = False,
    ) -> str:  # fmt: skip
        """The text of the model card. model_name: its title if the model has no repository. online: see `card.render`."""
        folder = Path(str(self.args.output_dir)).absolute().name
        return card.render(
            self.model.policy, self.args, self.reward, [reference.label for reference in self.references],
            self.state.log_history, (self.args.kl_coef, self.ppo.kl_coef), dataset=dataset_name, online=online,
            repo=self.hub_model_id or model_name or self.args.hub_model_id or folder,
            tags=[tags] if isinstance(tags, str) else list(tags or ()),
        )  # fmt: skip

    def push_to_hub(
        self, commit_message: str | None = "End of training", blocking: bool = True, token: str | None = None,
        revision: str | None = None, private: bool | None = None, **kwargs: Any,
    ) -> Any:  # fmt: skip
        """Save the model in output_dir, and push it to `args.hub_model_id`, by default the folder's name.

        kwargs: arguments of create_model_card. Returns the commit; with blocking=False a Future of it; None in all
        processes but the first.
        """
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        if self.hub_model_id is None:
            self.init_hf_repo(token=token, private=private)
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        folder, text = str(self.args.output_dir), self.model_card(**kwargs, online=True)
        write_atomic(Path(folder) / CARD, text)
        with readable_push_errors():
            return self._commit(folder, text, commit_message, blocking=blocking, token=token, revision=revision)

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Create the repository on the Hub, as Trainer does. Raises SalsaError if the Hub refuses or is out of reach."""
        with readable_push_errors():
            super().init_hf_repo(token, private)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Push the policy of a checkpoint, if `hub_strategy` is every_save. Training goes on if the push fails."""
        if not self.is_world_process_zero() or self.args.hub_strategy == HubStrategy.END:
            return
        message = f"Training in progress, step {self.state.global_step}"
        try:
            self._commit(checkpoint_folder, self.model_card(online=True), message)
        except (HTTPError, OSError) as error:
            say(
                f"push_to_hub: {message}: not pushed ({one_line(error)}); training goes on, and its end is pushed again"
            )

    def _commit(
        self, folder: str, text: str, message: str | None, *, blocking: bool = True, token: str | None = None,
        revision: str | None = None,
    ) -> Any:  # fmt: skip
        """Push the files of a model, and the text of its card, in one commit."""
        files = model_files(Path(folder), card.base_id(self.model.policy)) | {CARD: text.encode()}
        check_secrets(files)
        operations = [
            CommitOperationAdd(name, str(content) if isinstance(content, Path) else content)
            for name, content in sorted(files.items())
        ]
        return HfApi(library_name="salsa_peft").create_commit(  # type: ignore[call-overload]
            str(self.hub_model_id), operations, commit_message=message or "End of training",
            token=token or self.args.hub_token, revision=revision or self.args.hub_revision, run_as_future=not blocking,
        )  # fmt: skip


@contextlib.contextmanager
def readable_push_errors() -> Iterator[None]:
    """Turn an error of the Hub about a push into a SalsaError of one line."""
    try:
        yield
    except OfflineModeIsEnabled as error:
        raise SalsaError(
            "push_to_hub: HF_HUB_OFFLINE is set, so nothing can be sent to the Hub; unset it, or train with"
            " push_to_hub=False and push later"
        ) from error
    except HTTPError as error:
        raise SalsaError(
            f"push_to_hub: not pushed ({one_line(error)}); check the connection, the repository's name and the login"
            " (`hf auth login`)"
        ) from error
