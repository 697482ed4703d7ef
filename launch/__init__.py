"""Starts runs: several regions on one machine, sweeps, and what is said at the end."""
