"""PEFT's adapter folders, one file per PEFT type. Importing a file registers its type: a new one is one line here."""

from lorary.adapters.peft import lora, adalora, vera  # noqa: F401, I001 (reading order)
