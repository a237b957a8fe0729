"""Images of requests: from data: URLs, or from the few places that the server may fetch from.

A request never names a file of the server, and nothing is decoded before its size is known.
"""

from __future__ import annotations

import base64
import binascii
import re
from dataclasses import dataclass
from io import BytesIO
from typing import Any

from dyvte.data.defects import is_of_sample, problem_text
from dyvte.data.images import as_rgb
from dyvte.serving.config import MEGABYTE, ServeConfig
from dyvte.serving.errors import RequestError
from dyvte.serving.fetch import Fetcher

# Decoders that are read: common on the web, and none that runs another program.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
_DATA = re.compile(
    r"data:(?P<kind>[\w.+-]+/[\w.+-]+)?(?P<parameters>(?:;[\w.+-]+=[\w.+-]+)*);base64,", re.IGNORECASE
)


@dataclass(frozen=True)
class ImageReader:
    """Reads the images of requests within the server's limits.

    Attributes
    ----------
    max_bytes, max_pixels
        Of one image.
    fetcher
        Gets images from allowed places.
    """

    max_bytes: int
    max_pixels: int
    fetcher: Fetcher

    @classmethod
    def of(cls, config: ServeConfig) -> ImageReader:
        """With the limits of a configuration."""
        max_bytes = int(config.max_image_mb * MEGABYTE)
        fetcher = Fetcher(config.allow_url_prefix, max_bytes, config.fetch_seconds)
        return cls(max_bytes, int(config.max_megapixels * 1e6), fetcher)

    def read(self, url: str, path: str) -> Any:
        """An RGB PIL image.

        Parameters
        ----------
        url
            A data: URL, or one that may be fetched.
        path
            Where it stands in the request, for messages.

        Raises
        ------
        RequestError
            Naming what is wrong with it; status 413 where it is too large.
        """
        content = self._from_data(url, path) if url[:5].lower() == "data:" else self.fetcher.get(url, path)
        return self._decoded(content, path)

    def _from_data(self, url: str, path: str) -> bytes:
        head = _DATA.match(url[:200])
        if head is None:
            raise RequestError(
                f"{path}: expected data:image/...;base64,...", code="invalid_image", param=path
            )
        if head["kind"] is not None and not head["kind"].lower().startswith("image/"):
            raise RequestError(f"{path}: {head['kind']} is no image", code="invalid_image", param=path)
        encoded = url[head.end() :]
        if len(encoded) * 3 // 4 - 2 > self.max_bytes:
            raise self._too_large(
                path, f"{len(encoded) * 3 / 4 / MEGABYTE:.1f} MB", self.max_bytes / MEGABYTE, "MB"
            )
        try:
            return base64.b64decode(encoded, validate=True)
        except (binascii.Error, ValueError) as error:
            raise RequestError(f"{path}: not base64 ({error})", code="invalid_image", param=path) from error

    def _decoded(self, content: bytes, path: str) -> Any:
        from PIL import Image

        try:
            with Image.open(BytesIO(content), formats=FORMATS) as image:
                pixels = image.width * image.height
                if pixels > self.max_pixels:
                    shown = f"{image.width} x {image.height}"
                    raise self._too_large(path, shown, self.max_pixels / 1e6, "million pixels")
                return as_rgb(image)
        except RequestError:
            raise
        except Exception as error:  # what a damaged file makes its decoder raise is beyond listing
            if not is_of_sample(error):
                raise
            what = problem_text(error)
            if "cannot identify image file" in what:
                what = f"these bytes are none of {', '.join(FORMATS)}"
            raise RequestError(
                f"{path}: no image can be read: {what}", code="invalid_image", param=path
            ) from error

    def _too_large(self, path: str, found: str, limit: float, unit: str) -> RequestError:
        return RequestError(
            f"{path}: an image of {found}, this server takes at most {limit:g} {unit}: send a smaller one",
            status=413,
            code="image_too_large",
            param=path,
        )
