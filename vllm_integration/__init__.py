"""vLLM with gcu-compile: the platform, its compiler, and the seven behaviours. Imports vLLM only when called."""

PLATFORM = "vllm_integration.platform.GcuHostPlatform"


def platform_plugin() -> str:
    """Entry point `vllm.platform_plugins`: the platform class that vLLM shall use, by its dotted name.

    vLLM swallows what this raises, so the target is checked later, where an error reaches the user.
    """
    return PLATFORM


def register() -> None:
    """Entry point `vllm.general_plugins`: runs in every vLLM process, possibly more than once."""
    from vllm_integration import behaviours

    behaviours.install()
