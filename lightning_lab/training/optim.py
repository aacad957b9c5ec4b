"""Float16 loss scaling."""

from dataclasses import dataclass


@dataclass
class LossScale:
    """Dynamic loss scaling for float16, with the constants of ``torch.amp.GradScaler``.

    GradScaler reads from the device for itself; here the step's one read has said already whether it overflowed.
    """

    value: float = 2.0**16
    good_steps: int = 0
    overflows: int = 0
    overflows_in_a_row: int = 0

    def succeeded(self) -> None:
        """Count a finite step; double the scale after 2,000 in a row."""
        self.overflows_in_a_row = 0
        self.good_steps += 1
        if self.good_steps == 2_000:
            self.value, self.good_steps = self.value * 2, 0

    def overflowed(self) -> None:
        """Count a skipped step and halve the scale."""
        self.overflows += 1
        self.overflows_in_a_row += 1
        self.value, self.good_steps = self.value / 2, 0
