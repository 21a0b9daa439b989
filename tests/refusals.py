"What a test asks of an error."
from contextlib import contextmanager

import pytest


@contextmanager
def refused(
    error: type,  # of the exception
    *parts,  # what its message must name
):
    "The error must come, on one line, naming all the parts."
    with pytest.raises(error) as info: yield
    message = str(info.value)
    assert "\n" not in message and all(str(p) in message for p in parts), message
