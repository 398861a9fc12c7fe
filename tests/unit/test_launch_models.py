"""The model that launch.py is to serve: looked for, left to SGLang, or refused, and the memory that it takes."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub import errors

from sgl_flowprefill.cluster import StartError, cli, machine, preflight
from sgl_flowprefill.gpu_report.shapes import shape_path

pytestmark = pytest.mark.usefixtures("no_server_may_start")


@pytest.mark.parametrize("model", ["/no/such/model", "./nothing", "no-slash"])
def test_a_missing_model(refusal, model):
    assert f"model {model}: no such directory" in refusal("--model-path", model)


def test_a_model_id_that_the_hub_does_not_have(refusal, monkeypatch):
    def fail(*args, **options):
        raise errors.LocalEntryNotFoundError("cannot reach the hub")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", fail)
    assert "not on the Hugging Face hub (cannot reach the hub)" in refusal("--model-path", "nobody/nothing")


@pytest.mark.parametrize(
    ("error", "text"), [("GatedRepoError", "gated; accept its licence"), ("RepositoryNotFoundError", "check the name")]
)
def test_a_model_that_the_hub_shows_to_some(refusal, monkeypatch, error, text):
    def fail(*args, **options):
        raise getattr(errors, error)("401 Client Error.", response=SimpleNamespace(headers={}, request=None))

    monkeypatch.setattr("huggingface_hub.hf_hub_download", fail)
    line = refusal("--model-path", "somebody/something")
    assert "model somebody/something: " in line
    assert text in line
    assert "set HF_TOKEN" in line


@pytest.mark.parametrize(
    ("model", "modelscope"),
    [
        ("s3://bucket/model", ""),
        ("gs://bucket/model", ""),
        ("redis://host:6379/model", ""),
        ("Qwen/Qwen3-0.6B", "true"),
        ("Qwen/Qwen3-0.6B", "1"),
        ("somebody/something-GGUF:Q4_K_M", ""),
        ("somebody/something-GGUF/folder/model.gguf", ""),
        ("model.gguf", ""),
    ],
)
def test_a_model_that_only_sglang_finds_is_left_to_it(model, modelscope, monkeypatch, tmp_path):
    def fail(*args, **options):
        raise errors.LocalEntryNotFoundError("cannot reach the hub")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", fail)
    monkeypatch.setenv("SGLANG_USE_MODELSCOPE", modelscope)
    (tmp_path / "model.gguf").touch()
    assert preflight.prepare(cli.parse(["--ports", "0", "--model-path", model])).model_path == model


@pytest.mark.parametrize("model", ["/no/such/model.gguf", "./model.gguf", "somebody/something:", "some:thing"])
def test_a_gguf_file_that_is_none(refusal, model):
    assert f"model {model}: no such directory" in refusal("--model-path", model)


@pytest.mark.parametrize(("options", "revision"), [([], None), (["--revision", "v2"], "v2"), (["--revision=v3"], "v3")])
def test_a_model_is_looked_for_at_its_revision(options, revision, monkeypatch):
    asked = []
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *args, **options: asked.append((args, options)))
    preflight.prepare(cli.parse(["--ports", "0", "--model-path", "somebody/something", *options]))
    assert asked == [(("somebody/something", "config.json"), {"revision": revision})]


def test_a_repository_of_gguf_files_is_left_to_sglang(monkeypatch):
    def fail(*args, **options):
        raise errors.RemoteEntryNotFoundError("no config.json", response=SimpleNamespace(headers={}, request=None))

    monkeypatch.setattr("huggingface_hub.hf_hub_download", fail)
    model = "somebody/something-GGUF"
    assert preflight.prepare(cli.parse(["--ports", "0", "--model-path", model])).model_path == model


def test_a_cache_that_cannot_be_entered(refusal, monkeypatch, tmp_path):
    remedy = "set FLOWPREFILL_CACHE_DIR to a directory that this user can write, or give --model-path"
    (tmp_path / "file").touch()
    monkeypatch.setenv("FLOWPREFILL_CACHE_DIR", str(tmp_path / "file" / "cache"))
    line = refusal("--flowprefill")
    assert f"no model can be kept in the cache ([Errno 20] Not a directory: '{tmp_path}/file/cache'" in line
    assert line.endswith(remedy)

    def forbidden(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "is_dir", forbidden)
    assert "Permission denied" in refusal("--flowprefill")
    with pytest.raises(StartError, match=remedy):
        shape_path("llama-small")


def test_a_directory_that_is_no_checkpoint(refusal, tmp_path):
    assert "no config.json" in refusal("--model-path", str(tmp_path))


def test_not_enough_memory(refusal, monkeypatch):
    monkeypatch.setattr(machine, "available_memory_bytes", lambda: 10**9)
    line = refusal("--flowprefill")
    assert "not enough memory" in line
    assert "1.0 GB are available" in line


@pytest.mark.parametrize(("entry", "needed"), [("torch_dtype", 7.0), ("dtype", 7.0), ("nothing", 8.0)])
def test_memory_of_weights_that_are_float32_already(refusal, monkeypatch, tmp_path, entry, needed):
    (tmp_path / "config.json").write_text(json.dumps({entry: "float32"}))
    with open(tmp_path / "model.safetensors", "wb") as weights:
        weights.truncate(500_000_000)
    monkeypatch.setattr(machine, "available_memory_bytes", lambda: 10**9)
    assert f"need about {needed} GB" in refusal("--model-path", str(tmp_path))


@pytest.mark.parametrize(
    ("options", "needed"),
    [
        ([], 8.0),
        (["--dtype", "auto"], 8.0),
        (["--dtype", "float32"], 8.0),
        (["--dtype", "float"], 8.0),
        (["--dtype", "bfloat16"], 7.0),
        (["--dty=bfloat16"], 7.0),
        (["--decode-args", "--dtype bfloat16"], 7.5),
    ],
)
def test_weights_take_twice_the_memory_where_they_are_made_float32(refusal, monkeypatch, tmp_path, options, needed):
    weigh(tmp_path, "model.safetensors")
    monkeypatch.setattr(machine, "available_memory_bytes", lambda: 10**9)
    assert f"need about {needed} GB" in refusal("--model-path", str(tmp_path), *options)


@pytest.mark.parametrize(
    ("files", "index", "needed"),
    [
        (["pytorch_model.bin"], None, 8.0),
        (["model.safetensors", "pytorch_model.bin"], None, 8.0),
        (["one.safetensors", "two.safetensors"], None, 10.0),
        (["one.safetensors", "two.safetensors", "consolidated.safetensors"], ["one", "two", "two", "missing"], 10.0),
    ],
)
def test_weights_that_are_there_twice_count_once(refusal, monkeypatch, tmp_path, files, index, needed):
    weigh(tmp_path, *files)
    if index is not None:
        shards = {f"weight {number}": f"{name}.safetensors" for number, name in enumerate(index)}
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    monkeypatch.setattr(machine, "available_memory_bytes", lambda: 10**9)
    assert f"need about {needed} GB" in refusal("--model-path", str(tmp_path))


def weigh(model, *files):
    """Make a directory one of a model whose ``files`` have 0.5 GB each."""
    (model / "config.json").write_text("{}")
    for file in files:
        with open(model / file, "wb") as weights:
            weights.truncate(500_000_000)


@pytest.mark.parametrize("file", ["config.json", "model.safetensors.index.json"])
@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"{", "cannot be read (Expecting property name"),
        (b"\xff", "cannot be read ('utf-8' codec can't decode"),
        (b"[]", "has no options of a model"),
    ],
)
def test_a_model_whose_files_are_broken(refusal, tmp_path, file, content, reason):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / file).write_bytes(content)
    assert f"model {tmp_path}: {file} {reason}" in refusal("--model-path", str(tmp_path))


def test_a_model_in_a_directory_that_this_user_may_not_enter(refusal, monkeypatch):
    def forbidden(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "is_dir", forbidden)
    line = refusal("--model-path", "/others/model")
    assert "model /others/model: Permission denied; let this user read it, or give another --model-path" in line
