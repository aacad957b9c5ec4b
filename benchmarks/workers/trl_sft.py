"""TRL's SFTTrainer on given token ids: run by throughput.py in an environment that holds TRL. Usage: SPEC RESULT."""

import importlib.metadata
import json
import resource
import sys
import time
from collections import deque
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, TrainerCallback, set_seed
from trl import SFTConfig, SFTTrainer

sys.path.insert(0, str(Path(__file__).parent))
import counting


class Measured(TrainerCallback):
    """Each step's time, from the end of the step before, its loss, its tokens and what a null GPU counted."""

    def __init__(self, spec: dict[str, Any]) -> None:
        self.steps: list[dict[str, Any]] = []
        self.collated: deque[tuple[int, int, int]] = deque()  # counts of micro-batches that are not trained on yet
        self.counts = [0, 0, 0]
        self.memory: dict[str, float | None] = {}
        self._last, self._ended, self._micro_batches = spec["steps"] - 1, 0.0, 0
        self._counter = counting.Counter(spec)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the first step's clock."""
        self._counter.begin()
        self._ended = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take the step's time and tokens, and memory after the last step but one."""
        counted = self._counter.end(self._micro_batches)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        now = time.perf_counter()
        real, supervised, padded = self.counts
        step = {"seconds": now - self._ended, "tokens": real, "supervised_tokens": supervised, "padded_tokens": padded}
        self.steps.append(step | ({"counted": counted} if counted else {}))
        if len(self.steps) == self._last:
            self.memory = _memory(torch.cuda.is_available())
        self.counts, self._micro_batches = [0, 0, 0], 0
        self._counter.begin()
        self._ended = time.perf_counter()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Take the step's loss."""
        if "loss" in logs:
            self.steps[-1]["loss"] = float(logs["loss"])

    def watch(self, trainer: Any) -> None:
        """Count what the trainer's collator makes when it is trained on: the loader runs ahead of the step."""
        train = trainer.training_step

        def training_step(*args: Any, **kwargs: Any) -> Any:
            collated = self.collated.popleft()
            self.counts = [a + b for a, b in zip(self.counts, collated, strict=True)]
            self._counter.expect(collated[1])
            self._micro_batches += 1
            return train(*args, **kwargs)

        trainer.training_step = training_step
        trainer.data_collator = CountingCollator(trainer.data_collator, self)


class CountingCollator:
    """The trainer's own collator; counts what it makes."""

    def __init__(self, collate: Any, measured: Measured) -> None:
        self.collate, self.measured = collate, measured

    def __call__(self, examples: list[dict[str, Any]]) -> Any:
        """Collate and count."""
        batch = self.collate(examples)
        real = sum(len(example["input_ids"]) for example in examples)
        self.measured.collated.append((real, int((batch["labels"] != -100).sum()), batch["input_ids"].numel()))
        return batch


def main(spec: dict[str, Any]) -> dict[str, Any]:
    """Train and measure."""
    torch.set_num_threads(spec["threads"] or torch.get_num_threads())
    dtype = getattr(torch, spec["compute_dtype"])
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    model = AutoModelForCausalLM.from_pretrained(
        spec["base"],
        dtype=dtype,
        quantization_config=nf4,
        device_map={"": 0 if torch.cuda.is_available() else "cpu"},
        attn_implementation=spec["attention"],
    )
    tokenizer = AutoTokenizer.from_pretrained(spec["base"])
    train, evaluated = conversations(spec)
    measured = Measured(spec)
    config = SFTConfig(
        **trainer_arguments(spec),
        max_grad_norm=1.0,
        fp16=spec["compute_dtype"] == "float16",
        use_cpu=not torch.cuda.is_available(),
        gradient_checkpointing=spec["checkpointing"] == "full",
        train_sampling_strategy="sequential",
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    set_seed(3407)  # the adapters' initial values are drawn next
    trainer = SFTTrainer(
        model=model,
        args=config,
        train_dataset=train,
        eval_dataset=evaluated,
        processing_class=tokenizer,
        peft_config=LoraConfig(
            r=spec["r"],
            lora_alpha=spec["alpha"],
            lora_dropout=0.0,
            target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
            task_type="CAUSAL_LM",
        ),
        callbacks=[measured],
    )
    if spec["compute_dtype"] == "float16":
        for parameter in trainer.model.parameters():
            if parameter.requires_grad:  # TRL makes adapters bfloat16, which the scaler of float16's gradients refuses
                parameter.data = parameter.data.float()
    measured.watch(trainer)
    return summary(trainer, measured, spec, "trl", "transformers", "peft", "bitsandbytes", "torch")


def conversations(spec: dict[str, Any]) -> tuple[Dataset, Dataset | None]:
    """The tokenised conversations to train and to evaluate on."""
    given = json.loads(Path(spec["conversations_file"]).read_text())
    train = Dataset.from_list([example for step in given["steps"] for example in step])
    return train, Dataset.from_list(given["evaluated"]) if given["evaluated"] else None


def trainer_arguments(spec: dict[str, Any]) -> dict[str, Any]:
    """What every peer's trainer is given."""
    return {
        "output_dir": str(Path(spec["folder"]) / "trainer"),
        "per_device_train_batch_size": spec["micro_batch"],
        "per_device_eval_batch_size": spec["eval_batch"],
        "gradient_accumulation_steps": spec["batch_size"] // spec["micro_batch"],
        "max_steps": spec["steps"],
        "learning_rate": spec["lr"],
        "warmup_steps": 5,
        "lr_scheduler_type": "linear",
        "optim": "adamw_8bit",
        "weight_decay": 0.01,
        "seed": 3407,
        "bf16": spec["compute_dtype"] == "bfloat16",
        "packing": spec["packing"],
        "eval_packing": False,
        "max_length": spec["max_length"],
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }


def summary(trainer: Any, measured: Measured, spec: dict[str, Any], *packages: str) -> dict[str, Any]:
    """Train, then evaluate as often as asked; what a worker reports."""
    trainer.train()
    cuda = torch.cuda.is_available()
    seconds = None
    for _ in range(spec["evaluations"]):
        started = time.perf_counter()
        trainer.evaluate()
        if cuda:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - started
    return {
        **measured.memory,
        "evaluation_seconds": seconds,
        "steps": measured.steps,
        "trainable": sum(p.numel() for p in trainer.model.parameters() if p.requires_grad),
        "versions": {name: importlib.metadata.version(name) for name in packages},
        "device": torch.cuda.get_device_name() if cuda else "cpu",
    }


def _memory(cuda: bool) -> dict[str, float | None]:
    return {
        "peak_rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10,
        "peak_reserved_mib": torch.cuda.max_memory_reserved() / 2**20 if cuda else None,
        "peak_allocated_mib": torch.cuda.max_memory_allocated() / 2**20 if cuda else None,
    }


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(json.dumps(main(json.loads(Path(sys.argv[1]).read_text()))))
