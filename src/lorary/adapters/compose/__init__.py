"""Adapters from adapters and from models: mixed, compared, compressed, extracted."""
