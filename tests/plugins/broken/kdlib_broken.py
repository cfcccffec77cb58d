"""A plugin that lacks what it imports."""

import a_package_that_nobody_has

import kdlib


@kdlib.hookimpl
def kdlib_points():
    return {"never_there": a_package_that_nobody_has.Point}
