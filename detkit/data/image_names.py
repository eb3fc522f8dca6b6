"""Finding images by the paths that they had on another machine, on Windows, or on a server."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

from detkit.data.files import Listings, with_slashes

MAX_PARTS = 20  # of a path: more in front are passed over


class ImageNames:
    """Finds images below a folder by what a label file calls them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.listings = Listings()
        self.moved: dict[str, str] = {}  # of the images found by a part of their path alone: the whole of it

    def locate(self, name: str) -> tuple[str, str]:
        """Return the name of an image below the folder, itself where nothing better is there.

        Returns:
            the name, and the other path whose image that is already; empty: no other's.
        """
        if not set(name) & set("/\\?%"):
            return name, ""
        if self.listings.has(os.path.join(self.folder, name)):
            return name, ""
        found = next((c for c in _candidates(name) if self.listings.has(os.path.join(self.folder, c))), None)
        if found is None:
            return name, ""
        other = self.moved.setdefault(found, name)
        return found, "" if other == name else other


def _candidates(name: str) -> Iterator[str]:
    """Yield what an image may be called: its path with slashes, or in a URL; then without the folders in front."""
    path = with_slashes(name)
    with contextlib.suppress(ValueError):  # no URL after all
        if "://" in path or "?" in path:
            url = urlsplit(path)
            path = parse_qs(url.query).get("d", [url.path])[0]  # Label Studio serves files as ?d=PATH
    for spelt in dict.fromkeys((path, unquote(path))):
        parts = [part for part in with_slashes(spelt).split("/") if part not in ("", ".", "..")]
        yield from ("/".join(parts[k:]) for k in range(max(len(parts) - MAX_PARTS, 0), len(parts)))
