"""Workloads, and the measuring of operators on them."""
