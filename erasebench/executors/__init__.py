"""Executors that process shards: this process, or Ray actors."""
