"""Tests beside a real Ollama server; see docs/explanation/real-ollama.md."""
