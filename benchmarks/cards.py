"""Four GPUs as a roofline sees them. What they sustain is assumed, not measured: no GPU has been available."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

# Seconds of the driver's own for one launch, which a null GPU does not spend: 2 to 2.5 us on servers.
LAUNCH_SECONDS = 2.2e-6


@dataclass(frozen=True)
class Card:
    """One GPU.

    Args:
        capability: Compute capability, as 75.
        mib: Memory that the driver reports.
        dtype: What models are computed in.
        flops: Operations per second that large products sustain.
        bandwidth: Bytes per second that large elementwise kernels sustain.
        attention: Operations per second of attention's kernels, forward and backward.
        link: Bytes per second between host and card.
        host: Host seconds there for one here: processors of the machines that such cards stand in.

    """

    capability: int
    mib: int
    dtype: str
    flops: float
    bandwidth: float
    attention: float
    link: float
    host: float

    def gpu_seconds(self, products: Iterable[Sequence[float]], attention: float, other_bytes: float) -> float:
        """Seconds on the GPU: each product by its operations or its bytes, whichever takes longer, and the rest.

        Args:
            products: For each shape of product: how many, their operations, their bytes.
            attention: Operations of attention.
            other_bytes: Bytes that all other kernels read and write.

        """
        seconds = sum(max(flop / self.flops, size / self.bandwidth) for _, flop, size in products)
        return seconds + attention / self.attention + other_bytes / self.bandwidth

    def host_seconds(self, counted: float, launches: float) -> float:
        """Seconds on the host: those counted here, and the driver's for each launch.

        Args:
            counted: Host seconds on the null GPU.
            launches: Kernels and products launched.

        """
        return self.host * (counted + launches * LAUNCH_SECONDS)


# Peaks of NVIDIA's datasheets (T4, A100 80GB SXM, H100 SXM, Ada architecture), dense, 16 bits, float32 accumulation:
# T4 65 TFLOP/s and 320 GB/s at 70 W; 4090 165 and 1,008; A100 312 and 2,039; H100 989 and 3,350. Assumed sustained:
# 60 to 72 % of the peak in large products, on a 4090 88 %, on a T4, which 70 W slow down, a third; 78 to 87 % of the
# peak bandwidth. Attention: what FlashAttention 2 is published with, forward and backward together, at heads of 64 and
# 128; on a T4 PyTorch's memory-efficient kernel. Link: PCIe 3, 4 and 5 with 16 lanes. Host: a server's core against
# the core that this was counted on, 2.1 times slower in Colab, a desktop's with a 4090.
# PyTorch has no code of its own for a 4090, of capability 8.9: it runs that of 8.6, which the null GPU stands in for.
CARDS = {
    "t4": Card(75, 15102, "float16", 22e12, 0.25e12, 7e12, 12e9, 2.1),
    "4090": Card(86, 24217, "bfloat16", 145e12, 0.88e12, 90e12, 25e9, 0.95),
    "a100": Card(80, 81251, "bfloat16", 225e12, 1.6e12, 130e12, 25e9, 1.15),
    "h100": Card(90, 81559, "bfloat16", 600e12, 2.75e12, 300e12, 50e9, 1.05),
}
