"""Which requests compute now: fair shares, ageing, room for adapters."""
