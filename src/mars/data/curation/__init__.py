"""Choosing pictures worth training on: rules, scorers, near-duplicates, and a report of what was dropped and why."""
