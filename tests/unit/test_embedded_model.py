"""The embedded checkpoint: made once, the same every time, and usable through transformers without a network."""

import json
import multiprocessing

import numpy as np
import pytest

from sgl_flowprefill.model.embedded import FIRST_WORD_ID, VOCAB_SIZE, EmbeddedModel, embedded_model_path


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FLOWPREFILL_CACHE_DIR", str(tmp_path))
    return tmp_path


@pytest.fixture
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(embedded_model_path(), local_files_only=True)


def words(count, seed=0):
    return np.random.default_rng(seed).integers(FIRST_WORD_ID, VOCAB_SIZE, count).tolist()


def test_it_is_made_once_and_nothing_else_is_left_in_the_cache(cache):
    path = embedded_model_path()
    made_ns = (path / "model.safetensors").stat().st_mtime_ns
    assert embedded_model_path() == path
    assert (path / "model.safetensors").stat().st_mtime_ns == made_ns
    assert [entry.name for entry in cache.iterdir()] == [path.name]


def test_every_file_is_the_same_when_made_again(tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    for directory in (first, second):
        directory.mkdir()
        EmbeddedModel().write(directory)
    names = sorted(file.name for file in first.iterdir())
    assert names == sorted(file.name for file in second.iterdir())
    assert all((first / name).read_bytes() == (second / name).read_bytes() for name in names)


def test_another_shape_is_another_directory():
    assert embedded_model_path(EmbeddedModel(layers=1)) != embedded_model_path(EmbeddedModel(layers=2))


def test_processes_that_make_it_at_the_same_time_agree(cache):
    with multiprocessing.get_context("spawn").Pool(4) as pool:
        paths = pool.map(embedded_model_path, [EmbeddedModel(layers=1)] * 4)
    assert len(set(paths)) == 1
    assert [entry.name for entry in cache.iterdir()] == [paths[0].name]


def test_a_failed_attempt_leaves_nothing(cache, monkeypatch):
    def fail(model, directory):
        raise OSError("no space left on device")

    monkeypatch.setattr(EmbeddedModel, "write", fail)
    with pytest.raises(OSError, match="no space"):
        embedded_model_path()
    assert list(cache.iterdir()) == []


@pytest.mark.parametrize(
    "text", ["Hello, wörld!\n\t x", " bake lomi tura", "日本語 🙂", "", "  two  spaces ", "a" * 999]
)
def test_any_text_round_trips(tokenizer, text):
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_a_prompt_of_words_has_exactly_as_many_tokens(tokenizer):
    ids = words(5000)
    assert tokenizer(tokenizer.decode(ids))["input_ids"] == ids


def test_it_has_a_chat_template(tokenizer):
    messages = [{"role": "system", "content": "be"}, {"role": "user", "content": "hi"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == "<|system|>be<|end|><|user|>hi<|end|><|assistant|>"
    assert tokenizer.convert_tokens_to_ids("<|assistant|>") == 4


def test_the_context_holds_the_longest_prompts():
    config = json.loads((embedded_model_path() / "config.json").read_text())
    assert config["max_position_embeddings"] >= 32768


def test_greedy_answers_differ_and_have_no_ties():
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(embedded_model_path(), dtype=torch.float32)
    prompts = torch.tensor([words(64, seed) for seed in range(8)])
    answer = model.generate(
        prompts, max_new_tokens=32, do_sample=False, output_logits=True, return_dict_in_generate=True
    )
    tokens = answer.sequences[:, 64:]
    best = torch.stack(answer.logits).topk(2).values
    assert tokens.min() >= FIRST_WORD_ID  # words only, so no answer ends early
    assert len(tokens.unique()) > 200
    assert (best[..., 0] - best[..., 1]).min() > 1e-4
