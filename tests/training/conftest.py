import shutil
from pathlib import Path

import pytest
import torch


@pytest.fixture(scope="session")
def narrow_base(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny base at a quarter of its width: a CPU multiplies float16 slowly."""
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("narrow") / "base"
    shutil.copytree(tiny_base, folder)
    torch.manual_seed(1)
    config = AutoConfig.from_pretrained(
        tiny_base, hidden_size=32, intermediate_size=64, num_attention_heads=2, num_key_value_heads=1, head_dim=16
    )
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    return folder
