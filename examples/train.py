"""Fine-tune, evaluate and answer from Python under a plain Trainer; needs no GPU and no network.

    python examples/train.py [RUN_DIR] [MAX_STEPS]

Interrupted or killed, the same command continues the run from its last checkpoint.
"""

import sys
from pathlib import Path

import lightning.pytorch as pl

from lightning_lab import ChatDataModule, QLoRAModule, run_directory

run_dir = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/example")
max_steps = int(sys.argv[2]) if len(sys.argv) > 2 else -1  # -1: as many as the epoch has, 20

module = QLoRAModule(base="embedded", lr=3e-4, r=16, alpha=16, max_new_tokens=32)
rows = {"source": "embedded", "rows": 180, "split": [160, 10, 10]}
data = ChatDataModule(**rows, tokenizer="embedded", template="tokenizer", micro_batch_tokens=1024)
trainer = pl.Trainer(
    max_epochs=1,
    max_steps=max_steps,
    val_check_interval=5,  # optimizer steps: a batch is one
    check_val_every_n_epoch=None,
    limit_predict_batches=1,  # 8 prompts
    callbacks=run_directory(run_dir, samples=1, sample_tokens=32),
    logger=False,
    enable_model_summary=False,
)

# A run that was interrupted goes on where it was; one that has ended does nothing here.
last = run_dir / "checkpoints" / "last.ckpt"
trainer.fit(module, data, ckpt_path=last if last.exists() else None, weights_only=True)

best = run_dir / "checkpoints" / "best.ckpt"
trainer.validate(module, data, ckpt_path=best, weights_only=True, verbose=False)
trainer.test(module, data, ckpt_path=best, weights_only=True, verbose=False)
for prompt, answer in trainer.predict(module, data, ckpt_path=best, weights_only=True)[0][:3]:
    print(f"\n{prompt.conversation.messages[-1].content}\n-> {answer}")
