"""A data set: a folder of pictures with prompts. No videos are needed; of a video its first frame is the condition."""

from vcd_fast.data.folder import PictureFolder, Sample
from vcd_fast.data.settings import DataSettings

__all__ = ["DataSettings", "PictureFolder", "Sample"]
