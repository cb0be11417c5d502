"""What a compilation is kept under (`key.py`) and what is kept of it (`store.py`)."""
