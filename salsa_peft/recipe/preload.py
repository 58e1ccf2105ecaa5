"""What every stage imports, loaded once by the fork server: the first stage starts in seconds, each later one at once.

Nothing here may start a thread (pyarrow brings one idle one, of its allocator) or touch a device: the stages' processes are forks of this one. The libraries' own bars and
notes are switched off: a stage has one bar, and its figures are in its folder.
"""

# ruff: noqa: E402
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
from salsa_peft.recipe import processes, stages, units  # noqa: F401
from salsa_peft.training import ppo_stage, reward_model, sft  # noqa: F401

datasets.disable_progress_bars()
transformers.utils.logging.disable_progress_bar()
transformers.utils.logging.set_verbosity_error()
