"""Train a pruned model under a recovery plan."""
