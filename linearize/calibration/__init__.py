"""Closed-form fits of new parameters, and the observers that they read."""
