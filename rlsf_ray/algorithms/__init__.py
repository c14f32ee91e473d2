"""Numbers in, numbers out: signals, pairs, losses, voting and calibration. No Ray, files or configuration."""
