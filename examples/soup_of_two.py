"""A soup of two adapters, and back into PEFT. Nothing is downloaded: the model is a tiny Llama made on the spot.

    python examples/soup_of_two.py

TRL trains two adapters on other data, one model gets their exact mean as a third adapter, and PEFT saves and loads it.
Prints TRL's metrics and the losses on held-out demonstrations, in one run on a CPU:

    seed-0: 0.903
    seed-1: 0.856
    soup: 0.805
    reloaded: 0.805
"""

from datasets import Dataset
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM
from trl import SFTConfig, SFTTrainer

from salsa_peft import soup
from salsa_peft.data.toy import world

if __name__ == "__main__":
    folder, out = world("runs/world"), "runs/two"
    rows, held_out = (Dataset.from_json(f"{folder}/{name}.jsonl") for name in ("demonstrations", "held_out"))
    config = SFTConfig(out, learning_rate=7e-3, num_train_epochs=8, assistant_only_loss=True, bf16=False)
    lora = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    for seed in (0, 1):
        trainer = SFTTrainer(f"{folder}/base", config, train_dataset=rows.shuffle(seed).take(256), peft_config=lora)
        trainer.train()
        trainer.save_model(f"{out}/seed-{seed}")
    base = AutoModelForCausalLM.from_pretrained(f"{folder}/base")
    model = PeftModel.from_pretrained(base, f"{out}/seed-0", adapter_name="seed-0")
    model.load_adapter(f"{out}/seed-1", adapter_name="seed-1")
    soup.attach(model, ["seed-0", "seed-1"], name="soup")
    model.save_pretrained(out, selected_adapters=["soup"])
    model.load_adapter(f"{out}/soup", adapter_name="reloaded")
    trainer = SFTTrainer(model, config, train_dataset=rows, eval_dataset=held_out)
    for name in ("seed-0", "seed-1", "soup", "reloaded"):
        model.set_adapter(name)
        print(f"{name}: {trainer.evaluate()['eval_loss']:.3f}")
