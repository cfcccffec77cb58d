"""Data sets of clips on disk."""

from kdlib_asc.datasets.clips import Clips, ClipStore, SceneParts, split_groups
from kdlib_asc.datasets.dcase import dcase
from kdlib_asc.datasets.folder import folder

__all__ = ["ClipStore", "Clips", "SceneParts", "dcase", "folder", "split_groups"]
