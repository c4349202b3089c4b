"""Adapter files of other tools than PEFT: one translation of names and layouts for each, one reader for all."""
