"""Windows over images."""

from __future__ import annotations

import pytest

from espalier.ir.images import Window


@pytest.mark.parametrize(
    ("window", "sees"),
    [
        (Window((5, 4), (5, 4), (3, 3), before=(1, 1)), True),
        (Window((5, 4), (3, 2), (3, 3), stride=(2, 2), before=(1, 1)), True),
        (Window((5, 4), (4, 4), (2, 1), stride=(2, 1)), False),  # the last row lies below the image
        (Window((4, 5), (4, 6), (1, 2), before=(0, 2)), False),  # the first column lies left of it
        (Window((1, 1), (1, 1), (1, 2), dilation=(1, 2), before=(0, 1)), False),  # one tap on either side of it
        (Window((1, 1), (1, 1), (1, 3), before=(0, 1)), True),
    ],
)
def test_whether_every_output_sees_the_image(window: Window, sees: bool) -> None:
    assert window.always_sees is sees
