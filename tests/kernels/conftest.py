"""Every test of the C operators runs once for each instruction set of this machine."""

import pytest

from call import available_isas, set_isa

ISAS = available_isas()


@pytest.fixture(params=ISAS, autouse=True, scope="module")
def isa(request):
    """Name of the instruction set in use."""
    assert set_isa(request.param) == request.param
    yield request.param
    set_isa(ISAS[0])
