"""Tools of someone who debugs a graph."""
