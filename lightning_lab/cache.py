"""Where converted models and tokenised data are kept between runs."""

import os
from pathlib import Path


def cache_dir() -> Path:
    """Return the cache directory: ``$LIGHTNING_LAB_CACHE``, else ``~/.cache/lightning_lab``.

    Everything in it can be deleted at any time and is made again when it is needed.
    """
    configured = os.environ.get("LIGHTNING_LAB_CACHE")
    return Path(configured) if configured else Path.home() / ".cache" / "lightning_lab"
