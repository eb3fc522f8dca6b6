"""Several processes that train as one: how they find each other, the process group, collectives, SyncBatchNorm."""
