"""A plan applied to a live model. Two routes: `interface.py` and `graph/`; `owner.py` is common to both."""
