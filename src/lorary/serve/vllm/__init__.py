"""vLLM as the engine: adapters in the form that it computes, the command that starts it, and the process."""
