"""Asks the server of this container for a path, on the address that it listens on; exit code 1 unless it answers 200.

python healthcheck.py /health
"""

from __future__ import annotations

import http.client
import os
import sys

TIMEOUT_SECONDS = 2
OF_ALL_INTERFACES = {"0.0.0.0": "127.0.0.1", "::": "::1"}


def main(path: str) -> int:
    host, port = os.environ.get("TRIMTAB_HOST") or "127.0.0.1", int(os.environ.get("TRIMTAB_PORT") or 8000)
    connection = http.client.HTTPConnection(OF_ALL_INTERFACES.get(host, host), port, timeout=TIMEOUT_SECONDS)
    try:
        connection.request("GET", path)
        status = connection.getresponse().status
    except (OSError, http.client.HTTPException) as error:
        print(f"{path}: {error}")
        return 1
    finally:
        connection.close()
    print(f"{path}: {status}")
    return int(status != http.client.OK)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
