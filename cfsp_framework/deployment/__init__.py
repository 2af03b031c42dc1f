"""From a pruned checkpoint to one in use: speed, tasks, exports, publishing."""
