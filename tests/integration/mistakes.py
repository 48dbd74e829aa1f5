from __future__ import annotations

import pytest

from map_bo.app.main import main


def failing(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Run in this process, expect a user's mistake, and return what was said."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        main(list(arguments))
    said = capsys.readouterr().err
    assert caught.value.code == 2, said
    assert "Traceback" not in said
    return said
