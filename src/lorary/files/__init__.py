"""How bytes are trusted: atomic writes, manifests, strict JSON, safe opening."""
