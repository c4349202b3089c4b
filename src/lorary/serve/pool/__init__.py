"""The pool: adapters by name, from disk to the host to the base's device, within one byte budget."""
