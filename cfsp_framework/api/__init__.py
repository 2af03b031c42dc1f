"""Every type that crosses a folder: what plugins implement, and the records a run writes."""
