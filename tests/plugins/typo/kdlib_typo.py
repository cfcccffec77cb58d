"""A plugin with one hook as it should be and one that is misspelt."""

import kdlib
from kdlib.digits import DigitsMLP


@kdlib.hookimpl
def kdlib_models():
    return {"typo_mlp": DigitsMLP}


@kdlib.hookimpl
def kdlib_point():
    return {"typo_labels": kdlib.HardLabels}
