"""A recipe for your own data. Nothing is downloaded: the model and the data are made on the spot.

    python examples/own_data_recipe.py

Writes a recipe for a model's folder and files of rows, and runs it: two SFT seeds, a reward model, the soup, PPO and
SALSA. For your own run, replace the paths; docs/data.md lists the columns that rows may have. Prints the lines of
`salsa run`: each stage, this table (in one run on a CPU) with its differences, and where the results are:

    seed-0                  0.160 [0.045, 0.276]
    soup                    0.251 [0.149, 0.352]  +0.090 [+0.032, +0.148]  −0.002 [−0.059, +0.055]
"""

from pathlib import Path

from salsa_peft.cli.main import main
from salsa_peft.data.toy import world

RECIPE = """
name: mine
model: {base: world/base, max_length: 32, chat_template: tokenizer}
data:
  demonstrations: world/demonstrations.jsonl   # rows with messages: a user's turn and the answer
  preferences: world/preferences.jsonl         # rows with prompt, chosen and rejected
  prompts: world/prompts.jsonl                 # rows with prompt; PPO answers them
evaluate: {prompts: {questions: world/eval_in.jsonl}}
sft: {seeds: [0, 1], subset: 0.5, num_train_epochs: 8, batch_size: 32}
reward: {num_train_epochs: 3, batch_size: 64}
soup: {members: [0, 1]}
generation: {max_new_tokens: 10, batch_size: 128}
ppo: {batch_size: 64, num_train_epochs: 0.5, kl_control: fixed, kl_coef: 0.3}
policies:
  ppo: {reference: seed-0}
  salsa: {reference: soup}
lora: {sft: {learning_rate: 7.0e-3}, reward: {learning_rate: 5.0e-3}, ppo: {learning_rate: 3.0e-3}}
"""

if __name__ == "__main__":
    world("runs/world")
    Path("runs/mine.yaml").write_text(RECIPE)
    main(["run", "runs/mine.yaml", "--lora"])
