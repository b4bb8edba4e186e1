"""What every training loop shares: losses, checkpoints, schedules, sharding over processes."""
