"""Inductor's side of the GCU target: the device type, the scheduling, and models compiled without a card."""
