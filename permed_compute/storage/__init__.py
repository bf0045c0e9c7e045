"""Files of finished parts and checkpoints."""
