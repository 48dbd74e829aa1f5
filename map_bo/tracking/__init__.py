"""The run store: an append-only record that survives a crash."""
