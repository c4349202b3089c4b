"""The scheduler, which chooses the requests of the batch: fair shares, ageing, room for adapters."""
