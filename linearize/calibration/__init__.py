"""Closed-form fits of new parameters, and the observers that supply their data."""
