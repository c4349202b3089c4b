"""Bytes on disk: lorary's own folders, PEFT's, and the atomic writing under both."""
