"""PEFT's adapter folders: reading, writing, and one file per PEFT type, which registers it when imported here."""

from lorary.adapters.peft import lora, adalora, vera, lycoris, ia3, hira, miss, trainable_tokens  # noqa: F401, I001 (reading order)
