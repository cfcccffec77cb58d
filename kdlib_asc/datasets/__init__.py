"""Data sets of clips, on disk or made."""

from kdlib_asc.datasets.clips import Clips, ClipStore, SceneParts, split_groups
from kdlib_asc.datasets.dcase import dcase
from kdlib_asc.datasets.folder import folder
from kdlib_asc.datasets.synthetic import SyntheticScenes, synthetic_scenes

__all__ = ["ClipStore", "Clips", "SceneParts", "SyntheticScenes", "dcase", "folder", "split_groups", "synthetic_scenes"]
