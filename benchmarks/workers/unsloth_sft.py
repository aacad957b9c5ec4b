"""Unsloth on given token ids, as its own notebooks call it. Run by throughput.py in an environment that holds Unsloth.

Usage: SPEC RESULT. It needs an accelerator: it has run on a null GPU (null_gpu.py), not yet on a real one.
"""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

from unsloth import FastLanguageModel  # isort: skip  (before transformers and trl, as it asks for)
import torch
from trl import SFTConfig, SFTTrainer

sys.path.insert(0, str(Path(__file__).parent))
from trl_sft import Measured, conversations, summary, trainer_arguments


def main(spec: dict[str, Any]) -> dict[str, Any]:
    """Train and measure."""
    model, tokenizer = FastLanguageModel.from_pretrained(
        model_name=spec["base"],
        max_seq_length=spec["max_length"],
        dtype=getattr(torch, spec["compute_dtype"]),
        load_in_4bit=True,
        # Without it a name is mapped to a repository of Unsloth's, of other weights with some layers in 16 bits.
        use_exact_model_name=spec["exact_name"],
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
    measured = Measured(spec)
    train, evaluated = conversations(spec)
    sequential = "train_sampling_strategy" in {field.name for field in dataclasses.fields(SFTConfig)}
    trainer = SFTTrainer(
        model=model,
        processing_class=tokenizer,
        train_dataset=train,
        eval_dataset=evaluated,
        args=SFTConfig(
            **trainer_arguments(spec),
            fp16=spec["compute_dtype"] == "float16",
            **({"train_sampling_strategy": "sequential"} if sequential else {}),
        ),
        callbacks=[measured],
    )
    measured.watch(trainer)
    return summary(trainer, measured, spec, "unsloth", "trl", "transformers", "peft", "bitsandbytes", "torch")


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(json.dumps(main(json.loads(Path(sys.argv[1]).read_text()))))
