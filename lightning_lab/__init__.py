"""Fine-tune a Llama on chat data: 4-bit QLoRA in plain PyTorch Lightning.

From Python::

    import lightning.pytorch as pl
    from lightning_lab import ChatDataModule, QLoRAModule, run_directory

    module = QLoRAModule(base="embedded", lr=3e-4, r=32, alpha=32)
    data = ChatDataModule(source="embedded", tokenizer="embedded", template="tokenizer")
    trainer = pl.Trainer(max_epochs=1, callbacks=run_directory("runs/mine"))
    trainer.fit(module, data)
    trainer.test(module, data)

Importing the package loads nothing; the names load what they need when they are first used.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_lab.data.datamodule import ChatDataModule
    from lightning_lab.training.callbacks import run_directory
    from lightning_lab.training.module import QLoRAModule

__version__ = "0.2.0"
__all__ = ["ChatDataModule", "QLoRAModule", "__version__", "run_directory"]
_HOMES = {
    "ChatDataModule": "lightning_lab.data.datamodule",
    "QLoRAModule": "lightning_lab.training.module",
    "run_directory": "lightning_lab.training.callbacks",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'lightning_lab' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
