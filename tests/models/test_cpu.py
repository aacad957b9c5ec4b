"""What serves a CPU: attention against dense attention in float64, bfloat16 gradients against PyTorch's kernel."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_lab.models.cpu import cpu_document_attention

# around the block of 128 queries
LENGTHS = [(127,), (128,), (129,), (257,), (700,), (3, 300, 1, 513)]


def inputs(tokens: int, heads: int, kv_heads: int, width: int) -> tuple[Tensor, ...]:
    """Query, key, value and the output's gradient: strided as a decoder layer gives them, in values of bfloat16."""
    generator = torch.Generator().manual_seed(tokens)
    shapes = [(1, tokens, n, width) for n in (heads, kv_heads, kv_heads, heads)]
    q, k, v, grad = (2 * torch.randn(shape, generator=generator).bfloat16().float() for shape in shapes)
    return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), grad


def expected(lengths: tuple[int, ...], scaling: float, q: Tensor, k: Tensor, v: Tensor, grad: Tensor) -> list[Tensor]:
    q, k, v = leaves = [x.double().requires_grad_() for x in (q, k, v)]
    shared = q.shape[1] // k.shape[1]
    pieces = []
    for q_i, k_i, v_i in zip(*(x.split(lengths, dim=2) for x in (q, k, v)), strict=True):
        scores = scaling * q_i @ k_i.repeat_interleave(shared, 1).mT
        future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        pieces.append(scores.masked_fill(future, -torch.inf).softmax(-1) @ v_i.repeat_interleave(shared, 1))
    out = torch.cat(pieces, dim=2).transpose(1, 2)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad.double())]


def actual(
    lengths: tuple[int, ...], scaling: float, dtype: torch.dtype, q: Tensor, k: Tensor, v: Tensor, grad: Tensor
) -> list[Tensor]:
    leaves = [x.to(dtype).requires_grad_() for x in (q, k, v)]
    out, _ = cpu_document_attention(*leaves, torch.tensor([0, *lengths]).cumsum(0), scaling)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad.to(dtype))]


def error(found: list[Tensor], wanted: list[Tensor]) -> list[float]:
    return [((a.double() - b).norm() / b.norm()).item() for a, b in zip(found, wanted, strict=True)]


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize(("heads", "kv_heads", "width"), [(6, 2, 16), (2, 2, 40)])
def test_gradients(lengths: tuple[int, ...], heads: int, kv_heads: int, width: int) -> None:
    values = inputs(sum(lengths), heads, kv_heads, width)
    scaling = width**-0.5
    wanted = expected(lengths, scaling, *values)
    in_32, in_16 = (actual(lengths, scaling, dtype, *values) for dtype in (torch.float32, torch.bfloat16))
    assert max(error(in_32, wanted)) < 1e-5
    assert max(error(in_16, wanted)) < 0.012  # bfloat16 rounds by up to 0.004


@pytest.mark.parametrize("sharpness", [1.0, 4.0])
def test_bfloat16_in_blocks_is_as_near_to_float64_as_the_flash_kernel(sharpness: float) -> None:
    """Sharp scores are large, where bfloat16 itself is coarse."""
    q, k, v, grad = inputs(600, 6, 2, 64)
    q = sharpness * q
    wanted = expected((600,), 0.125, q, k, v, grad)[1:]
    ours = actual((600,), 0.125, torch.bfloat16, q, k, v, grad)[1:]
    leaves = [x.bfloat16().requires_grad_() for x in (q, k, v)]
    flash = F.scaled_dot_product_attention(*leaves, is_causal=True, scale=0.125, enable_gqa=True)
    theirs = torch.autograd.grad(flash.transpose(1, 2), leaves, grad.bfloat16())

    def whole(gradients: list[Tensor] | tuple[Tensor, ...]) -> Tensor:
        return torch.cat([g.double().flatten() / w.norm() for g, w in zip(gradients, wanted, strict=True)])

    distances = [(whole(found) - whole(wanted)).norm().item() for found in (ours, theirs)]
    assert distances[0] < 1.1 * distances[1]


GROWTH = """
import ctypes, torch
from lightning_lab.models.cpu import bound_kernel_caches
class Heap(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in "a b c d e f g uordblks h i".split()]
mallinfo2 = ctypes.CDLL("libc.so.6").mallinfo2
mallinfo2.restype = Heap
if BOUND:
    bound_kernel_caches()
weight = torch.randn(1536, 576).bfloat16()
for tokens in range(64, 464):
    if tokens == 264:
        before = mallinfo2().uordblks
    torch.nn.functional.linear(torch.randn(tokens, 576).bfloat16(), weight)
print((mallinfo2().uordblks - before) / 2**20)
"""


def test_products_of_ever_new_lengths_do_not_fill_the_memory() -> None:
    """200 more lengths, after 200 others; glibc's own count of what is allocated, in MiB."""

    def growth(bound: bool) -> float:
        command = [sys.executable, "-c", GROWTH.replace("BOUND", str(bound))]
        # loading a model has set the bounds in this process
        environment = {name: value for name, value in os.environ.items() if "CACHE_CAPACITY" not in name}
        return float(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout)

    unbounded = growth(False)
    if unbounded < 20:
        pytest.skip("on this CPU bfloat16 products do not go through oneDNN")
    assert growth(True) < unbounded / 10


def test_loaded_weights_keep_no_file_mapped(tiny_folder: Path) -> None:
    from lightning_lab.models.base import load_base

    load_base(str(tiny_folder), bits=16, compute_dtype=torch.float32, device=torch.device("cpu"))
    kept = load_base(str(tiny_folder), bits=4, compute_dtype=torch.float32, device=torch.device("cpu"))
    assert str(tiny_folder) not in Path("/proc/self/maps").read_text()
    del kept
