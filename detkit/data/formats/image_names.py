"""Finding images by their paths on another machine, on Windows, or on a server."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

from detkit.data.file_utils import Listings, with_slashes

MAX_PARTS = 20  # trailing parts of a path that are considered


class ImageNames:
    """Finds images below a folder by their paths in a label file."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.listings = Listings()
        self.owners: dict[str, str] = {}  # first path that led to each image

    def locate(self, name: str) -> tuple[str, str]:
        """Find an image.

        Returns:
            its path relative to the folder (``name`` if it is not found), and another path that has led to the same
            image, or "".
        """
        path = os.path.join(self.folder, name)  # noqa: PTH118  (bulk: no Path for each image)
        exists = not set(name) & set("/\\?%") or self.listings.has(path)
        found = name if exists else self._find(name)
        if found is None:
            return name, ""
        other = self.owners.setdefault(found, name)
        return found, "" if other == name else other

    def _find(self, name: str) -> str | None:
        """Return the path of an image, or None; if its own folder exists, no shorter path is tried."""
        for names in _candidates(name):
            for candidate in names:
                if self.listings.has(f"{self.folder}/{candidate}"):
                    return candidate
                folder = candidate.rpartition("/")[0]
                if folder and self.listings[f"{self.folder}/{folder}"]:
                    break
        return None


def _candidates(name: str) -> Iterator[list[str]]:
    """Yield possible paths of an image, with slashes or from a URL, each with successively fewer leading folders."""
    path = with_slashes(name)
    with contextlib.suppress(ValueError):  # not a URL
        if "://" in path or "?" in path:
            url = urlsplit(path)
            path = parse_qs(url.query).get("d", [url.path])[0]  # Label Studio serves files as ?d=PATH
    for decoded in dict.fromkeys((path, unquote(path))):
        parts = [part for part in with_slashes(decoded).split("/") if part not in ("", ".", "..")]
        yield ["/".join(parts[k:]) for k in range(max(len(parts) - MAX_PARTS, 0), len(parts))]
