"""Acoustic scene classification with teacher-student learning (Heo et al. 2019), as plugins of kdlib."""
