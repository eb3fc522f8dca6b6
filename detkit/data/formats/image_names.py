"""Finding images by the paths that they had on another machine, on Windows, or on a server."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

from detkit.data.file_utils import Listings, with_slashes

MAX_PARTS = 20  # of a path: more in front are passed over


class ImageNames:
    """Finds images below a folder by what a label file calls them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.listings = Listings()
        self.owners: dict[str, str] = {}  # of each image, the name that it was first found by

    def locate(self, name: str) -> tuple[str, str]:
        """Return the name of an image below the folder, itself where nothing better is there.

        Returns:
            the name, and the other path whose image that is already; empty: no other's.
        """
        there = not set(name) & set("/\\?%") or self.listings.has(os.path.join(self.folder, name))
        found = name if there else self._find(name)
        if found is None:
            return name, ""
        other = self.owners.setdefault(found, name)
        return found, "" if other == name else other

    def _find(self, name: str) -> str | None:
        """Return what an image is called here; None where none is, also not where its own folder is and it is not."""
        for names in _candidates(name):
            for candidate in names:
                if self.listings.has(os.path.join(self.folder, candidate)):
                    return candidate
                folder = os.path.dirname(candidate)
                if folder and self.listings[os.path.join(self.folder, folder)]:
                    break
        return None


def _candidates(name: str) -> Iterator[list[str]]:
    """Yield what an image may be called, its path with slashes, or in a URL: each with fewer and fewer folders."""
    path = with_slashes(name)
    with contextlib.suppress(ValueError):  # no URL after all
        if "://" in path or "?" in path:
            url = urlsplit(path)
            path = parse_qs(url.query).get("d", [url.path])[0]  # Label Studio serves files as ?d=PATH
    for decoded in dict.fromkeys((path, unquote(path))):
        parts = [part for part in with_slashes(decoded).split("/") if part not in ("", ".", "..")]
        yield ["/".join(parts[k:]) for k in range(max(len(parts) - MAX_PARTS, 0), len(parts))]
