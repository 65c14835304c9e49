"""Store of all results, keyed by the digest of their dependencies.

It lies on a disk, and may be shared between machines.
"""
