"""Write and reopen checkpoints whose blocks differ in width."""
