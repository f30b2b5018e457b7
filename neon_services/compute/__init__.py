"""The compute side: compute_ctl, walproposer, and the fabricated data directory."""
