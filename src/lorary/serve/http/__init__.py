"""The HTTP server: OpenAI's interface, vLLM's, LoRAX's and SGLang's adapter conventions, metrics, and a page."""
