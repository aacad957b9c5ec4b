"""What one step makes a null GPU do: kernels, products, copies, waits, and the bytes of what is no product.

The null GPU counts a kernel by its name; the bytes of kernels that are no product come from the last steps, traced:
a dispatch mode adds up what each ATen operator reads and writes, and each launch of a Triton kernel (Inductor's, or one
written by hand) adds up the tensors that its source loads from and stores to. Operators made of Python are looked into.
A count that a tool reads from the GPU, of supervised tokens, is answered from the host's labels.
Nothing here does anything where `nullgpu` cannot be imported.
"""

import ast
import ctypes
import inspect
import math
import sys
import textwrap
import time
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

try:
    import nullgpu
except ImportError:
    nullgpu = None
else:
    torch.cuda._is_in_bad_fork = lambda: False  # workers of a loader may be forked: there is no device to spoil

TRACED = 3  # steps at the end that are traced: their counts and bytes are taken, not their time
WARM_UP = 3  # steps whose counts and times are left out: compiling, first allocations, the optimizer's state
PRODUCTS = {"mm", "addmm", "addmm_", "bmm", "baddbmm", "baddbmm_", "matmul", "mv", "addmv", "dot", "linear"}
FREE = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "detach", "lift_fresh", "set_"}
FREE |= {
    "resize_",
    "_local_scalar_dense",
    "record_stream",
    "_unsafe_view",
    "_reshape_alias",
    "alias",
    "item",
    "is_pinned",
}
ROWS_READ = {"embedding", "index", "index_select", "gather"}  # read no more than they write, however large the table
ROWS_WRITTEN = {"index_put", "index_put_", "index_add", "index_add_", "index_copy_", "scatter_", "scatter_add_"}
ONE_A_ROW = {("_fl_combine_kernel", "x_ptr")}  # Unsloth's loss reads one logit of each row there, not all
OVERWRITING = {"copy_", "fill_", "zero_"}


class Counter:
    """Counts of each step, from the end of the one before."""

    def __init__(self, spec: dict[str, Any]) -> None:
        """Begin with nothing counted.

        Args:
            spec: The worker's specification: its ``steps`` and their ``lengths``.

        """
        self.spec, self.rows, self.trace = spec, [], None  # type: ignore[var-annotated]
        self.supervised = 0
        if nullgpu:
            self._library = torch.library.Library("aten", "IMPL")
            self._library.impl("nonzero", self._nonzero, "CUDA", allow_override=True)
            # exp2 is compiled by NVRTC when it is first called, which needs NVIDIA's own driver; exp is one kernel too.
            self._library.impl("exp2", torch.exp, "CUDA", allow_override=True)

    def _nonzero(self, mask: torch.Tensor) -> torch.Tensor:
        """The positions of supervised tokens: all that a tool looks for, and no null GPU can say how many there are.

        PyTorch counts them (2 kernels), waits for the count, and selects them (2 kernels).
        """
        for name, count in (("K nonzero, as PyTorch does it", 4), ("C async D2H", 1), ("S stream", 1)):
            for _ in range(count):
                nullgpu._lib.nullgpu_count(name.encode(), ctypes.c_double(0), ctypes.c_double(0))
        return torch.zeros(self.supervised, mask.dim(), dtype=torch.int64, device=mask.device)

    def expect(self, supervised: int) -> None:
        """Say how many supervised tokens the next micro-batch has."""
        self.supervised = supervised

    def begin(self) -> None:
        """Forget what was counted and start the clocks."""
        if nullgpu:
            nullgpu.reset()
            self._wall, self._cpu = time.perf_counter(), time.process_time()

    def end(self, micro_batches: int) -> dict[str, Any]:
        """Take a step's counts, and start tracing before each of the last steps.

        Args:
            micro_batches: How many the step was made of.

        Returns:
            The counts, ``{}`` without a null GPU.

        """
        if not nullgpu:
            return {}
        wall, cpu = time.perf_counter() - self._wall, time.process_time() - self._cpu
        row: dict[str, Any] = {"micro_batches": micro_batches, "wall_ms": 1e3 * wall, "cpu_ms": 1e3 * cpu}
        row |= dict.fromkeys(("kernels", "triton", "products", "copies", "memsets", "syncs", "allocations", "moved"), 0)
        row |= {"flop": 0.0, "product_bytes": 0.0, "allocated": torch.cuda.max_memory_allocated()}
        row["reserved"] = torch.cuda.max_memory_reserved()
        kinds = {"K": "kernels", "T": "triton", "G": "products", "C": "copies", "S": "syncs", "M": "allocations"}
        products = {}
        for count, a, b, name in nullgpu.dump():
            kind = "memsets" if name == "C memset" else kinds.get(name.split(" ", 1)[0])
            if kind:
                row[kind] += count
            if name.startswith("C async") and "D2D" not in name:
                row["moved"] += a
            if kind == "products":
                row["flop"] += a
                row["product_bytes"] += b
                products[name] = [count, a, b]
        if self.trace:
            self.trace.close()
            row |= {"product_shapes": products, "bytes": self.trace.bytes, "attention": self.trace.attention}
            self.trace = None
        self.rows.append(row)
        if len(self.rows) == self.spec["steps"]:
            row["seconds_a_byte_moved"] = _seconds_a_byte()
        if self.spec["steps"] - TRACED <= len(self.rows) < self.spec["steps"]:
            self.trace = Trace(self.spec["lengths"][len(self.rows)])
        self.begin()
        return row


