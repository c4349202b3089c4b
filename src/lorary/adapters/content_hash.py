"""The content hash of an adapter: equal for equal methods, sites and tensors, whatever the folder is called."""

from __future__ import annotations

import hashlib
import json

import torch

from lorary.adapters.adapter import Adapter
from lorary.adapters.native import native_tensors
from lorary.adapters.shared_tensors import checksums, collect_shared
from lorary.adapters.site_records import site_record
from lorary.model.ambient import mode_independent


@mode_independent
def content_hash(adapter: Adapter) -> str:
    """The SHA-256 over an adapter's method, sites and tensors; saving and loading keep it.

    Its base, provenance and notes do not count: the same adapter on another copy of its base has the same hash.

    Args:
        adapter: the adapter.

    Returns:
        64 hexadecimal digits.
    """
    shared = collect_shared(adapter)
    record = {
        "method": adapter.method.to_dict(),
        "sites": [site_record(adapted, adapter.method) for adapted in adapter.sites],
        "drawn": {} if shared.stored else checksums(shared.tensors),
    }
    total = hashlib.sha256(json.dumps(record, sort_keys=True).encode())
    for name, tensor in sorted(native_tensors(adapter, shared).items()):
        t = tensor.detach().cpu().contiguous()
        total.update(f"|{name}|{t.dtype}|{tuple(t.shape)}|".encode())
        total.update(t.reshape(-1).view(torch.uint8).numpy().data if t.numel() else b"")
    return total.hexdigest()
