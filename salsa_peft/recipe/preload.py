"""The imports of all stages, loaded once by the fork server, so that each stage starts at once.

Nothing here may start a thread or use a device, since the stages' processes are forks of the fork server. (pyarrow
starts one idle thread, of its memory allocator.) The libraries' own progress bars and messages are switched off: a
stage has one progress bar, and its metrics are in its folder.

Garbage is not collected during the imports, which saves a quarter of their time, and the imported objects are frozen:
otherwise every trainer, which collects garbage when it starts, would look through them for 0.3 s.
"""

# ruff: noqa: E402
import gc

gc.disable()

from salsa_peft.utils.console import silence_import_warnings

silence_import_warnings()

import datasets
import peft  # noqa: F401
import torch  # noqa: F401
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, Trainer  # noqa: F401
from trl import RewardConfig, RewardTrainer, SFTConfig, SFTTrainer  # noqa: F401

from salsa_peft.config import load  # noqa: F401
from salsa_peft.data import toy  # noqa: F401
from salsa_peft.evaluation import evaluate, landscape  # noqa: F401
from salsa_peft.recipe import small_stages, worker  # noqa: F401
from salsa_peft.training import ppo_stage, reward_model, sft  # noqa: F401

datasets.disable_progress_bars()
transformers.utils.logging.disable_progress_bar()
transformers.utils.logging.set_verbosity_error()
gc.freeze()
gc.enable()
