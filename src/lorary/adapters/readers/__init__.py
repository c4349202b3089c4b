"""Readers of adapter folders: what each program does with a folder, by its own reading rules, one file each."""
