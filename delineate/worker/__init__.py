"""The worker process: claim, run, settle."""
