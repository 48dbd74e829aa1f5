"""Finds the packages: those of ``map_bo``, and ``conf/``, which is installed as ``map_bo.conf``."""

from setuptools import find_packages, setup

setup(
    packages=[
        *find_packages(include=["map_bo", "map_bo.*"]),
        *(f"map_bo.{name}" for name in find_packages(include=["conf", "conf.*"])),
    ]
)
