"""A model for other runtimes, and one model directory of a run's checkpoint."""
