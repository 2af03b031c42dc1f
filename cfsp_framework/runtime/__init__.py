"""Write files atomically, share work between processes, and report progress."""
