"""The imports of all stages, loaded once by the fork server, so that each stage starts immediately.

Nothing here may start a thread or use a device, since the stages' processes are forks of the fork server. The only
exception is an idle thread of pyarrow's memory allocator. The libraries' own progress bars and messages are switched
off: each stage shows one progress bar and writes its metrics to its folder.

Garbage collection is off during the imports, which saves a quarter of their time. The imported objects are then frozen
(gc.freeze): otherwise the garbage collection at the start of every trainer would take 0.3 s longer.
"""

# ruff: noqa: E402
import gc

gc.disable()

from salsa_peft.utils.console import silence_import_warnings, use_thread_lock

silence_import_warnings()
use_thread_lock()

import datasets
import peft  # noqa: F401
import torch  # noqa: F401
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, Trainer  # noqa: F401
from trl import RewardConfig, RewardTrainer, SFTConfig, SFTTrainer  # noqa: F401

from salsa_peft.config import load  # noqa: F401
from salsa_peft.data import tokenized, toy  # noqa: F401
from salsa_peft.evaluation import evaluate, landscape, reward_quality, synthetic  # noqa: F401
from salsa_peft.recipe import small_stages, worker  # noqa: F401
from salsa_peft.report import page  # noqa: F401
from salsa_peft.training import ppo_stage, reward_model, sft  # noqa: F401

datasets.disable_progress_bars()
transformers.utils.logging.disable_progress_bar()
transformers.utils.logging.set_verbosity_error()
gc.freeze()
gc.enable()
