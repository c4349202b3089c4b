"""Adapters written for other programs: one file per form."""
