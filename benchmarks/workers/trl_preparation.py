"""TRL's dataset preparation, alone: run by preparation.py in an environment that holds TRL. Usage: SPEC RESULT."""

import importlib.metadata
import json
import sys
import time
from pathlib import Path
from typing import Any

import datasets
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

# TRL masks by generation tags, which SmolLM2's template lacks. This is that template with them; it writes the same.
TAGGED = """\
{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system
You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>
' }}{% endif %}{{ '<|im_start|>' + message['role'] + '
' }}{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}\
{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '
' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant
' }}{% endif %}"""


class TimedTrainer(SFTTrainer):
    """Takes the time of the preparation."""

    def _prepare_dataset(self, *args: Any, **kwargs: Any) -> Any:
        started = time.perf_counter()
        prepared = super()._prepare_dataset(*args, **kwargs)
        self.preparation_seconds = time.perf_counter() - started
        return prepared


def main(spec: dict[str, Any]) -> dict[str, Any]:
    """Prepare the rows for training."""
    folder = Path(spec["folder"])
    rows = datasets.Dataset.from_json(spec["source"], cache_dir=str(folder / "source"))
    datasets.disable_caching()
    tokenizer = AutoTokenizer.from_pretrained(spec["base"])
    rendered = tokenizer.apply_chat_template(rows[0]["messages"], tokenize=False)
    tokenizer.chat_template = TAGGED
    assert tokenizer.apply_chat_template(rows[0]["messages"], tokenize=False) == rendered, "another chat template"
    config = AutoConfig.from_pretrained(spec["base"])
    config.num_hidden_layers, config.layer_types = 1, None  # the trainer asks for a model; preparing does not use it
    trainer = TimedTrainer(
        model=AutoModelForCausalLM.from_config(config),
        args=SFTConfig(
            output_dir=str(folder / "trl"),
            max_length=spec["max_length"],
            assistant_only_loss=True,
            dataset_num_proc=spec["processes"],
            bf16=False,
            use_cpu=True,
            report_to="none",
        ),
        train_dataset=rows,
        processing_class=tokenizer,
    )
    prepared = trainer.train_dataset.with_format("arrow")
    tokens = sum(len(column.values) for column in prepared.data.column("input_ids").chunks)
    return {
        "seconds": trainer.preparation_seconds,
        "kept": len(prepared),
        "tokens": tokens,
        "versions": {
            name: importlib.metadata.version(name) for name in ("trl", "transformers", "datasets", "tokenizers")
        },
    }


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(json.dumps(main(json.loads(Path(sys.argv[1]).read_text()))))
