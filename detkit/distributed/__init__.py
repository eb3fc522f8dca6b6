"""Distributed training: rendezvous, process group, collectives and SyncBatchNorm."""
