"""lightning_lab's data preparation in a fresh process: run by preparation.py. Usage: SPEC RESULT."""

import importlib.metadata
import json
import sys
import time
from pathlib import Path
from typing import Any

from lightning_lab.data.datamodule import ChatDataModule
from lightning_lab.data.encoding import ConversationEncoder, load_tokenizer
from lightning_lab.data.sources import load_rows
from lightning_lab.data.tokenized import tokenize_rows


def main(spec: dict[str, Any]) -> dict[str, Any]:
    """Tokenise the rows into the cache, or prepare them from it."""
    started = time.perf_counter()
    if spec["cached"]:
        data = ChatDataModule(
            source=spec["source"],
            rows=None,
            split=[1.0, 0.0, 0.0],
            tokenizer=spec["base"],
            template="tokenizer",
            max_length=spec["max_length"],
            on_bad_row="drop",
        )
        data.prepare(progress=False)
        tokenized = data.tokenized
        seconds = whole = time.perf_counter() - started
    else:
        encoder = ConversationEncoder(load_tokenizer(spec["base"]), max_length=spec["max_length"])
        rows = load_rows(spec["source"])
        opened = time.perf_counter()
        tokenized = tokenize_rows(rows, encoder, on_bad_row="drop", progress=False)
        seconds, whole = time.perf_counter() - opened, time.perf_counter() - started
    return {
        "seconds": seconds,
        "whole_seconds": whole,
        "kept": len(tokenized) - len(tokenized.dropped),
        "tokens": int(tokenized.lengths.sum()),
        "versions": {
            name: importlib.metadata.version(name)
            for name in ("lightning_lab", "transformers", "tokenizers", "pyarrow")
        },
    }


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(json.dumps(main(json.loads(Path(sys.argv[1]).read_text()))))
