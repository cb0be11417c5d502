"""The demo model: a real language model that needs no model hub."""

from gcu_compile.demo_model.fetch import default_directory, ensure_demo_model

__all__ = ["default_directory", "ensure_demo_model"]
