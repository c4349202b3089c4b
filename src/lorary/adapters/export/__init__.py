"""Adapters in the formats of other programs: llama.cpp, Ollama, vLLM and SGLang."""
