"""What a compute node says of itself: ``python -c "…main()" FILE``, run there before anything is sent."""

from __future__ import annotations

import json
import socket
import sys
from pathlib import Path
from typing import Any

from quantool import __version__


def look(token: Path) -> dict[str, Any]:
    """Who this is, which quantool it has, and whether it sees the file that the login node wrote."""
    return {"host": socket.gethostname(), "quantool": __version__, "sees": token.is_file()}


def main() -> None:
    """Print it as one line of JSON."""
    sys.stdout.write(json.dumps(look(Path(sys.argv[-1]))) + "\n")
