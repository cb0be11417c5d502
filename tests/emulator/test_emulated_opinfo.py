"""Every operator of PyTorch's own database gives on the emulated card what it gives on the CPU."""

import pytest
from emulated import on_card


@on_card
def sweep(samples):
    import opinfo

    failures, ran = {}, 0
    for name in opinfo.entries():
        try:
            ran += opinfo.compare(name, samples) > 0
        except Exception as error:  # the whole list is what helps
            failures[name] = f"{type(error).__name__}: {str(error).strip()[:200]}"
    assert not failures, failures
    print(f"{ran} operators equal")
    assert ran >= 600


def test_operators_their_inplace_variants_and_gradients_equal_cpu():
    sweep(samples=3)


@pytest.mark.slow
def test_all_samples_of_all_operators_equal_cpu():
    sweep(samples=None)
