"""Pictures and videos between disk and tensors: float32 in [0, 1], channels first, frames first.

Everything that reads applies what a viewer would apply (EXIF orientation, a video's display rotation, transparency) and refuses
files that are empty, cut short or no picture or video at all. Everything that writes appears under its name whole or not at all.
Embedded colour profiles are ignored.
"""

from vcd_fast.media.images import IMAGE_SUFFIXES, read_image, resize_crop, write_image
from vcd_fast.media.strips import frame_strip
from vcd_fast.media.videos import VIDEO_SUFFIXES, numbered_frames, read_video, write_video

__all__ = [
    "IMAGE_SUFFIXES",
    "VIDEO_SUFFIXES",
    "frame_strip",
    "numbered_frames",
    "read_image",
    "read_video",
    "resize_crop",
    "write_image",
    "write_video",
]
