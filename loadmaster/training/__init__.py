"""Training: one loop, with its optimizer, checkpoints, rehearsal and progress."""
