"""What each part of a fleet costs: the figures of docs/scaling.md."""
