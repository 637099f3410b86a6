"""Real weights: the reference agrees with transformers on SmolLM2-135M-Instruct."""

import json

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from llama import LlamaTokenizerFast, reference

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
TEXTS = [
    "The quick brown fox jumps over the lazy dog.",
    "def fibonacci(n):\n    return n if n < 2 else fibonacci(n - 1) + fibonacci(n - 2)\n",
    "In 1905, 12345 + 67890 = 80235; naïve café, Москва, 東京, 🦙!",
]


@pytest.fixture(scope="module")
def ours():
    return *reference.load("smollm2"), LlamaTokenizerFast.from_pretrained("smollm2")


@pytest.fixture(scope="module")
def theirs(smollm2):
    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    return model, AutoTokenizer.from_pretrained(smollm2)


@pytest.mark.parametrize("text", TEXTS)
def test_tokens_are_transformers(ours, theirs, text):
    ids = ours[2].encode(text)
    assert ids == theirs[1](text)["input_ids"]
    assert ours[2].decode(ids) == theirs[1].decode(ids) == text


def test_the_chat_template_is_transformers(ours, theirs):
    for conversation in (QUESTION, [{"role": "system", "content": "Be brief."}, *QUESTION]):
        for prompt in (True, False):
            expected = theirs[1].apply_chat_template(conversation, add_generation_prompt=prompt, tokenize=False)
            options = {"add_generation_prompt": prompt}
            assert ours[2].apply_chat_template(conversation, tokenize=False, **options) == expected
            ids = theirs[1](expected, add_special_tokens=False)["input_ids"]
            assert ours[2].apply_chat_template(conversation, **options) == ids


@pytest.mark.parametrize("text", TEXTS)
def test_logits_agree_with_transformers(ours, theirs, text):
    params, config, tokenizer = ours
    ids = np.array([tokenizer.encode(text)])
    mine = reference.forward(params, config, ids).logits[0]
    with torch.no_grad():
        their = theirs[0](torch.tensor(ids)).logits[0].numpy()
    # float32 through 30 layers on logits of about 20: differences stay near 1e-4
    np.testing.assert_allclose(mine, their, atol=2e-3)
    np.testing.assert_array_equal(np.argsort(mine[-1])[-5:], np.argsort(their[-1])[-5:])


def test_the_greedy_answer_is_transformers_and_names_paris(ours, theirs):
    params, config, tokenizer = ours
    ids = np.array([tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True)])
    mine = reference.generate(params, config, ids, 40, config.eos_token_id)
    their = theirs[0].generate(torch.tensor(ids), max_new_tokens=40, do_sample=False, pad_token_id=2)
    np.testing.assert_array_equal(mine, their.numpy())
    assert "Paris" in tokenizer.decode(mine[0, ids.shape[1] :])


def test_a_padded_batch_answers_as_each_alone(ours):
    params, config, tokenizer = ours
    prompts = [tokenizer.encode(text)[:12] for text in ("Once upon a time", TEXTS[0])]
    length = max(map(len, prompts))
    ids = np.array([[0] * (length - len(p)) + p for p in prompts])
    mask = np.array([[0] * (length - len(p)) + [1] * len(p) for p in prompts])
    together = reference.generate(params, config, ids, 12, attention_mask=mask)
    for row, prompt in enumerate(prompts):
        alone = reference.generate(params, config, np.array([prompt]), 12)
        np.testing.assert_array_equal(together[row, length:], alone[0, len(prompt) :])


def test_the_fetched_folder_is_complete_and_nothing_more(smollm2):
    config = json.loads((smollm2 / "config.json").read_text())
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 100000.0
    assert config["rms_norm_eps"] == 1e-5
    assert {path.name for path in smollm2.iterdir()} - {"conversion.json"} == {  # an older cache lacks it
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
