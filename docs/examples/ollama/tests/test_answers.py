"""Tests that use the model; nothing in them says so but the fixture."""

import pytest
from assistant import ask


@pytest.mark.parametrize("question", ["What is a lease?", "What is VRAM?"])
def test_answer(ollama, question):
    answer = ask(ollama.base_url, ollama.model, question, ollama.options)
    ollama.record(answer)
    assert answer["response"]
