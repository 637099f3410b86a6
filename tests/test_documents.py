"""The examples of transformers' Llama documentation run unchanged except for the import."""

import pytest
import torch
import transformers

import llama

CONFIGURATION = """
from transformers import LlamaModel, LlamaConfig

# Initializing a LLaMA llama-7b style configuration
configuration = LlamaConfig()

# Initializing a model from the llama-7b style configuration
model = LlamaModel(configuration)

# Accessing the model configuration
configuration = model.config
"""
GENERATION = """
from transformers import AutoTokenizer, LlamaForCausalLM

model = LlamaForCausalLM.from_pretrained("meta-llama/Llama-2-7b-hf")
tokenizer = AutoTokenizer.from_pretrained("meta-llama/Llama-2-7b-hf")

prompt = "Hey, are you conscious? Can you talk to me?"
inputs = tokenizer(prompt, return_tensors="pt")

# Generate
generate_ids = model.generate(inputs.input_ids, max_length=30)
text = tokenizer.batch_decode(generate_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)[0]
"""
TOKENIZER = """
from transformers import LlamaTokenizerFast

tokenizer = LlamaTokenizerFast.from_pretrained("hf-internal-testing/llama-tokenizer")
ids = tokenizer.encode("Hello this is a test")
"""


def run(example: str, library: str) -> dict:
    names: dict = {}
    exec(example.replace("from transformers import", f"from {library} import"), names)
    return names


@pytest.fixture
def hub(tmp_path, monkeypatch, smollm2):
    """Link the examples' model names to SmolLM2, the freely available LLaMA with real weights."""
    for name in ("meta-llama/Llama-2-7b-hf", "hf-internal-testing/llama-tokenizer"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).symlink_to(smollm2)
    monkeypatch.chdir(tmp_path)


def test_the_configuration_makes_a_llama_7b():
    with torch.device("meta"):  # 26 GB of weights, never allocated
        names = run(CONFIGURATION, "llama")
    assert type(names["model"]) is llama.LlamaModel
    assert names["configuration"] == llama.LlamaConfig()
    assert names["model"].num_parameters() == 6_607_343_616  # LLaMA 7B's 6.74 billion without the head


def test_a_conversation_is_the_one_that_transformers_has(hub):
    ours, theirs = run(GENERATION, "llama"), run(GENERATION, "transformers")
    assert type(ours["model"]) is llama.LlamaForCausalLM
    assert ours["generate_ids"].shape == (1, 30)
    assert torch.equal(ours["generate_ids"], theirs["generate_ids"])
    assert ours["text"] == theirs["text"]
    assert ours["text"].startswith("Hey, are you conscious? Can you talk to me?")


def test_the_tokenizer_encodes_as_transformers_does(hub):
    # transformers' class of this name does not follow this tokenizer.json; its Auto class does
    theirs = transformers.AutoTokenizer.from_pretrained("hf-internal-testing/llama-tokenizer")
    assert run(TOKENIZER, "llama")["ids"] == theirs.encode("Hello this is a test")
