"""Rows to be answered -> prompts."""

import sys
from collections.abc import Sequence
from typing import Any

from lightning_lab.data.batching import PromptBatch
from lightning_lab.data.conversation import Prompt, RowFormat, parse_prompt
from lightning_lab.data.encoding import ConversationEncoder
from lightning_lab.data.sources import load_rows
from lightning_lab.data.template import ChatTemplate
from lightning_lab.data.tokenized import OnBadRow, content_hash
from lightning_lab.data.turns import RowError, or_error
from lightning_lab.errors import LabError

_NAMED_ROWS = 10  # of those that cannot be answered; the rest is counted


def read_prompts(source: str, template: ChatTemplate, row_format: RowFormat, on_bad_row: OnBadRow) -> list[Prompt]:
    """Read every row as something to answer; under ``on_bad_row: drop`` bad ones are left out and named on stderr.

    Raises:
        LabError: The source cannot be read, a bad row under ``error``, or none is left.

    """
    rows = load_rows(source, row_format=row_format)
    prompts, bad = [], []
    for index, row in enumerate(rows):
        try:
            whole = or_error(rows.conversation, index)
            content = None if isinstance(whole, RowError) else content_hash(whole)
            prompt = Prompt(index, *parse_prompt(row, row_format), content)
            template.render(prompt.conversation, add_generation_prompt=True)
            prompts.append(prompt)
        except RowError as error:
            bad.append(f"{rows.where(index)}: {error}")
    if bad and (on_bad_row == "error" or not prompts):
        raise LabError(f"{bad[0]}; correct the row or set data.on_bad_row to drop")
    if bad:
        print(
            f"{len(bad)} of {len(rows)} rows are not answered: {'; '.join(bad[:_NAMED_ROWS])}",
            file=sys.stderr,
        )
    return prompts


def tokenize_prompts(prompts: Sequence[Prompt], encoder: ConversationEncoder, tokenizer: Any) -> PromptBatch:
    """Tokenise prompts as in training.

    Raises:
        RowError: The template refuses one.

    """
    end_of_turn = encoder.template.end_of_turn.strip()
    stop_ids = {tokenizer.eos_token_id, encoder.template.control_ids.get(end_of_turn)}
    return PromptBatch(
        prompts=list(prompts),
        input_ids=[encoder.encode_prompt(prompt.conversation) for prompt in prompts],
        pad_id=tokenizer.pad_token_id,
        stop_ids=sorted(i for i in stop_ids if i is not None),
        tokenizer=tokenizer,
    )
