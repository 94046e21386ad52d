"""Google Cloud Storage, each request tried once: `RemoteFiles` tries again, counts, and knows when to give up.

gcsfs by itself tries six times with waits of up to half a minute, and says nothing.
"""

from __future__ import annotations

from typing import Any

import aiohttp

# gcsfs itself exports a class that asks for a bucket's layout by gRPC first, with waits of its own.
from gcsfs.core import GCSFileSystem


class SingleTryGCS(GCSFileSystem):
    """gcsfs without its own retries."""

    _request: Any = GCSFileSystem._request.__wrapped__

    @classmethod
    def with_timeout(cls, seconds: float) -> SingleTryGCS:
        """Each request, its answer included, within so many seconds."""
        timeout = aiohttp.ClientTimeout(total=seconds)
        return cls(requests_timeout=timeout, skip_instance_cache=True)
