"""Unsloth on given token ids, as its own notebooks call it. Run by throughput.py in an environment that holds Unsloth.

Usage: SPEC RESULT. Written from Unsloth's documented interface; it needs an accelerator and has not been run yet.
"""

import json
import sys
from pathlib import Path
from typing import Any

from unsloth import FastLanguageModel  # isort: skip  (before transformers and trl, as it asks for)
import torch
from datasets import Dataset
from trl import SFTConfig, SFTTrainer

sys.path.insert(0, str(Path(__file__).parent))
from trl_sft import CountingCollator, Measured, summary


def main(spec: dict[str, Any]) -> dict[str, Any]:
    """Train and measure."""
    model, tokenizer = FastLanguageModel.from_pretrained(
        model_name=spec["base"],
        max_seq_length=spec["max_length"],
        dtype=getattr(torch, spec["compute_dtype"]),
        load_in_4bit=True,
    )
    model = FastLanguageModel.get_peft_model(
        model,
        r=spec["r"],
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        lora_alpha=spec["alpha"],
        lora_dropout=0,
        bias="none",
        use_gradient_checkpointing="unsloth" if spec["checkpointing"] == "full" else False,
        random_state=3407,
    )
    measured = Measured()
    examples = [example for step in json.loads(Path(spec["steps_file"]).read_text()) for example in step]
    trainer = SFTTrainer(
        model=model,
        processing_class=tokenizer,
        train_dataset=Dataset.from_list(examples),
        args=SFTConfig(
            output_dir=str(Path(spec["folder"]) / "unsloth"),
            per_device_train_batch_size=spec["micro_batch"],
            gradient_accumulation_steps=spec["batch_size"] // spec["micro_batch"],
            max_steps=spec["steps"],
            learning_rate=spec["lr"],
            warmup_steps=5,
            lr_scheduler_type="linear",
            optim="adamw_8bit",
            weight_decay=0.01,
            seed=3407,
            bf16=spec["compute_dtype"] == "bfloat16",
            fp16=spec["compute_dtype"] == "float16",
            packing=spec["packing"],
            max_length=spec["max_length"],
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            **(
                {"train_sampling_strategy": "sequential"}
                if "train_sampling_strategy" in SFTConfig.__annotations__
                else {}
            ),
        ),
        callbacks=[measured],
    )
    trainer.data_collator = CountingCollator(trainer.data_collator, measured)
    trainer.train()
    return summary(trainer, measured, "unsloth", "trl", "transformers", "peft", "bitsandbytes", "torch")


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(json.dumps(main(json.loads(Path(sys.argv[1]).read_text()))))
