"""Command lines that make, check, show, count and rewrite shard sets."""
