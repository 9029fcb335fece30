"""The segments of a JPEG file before its first scan: what can be known of it without decoding."""

from __future__ import annotations

from dataclasses import dataclass, field

BASELINE, PROGRESSIVE = 0xC0, 0xC2
_FRAMES = (BASELINE, 0xC1, PROGRESSIVE)
_DHT, _SOS, _DQT, _DRI = 0xC4, 0xDA, 0xDB, 0xDD
_APP0, _APP1, _APP14, _APP15, _COM = 0xE0, 0xE1, 0xEE, 0xEF, 0xFE


@dataclass
class JpegFile:
    """A file of 8 bits a sample, grey or of three colours. Its compressed data may still be damaged.

    scan, scan_begin: the header of the first scan, and where its data begin. tables: of quantisation, by number.
    needed: begin and end of the segments that decoding needs. has_metadata: EXIF or XMP, which may say how to turn it.
    """

    content: bytes = field(repr=False)
    frame_marker: int = 0
    frame: bytes = b""
    scan: bytes = b""
    scan_begin: int = 0
    tables: dict[int, bytes] = field(default_factory=dict)
    needed: list[tuple[int, int]] = field(default_factory=list)
    has_metadata: bool = False
    is_jfif: bool = False
    adobe_transform: int | None = None

    @property
    def height(self) -> int:
        return int.from_bytes(self.frame[1:3], "big")

    @property
    def width(self) -> int:
        return int.from_bytes(self.frame[3:5], "big")

    @property
    def num_components(self) -> int:
        return self.frame[5]

    @property
    def component_numbers(self) -> bytes:
        return self.frame[6::3]

    @property
    def is_ycc(self) -> bool:
        """Whether libjpeg takes its three components for YCbCr."""
        if self.is_jfif:
            return True
        return self.component_numbers == b"\1\2\3" if self.adobe_transform is None else self.adobe_transform == 1


def read_jpeg_file(content: bytes) -> JpegFile | None:
    """None for what is no such file, and for one that is not put together as usual."""
    found = JpegFile(content)
    begin = 2
    if not content.startswith(b"\xff\xd8"):
        return None
    while begin + 4 <= len(content) and content[begin] == 0xFF:
        marker, end = content[begin + 1], begin + 2 + int.from_bytes(content[begin + 2 : begin + 4], "big")
        if not begin + 4 <= end <= len(content) or not _add(found, marker, begin, end):
            return None
        if marker == _SOS:
            return found if found.frame else None
        begin = end
    return None


def _add(found: JpegFile, marker: int, begin: int, end: int) -> bool:
    """Whether this segment is as usual."""
    if _APP0 <= marker <= _APP15 or marker == _COM:
        _add_application(found, marker, found.content[begin + 4 : min(end, begin + 20)])
        return True
    body = found.content[begin + 4 : end]
    found.needed.append((begin, end))
    if marker == _DQT:
        for start in range(0, len(body), 65):
            found.tables[body[start]] = body[start + 1 : start + 65]
        return len(body) % 65 == 0 and max(found.tables, default=0) < 4  # upper bits would mean 16 bits a step
    if marker in _FRAMES and not found.frame:
        found.frame_marker, found.frame = marker, body
        return len(body) > 6 and body[0] == 8 and len(body) == 6 + 3 * body[5] and body[5] in (1, 3)
    if marker == _SOS:
        found.scan, found.scan_begin = body, end
    return marker in (_DHT, _DRI, _SOS)


def _add_application(found: JpegFile, marker: int, body: bytes) -> None:
    """body: at least the 14 bytes that libjpeg looks at, if there are so many."""
    if marker == _APP0:
        found.is_jfif |= len(body) >= 14 and body.startswith(b"JFIF\0")
    elif marker == _APP1:
        found.has_metadata = True
    elif marker == _APP14 and len(body) >= 12 and body.startswith(b"Adobe"):
        found.adobe_transform = body[11]
