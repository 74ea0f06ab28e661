"""Errors that a user can put right are told without a traceback; defects keep theirs."""

from __future__ import annotations

import pytest

from ldcp_core import GateFileError
from training.console import explaining
from training.errors import UserError


@pytest.mark.parametrize(
    "error",
    [UserError("Nothing there."), GateFileError("Nothing there."), OSError("Nothing there.")],
)
def test_what_a_user_can_put_right_is_told(
    error: Exception, capsys: pytest.CaptureFixture[str]
) -> None:
    @explaining
    def main(argv: list[str]) -> int:
        raise error

    assert main([]) == 1
    assert capsys.readouterr().err == "error: Nothing there.\n"


def test_a_defect_keeps_its_traceback() -> None:
    @explaining
    def main() -> int:
        raise TypeError("a defect")

    with pytest.raises(TypeError, match="a defect"):
        main()
