"""A short check whether the model hub can be reached. Without a network, the hub's client would retry for over a minute."""

from __future__ import annotations

import os
import socket
import sys
from urllib.parse import urlsplit

PROBE_S = 3.0
PROXIES = ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")


def go_offline_if_unreachable() -> None:
    """Switch the hub's client to offline mode, which uses only its cache, when the hub's host does not answer.

    Behind a proxy, or when the user has chosen the mode, nothing is checked or changed.
    """
    if os.environ.get("HF_HUB_OFFLINE") or any(os.environ.get(name) for name in PROXIES):
        return
    endpoint = urlsplit(os.environ.get("HF_ENDPOINT", "https://huggingface.co"))
    try:
        socket.create_connection((endpoint.hostname or "", endpoint.port or 443), timeout=PROBE_S).close()
    except OSError:
        os.environ["HF_HUB_OFFLINE"] = "1"
        for module, name in (("huggingface_hub.constants", "HF_HUB_OFFLINE"), ("datasets.config", "HF_HUB_OFFLINE")):
            if module in sys.modules:
                setattr(sys.modules[module], name, True)
