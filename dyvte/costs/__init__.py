"""FLOPs and bytes."""
