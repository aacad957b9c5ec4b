"""Fine-tune a Llama on chat data: 4-bit QLoRA in plain PyTorch Lightning."""

__version__ = "0.1.0"
