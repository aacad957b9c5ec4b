"""bitsandbytes' AdamW with 8-bit state, without waiting for the device."""

from collections.abc import Callable
from typing import Any

import torch
from bitsandbytes.optim import AdamW8bit
from typing_extensions import override


class AdamW8bitAsync(AdamW8bit):
    """`AdamW8bit`, whose own step waits for the device after each tensor, as only paged state needs it (0.50)."""

    initialized: bool

    @override
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if not self.initialized:
            self.check_overrides()
            self.to_gpu()  # the state of a checkpoint
            self.initialized = True
        for g, group in enumerate(self.param_groups):
            for i, parameter in enumerate(group["params"]):
                if parameter.grad is not None:
                    if not self.state[parameter]:
                        self.init_state(group, parameter, g, i)
                    self.update_step(group, parameter, g, i)
        return loss
