"""What a run leaves behind: its directory, checkpoints, samples and progress."""