class Trace(TorchDispatchMode):
    """Adds up, until closed, the bytes of what is no product and attention's operations.

    Args:
        lengths: Tokens of each of the step's conversations.

    """

    def __init__(self, lengths: list[int]) -> None:
        super().__init__()
        self.bytes: dict[str, list[float]] = {}
        self.attention = 0.0
        self._tokens, self._pairs = sum(lengths), sum(n * n / 2 for n in lengths)
        self._triton = _watch_triton(self._add)
        self.__enter__()

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """True: compiled code runs on under this mode, as its kernels are counted where they are launched."""
        return True

    def close(self) -> None:
        """Stop."""
        self.__exit__(None, None, None)
        self._triton()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operator and count it; one that is made of Python is run from its source, under this mode."""
        kwargs = kwargs or {}
        name = func._schema.name
        made = torch._library.custom_ops.OPDEFS.get(name)
        body = made and (made._backend_fns.get("cuda") or made._backend_fns[None])
        if name == "lightning_lab::qlora_linear":  # made of Python too, but without that wrapper
            body = sys.modules["lightning_lab.models.fused_linear"]._multiply
        if body is not None:
            with self, torch.no_grad():
                return body(*args, **kwargs)
        out = func(*args, **kwargs)
        short = name.split("::")[1]
        if short in PRODUCTS or short in FREE or func.is_view:
            return out
        given = {a.name: value for a, value in zip(func._schema.arguments, args, strict=False)} | kwargs
        if "attention" in short:
            self._attend(short, given)
            return out
        written = [given.get(a.name) for a in func._schema.arguments if a.alias_info and a.alias_info.is_write]
        changed, made_now = _tensors(written), _tensors(out)
        if short == "gemm_4bit":  # dequantises, then multiplies: two values a byte, in the dtype of the product
            total = _size(given["B"]) * (1 + 2 * given["A"].element_size())
        elif short in ROWS_READ:
            total = 2 * sum(map(_size, made_now))
        elif short in ROWS_WRITTEN:
            source = given.get("values", given.get("source", given.get("src")))
            total = 3 * sum(map(_size, _tensors(source)))
        else:
            read = _tensors([args, kwargs])
            old = {t.untyped_storage().data_ptr() for t in read}
            if short in OVERWRITING or func._overloadname == "out":
                read = [t for t in read if all(t is not other for other in changed)]
            new = [t for t in made_now if t.untyped_storage().data_ptr() not in old]
            total = sum(map(_size, read)) + sum(map(_size, changed)) + sum(map(_size, new))
        self._add(name, total)
        return out

    def _attend(self, name: str, given: dict[str, Any]) -> None:
        """Add 2 products forward and 5 backward, over half the square where it is causal.

        Documents laid one after another are taken from the step: their squares in proportion to the tokens at hand.
        """
        q = given["query"]
        borders = next((given[k] for k in ("cu_seqlens_q", "cum_seq_q") if given.get(k) is not None), None)
        if isinstance(borders, torch.Tensor) and borders.numel() > 1:
            heads, width = q.shape[-2:]
            pairs = q.numel() / heads / width / self._tokens * self._pairs
        else:
            heads_first = name.startswith("_scaled")
            batch, width = q.shape[0], q.shape[-1]
            heads, queries = (q.shape[1], q.shape[2]) if heads_first else (q.shape[2], q.shape[1])
            keys = given["key"].shape[2 if heads_first else 1]
            causal = given.get("is_causal") or given.get("causal") or given.get("custom_mask_type")
            pairs = batch * queries * keys / (2 if causal else 1)
        self.attention += pairs * heads * width * (10 if "backward" in name else 4)

    def _add(self, name: str, size: float) -> None:
        entry = self.bytes.setdefault(name, [0, 0.0])
        entry[0] += 1
        entry[1] += size


def _seconds_a_byte() -> float:
    """Host seconds of a byte to or from the null GPU, which copies it there and then; a GPU would not keep the host."""
    size = 2**26
    host, device = (
        torch.zeros(size, dtype=torch.uint8).pin_memory(),
        torch.zeros(size, dtype=torch.uint8, device="cuda"),
    )
    for _ in range(5):  # the first touch the memory
        started = time.perf_counter()
        device.copy_(host, non_blocking=True)
        host.copy_(device, non_blocking=True)
    return (time.perf_counter() - started) / 2 / size


def _tensors(tree: Any) -> list[torch.Tensor]:
    found = {id(leaf): leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor) and leaf.is_cuda}
    return list(found.values())


def _size(tensor: torch.Tensor) -> int:
    """Bytes, an expanded dimension once."""
    sizes = zip(tensor.shape, tensor.stride(), strict=True)
    return tensor.element_size() * math.prod(size for size, stride in sizes if stride or not size)


def _watch_triton(add: Any) -> Any:
    """Have each launch of a Triton kernel counted; return what ends it.

    A pointer's bytes are its tensor's, once if it is loaded from and once if it is stored to; in Inductor's kernels at
    most an element for each load in the source and point of the grid, so that a gather is not charged its whole table.
    """
    import triton
    from torch._inductor.runtime.triton_heuristics import CachingAutotuner
    from triton.runtime.jit import JITFunction

    originals = CachingAutotuner.run, JITFunction.run
    known: dict[int, Any] = {}  # by the kernel's address, as Inductor's cannot be hashed

    def count(kernel: Any, args: Any, kwargs: Any) -> None:
        if id(kernel) not in known:
            known[id(kernel)] = _accesses(kernel)
        given = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
        numels = [value for name, value in given.items() if name.endswith("numel")]
        total = 0.0
        for name, (loads, stores) in known[id(kernel)].items():
            if isinstance(given.get(name), torch.Tensor) and (kernel.__name__, name) not in ONE_A_ROW:
                size = _size(given[name])
                each = given[name].element_size() * math.prod(numels) if numels else size
                total += min(size, loads * each) + min(size, stores * each)
        add(f"triton::{kernel.__name__}", total)

    def inductor(self: Any, *args: Any, **kwargs: Any) -> Any:
        count(self.fn, args, {})
        return originals[0](self, *args, **kwargs)

    def written(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not kwargs.get("warmup"):
            count(self, args, kwargs)
        return originals[1](self, *args, **kwargs)

    def nothing(*args: Any) -> None:
        """Is there: with a hook set, Unsloth launches by way of Triton and not around it."""

    CachingAutotuner.run, JITFunction.run = inductor, written
    triton.knobs.runtime.launch_enter_hook.add(nothing)

    def end() -> None:
        CachingAutotuner.run, JITFunction.run = originals
        triton.knobs.runtime.launch_enter_hook.remove(nothing)

    return end


def _accesses(kernel: Any) -> dict[str, tuple[int, int]]:
    """Loads and stores in a Triton kernel's source through each of its arguments, those of its helpers included."""
    tree = ast.parse(textwrap.dedent(getattr(kernel, "src", None) or inspect.getsource(kernel.fn)))
    through = {name: {name} for name in kernel.arg_names}  # a local name -> the arguments that it may point into
    found: dict[str, list[int]] = {}

    def reaches(node: ast.AST) -> set[str]:
        if isinstance(node, ast.Call) and _callee(node) == "load":
            return set()
        own = through.get(node.id, set()) if isinstance(node, ast.Name) else set()
        return own.union(*(reaches(child) for child in ast.iter_child_nodes(node)))

    def add(node: ast.AST, loads: int, stores: int) -> None:
        for name in reaches(node):
            entry = found.setdefault(name, [0, 0])
            entry[0] += loads
            entry[1] += stores

    for node in _in_order(tree):
        if isinstance(node, ast.Assign | ast.AugAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            for target in (name for t in targets for name in ast.walk(t) if isinstance(name, ast.Name)):
                through[target.id] = through.get(target.id, set()) | reaches(node.value)
        if isinstance(node, ast.Call):
            callee = _callee(node)
            helper = getattr(kernel.fn, "__globals__", {}).get(callee)  # Inductor's has no function any more
            if callee == "load":
                add(node.args[0], 1, 0)
            elif callee == "store":
                add(node.args[0], 0, 1)
            elif callee.startswith("atomic_"):
                add(node.args[0], 1, 1)
            elif hasattr(helper, "arg_names") and helper is not kernel:
                values = dict(zip(helper.arg_names, node.args, strict=False))
                values |= {word.arg: word.value for word in node.keywords}
                for name, (loads, stores) in _accesses(helper).items():
                    if name in values:
                        add(values[name], loads, stores)
    return {name: (loads, stores) for name, (loads, stores) in found.items()}


def _in_order(tree: ast.AST) -> list[ast.AST]:
    return sorted((n for n in ast.walk(tree) if hasattr(n, "lineno")), key=lambda n: (n.lineno, n.col_offset))


def _callee(node: ast.Call) -> str:
    return getattr(node.func, "attr", getattr(node.func, "id", ""))
