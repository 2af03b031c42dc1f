"""Write a pruned checkpoint in another program's format."""
