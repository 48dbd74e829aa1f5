"""Configuration files, packaged as a part of ``map_bo.conf``."""
