"""Everything that was made, under the digest of all it depends on: on a disk, and shared between machines."""
