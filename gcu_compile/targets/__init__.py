"""What a target is, and which one a compilation gets."""
