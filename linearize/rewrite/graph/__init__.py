"""The graph route: the owner runs a graph of its own forward in which the attention is replaced."""
