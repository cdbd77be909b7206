"""The Ollama server: address, models, predictions, monitoring."""
